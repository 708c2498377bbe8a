"""Cart-pole swing-up as in SHAC's paper (arXiv 2204.07137): a 50 kg cart on a slide of +-4 m, a 1 m pole of 2.5 kg."""

import torch

from diffsim.tasks.base import ASSETS, Task, uniform


class Cartpole(Task):
    """A pole is swung up and balanced."""

    xml = ASSETS / "cartpole.xml"
    max_episode_steps = 240

    def reset(self, model, count, generator):
        qpos = uniform(model, 2, count, torch.pi / 2, generator)
        qpos[1] += torch.pi  # hanging; upright is 0
        return qpos, uniform(model, 2, count, 0.25, generator)

    def observe(self, qpos, qvel, action):
        (x, angle), (speed, spin) = qpos.split(1), qvel.split(1)
        return torch.cat([x, speed, torch.sin(angle), torch.cos(angle), spin])

    def reward(self, qpos, qvel, action):
        (x, angle), (speed, spin) = qpos, qvel
        angle = torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi
        return -(angle**2) - 0.1 * spin**2 - 0.05 * x**2 - 0.1 * speed**2
