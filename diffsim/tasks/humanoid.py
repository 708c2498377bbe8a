"""Humanoid with the reward, timing and 21 actuators of SHAC's paper (Xu et al. 2022, arXiv 2204.07137).

The body is our own: Gymnasium's has no ankles and stands on two points, and its light legs (armature .01) make the
gradient of a window grow by half in every step, in the worst environments.
"""

import torch

from diffsim.tasks.base import ASSETS, FloatingRunner


class Humanoid(FloatingRunner):
    xml = ASSETS / "humanoid.xml"
    start_height = 1.35
    start_joints = (0.0,) * 21
    fallen = 0.74

    def reward(self, qpos, qvel, action):
        d = (qpos[2] - 0.84).clamp(-1.0, 0.1)
        height = torch.where(d > 0, 10 * d, -200 * d * d)
        return self.progress(qpos, qvel) + height - 0.002 * action.square().sum(0)
