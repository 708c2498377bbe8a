"""A small differentiable rigid-body simulator in PyTorch, and environments on it."""

import diffsim.program  # isort: skip  # noqa: F401  before torch: Ctrl-C in our programs is one line from now on
from functools import partial

import gymnasium
import torch

from diffsim.dynamics import bias_force, contact_force, mass_matrix, step
from diffsim.env import DiffEnv
from diffsim.gymnasium_env import GymnasiumEnv, is_gymnasium_id
from diffsim.mjcf import UnsupportedError
from diffsim.model import Model, Softness, load_model
from diffsim.numpy_env import NumpyEnv
from diffsim.tasks import TASKS, Task, default_physics, find_task, settings_of

__version__ = "0.2.0"
__all__ = [
    "DiffEnv", "GymnasiumEnv", "Model", "PHYSICS", "Softness", "TASKS", "Task", "UnsupportedError", "bias_force",
    "contact_force", "default_physics", "is_gymnasium_id", "load_model", "make", "mass_matrix", "settings_of", "step",
]  # fmt: skip
PHYSICS = ("diffsim", "mujoco", "gymnasium")


def make(
    task: str | Task,
    num_envs: int = 1,
    *,
    seed: int = 0,
    physics: str | None = None,
    stiffness: float | None = None,
    smoothing: float | None = None,
    device: str = "cpu",
    compile: bool = True,
    dtype: torch.dtype = torch.float32,
) -> DiffEnv | GymnasiumEnv:
    """Build `num_envs` environments of a task on an engine.

    Args:
        task: its name ("ant"), "path/to/my_task.py:MyTask", a Task or its class, or the id of a Gymnasium environment.
        physics: "diffsim"; "mujoco", MuJoCo's step with diffsim's gradient; "gymnasium", `gymnasium.make` itself,
            without gradient. None: the task's own, which is mujoco for those of Gymnasium that diffsim has, too.
        stiffness, smoothing: of the contacts that the gradient goes through, see Softness. None: diffsim's own, and
            softer, smoother ones (0.6, 3) with mujoco, where they decide nothing but the gradient.
        compile: compile diffsim's step, once for a robot, num_envs and softness.
    Raises ValueError, one line, for an unknown task, engine or device, and num_envs < 1.
    """
    task = task() if isinstance(task, type) else task
    physics = default_physics(task) if physics is None else physics
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}; it must be at least 1")
    if physics not in PHYSICS:
        raise ValueError(f"unknown physics '{physics}'; there is {', '.join(PHYSICS)}")
    try:
        available = torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        raise ValueError(f"unknown device '{device}'; use cpu or cuda") from None
    if not available:
        raise ValueError(f"device '{device}' was asked for, but torch finds no CUDA here; use --device cpu")
    if physics == "gymnasium":
        if not isinstance(task, str) or not is_gymnasium_id(task):
            raise ValueError(f"{task} is no Gymnasium environment; use physics diffsim or mujoco")
        if torch.device(device).type != "cpu":
            raise ValueError(f"Gymnasium's environments run on the cpu, not on {device}")
        twin = TASKS.get(task)
        return GymnasiumEnv(task, num_envs, seed, **(twin.gymnasium_kwargs if twin else {}))
    if isinstance(task, str):
        task = find_task(task)
    usual_stiffness, usual_smoothing = (0.6, 3.0) if physics == "mujoco" else (Softness.stiffness, 1.0)
    softness = Softness(usual_stiffness if stiffness is None else stiffness)
    softness = softness.widened(usual_smoothing if smoothing is None else smoothing)
    return DiffEnv(task, num_envs, seed, device, physics, compile, dtype, softness)


def _single(task: str, **kwargs) -> NumpyEnv:
    return NumpyEnv(make(task, 1, **{"compile": False, **kwargs}))


for _name in TASKS:
    gymnasium.register(
        id=f"diffsim/{_name}",
        entry_point=partial(_single, _name),  # arrays
        vector_entry_point=partial(make, _name),  # tensors, differentiable
    )
