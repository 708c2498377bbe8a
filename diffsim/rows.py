"""Rows of an array by a list of places, and back."""

from functools import reduce

import torch
from torch import Tensor


class Rows:
    """`take`: rows of an array (..., n, B), each any number of times. `sum`: its transpose, (..., rows, B) -> n sums.

    Sums are gathers, too, in a fixed order: they have the same bits on any number of threads. Those of about as many
    places, up to a power of two, are one table, filled up with a row of zeros; the compiler's reductions are slower.
    """

    def __init__(self, rows: list[int], n: int, device):
        places: list[list[int]] = [[] for _ in range(n)]
        for place, row in enumerate(rows):
            places[row].append(place)
        alike: dict[int, list[int]] = {}
        for row, found in enumerate(places):
            alike.setdefault(1 << max(len(found) - 1, 0).bit_length(), []).append(row)
        self.rows = torch.tensor(rows, device=device)
        self.tables = []  # of each: its columns
        for width, same in alike.items():
            filled = [places[row] + [len(rows)] * (width - len(places[row])) for row in same]
            self.tables.append([torch.tensor(column, device=device) for column in zip(*filled)])
        self.order = torch.tensor([row for same in alike.values() for row in same], device=device).argsort()

    def take(self, x: Tensor) -> Tensor:
        return _Take.apply(x, self)

    def sum(self, y: Tensor) -> Tensor:
        y = torch.cat([y, torch.zeros_like(y[..., :1, :])], -2)
        sums = [reduce(torch.add, (y[..., places, :] for places in table)) for table in self.tables]
        return torch.cat(sums, -2)[..., self.order, :]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x[..., rows.rows, :]

    @staticmethod
    def backward(ctx, grad):
        return ctx.rows.sum(grad), None
