"""A small differentiable rigid-body simulator in PyTorch, and environments on it."""

from functools import partial

import gymnasium
import torch

from diffsim.dynamics import bias_force, contact_force, mass_matrix, step
from diffsim.env import DiffEnv
from diffsim.mjcf import UnsupportedError
from diffsim.model import Model, Softness, load_model
from diffsim.numpy_env import NumpyEnv
from diffsim.tasks import TASKS, Task, find_task

__all__ = [
    "DiffEnv", "Model", "Softness", "TASKS", "Task", "UnsupportedError",
    "bias_force", "contact_force", "load_model", "make", "mass_matrix", "step",
]  # fmt: skip


def make(task: str | Task, num_envs: int = 1, *, device: str = "cpu", physics: str = "diffsim", **kwargs) -> DiffEnv:
    """Build `num_envs` environments of a task: its name ("ant"), "path/to/my_task.py:MyTask", or a Task object.

    Args: seed (0); device; physics "diffsim", or "mujoco" (MuJoCo's step, diffsim's gradient);
    compile (True); dtype (float32); softness (contact and limit law).
    Raises ValueError, one line, for an unknown task or physics, num_envs < 1, or a device that is not there.
    """
    if isinstance(task, str):
        task = find_task(task)
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}; it must be at least 1")
    if physics not in ("diffsim", "mujoco"):
        raise ValueError(f"unknown physics '{physics}'; there is diffsim and mujoco")
    try:
        available = torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        raise ValueError(f"unknown device '{device}'; use cpu or cuda") from None
    if not available:
        raise ValueError(f"device '{device}' was asked for, but torch finds no CUDA here; use --device cpu")
    return DiffEnv(task, num_envs, device=device, physics=physics, **kwargs)


def _single(task: str, **kwargs) -> NumpyEnv:
    return NumpyEnv(make(task, 1, **{"compile": False, **kwargs}))


for _name in TASKS:
    gymnasium.register(
        id=f"diffsim/{_name}",
        entry_point=partial(_single, _name),  # arrays
        vector_entry_point=partial(make, _name),  # tensors, differentiable
    )
