"""The one compliant law, for contacts with the ground and for joint limits.

It is smooth enough to differentiate (no force jumps at touch-down: Hunt & Crossley 1975) and enters the step
implicitly, so that four substeps do where an explicit penalty needs dozens.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def normal_law(gap: Tensor, speed: Tensor, k, damping, width: float, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Force of a unilateral spring-damper, and the implicit step's share of it.

    The force k delta max(0, 1 - d u) with the smooth depth delta = s softplus(-gap / s) never pulls. Linearised in
    the speed after the step, its impulse is `impulse - weight * new_speed`.

    Args: gap (m or rad, negative inside), speed of opening, stiffness k, damping d, width s, step h; any shapes
    that broadcast. Returns: force, weight, impulse.
    """
    x = gap * (-1.0 / width)
    depth = width * softplus(x)
    closing = torch.relu(1 - damping * speed)
    damper = k * depth * damping * (closing > 0)
    force = k * depth * closing
    weight = h * h * k * torch.sigmoid(x) * closing + h * damper
    return force, weight, h * (force + damper * speed)


def friction_weight(force: Tensor, ux: Tensor, uy: Tensor, friction, slip: float, h: float) -> Tensor:
    """Coulomb friction, regularised below the speed `slip`: its impulse is `-weight * new_tangential_velocity`."""
    return h * friction * force * torch.rsqrt(ux * ux + uy * uy + slip * slip)
