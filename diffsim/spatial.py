"""Three-dimensional algebra on components.

A vector is three tensors, not one tensor with a leading 3: every operation below is then elementwise over
`(n, B)` - n joints of one kind, B environments - and the compiler can fuse a whole leg of a robot into one
loop over environments. In the same spirit a symmetric matrix is its six entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Vec(NamedTuple):
    """A 3-D vector; every component has shape (n, B) or broadcasts to it."""

    x: Tensor
    y: Tensor
    z: Tensor

    def __add__(self, o):
        return Vec(self.x + o.x, self.y + o.y, self.z + o.z)

    def __sub__(self, o):
        return Vec(self.x - o.x, self.y - o.y, self.z - o.z)

    def __mul__(self, s):  # vector * scalar
        return Vec(self.x * s, self.y * s, self.z * s)

    def __neg__(self):
        return Vec(-self.x, -self.y, -self.z)

    def dot(self, o):
        return self.x * o.x + self.y * o.y + self.z * o.z

    def cross(self, o):
        return Vec(
            self.y * o.z - self.z * o.y,
            self.z * o.x - self.x * o.z,
            self.x * o.y - self.y * o.x,
        )

    def map(self, f):
        return Vec(f(self.x), f(self.y), f(self.z))


class Mat(NamedTuple):
    """A 3x3 matrix by its columns."""

    a: Vec
    b: Vec
    c: Vec

    def __matmul__(self, o):  # matrix @ vector, matrix @ matrix
        if isinstance(o, Mat):
            return Mat(self @ o.a, self @ o.b, self @ o.c)
        return self.a * o.x + self.b * o.y + self.c * o.z

    def transpose_times(self, v: Vec) -> Vec:
        return Vec(self.a.dot(v), self.b.dot(v), self.c.dot(v))

    def transposed(self) -> "Mat":
        return Mat(*(Vec(*row) for row in zip(*self)))

    def times_cross(self, d: Vec) -> "Mat":
        """self [d x]."""
        a, b, c = self
        return Mat(b * d.z - c * d.y, c * d.x - a * d.z, a * d.y - b * d.x)

    def symmetric(self) -> "Sym":
        """self, which is symmetric, by its six entries."""
        a, b, c = self
        return Sym(a.x, b.y, c.z, b.x, c.x, c.y)

    def map(self, f):
        return Mat(self.a.map(f), self.b.map(f), self.c.map(f))


class Sym(NamedTuple):
    """A symmetric 3x3 matrix by its six different entries."""

    xx: Tensor
    yy: Tensor
    zz: Tensor
    xy: Tensor
    xz: Tensor
    yz: Tensor

    def __matmul__(self, v: Vec) -> Vec:
        return Vec(
            self.xx * v.x + self.xy * v.y + self.xz * v.z,
            self.xy * v.x + self.yy * v.y + self.yz * v.z,
            self.xz * v.x + self.yz * v.y + self.zz * v.z,
        )

    def __add__(self, o):
        return Sym(*(p + q for p, q in zip(self, o)))

    def columns(self) -> Mat:
        return Mat(Vec(self.xx, self.xy, self.xz), Vec(self.xy, self.yy, self.yz), Vec(self.xz, self.yz, self.zz))

    def minus_outer(self, p: Vec, q: Vec) -> "Sym":
        """self - p q^T, where q is a multiple of p."""
        return Sym(
            self.xx - p.x * q.x, self.yy - p.y * q.y, self.zz - p.z * q.z,
            self.xy - p.x * q.y, self.xz - p.x * q.z, self.yz - p.y * q.z,
        )  # fmt: skip

    def rotated(self, r: Mat) -> "Sym":
        """R I R^T: the same inertia seen from the world's axes."""
        a, b, c = r
        columns = (  # of R I
            a * self.xx + b * self.xy + c * self.xz,
            a * self.xy + b * self.yy + c * self.yz,
            a * self.xz + b * self.yz + c * self.zz,
        )

        def entry(i, j):
            return columns[0][i] * a[j] + columns[1][i] * b[j] + columns[2][i] * c[j]

        return Sym(entry(0, 0), entry(1, 1), entry(2, 2), entry(0, 1), entry(0, 2), entry(1, 2))


