"""MuJoCo's own engine behind the same environment: the judge of what was learned in the soft one. Forward only."""

import os

import mujoco
import numpy as np
import torch
from mujoco import rollout
from torch import Tensor

from diffsim.model import Model


class MujocoPhysics:
    """Batched MuJoCo, one control step a call, on all cores.

    Uses the Euler integrator with implicit joint damping, at diffsim's own substep.
    """

    def __init__(self, model: Model, substeps: int, num_threads: int | None = None):
        self.mj_model = model.mj_model.__copy__()
        self.mj_model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
        self.model, self.substeps = model, substeps
        threads = num_threads or os.cpu_count() or 1
        self.data = [mujoco.MjData(self.mj_model) for _ in range(threads)]
        self.pool = rollout.Rollout(nthread=threads if threads > 1 else 0)
        self.layout = mujoco.mjtState.mjSTATE_FULLPHYSICS
        self.size = mujoco.mj_stateSize(self.mj_model, self.layout)

    def step(self, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
        """(nq, B), (nv, B), (nu, B) -> qpos, qvel after `substeps`; detached."""
        m, batch = self.mj_model, qpos.shape[1]
        state = np.zeros((batch, self.size))  # time, qpos, qvel
        state[:, 1 : 1 + m.nq] = qpos.detach().T.cpu().numpy()
        state[:, 1 + m.nq : 1 + m.nq + m.nv] = qvel.detach().T.cpu().numpy()
        control = np.repeat(ctrl.detach().T.cpu().double().numpy()[:, None], self.substeps, 1)
        trajectory, _ = self.pool.rollout(m, self.data, state, np.ascontiguousarray(control))
        last = torch.from_numpy(np.ascontiguousarray(trajectory[:, -1].T)).to(qpos)
        return last[1 : 1 + m.nq].contiguous(), last[1 + m.nq : 1 + m.nq + m.nv].contiguous()
