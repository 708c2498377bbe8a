"""One substep of a tree of rigid bodies, and its derivative.

A substep of h seconds solves a linear system for the new velocity,

    A x = b,    A = M + h D + (contacts and limits as added mass),    b = M v + h (tau - bias) + impulses,

in O(n) by the articulated-body algorithm (articulated.py). Each body is a rotational inertia and a point mass; each
contact is one more point, whose "mass" is its implicit stiffness and damping (forces.py).

The derivative never goes through the solver. Let lam = A^-1 dL/dx (A is symmetric). The gradient of L by anything that
A and b depend on is that of `lam . (b - A x)` at fixed x and lam: the adjoint method. `residual` (forces.py) is that
scalar, O(n) and elementwise, and autograd differentiates it. A step thus
remembers nothing but the states between its substeps.

Arrays are batch-last: qpos (nq, B), qvel and qfrc (nv, B), for the B environments.
"""

import torch
from torch import Tensor

from diffsim import articulated, dense
from diffsim.forces import Equation, assemble, contact_terms, impulses, residual
from diffsim.kinematics import Frame, Grouped, forward_kinematics, join, project, split, twists
from diffsim.model import Model
from diffsim.pairs import link_terms, pair_terms
from diffsim.spatial import Vec, quat_integrate


# --- one substep ------------------------------------------------------------------------------------------------
def integrate(model: Model, qpos: Tensor, qvel: Tensor, h: float) -> Tensor:
    """qpos after h seconds at constant qvel; quaternions by the exponential map."""
    new = []
    for g, q, v in zip(model.groups, split(qpos, model.qpos_rows), split(qvel, model.dof_rows)):
        if g.kind == "free":
            new.append([q_i + h * v_i for q_i, v_i in zip(q[:3], v[:3])] + quat_integrate(q[3:], Vec(*v[3:]), h))
        elif g.kind == "ball":
            new.append(quat_integrate(q, Vec(*v), h))
        else:
            new.append([q[0] + h * v[0]])
    return join(new, model.qpos_rows)


def solve(model: Model, frames: list[Frame], equation: Equation, impulses, tau: Grouped) -> Grouped:
    """x with A x = sum_b J_b^T impulse_b + tau. impulses: of the links about the origin, a Spatial or None a group."""
    if model.links:
        return dense.solve(model, frames, equation, impulses, tau)
    return articulated.solve(model, frames, equation.groups, impulses, tau)


def forward_substep(model: Model, qpos: Tensor, qvel: Tensor, qfrc: Tensor) -> tuple[Tensor, Tensor]:
    """qpos, qvel after model.timestep under joint forces qfrc; semi-implicit: the new velocity moves the position."""
    h = model.timestep
    q, v, tau = split(qpos, model.qpos_rows), split(qvel, model.dof_rows), split(qfrc, model.dof_rows)
    frames = forward_kinematics(model, q)
    equation = assemble(model, frames, q, v, tau, h)
    joint_impulses = [t.joint.impulse for t in equation.groups]
    x = join(solve(model, frames, equation, impulses(model, equation), joint_impulses), model.dof_rows)
    return integrate(model, qpos, x, h), x


def backward_substep(model: Model, qpos, qvel, qfrc, x, grad_qpos, grad_qvel):
    """Gradients of a substep's inputs from those of its outputs; x is the new velocity that forward found."""
    h = model.timestep
    qpos, qvel, qfrc, x = (t.detach().requires_grad_() for t in (qpos, qvel, qfrc, x))
    with torch.enable_grad():
        new_qpos = integrate(model, qpos, x, h)
        q, v, tau = split(qpos, model.qpos_rows), split(qvel, model.dof_rows), split(qfrc, model.dof_rows)
        frames = forward_kinematics(model, q)
        equation = assemble(model, frames, q, v, tau, h)
    direct, grad_x = torch.autograd.grad(new_qpos, (qpos, x), grad_qpos)
    with torch.no_grad():  # A lam = dL/dx
        rhs = split(grad_x + grad_qvel, model.dof_rows)
        lam = solve(model, frames, equation, [None] * len(frames), rhs)
    with torch.enable_grad():  # dL = d[lam . (b - A x)]
        scalar = residual(model, frames, equation, split(x.detach(), model.dof_rows), lam)
    # a body that only slides, and touches nothing, does not depend on where it is
    grad_qpos, grad_qvel, grad_qfrc = torch.autograd.grad(scalar, (qpos, qvel, qfrc), materialize_grads=True)
    return direct + grad_qpos, grad_qvel, grad_qfrc


