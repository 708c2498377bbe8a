"""A board in shared memory, on which the processes of one machine write numbers for each other.

A message by gloo wakes four sleeping threads, which takes about as long as the update that it is for. Here who
waits looks at the memory. Processors of x86 show what one wrote in the order in which it did; others need not.
"""

import os
import platform
import tempfile
import time
from contextlib import suppress

import torch
from torch import Tensor

SUPPORTED = platform.machine() in ("x86_64", "AMD64") and hasattr(os, "posix_fallocate")
LINE = 64  # bytes of a processor's cache line: each process writes into its own


class LostError(RuntimeError):
    """Another process of the run has ended, or is silent."""


def reserved(size: int) -> str | None:
    """A file of shared memory; None where there is none, or not so much."""
    with suppress(OSError), tempfile.NamedTemporaryFile(dir="/dev/shm", delete=False) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return file.name
        except OSError:
            os.unlink(file.name)
    return None


class Board:
    """Of `world` processes, for messages of at most `capacity` bytes; `share(x)` returns what rank 0 gave it."""

    def __init__(self, rank: int, world: int, capacity: int, timeout_s: float, share):
        self.rank, self.capacity, self.timeout_s, self.number = rank, -(-capacity // LINE) * LINE, timeout_s, 0
        size = world * LINE + 2 * world * self.capacity
        path = share(None if rank else reserved(size))
        self.exists = path is not None
        if self.exists:
            memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
            heads = memory[: world * LINE].view(torch.int64).view(world, -1).numpy()
            self.written, self.pids = heads[:, 0], heads[:, 1]  # number of the latest message; process
            self.pages = memory[world * LINE :].view(2, world, self.capacity)  # of even and of odd messages
            self.pids[rank] = os.getpid()
            share(None)  # all have come here
            if rank == 0:
                os.unlink(path)

    def exchange(self, x: Tensor) -> Tensor:
        """(world, ...), each process's x. Raises LostError. A page is written again when all have read the one after:
        only then have they written the next number."""
        self.number += 1
        page = self.pages[self.number % 2, :, : x.nbytes]
        page[self.rank].copy_(x.contiguous().view(-1).view(torch.uint8))
        self.written[self.rank] = self.number
        looks, began = 0, time.monotonic()
        while (self.written < self.number).any():
            looks += 1
            if looks > 1000:  # milliseconds: the processor may be needed by who is waited for
                time.sleep(1e-4)
            if looks % 1000 == 0:
                self._check(time.monotonic() - began)
        return page.view(x.dtype).view(-1, *x.shape).clone()

    def _check(self, waited_s: float):
        for rank, pid in enumerate(self.pids):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                raise LostError(f"rank {rank} has ended") from None
        if waited_s > self.timeout_s:
            raise LostError(f"no word for {waited_s:.0f} s")
