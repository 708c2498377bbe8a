"""One substep of a tree of rigid bodies, and its derivative.

A substep solves a linear system for the new velocity,

    A x = b,    A = M + h D + (contacts and limits as added mass),    b = M v + h (tau - bias) + impulses,

in O(n) by the articulated-body algorithm (Featherstone, Rigid Body Dynamics Algorithms, ch. 7). Each body is a
rotational inertia and a point mass; each contact is one more point, whose "mass" is its implicit stiffness and
damping. All vectors of a tree are in world axes about its own origin (the root's position), so nothing is ever
transformed between links, and float32 keeps its digits far from the world's origin.

The derivative never goes through the solver. With lam = A^-1 g (A is symmetric), the gradient of g . x is that of
`lam . (b - A x)` at fixed x and lam: the adjoint method. `residual` below is that scalar, O(n) and elementwise,
and autograd differentiates it. A substep thus remembers nothing but its state.

Arrays are batch-last: qpos (nq, B), qvel (nv, B), everything in between (n, B) with n the joints of a group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffsim.contact import friction_weight, normal_law
from diffsim.model import Group, Model
from diffsim.spatial import Mat, Spatial, Sym, Vec, axis_angle_to_mat, quat_integrate, quat_to_mat


# --- rows: from MuJoCo's order to groups, from group to group ---------------------------------------------------
def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Rows of x; evenly spaced ones as a view."""
    if len(rows) == 1:
        return x[rows[0] : rows[0] + 1]
    step = rows[1] - rows[0]
    if step > 0 and rows == list(range(rows[0], rows[-1] + 1, step)):
        return x[rows[0] : rows[-1] + 1 : step]
    return x[rows]


def _unrows(pieces: list[tuple[Tensor, list[int]]]) -> Tensor:
    """Inverse of `_rows`: put the rows of every piece where they belong."""
    where = sorted((row, i, k) for i, (_, rows) in enumerate(pieces) for k, row in enumerate(rows))
    return torch.cat([pieces[i][0][k : k + 1] for _, i, k in where])


def _from_parent(model: Model, g: Group, x):
    """Rows of the parent group as the children see them: a lone parent is repeated, equal rows need nothing.

    Repeating once, rather than broadcasting in every use, leaves the gradient one sum instead of many.
    """
    n = len(model.groups[g.parent].joints)
    if n == 1:
        return x if len(g.joints) == 1 else x.map(lambda t: t.expand(len(g.joints), -1))
    if g.parent_rows == list(range(n)):
        return x
    return x.map(lambda t: t if t.shape[0] == 1 else _rows(t, g.parent_rows))


def _to_parent(model: Model, g: Group, t: Tensor) -> Tensor:
    """Sum of the children's rows per parent."""
    n = len(model.groups[g.parent].joints)
    if n == 1:
        return t if t.shape[0] == 1 else t.sum(0, keepdim=True)
    if g.parent_rows == list(range(n)):
        return t
    sums: list = [None] * n
    for i, parent in enumerate(g.parent_rows):
        row = t[i : i + 1]
        sums[parent] = row if sums[parent] is None else sums[parent] + row
    return torch.cat([torch.zeros_like(t[:1]) if row is None else row for row in sums])


# --- kinematics -------------------------------------------------------------------------------------------------
class Frame(NamedTuple):
    """Where the links of a group are: position relative to the tree's origin, rotation, the tree's origin, and
    the unit twist of each of its dofs (a free joint has none: its six are the axes themselves)."""

    pos: Vec
    rot: Mat
    origin: Vec
    screws: tuple[Spatial, ...]


