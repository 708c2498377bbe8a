"""Contact of two bodies, a sphere of one and a rounded box of the other (model.Pairs), by the law of contact.py.

At the point r, u = n n.(v_a - v_b) + (the rest) is the velocity of link a's point relative to that of the other body b.
Over a substep the impulse on a, whose opposite acts on b, is

    h f = j_n n - W u',    W = w_n n n^T + w_t (1 - n n^T)

n is the normal, from b to a, and u' the relative velocity after the substep, so that W joins the two bodies:

    A += G^T W G,    b += G^T n j_n,    u = G v = G_a v_a - G_b v_b,    G_a = [-[r]x, 1] about the origin of a's tree

Both sides are built from one 6x6 matrix N = G_a^T W G_a and one impulse, seen from b's origin for b: action = reaction.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffsim.contact import friction_weight, normal_law
from diffsim.kinematics import Frame
from diffsim.model import Model, Pairs, Softness, Touching
from diffsim.spatial import Inertia, Mat, Spatial, Sym, Vec

PARALLEL = 0.01  # of two capsules: within about 6 degrees the contact goes from one end to the other


class PairTerms(NamedTuple):
    """The points of a set of pairs, (p, n, B)."""

    gap: Tensor
    pos: Vec  # r, about the origin of a's tree
    shift: Vec  # from there to b's origin
    normal: Vec
    slide: Vec  # u less its part along the normal
    f_n: Tensor
    w_t: Tensor
    w_n: Tensor
    j_n: Tensor

    def relative(self, a: Spatial, b: Spatial | None) -> Vec:
        """Velocity of a's points less that of b's under twists of the links, (n, B); b: None for the world."""
        p, n, _ = self.gap.shape
        a, b = (None if x is None else x.map(lambda t: t.expand(p, n, -1)) for x in (a, b))
        return _relative(a, b, self.pos, self.shift)

    def to_other(self) -> Vec:
        """From a's origin to b's, (n, B)."""
        return self.shift.map(lambda t: t[0])

    def impulse(self) -> Spatial:
        """On a, about its origin: (n, B)."""
        lin = self.normal * self.j_n
        return Spatial(self.pos.cross(lin), lin).map(lambda t: t.sum(0))

    def on_other(self, impulse: Spatial) -> Spatial:
        """It about b's origin; b has the opposite."""
        return Spatial(impulse.ang - self.to_other().cross(impulse.lin), impulse.lin)

    def inertia(self) -> Inertia:
        """N of all points of a link, about a's origin: (n, B)."""
        r, n, w = self.pos, self.normal, self.w_t
        m, wr = r.cross(n), r * w  # G_a^T n = (m, n)
        dn, dm = n * (self.w_n - w), m * (self.w_n - w)
        xx, yy, zz = r.x * wr.x, r.y * wr.y, r.z * wr.z
        rot = Sym(
            yy + zz + m.x * dm.x, zz + xx + m.y * dm.y, xx + yy + m.z * dm.z,
            m.x * dm.y - r.x * wr.y, m.x * dm.z - r.x * wr.z, m.y * dm.z - r.y * wr.z,
        )  # fmt: skip
        a, b, c = (m * dn_i for dn_i in dn)
        cross = Mat(
            Vec(a.x, a.y + wr.z, a.z - wr.y), Vec(b.x - wr.z, b.y, b.z + wr.x), Vec(c.x + wr.y, c.y - wr.x, c.z)
        )
        lin = Sym(w + n.x * dn.x, w + n.y * dn.y, w + n.z * dn.z, n.x * dn.y, n.x * dn.z, n.y * dn.z)
        return Inertia(rot, cross, lin).map(lambda t: t.sum(0))

    def residual(self, u: Vec, u_lam: Vec) -> Tensor:
        """u_lam . (n j_n - W u)."""
        u_n, lam_n = self.normal.dot(u), self.normal.dot(u_lam)
        return lam_n * (self.j_n - (self.w_n - self.w_t) * u_n) - self.w_t * u_lam.dot(u)


def pair_terms(
    pairs: Pairs, i: int, frames: list[Frame], twists: list[Spatial], softness: Softness, h: float
) -> PairTerms:
    """The law where every sphere of these pairs of group i is closest to its core."""
    a, b = ((*frames[k][:3], twists[k]) if k >= 0 else None for k in (i, pairs.other))
    return _touch(pairs, a, b, pairs.swapped, softness, h)