# --- one substep under a control ----------------------------------------------------------------------------------
def actuator_force(model: Model, ctrl: Tensor) -> Tensor:
    """Joint forces (nv, B) of the actuators at controls (nu, B), clipped to ctrlrange (no gradient outside)."""
    return model.gear @ torch.clamp(ctrl, model.ctrl_low, model.ctrl_high) + model.bias


def forward(model: Model, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
    """qpos, qvel after model.timestep at controls (nu, B)."""
    return forward_substep(model, qpos, qvel, actuator_force(model, ctrl))


def backward(model: Model, qpos, qvel, ctrl, x, grad_qpos, grad_qvel):
    """Its adjoint: gradients of qpos, qvel and ctrl."""
    with torch.enable_grad():
        ctrl = ctrl.detach().requires_grad_()
        qfrc = actuator_force(model, ctrl)
    *grads, grad_qfrc = backward_substep(model, qpos, qvel, qfrc, x, grad_qpos, grad_qvel)
    return *grads, *torch.autograd.grad(qfrc, ctrl, grad_qfrc)


# --- a control step: several substeps ---------------------------------------------------------------------------
class Eager:
    """The substeps of a control step and their adjoint, as PyTorch runs them."""

    def __init__(self, model: Model):
        self.model = model

    def forward(self, qpos: Tensor, qvel: Tensor, ctrl: Tensor, substeps: int):
        """(nq, B), (nv, B), (nu, B) -> states (substeps, nq + nv, B) that substeps began with; new qpos, qvel."""
        states = []
        for _ in range(substeps):
            states.append(torch.cat([qpos, qvel]))
            qpos, qvel = forward(self.model, qpos, qvel, ctrl)
        return torch.stack(states), qpos, qvel

    def backward(self, states: Tensor, qvel: Tensor, ctrl: Tensor, grad_qpos: Tensor, grad_qvel: Tensor):
        """Gradients of qpos, qvel, ctrl from those of the new qpos, qvel; states, new qvel as `forward` gave them.

        Nothing in, nothing out: an environment whose state was thrown away may hold inf, and 0 * inf is NaN.
        """
        used = (grad_qpos != 0).any(0) | (grad_qvel != 0).any(0)
        total = torch.zeros_like(ctrl)
        for state in reversed(states):
            inputs = state.split([self.model.nq, self.model.nv])
            grad_qpos, grad_qvel, grad = backward(self.model, *inputs, ctrl, qvel, grad_qpos, grad_qvel)
            total, qvel = total + grad, inputs[1]
        return [torch.where(used, grad, 0.0) for grad in (grad_qpos, grad_qvel, total)]


class Step(torch.autograd.Function):
    """Several substeps as one operation: forward keeps the states only, backward walks them with the adjoint."""

    @staticmethod
    def forward(ctx, qpos, qvel, ctrl, engine, substeps):
        states, qpos, qvel = engine.forward(qpos, qvel, ctrl, substeps)
        ctx.save_for_backward(states, qvel, ctrl)
        ctx.engine = engine
        return qpos, qvel

    @staticmethod
    def backward(ctx, grad_qpos, grad_qvel):
        if torch.is_grad_enabled():  # torch's once_differentiable lets autograd take a second derivative for zero
            raise RuntimeError("diffsim's step is differentiable once: no create_graph=True, no Hessian through it")
        return *ctx.engine.backward(*ctx.saved_tensors, grad_qpos, grad_qvel), None, None


# --- public functions -------------------------------------------------------------------------------------------
def check_rows(model: Model, **arrays: tuple[Tensor, int]):
    """One line for an array that is not (rows, environments) of the model's dtype, or not of as many as the first."""
    for name, (x, rows) in arrays.items():
        if not isinstance(x, Tensor) or x.dtype != model.dtype:
            kind = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"{name} is {kind}, the model is {model.dtype}: see load_model's dtype")
        if x.dim() != 2 or x.shape[0] != rows:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({rows}, environments)")
    batches = {name: x.shape[1] for name, (x, _) in arrays.items()}
    if len({*batches.values()}) > 1:
        raise ValueError("the numbers of environments differ: " + ", ".join(f"{k} {n}" for k, n in batches.items()))


