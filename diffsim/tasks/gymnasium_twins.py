"""Ant-v5, Hopper-v5, HalfCheetah-v5, Walker2d-v5: Gymnasium's bodies, observations, rewards, ends, timing, integrator.

They run on MuJoCo's physics unless told otherwise, so the thing optimised is the thing evaluated (`--physics gymnasium`
runs `gymnasium.make` itself).
Ant's contact forces are left out: of its observation (Gymnasium's include_cfrc_ext_in_observation=False) and, at most
0.039 a step, of its reward; its speed is that of qpos, where Gymnasium's is of the body's last computed position, which
lags by a part of a substep. Source of the definitions: the environments' documentation, gymnasium.farama.org.
"""

import torch
from torch import Tensor

from diffsim.tasks.base import GYMNASIUM_ASSETS, Task, uniform


class GymnasiumTwin(Task):
    """What the four share: a reward for the distance of a step, for being healthy, and a cost of control."""

    physics = "mujoco"
    own_integrator = True
    runs = True
    warn_of_self_collision = False
    gymnasium_kwargs: dict = {}  # of gymnasium.make
    frame_skip: int
    timestep: float
    healthy_reward = 0.0
    ctrl_cost: float
    noise: float
    normal_speed_noise = False
    first = 1  # position coordinates that are not observed
    max_speed = float("inf")  # observed

    def __init_subclass__(cls):
        cls.control_dt, cls.substeps = cls.frame_skip * cls.timestep, cls.frame_skip
        if "reward" in vars(cls):
            wanted = "transition_reward(self, before, qpos, qvel, action)"
            raise ValueError(f"{cls.__name__}.reward is never asked on a Gymnasium task; write {wanted} instead")

    def reset(self, model, count, generator):
        start = torch.as_tensor(model.mj_model.qpos0, dtype=model.dtype, device=model.device)[:, None]
        qpos = start + uniform(model, model.nq, count, self.noise, generator)
        if model.nq > model.nv:  # Gymnasium leaves it to MuJoCo to make the quaternion a unit one
            qpos = torch.cat([qpos[:3], qpos[3:7] / qpos[3:7].norm(dim=0), qpos[7:]])
        if not self.normal_speed_noise:
            return qpos, uniform(model, model.nv, count, self.noise, generator)
        normal = torch.randn(model.nv, count, generator=generator, dtype=model.dtype, device=model.device)
        return qpos, self.noise * normal

    def observe(self, qpos, qvel, action):
        return torch.cat([qpos[self.first :], qvel.clamp(-self.max_speed, self.max_speed)])

    def transition_reward(self, before, qpos, qvel, action):
        speed = (qpos[0] - before[0]) / self.control_dt
        healthy = self.healthy_reward * self.healthy(qpos, qvel)
        return speed + healthy - self.ctrl_cost * action.square().sum(0)

    def healthy(self, qpos: Tensor, qvel: Tensor) -> Tensor:
        return torch.ones(qpos.shape[1], dtype=torch.bool, device=qpos.device)

    def terminated(self, qpos, qvel):
        return ~self.healthy(qpos, qvel)


class AntV5(GymnasiumTwin):
    xml = GYMNASIUM_ASSETS / "ant.xml"
    gymnasium_kwargs = dict(include_cfrc_ext_in_observation=False)
    frame_skip, timestep = 5, 0.01
    healthy_reward, ctrl_cost = 1.0, 0.5
    noise, normal_speed_noise = 0.1, True
    first = 2

    def healthy(self, qpos, qvel):
        return (qpos[2] >= 0.2) & (qpos[2] <= 1.0)


class HopperV5(GymnasiumTwin):
    xml = GYMNASIUM_ASSETS / "hopper.xml"
    frame_skip, timestep = 4, 0.002
    healthy_reward, ctrl_cost = 1.0, 1e-3
    noise = 5e-3
    max_speed = 10.0

    def healthy(self, qpos, qvel):
        bounded = (torch.cat([qpos[2:], qvel]).abs() < 100).all(0)
        return bounded & (qpos[1] > 0.7) & (qpos[2].abs() < 0.2)


class HalfCheetahV5(GymnasiumTwin):
    xml = GYMNASIUM_ASSETS / "half_cheetah.xml"
    frame_skip, timestep = 5, 0.01
    ctrl_cost = 0.1
    noise, normal_speed_noise = 0.1, True


class Walker2dV5(GymnasiumTwin):
    xml = GYMNASIUM_ASSETS / "walker2d_v5.xml"
    frame_skip, timestep = 4, 0.002
    healthy_reward, ctrl_cost = 1.0, 1e-3
    noise = 5e-3
    max_speed = 10.0

    def healthy(self, qpos, qvel):
        return (qpos[1] > 0.8) & (qpos[1] < 2.0) & (qpos[2].abs() < 1.0)