def forward_kinematics(model: Model, qpos: Tensor) -> list[Frame]:
    """Pose of every link; qpos (nq, B) with unit quaternions."""
    zero = torch.zeros_like(qpos[:1])
    still = Vec(zero, zero, zero)
    frames: list[Frame] = []
    for g in model.groups:
        q = [_rows(qpos, rows) for rows in g.qpos]
        if g.kind == "free":
            frames.append(Frame(still, quat_to_mat(*q[3:]), Vec(*q[:3]), ()))
            continue
        pos, rot, origin = g.offset, g.rotation, still
        if g.parent >= 0:
            up = frames[g.parent]
            up_pos, up_rot = _from_parent(model, g, up.pos), _from_parent(model, g, up.rot)
            origin = _from_parent(model, g, up.origin)
            pos = up_pos + up_rot @ g.offset
            rot = up_rot if rot is None else up_rot @ rot
        elif rot is None:
            one = torch.ones_like(zero)
            rot = Mat(Vec(one, zero, zero), Vec(zero, one, zero), Vec(zero, zero, one))
        if g.kind == "ball":
            anchor = pos if g.anchor is None else pos + rot @ g.anchor
            rot = rot @ quat_to_mat(*q)
            screws = tuple(Spatial(a, anchor.cross(a)) for a in rot)
            pos = anchor if g.anchor is None else anchor - rot @ g.anchor
        else:
            axis = rot @ g.axis
            angle = q[0] - g.q0
            if g.kind == "hinge":
                anchor = pos if g.anchor is None else pos + rot @ g.anchor
                rot = rot @ axis_angle_to_mat(g.axis, angle)
                pos = anchor if g.anchor is None else anchor - rot @ g.anchor
                screws = (Spatial(axis, anchor.cross(axis)),)
            else:  # slide; those that carry a whole tree move its origin, not the links relative to it
                if g.shifts_tree:
                    origin = origin + axis * angle
                else:
                    pos = pos + axis * angle
                screws = (Spatial(still, axis),)
        frames.append(Frame(pos, rot, origin, screws))
    return frames


def _joint_velocity(g: Group, frame: Frame, qvel: Tensor) -> Spatial:
    """Twist that the joint itself adds. A free joint: world linear, body-frame angular velocity (MuJoCo's)."""
    v = [_rows(qvel, rows) for rows in g.dofs]
    if g.kind == "free":
        return Spatial(frame.rot @ Vec(*v[3:]), Vec(*v[:3]))
    twist = frame.screws[0] * v[0]
    for screw, speed in zip(frame.screws[1:], v[1:]):
        twist = twist + screw * speed
    return twist


def twists(model: Model, frames: list[Frame], qvel: Tensor) -> list[Spatial]:
    """Velocity of every link."""
    out: list[Spatial] = []
    for g, frame in zip(model.groups, frames):
        v = _joint_velocity(g, frame, qvel)
        out.append(v + _from_parent(model, g, out[g.parent]) if g.parent >= 0 else v)
    return out


# --- forces -----------------------------------------------------------------------------------------------------
class Touch(NamedTuple):
    """Contact points of a group, (p, n, B): implicit stiffness and damping as horizontal and vertical "mass"."""

    pos: Vec
    tangential: Tensor
    normal: Tensor
    push: Tensor  # vertical impulse


class Link(NamedTuple):
    """What acts on the links of a group during one step."""

    com: Vec | None  # None where the links have no mass of their own
    mass: Tensor | None
    inertia: Sym | None  # about the centre of mass, world axes
    linear: Vec | None  # impulse on the centre of mass: momentum - h (gravity and velocity terms)
    angular: Vec | None  # the same about it
    touch: Touch | None
    diagonal: list[Tensor]  # armature, damping and limits per dof
    joint_impulse: list[Tensor]  # the same on the right-hand side

    def momentum(self, twist: Spatial) -> Spatial:
        p = twist.at(self.com) * self.mass
        return Spatial(self.inertia @ twist.ang + self.com.cross(p), p)

    def wrench(self) -> Spatial | None:
        """All impulses together, about the origin."""
        total = None
        if self.com is not None:
            total = Spatial(self.angular + self.com.cross(self.linear), self.linear)
        if self.touch is not None:
            (x, y, _), push = self.touch.pos, self.touch.push
            none = torch.zeros_like(push[0])
            touch = Spatial(Vec((y * push).sum(0), -(x * push).sum(0), none), Vec(none, none, push.sum(0)))
            total = touch if total is None else total + touch
        return total


def _contact_kinematics(g: Group, frame: Frame, twist: Spatial):
    """Gap, point of contact and its velocity for every sphere, (p, n, B)."""
    c = g.contacts
    x, y, z = _per_contact(g, frame.pos) + _per_contact(g, frame.rot) @ c.point
    foot = Vec(x, y, z - c.radius)  # the lowest point of the (inflated) sphere
    return frame.origin.z + foot.z - c.ground, foot, _per_contact(g, twist).at(foot)


def _per_contact(g: Group, x):
    """A quantity of the links, (n, B), repeated for each of their contact points, (p, n, B)."""
    return x.map(lambda t: t.expand(len(g.contacts.index), -1, -1))


