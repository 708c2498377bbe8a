"""The articulated-body algorithm (Featherstone, Rigid Body Dynamics Algorithms, ch. 7): A x = b in O(n)."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffsim.forces import Link
from diffsim.kinematics import Frame, from_parent, to_parent, to_rows
from diffsim.model import Model
from diffsim.spatial import Mat, Spatial, Sym, Vec


class Articulated(NamedTuple):
    """A symmetric 6x6 inertia [[rot, cross], [cross^T, lin]]; cross by columns."""

    rot: Sym
    cross: Mat
    lin: Sym

    def __matmul__(self, s: Spatial) -> Spatial:
        return Spatial(self.rot @ s.ang + self.cross @ s.lin, self.cross.transpose_times(s.ang) + self.lin @ s.lin)

    def __add__(self, o):
        cross = Mat(*(a + b for a, b in zip(self.cross, o.cross)))
        return Articulated(self.rot + o.rot, cross, self.lin + o.lin)

    def minus_outer(self, u: Spatial, w: Spatial):
        """self - u w^T, where w is a multiple of u."""
        (a, b), (c, d) = u, w

        def sym(s, p, q):
            return Sym(
                s.xx - p.x * q.x, s.yy - p.y * q.y, s.zz - p.z * q.z,
                s.xy - p.x * q.y, s.xz - p.x * q.z, s.yz - p.y * q.z,
            )  # fmt: skip

        cross = Mat(self.cross.a - a * d.x, self.cross.b - a * d.y, self.cross.c - a * d.z)
        return Articulated(sym(self.rot, a, c), cross, sym(self.lin, b, d))

    def map(self, f):
        return Articulated(Sym(*map(f, self.rot)), self.cross.map(f), Sym(*map(f, self.lin)))


def inertia_of(link: Link) -> Articulated | None:
    """The 6x6 inertia of the links' own masses and contacts, about the origin."""

    def moments(pos, a, b):  # of a point with horizontal mass a and vertical mass b
        (x, y, z), (ax, ay, az, bx, by) = pos, (pos.x * a, pos.y * a, pos.z * a, pos.x * b, pos.y * b)
        second = (z * az + y * by, z * az + x * bx, x * ax + y * ay, -x * by, -x * az, -y * az)
        return *second, ax, ay, az, bx, by, a, b

    if link.com is None and link.touch is None:
        return None
    total = None
    if link.com is not None:
        total = list(moments(link.com, link.mass, link.mass))
        total[:6] = [p + q for p, q in zip(total, link.inertia)]
    if link.touch is not None:
        summed = [m.sum(0) for m in moments(*link.touch[:3])]
        total = summed if total is None else [p + q for p, q in zip(total, summed)]
    *second, ax, ay, az, bx, by, a, b = total
    zero = torch.zeros_like(az)
    cross = Mat(Vec(zero, az, -ay), Vec(-az, zero, ax), Vec(by, -bx, zero))
    return Articulated(Sym(*second), cross, Sym(a, a, b, zero, zero, zero))


def _root_solve(inertia: Articulated, armature: list[Tensor], rot: Mat, wrench: Spatial | None, tau: list[Tensor]):
    """Acceleration of free bodies: (inertia + armature) a = wrench + tau, a 6x6 Cholesky solve written out.

    MuJoCo gives the six dofs of a free joint one armature and damping, so in world axes they stay a multiple of 1.
    """
    i, c, m = inertia
    extra_lin, extra_ang = armature[0], armature[3]
    rows = [
        [i.xx + extra_ang],
        [i.xy, i.yy + extra_ang],
        [i.xz, i.yz, i.zz + extra_ang],
        [c.a.x, c.a.y, c.a.z, m.xx + extra_lin],
        [c.b.x, c.b.y, c.b.z, m.xy, m.yy + extra_lin],
        [c.c.x, c.c.y, c.c.z, m.xz, m.yz, m.zz + extra_lin],
    ]
    load = Spatial(rot @ Vec(*tau[3:]), Vec(*tau[:3]))
    if wrench is not None:
        load = load + wrench
    rhs = [*load.ang, *load.lin]
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
    return Spatial(Vec(*out[:3]), Vec(*out[3:]))


def solve(model: Model, frames: list[Frame], links: list[Link], wrenches, taus) -> Tensor:
    """x with A x = sum_b J_b^T wrench_b + tau. wrenches: one Spatial (or None) a group; taus: one list a group."""
    count = len(model.groups)
    inertia = [inertia_of(link) for link in links]
    force = list(wrenches)
    steps: list = [None] * count
    for index in reversed(range(count)):  # leaf to root: eliminate the joints
        g, frame = model.groups[index], frames[index]
        if g.kind == "free":
            continue
        steps[index] = []
        for k in reversed(range(len(g.dofs))):
            s = frame.screws[k]
            u = inertia[index] @ s
            inverse = 1.0 / (s.dot(u) + links[index].diagonal[k])
            rest = taus[index][k] if force[index] is None else taus[index][k] + s.dot(force[index])
            pull = u * inverse
            steps[index].append((s, pull, rest * inverse))
            if g.parent >= 0 or k > 0:
                inertia[index] = inertia[index].minus_outer(u, pull)
                gone = pull * rest
                force[index] = Spatial(-gone.ang, -gone.lin) if force[index] is None else force[index] - gone
        if g.parent >= 0:

            def up(t, g=g):
                return to_parent(model, g, t)

            p = g.parent
            gathered, pushed = inertia[index].map(up), force[index].map(up)
            inertia[p] = gathered if inertia[p] is None else inertia[p] + gathered
            force[p] = pushed if force[p] is None else force[p] + pushed
    motion: list = [None] * count
    pieces = []
    for index, g in enumerate(model.groups):  # root to leaf: substitute back
        frame = frames[index]
        if g.kind == "free":
            a = _root_solve(inertia[index], links[index].diagonal, frame.rot, force[index], taus[index])
            motion[index] = a
            pieces += list(zip([*a.lin, *frame.rot.transpose_times(a.ang)], g.dofs))
            continue
        a = from_parent(model, g, motion[g.parent]) if g.parent >= 0 else None
        for k, (s, pull, ratio) in enumerate(reversed(steps[index])):
            x = ratio if a is None else ratio - pull.dot(a)
            a = s * x if a is None else a + s * x
            pieces.append((x, g.dofs[k]))
        motion[index] = a
    return to_rows(pieces)
