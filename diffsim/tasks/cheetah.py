"""Cheetah on Gymnasium's HalfCheetah body with the reward and timing of SHAC's paper (arXiv 2204.07137)."""

from diffsim.tasks.base import GYMNASIUM_ASSETS, PlanarRunner


class Cheetah(PlanarRunner):
    """Two legs gallop, in a plane."""

    xml = GYMNASIUM_ASSETS / "half_cheetah.xml"
    noise = 0.1
    speed_noise = 0.25

    def reward(self, qpos, qvel, action):
        return qvel[0] - 0.1 * action.square().sum(0)
