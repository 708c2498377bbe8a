"""A task is tried when environments are made, on two copies and on one: before hours of training on it."""

import difflib
import math
import os
import traceback
import warnings
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor

from diffsim.dynamics import integrate
from diffsim.mujoco_physics import quaternion_rows
from diffsim.tasks.base import Task

DIFFSIM, PACKAGES = str(Path(__file__).parents[1]), str(Path(torch.__file__).parents[1])


def instance(cls: type) -> Task:
    """A task of a class. Raises ValueError, one line, where it is none, cannot be made, or a setting means nothing."""
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise ValueError(f"{cls!r} is no task: a name, a diffsim.Task or its class is wanted")
    try:
        task = cls()
    except (Exception, SystemExit) as e:
        raise ValueError(f"{cls.__name__}() raised {described(e)}; a task is made without arguments") from e
    check_settings(task)
    return task


def check_settings(task: Task):
    """Raises ValueError, one line, for a setting of a task that means nothing."""
    name = type(task).__name__
    if not hasattr(type(task), "xml") and "xml" not in vars(task):
        raise ValueError(f"{name} does not define xml: see diffsim.Task")
    for setting in ("xml", *(k for k, x in vars(Task).items() if not callable(x) and not k.startswith("_"))):
        try:
            getattr(task, setting)
        except Exception as e:
            raise ValueError(f"{name}.{setting} raised {described(e)}") from e
    if not isinstance(task.xml, (str, Path)):
        raise ValueError(f"{name}.xml is a {type(task.xml).__name__}; it must be the path of an MJCF file or its text")
    if not (isinstance(task.control_dt, Real) and 0 < task.control_dt < math.inf):
        raise ValueError(f"{name}.control_dt is {task.control_dt!r}; it must be a finite number of seconds above 0")
    for setting in ("substeps", "max_episode_steps"):
        value = getattr(task, setting)
        if not (isinstance(value, Integral) and 1 <= value <= 2**31):
            raise ValueError(f"{name}.{setting} is {value!r}; it must be a whole number between 1 and 2^31")
    for setting in ("own_integrator", "runs", "collisions", "warn_of_self_collision"):
        if not isinstance(value := getattr(task, setting), bool):
            raise ValueError(f"{name}.{setting} is {value!r}; it must be True or False")


ELSEWHERE = {  # what other libraries call it
    "max_episode_steps": "max_steps max_episode_length episode_length horizon time_limit",
    "control_dt": "dt timestep time_step control_timestep", "substeps": "frame_skip decimation n_substeps",
    "terminated": "done is_done termination is_terminated", "observe": "obs get_obs observation get_observation",
    "reward": "get_reward compute_reward calc_reward", "reset": "reset_model", "collisions": "self_collisions",
}  # fmt: skip
OTHERS = {name: ours for ours, names in ELSEWHERE.items() for name in names.split()}


def warn_of_typos(task: Task):
    """A task that derives from another has all that it needs: a misspelt `rewards` would go unnoticed."""
    ours, theirs = [], [(type(task).__name__, vars(task))]
    for cls in type(task).__mro__:
        own = cls.__module__.startswith(("diffsim.", "builtins"))
        ours, theirs = (ours + list(vars(cls)), theirs) if own else (ours, [*theirs, (cls.__name__, vars(cls))])
    long = [x for x in ours if len(x) > 4 and not x.startswith("_")]
    for name, mine in ((name, x) for name, xs in theirs for x in xs if x not in ours and not x.startswith("__")):
        meant = difflib.get_close_matches(mine.lower(), long, 1, 0.85) or [OTHERS.get(mine.lower())]
        if meant[0] and not any(meant[0] in xs for _, xs in theirs):  # else mine is its helper
            warnings.warn(f"{name}.{mine} means nothing to diffsim; is it {meant[0]}?", stacklevel=2)
    methods = "transition_reward", "reward"
    rewards = [(x, cls.__name__) for cls in type(task).__mro__ for x in methods if x in vars(cls)]
    if rewards[0][0] == "reward" and reward_method(task) != "reward":
        asked = next(name for x, name in rewards if x == "transition_reward")
        warnings.warn(f"{rewards[0][1]}.reward counts only if {asked}.transition_reward calls it", stacklevel=2)


