"""Several processes of one run, started by torchrun: each has its share of the environments, all the same networks.

Numbers go by nccl on GPUs; on CPUs by a board in shared memory, or by gloo between machines. Without torchrun there is
one process: nothing is sent, and each function returns what the caller would have computed itself. diffsim/README.md
lists the messages.
"""

import os
import random
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffsim.board import SUPPORTED, Board, LostError
from diffsim.program import RANK, TORCHRUN

WORLD, LOCAL_RANK = (int(os.environ[name]) if TORCHRUN else n for name, n in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
ONE_MACHINE = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
board: Board | None = None
TIMEOUT = timedelta(minutes=5)  # of a message: evaluations differ by a minute; a process that dies is noticed at once


@contextmanager
def _exchange():
    try:
        yield
    except RuntimeError as e:
        raise LostError(str(e).partition("\n")[0]) from e


# --- start and end ------------------------------------------------------------------------------------------------
@cache
def store() -> dist.Store:
    """torchrun's own: there before the processes are connected, and after one of them is gone."""
    return next(dist.rendezvous("env://", timeout=TIMEOUT))[0]


def start(num_envs: int, device: str):
    """Connect the processes. Raises ValueError, one line, where they cannot share the environments or the GPUs."""
    if WORLD == 1:
        return
    if num_envs % WORLD:
        raise ValueError(f"--num-envs {num_envs} is the number over all {WORLD} processes, which must divide it")
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    if on_gpu:
        if device != "cuda" or LOCAL_RANK >= (gpus := torch.cuda.device_count()):
            here = f"{gpus} of them here" if device == "cuda" else "--device cuda means that of its number"
            raise ValueError(f"--device {device}: each process of torchrun has a GPU of its own, {here}")
        torch.cuda.set_device(LOCAL_RANK)
    if RANK:
        warnings.simplefilter("ignore")
        sys.stdout = open(os.devnull, "w")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    with _exchange():
        dist.init_process_group(backend, store=store(), rank=RANK, world_size=WORLD, timeout=TIMEOUT)


@contextmanager
def in_turn():
    """Once a run: a machine's first process goes ahead and compiles the physics, the others find it in the cache."""
    ready = f"ready-{os.environ.get('GROUP_RANK')}"
    while LOCAL_RANK and not store().check([ready]):  # not store.wait, which Ctrl-C would wait for
        time.sleep(0.1)
    yield
    if WORLD > 1 and LOCAL_RANK == 0:
        store().set(ready, "")


def speaks() -> bool:
    """Whether this process is the first that tells why the run ends: the others, which end for the same reason or
    because of it, are silent."""
    if WORLD == 1:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once another has ended: this one is about to
    try:
        return store().add("spoken", 1) == 1
    except RuntimeError:  # torchrun is gone, too
        return True


def disconnect():
    """After all processes have come here. A process that ends while gloo's threads run may abort."""
    if WORLD > 1:
        agree(0)
        dist.destroy_process_group()


def leave(code: int):
    """End, all processes: once one has ended with an error, torchrun ends those that have more to say."""
    if WORLD > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    disconnect()
    raise SystemExit(code)


def launcher() -> str:
    """What stands between python and a script that goes on with as many processes."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    how = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT" if nodes > 1 else "--standalone"
    return f" -m torch.distributed.run {how} --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if WORLD > 1 else ""


# --- shares -------------------------------------------------------------------------------------------------------
def share(n: int) -> int:
    """This process's part of n environments, samples or episodes; the first processes have the rest of the division."""
    return n // WORLD + (RANK < n % WORLD)


def seed(n: int) -> int:
    """Seed of this process's random streams, of which no two of any processes and runs are alike; n itself in the
    first."""
    return int(np.random.SeedSequence([n, RANK]).generate_state(1)[0]) if RANK else n


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of this process's generators, for a checkpoint: a GPU has one of its own."""
    kind, keys, *rest = np.random.get_state()  # of NumPy and Python what a task or a fork may draw
    state = dict(rng=torch.get_rng_state(), python_rng=random.getstate())
    state |= dict(numpy_rng=[kind, torch.from_numpy(keys.astype(np.int64)), *rest])
    return state | dict(gpu_rng=torch.cuda.get_rng_state(device)) if device.type == "cuda" else state


def set_random_state(checkpoint: dict, device: torch.device):
    torch.set_rng_state(checkpoint["rng"])
    random.setstate(checkpoint["python_rng"])
    kind, keys, *rest = checkpoint["numpy_rng"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "gpu_rng" in checkpoint:  # a run may go on elsewhere
        torch.cuda.set_rng_state(checkpoint["gpu_rng"], device)


# --- messages -----------------------------------------------------------------------------------------------------
def broadcast(*modules: nn.Module):
    """The first process's parameters and buffers for all."""
    for module in modules if WORLD > 1 else ():
        for x in (*module.parameters(), *module.buffers()):
            with _exchange():
                dist.broadcast(x.data, 0)


def _on_board(x: Tensor) -> bool:
    """Whether there is a board, and it is large enough for x: made when it is needed first."""
    global board
    if not (ONE_MACHINE and SUPPORTED) or x.device.type != "cpu":
        return False
    if board is None or board.exists and x.nbytes > board.capacity:
        board = Board(RANK, WORLD, max(2 * x.nbytes, 2**20), TIMEOUT.total_seconds(), lambda path: gather(path)[0])
    return board.exists


def _of_all(x: Tensor) -> Tensor:
    """(WORLD, ...), each process's x, in order."""
    if _on_board(x):
        return board.exchange(x)
    received = [torch.empty_like(x) for _ in range(WORLD)]
    with _exchange():
        dist.all_gather(received, x)
    return torch.stack(received)


@torch.no_grad()
def average(tensors: list[Tensor]) -> list[Tensor]:
    """The means of tensors over the processes: one message."""
    if WORLD == 1:
        return tensors
    flat = torch.cat([x.flatten() for x in tensors])
    if _on_board(flat):
        mean = board.exchange(flat).mean(0)
    else:
        with _exchange():
            dist.all_reduce(flat)
        mean = flat / WORLD
    return [x.view_as(like) for x, like in zip(mean.split([x.numel() for x in tensors]), tensors)]


def average_gradients(module: nn.Module):
    """After backward(): gradients of the mean loss over all processes' samples, one message."""
    if WORLD > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        torch._foreach_copy_(gradients, average(gradients))


def mean(x: Tensor) -> Tensor:
    """Of all elements in all processes."""
    return average([x.mean()])[0]


def moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of the rows of x (n, ...) in all processes, and their number (Chan et al. 1979)."""
    own = torch.stack([x.mean(0), x.var(0, unbiased=False)])
    if WORLD == 1:
        return *own, len(x)
    means, variances = _of_all(own).unbind(1)
    return means.mean(0), variances.mean(0) + means.var(0, unbiased=False), WORLD * len(x)


def mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x (n,) in all processes."""
    if WORLD == 1:
        return x.mean(), x.std()
    mean, var, n = moments(x)
    return mean, (var * n / (n - 1)).sqrt()


def gather(x, everywhere: bool = True) -> list:
    """What each process has to say, plain data, in order; to the first one only, where it is not wanted everywhere."""
    said = [x] * WORLD
    with _exchange():
        if WORLD > 1 and everywhere:
            dist.all_gather_object(said, x)
        elif WORLD > 1:
            dist.gather_object(x, None if RANK else said)
    return said


def agree(number: int) -> int:
    """The largest of the processes' numbers: a signal that one of them has got, else 0."""
    return int(_of_all(torch.tensor(number)).max()) if WORLD > 1 else number
