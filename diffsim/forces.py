"""Both sides of a substep's equation A x = b, link by link: inertia, gravity, contacts, limits, actuators."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffsim.contact import friction_weight, normal_law
from diffsim.kinematics import Frame, from_parent, joint_velocity, rows_of, twists
from diffsim.model import Group, Model
from diffsim.spatial import Spatial, Sym, Vec


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


def contact_kinematics(g: Group, frame: Frame, twist: Spatial):
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
        own = joint_velocity(g, frame, qvel) if g.parent >= 0 else v
        if g.kind == "free":  # its linear coordinates are world axes: only the rotation carries a bias
            bias = Spatial(v.ang * 0.0, v.lin.cross(v.ang))
        else:
            bias = Spatial(v.ang.cross(own.ang), v.ang.cross(own.lin) + v.lin.cross(own.ang))
        if g.parent >= 0:
            a = from_parent(model, g, accel[g.parent]) + bias
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
            gap, foot, u = contact_kinematics(g, frame, v)
            force, weight, push = normal_law(gap, u.z, c.k, c.damping, soft.contact_width, h)
            touch = Touch(foot, friction_weight(force, u.x, u.y, c.friction, soft.slip, h), weight, push)

        diagonal, joint_impulse = [], []
        for rows in g.dofs:
            speed = rows_of(qvel, rows)
            push = rows_of(qfrc, rows)
            weight = g.armature
            if g.damping is not None:
                weight = weight + h * g.damping
            if g.kind in ("hinge", "slide"):
                q = rows_of(qpos, g.qpos[0])
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
            total = total + (rows_of(lam, rows) * (j - d * rows_of(x, rows))).sum()
    return total