def assemble(model: Model, frames: list[Frame], qpos: Tensor, qvel: Tensor, qfrc: Tensor, h: float) -> list[Link]:
    """Everything of A and b, link by link; qfrc (nv, B) are applied joint forces."""
    soft = model.softness
    velocity = twists(model, frames, qvel)
    accel: list[Spatial] = []  # of every link when all joint accelerations are zero, gravity as a fictitious one
    links = []
    for g, frame, v in zip(model.groups, frames, velocity):
        own = _joint_velocity(g, frame, qvel) if g.parent >= 0 else v
        if g.kind == "free":  # its linear coordinates are world axes: only the rotation carries a bias
            bias = Spatial(v.ang * 0.0, v.lin.cross(v.ang))
        else:
            bias = Spatial(v.ang.cross(own.ang), v.ang.cross(own.lin) + v.lin.cross(own.ang))
        if g.parent >= 0:
            a = _from_parent(model, g, accel[g.parent]) + bias
        else:
            a = Spatial(bias.ang, bias.lin - model.gravity)
        accel.append(a)

        com = inertia = linear = angular = touch = None
        if g.has_mass:
            com, inertia = frame.pos + frame.rot @ g.com, g.inertia.rotated(frame.rot)
            u, spin = v.at(com), inertia @ v.ang
            linear = (u - (a.at(com) + v.ang.cross(u)) * h) * g.mass
            angular = spin - (inertia @ a.ang + v.ang.cross(spin)) * h
        if g.contacts is not None:
            c = g.contacts
            gap, foot, u = _contact_kinematics(g, frame, v)
            force, weight, push = normal_law(gap, u.z, c.k, c.damping, soft.contact_width, h)
            touch = Touch(foot, friction_weight(force, u.x, u.y, c.friction, soft.slip, h), weight, push)

        diagonal, joint_impulse = [], []
        for rows in g.dofs:
            speed = _rows(qvel, rows)
            push = _rows(qfrc, rows)
            weight = g.armature
            if g.damping is not None:
                weight = weight + h * g.damping
            if g.kind in ("hinge", "slide"):
                q = _rows(qpos, g.qpos[0])
                if g.stiffness is not None:
                    push = push - g.stiffness * (q - g.spring_ref)
                if g.servo_kp is not None:
                    push = push + g.servo_kp * q + g.servo_kv * speed
            jump = g.armature * speed + h * push
            if g.limited:
                _, w_low, j_low = normal_law(q - g.limit_low, speed, g.limit_k, g.limit_damping, soft.limit_width, h)
                _, w_high, j_high = normal_law(
                    g.limit_high - q, -speed, g.limit_k, g.limit_damping, soft.limit_width, h
                )
                weight, jump = weight + w_low + w_high, jump + j_low - j_high
            diagonal.append(weight)
            joint_impulse.append(jump)
        links.append(Link(com, g.mass, inertia, linear, angular, touch, diagonal, joint_impulse))
    return links


def residual(model: Model, frames: list[Frame], links: list[Link], x: Tensor, lam: Tensor) -> Tensor:
    """lam . (b - A x), summed over the batch: what the adjoint method differentiates."""
    total = 0.0
    for g, link, vx, vl in zip(model.groups, links, twists(model, frames, x), twists(model, frames, lam)):
        if link.com is not None:
            total = total + vl.at(link.com).dot(link.linear - vx.at(link.com) * link.mass).sum()
            total = total + vl.ang.dot(link.angular - link.inertia @ vx.ang).sum()
        if link.touch is not None:
            t = link.touch
            ux, ul = _per_contact(g, vx).at(t.pos), _per_contact(g, vl).at(t.pos)
            drag = t.tangential * (ux.x * ul.x + ux.y * ul.y)
            total = total + (ul.z * (t.push - t.normal * ux.z) - drag).sum()
        for rows, d, j in zip(g.dofs, link.diagonal, link.joint_impulse):
            total = total + (_rows(lam, rows) * (j - d * _rows(x, rows))).sum()
    return total


# --- the articulated-body algorithm -----------------------------------------------------------------------------
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


