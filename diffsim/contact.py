"""The one compliant law, for contacts with the ground and between bodies, and for joint limits.

It is smooth enough to differentiate (no force jumps at touch-down: Hunt & Crossley 1975) and enters the substep
implicitly, so that four substeps do where an explicit penalty needs dozens. README.md derives it.
"""

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import softplus


def normal_law(gap: Tensor, speed: Tensor, k, damping, law: tuple[float, float, bool], h: float):
    """Force of a unilateral spring-damper, and the implicit substep's share of it.

        f = max(0, k delta - c v),    delta = s softplus(-gap / s),    c = k d delta D / (D + delta)

    never pulls. Its damping is Hunt and Crossley's k d delta where it is shallow, and tends to k d D. The substep takes
    it at its end, where speed is v' and gap' = gap + h v', to first order about v and a gap g. g is the gap, or with
    foresight gap + h v, where v leads to: what is fast is met before it has passed the surface.

        h f(gap', v') = h (f + df/dgap (gap' - g) + df/dv (v' - v)) = impulse - weight v',    f and c at g
        weight  = h^2 k sigmoid(-g / s) max(0, 1 - d v (D / (D + delta))^2) [f > 0] + h c [f > 0]
        impulse = h f + h c v [f > 0],    with foresight h f + weight v

    Args: gap (m or rad, negative inside), speed v of opening (m/s or rad/s), stiffness k (N/m or N m/rad), damping d
    (s/m or s/rad), law: width s of the softplus, D (m or rad; inf: as Hunt and Crossley), foresight; h (s). Any
    shapes that broadcast.
    Returns: force at the start (N or N m), weight (kg or kg m^2), impulse (N s or N m s).
    """
    width, deep, foresight = law
    g = gap + h * speed if foresight else gap
    depth, share, damper, force = _spring_damper(g, speed, k, damping, width, deep)
    touches = force > 0
    damper = damper * touches  # -df/dv
    slope = k * torch.sigmoid(g * (-1.0 / width)) * torch.relu(1 - damping * (share * share) * speed) * touches
    weight = h * h * slope + h * damper  # slope: -df/dgap
    impulse = h * force + (weight if foresight else h * damper) * speed
    return _spring_damper(gap, speed, k, damping, width, deep)[3] if foresight else force, weight, impulse


def _spring_damper(gap, speed, k, damping, width: float, deep: float):
    """delta, share of Hunt and Crossley's damping, c and f of `normal_law`."""
    depth = width * softplus(gap * (-1.0 / width))
    share = torch.where(speed > 0, deep / (deep + depth), 1.0) if deep < inf else 1.0
    damper = k * damping * depth * share
    return depth, share, damper, torch.relu(k * depth - damper * speed)


def friction_weight(force: Tensor, speed2: Tensor, friction, slip: float, h: float) -> Tensor:
    """Coulomb friction under a normal force, regularised below the speed `slip` (m/s), with its direction implicit:

    h f_t = -weight v_t',    weight = h mu force / sqrt(|v_t|^2 + slip^2),    speed2 = |v_t|^2
    """
    return h * friction * force * torch.rsqrt(speed2 + slip * slip)
