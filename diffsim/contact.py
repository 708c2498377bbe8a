"""The one compliant law, for contacts with the ground and between bodies, and for joint limits.

It is smooth enough to differentiate (no force jumps at touch-down: Hunt & Crossley 1975) and enters the substep
implicitly, so that four substeps do where an explicit penalty needs dozens. README.md derives it.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


def normal_law(gap: Tensor, speed: Tensor, k, damping, width: float, most: float, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Force of a unilateral spring-damper, and the implicit substep's share of it.

        f = k delta max(0, 1 - d v),    delta = s softplus(-gap / s)

    never pulls. To first order, at the end of the substep, where speed is v' and gap' = gap + h v',

        h f(gap', v') = h (f + df/dgap h v' + df/dv (v' - v)) = impulse - weight v'
        weight  = h^2 k sigmoid(-gap / s) max(0, 1 - d v) + h k delta d [d v < 1]
        impulse = h (f + k delta d v [d v < 1])

    Args: gap (m or rad, negative inside), speed v of opening (m/s or rad/s), stiffness k (N/m or N m/rad), damping d
    (s/m or s/rad), width s of the softplus (m or rad), h (s); any shapes that broadcast.
    Returns: force (N or N m), weight (kg or kg m^2), impulse (N s or N m s).
    """
    x = (gap + h * speed) * (-1.0 / width)
    depth = width * softplus(x)  # delta
    share = 1.0 if most == math.inf else most / (depth + most)
    damper = k * damping * depth * share
    pushing = torch.relu(k * depth - damper * speed)
    on = pushing > 0
    slope = k * torch.sigmoid(x) * torch.relu(1 - damping * share * share * speed)
    weight = h * (h * slope + damper) * on
    return pushing, weight, h * pushing + weight * speed


def friction_weight(force: Tensor, speed2: Tensor, friction, slip: float, h: float) -> Tensor:
    """Coulomb friction under a normal force, regularised below the speed `slip` (m/s), with its direction implicit:

    h f_t = -weight v_t',    weight = h mu force / sqrt(|v_t|^2 + slip^2),    speed2 = |v_t|^2
    """
    return h * friction * force * torch.rsqrt(speed2 + slip * slip)