def _inertia_of(link: Link) -> Articulated | None:
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
    inertia = [_inertia_of(link) for link in links]
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
                return _to_parent(model, g, t)

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
        a = _from_parent(model, g, motion[g.parent]) if g.parent >= 0 else None
        for k, (s, pull, ratio) in enumerate(reversed(steps[index])):
            x = ratio if a is None else ratio - pull.dot(a)
            a = s * x if a is None else a + s * x
            pieces.append((x, g.dofs[k]))
        motion[index] = a
    return _unrows(pieces)


# --- integration ------------------------------------------------------------------------------------------------
def integrate(model: Model, qpos: Tensor, qvel: Tensor, h: float) -> Tensor:
    """qpos after a time h at constant qvel; quaternions by the exponential map."""
    pieces = []
    for g in model.groups:
        q = [_rows(qpos, rows) for rows in g.qpos]
        v = [_rows(qvel, rows) for rows in g.dofs]
        if g.kind == "free":
            new = [q[i] + h * v[i] for i in range(3)] + list(quat_integrate(q[3:], Vec(*v[3:]), h))
        elif g.kind == "ball":
            new = quat_integrate(q, Vec(*v), h)
        else:
            new = [q[0] + h * v[0]]
        pieces += list(zip(new, g.qpos))
    return _unrows(pieces)


def forward_substep(model: Model, qpos: Tensor, qvel: Tensor, qfrc: Tensor) -> tuple[Tensor, Tensor]:
    """One step of model.timestep, semi-implicit: the new velocity moves the position."""
    h = model.timestep
    frames = forward_kinematics(model, qpos)
    links = assemble(model, frames, qpos, qvel, qfrc, h)
    x = solve(model, frames, links, [link.wrench() for link in links], [link.joint_impulse for link in links])
    return integrate(model, qpos, x, h), x


def backward_substep(model: Model, qpos, qvel, qfrc, x, grad_qpos, grad_qvel):
    """Gradients of a substep's inputs from those of its outputs; x is the new velocity that forward found."""
    h = model.timestep
    with torch.enable_grad():
        q, v = qpos.detach().requires_grad_(), x.detach().requires_grad_()
        direct_q, grad_x = torch.autograd.grad(integrate(model, q, v, h), (q, v), grad_qpos)
    grad_x = grad_x + grad_qvel
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (qpos, qvel, qfrc)]
        frames = forward_kinematics(model, inputs[0])
        links = assemble(model, frames, *inputs, h)
        with torch.no_grad():
            taus = [[_rows(grad_x, rows) for rows in g.dofs] for g in model.groups]
            lam = solve(model, frames, links, [None] * len(links), taus)
        grad_q, grad_v, grad_f = torch.autograd.grad(residual(model, frames, links, x, lam), inputs)
    return direct_q + grad_q, grad_v, grad_f


# --- public functions -------------------------------------------------------------------------------------------
class Step(torch.autograd.Function):
    """Several substeps as one operation: forward keeps the states only, backward walks them with the adjoint."""

    @staticmethod
    def forward(ctx, qpos, qvel, qfrc, forward, backward, substeps):
        states = []
        for _ in range(substeps):
            states.append((qpos, qvel))
            qpos, qvel = forward(qpos, qvel, qfrc)
        ctx.save_for_backward(qfrc, qvel, *(t for pair in states for t in pair))
        ctx.backward_substep = backward
        return qpos, qvel

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_qpos, grad_qvel):
        qfrc, x, *states = ctx.saved_tensors
        grad_qfrc = torch.zeros_like(qfrc)
        # Nothing in, nothing out: an environment whose state was thrown away may hold inf, and 0 * inf is NaN.
        unused = (grad_qpos == 0).all(0) & (grad_qvel == 0).all(0)
        for i in reversed(range(0, len(states), 2)):
            qpos, qvel = states[i : i + 2]
            grad_qpos, grad_qvel, g = ctx.backward_substep(qpos, qvel, qfrc, x, grad_qpos, grad_qvel)
            grad_qfrc = grad_qfrc + g
            x = qvel
        grads = (torch.where(unused, 0.0, g) for g in (grad_qpos, grad_qvel, grad_qfrc))
        return *grads, None, None, None


def actuator_force(model: Model, ctrl: Tensor) -> Tensor:
    """Joint forces (nv, B) of the actuators at controls (nu, B), clipped to ctrlrange (no gradient outside)."""
    return model.gear @ torch.clamp(ctrl, model.ctrl_low, model.ctrl_high) + model.bias


