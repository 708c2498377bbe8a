"""One substep of a tree of rigid bodies, and its derivative.

A substep solves a linear system for the new velocity,

    A x = b,    A = M + h D + (contacts and limits as added mass),    b = M v + h (tau - bias) + impulses,

in O(n) by the articulated-body algorithm (Featherstone, Rigid Body Dynamics Algorithms, ch. 7). Each body is a
rotational inertia and a point mass; each contact is one more point, whose "mass" is its implicit stiffness and
damping. All vectors of a tree are in world axes about its own origin (the root's position), so nothing is ever
transformed between links, and float32 keeps its digits far from the world's origin.

The derivative never goes through the solver. With lam = A^-1 g (A is symmetric), the gradient of g . x is that of
`lam . (b - A x)` at fixed x and lam: the adjoint method. `residual` (forces.py) is that scalar, O(n) and elementwise,
and autograd differentiates it. A substep thus remembers nothing but its state.

Arrays are batch-last: qpos (nq, B), qvel (nv, B), everything in between (n, B) with n the joints of a group.
"""

import torch
from torch import Tensor

from diffsim.articulated import solve
from diffsim.contact import friction_weight, normal_law
from diffsim.forces import assemble, contact_kinematics, residual
from diffsim.kinematics import Frame, forward_kinematics, rows_of, to_parent, to_rows, twists
from diffsim.model import Model
from diffsim.spatial import Spatial, Vec, quat_integrate


# --- integration ------------------------------------------------------------------------------------------------
def integrate(model: Model, qpos: Tensor, qvel: Tensor, h: float) -> Tensor:
    """qpos after a time h at constant qvel; quaternions by the exponential map."""
    pieces = []
    for g in model.groups:
        q = [rows_of(qpos, rows) for rows in g.qpos]
        v = [rows_of(qvel, rows) for rows in g.dofs]
        if g.kind == "free":
            new = [q[i] + h * v[i] for i in range(3)] + list(quat_integrate(q[3:], Vec(*v[3:]), h))
        elif g.kind == "ball":
            new = quat_integrate(q, Vec(*v), h)
        else:
            new = [q[0] + h * v[0]]
        pieces += list(zip(new, g.qpos))
    return to_rows(pieces)


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
            taus = [[rows_of(grad_x, rows) for rows in g.dofs] for g in model.groups]
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


def _check_rows(**arrays: tuple[Tensor, int]):
    """One line for an array that is not (rows, environments)."""
    for name, (x, rows) in arrays.items():
        if x.dim() != 2 or x.shape[0] != rows:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({rows}, environments)")


def actuator_force(model: Model, ctrl: Tensor) -> Tensor:
    """Joint forces (nv, B) of the actuators at controls (nu, B), clipped to ctrlrange (no gradient outside)."""
    return model.gear @ torch.clamp(ctrl, model.ctrl_low, model.ctrl_high) + model.bias


def step(model: Model, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
    """One substep of model.timestep: (nq, B), (nv, B), (nu, B) -> qpos, qvel. Differentiable in all three."""
    _check_rows(qpos=(qpos, model.nq), qvel=(qvel, model.nv), ctrl=(ctrl, model.nu))

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
            pushed = wrench.map(lambda t, g=g: to_parent(model, g, t))
            wrenches[g.parent] = pushed if wrenches[g.parent] is None else wrenches[g.parent] + pushed
    return to_rows(pieces)


def mass_matrix(model: Model, qpos: Tensor) -> Tensor:
    """Joint-space inertia (nv, nv, B) of a qpos (nq, B), armature included, contacts and damping not."""
    _check_rows(qpos=(qpos, model.nq))
    nv, batch = model.nv, qpos.shape[1]
    qpos = qpos.repeat_interleave(nv, 1)
    unit = torch.eye(nv, device=qpos.device, dtype=qpos.dtype).repeat(1, batch)  # (nv, batch * nv)
    frames = forward_kinematics(model, qpos)
    nothing = torch.zeros_like(unit)
    links = assemble(model.without_contacts(), frames, qpos, nothing, nothing, 0.0)
    moved = twists(model, frames, unit)
    momenta = [link.momentum(v) if link.com else None for link, v in zip(links, moved)]
    armature = to_rows([(g.armature.expand(-1, unit.shape[1]), rows) for g in model.groups for rows in g.dofs])
    columns = _project(model, frames, momenta) + armature * unit
    return columns.reshape(nv, batch, nv).permute(0, 2, 1)


def bias_force(model: Model, qpos: Tensor, qvel: Tensor) -> Tensor:
    """Coriolis, centrifugal and gravity forces (nv, B): MuJoCo's qfrc_bias."""
    _check_rows(qpos=(qpos, model.nq), qvel=(qvel, model.nv))
    frames = forward_kinematics(model, qpos)
    nothing = torch.zeros_like(qvel)
    wrenches = []
    before, after = (assemble(model.without_contacts(), frames, qpos, qvel, nothing, h) for h in (0.0, 1.0))
    for a, b in zip(before, after):  # the impulse is momentum - h bias
        wrenches.append(a.wrench() - b.wrench() if a.com else None)
    return _project(model, frames, wrenches)


def contact_points(model: Model, qpos: Tensor, qvel: Tensor) -> tuple[Tensor, Tensor]:
    """Gap (ncontact, B) in m, negative inside, and world force (3, ncontact, B) in N, of `model.contact_names`."""
    _check_rows(qpos=(qpos, model.nq), qvel=(qvel, model.nv))
    frames = forward_kinematics(model, qpos)
    gaps, forces = [None] * len(model.contact_names), [None] * len(model.contact_names)
    for g, frame, v in zip(model.groups, frames, twists(model, frames, qvel)):
        if g.contacts is None:
            continue
        c = g.contacts
        gap, _, u = contact_kinematics(g, frame, v)
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
