"""MJCF -> the constant tensors of a Model. MuJoCo parses the file and computes masses; here they are laid out."""

import warnings
from numbers import Real

import mujoco
import numpy as np
import torch
from torch import Tensor

from diffsim.collisions import fill_pairs
from diffsim.mjcf import GEOM, JOINT, can_touch, check, collide, disabled, label, moving_pairs, read
from diffsim.model import Contacts, Group, Model, Softness
from diffsim.spatial import Mat, Sym, Vec

WIDE = 0.5  # range of a joint, rad or m, below which its stops act over less than Softness says


class SelfCollisionWarning(UserWarning):
    """The robot's links could touch each other, and here they will not."""


def load_model(xml, *, device="cpu", dtype=torch.float32, timestep=None, softness=None, collisions=False) -> Model:
    """Load an MJCF file or string.

    Args: `xml` a path or the text of a file; `timestep` replaces the file's, seconds; `softness`: None for the default;
    `collisions`: whether bodies touch each other, too, not the ground alone (see README.md for which do).
    Raises: ValueError when MuJoCo cannot read it, UnsupportedError naming the first element diffsim lacks.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype!r}; it must be torch.float32 or torch.float64")
    if softness is not None and not isinstance(softness, Softness):
        raise ValueError(f"softness is {softness!r}; it must be a diffsim.Softness")
    if timestep is not None and (isinstance(timestep, bool) or not isinstance(timestep, Real)):
        raise ValueError(f"timestep is {timestep!r}; it must be a number, in seconds")
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError
    except (RuntimeError, TypeError, AssertionError):
        raise ValueError(f"unknown device '{device}', or one that is not here; use cpu or cuda") from None
    mj_model, name = read(xml)
    if timestep is not None:
        mj_model.opt.timestep = timestep
    check(mj_model, name, collisions)
    model = build_model(mj_model, softness or Softness(), device, dtype, collisions)
    if collisions and not (model.links or any(g.pairs for g in model.groups)):
        warnings.warn(
            f"collisions=True changes nothing: no two geoms of {name} may touch (contype, conaffinity)", stacklevel=2
        )
    return model


def build_model(mj_model: mujoco.MjModel, softness: Softness, device, dtype, collisions: bool = False) -> Model:
    """Constant tensors of a compiled MuJoCo model that `load_model` accepts."""
    return _Builder(mj_model, softness, torch.device(device), dtype, collisions).build()


def without_margins(model: Model) -> Model:
    """The same robot measured by its geoms as they are drawn."""
    bare = model.mj_model.__copy__()
    bare.geom_margin[:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SelfCollisionWarning)  # said when the robot was loaded
        return build_model(bare, model.softness, model.device, model.dtype, model.collisions)


def hunt_crossley(stiffness, period, ratio, depth: float):
    """d such that k depth d = 2 ratio sqrt(k mass): with k = stiffness mass / period^2 the mass cancels."""
    return 2 * ratio * period / (np.sqrt(stiffness) * depth)


class _Builder:
    def __init__(self, m, softness, device, dtype, collisions):
        self.m, self.softness, self.device, self.dtype, self.collisions = m, softness, device, dtype, collisions
        self.data = mujoco.MjData(m)
        mujoco.mj_kinematics(m, self.data)  # frames at qpos0: only relative poses of welded bodies are read

    def column(self, values) -> Tensor:
        return torch.tensor(np.asarray(values, float), device=self.device, dtype=self.dtype).reshape(-1, 1)

    def vec(self, rows) -> Vec:
        return Vec(*(self.column(c) for c in np.asarray(rows, float).reshape(-1, 3).T))

    # --- the tree -------------------------------------------------------------------------------------------
    def link_of_body(self, body) -> int:
        """Last joint that moves `body` (or its welded parents); -1 for the world."""
        m = self.m
        while body and m.body_jntnum[body] == 0:
            body = m.body_parentid[body]
        return m.body_jntadr[body] + m.body_jntnum[body] - 1 if body else -1

    def parent_joint(self, j) -> int:
        body = self.m.jnt_bodyid[j]
        return j - 1 if j > self.m.body_jntadr[body] else self.link_of_body(self.m.body_parentid[body])

    def in_link(self, body):
        """Pose of a (possibly welded) body in the frame of its link: position (3,), rotation (3, 3)."""
        m, pos, rot = self.m, np.zeros(3), np.eye(3)
        while body and m.body_jntnum[body] == 0:
            mujoco.mju_quat2Mat(flat := np.zeros(9), m.body_quat[body])
            r = flat.reshape(3, 3)
            pos, rot = m.body_pos[body] + r @ pos, r @ rot
            body = m.body_parentid[body]
        return pos, rot

    def geom_in_link(self, geom):
        """Its pose in the frame of its link."""
        pos, rot = self.in_link(self.m.geom_bodyid[geom])
        mujoco.mju_quat2Mat(flat := np.zeros(9), self.m.geom_quat[geom])
        return pos + rot @ self.m.geom_pos[geom], rot @ flat.reshape(3, 3)

    def make_groups(self) -> list[Group]:
        """Collect, level by level, the children of one kind of all joints of a parent group. With collisions a free
        body is a group of its own: others may touch it and not its like."""
        m = self.m
        children = {j: [] for j in range(-1, m.njnt)}
        for j in range(m.njnt):
            children[self.parent_joint(j)].append(j)
        groups, todo = [], [(-1, [-1])]
        for index, joints in todo:  # grows while we walk it
            packs: dict = {}
            for row, p in enumerate(joints):
                for c in children[p]:
                    kind = JOINT[m.jnt_type[c]]
                    one_body = p >= 0 and bool(m.jnt_bodyid[p] == m.jnt_bodyid[c])  # nothing touches between its joints
                    below = index < 0 or groups[index].shifts_tree and (one_body or not self.collisions)
                    shifts_tree = kind == "slide" and below  # dense.py: links that touch have their tree's origin
                    alone = c if self.collisions and kind == "free" else None
                    packs.setdefault((kind, shifts_tree, alone), []).append((row, c))
            for (kind, shifts_tree, _), members in packs.items():
                rows, ids = [row for row, _ in members], [c for _, c in members]
                nq, nd = {"free": (7, 6), "ball": (4, 3)}.get(kind, (1, 1))
                groups.append(Group(
                    kind, index, rows, ids, shifts_tree=shifts_tree,
                    qpos=[[int(m.jnt_qposadr[c]) + i for c in ids] for i in range(nq)],
                    dofs=[[int(m.jnt_dofadr[c]) + i for c in ids] for i in range(nd)],
                ))  # fmt: skip
                todo.append((len(groups) - 1, ids))
        return groups

    # --- constants of one group -----------------------------------------------------------------------------
    def fill(self, g: Group):
        m, joints = self.m, g.joints
        first = [m.body_jntadr[m.jnt_bodyid[j]] == j for j in joints]
        pos, rot = [], []
        for j, is_first in zip(joints, first):
            p, r = np.zeros(3), np.eye(3)
            if is_first:  # else: same body as the joint before, identity
                body = m.jnt_bodyid[j]
                mujoco.mju_quat2Mat(flat := np.zeros(9), m.body_quat[body])
                wp, wr = self.in_link(m.body_parentid[body])
                p, r = wp + wr @ m.body_pos[body], wr @ flat.reshape(3, 3)
            pos.append(p)
            rot.append(r)
        rot = np.stack(rot)
        g.offset = self.vec(pos)
        if abs(rot - np.eye(3)).max() > 1e-12:
            g.rotation = Mat(*(self.vec(rot[:, :, c]) for c in range(3)))
        g.axis = self.vec(m.jnt_axis[joints])
        if m.jnt_pos[joints].any():
            g.anchor = self.vec(m.jnt_pos[joints])
        g.q0 = self.column(m.qpos0[m.jnt_qposadr[joints]])
        self.fill_inertia(g)
        self.fill_contacts(g)
        dof = m.jnt_dofadr[joints]
        g.armature = self.column(m.dof_armature[dof])
        if m.dof_damping[dof].any() and not disabled(m, "DAMPER"):
            g.damping = self.column(m.dof_damping[dof])
        if m.jnt_stiffness[joints].any() and not disabled(m, "SPRING"):
            g.stiffness = self.column(m.jnt_stiffness[joints])
            g.spring_ref = self.column(m.qpos_spring[m.jnt_qposadr[joints]])
        limited = m.jnt_limited[joints].astype(bool)
        if limited.any() and not disabled(m, "LIMIT", "CONSTRAINT"):
            period, ratio = self.solref(m.jnt_solref[joints])
            in_mujoco = 1 / (1 - np.clip(m.jnt_solimp[joints, 1], 0, 0.9999))  # by what solref says, a contact's is 2.4
            firmness = np.clip(in_mujoco / Softness.stiffness, 1, self.softness.limit_stiffness)
            stiffness = self.softness.stiffness * firmness
            k = stiffness / (np.maximum(m.dof_invweight0[dof], 1e-9) * period**2)
            g.limit_k = self.column(np.where(limited, k, 0))
            narrow = np.clip(np.ptp(m.jnt_range[joints], 1) / WIDE, 0.02, 1)  # a gripper's stroke is centimetres
            narrow, width = np.where(limited, narrow, 1), self.softness.limit_width
            depth = self.softness.limit_depth * narrow
            g.limit_damping = self.column(hunt_crossley(stiffness, period, ratio, depth))
            g.limit_width = self.column(width * narrow) if (narrow < 1).any() else width
            margin = m.jnt_margin[joints]
            g.limit_low = self.column(np.where(limited, m.jnt_range[joints, 0] + margin, -1e6))
            g.limit_high = self.column(np.where(limited, m.jnt_range[joints, 1] - margin, 1e6))

    def solref(self, solref):
        """(1 / natural frequency, damping ratio) of MuJoCo's (time constant, damping ratio), where frequency times
        ratio is 1 / time constant, or of its negative form, (-stiffness, -damping) per unit mass."""
        solref = np.asarray(solref, float).reshape(-1, 2)
        direct = solref[:, 0] < 0
        stiffness = np.where(direct, -solref[:, 0], 1.0)
        shortest = 0.0 if disabled(self.m, "REFSAFE") else 2 * self.m.opt.timestep
        period = np.where(direct, 1 / np.sqrt(stiffness), np.maximum(solref[:, 0], shortest) * solref[:, 1])
        ratio = np.where(direct, -solref[:, 1] / (2 * np.sqrt(stiffness)), solref[:, 1])
        return period, ratio

    def fill_inertia(self, g: Group):
        m, n = self.m, len(g.joints)
        mass, com, inertia = np.zeros(n), np.zeros((n, 3)), np.zeros((n, 3, 3))
        for row, j in enumerate(g.joints):
            parts = []
            for body in range(1, m.nbody):
                if self.link_of_body(body) != j:
                    continue
                p, r = self.in_link(body)
                mujoco.mju_quat2Mat(flat := np.zeros(9), m.body_iquat[body])
                ri = r @ flat.reshape(3, 3)
                parts.append((m.body_mass[body], p + r @ m.body_ipos[body], ri @ np.diag(m.body_inertia[body]) @ ri.T))
            mass[row] = sum(w for w, _, _ in parts)
            if mass[row] > 0:
                com[row] = sum(w * c for w, c, _ in parts) / mass[row]
            for w, c, i in parts:  # parallel axes
                d = c - com[row]
                inertia[row] += i + w * (d @ d * np.eye(3) - np.outer(d, d))
        g.has_mass = bool(mass.any())
        g.mass, g.com = self.column(mass), self.vec(com)
        g.inertia = Sym(*(self.column(inertia[:, i, k]) for i, k in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))))

    def fill_contacts(self, g: Group):
        per_link = [self.spheres(j) for j in g.joints]
        p, n = max(map(len, per_link)), len(per_link)
        if p == 0:
            return
        index = [[-1] * n for _ in range(p)]
        table = np.zeros((p, n, 8))  # point, radius, ground, k, damping, friction
        table[:, :, 4], table[:, :, 6] = -1e3, 1.0
        for row, points in enumerate(per_link):
            for i, (name, point, *numbers) in enumerate(points):
                table[i, row] = [*point, *numbers]
                index[i][row] = len(self.contact_names)
                self.contact_names.append(name)
        columns = torch.tensor(table, device=self.device, dtype=self.dtype).unbind(-1)
        x, y, z, *rest = (c.unsqueeze(-1) for c in columns)
        g.contacts = Contacts(Vec(x, y, z), *rest, index)

    def spheres(self, joint) -> list[tuple]:
        """(name, point, radius, ground, k, damping, friction) of every sphere of the link that can meet a plane."""
        m, found = self.m, []
        planes = [p for p in range(m.ngeom) if GEOM[m.geom_type[p]] == "plane" and not m.body_weldid[m.geom_bodyid[p]]]
        for geom in range(m.ngeom):
            body = m.geom_bodyid[geom]
            if not body or self.link_of_body(body) != joint:
                continue
            (center, r_geom), size = self.geom_in_link(geom), m.geom_size[geom]
            if GEOM[m.geom_type[geom]] == "sphere":
                points, radius = [center], size[0]
            elif GEOM[m.geom_type[geom]] == "capsule":
                points, radius = [center + s * size[1] * r_geom[:, 2] for s in (-1, 1)], size[0]
            else:  # box
                corners = np.stack(np.meshgrid(*[[-1, 1]] * 3), -1).reshape(8, 3)
                points, radius = list(center + (corners * size) @ r_geom.T), 0.0
            for plane in planes:
                if not collide(m, geom, plane):
                    continue
                margin, k, damping, friction = self.law(geom, plane)
                ground = self.data.geom_xpos[plane, 2]
                name = m.geom(geom).name or f"geom {geom}"
                found += [(name, x, radius + margin, ground, k, damping, friction) for x in points]

        def hidden(i, a):
            """Inside another sphere of the link, as stiff and with as much friction: that one touches first."""
            for j, b in enumerate(found):
                if j != i and (a[3], a[6]) == (b[3], b[6]) and a[4] <= b[4]:  # ground, friction, k
                    sticks_out = np.linalg.norm(a[1] - b[1]) + a[2] - b[2]
                    if sticks_out < -1e-9 or (sticks_out <= 1e-9 and j < i):
                        return True
            return False

        return [a for i, a in enumerate(found) if not hidden(i, a)]

    def law(self, geom, other) -> tuple:
        """Margin, stiffness k, damping, friction of two geoms that touch."""
        period, ratio = self.solref(self.mixed_solref(geom, other))
        invweight = self.inverse_weight(geom) + self.inverse_weight(other)
        k = self.softness.stiffness / (max(invweight, 1e-9) * period[0] ** 2)
        damping = hunt_crossley(self.softness.stiffness, period, ratio, self.softness.contact_depth)[0]
        return self.margin(geom, other), k, damping, self.friction(geom, other)

    def inverse_weight(self, geom) -> float:
        """MuJoCo's of its body, 1/kg, and at least a twentieth of what it is with all that moves set free. It is 0 if
        joints cannot move the centre of mass (a turret, a pinned wheel), and contacts would act at any distance."""
        m, body = self.m, self.m.geom_bodyid[geom]
        if m.body_weldid[body] == 0:
            return 0.0
        free = 1 / max(m.body_subtreemass[m.body_rootid[body]], 1e-9)
        return max(m.body_invweight0[body, 0], 0.05 * free)

    def margin(self, geom, plane) -> float:
        margins = self.m.geom_margin[[geom, plane]]
        adds = int(mujoco.__version__.split(".")[0]) >= 4  # earlier versions take the max
        return float(margins.sum() if adds else margins.max())

    def mixed_solref(self, geom, plane):
        """MuJoCo's rule: the higher priority decides, else the average weighted by solmix, the lesser if negative."""
        m = self.m
        if m.geom_priority[geom] != m.geom_priority[plane]:
            return m.geom_solref[max((geom, plane), key=lambda i: m.geom_priority[i])]
        if min(m.geom_solref[geom, 0], m.geom_solref[plane, 0]) <= 0:
            return np.minimum(m.geom_solref[geom], m.geom_solref[plane])
        a, b = m.geom_solmix[geom], m.geom_solmix[plane]
        w = a / (a + b) if a + b > 0 else 0.5
        return w * m.geom_solref[geom] + (1 - w) * m.geom_solref[plane]

    def friction(self, geom, plane) -> float:
        m = self.m
        if m.geom_priority[geom] != m.geom_priority[plane]:
            geom = plane = max((geom, plane), key=lambda i: m.geom_priority[i])
        if max(m.geom_condim[geom], m.geom_condim[plane]) == 1:
            return 0.0
        return float(max(m.geom_friction[geom, 0], m.geom_friction[plane, 0]))

    # --- actuators ------------------------------------------------------------------------------------------
    def build(self) -> Model:
        m = self.m
        self.contact_names: list[str] = []
        groups = self.make_groups()
        for g in groups:
            self.fill(g)
        links = fill_pairs(self, groups) if self.collisions else None
        self.warn_about_self_collision()
        moment = np.zeros((m.nv, m.nu))
        for i in range(m.nu):
            group = m.actuator_group[i]
            if disabled(m, "ACTUATION") or (0 <= group <= 30 and m.opt.disableactuator >> group & 1):
                continue
            joint = m.actuator_trnid[i, 0]
            dof = m.jnt_dofadr[joint]
            width = {"free": 6, "ball": 3}.get(JOINT[m.jnt_type[joint]], 1)
            moment[dof : dof + width, i] = m.actuator_gear[i, :width]
        servo = m.actuator_biastype == int(mujoco.mjtBias.mjBIAS_AFFINE)
        b0, b1, b2 = (np.where(servo, m.actuator_biasprm[:, c], 0) for c in range(3))
        for g in groups:
            if g.kind in ("hinge", "slide"):  # a servo's force: gear (b0 + b1 gear q + b2 gear v)
                kp, kv = ((moment[m.jnt_dofadr[g.joints]] ** 2) @ b for b in (b1, b2))
                if servo.any():
                    g.servo_kp, g.servo_kv = self.column(kp), self.column(kv)
                self.warn_about_springs(g, kp, kv)
        limited = m.actuator_ctrllimited.astype(bool)
        gear = moment * m.actuator_gainprm[:, 0]
        return Model(
            mj_model=m, groups=groups, links=links,
            gear=torch.tensor(gear, device=self.device, dtype=self.dtype), bias=self.column(moment @ b0),
            ctrl_low=self.column(np.where(limited, m.actuator_ctrlrange[:, 0], -np.inf)),
            ctrl_high=self.column(np.where(limited, m.actuator_ctrlrange[:, 1], np.inf)),
            gravity=self.vec(m.opt.gravity * (not disabled(m, "GRAVITY"))), contact_names=self.contact_names,
            softness=self.softness, collisions=self.collisions, device=self.device, dtype=self.dtype,
        )  # fmt: skip

    def warn_about_springs(self, g: Group, kp, kv):
        """Those of joints and servos are explicit, as in MuJoCo's Euler integrator: alone on its joint, one that is too
        stiff or damped for the substep overshoots more each time."""
        m, dof, h = self.m, self.m.jnt_dofadr[g.joints], self.m.opt.timestep
        spring = np.zeros(len(dof)) if g.stiffness is None else m.jnt_stiffness[g.joints]
        mass = 1 / np.maximum(m.dof_invweight0[dof], 1e-9) + h * m.dof_damping[dof]
        unstable = np.flatnonzero(h * h * (spring - kp) - 2 * h * kv > 4 * mass)
        if len(unstable):
            i = unstable[0]
            what = " and ".join(["spring"] * bool(spring[i]) + ["servo"] * bool(kp[i] or kv[i]))
            joint, verb = label(m, "joint", g.joints[i]), "are" if "and" in what else "is"
            message = f"the {what} of {joint} {verb} too stiff or damped for substeps of {h:.4g} s: use shorter ones"
            warnings.warn(message, stacklevel=5)

    def warn_about_self_collision(self):
        """MuJoCo would let these geoms touch."""
        pairs = [pair for pair in moving_pairs(self.m) if not (self.collisions and can_touch(self.m, *pair))]
        if pairs:
            names = " and ".join(label(self.m, "geom", i) for i in pairs[0])
            why = "which can only touch where diffsim/README.md says" if self.collisions else "see Task.collisions"
            message = f"contact between moving geoms is ignored ({len(pairs)} pairs, {names} first): {why}"
            warnings.warn(message, SelfCollisionWarning, stacklevel=4)
