"""Humanoid on Gymnasium's body (17 actuators, none in the ankles) with the reward and timing of SHAC's paper.

Xu et al. 2022, arXiv 2204.07137. Torques are the MJCF's gear times its ctrlrange (40 N m in the hip's x axis, 120 in
its y axis, 80 in the knee); theirs has 21 actuators.
"""

import torch

from diffsim.tasks.base import GYMNASIUM_ASSETS, FloatingRunner


class Humanoid(FloatingRunner):
    xml = GYMNASIUM_ASSETS / "humanoid.xml"
    start_height = 1.35
    start_joints = (0.0,) * 17
    fallen = 0.74

    def reward(self, qpos, qvel, action):
        d = (qpos[2] - 0.84).clamp(-1.0, 0.1)
        height = torch.where(d > 0, 10 * d, -200 * d * d)
        return self.progress(qpos, qvel) + height - 0.002 * action.square().sum(0)
