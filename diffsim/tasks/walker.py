"""Walker on Gymnasium's Walker2d body: hopper's reward on two legs."""

from diffsim.tasks.base import GYMNASIUM_ASSETS
from diffsim.tasks.hopper import Hopper


class Walker(Hopper):
    """Two legs walk, in a plane."""

    xml = GYMNASIUM_ASSETS / "walker2d_v5.xml"
