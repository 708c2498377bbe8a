"""MuJoCo's own engine behind the same environment: the judge of what was learned in the soft one, and its teacher.

MuJoCo runs, diffsim differentiates. A control step returns MuJoCo's next state; the gradient that comes back to it goes
through diffsim's step from the same state and action:

    x' = mujoco_step(x, u) + diffsim_step(x, u) - stopgrad(diffsim_step(x, u))

on the state's tangent, so that quaternions stay unit. Real states, a model's derivatives: the model-value gradient of
model-based policy search (SVG: Heess et al. 2015, arXiv 1510.09142), with a simulator for the model. Song, Kim and
Scaramuzza 2024, arXiv 2403.14864, aligned a simplified model of one quadruped with a simulator in this way.

With `derivative="mujoco"` the derivative is MuJoCo's, too: the Jacobian of its control step by forward differences, for
2 nv + nu more of its steps. It is exact where MuJoCo is smooth. At a contact's onset MuJoCo's forces jump, and what a
difference makes of that depends on its width.
"""

import os
from collections.abc import Callable

import mujoco
import numpy as np
import torch
from mujoco import rollout
from torch import Tensor

from diffsim.mjcf import quiet_mujoco
from diffsim.model import Model

WIDTH = 1e-6  # of a difference: m or rad, per second for velocities, units of control


