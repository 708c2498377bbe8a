"""The one compliant law, for contacts with the ground and between bodies, and for joint limits.

It is smooth enough to differentiate (no force jumps at touch-down: Hunt & Crossley 1975) and enters the substep
implicitly, so that four substeps do where an explicit penalty needs dozens. README.md derives it.
"""

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import softplus


def normal_law(gap: Tensor, speed: Tensor, k, damping, width: float, h: float, release: float = inf):
    """Force of a unilateral spring-damper, and the implicit substep's share of it.

        f = max(0, k delta - c v),    delta = s softplus(-gap / s),    c = k d delta share

    never pulls. Its damping is Hunt and Crossley's on the way in: share = 1. On the way out, v > 0, share is
    release / (release + delta), and the damping at most k d release, so that what is deep comes out; at v = 0 the
    weight below jumps by that, and the derivative leaves the jump out. To first order, at the end of the substep, where
    speed is v' and gap' = gap + h v',

        h f(gap', v') = h (f + df/dgap h v' + df/dv (v' - v)) = impulse - weight v'
        weight  = (h^2 k sigmoid(-gap / s) (1 - d share^2 v) + h c) [f > 0]
        impulse = h k delta [f > 0]

    Args: gap (m or rad, negative inside), speed v of opening (m/s or rad/s), stiffness k (N/m or N m/rad), damping d
    (s/m or s/rad), width s of the softplus (m or rad), h (s), release (m or rad; inf: share = 1); any shapes that
    broadcast.
    Returns: force (N or N m), weight (kg or kg m^2), impulse (N s or N m s).
    """
    x = gap * (-1.0 / width)
    depth = width * softplus(x)  # delta
    share = 1.0 if release == inf else torch.where(speed > 0, release / (release + depth), 1.0)
    spring, damper = k * depth, k * depth * damping * share
    force = torch.relu(spring - damper * speed)
    touches = force > 0
    slope = k * torch.sigmoid(x) * (1 - damping * (share * share) * speed)  # -df/dgap, above 0 where f is
    return force, (h * h * slope + h * damper) * touches, h * spring * touches


def friction_weight(force: Tensor, speed2: Tensor, friction, slip: float, h: float) -> Tensor:
    """Coulomb friction under a normal force, regularised below the speed `slip` (m/s), with its direction implicit:

    h f_t = -weight v_t',    weight = h mu force / sqrt(|v_t|^2 + slip^2),    speed2 = |v_t|^2
    """
    return h * friction * force * torch.rsqrt(speed2 + slip * slip)