def link_terms(model: Model, frames: list[Frame], twists: list[Spatial], h: float) -> PairTerms:
    """The same of contacts between links, (1, n, B)."""
    parts = [(*f.pos, *f.rot.a, *f.rot.b, *f.rot.c, *f.origin, *t.ang, *t.lin) for f, t in zip(frames, twists)]
    ends = []
    for x in at_ends(model, parts, twists):
        pos, *rot, origin, ang, lin = (Vec(*x[c : c + 3]) for c in range(0, 21, 3))
        if model.links.pattern.shift is None:  # all origins are one
            origin = origin.map(torch.zeros_like)
        ends.append((pos, Mat(*rot), origin, Spatial(ang, lin)))
    return _touch(model.links, *ends, False, model.softness, h)


def at_ends(model: Model, parts: list, twists: list[Spatial]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of the links of every group, as contacts between links see them, (n, B): those of a, those of b."""
    all_links = of_links(parts, [torch.zeros_like(t.lin.x) for t in twists])
    return [t[model.links.a] for t in all_links], [t[model.links.b] for t in all_links]


def of_links(parts: list, zeros: list[Tensor]) -> list[Tensor]:
    """(links, B) of the tensors (n, B), (n, 1) or (1, B) of every group; zeros: (n, B) of every group."""
    return [torch.cat([t + zero for t, zero in zip(x, zeros)]) for x in zip(*parts)]


def _touch(pairs: Touching, a: tuple, b: tuple | None, swapped: bool, softness: Softness, h: float) -> PairTerms:
    """a, b: position, rotation, origin and twist of the links; b: None for the world."""

    def of(link):
        return (x.map(lambda t: t.expand(*pairs.k.shape[:2], -1)) for x in link)

    pos, rot, origin, a_vel = of(a)
    if b is None:
        b_pos, b_rot, b_vel, shift = -origin, None, None, -origin
    else:
        b_pos, b_rot, b_origin, b_vel = of(b)
        shift = b_origin - origin
        b_pos = b_pos + shift  # about a's origin, as all that follows
    (s_pos, s_rot), (c_pos, c_rot) = ((b_pos, b_rot), (pos, rot)) if swapped else ((pos, rot), (b_pos, b_rot))
    centre = s_pos + _turn(s_rot, pairs.point)
    core = c_pos if pairs.core is None else c_pos + _turn(c_rot, pairs.core)
    axes = c_rot if pairs.axes is None else pairs.axes if c_rot is None else c_rot @ pairs.axes
    away = centre - core if axes is None else axes.transpose_times(centre - core)
    if pairs.line is not None:
        line = _turn(s_rot, pairs.line)
        along = line if axes is None else axes.transpose_times(line)
        s = _closest(away, along, pairs.half.z)
        centre, away = centre + line * s, away + along * s
    d = Vec(*(x - torch.clamp(x, -half, half) for x, half in zip(away, pairs.half)))  # from the core's closest point
    dist = torch.sqrt(d.dot(d) + 1e-12)
    normal = _turn(axes, d) * (1.0 / dist)
    point = centre - normal * pairs.radius
    normal = -normal if swapped else normal
    u = _relative(a_vel, b_vel, point, shift)
    u_n = normal.dot(u)
    slide, gap = u - normal * u_n, dist - pairs.reach
    f_n, w_n, j_n = normal_law(gap, u_n, pairs.k, pairs.damping, softness.contact_width, h, softness.release_depth)
    w_t = friction_weight(f_n, slide.dot(slide), pairs.friction, softness.slip, h)
    return PairTerms(gap, point, shift, normal, slide, f_n, w_t, w_n, j_n)


def _closest(c: Vec, e: Vec, half: Tensor) -> Tensor:
    """s in [-1, 1] where c + s e is closest to the line from -half to half on the z axis; 0 where e is.

    min over s, t of |c + s e - t z|^2 + PARALLEL |s e|^2. The last term lets s be continuous where the lines turn
    parallel. If t, left free, gets out of its bounds, it is on one, so three steps are exact (Ericson, Real-Time
    Collision Detection, 5.1.9).
    """
    square, one = e.dot(e) + 1e-12, torch.ones_like(half)
    s = torch.clamp(-(c.x * e.x + c.y * e.y) / (e.x * e.x + e.y * e.y + PARALLEL * square), -one, one)
    t = torch.clamp(c.z + s * e.z, -half, half)
    return torch.clamp((t * e.z - c.dot(e)) / ((1 + PARALLEL) * square), -one, one)


def _turn(rot: Mat | None, v: Vec) -> Vec:
    return v if rot is None else rot @ v


def _relative(a: Spatial, b: Spatial | None, point: Vec, shift: Vec) -> Vec:
    return a.at(point) if b is None else a.at(point) - b.at(point - shift)
