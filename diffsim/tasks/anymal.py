"""A quadruped with the masses, lengths, joint ranges and torques of ANYmal C; the reward is DiffRL's for ANYmal.

Joints are sprung towards the stance (stiffness 85, damping 2), as there. Torque is the robot's own 80 N m; DiffRL
gives its own 200.
"""

from diffsim.tasks.base import ASSETS, FloatingRunner


class Anymal(FloatingRunner):
    """A four-legged robot runs."""

    xml = ASSETS / "anymal.xml"
    start_height = 0.62
    start_joints = (0.03, 0.4, -0.8, -0.03, 0.4, -0.8, 0.03, -0.4, 0.8, -0.03, -0.4, 0.8)
    fallen = 0.25

    def reward(self, qpos, qvel, action):
        return self.progress(qpos, qvel) + (qpos[2] - self.fallen) - 0.005 * action.square().sum(0)
