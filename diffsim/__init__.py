"""A small differentiable rigid-body simulator in PyTorch, and environments on it."""

import diffsim.program  # isort: skip  # noqa: F401  before torch: Ctrl-C in our programs is one line from now on
import math
from dataclasses import replace
from functools import partial
from numbers import Integral, Real

import gymnasium
import numpy as np
import torch

from diffsim.builder import load_model
from diffsim.dynamics import bias_force, contact_force, mass_matrix, step
from diffsim.env import DiffEnv
from diffsim.gymnasium_env import GymnasiumEnv, is_gymnasium_id
from diffsim.mjcf import UnsupportedError
from diffsim.model import Model, Softness
from diffsim.numpy_env import NumpyEnv
from diffsim.tasks import TASKS, Task, default_physics, find_task, is_file, nearest, settings_of
from diffsim.tasks.check import instance

__version__ = "0.3.0"
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
    derivative: str = "diffsim",
    stiffness: float | None = None,
    smoothing: float | None = None,
    device: str = "cpu",
    compile: bool = True,
    dtype: torch.dtype = torch.float32,
) -> DiffEnv | GymnasiumEnv:
    """Build `num_envs` environments of a task on an engine.

    Args:
        task: its name ("ant"), "path/to/my_task.py:MyTask", a Task or its class, or the id of a Gymnasium environment.
        physics: "diffsim"; "mujoco", MuJoCo's step with a gradient; "gymnasium", `gymnasium.make` itself,
            without gradient. None: the task's own, which is mujoco for those of Gymnasium that diffsim has, too.
        derivative: whose gradient physics mujoco has: "diffsim"; "mujoco", MuJoCo's own by finite differences.
        stiffness, smoothing: of the contacts that the gradient goes through, see Softness. None: diffsim's own, and
            softer, smoother ones (0.6, 3) with mujoco, where they decide nothing but the gradient.
        compile: compile diffsim's step, once for a robot and a softness.
    Raises ValueError, one line, for an unknown task, engine or device, and arguments of another kind or out of range.
    """
    task = task if isinstance(task, (str, Task)) else instance(task)
    physics = default_physics(task) if physics is None else physics
    for name, value, low, high in (("num_envs", num_envs, 1, 2**53), ("seed", seed, 0, 2**32 - 1)):
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}; it must be an integer between {low} and {high}")
    num_envs, seed = int(num_envs), int(seed)  # NumPy's are integers, too
    for name, value in (("stiffness", stiffness), ("smoothing", smoothing)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf):
            raise ValueError(f"{name} is {value!r}; it must be a number above 0, and finite")
    if not isinstance(compile, bool):
        raise ValueError(f"compile is {compile!r}; it must be True or False")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype!r}; it must be torch.float32 or torch.float64")
    if physics not in PHYSICS:
        raise ValueError(f"unknown physics '{physics}'; there is {', '.join(PHYSICS)}")
    if derivative not in PHYSICS[:2]:
        raise ValueError(f"unknown derivative '{derivative}'; there is {', '.join(PHYSICS[:2])}")
    if derivative == "mujoco" != physics:
        raise ValueError(f"derivative mujoco is of MuJoCo's step: use physics mujoco, not {physics}")
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device '{device}' was asked for, but torch finds no CUDA here; use --device cpu")
    if physics == "gymnasium":
        if not isinstance(task, str) or not is_gymnasium_id(task):
            unknown = isinstance(task, str) and not is_file(task) and task not in TASKS
            how = "import what registers it" if unknown else "use physics diffsim or mujoco"
            raise ValueError(f"{task} is no Gymnasium environment{' here' * unknown}; {how}")
        if (stiffness, smoothing, dtype) != (None, None, torch.float32):
            raise ValueError("stiffness, smoothing and dtype are of diffsim's physics, and mean nothing to gymnasium's")
        if kind != "cpu":
            raise ValueError(f"Gymnasium's environments run on the cpu, not on {device}")
        twin = TASKS.get(task)
        env = GymnasiumEnv(task, num_envs, seed, twin is not None, **(twin.gymnasium_kwargs if twin else {}))
        env.with_gradient = "physics mujoco" if twin else nearest(task)
        return env
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"unknown device '{device}'; use cpu or cuda")
    if isinstance(task, str):
        task = find_task(task)
    usual, usual_smoothing = Softness(), 1.0
    if physics == "mujoco":  # of its gradient alone
        usual, usual_smoothing = Softness(0.6, limit_stiffness=1.0, release_depth=math.inf), 3.0
    softness = replace(usual, stiffness=usual.stiffness if stiffness is None else stiffness)
    softness = softness.widened(usual_smoothing if smoothing is None else smoothing)
    return DiffEnv(task, num_envs, seed, device, physics, derivative, compile, dtype, softness)


def _vector(task: str, num_envs=1, max_episode_steps=None, render_mode=None, **kwargs) -> DiffEnv | GymnasiumEnv:
    if render_mode is not None:
        raise ValueError(f"diffsim/{task} has no render_mode; python -m diffsim.play draws a policy's episode")
    seed = int(np.random.SeedSequence().generate_state(1)[0])  # so that copies differ, as Gymnasium's do
    env = make(task, num_envs, **{"seed": seed, **kwargs})
    env.max_episode_steps = max_episode_steps or env.max_episode_steps
    return env


def _single(task: str, **kwargs) -> NumpyEnv:
    return NumpyEnv(_vector(task, 1, 2**31, **{"compile": False, **kwargs}))  # Gymnasium's TimeLimit has the limit


for _name in TASKS:
    gymnasium.register(
        id=f"diffsim/{_name}",
        entry_point=partial(_single, _name),  # arrays
        vector_entry_point=partial(_vector, _name),  # tensors, differentiable
        max_episode_steps=TASKS[_name].max_episode_steps,
    )
