"""The articulated-body algorithm: A x = b in O(n).

Featherstone, Rigid Body Dynamics Algorithms (RBDA), table 7.1 and equations 7.43 to 7.48, with his names:

    leaves to root    U = IA S,  D = S^T U + diagonal,  u = tau - S^T pA
                      IA -= U U^T/D,  pA += U u/D,  both then to the parent
    root to leaves    x = (u - U^T a) / D,  a += S x         a: the parent's, then the link's

His accelerations are our velocities after the substep, his forces our impulses; pA is minus the impulse on the body.
His c is zero: it has gone into b. His transforms X are 1: all vectors of a tree have one origin and world axes. The
diagonal is what acts on the joint itself: armature, damping and limits. The dofs of a joint are eliminated one by one.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffsim.forces import Terms
from diffsim.kinematics import Frame, Grouped, from_parent, to_parent
from diffsim.model import Model
from diffsim.spatial import Mat, Spatial, Sym, Vec


class Inertia(NamedTuple):
    """A symmetric 6x6 matrix [[rot, cross], [cross^T, lin]]; cross by columns."""

    rot: Sym
    cross: Mat
    lin: Sym

    def __matmul__(self, s: Spatial) -> Spatial:
        return Spatial(self.rot @ s.ang + self.cross @ s.lin, self.cross.transpose_times(s.ang) + self.lin @ s.lin)

    def __add__(self, o):
        cross = Mat(*(a + b for a, b in zip(self.cross, o.cross)))
        return Inertia(self.rot + o.rot, cross, self.lin + o.lin)

    def minus_outer(self, p: Spatial, q: Spatial):
        """self - p q^T, where q is a multiple of p."""
        (p_ang, p_lin), (q_ang, q_lin) = p, q
        columns = (column - p_ang * q_i for column, q_i in zip(self.cross, q_lin))
        return Inertia(self.rot.minus_outer(p_ang, q_ang), Mat(*columns), self.lin.minus_outer(p_lin, q_lin))

    def map(self, f):
        return Inertia(Sym(*map(f, self.rot)), self.cross.map(f), Sym(*map(f, self.lin)))


@dataclass
class ArticulatedBody:
    """The links of a group with all that hangs on them: what they feel like to the joint they hang on."""

    IA: Inertia | None
    pA: Spatial | None
    eliminated: list[tuple[Spatial, Spatial, Tensor]] = field(default_factory=list)  # S, U/D, u/D: last dof first

    def eliminate(self, S: Spatial, diagonal: Tensor, tau: Tensor):
        """Let the dof along S go free under tau (RBDA 7.43 to 7.48)."""
        U = self.IA @ S
        D_inverse = 1.0 / (S.dot(U) + diagonal)
        u = tau if self.pA is None else tau - S.dot(self.pA)
        U_D = U * D_inverse
        self.eliminated.append((S, U_D, u * D_inverse))
        self.IA = self.IA.minus_outer(U, U_D)
        self.pA = U_D * u if self.pA is None else self.pA + U_D * u

    def carry(self, IA: Inertia, pA: Spatial):
        """Add the articulated bodies that hang on these links."""
        self.IA = IA if self.IA is None else self.IA + IA
        self.pA = pA if self.pA is None else self.pA + pA

    def substitute(self, a: Spatial | None) -> tuple[list[Tensor], Spatial]:
        """Velocities x of the eliminated dofs, and the links', when the parent's is a (None: the world)."""
        x = []
        for S, U_D, u_D in reversed(self.eliminated):
            x.append(u_D if a is None else u_D - U_D.dot(a))
            a = S * x[-1] if a is None else a + S * x[-1]
        return x, a


def inertia_of(terms: Terms) -> Inertia | None:
    """6x6 inertia of the links' own masses and contacts, about the origin."""
    body, contact = terms.body, terms.contact
    parts = []
    if body is not None:
        second, *rest = _point_moments(body.com, body.mass, body.mass)
        parts.append([second + body.inertia, *rest])
    if contact is not None:
        second, *rest = _point_moments(contact.pos, contact.w_t, contact.w_n)
        parts.append([Sym(*(t.sum(0) for t in second)), *(t.sum(0) for t in rest)])
    if not parts:
        return None
    second, ax, ay, az, bx, by, a, b = parts[0] if len(parts) == 1 else [p + q for p, q in zip(*parts)]
    zero = torch.zeros_like(az)
    cross = Mat(Vec(zero, az, -ay), Vec(-az, zero, ax), Vec(by, -bx, zero))
    return Inertia(second, cross, Sym(a, a, b, zero, zero, zero))


