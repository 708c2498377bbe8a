"""Ant on Gymnasium's body (0.9 kg, armature 1, gear 150) with the observation, reward and timing of SHAC's paper.

Xu et al. 2022, arXiv 2204.07137. Only the robot differs: theirs weighs 180 kg and has soft joint limits.
"""

import torch

from diffsim.tasks.base import GYMNASIUM_ASSETS, Task


class Ant(Task):
    xml = GYMNASIUM_ASSETS / "ant.xml"
    start_joints = (0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0)
    fallen = 0.27  # m, height of the torso

    def reset(self, model, count, generator):
        def uniform(rows, width):
            x = torch.rand(rows, count, generator=generator, dtype=model.dtype, device=model.device)
            return (2 * x - 1) * width

        position = uniform(3, 0.1)
        position[2] += 0.75
        angle, axis = uniform(1, torch.pi / 24), uniform(3, 1.0)
        axis = axis / axis.norm(dim=0).clamp_min(1e-6)
        quat = torch.cat([torch.cos(angle / 2), axis * torch.sin(angle / 2)])
        joints = torch.tensor(self.start_joints, dtype=model.dtype, device=model.device)[:, None] + uniform(8, 0.2)
        return torch.cat([position, quat, joints]), uniform(14, 0.25)

    @staticmethod
    def _axes(qpos):
        """Cosines of the torso's z axis with up, and of its x axis with the direction to run, (1, B)."""
        w, x, y, z = qpos[3:7].split(1)
        return 1 - 2 * (x * x + y * y), 1 - 2 * (y * y + z * z)

    def observe(self, qpos, qvel, action):
        up, heading = self._axes(qpos)
        return torch.cat([qpos[2:7], qvel[:6], qpos[7:], 0.1 * qvel[6:], up, heading, action])

    def reward(self, qpos, qvel, action):
        up, heading = self._axes(qpos)
        return qvel[0] + (0.1 * up + heading).squeeze(0) + (qpos[2] - self.fallen)

    def terminated(self, qpos, qvel):
        return qpos[2] < self.fallen