class MujocoPhysics:
    """Batched MuJoCo, one control step a call, on all cores; differentiable through `differentiator`'s step.

    Uses the Euler integrator with implicit joint damping, at diffsim's own substep, or (`own_integrator`) the MJCF's.
    Without a differentiator it is differentiable by differences of MuJoCo's own step, of WIDTH.
    """

    def __init__(self, model: Model, substeps: int, differentiator: Callable | None, own_integrator: bool = False):
        self.mj_model = model.mj_model.__copy__()
        if not own_integrator:
            self.mj_model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
        self.mj_model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)  # what explodes ends its episode
        self.model, self.substeps = model, substeps
        self._make_differentiator, self._differentiator = differentiator, None
        threads = os.cpu_count() or 1
        self.data = [mujoco.MjData(self.mj_model) for _ in range(threads)]
        self.pool = rollout.Rollout(nthread=threads if threads > 1 else 0)
        self.layout = mujoco.mjtState.mjSTATE_FULLPHYSICS
        self.size = mujoco.mj_stateSize(self.mj_model, self.layout)
        self.mismatch: Mismatch | None = None

    def step(self, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
        """(nq, B), (nv, B) and controls (nu, B) -> qpos, qvel after `substeps`.

        With a graph, the engines' disagreement in this step is left in `mismatch`.
        """
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in (qpos, qvel, ctrl))):
            return self.simulate(qpos, qvel, ctrl)
        if self._make_differentiator is None:
            return Linearised.apply(qpos, qvel, ctrl, *self.linearise(qpos, qvel, ctrl))
        real = self.simulate(qpos, qvel, ctrl)
        if self._differentiator is None:  # compiled only where gradients are wanted
            self._differentiator = self._make_differentiator()
        predicted = self._differentiator.step(qpos, qvel, ctrl)
        self.mismatch = Mismatch(self.model, predicted, real)
        return RealValue.apply(*predicted, *real, quaternion_rows(self.model))

    def simulate(self, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
        """MuJoCo's control step; detached."""
        m, batch = self.mj_model, qpos.shape[1]
        state = np.zeros((batch, self.size))  # time, qpos, qvel
        state[:, 1 : 1 + m.nq] = qpos.detach().T.cpu().numpy()
        state[:, 1 + m.nq : 1 + m.nq + m.nv] = qvel.detach().T.cpu().numpy()
        ctrl = ctrl.detach().nan_to_num()  # MuJoCo would log it; whoever steps with a NaN ends the episode
        control = np.repeat(ctrl.T.cpu().double().numpy()[:, None], self.substeps, 1)
        with quiet_mujoco():
            trajectory, _ = self.pool.rollout(m, self.data, state, np.ascontiguousarray(control))
        last = torch.from_numpy(np.ascontiguousarray(trajectory[:, -1].T)).to(qpos)
        return last[1 : 1 + m.nq].contiguous(), last[1 + m.nq : 1 + m.nq + m.nv].contiguous()

    @torch.no_grad()
    def linearise(self, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next qpos and qvel, their Jacobian (2 nv + nu, nq + nv, B), and the motions (nv, nq, B) of qpos in it.

        Those are the dofs', as quaternions stay unit; a control stays within its range.
        """
        nv, nu, high = self.model.nv, self.model.nu, self.model.ctrl_high.double()
        state = qpos.double(), qvel.double(), ctrl.double()
        real, directions, rows = torch.cat(self.simulate(*state)), motions(self.model, state[0]), []
        for i in range(2 * nv + nu):
            (q, v, u), width = (x.clone() for x in state), WIDTH
            if i < nv:
                q += width * directions[i]
                for row in quaternion_rows(self.model):
                    q[row : row + 4] /= q[row : row + 4].norm(dim=0)
            elif i < 2 * nv:
                v[i - nv] += width
            else:
                j = i - 2 * nv
                width = torch.where(u[j] + width > high[j], -width, width)
                u[j] += width
            rows.append((torch.cat(self.simulate(q, v, u)) - real) / width)
        return *real.to(qpos).split([self.model.nq, nv]), torch.stack(rows).to(qpos), directions.to(qpos)


class Mismatch:
    """How far diffsim's control step ends from MuJoCo's. The numbers are worked out when asked for."""

    def __init__(self, model: Model, predicted, real):
        self.model = model
        self.qpos, self.qvel = ((p - r).detach() for p, r in zip(predicted, real))

    def joint_angle(self) -> float:
        """Mean absolute difference of the hinges (rad) and slides (m) below the root body; without any, of qpos."""
        m = self.model.mj_model
        jointed = [int(m.jnt_qposadr[i]) for i in range(m.njnt) if m.jnt_type[i] >= 2 and m.jnt_bodyid[i] > 1]
        rows = jointed or list(range(m.nq))
        return float(self.qpos[rows].abs().mean())

    def base_velocity(self) -> float:
        """Mean length of the difference of the root's linear velocity, m/s."""
        m = self.model.mj_model
        slides = [i for i in range(m.nv) if m.jnt_type[m.dof_jntid[i]] == 2 and m.dof_bodyid[i] == 1]
        rows = [0, 1, 2] if m.jnt_type[0] == 0 else slides
        return float(self.qvel[rows].norm(dim=0).mean()) if rows else 0.0


def quaternion_rows(model: Model) -> list[int]:
    """Where in qpos a quaternion begins."""
    m = model.mj_model
    return [int(a) + (3 if t == 0 else 0) for a, t in zip(m.jnt_qposadr, m.jnt_type) if t <= 1]


def _body_axes(quat: Tensor) -> Tensor:
    """E (4, 3, B) with q * (0, w) = E w: how a unit quaternion moves with a rotation in body axes; E'E = 1."""
    w, x, y, z = quat
    return torch.stack(
        [torch.stack([-x, -y, -z]), torch.stack([w, -z, y]), torch.stack([z, w, -x]), torch.stack([-y, x, w])]
    )


class RealValue(torch.autograd.Function):
    """The real state, with the gradient of the predicted one."""

    @staticmethod
    def forward(ctx, predicted_qpos, predicted_qvel, qpos, qvel, quaternions):
        ctx.save_for_backward(predicted_qpos, qpos)
        ctx.quaternions = quaternions
        return qpos, qvel

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_qpos, grad_qvel):
        predicted, real = ctx.saved_tensors
        used = (grad_qpos != 0).any(0)  # what exploded may hold inf, and 0 * inf is NaN
        if ctx.quaternions:
            grad_qpos = grad_qpos.clone()
        for row in ctx.quaternions:  # a rotation of the real body is the same rotation of the predicted one
            q = slice(row, row + 4)
            rotation = torch.einsum("ijb,ib->jb", _body_axes(real[q]), grad_qpos[q])
            grad_qpos[q] = torch.einsum("ijb,jb->ib", _body_axes(predicted[q]), rotation)
        return torch.where(used, grad_qpos, 0.0), grad_qvel, None, None, None


def motions(model: Model, qpos: Tensor) -> Tensor:
    """Rates of the coordinates at unit velocity of each dof, (nv, nq, B): mj_integratePos to first order."""
    m, (nq, batch) = model.mj_model, qpos.shape
    rates = qpos.new_zeros(m.nv, nq, batch)
    for q, dof, kind in zip(m.jnt_qposadr, m.jnt_dofadr, m.jnt_type):
        linear = {0: 3, 1: 0}.get(int(kind), 1)
        rates[range(dof, dof + linear), range(q, q + linear)] = 1
        if kind <= 1:
            q, dof = q + linear, dof + linear
            rates[dof : dof + 3, q : q + 4] = _body_axes(qpos[q : q + 4]).transpose(0, 1) / 2
    return rates


class Linearised(torch.autograd.Function):
    """The real state, with the gradient that its Jacobian gives."""

    @staticmethod
    def forward(ctx, qpos, qvel, ctrl, new_qpos, new_qvel, jacobian, directions):
        ctx.save_for_backward(jacobian, directions)
        return new_qpos, new_qvel

    @staticmethod
    def backward(ctx, grad_qpos, grad_qvel):
        if torch.is_grad_enabled():
            raise RuntimeError("MuJoCo's step is differentiable once: no create_graph=True, no Hessian through it")
        jacobian, directions = ctx.saved_tensors
        nv, gradient = len(directions), torch.cat([grad_qpos, grad_qvel])
        rows = torch.einsum("kib,ib->kb", jacobian, gradient)
        of_dofs, of_qvel, of_ctrl = rows[:nv], rows[nv : 2 * nv], rows[2 * nv :]
        dual = directions / directions.square().sum(1, keepdim=True)  # a quaternion's motions are half as long
        used = (gradient != 0).any(0)  # what exploded may hold inf, and 0 * inf is NaN
        grads = torch.einsum("kib,kb->ib", dual, of_dofs), of_qvel, of_ctrl
        return *(torch.where(used, grad, 0.0) for grad in grads), None, None, None, None
