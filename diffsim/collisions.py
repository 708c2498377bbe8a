"""Which geoms of an MJCF touch each other, as model.Pairs: spheres of one body and cores of another.

A geom is a core and a radius about it. The spheres that stand for it are those at the corners of its core: a sphere
itself, the two ends of a capsule, the eight rounded corners of a box. A sphere touches either exactly. Of two boxes, or
a box and a capsule, the corners of each touch the other; edges that cross do not. Of two capsules it is the sphere of
one, anywhere on its line, that is closest to the other.
"""

from itertools import accumulate, product

import numpy as np
import torch

from diffsim.dense import pattern
from diffsim.mjcf import GEOM, can_touch, fixed_pairs, moves_freely, moving_pairs
from diffsim.model import Group, LinkPairs, Pairs
from diffsim.spatial import Mat, Vec


def fill_pairs(builder, groups: list[Group]) -> LinkPairs | None:
    """Give the groups their pairs. builder: the _Builder that made them.

    If links touch links, returns all pairs of moving bodies instead, and leaves the groups those with the world.
    """
    m, found = builder.m, {}
    place = {joint: (i, row) for i, g in enumerate(groups) for row, joint in enumerate(g.joints)} | {-1: (-1, 0)}

    def link(geom):
        return place[builder.link_of_body(m.geom_bodyid[geom])]

    def last(geom):  # a world before a free body before links: the other body comes first
        return m.body_weldid[m.geom_bodyid[geom]] > 0 and not moves_freely(m, geom), link(geom)

    moving, fixed = ([pair for pair in pairs if can_touch(m, *pair)] for pairs in (moving_pairs(m), fixed_pairs(m)))
    joined = any(not moves_freely(m, a) and not moves_freely(m, b) for a, b in moving)
    for pair in fixed if joined else moving + fixed:
        b, a = sorted(pair, key=last)
        (i, row), (other, _) = link(a), link(b)
        for swapped in _ways(m, a, b):
            links = found.setdefault((i, other, swapped), [[] for _ in groups[i].joints])
            links[row] += _rows(builder, *((b, a) if swapped else (a, b)), name=f"{_name(m, a)} on {_name(m, b)}")
    for (i, other, swapped), links in found.items():
        groups[i].pairs.append(Pairs(other=other, swapped=swapped, **_table(builder, links)))
    return _link_pairs(builder, groups, moving, link) if joined else None


def _link_pairs(builder, groups: list[Group], pairs, link) -> LinkPairs:
    m, first = builder.m, [0, *accumulate(len(g.joints) for g in groups)]
    points, ends = [], []
    for pair in pairs:
        for swapped in _ways(m, *pair):
            sphere, core = reversed(pair) if swapped else pair
            rows = _rows(builder, sphere, core, name=f"{_name(m, sphere)} on {_name(m, core)}")
            points += [[row] for row in rows]
            ends += [tuple(first[i] + row for i, row in (link(sphere), link(core)))] * len(rows)
    a, b = (torch.tensor(links, device=builder.device) for links in zip(*ends))
    made = pattern(groups, ends, builder.device, builder.dtype)
    return LinkPairs(a=a, b=b, pattern=made, **_table(builder, points))


def _ways(m, a, b) -> tuple[bool, ...]:
    """Whose spheres meet whose core: False: those of a, True: those of b."""
    kinds = [GEOM[m.geom_type[geom]] for geom in (a, b)]
    if kinds[0] == "sphere" or kinds == ["capsule", "capsule"]:
        return (False,)
    return (True,) if kinds[1] == "sphere" else (False, True)


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
    core_centre, core_axes, core_half, core_radius = _core(builder, core)
    corners, line = np.unique([centre + axes @ (half * s) for s in product((-1, 1), repeat=3)], axis=0), np.zeros(3)
    if all(GEOM[builder.m.geom_type[geom]] == "capsule" for geom in (sphere, core)):
        corners, line = [centre], axes @ half
    reach = radius + margin + core_radius
    geometry = [*core_centre, *core_axes.T.flat, *core_half, *line]
    return [[name, *x, *geometry, radius + margin, reach, k, damping, friction] for x in corners]


def _table(builder, links: list[list]) -> dict:
    """What of model.Touching the rows of each link say."""
    p, n = max(map(len, links)), len(links)
    index, table = [[-1] * n for _ in range(p)], np.zeros((p, n, 26))
    table[:, :, [6, 10, 14]] = 1.0
    for row, rows in enumerate(links):
        for i, (name, *numbers) in enumerate(rows):
            table[i, row] = numbers
            index[i][row] = len(builder.contact_names)
            builder.contact_names.append(name)
    columns = [c.unsqueeze(-1) for c in torch.tensor(table, device=builder.device, dtype=builder.dtype).unbind(-1)]
    point, core, *axes, half, line = (Vec(*columns[c : c + 3]) for c in range(0, 21, 3))
    turned = abs(table[:, :, 6:15] - np.eye(3).flatten()).max() > 1e-12
    numbers = dict(zip(("radius", "reach", "k", "damping", "friction"), columns[21:]))
    return dict(
        point=point,
        line=line if table[:, :, 18:21].any() else None,
        core=core if table[:, :, 3:6].any() else None,
        axes=Mat(*axes) if turned else None,
        half=half,
        index=index,
        **numbers,
    )
