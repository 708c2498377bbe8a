"""Hand Reorient: an Allegro hand, palm up, catches a cube and turns it to a goal, then to the next one.

The task of SAPO's paper (Xing et al. 2025, arXiv 2412.12089) and of RPO's, with 4 implicit substeps where theirs takes
64 explicit ones, and the cube's angular velocity in its own axes. The cube falls onto the fingers first: catching it is
part of the task.
"""

from functools import cached_property

import mujoco
import torch
from torch import Tensor

from diffsim.tasks.base import ASSETS, Task

CUBE, GOAL = slice(16, 23), slice(23, 30)  # rows of qpos: position, quaternion


class Hand(Task):
    """A hand catches a cube and turns it to goals."""

    xml = ASSETS / "hand.xml"
    control_dt = 1 / 120
    max_episode_steps = 600
    collisions = True
    tolerance = 0.1  # rad
    lost = 0.24  # m

    @cached_property
    def limits(self) -> Tensor:
        return torch.as_tensor(mujoco.MjModel.from_xml_path(str(self.xml)).jnt_range[:16].T)  # low, high: (2, 16)

    def reset(self, model, count, generator):
        def rand(rows):
            return torch.rand(rows, count, generator=generator, dtype=model.dtype, device=model.device)

        low, high = (x.to(model.gear)[:, None] for x in self.limits)
        joints = torch.maximum(0.2 * (low + (high - low) * rand(16)), low)
        position = torch.tensor([0.0, -0.1, 0.6]).to(model.gear)[:, None] + 0.02 * rand(3) - 0.01
        below = position - torch.tensor([0.0, 0.0, 0.04]).to(model.gear)[:, None]
        qpos = torch.cat([joints, position, random_turn(rand(2)), below, random_turn(rand(2))])
        return qpos, qpos.new_zeros(model.nv, count)

    def observe(self, qpos, qvel, action):
        low, high = (x.to(qpos)[:, None] for x in self.limits)
        joints = 2 * (qpos[:16] - low) / (high - low) - 1
        hand, cube = 0.2 * qvel[:16], torch.cat([qvel[16:19], 0.2 * qvel[19:22]])
        return torch.cat([joints, hand, qpos[CUBE], cube, qpos[GOAL], difference(qpos), action])

    def reward(self, qpos, qvel, action):
        angle = self.angle(qpos)
        turned = 1 / (angle + 0.1) - 2e-4 * action.square().sum(0)
        return turned - 10 * self.distance(qpos) + self.bonus(angle.detach())

    def bonus(self, angle: Tensor) -> Tensor:
        """125 well inside `tolerance`, nothing at it: the paper's second sigmoid is 1/2 at most, and its first one has
        to come to 1, which takes 8 mrad. So a goal that is met at less than about 1 rad/s is paid in part, and is over.
        Its slope lies in those 8 mrad only, which no window meets but to be thrown off by: it has no gradient here."""
        reached = torch.sigmoid((self.tolerance - angle) / 1e-3)
        return 250 * torch.sigmoid((reached - 1) / 1e-3)

    def terminated(self, qpos, qvel):
        return self.distance(qpos) >= self.lost

    def success(self, qpos, qvel):
        return self.angle(qpos) <= self.tolerance

    def renew(self, qpos, qvel, generator):
        turn = random_turn(torch.rand(2, qpos.shape[1], generator=generator, dtype=qpos.dtype, device=qpos.device))
        goal = torch.where(self.success(qpos, qvel), turn, qpos[GOAL][3:])
        return torch.cat([qpos[:26], goal]), qvel

    @staticmethod
    def angle(qpos):
        """Between cube and goal, rad (B,)."""
        sine = torch.sqrt(difference(qpos)[1:].square().sum(0) + 1e-12)
        return 2 * torch.asin(sine.clamp(max=1 - 1e-3))

    @staticmethod
    def distance(qpos):
        """Between cube and goal, m (B,)."""
        return torch.sqrt((qpos[CUBE][:3] - qpos[GOAL][:3]).square().sum(0) + 1e-12)


def difference(qpos: Tensor) -> Tensor:
    """Quaternion of the cube times the inverse of the goal's (4, B)."""
    (a, b, c, d), (w, x, y, z) = qpos[CUBE][3:], qpos[GOAL][3:]
    return torch.stack(
        [
            a * w + b * x + c * y + d * z,
            b * w - a * x - c * z + d * y,
            c * w - a * y - d * x + b * z,
            d * w - a * z - b * y + c * x,
        ]
    )


def random_turn(x: Tensor) -> Tensor:
    """Quaternion (4, B) of a turn about y and then one about x, of numbers (2, B) in [0, 1) for angles of +-pi."""
    (cx, cy), (sx, sy) = torch.cos(torch.pi * (x - 0.5)), torch.sin(torch.pi * (x - 0.5))
    return torch.stack([cx * cy, sx * cy, cx * sy, sx * sy])
