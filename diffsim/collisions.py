"""Which geoms of an MJCF touch each other, as model.Pairs: spheres of one body and cores of another.

A geom is a core and a radius about it. The spheres that stand for it are those at the corners of its core: a sphere
itself, the two ends of a capsule, the eight rounded corners of a box. A sphere touches either exactly. Of two boxes, or
a box and a capsule, the corners of each touch the other; edges that cross do not.
"""

from itertools import product

import numpy as np
import torch

from diffsim.mjcf import GEOM, can_touch, fixed_pairs, moves_freely, moving_pairs
from diffsim.model import Group, Pairs
from diffsim.spatial import Mat, Vec


def fill_pairs(builder, groups: list[Group]):
    """Give the groups their pairs. builder: the _Builder that made them."""
    m, found = builder.m, {}
    place = {joint: (i, row) for i, g in enumerate(groups) for row, joint in enumerate(g.joints)} | {-1: (-1, 0)}

    def link(geom):
        return place[builder.link_of_body(m.geom_bodyid[geom])]

    def last(geom):  # a world before a free body before links: the other body comes first
        return m.body_weldid[m.geom_bodyid[geom]] > 0 and not moves_freely(m, geom), link(geom)

    for pair in moving_pairs(m) + fixed_pairs(m):
        if not can_touch(m, *pair):
            continue
        b, a = sorted(pair, key=last)
        (i, row), (other, _) = link(a), link(b)
        is_sphere = [GEOM[m.geom_type[geom]] == "sphere" for geom in (a, b)]
        for swapped in (False,) if is_sphere[0] else (True,) if is_sphere[1] else (False, True):
            links = found.setdefault((i, other, swapped), [[] for _ in groups[i].joints])
            links[row] += _rows(builder, *((b, a) if swapped else (a, b)), name=f"{_name(m, a)} on {_name(m, b)}")
    for (i, other, swapped), links in found.items():
        groups[i].pairs.append(_table(builder, other, swapped, links))


def _name(m, geom) -> str:
    return m.geom(geom).name or f"geom {geom}"


def _core(builder, geom):
    """Centre (3,), axes (3, 3), half sizes (3,) of a geom's core in its link's frame, and the radius."""
    size, kind = builder.m.geom_size[geom], GEOM[builder.m.geom_type[geom]]
    radius = min(builder.softness.edge, size.min() / 2) if kind == "box" else size[0]
    half = {"box": size - radius, "capsule": np.array([0, 0, size[1]]), "sphere": np.zeros(3)}[kind]
    return *builder.geom_in_link(geom), half, radius


def _rows(builder, sphere, core, name) -> list[list]:
    """A row of numbers for each sphere of a geom, next to the core of another."""
    margin, k, damping, friction = builder.law(sphere, core)
    centre, axes, half, radius = _core(builder, sphere)
    corners = np.unique([centre + axes @ (half * signs) for signs in product((-1, 1), repeat=3)], axis=0)
    core_centre, core_axes, core_half, core_radius = _core(builder, core)
    reach = radius + margin + core_radius
    geometry = [*core_centre, *core_axes.T.flat, *core_half]
    return [[name, *x, *geometry, radius + margin, reach, k, damping, friction] for x in corners]


def _table(builder, other: int, swapped: bool, links: list[list]) -> Pairs:
    p, n = max(map(len, links)), len(links)
    index, table = [[-1] * n for _ in range(p)], np.zeros((p, n, 23))
    table[:, :, [6, 10, 14]] = 1.0
    for row, rows in enumerate(links):
        for i, (name, *numbers) in enumerate(rows):
            table[i, row] = numbers
            index[i][row] = len(builder.contact_names)
            builder.contact_names.append(name)
    columns = [c.unsqueeze(-1) for c in torch.tensor(table, device=builder.device, dtype=builder.dtype).unbind(-1)]
    point, core, *axes, half = (Vec(*columns[c : c + 3]) for c in range(0, 18, 3))
    turned = abs(table[:, :, 6:15] - np.eye(3).flatten()).max() > 1e-12
    core = core if table[:, :, 3:6].any() else None
    return Pairs(other, swapped, point, core, Mat(*axes) if turned else None, half, *columns[18:], index)
