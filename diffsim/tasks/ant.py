"""Ant on Gymnasium's body (0.9 kg, armature 1, gear 150) with the observation, reward and timing of SHAC's paper.

Xu et al. 2022, arXiv 2204.07137. Only the robot differs: theirs weighs 180 kg and has soft joint limits.
"""

from diffsim.tasks.base import GYMNASIUM_ASSETS, FloatingRunner


class Ant(FloatingRunner):
    """Four legs run."""

    xml = GYMNASIUM_ASSETS / "ant.xml"
    start_height = 0.75
    start_joints = (0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0)
    fallen = 0.27

    def reward(self, qpos, qvel, action):
        return self.progress(qpos, qvel) + (qpos[2] - self.fallen)
