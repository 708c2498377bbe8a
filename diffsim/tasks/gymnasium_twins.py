"""Gymnasium's Ant, Hopper, HalfCheetah, Walker2d and Humanoid: bodies, observations, rewards, ends, timing, integrator.

They run on MuJoCo's physics unless told otherwise, so the thing optimised is the thing evaluated (`--physics gymnasium`
runs `gymnasium.make` itself).
Contact forces are left out: of Ant's and Humanoid's observations (include_cfrc_ext_in_observation=False) and rewards
(of Ant's at most 0.039 a step; of Humanoid's at most 10, in a fall). Humanoid observes qpos and qvel alone, without
what Gymnasium computes from them (cinert, cvel) or from the action (qfrc_actuator). Ant's speed is that of qpos,
Humanoid's that of the centre of mass at qpos: Gymnasium takes the last computed positions, which lag by a part of a
substep. Source of the definitions: the environments' documentation, gymnasium.farama.org.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from diffsim.builder import SelfCollisionWarning, load_model
from diffsim.kinematics import forward_kinematics, split
from diffsim.tasks.base import GYMNASIUM_ASSETS, Task, uniform


class GymnasiumTwin(Task):
    """What they share: a reward for the distance of a step, for being healthy, and a cost of control."""

    physics = "mujoco"
    own_integrator = True
    runs = True
    warn_of_self_collision = False
    gymnasium_kwargs: dict = {}  # of gymnasium.make
    frame_skip: int
    timestep: float
    healthy_reward, forward_reward = 0.0, 1.0
    ctrl_cost: float  # of actions in [-1, 1]
    noise: float
    normal_speed_noise = False
    first = 1  # position coordinates that are not observed
    max_speed = float("inf")  # observed

    def __init_subclass__(cls):
        wanted = dict(reward="transition_reward(self, before, qpos, qvel, action)")
        wanted |= dict(control_dt="frame_skip and timestep", substeps="frame_skip")
        if found := [name for name in wanted if name in vars(cls)]:
            instead = f"{wanted[found[0]]} instead"
            raise ValueError(f"{cls.__name__}.{found[0]} is never asked on a Gymnasium task; write {instead}")
        cls.control_dt, cls.substeps = cls.frame_skip * cls.timestep, cls.frame_skip

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
        start, end = self.x(torch.cat([before, qpos], 1)).chunk(2)  # together: Humanoid's is many small operations
        speed = (end - start) / self.control_dt
        healthy = self.healthy_reward * self.healthy(qpos, qvel)
        return self.forward_reward * speed + healthy - self.ctrl_cost * action.square().sum(0)

    def x(self, qpos: Tensor) -> Tensor:
        """Where it is on its way (B,), m."""
        return qpos[0]

    def healthy(self, qpos: Tensor, qvel: Tensor) -> Tensor:
        return torch.ones(qpos.shape[1], dtype=torch.bool, device=qpos.device)

    def terminated(self, qpos, qvel):
        return ~self.healthy(qpos, qvel)


class AntV5(GymnasiumTwin):
    """Gymnasium's Ant, without contact forces."""

    xml = GYMNASIUM_ASSETS / "ant.xml"
    gymnasium_kwargs = dict(include_cfrc_ext_in_observation=False)
    frame_skip, timestep = 5, 0.01
    healthy_reward, ctrl_cost = 1.0, 0.5
    noise, normal_speed_noise = 0.1, True
    first = 2

    def healthy(self, qpos, qvel):
        return (qpos[2] >= 0.2) & (qpos[2] <= 1.0)


class HopperV5(GymnasiumTwin):
    """Gymnasium's Hopper."""

    xml = GYMNASIUM_ASSETS / "hopper.xml"
    frame_skip, timestep = 4, 0.002
    healthy_reward, ctrl_cost = 1.0, 1e-3
    noise = 5e-3
    max_speed = 10.0

    def healthy(self, qpos, qvel):
        bounded = (torch.cat([qpos[2:], qvel]).abs() < 100).all(0)
        return bounded & (qpos[1] > 0.7) & (qpos[2].abs() < 0.2)


class HalfCheetahV5(GymnasiumTwin):
    """Gymnasium's HalfCheetah."""

    xml = GYMNASIUM_ASSETS / "half_cheetah.xml"
    frame_skip, timestep = 5, 0.01
    ctrl_cost = 0.1
    noise, normal_speed_noise = 0.1, True


class Walker2dV5(GymnasiumTwin):
    """Gymnasium's Walker2d."""

    xml = GYMNASIUM_ASSETS / "walker2d_v5.xml"
    frame_skip, timestep = 4, 0.002
    healthy_reward, ctrl_cost = 1.0, 1e-3
    noise = 5e-3
    max_speed = 10.0

    def healthy(self, qpos, qvel):
        return (qpos[1] > 0.8) & (qpos[1] < 2.0) & (qpos[2].abs() < 1.0)


class HumanoidV5(GymnasiumTwin):
    """Gymnasium's Humanoid, observed by qpos and qvel."""

    xml = GYMNASIUM_ASSETS / "humanoid.xml"
    gymnasium_kwargs = {f"include_{x}_in_observation": False for x in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}
    frame_skip, timestep = 5, 0.003
    healthy_reward, forward_reward = 5.0, 1.25
    ctrl_cost = 0.1 * 0.4**2  # Gymnasium's is of controls, which are in [-0.4, 0.4]
    noise = 1e-2
    first = 2

    def x(self, qpos):
        """Of the centre of mass."""
        body = _body(self.xml, qpos.device, qpos.dtype)
        parts = zip(body.groups, forward_kinematics(body, split(qpos, body.qpos_rows)))
        links = [(g.mass, (frame.pos + frame.rot @ g.com).x) for g, frame in parts if g.has_mass]  # about the root
        return qpos[0] + sum((mass * x).sum(0) for mass, x in links) / sum(mass.sum() for mass, _ in links)

    def healthy(self, qpos, qvel):
        return (qpos[2] > 1.0) & (qpos[2] < 2.0)


@cache
def _body(xml, device, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SelfCollisionWarning)
        return load_model(xml, device=device, dtype=dtype)
