"""The articulated-body algorithm: A x = b in O(n).

Featherstone, Rigid Body Dynamics Algorithms (RBDA), table 7.1 and equations 7.43 to 7.48, with his names:

    leaves to root    U = IA S,  D = S^T U + diagonal,  u = tau - S^T pA
                      IA -= U U^T/D,  pA += U u/D,  both then to the parent
    root to leaves    x = (u - U^T a) / D,  a += S x         a: the parent's, then the link's

His accelerations are our velocities after the substep, his forces our impulses; pA is minus the impulse on the body.
His c is zero: it has gone into b. His transforms X are 1: all vectors of a tree have one origin and world axes. The
diagonal is what acts on the joint itself: armature, damping and limits. The dofs of a joint are eliminated one by one.

A free body o that links touch (pairs.py) is eliminated last. Until then a 6x6 matrix X takes its velocity to an impulse
on the link, and what yields to a link yields to the body:

    leaves to root    c = X^T S,  X -= U c^T/D, then to the parent;  IA_o -= c c^T/D,  pA_o += c u/D
    root to leaves    x = (u - U^T a - c^T a_o) / D

Several such bodies meet only here, X_op -= c_o c_p^T/D, and are solved for together, with the free roots of trees that
touch them. Links that touch links are another matter: dense.py.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffsim.forces import Terms
from diffsim.kinematics import Frame, Grouped, from_parent, to_parent
from diffsim.model import Model
from diffsim.spatial import Coupling, Inertia, Mat, Spatial, Sym, Vec


@dataclass
class ArticulatedBody:
    """The links of a group with all that hangs on them: what they feel like to the joint they hang on."""

    IA: Inertia | None
    pA: Spatial | None
    X: dict[int, Coupling] = field(default_factory=dict)  # by the group of a free body that they touch
    eliminated: list = field(default_factory=list)  # S, U/D, u/D, {free body: c/D}: last dof first

    def eliminate(self, S: Spatial, diagonal: Tensor, tau: Tensor, bodies: list["ArticulatedBody"]):
        """Let the dof along S go free under tau (RBDA 7.43 to 7.48). bodies: of all groups."""
        U = self.IA @ S
        D_inverse = 1.0 / (S.dot(U) + diagonal)
        u = tau if self.pA is None else tau - S.dot(self.pA)
        U_D = U * D_inverse
        c = {k: X.transpose_times(S) for k, X in self.X.items()}
        c_D = {k: c_k * D_inverse for k, c_k in c.items()}
        self.eliminated.append((S, U_D, u * D_inverse, c_D))
        self.IA = self.IA.minus_outer(U, U_D)
        self.pA = U_D * u if self.pA is None else self.pA + U_D * u
        for k, c_k in c.items():
            self.X[k] = self.X[k].minus_outer(U, c_D[k])
            bodies[k].carry(_sum_links(Coupling.outer(c_k, -c_D[k])).inertia(), _sum_links(c_D[k] * u))
            for j in (j for j in c if j < k):
                bodies[k].couple(j, _sum_links(Coupling.outer(c_k, -c_D[j])))

    def carry(self, IA: Inertia, pA: Spatial | None = None):
        """Add what hangs on these links or touches them."""
        self.IA = IA if self.IA is None else self.IA + IA
        if pA is not None:
            self.pA = pA if self.pA is None else self.pA + pA

    def couple(self, k: int, X: Coupling):
        self.X[k] = self.X[k] + X if k in self.X else X

    def substitute(self, a: Spatial | None, free: dict[int, Spatial]) -> tuple[list[Tensor], Spatial]:
        """Velocities x of the eliminated dofs, and the links', when the parent's is a (None: the world), those of free
        bodies free."""
        x = []
        for S, U_D, u_D, c_D in reversed(self.eliminated):
            x_i = u_D if a is None else u_D - U_D.dot(a)
            for k, c in c_D.items():
                x_i = x_i - c.dot(free[k])
            x.append(x_i)
            a = S * x_i if a is None else a + S * x_i
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


def _add_pairs(model: Model, terms: list[Terms], bodies: list[ArticulatedBody]):
    """The contacts between bodies: their inertia to both, and what joins them."""
    for i, g in enumerate(model.groups):
        for pairs, t in zip(g.pairs, terms[i].pairs):
            N, d = t.inertia(), t.to_other()
            bodies[i].carry(N)
            if pairs.other >= 0:
                X = N.from_afar(d)
                bodies[i].couple(pairs.other, -X)
                bodies[pairs.other].carry(_sum_links(X.from_both(d)))


def _sum_links(x):
    return x.map(lambda t: t if t.shape[0] == 1 else t.sum(0, keepdim=True))


def _solve_roots(model: Model, bodies: list[ArticulatedBody], terms: list[Terms], frames: list[Frame], tau: Grouped):
    """{group: (x, velocity a)} of free bodies; those that touch, or are touched, are one system."""
    free = [i for i, g in enumerate(model.groups) if g.kind == "free"]
    touched = {p.other for g in model.groups for p in g.pairs if p.other >= 0}
    # in an order in which X is below the diagonal: bodies that are touched, ascending, then the roots of trees
    joined = sorted(touched) + [i for i in free if bodies[i].X and i not in touched]
    systems = [[i] for i in free if i not in joined] + [joined] * bool(joined)
    return {i: root for s in systems for i, root in zip(s, _solve_system(s, bodies, terms, frames, tau))}


def _solve_system(groups: list[int], bodies, terms, frames, tau):
    """x and velocity a of free bodies: (IA + diagonal) a = tau - pA, a Cholesky solve written out.

    MuJoCo gives the six dofs of a free joint one armature and damping, so in world axes they stay a multiple of 1.
    """
    rows, load = [], []
    for place, i in enumerate(groups):
        rot, cross, lin = bodies[i].IA
        d_lin, d_ang = terms[i].joint.diagonal[0], terms[i].joint.diagonal[3]
        own = [
            [rot.xx + d_ang],
            [rot.xy, rot.yy + d_ang],
            [rot.xz, rot.yz, rot.zz + d_ang],
            [*cross.a, lin.xx + d_lin],
            [*cross.b, lin.xy, lin.yy + d_lin],
            [*cross.c, lin.xz, lin.yz, lin.zz + d_lin],
        ]
        before = [bodies[i].X[j].rows() if j in bodies[i].X else [[0.0] * 6] * 6 for j in groups[:place]]
        rows += [[*(x for block in before for x in block[r]), *own[r]] for r in range(6)]
        wrench = Spatial(frames[i].rot @ Vec(*tau[i][3:]), Vec(*tau[i][:3]))
        wrench = wrench if bodies[i].pA is None else wrench - bodies[i].pA
        load += [*wrench.ang, *wrench.lin]
    a = _cholesky_solve(rows, load)
    for place, i in enumerate(groups):
        ang, lin = Vec(*a[6 * place : 6 * place + 3]), Vec(*a[6 * place + 3 : 6 * place + 6])
        yield [*lin, *frames[i].rot.transpose_times(ang)], Spatial(ang, lin)


def _cholesky_solve(rows: list[list[Tensor]], rhs: list[Tensor]) -> list[Tensor]:
    """rows: the lower triangle of a symmetric positive matrix."""
    low: list[list[Tensor]] = []
    inverse, y = [], []  # of the diagonal; forward substitution

    def minus_dot(start, a, b):
        for p, q in zip(a, b):
            start = start - p * q
        return start

    for r in range(len(rows)):
        low.append([])
        for k in range(r):
            low[r].append(minus_dot(rows[r][k], low[r][:k], low[k][:k]) * inverse[k])
        inverse.append(torch.rsqrt(minus_dot(rows[r][r], low[r], low[r])))
        y.append(minus_dot(rhs[r], low[r], y) * inverse[r])
    out: list[Tensor] = [None] * len(rows)
    for r in reversed(range(len(rows))):
        out[r] = minus_dot(y[r], [low[j][r] for j in range(r + 1, len(rows))], out[r + 1 :]) * inverse[r]
    return out


def solve(model: Model, frames: list[Frame], terms: list[Terms], impulses, tau: Grouped) -> Grouped:
    """x with A x = sum_b J_b^T impulse_b + tau. impulses: of the links about the origin, a Spatial or None a group."""
    bodies = [ArticulatedBody(inertia_of(t), None if p is None else -p) for t, p in zip(terms, impulses)]
    _add_pairs(model, terms, bodies)
    for i in reversed(range(len(bodies))):  # leaves to root
        g, body = model.groups[i], bodies[i]
        for S, d, tau_j in reversed(list(zip(frames[i].S, terms[i].joint.diagonal, tau[i]))):
            body.eliminate(S, d, tau_j, bodies)
        if g.parent >= 0:
            bodies[g.parent].carry(to_parent(model, g, body.IA), to_parent(model, g, body.pA))
            for k, X in body.X.items():
                bodies[g.parent].couple(k, to_parent(model, g, X))
    x, velocities = [], []
    roots = _solve_roots(model, bodies, terms, frames, tau)
    free = {i: a for i, (_, a) in roots.items()}
    for i, (g, body) in enumerate(zip(model.groups, bodies)):  # root to leaves
        if g.kind == "free":
            x_g, a = roots[i]
        else:
            x_g, a = body.substitute(from_parent(model, g, velocities[g.parent]) if g.parent >= 0 else None, free)
        x.append(x_g)
        velocities.append(a)
    return x
