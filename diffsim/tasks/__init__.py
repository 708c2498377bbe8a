"""One file a task. A task says where an episode starts, what is observed, what is rewarded and when it ends."""

import difflib
import importlib.util
import os
import sys
from pathlib import Path

from diffsim.gymnasium_env import is_gymnasium_id
from diffsim.tasks.ant import Ant
from diffsim.tasks.anymal import Anymal
from diffsim.tasks.base import Task
from diffsim.tasks.cartpole import Cartpole
from diffsim.tasks.check import described, instance
from diffsim.tasks.cheetah import Cheetah
from diffsim.tasks.gymnasium_twins import AntV5, HalfCheetahV5, HopperV5, HumanoidV5, Walker2dV5
from diffsim.tasks.hand import Hand
from diffsim.tasks.hopper import Hopper
from diffsim.tasks.humanoid import Humanoid
from diffsim.tasks.push import Push
from diffsim.tasks.walker import Walker

TASKS: dict[str, type[Task]] = {
    "cartpole": Cartpole, "hopper": Hopper, "cheetah": Cheetah, "walker": Walker, "ant": Ant, "anymal": Anymal,
    "humanoid": Humanoid, "push": Push, "hand": Hand, "Ant-v5": AntV5, "Hopper-v5": HopperV5,
    "HalfCheetah-v5": HalfCheetahV5, "Walker2d-v5": Walker2dV5, "Humanoid-v5": HumanoidV5,
}  # fmt: skip


def is_file(name: str) -> bool:
    """Whether a task's name is a class in a file, "path/to/my_task.py:MyTask": finding it runs that file's code."""
    return ":" in name


def nearest(name: str) -> str | None:
    """The task whose name is most like `name`, whatever its case and version: Ant-v5 for "ant-v4"; None if none is."""
    names, enough = {task.lower(): task for task in reversed(TASKS)}, 0.75 if "-" in name else 0.6
    if name.lower() not in names and f"{name}-v5".lower() in names:
        return names[f"{name}-v5".lower()]
    return next((names[match] for match in difflib.get_close_matches(name.lower(), names, 1, enough)), None)


def find_task(name: str) -> Task:
    """The task of that name, or the class in a file: "path/to/my_task.py:MyTask". Its xml and what the file
    imports may be beside it.

    Raises ValueError, one line, for an unknown name, a file or class that is not there, or a class that is no Task.
    """
    file, _, cls = name.rpartition(":")
    if not file:
        if name.endswith(".py"):
            raise ValueError(f"env '{name}' is a file; name the class in it, {name}:MyTask")
        if name not in TASKS:
            like = nearest(name)
            if is_gymnasium_id(name):
                instead = f", or {like}" if like else ""
                raise ValueError(f"{name} is Gymnasium's alone: use physics gymnasium, which has no gradient{instead}")
            known = f"{', '.join(TASKS)}, path/to/my_task.py:MyTask, or a Gymnasium id"
            raise ValueError(f"unknown env '{name}'; {f'did you mean {like}? There' if like else 'there'} is {known}")
        return TASKS[name]()
    if not os.path.isfile(file):
        raise ValueError(f"env '{name}': no file {file}")
    spec = importlib.util.spec_from_file_location(f"task_file_{Path(file).stem}", file)
    if Path(file).suffix != ".py":
        raise ValueError(f"env '{name}': {file} is no .py file")
    module, folder = importlib.util.module_from_spec(spec), str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # the last: a torch.py there is not torch
    sys.modules[spec.name] = module  # a dataclass looks for its own module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise ValueError(f"env '{name}': {file} does not import: {described(e)}") from e
    task = vars(module).get(cls)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ValueError(f"env '{name}': {file} has no class {cls} that derives from diffsim.Task")
    task = instance(task)
    if "<" not in str(task.xml) and os.path.isfile(Path(folder, task.xml)):
        try:
            task.xml = Path(folder, task.xml)
        except AttributeError:
            raise ValueError(f"env '{name}': {cls}.xml is a property; it must give the robot's whole path") from None
    return task


def default_physics(task: str | Task) -> str:
    """The engine that runs a task when none is asked for. Raises ValueError as `find_task` does."""
    if isinstance(task, str) and task not in TASKS and is_gymnasium_id(task):
        return "gymnasium"
    return (find_task(task) if isinstance(task, str) else task).physics


def settings_of(name: str) -> str:
    """The task whose training settings fit: itself, or the nearest of TASKS that a class in a file derives from."""
    if name in TASKS or is_gymnasium_id(name):
        return name
    names = {cls: known for known, cls in TASKS.items()}
    return next((names[cls] for cls in type(find_task(name)).__mro__ if cls in names), name)


__all__ = ["TASKS", "Task", "default_physics", "find_task", "is_file", "settings_of"]
