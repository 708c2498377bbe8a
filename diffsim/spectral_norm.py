"""Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957) of which the user says when it iterates."""

import torch
from torch import nn


class NormalizedLinear(nn.Module):
    """A linear layer whose weight is divided by its largest singular value, u^T W v as estimated by power iterations.

    Differentiable in the weight, u and v taken as constants; they must follow it: see power_iterations."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.raw, self.bias = linear.weight, linear.bias
        for name, size in zip("uv", self.raw.shape):
            self.register_buffer(name, nn.functional.normalize(torch.randn(size), dim=0))
        self.iterate(15)

    @property
    def weight(self):
        return self.raw / torch.dot(self.u, self.raw @ self.v)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def iterate(self, times: int):
        for _ in range(times):
            self.u.copy_(nn.functional.normalize(self.raw @ self.v, dim=0))
            self.v.copy_(nn.functional.normalize(self.raw.T @ self.u, dim=0))


def power_iterations(layers: nn.Sequential, times: int = 5):
    """Let u and v of the normalised layers follow weights that have changed."""
    for layer in layers:
        if isinstance(layer, NormalizedLinear):
            layer.iterate(times)