def check_methods(task: Task, model, differentiable: bool = False) -> int:
    """Size of an observation. `differentiable`: the methods' arguments carry a gradient, as in a window.

    Raises ValueError, one line, for a method that is missing, fails, changes its arguments, or returns anything but
    finite tensors of the right shape, dtype and device.
    """
    if not model.nu:
        raise ValueError(f"{type(task).__name__}.xml has no actuator: there is nothing to act with")
    generator, obs_dim = torch.Generator(device=model.device).manual_seed(0), "obs_dim"
    for count in (2, 1):  # a reset may ignore its count, a squeeze may take a batch of one for no batch
        qpos, qvel = state(task, "reset", model, count, generator, model=model, count=count)
        again = range(2 if count == 2 and not differentiable else 0)
        starts = [call(task, "reset", model, count, generator.manual_seed(0)) for _ in again]
        if not all(close(*pair) for pair in zip(*starts)):
            text = "draws other numbers than its generator's: starts would differ each time, whatever the seed"
            warnings.warn(f"{type(task).__name__}.reset {text}", stacklevel=3)
        noise, action = qvel.new_zeros(model.nv, count), qvel.new_zeros(model.nu, count)
        for x, width in (noise, 0.05), (action, 1.0):
            x.uniform_(-width, width, generator=generator)
        drawn = integrate(model, qpos, noise, 1.0), qvel + noise, action  # a reset may draw all copies alike
        qpos, qvel, action = (x.detach().requires_grad_(differentiable) for x in drawn)
        arguments = dict(qpos=qpos, qvel=qvel, action=action)
        reward, before = reward_method(task), {k: x._version for k, x in arguments.items()}
        for method, given, shape, dtype in (
            ("observe", (qpos, qvel, action), (obs_dim, count), model.dtype),
            (reward, (qpos,) * (reward != "reward") + (qpos, qvel, action), (count,), model.dtype),
            ("terminated", (qpos, qvel), (count,), torch.bool),
            ("success", (qpos, qvel), (count,), torch.bool),
        ):
            x = call(task, method, *given)
            if x is None and method == "success":
                continue
            check(task, method, x, shape, model, dtype)
            for k, argument in arguments.items():
                if argument._version != before[k]:  # its value may be as before, as twice a speed of 0
                    raise ValueError(f"{type(task).__name__}.{method} changes {k} in place; it must leave it as it is")
            alone = call(task, method, *(y[:, :1] for y in given)) if count == 2 else x
            differs = isinstance(alone, Tensor) and alone.shape == (*x.shape[:-1], 1) and not close(alone, x[..., :1])
            if differs and close(call(task, method, *given), x):  # else it draws random numbers
                text = "depends on another's; rows are quantities, columns environments: sum(0), not sum()"
                raise ValueError(f"{type(task).__name__}.{method} of one environment {text}")
            if method == "observe":
                obs_dim = len(x)
        state(task, "renew", qpos, qvel, generator, model=model, count=count)
    return obs_dim


def state(task: Task, method: str, *args, model, count: int) -> tuple[Tensor, Tensor]:
    """qpos, qvel that a method returned."""
    found = call(task, method, *args)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        what = f"{len(found)} values" if isinstance(found, (tuple, list)) else f"a {type(found).__name__}"
        raise ValueError(f"{type(task).__name__}.{method} returned {what}, expected two: qpos, qvel")
    for x, rows in zip(found, (model.nq, model.nv)):
        check(task, method, x, (rows, count), model, model.dtype)
    for row in quaternion_rows(model):
        if found[0][row : row + 4].norm(dim=0).min() < 1e-6:
            what = f"a quaternion of length 0, rows {row} to {row + 3} of qpos"
            raise ValueError(f"{type(task).__name__}.{method} returned {what}; begin with model.mj_model.qpos0")
    return found


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5)


def reward_method(task: Task) -> str:
    """The one that a task defines."""
    return "reward" if type(task).transition_reward is Task.transition_reward else "transition_reward"


def check(task: Task, method: str, x, shape: tuple, model, dtype: torch.dtype):
    """What a method returned, against a shape (rows, environments), in which a name stands for any number above 0."""
    text = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
    copies = f"{shape[-1]} environment{'s' * (shape[-1] > 1)}"
    wanted_device = torch.zeros(0, device=model.device).device
    if not isinstance(x, Tensor):
        found, wanted = f"a {type(x).__name__}", f"a tensor of the shape {text}"
    elif len(x.shape) != len(shape) or any(a != b if isinstance(b, int) else a < 1 for a, b in zip(x.shape, shape)):
        found, wanted = f"shape {tuple(x.shape)} for {copies}", f"the shape {text}"
    elif x.dtype != dtype:
        found, wanted = str(x.dtype), f"{dtype}{', the dtype of the model' * (dtype == model.dtype)}"
    elif x.device != wanted_device:
        found, wanted = f"a tensor on {x.device}", f"one on {wanted_device}"
    elif not torch.isfinite(x).all():
        found, wanted = "a value that is not finite", "finite numbers"
    else:
        return
    raise ValueError(f"{type(task).__name__}.{method} returned {found}, expected {wanted}")


def call(task: Task, method: str, *args):
    """What a method returns; its exception is one line that says where."""
    try:
        return getattr(task, method)(*args)
    except (Exception, SystemExit) as e:
        name = type(task).__name__
        if isinstance(e, NotImplementedError) and str(e) == method:
            raise ValueError(f"{name} does not define {method}: see diffsim.Task") from None
        raise ValueError(f"{name}.{method} raised {described(e, getattr(type(task), method, None))}") from e


def described(e: Exception, function=None) -> str:
    """Type, message and place of an exception in one line: the deepest frame that is no library's, or the function."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(e.__traceback__)[1:]]
    code = getattr(function, "__code__", None)  # called with arguments that it does not take, it has no frame
    frames = ([(code.co_filename, code.co_firstlineno)] if code else []) + frames
    own = [f for f in frames if not f[0].startswith((DIFFSIM, PACKAGES, "<"))]
    place = own or [f for f in frames if f[0].startswith(DIFFSIM)]
    text = f"{type(e).__name__}: {' '.join(str(e).split())}" if str(e) else type(e).__name__
    if not place or isinstance(e, SyntaxError):  # which names its own
        return text
    file, line = place[-1]
    return f"{text} ({min(file, os.path.relpath(file), key=len)}:{line})"
