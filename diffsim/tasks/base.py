"""What a task has to say. Everything is batch-last, (rows, B), as the physics; see ant.py for an example."""

from pathlib import Path

import gymnasium
import torch
from torch import Tensor

GYMNASIUM_ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


class Task:
    """Subclass it, set `xml`, and write the four methods. All but `reset` must be differentiable and batched."""

    xml: str | Path  # an MJCF file or string
    control_dt = 1 / 60  # seconds an action is held
    substeps = 4  # physics steps in that time
    max_episode_steps = 1000

    def reset(self, model, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Initial qpos (nq, count), qvel (nv, count); draw every random number from `generator`."""
        raise NotImplementedError

    def observe(self, qpos: Tensor, qvel: Tensor, action: Tensor) -> Tensor:
        """Observation (obs_dim, B) of a state and the action (nu, B) that led to it."""
        raise NotImplementedError

    def reward(self, qpos: Tensor, qvel: Tensor, action: Tensor) -> Tensor:
        """Reward (B,) of arriving in a state by an action."""
        raise NotImplementedError

    def terminated(self, qpos: Tensor, qvel: Tensor) -> Tensor:
        """Which episodes end here (B,), bool; time limits are the environment's business."""
        return torch.zeros(qpos.shape[1], dtype=torch.bool, device=qpos.device)