def _point_moments(pos: Vec, a: Tensor, b: Tensor):
    """Of a point with horizontal mass a and vertical mass b: -[pos x] diag(a, a, b) [pos x], a pos, b x, b y, a, b."""
    (x, y, z), (ax, ay, az, bx, by) = pos, (pos.x * a, pos.y * a, pos.z * a, pos.x * b, pos.y * b)
    second = Sym(z * az + y * by, z * az + x * bx, x * ax + y * ay, -x * by, -x * az, -y * az)
    return second, ax, ay, az, bx, by, a, b


def _solve_root(body: ArticulatedBody, diagonal: list[Tensor], frame: Frame, tau: list[Tensor]):
    """x and velocity a of free bodies: (IA + diagonal) a = tau - pA, a 6x6 Cholesky solve written out.

    MuJoCo gives the six dofs of a free joint one armature and damping, so in world axes they stay a multiple of 1.
    """
    rot, cross, lin = body.IA
    d_lin, d_ang = diagonal[0], diagonal[3]
    rows = [
        [rot.xx + d_ang],
        [rot.xy, rot.yy + d_ang],
        [rot.xz, rot.yz, rot.zz + d_ang],
        [*cross.a, lin.xx + d_lin],
        [*cross.b, lin.xy, lin.yy + d_lin],
        [*cross.c, lin.xz, lin.yz, lin.zz + d_lin],
    ]
    load = Spatial(frame.rot @ Vec(*tau[3:]), Vec(*tau[:3]))
    load = load if body.pA is None else load - body.pA
    a = _solve_6x6(rows, [*load.ang, *load.lin])
    ang, lin = Vec(*a[:3]), Vec(*a[3:])
    return [*lin, *frame.rot.transpose_times(ang)], Spatial(ang, lin)


def _solve_6x6(rows: list[list[Tensor]], rhs: list[Tensor]) -> list[Tensor]:
    """rows: the lower triangle of a symmetric positive matrix."""
    low: list[list[Tensor]] = []
    inverse, y = [], []  # of the diagonal; forward substitution

    def minus_dot(start, a, b):
        for p, q in zip(a, b):
            start = start - p * q
        return start

    for r in range(6):
        low.append([])
        for k in range(r):
            low[r].append(minus_dot(rows[r][k], low[r][:k], low[k][:k]) * inverse[k])
        inverse.append(torch.rsqrt(minus_dot(rows[r][r], low[r], low[r])))
        y.append(minus_dot(rhs[r], low[r], y) * inverse[r])
    out: list[Tensor] = [None] * 6
    for r in reversed(range(6)):
        out[r] = minus_dot(y[r], [low[j][r] for j in range(r + 1, 6)], out[r + 1 :]) * inverse[r]
    return out


def solve(model: Model, frames: list[Frame], terms: list[Terms], impulses, tau: Grouped) -> Grouped:
    """x with A x = sum_b J_b^T impulse_b + tau. impulses: of the links about the origin, a Spatial or None a group."""
    bodies = [ArticulatedBody(inertia_of(t), None if p is None else -p) for t, p in zip(terms, impulses)]
    for i in reversed(range(len(bodies))):  # leaves to root
        g, body = model.groups[i], bodies[i]
        for S, d, tau_j in reversed(list(zip(frames[i].S, terms[i].joint.diagonal, tau[i]))):
            body.eliminate(S, d, tau_j)
        if g.parent >= 0:
            bodies[g.parent].carry(to_parent(model, g, body.IA), to_parent(model, g, body.pA))
    x, velocities = [], []
    for i, (g, body) in enumerate(zip(model.groups, bodies)):  # root to leaves
        if g.kind == "free":
            x_g, a = _solve_root(body, terms[i].joint.diagonal, frames[i], tau[i])
        else:
            x_g, a = body.substitute(from_parent(model, g, velocities[g.parent]) if g.parent >= 0 else None)
        x.append(x_g)
        velocities.append(a)
    return x
