"""Humanoid with the reward, timing and 21 actuators of SHAC's paper (Xu et al. 2022, arXiv 2204.07137).

The body is our own: on Gymnasium's, which has no ankles and stands on two points, no script learned to run. Feet,
ankles, armature and damping were changed together, so which of them matters is not known.
"""

import torch

from diffsim.tasks.base import ASSETS, FloatingRunner


class Humanoid(FloatingRunner):
    """A body with arms runs on two legs."""

    xml = ASSETS / "humanoid.xml"
    start_height = 1.35
    start_joints = (0.0,) * 21
    fallen = 0.74

    def reward(self, qpos, qvel, action):
        d = (qpos[2] - 0.84).clamp(-1.0, 0.1)
        height = torch.where(d > 0, 10 * d, -200 * d * d)
        return self.progress(qpos, qvel) + height - 0.002 * action.square().sum(0)
