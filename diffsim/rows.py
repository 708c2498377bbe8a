"""Rows of an array by a list of places, and back."""

import torch
from torch import Tensor


class Rows:
    """`take`: rows of an array (..., n, B), each any number of times. `sum`: its transpose, (..., rows, B) -> n sums.

    Sums are gathers, too: each in its own order, so that they have the same bits on any number of threads. Rows that
    are used about as often share a table, which -1 fills up: one table would be as wide as the row that is used most.
    """

    def __init__(self, rows: list[int], n: int, device):
        places: list[list[int]] = [[] for _ in range(n)]
        for place, row in enumerate(rows):
            places[row].append(place)
        tables: dict[int, list[int]] = {}
        for row, found in enumerate(places):
            tables.setdefault(max(len(found) - 1, 0).bit_length(), []).append(row)
        self.rows = torch.tensor(rows, device=device)
        self.tables = [
            torch.tensor([places[row] + [-1] * ((1 << bits) - len(places[row])) for row in same], device=device)
            for bits, same in tables.items()
        ]
        self.order = torch.tensor([row for same in tables.values() for row in same], device=device).argsort()

    def take(self, x: Tensor) -> Tensor:
        return _Take.apply(x, self)

    def sum(self, y: Tensor) -> Tensor:
        y = torch.cat([y, torch.zeros_like(y[..., :1, :])], -2)  # its last row is what -1 takes
        return torch.cat([y[..., table, :].sum(-2) for table in self.tables], -2)[..., self.order, :]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x[..., rows.rows, :]

    @staticmethod
    def backward(ctx, grad):
        return ctx.rows.sum(grad), None