class Spatial(NamedTuple):
    """A twist (angular, linear velocity of the point at the origin) or a wrench (moment about the origin, force)."""

    ang: Vec
    lin: Vec

    def __add__(self, o):
        return Spatial(self.ang + o.ang, self.lin + o.lin)

    def __sub__(self, o):
        return Spatial(self.ang - o.ang, self.lin - o.lin)

    def __mul__(self, s):
        return Spatial(self.ang * s, self.lin * s)

    def __neg__(self):
        return Spatial(-self.ang, -self.lin)

    def dot(self, o):
        return self.ang.dot(o.ang) + self.lin.dot(o.lin)

    def at(self, point: Vec) -> Vec:
        """Velocity of `point` moving with this twist."""
        return self.lin + self.ang.cross(point)

    def map(self, f):
        return Spatial(self.ang.map(f), self.lin.map(f))


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

    def from_afar(self, d: Vec) -> "Coupling":
        """self T, where T [ang, lin] = [ang, lin + d x ang] takes a twist from a point d away to the origin."""
        (rot, cross, lin), turned = self, self.cross.transposed()
        turn = Mat(*(a + b for a, b in zip(turned, lin.columns().times_cross(d))))
        return Coupling(Mat(*(a + b for a, b in zip(rot.columns(), cross.times_cross(d)))), cross, turn, lin.columns())


class Coupling(NamedTuple):
    """A 6x6 matrix [[aa, al], [la, ll]], from the twist of one body to the wrench on another; each by columns."""

    aa: Mat
    al: Mat
    la: Mat
    ll: Mat

    def transpose_times(self, s: Spatial) -> Spatial:
        (aa, al, la, ll), (ang, lin) = self, s
        return Spatial(
            aa.transpose_times(ang) + la.transpose_times(lin), al.transpose_times(ang) + ll.transpose_times(lin)
        )

    def __add__(self, o):
        return Coupling(*(Mat(*(a + b for a, b in zip(m, n))) for m, n in zip(self, o)))

    def minus_outer(self, p: Spatial, q: Spatial):
        """self - p q^T."""
        blocks = ((row, column) for row in p for column in q)
        return Coupling(*(Mat(*(c - row * q_i for c, q_i in zip(m, q_))) for m, (row, q_) in zip(self, blocks)))

    @staticmethod
    def outer(p: Spatial, q: Spatial) -> "Coupling":
        """p q^T."""
        return Coupling(*(Mat(*(row * q_i for q_i in column)) for row in p for column in q))

    def __neg__(self):
        return self.map(torch.neg)

    def inertia(self) -> Inertia:
        """self, which is symmetric."""
        return Inertia(self.aa.symmetric(), self.al, self.ll.symmetric())

    def from_both(self, d: Vec) -> Inertia:
        """T^T self: the inertia self was made of, about the point d away."""
        rot = Mat(*(a - d.cross(b) for a, b in zip(self.aa, self.la)))
        cross = Mat(*(a - d.cross(b) for a, b in zip(self.al, self.ll)))
        return Inertia(rot.symmetric(), cross, self.ll.symmetric())

    def rows(self) -> list[list[Tensor]]:
        """Six rows of six entries."""
        top = [(*a, *b) for a, b in zip(self.aa.transposed(), self.al.transposed())]
        return top + [(*a, *b) for a, b in zip(self.la.transposed(), self.ll.transposed())]

    def map(self, f):
        return Coupling(*(m.map(f) for m in self))


def quat_to_mat(w, x, y, z) -> Mat:
    """Rotation matrix of a quaternion, which is normalised first (so derivatives exist off the unit sphere)."""
    scale = torch.rsqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w * scale, x * scale, y * scale, z * scale
    return Mat(
        Vec(1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
        Vec(2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
        Vec(2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
    )


def axis_angle_to_mat(axis: Vec, angle) -> Mat:
    """Rodrigues' formula, by columns."""
    c, s = torch.cos(angle), torch.sin(angle)
    t = 1 - c
    x, y, z = axis
    return Mat(
        Vec(c + t * (x * x), t * (x * y) + s * z, t * (x * z) - s * y),
        Vec(t * (x * y) - s * z, c + t * (y * y), t * (y * z) + s * x),
        Vec(t * (x * z) + s * y, t * (y * z) - s * x, c + t * (z * z)),
    )


def quat_integrate(q: list[Tensor], omega: Vec, h: float) -> list[Tensor]:
    """q * exp(h omega / 2), normalised: omega in the body's frame, constant for h seconds."""
    w, x, y, z = q
    angle2 = omega.dot(omega) * (h * h)
    angle = torch.sqrt(angle2 + 1e-24)  # sqrt'(0) is infinite: keep away from it
    half_sinc = torch.sin(0.5 * angle) / angle  # -> 1/2
    c = torch.cos(0.5 * angle)
    ex, ey, ez = omega * (h * half_sinc)
    nw = w * c - x * ex - y * ey - z * ez
    nx = w * ex + x * c + y * ez - z * ey
    ny = w * ey - x * ez + y * c + z * ex
    nz = w * ez + x * ey - y * ex + z * c
    scale = torch.rsqrt(nw * nw + nx * nx + ny * ny + nz * nz)
    return [nw * scale, nx * scale, ny * scale, nz * scale]
