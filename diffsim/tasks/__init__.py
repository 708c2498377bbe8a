"""One file a task. A task says where an episode starts, what is observed, what is rewarded and when it ends."""

from diffsim.tasks.ant import Ant
from diffsim.tasks.base import Task

TASKS: dict[str, type[Task]] = {"ant": Ant}

__all__ = ["TASKS", "Task", "Ant"]
