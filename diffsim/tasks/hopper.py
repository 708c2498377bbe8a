"""Hopper on Gymnasium's body with the observation, reward and timing of SHAC's paper (arXiv 2204.07137)."""

import torch

from diffsim.tasks.base import GYMNASIUM_ASSETS, PlanarRunner


class Hopper(PlanarRunner):
    """One leg hops."""

    xml = GYMNASIUM_ASSETS / "hopper.xml"
    standing = 1.25  # m, height of the torso in the initial pose
    crouch = 0.3  # m below it: the height reward turns steeply negative
    fallen = 0.45  # m below it: the episode ends

    def reward(self, qpos, qvel, action):
        d = (qpos[1] - self.standing + self.crouch).clamp(-1.0, 0.3)
        height = torch.where(d > 0, d, -200 * d * d)
        upright = 1 - (qpos[2] / (torch.pi / 6)) ** 2
        return qvel[0] + height + upright - 0.1 * action.square().sum(0)

    def terminated(self, qpos, qvel):
        return qpos[1] - self.standing < -self.fallen
