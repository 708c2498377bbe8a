"""Both sides of a substep's equation A x = b, term by term.

    A = sum over links   J^T I J        b = sum over links   J^T (momentum - h (gravity and velocity terms))
      + sum over contacts  J^T w J        + sum over contacts  J^T j      (ground; between bodies: pairs.py)
      + diagonal per dof                  + impulse per dof

J takes joint velocities to the velocity of a link (`kinematics.twists`) or of a point on it; it is never written out.
x is the velocity at the end of the substep, so both sides are momenta and impulses. Shapes: (n, B) for the n links of
a group, (p, n, B) for the contact points on them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffsim.contact import friction_weight, normal_law
from diffsim.kinematics import Frame, Grouped, bias_accelerations, twists
from diffsim.model import Group, Model, Softness
from diffsim.pairs import PairTerms, at_ends, link_terms, pair_terms
from diffsim.spatial import Spatial, Sym, Vec


class BodyTerms(NamedTuple):
    """The links of a group as rigid bodies, (n, B), and the impulses on them at and about their centres of mass."""

    com: Vec
    mass: Tensor  # (n, 1)
    inertia: Sym  # about the centre of mass, world axes
    linear: Vec
    angular: Vec

    def momentum(self, twist: Spatial) -> Spatial:
        """I twist, about the origin."""
        p = twist.at(self.com) * self.mass
        return Spatial(self.inertia @ twist.ang + self.com.cross(p), p)

    def impulse(self) -> Spatial:
        """About the origin."""
        return Spatial(self.angular + self.com.cross(self.linear), self.linear)


class ContactTerms(NamedTuple):
    """The contact points of a group, (p, n, B): each adds a "mass" diag(w_t, w_t, w_n) at pos and an impulse j_n."""

    gap: Tensor
    pos: Vec
    vel: Vec
    f_n: Tensor
    w_t: Tensor
    w_n: Tensor
    j_n: Tensor

    def impulse(self) -> Spatial:
        """Of all points of a link, about the origin: j_n is vertical."""
        (x, y, _), j = self.pos, self.j_n
        zero = torch.zeros_like(j[0])  # (n, B)
        return Spatial(Vec((y * j).sum(0), -(x * j).sum(0), zero), Vec(zero, zero, j.sum(0)))


class JointTerms(NamedTuple):
    """The dofs of a group: [component] -> (n, B), or (n, 1) where it is constant."""

    diagonal: list[Tensor]
    impulse: list[Tensor]


class Terms(NamedTuple):
    """A group's share of A and b."""

    body: BodyTerms | None  # None where the links have no mass of their own
    contact: ContactTerms | None
    joint: JointTerms
    pairs: list[PairTerms]

    def impulse(self) -> Spatial | None:
        """Impulses on the links that act on no other, about the origin."""
        parts = [part.impulse() for part in (self.body, self.contact) if part is not None]
        return parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else None


class Equation(NamedTuple):
    """A x = b."""

    groups: list[Terms]
    links: PairTerms | None  # contacts between links


def body_terms(g: Group, frame: Frame, vel: Spatial, acc: Spatial, h: float) -> BodyTerms:
    """Mass m at c, inertia I about it; momentum less h times the Newton-Euler force at zero joint acceleration:

        linear = m (v_c - h a_c),    angular = I omega - h (I alpha + omega x I omega)

    omega, v_c and alpha, a_c: angular and linear velocity and acceleration of the centre of mass, gravity in a_c.
    """
    com, inertia = frame.pos + frame.rot @ g.com, g.inertia.rotated(frame.rot)
    v_c = vel.at(com)
    a_c = acc.at(com) + vel.ang.cross(v_c)  # a spatial acceleration lacks omega x v
    spin = inertia @ vel.ang
    linear = (v_c - a_c * h) * g.mass
    angular = spin - (inertia @ acc.ang + vel.ang.cross(spin)) * h
    return BodyTerms(com, g.mass, inertia, linear, angular)


def contact_terms(g: Group, frame: Frame, vel: Spatial, softness: Softness, h: float) -> ContactTerms:
    """The law of contact.py at the lowest point of every sphere. Over a substep its force on the link is

        h f = (-w_t v_x', -w_t v_y', j_n - w_n v_z')

    v': the point's velocity after the substep. The part in v' goes to A, as a mass would; j_n stays in b.
    """
    c = g.contacts
    x, y, z = _per_point(g, frame.pos) + _per_point(g, frame.rot) @ c.point
    pos = Vec(x, y, z - c.radius)
    v = _per_point(g, vel).at(pos)
    gap = frame.origin.z + pos.z - c.ground
    f_n, w_n, j_n = normal_law(gap, v.z, c.k, c.damping, softness.contact_width, h, softness.release_depth)
    w_t = friction_weight(f_n, v.x * v.x + v.y * v.y, c.friction, softness.slip, h)
    return ContactTerms(gap, pos, v, f_n, w_t, w_n, j_n)


def _per_point(g: Group, x):
    """A quantity of the links, (n, B), repeated for each of their contact points, (p, n, B)."""
    return x.map(lambda t: t.expand(len(g.contacts.index), -1, -1))