def step(model: Model, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
    """One substep of model.timestep: qpos (nq, B), qvel (nv, B), ctrl (nu, B) -> qpos, qvel.

    Differentiable once, in reverse mode, in all three. Raises ValueError for a wrong shape.
    """
    check_rows(model, qpos=(qpos, model.nq), qvel=(qvel, model.nv), ctrl=(ctrl, model.nu))
    return Step.apply(qpos, qvel, ctrl, Eager(model), 1)


def mass_matrix(model: Model, qpos: Tensor) -> Tensor:
    """Joint-space inertia (nv, nv, B) of a qpos (nq, B), armature included, contacts and damping not.

    Units kg, kg m or kg m^2, as the dofs of row and column move or turn. Raises ValueError for a wrong shape.
    """
    check_rows(model, qpos=(qpos, model.nq))
    nv, batch = model.nv, qpos.shape[1]
    unit = torch.eye(nv, device=qpos.device, dtype=qpos.dtype).repeat(1, batch)  # (nv, B nv): columns of every M
    q, v = split(qpos.repeat_interleave(nv, 1), model.qpos_rows), split(unit, model.dof_rows)
    frames = forward_kinematics(model, q)
    terms = assemble(model.without_contacts(), frames, q, v, v, 0.0).groups  # h = 0 s: no force has an impulse
    momenta = [t.body.momentum(vel) if t.body else None for t, vel in zip(terms, twists(model, frames, v))]
    own = [[d * v_i for d, v_i in zip(t.joint.diagonal, v_g)] for t, v_g in zip(terms, v)]
    columns = join(project(model, frames, momenta), model.dof_rows) + join(own, model.dof_rows)
    return columns.reshape(nv, batch, nv).permute(0, 2, 1)


def bias_force(model: Model, qpos: Tensor, qvel: Tensor) -> Tensor:
    """Coriolis, centrifugal and gravity forces (nv, B) of qpos (nq, B), qvel (nv, B): MuJoCo's qfrc_bias, N or N m.

    Raises ValueError for a wrong shape.
    """
    check_rows(model, qpos=(qpos, model.nq), qvel=(qvel, model.nv))
    q, v = split(qpos, model.qpos_rows), split(qvel, model.dof_rows)
    frames = forward_kinematics(model, q)
    terms = assemble(model.without_contacts(), frames, q, v, v, 1.0).groups  # h = 1 s: impulse = momentum - bias
    velocities = twists(model, frames, v)
    wrenches = [t.body.momentum(vel) - t.body.impulse() if t.body else None for t, vel in zip(terms, velocities)]
    return join(project(model, frames, wrenches), model.dof_rows)


def contact_points(model: Model, qpos: Tensor, qvel: Tensor) -> tuple[Tensor, Tensor]:
    """Gap (ncontact, B) in m, negative inside, and world force (3, ncontact, B) in N, of `model.contact_names`.

    The force is that on the geom, of a pair on the first.
    Of qpos (nq, B), qvel (nv, B). Raises ValueError for a wrong shape.
    """
    check_rows(model, qpos=(qpos, model.nq), qvel=(qvel, model.nv))
    frames = forward_kinematics(model, split(qpos, model.qpos_rows))
    velocities = twists(model, frames, split(qvel, model.dof_rows))
    found = []
    for i, g in enumerate(model.groups):  # h = 1 s: w_t is friction per speed
        if g.contacts is not None:
            c = contact_terms(g, frames[i], velocities[i], model.softness, 1.0)
            found.append((g.contacts.index, c.gap, (-c.w_t * c.vel.x, -c.w_t * c.vel.y, c.f_n)))
        for pairs in g.pairs:
            c = pair_terms(pairs, i, frames, velocities, model.softness, 1.0)
            found.append((pairs.index, c.gap, c.normal * c.f_n - c.slide * c.w_t))
    if model.links:
        c = link_terms(model, frames, velocities, 1.0)
        found.append((model.links.index, c.gap, c.normal * c.f_n - c.slide * c.w_t))
    gaps, forces = [None] * len(model.contact_names), [None] * len(model.contact_names)
    for index, gap, force in found:  # (p, n, B)
        for j, places in enumerate(index):
            for row, place in enumerate(places):
                if place >= 0:
                    gaps[place], forces[place] = gap[j, row], torch.stack([f[j, row] for f in force])
    if not gaps:
        return qpos.new_zeros(0, qpos.shape[1]), qpos.new_zeros(3, 0, qpos.shape[1])
    return torch.stack(gaps), torch.stack(forces, 1)


def contact_force(model: Model, qpos: Tensor, qvel: Tensor) -> Tensor:
    """World force (3, ncontact, B) on every point of `model.contact_names`, N; see `contact_points`."""
    return contact_points(model, qpos, qvel)[1]
