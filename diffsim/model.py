"""A robot as constant tensors, laid out for the batch (see builder.py for where they come from).

Joints are put into *groups*: joints of one kind that hang on the joints of one other group. Ant's
four hips are one group and its four ankles another, so its four legs are simulated as one leg, four times as
wide. Every tensor below has one row per joint of a group, `(n, 1)`, and broadcasts over environments `(n, B)`.
"""

from dataclasses import asdict, dataclass, field, replace
from math import inf
from numbers import Real
from typing import TYPE_CHECKING

import mujoco
import torch
from torch import Tensor

from diffsim.spatial import Mat, Sym, Vec

if TYPE_CHECKING:
    from diffsim.dense import Pattern


@dataclass(frozen=True)
class Softness:
    """The compliant law of contacts and joint limits (contact.py): one set for all robots.

    Stiffness per point or joint is k = stiffness / (invweight0 period^2) from the MJCF's solref and MuJoCo's effective
    masses (README.md), of a limit up to limit_stiffness times that. Damping rises with the depth, and is critical on
    the way in (times solref's damping ratio) at the reference depth.
    """

    stiffness: float = 2.4
    limit_stiffness: float = 5.0  # of a limit by that of a contact, unless its solimp asks for less
    contact_width: float = 0.003  # m, of the softplus
    contact_depth: float = 0.005  # m, where the damping is critical
    release_depth: float = 0.005  # m, over which the damping of what comes out is bounded; inf: it is not
    limit_width: float = 0.01  # rad or m; of a joint whose range is below 0.5 as much less as that is
    limit_depth: float = 0.03  # rad or m; likewise
    slip: float = 0.02  # m/s, regularisation of Coulomb friction
    edge: float = 0.01  # m, radius of a box's edges between bodies, at most half of its least half size

    def __post_init__(self):
        for name, x in asdict(self).items():
            number = isinstance(x, Real) and not isinstance(x, bool)
            if not (number and (0 < x < inf or (name, x) == ("release_depth", inf))):
                raise ValueError(f"{name} of the softness is {x!r}; it must be above 0, and finite")

    def widened(self, factor: float) -> "Softness":
        """The same law over `factor` times the widths."""
        return replace(self, contact_width=self.contact_width * factor, limit_width=self.limit_width * factor)


@dataclass
class Contacts:
    """The spheres of a group's links that can meet the ground, (p, n, 1): up to p on each of n links.

    A link with fewer than p is filled up with spheres of zero stiffness, far above any ground.
    """

    point: Vec  # centre, in the link's frame
    radius: Tensor  # with the margin, which inflates the geom as in MuJoCo
    ground: Tensor  # height of the plane
    k: Tensor  # N/m
    damping: Tensor  # s/m, Hunt-Crossley
    friction: Tensor
    index: list[list[int]]  # [p][n] -> place in model.contact_names, or -1


@dataclass(kw_only=True)
class Touching:
    """Spheres of one body that can meet cores of another, (p, n, 1).

    A core is a box of half sizes `half` (a line for a capsule, a point for a sphere); a geom is what lies within its
    radius of its core. So a box has round edges, and the normal of a contact is continuous.
    """

    point: Vec  # centre of the sphere, in its link's frame
    line: Vec | None  # of a capsule that meets a capsule: half its core, on which the sphere slides; None: no such
    core: Vec | None  # centre of the core, in its link's frame; None: its origin
    axes: Mat | None  # of the core; None: the link's
    half: Vec
    radius: Tensor  # of the sphere, with the margin
    reach: Tensor  # distance of point and core at which the geoms touch
    k: Tensor  # N/m
    damping: Tensor  # s/m, Hunt-Crossley
    friction: Tensor
    index: list[list[int]]  # [p][n] -> place in model.contact_names, or -1


@dataclass(kw_only=True)
class Pairs(Touching):
    """Up to p pairs for each of a group's n links, with one body that is not a link."""

    other: int  # group of the other body, which is free and has no links; -1: the world
    swapped: bool  # the spheres are the other's, the cores the links'


@dataclass(kw_only=True)
class LinkPairs(Touching):
    """All pairs of moving bodies where links touch links, (1, n, 1): the spheres are on a, the cores on b."""

    a: Tensor  # (n,) links, counted through the groups
    b: Tensor
    pattern: "Pattern"  # of the matrix A that they make (dense.py)


@dataclass
class Group:
    """Joints of one kind, each on the listed row of the parent group (-1: the world)."""

    kind: str
    parent: int
    parent_rows: list[int]
    joints: list[int]  # MuJoCo joint ids
    qpos: list[list[int]]  # [component][row] -> row of qpos
    dofs: list[list[int]]  # [component][row] -> row of qvel
    shifts_tree: bool  # a slide joint that moves a whole tree
    # constant geometry, in the parent's frame then in this joint's
    offset: Vec | None = None
    rotation: Mat | None = None
    axis: Vec | None = None
    anchor: Vec | None = None  # of the rotation, None at the link's origin
    q0: Tensor | None = None
    # inertia of the link (zero where several joints share a body, for all but the last)
    has_mass: bool = False
    mass: Tensor | None = None
    com: Vec | None = None
    inertia: Sym | None = None
    contacts: Contacts | None = None
    pairs: list[Pairs] = field(default_factory=list)
    # joint-space terms
    armature: Tensor | None = None
    damping: Tensor | None = None
    stiffness: Tensor | None = None
    spring_ref: Tensor | None = None
    limit_width: float | Tensor | None = None
    limit_low: Tensor | None = None
    limit_high: Tensor | None = None
    limit_k: Tensor | None = None
    limit_damping: Tensor | None = None
    servo_kp: Tensor | None = None  # position actuators: force kp q + kv v, both negative or zero
    servo_kv: Tensor | None = None


@dataclass
class Model:
    """A robot as constant tensors. `mj_model` is the compiled MuJoCo model all numbers come from."""

    mj_model: mujoco.MjModel
    groups: list[Group]
    links: LinkPairs | None  # None: no link touches another, and free bodies are in the groups' pairs
    gear: Tensor  # (nv, nu): generalised force of a unit control, N m or N
    bias: Tensor  # (nv, 1): force of the actuators at zero control, position and velocity
    ctrl_low: Tensor  # (nu, 1)
    ctrl_high: Tensor
    gravity: Vec
    contact_names: list[str]  # geom of every contact point, "geom on geom" of every pair
    softness: Softness
    collisions: bool  # whether moving bodies touch each other
    device: torch.device
    dtype: torch.dtype

    @property
    def timestep(self) -> float:
        return float(self.mj_model.opt.timestep)

    @property
    def nq(self) -> int:
        return self.mj_model.nq

    @property
    def nv(self) -> int:
        return self.mj_model.nv

    @property
    def nu(self) -> int:
        return self.mj_model.nu

    @property
    def qpos_rows(self) -> list[list[list[int]]]:
        """Where in qpos the groups' coordinates are: [group][component][link]."""
        return [g.qpos for g in self.groups]

    @property
    def dof_rows(self) -> list[list[list[int]]]:
        """Where in qvel the groups' dofs are."""
        return [g.dofs for g in self.groups]

    def without_contacts(self) -> "Model":
        """The same robot with nothing to touch."""
        groups = [replace(g, contacts=None, pairs=[]) for g in self.groups]
        return replace(self, groups=groups, links=None, contact_names=[])
