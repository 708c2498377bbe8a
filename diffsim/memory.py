"""Memory: what is free, and that running out of it is an error that can be told, not the end of the process."""

import re
from contextlib import suppress
from math import inf
from pathlib import Path

import torch


def available(device: torch.device | str = "cpu") -> float:
    """Free bytes; infinite where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
        free = 1024 * (int(found["MemAvailable"]) + int(found["SwapFree"]))
    except (OSError, KeyError):
        return inf
    with suppress(OSError, ValueError, TypeError):  # a container has less
        group = Path("/sys/fs/cgroup")
        used = re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, int((group / "memory.max").read_text()) - int(used[1]))
    return max(free, 0)


def check(num_envs: int, each: int, device: torch.device | str = "cpu"):
    """Raises ValueError, one line, where environments of `each` bytes do not fit."""
    free = available(device)
    if num_envs * each > free:
        need = f"{num_envs * each / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} are free"
        raise ValueError(f"num_envs is {num_envs}: that takes {need}; at most {int(free // each)} fit")


def limit(device: torch.device | str = "cpu"):
    """From now on what is not free cannot be allocated: Linux would grant it, and kill the process when it is used."""
    if str(device).startswith("cuda"):  # others are refused later
        return  # its driver reserves far more addresses than it uses
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])  # of data, now
        most = pages * resource.getpagesize() + available()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if most < inf and (hard == resource.RLIM_INFINITY or most < hard):
            resource.setrlimit(resource.RLIMIT_DATA, (int(most), hard))
