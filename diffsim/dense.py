"""A x = b of robots whose links touch links, by Cholesky.

The recursion of articulated.py is O(n) because a link yields to its parent only. Links that touch join branches, of one
tree or of two. So A is written out, all vectors about the origin of their tree:

    A_ij = S_i . (Ic_j S_j)  +  sum over pairs of links  D_i . (N D_j)  +  diagonal

The first term is there where dof i is above dof j, or the same. Ic_j is the inertia of all links that j moves, contacts
with the world among them (the composite rigid bodies of RBDA, table 6.2). N (pairs.py) is that of all points of a pair
of links a, b about a's origin, and D takes joint velocities to the velocity of a less that of b:

    D_j = S_j where dof j moves a alone, -S_j where it moves b alone, 0 where both or neither

What moves both does not move them against each other: no row or column of it, and so no change of the momentum. The N
that meet the same two dofs are summed first. Dofs are counted from the leaves to the roots, for then Cholesky leaves
most zeros of A zero, and codegen.py leaves them out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsim.articulated import inertia_of
from diffsim.forces import Equation
from diffsim.kinematics import Frame, Grouped, project, to_parent
from diffsim.model import Group, Model
from diffsim.pairs import of_links
from diffsim.spatial import Inertia, Mat, Spatial, Sym, Vec


@dataclass
class Pattern:
    """Where A is not zero. All are lists of numbers (k,), but for signs (k, 1)."""

    above: Tensor  # dofs i, j where i is above j or the same
    below: Tensor
    pair: Tensor  # of links, that a point belongs to
    summand: Tensor  # pair, for each summand of a sum of N ...
    summand_sign: Tensor
    sum: Tensor  # ... and the sum
    sums: int
    dof: Tensor  # whose S is needed, about the origin of the tree of ...
    shift: tuple[Tensor, Tensor] | None  # the dof's link, and the root link of that tree; None: all are of one tree
    product: tuple[Tensor, Tensor]  # sum of N, times S: places in `dof`
    left: Tensor  # place in `dof`, times ...
    right: Tensor  # product
    sign: Tensor
    entries: Tensor  # of A, flat: of `above` and `below`, of `left` and `right`, and the diagonal


def pattern(groups: list[Group], ends: list[tuple[int, int]], device, dtype) -> Pattern:
    """ends: links a, b of each point, counted through the groups."""
    links = [(i, row) for i, g in enumerate(groups) for row in range(len(g.joints))]
    place = {link: k for k, link in enumerate(links)}
    parent = [place.get((groups[i].parent, groups[i].parent_rows[row])) for i, row in links]
    moved = [place[i, row] for i, g in _from_leaves(groups) for _ in g.dofs for row in range(len(g.joints))]  # by a dof
    root: list[int] = []  # of each link
    dofs: list[list[int]] = []  # that move it
    for k, up in enumerate(parent):
        own = [j for j, link in enumerate(moved) if link == k]
        root.append(k if up is None or groups[links[k][0]].shifts_tree else root[up])  # a slide moves the origin
        dofs.append(own if up is None else own + dofs[up])
    above = [(i, j) for j, link in enumerate(moved) for i in dofs[link] if i >= j]
    pairs, met = list(dict.fromkeys(ends)), {}
    for p, (a, b) in enumerate(pairs):
        signs = {j: 1 if j in dofs[a] else -1 for j in {*dofs[a]} ^ {*dofs[b]}}
        for i, j in ((i, j) for i in signs for j in signs if i >= j):
            met.setdefault((i, j, root[a]), []).append((p, signs[i] * signs[j]))
    sums, products, twists, entries = {}, {}, {}, []

    def number(found: dict, key) -> int:
        return found.setdefault(key, len(found))

    for (i, j, tree), terms in sorted(met.items()):
        sign = terms[0][1]
        total = number(sums, tuple((p, s * sign) for p, s in terms))
        product = number(products, (total, number(twists, (j, tree))))
        entries.append((number(twists, (i, tree)), product, sign, i, j))
    summands = [(p, s, k) for terms, k in sums.items() for p, s in terms]
    nv = len(moved)
    places = [i * nv + j for i, j in above] + [i * nv + j for *_, i, j in entries] + [i * nv + i for i in range(nv)]

    def index(*x):
        return torch.tensor(x, device=device)

    def signs(*x):
        return torch.tensor(x, device=device, dtype=dtype)[:, None]

    summand, summand_sign, of_sum = zip(*summands)
    left, right, sign, *_ = zip(*entries)
    shift = index(*(moved[j] for j, _ in twists)), index(*(tree for _, tree in twists))
    return Pattern(
        above=index(*(i for i, _ in above)), below=index(*(j for _, j in above)),
        pair=index(*map(pairs.index, ends)),
        summand=index(*summand), summand_sign=signs(*summand_sign), sum=index(*of_sum), sums=len(sums),
        dof=index(*(j for j, _ in twists)),
        shift=shift if len({root[k] for end in ends for k in end}) > 1 else None,
        product=tuple(index(*x) for x in zip(*products)),
        left=index(*left), right=index(*right), sign=signs(*sign), entries=index(*places),
    )  # fmt: skip


def _from_leaves(groups: list) -> list[tuple]:
    return list(enumerate(groups))[::-1]


def solve(model: Model, frames: list[Frame], equation: Equation, impulses, tau: Grouped) -> Grouped:
    """x with A x = sum_b J_b^T impulse_b + tau, as articulated.solve."""
    S = [_unit_twists(g, frame) for g, frame in zip(model.groups, frames)]
    if any(p is not None for p in impulses):
        tau = [[f + t for f, t in zip(*both)] for both in zip(project(model, frames, impulses), tau)]
    zeros = [torch.zeros_like(t[0]) for t in tau]  # (n, B)
    b, A = _column(tau, zeros), _matrix(model, frames, equation, S, zeros)
    x, first, found = _cholesky_solve(A, b), 0, [[] for _ in model.groups]
    for i, g in _from_leaves(model.groups):
        for _ in g.dofs:
            found[i].append(x[first : first + len(g.joints)])
            first += len(g.joints)
    return found


def _unit_twists(g: Group, frame: Frame) -> list[Spatial]:
    if g.kind != "free":
        return list(frame.S)
    zero, one = torch.zeros_like(frame.origin.x), torch.ones_like(frame.origin.x)
    still, axes = Vec(zero, zero, zero), (Vec(one, zero, zero), Vec(zero, one, zero), Vec(zero, zero, one))
    return [Spatial(still, axis) for axis in axes] + [Spatial(axis, still) for axis in frame.rot]


def _composite_momenta(model: Model, terms, S: list[list[Spatial]]) -> list[list[Spatial]]:
    """Of all that a dof moves, at unit velocity of it."""
    inertias, momenta = [], [[] for _ in S]
    for t in terms:
        own = [x for x in (inertia_of(t), *(with_world.inertia() for with_world in t.pairs)) if x is not None]
        inertias.append(sum(own[1:], own[0]) if own else None)
    for i, g in _from_leaves(model.groups):
        momenta[i] = [inertias[i] @ s for s in S[i]]
        if g.parent >= 0:
            moved, own = to_parent(model, g, inertias[i]), inertias[g.parent]
            inertias[g.parent] = moved if own is None else own + moved
    return momenta


def _matrix(model: Model, frames: list[Frame], equation: Equation, S: list[list[Spatial]], zeros) -> Tensor:
    """A (dofs, dofs, B), its lower triangle."""
    terms, contacts = equation
    at, momenta = model.links.pattern, _spatial(_composite_momenta(model, terms, S), zeros)
    S, diagonal = _spatial(S, zeros), _column([t.joint.diagonal for t in terms], zeros)
    rot, cross, lin = contacts.inertia()
    N = []
    for t in (*rot, *cross.a, *cross.b, *cross.c, *lin):
        t = _sums(t, at.pair, len(t))  # there are no more pairs than points
        N.append(_sums(t[at.summand] * at.summand_sign, at.sum, at.sums)[at.product[0]])
    N = Inertia(Sym(*N[:6]), Mat(*(Vec(*N[c : c + 3]) for c in (6, 9, 12))), Sym(*N[15:]))
    D = S.map(lambda t: t[at.dof])
    if at.shift is not None:
        origin = Vec(*of_links([f.origin for f in frames], zeros))
        D = Spatial(D.ang, D.lin + origin.map(lambda t: t[at.shift[0]] - t[at.shift[1]]).cross(D.ang))
    products = N @ D.map(lambda t: t[at.product[1]])
    alone = S.map(lambda t: t[at.above]).dot(momenta.map(lambda t: t[at.below]))
    joined = D.map(lambda t: t[at.left]).dot(products.map(lambda t: t[at.right])) * at.sign
    nv = len(diagonal)
    return _sums(torch.cat([alone, joined, diagonal]), at.entries, nv * nv).view(nv, nv, -1)


def _sums(t: Tensor, places: Tensor, n: int) -> Tensor:
    """(n, B) of rows (k, B) that go to `places`."""
    return t.new_zeros(n, t.shape[1]).index_put((places,), t, accumulate=True)


def _spatial(values: list[list[Spatial]], zeros: list[Tensor]) -> Spatial:
    """One (dofs, B) of one (n, B) for each dof of each group."""
    x, y, z, *lin = (_column([[(*s.ang, *s.lin)[c] for s in group] for group in values], zeros) for c in range(6))
    return Spatial(Vec(x, y, z), Vec(*lin))


def _column(values: Grouped, zeros: list[Tensor]) -> Tensor:
    """(dofs, B) of (n, B), (n, 1) or (1, B) for each dof of each group; zeros: (n, B) of each group."""
    return torch.cat([t + zero for group, zero in list(zip(values, zeros))[::-1] for t in group])


def _cholesky_solve(A: Tensor, b: Tensor) -> Tensor:
    """x (n, B) of A x = b; of A (n, n, B) the lower triangle. b is eliminated as a last row of A."""
    (n, batch), columns = b.shape, []
    rest = torch.cat([A, b.view(1, n, batch)])
    for k in range(n):
        column = rest[:, 0] * torch.rsqrt(rest[:1, 0])
        columns.append(column)
        below = column[1:]
        rest = rest[1:, 1:] - below.view(n - k, 1, batch) * below[:-1].view(1, n - k - 1, batch)
    last, *columns = reversed(columns)
    x = last[1:] / last[:1]
    for column in columns:
        x = torch.cat([(column[-1:] - (column[1:-1] * x).sum(0, keepdim=True)) / column[:1], x])
    return x