def joint_terms(g: Group, q, v, tau, h: float) -> JointTerms:
    """Armature, implicit damping and limits of every dof, and the forces along it:

    diagonal = armature + h damping + w_limit
    impulse  = armature v + h (tau + spring and servo) + j_limit
    """
    inertia = g.armature if g.damping is None else g.armature + h * g.damping  # (n, 1)
    if g.kind in ("free", "ball"):  # neither springs nor limits
        return JointTerms([inertia] * len(v), [g.armature * v_i + h * tau_i for v_i, tau_i in zip(v, tau)])
    (q,), (v,), (tau,) = q, v, tau
    impulse = g.armature * v + h * joint_force(g, q, v, tau)
    if g.limit_k is not None:
        w, j = limit_terms(g, q, v, h)
        inertia, impulse = inertia + w, impulse + j
    return JointTerms([inertia], [impulse])


def joint_force(g: Group, q: Tensor, v: Tensor, tau: Tensor) -> Tensor:
    """Of a hinge or slide: tau + stiffness (spring_ref - q) + kp q + kv v, explicit as in MuJoCo's Euler integrator."""
    if g.stiffness is not None:
        tau = tau + g.stiffness * (g.spring_ref - q)
    return tau if g.servo_kp is None else tau + g.servo_kp * q + g.servo_kv * v


def limit_terms(g: Group, q: Tensor, v: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """Weight and impulse of a hinge's or slide's two stops: contacts in one dimension, the upper one mirrored."""
    law = g.limit_k, g.limit_damping, g.limit_width, h
    _, w_low, j_low = normal_law(q - g.limit_low, v, *law)
    _, w_high, j_high = normal_law(g.limit_high - q, -v, *law)
    return w_low + w_high, j_low - j_high


def assemble(model: Model, frames: list[Frame], q: Grouped, v: Grouped, tau: Grouped, h: float) -> Equation:
    """Everything of A and b, group by group, at a state and under applied joint forces tau."""
    velocities = twists(model, frames, v)
    accelerations = bias_accelerations(model, frames, v, velocities)
    terms = []
    for i, g in enumerate(model.groups):
        body = body_terms(g, frames[i], velocities[i], accelerations[i], h) if g.has_mass else None
        contact = contact_terms(g, frames[i], velocities[i], model.softness, h) if g.contacts else None
        pairs = [pair_terms(p, i, frames, velocities, model.softness, h) for p in g.pairs]
        terms.append(Terms(body, contact, joint_terms(g, q[i], v[i], tau[i], h), pairs))
    return Equation(terms, link_terms(model, frames, velocities, h) if model.links else None)


def impulses(model: Model, equation: Equation) -> list[Spatial | None]:
    """All impulses on the links of each group, about their origins."""
    terms, links = equation
    found = [t.impulse() for t in terms]

    def add(i, impulse):
        found[i] = impulse if found[i] is None else found[i] + impulse

    for i, g in enumerate(model.groups):
        for pairs, t in zip(g.pairs, terms[i].pairs):
            on_links = t.impulse()
            add(i, on_links)
            if pairs.other >= 0:
                found[pairs.other] = found[pairs.other] - t.on_other(on_links).map(lambda x: x.sum(0, keepdim=True))
    if links is not None:
        on_a, (a, b), total = links.impulse(), (model.links.a, model.links.b), []
        on_b = links.on_other(on_a)
        for x, y in zip((*on_a.ang, *on_a.lin), (*on_b.ang, *on_b.lin)):
            zero = x.new_zeros(sum(len(g.joints) for g in model.groups), x.shape[1])
            total.append(zero.index_put((a,), x, accumulate=True).index_put((b,), -y, accumulate=True))
        first = 0
        for i, g in enumerate(model.groups):
            own = [t[first : first + len(g.joints)] for t in total]
            add(i, Spatial(Vec(*own[:3]), Vec(*own[3:])))
            first += len(g.joints)
    return found


def residual(model: Model, frames: list[Frame], equation: Equation, x: Grouped, lam: Grouped) -> Tensor:
    """lam . (b - A x), summed over the batch: what the adjoint method differentiates.

    With J x the velocities under x and J lam those under lam, it is a sum of J lam . (impulse - inertia J x).
    """
    total = 0.0
    terms, links = equation
    moved = list(zip(twists(model, frames, x), twists(model, frames, lam)))
    everything = zip(model.groups, terms, moved, x, lam)
    for i, (g, (body, contact, joint, pairs), (vel_x, vel_lam), x_g, lam_g) in enumerate(everything):
        if body is not None:
            total = total + vel_lam.at(body.com).dot(body.linear - vel_x.at(body.com) * body.mass).sum()
            total = total + vel_lam.ang.dot(body.angular - body.inertia @ vel_x.ang).sum()
        if contact is not None:
            p_x, p_lam = (_per_point(g, vel).at(contact.pos) for vel in (vel_x, vel_lam))
            drag = contact.w_t * (p_x.x * p_lam.x + p_x.y * p_lam.y)
            total = total + (p_lam.z * (contact.j_n - contact.w_n * p_x.z) - drag).sum()
        for p, t in zip(g.pairs, pairs):
            others = (None, None) if p.other < 0 else moved[p.other]
            total = total + t.residual(*(t.relative(a, b) for a, b in zip(moved[i], others))).sum()
        for d, j, x_i, lam_i in zip(*joint, x_g, lam_g):
            total = total + (lam_i * (j - d * x_i)).sum()
    if links is not None:
        parts = [[*a.ang, *a.lin, *b.ang, *b.lin] for a, b in moved]
        velocities = at_ends(model, parts, [a for a, _ in moved])
        of_x, of_lam = ([Spatial(Vec(*t[c : c + 3]), Vec(*t[c + 3 : c + 6])) for t in velocities] for c in (0, 6))
        total = total + links.residual(links.relative(*of_x), links.relative(*of_lam)).sum()
    return total