def step(model: Model, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
    """One substep of model.timestep: (nq, B), (nv, B), (nu, B) -> qpos, qvel. Differentiable in all three."""

    def forward(q, v, f):
        return forward_substep(model, q, v, f)

    def backward(*args):
        return backward_substep(model, *args)

    return Step.apply(qpos, qvel, actuator_force(model, ctrl), forward, backward, 1)


def _project(model: Model, frames: list[Frame], wrenches: list[Spatial | None]) -> Tensor:
    """Joint forces (nv, B) of one wrench per link: sum_b J_b^T wrench_b."""
    pieces = []
    wrenches = list(wrenches)
    for index in reversed(range(len(model.groups))):
        g, frame, wrench = model.groups[index], frames[index], wrenches[index]
        if g.kind == "free":
            pieces += list(zip([*wrench.lin, *frame.rot.transpose_times(wrench.ang)], g.dofs))
        else:
            pieces += [(s.dot(wrench), rows) for s, rows in zip(frame.screws, g.dofs)]
        if g.parent >= 0:
            pushed = wrench.map(lambda t, g=g: _to_parent(model, g, t))
            wrenches[g.parent] = pushed if wrenches[g.parent] is None else wrenches[g.parent] + pushed
    return _unrows(pieces)


def mass_matrix(model: Model, qpos: Tensor) -> Tensor:
    """Joint-space inertia (nv, nv, B) of a qpos (nq, B), armature included, contacts and damping not."""
    nv, batch = model.nv, qpos.shape[1]
    qpos = qpos.repeat_interleave(nv, 1)
    unit = torch.eye(nv, device=qpos.device, dtype=qpos.dtype).repeat(1, batch)  # (nv, batch * nv)
    frames = forward_kinematics(model, qpos)
    nothing = torch.zeros_like(unit)
    links = assemble(model.without_contacts(), frames, qpos, nothing, nothing, 0.0)
    moved = twists(model, frames, unit)
    momenta = [link.momentum(v) if link.com else None for link, v in zip(links, moved)]
    armature = _unrows([(g.armature.expand(-1, unit.shape[1]), rows) for g in model.groups for rows in g.dofs])
    columns = _project(model, frames, momenta) + armature * unit
    return columns.reshape(nv, batch, nv).permute(0, 2, 1)


def bias_force(model: Model, qpos: Tensor, qvel: Tensor) -> Tensor:
    """Coriolis, centrifugal and gravity forces (nv, B): MuJoCo's qfrc_bias."""
    frames = forward_kinematics(model, qpos)
    nothing = torch.zeros_like(qvel)
    wrenches = []
    before, after = (assemble(model.without_contacts(), frames, qpos, qvel, nothing, h) for h in (0.0, 1.0))
    for a, b in zip(before, after):  # the impulse is momentum - h bias
        wrenches.append(a.wrench() - b.wrench() if a.com else None)
    return _project(model, frames, wrenches)


def contact_points(model: Model, qpos: Tensor, qvel: Tensor) -> tuple[Tensor, Tensor]:
    """Gap (ncontact, B) in m, negative inside, and world force (3, ncontact, B) in N, of `model.contact_names`."""
    frames = forward_kinematics(model, qpos)
    gaps, forces = [None] * len(model.contact_names), [None] * len(model.contact_names)
    for g, frame, v in zip(model.groups, frames, twists(model, frames, qvel)):
        if g.contacts is None:
            continue
        c = g.contacts
        gap, _, u = _contact_kinematics(g, frame, v)
        normal, _, _ = normal_law(gap, u.z, c.k, c.damping, model.softness.contact_width, 0.0)
        drag = friction_weight(normal, u.x, u.y, c.friction, model.softness.slip, 1.0)
        force = torch.stack([-drag * u.x, -drag * u.y, normal])
        for i, rows in enumerate(c.index):
            for row, place in enumerate(rows):
                if place >= 0:
                    gaps[place], forces[place] = gap[i, row], force[:, i, row]
    if not gaps:
        return qpos.new_zeros(0, qpos.shape[1]), qpos.new_zeros(3, 0, qpos.shape[1])
    return torch.stack(gaps), torch.stack(forces, 1)


def contact_force(model: Model, qpos: Tensor, qvel: Tensor) -> Tensor:
    """World force (3, ncontact, B) of the ground on every contact point, N."""
    return contact_points(model, qpos, qvel)[1]
