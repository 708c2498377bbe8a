"""What a task has to say. Everything is batch-last, (rows, B), as the physics; see ant.py for an example."""

from pathlib import Path

import gymnasium
import torch
from torch import Tensor

from diffsim.dynamics import contact_points

GYMNASIUM_ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
ASSETS = Path(__file__).parents[1] / "assets"


class Task:
    """Subclass it, set `xml`, and write reset, observe and reward; terminated where episodes end before their time.

    All but `reset` are differentiated: tensors in, tensors out, for B environments at once.

    xml: an MJCF file, beside the task's or a path, or its text
    control_dt: seconds an action is held
    substeps: physics steps in that time, whatever timestep the MJCF has
    max_episode_steps: control steps; then the episode is truncated
    physics: engine that runs it unless another is asked for
    own_integrator: on MuJoCo's physics the MJCF's integrator, not Euler
    runs: whether it runs along x for its reward, so that its speed is of interest
    collisions: whether bodies touch each other, too, not the ground alone
    warn_of_self_collision: say which pairs never touch and would in MuJoCo
    """

    xml: str | Path
    control_dt = 1 / 60
    substeps = 4
    max_episode_steps = 1000
    physics = "diffsim"
    own_integrator = False
    runs = False
    collisions = False
    warn_of_self_collision = True

    def reset(self, model, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Initial qpos (nq, count), qvel (nv, count), of model.dtype and on model.device; draw by `generator` alone.

        Called for all environments at once: those that are not needed yet begin later episodes, until `env.reset()`.
        """
        raise NotImplementedError("reset")

    def observe(self, qpos: Tensor, qvel: Tensor, action: Tensor) -> Tensor:
        """Observation (obs_dim, B) of a state and the action (nu, B) that led to it."""
        raise NotImplementedError("observe")

    def reward(self, qpos: Tensor, qvel: Tensor, action: Tensor) -> Tensor:
        """Reward (B,) of arriving in a state by an action."""
        raise NotImplementedError("reward")

    def transition_reward(self, before: Tensor, qpos: Tensor, qvel: Tensor, action: Tensor) -> Tensor:
        """Reward (B,) that depends on the qpos a step began with, too: what the environment asks for."""
        return self.reward(qpos, qvel, action)

    def terminated(self, qpos: Tensor, qvel: Tensor) -> Tensor:
        """Which episodes end here (B,), bool; time limits are the environment's business."""
        return torch.zeros(qpos.shape[1], dtype=torch.bool, device=qpos.device)

    def success(self, qpos: Tensor, qvel: Tensor) -> Tensor | None:
        """Whether a goal is reached in this step (B,), bool: counted beside the return. None: the task has no goals."""
        return None

    def renew(self, qpos: Tensor, qvel: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The state an episode goes on from after its reward: with the next goal, where one was reached."""
        return qpos, qvel


def uniform(model, rows: int, count: int, width: float, generator: torch.Generator) -> Tensor:
    """Random numbers (rows, count) in [-width, width]."""
    x = torch.rand(rows, count, generator=generator, dtype=model.dtype, device=model.device)
    return (2 * x - 1) * width


def lift(model, qpos: Tensor, row: int) -> Tensor:
    """Raise starts that reach into the ground onto it (row: the height in qpos): contact would throw them off it."""
    gap, _ = contact_points(model, qpos, qpos.new_zeros(model.nv, qpos.shape[1]))
    of_ground = [i for g in model.groups if g.contacts for rows in g.contacts.index for i in rows if i >= 0]
    if of_ground:
        qpos = qpos.clone()
        qpos[row] -= gap[of_ground].amin(0).clamp(max=0.0)
    return qpos


class FloatingRunner(Task):
    """A robot with a free base that runs along x (SHAC's Ant and Humanoid, AHAC's ANYmal): what they share.

    Observation: height, quaternion, linear and angular velocity, joints, a tenth of the joint velocities, cosines of
    the base's z axis with up and of its x axis with the way to run, previous action.
    """

    runs = True
    warn_of_self_collision = False  # the papers' tasks have none
    start_height: float
    start_joints: tuple[float, ...]
    fallen: float  # m, height of the base at which an episode ends

    def reset(self, model, count, generator):
        position = uniform(model, 3, count, 0.1, generator)
        position[2] += self.start_height
        angle, axis = (uniform(model, n, count, w, generator) for n, w in ((1, torch.pi / 24), (3, 1.0)))
        axis = axis / axis.norm(dim=0).clamp_min(1e-6)
        quat = torch.cat([torch.cos(angle / 2), axis * torch.sin(angle / 2)])
        start = torch.tensor(self.start_joints, dtype=model.dtype, device=model.device)[:, None]
        joints = start + uniform(model, len(start), count, 0.2, generator)
        qpos = lift(model, torch.cat([position, quat, joints]), row=2)
        return qpos, uniform(model, model.nv, count, 0.25, generator)

    @staticmethod
    def axes(qpos):
        """Cosines of the base's z axis with up, and of its x axis with x, (2, B)."""
        squares = qpos[4:7].square()  # of the quaternion's x, y, z
        return 1 - 2 * (squares[:2] + squares[1:])

    def observe(self, qpos, qvel, action):
        return torch.cat([qpos[2:7], qvel[:6], qpos[7:], 0.1 * qvel[6:], self.axes(qpos), action])

    def progress(self, qpos, qvel):
        """Speed along x, staying upright, facing x."""
        up, heading = self.axes(qpos)
        return qvel[0] + 0.1 * up + heading

    def terminated(self, qpos, qvel):
        return qpos[2] < self.fallen


class PlanarRunner(Task):
    """A robot in the x-z plane (qpos: x, height, pitch, joints) that runs along x; observes all but x."""

    runs = True
    warn_of_self_collision = False
    noise = 0.05  # of initial positions
    speed_noise = 0.05

    def reset(self, model, count, generator):
        start = torch.as_tensor(model.mj_model.qpos0, dtype=model.dtype, device=model.device)[:, None]
        qpos = start + uniform(model, model.nq, count, self.noise, generator)
        return lift(model, qpos, row=1), uniform(model, model.nv, count, self.speed_noise, generator)

    def observe(self, qpos, qvel, action):
        return torch.cat([qpos[1:], qvel])
