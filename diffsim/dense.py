"""A x = b of robots whose links touch links, by Cholesky: O(n^3) in the number of dofs.

The recursion of articulated.py is O(n) because a link yields to its parent only. Links that touch join branches, and as
soon as limbs can touch each other all of A is full. So it is written out, all vectors about the origin of their tree:

    A = M + sum over pairs of links  D^T N D + diagonal

M_ij = S_i . (Ic_j S_j), where dof i is above dof j or the same, Ic_j the inertia of all links that j moves, contacts
with the world among them (the composite rigid bodies of RBDA, table 6.2). N (pairs.py) is that of the points of a pair
of links a, b about a's origin, and D takes joint velocities to the velocity of a less that of b:

    D_j = S_j where dof j moves a alone, -S_j where it moves b alone, 0 where both or neither

What moves both of them moves neither against the other: exactly no row or column of it, and so no momentum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsim.articulated import inertia_of
from diffsim.forces import Equation
from diffsim.kinematics import Frame, Grouped, project, to_parent
from diffsim.model import Group, Model
from diffsim.pairs import of_links
from diffsim.rows import Rows
from diffsim.spatial import Inertia, Mat, Spatial, Sym, Vec


@dataclass
class Pattern:
    """Where A is not zero; dofs are counted through the groups, component by component."""

    above: Tensor  # (dofs, dofs, 1): 1 where the dof of the column is above that of the row, or the same
    pair: Rows  # points, of pairs of links
    # a place for each dof that moves one link of a pair, not both
    N: Tensor  # the pair
    dof: Tensor
    sign: Tensor  # (places, 1): 1 if it moves a, -1 if b
    shift: tuple[Tensor, Tensor] | None  # the link of the dof, and a: None where all are of one tree
    left: Tensor  # places of a pair with each other, once
    right: Tensor
    entry: Rows  # of A, flat: where their product goes


def pattern(groups: list[Group], ends: list[tuple[int, int]], device, dtype) -> Pattern:
    """ends: links a, b of each point, counted through the groups."""
    links = [(i, row) for i, g in enumerate(groups) for row in range(len(g.joints))]
    place = {link: k for k, link in enumerate(links)}
    parent = [place.get((groups[i].parent, groups[i].parent_rows[row])) for i, row in links]
    moving = [place[i, row] for i, g in enumerate(groups) for _ in g.dofs for row in range(len(g.joints))]  # by a dof
    dofs: list[list[int]] = []  # that move each link
    for k in range(len(links)):
        own = [j for j, link in enumerate(moving) if link == k]
        dofs.append(own if parent[k] is None else dofs[parent[k]] + own)
    nv = len(moving)
    above = torch.zeros(nv, nv, 1, device=device, dtype=dtype)
    for j, link in enumerate(moving):
        above[j, [i for i in dofs[link] if i <= j]] = 1
    pairs = list(dict.fromkeys(ends))
    arms, products = [], []
    for p, (a, b) in enumerate(pairs):
        first = len(arms)
        arms += [(p, j, j in dofs[a]) for j in sorted({*dofs[a]} ^ {*dofs[b]})]
        products += [(r, s) for r in range(first, len(arms)) for s in range(first, r + 1)]
    root = [dofs[k][0] for k in range(len(links))]

    def index(x):
        return torch.tensor(x, device=device)

    shift = index([moving[j] for _, j, _ in arms]), index([pairs[p][0] for p, _, _ in arms])
    return Pattern(
        above=above,
        pair=Rows([pairs.index(pair) for pair in ends], len(pairs), device),
        N=index([p for p, _, _ in arms]),
        dof=index([j for _, j, _ in arms]),
        sign=torch.tensor([[1.0 if of_a else -1.0] for _, _, of_a in arms], device=device, dtype=dtype),
        shift=shift if any(root[a] != root[b] for a, b in pairs) else None,
        left=index([r for r, _ in products]),
        right=index([s for _, s in products]),
        entry=Rows([arms[r][1] * nv + arms[s][1] for r, s in products], nv * nv, device),
    )


def solve(model: Model, frames: list[Frame], equation: Equation, impulses, tau: Grouped) -> Grouped:
    """x with A x = sum_b J_b^T impulse_b + tau, as articulated.solve."""
    terms, contacts = equation
    S = [_unit_twists(g, frame) for g, frame in zip(model.groups, frames)]
    twists = _stack(model, S)  # (6, dofs, B)
    momenta = _stack(model, _composite_momenta(model, terms, S))
    A = (twists[:, None] * momenta[:, :, None]).sum(0) * model.links.pattern.above
    A = A + _of_pairs(model, frames, contacts, twists)
    forces = tau if all(p is None for p in impulses) else [
        [f + t for f, t in zip(*both)] for both in zip(project(model, frames, impulses), tau)
    ]  # fmt: skip
    b, diagonal = (
        torch.cat([t.expand(len(g.joints), A.shape[-1]) for g, x in zip(model.groups, rows) for t in x])
        for rows in (forces, [t.joint.diagonal for t in terms])
    )
    x = iter(_cholesky_solve(A, diagonal, b).split([len(g.joints) for g in model.groups for _ in g.dofs]))
    return [[next(x) for _ in g.dofs] for g in model.groups]


def _unit_twists(g: Group, frame: Frame) -> list[Spatial]:
    if g.kind != "free":
        return list(frame.S)
    zero = torch.zeros_like(frame.origin.x)
    one, still = zero + 1, Vec(zero, zero, zero)
    axes = Vec(one, zero, zero), Vec(zero, one, zero), Vec(zero, zero, one)
    return [Spatial(still, axis) for axis in axes] + [Spatial(axis, still) for axis in frame.rot]


def _composite_momenta(model: Model, terms, S: list[list[Spatial]]) -> list[list[Spatial]]:
    """Of all that a dof moves, at unit velocity of it."""
    inertias, momenta = [], [[] for _ in S]
    for t in terms:
        own = [x for x in (inertia_of(t), *(with_world.inertia() for with_world in t.pairs)) if x is not None]
        inertias.append(sum(own[1:], own[0]) if own else None)
    for i, g in reversed(list(enumerate(model.groups))):
        momenta[i] = [inertias[i] @ s for s in S[i]]
        if g.parent >= 0:
            moved, own = to_parent(model, g, inertias[i]), inertias[g.parent]
            inertias[g.parent] = moved if own is None else own + moved
    return momenta


def _of_pairs(model: Model, frames: list[Frame], contacts, twists: Tensor) -> Tensor:
    """Sum of D^T N D, the lower triangle: (dofs, dofs, B)."""
    at, (nv, batch) = model.links.pattern, twists.shape[1:]
    rot, cross, lin = contacts.inertia()
    N = at.pair.sum(torch.stack([*rot, *cross.a, *cross.b, *cross.c, *lin]))
    N = [t[at.N] for t in N]  # one by one: the compiler makes no arrays of them
    N = Inertia(Sym(*N[:6]), Mat(*(Vec(*N[c : c + 3]) for c in (6, 9, 12))), Sym(*N[15:]))
    D = [t[at.dof] * at.sign for t in twists]
    D = Spatial(Vec(*D[:3]), Vec(*D[3:]))
    if at.shift is not None:
        origin = of_links(model, [f.origin for f in frames])
        D = Spatial(D.ang, D.lin + Vec(*(origin[:, at.shift[0]] - origin[:, at.shift[1]])).cross(D.ang))
    P = N @ D
    products = sum(p[at.left] * d[at.right] for p, d in zip((*P.ang, *P.lin), (*D.ang, *D.lin)))
    return at.entry.sum(products).view(nv, nv, batch)


def _stack(model: Model, twists: list[list[Spatial]]) -> Tensor:
    """(6, dofs, B) of a Spatial (n, B) for each dof of each group."""
    parts = [(len(g.joints), (*s.ang, *s.lin)) for g, group in zip(model.groups, twists) for s in group]
    batch = max(t.shape[1] for _, s in parts for t in s)
    return torch.stack([torch.cat([s[c].expand(n, batch) for n, s in parts]) for c in range(6)])


def _cholesky_solve(A: Tensor, diagonal: Tensor, b: Tensor) -> Tensor:
    """x (n, B) of (A + diagonal) x = b; of A (n, n, B) the lower triangle. b is eliminated as a last row of A."""
    columns, rest = [], torch.cat([A, b[None]])
    for d in diagonal:
        column = torch.cat([rest[:1, 0] + d, rest[1:, 0]])
        column = column * torch.rsqrt(column[:1])
        columns.append(column)
        rest = rest[1:, 1:] - column[1:, None] * column[None, 1:-1]
    x = b[:0]
    for column in reversed(columns):
        x = torch.cat([(column[-1:] - (column[1:-1] * x).sum(0, keepdim=True)) / column[:1], x])
    return x
