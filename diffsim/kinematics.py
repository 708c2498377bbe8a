"""Where the links are and how fast they move, group by group from root to leaf.

A state enters as arrays in MuJoCo's order, (nq, B) or (nv, B), and is split once into the rows of each group:
`q[group][component]`, (n, B) with n the joints of the group. All vectors of a tree are in world axes about its own
origin (the root's position), so nothing is ever transformed between links, and float32 keeps its digits far from the
world's origin.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffsim.model import Group, Model
from diffsim.spatial import Mat, Spatial, Vec, axis_angle_to_mat, quat_to_mat

Grouped = list[list[Tensor]]  # [group][component] -> (n, B)


# --- rows: from MuJoCo's order to groups, and back ----------------------------------------------------------------
def split(x: Tensor, layout: list[list[list[int]]]) -> Grouped:
    """Rows of x, group by group. layout: model.qpos_rows for a qpos, model.dof_rows for a qvel or qfrc."""
    return [[_rows(x, rows) for rows in components] for components in layout]


def join(pieces: Grouped, layout: list[list[list[int]]]) -> Tensor:
    """Inverse of `split`."""
    found = {}
    for tensors, components in zip(pieces, layout):
        for t, rows in zip(tensors, components):
            found.update((row, t if len(rows) == 1 else t[i : i + 1]) for i, row in enumerate(rows))
    return torch.cat([found[row] for row in sorted(found)])


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Rows of x; evenly spaced ones as a view."""
    stride = rows[1] - rows[0] if len(rows) > 1 else 1
    if stride > 0 and rows == list(range(rows[0], rows[-1] + 1, stride)):
        return x[rows[0] : rows[-1] + 1 : stride]
    return x[rows]


# --- rows: from group to group ------------------------------------------------------------------------------------
def from_parent(model: Model, g: Group, x):
    """Rows of the parent group as the children see them: a lone parent is repeated, equal rows need nothing.

    Repeating once, rather than broadcasting in every use, leaves the gradient one sum instead of many.
    """
    n = len(model.groups[g.parent].joints)
    if n == 1:
        return x if len(g.joints) == 1 else x.map(lambda t: t.expand(len(g.joints), -1))
    if g.parent_rows == list(range(n)):
        return x
    return x.map(lambda t: t if t.shape[0] == 1 else _rows(t, g.parent_rows))


def to_parent(model: Model, g: Group, x):
    """Sum of the children's rows per parent: the transpose of `from_parent`."""
    n = len(model.groups[g.parent].joints)

    def summed(t: Tensor) -> Tensor:
        if n == 1:
            return t if t.shape[0] == 1 else t.sum(0, keepdim=True)
        sums: list = [None] * n
        for i, parent in enumerate(g.parent_rows):
            row = t[i : i + 1]
            sums[parent] = row if sums[parent] is None else sums[parent] + row
        return torch.cat([torch.zeros_like(t[:1]) if row is None else row for row in sums])

    return x if g.parent_rows == list(range(n)) else x.map(summed)


# --- poses and velocities -----------------------------------------------------------------------------------------
class Frame(NamedTuple):
    """Where the links of a group are; every component (n, B)."""

    pos: Vec  # relative to the tree's origin
    rot: Mat  # from the link's axes to the world's
    origin: Vec  # of the tree, in the world
    S: tuple[Spatial, ...]  # unit twist of each dof; a free joint has none, its six are the axes themselves


def forward_kinematics(model: Model, q: Grouped) -> list[Frame]:
    """Pose of every link; quaternions are normalised."""
    zero = torch.zeros_like(q[0][0][:1])  # (1, B)
    still = Vec(zero, zero, zero)
    frames: list[Frame] = []
    for g, coordinates in zip(model.groups, q):
        if g.kind == "free":
            frames.append(Frame(still, quat_to_mat(*coordinates[3:]), Vec(*coordinates[:3]), ()))
            continue
        pos, rot, origin = g.offset, g.rotation, still
        if g.parent >= 0:
            up = frames[g.parent]
            up_pos, up_rot = from_parent(model, g, up.pos), from_parent(model, g, up.rot)
            origin = from_parent(model, g, up.origin)
            pos = up_pos + up_rot @ g.offset
            rot = up_rot if rot is None else up_rot @ rot
        elif rot is None:
            one = torch.ones_like(zero)
            rot = Mat(Vec(one, zero, zero), Vec(zero, one, zero), Vec(zero, zero, one))
        if g.kind == "slide":
            axis, shift = rot @ g.axis, coordinates[0] - g.q0
            S = (Spatial(still, axis),)
            if g.shifts_tree:  # it carries a whole tree: its links stay where they are relative to the origin
                origin = origin + axis * shift
            else:
                pos = pos + axis * shift
        else:  # a rotation about the anchor
            anchor = pos if g.anchor is None else pos + rot @ g.anchor
            if g.kind == "ball":
                rot = rot @ quat_to_mat(*coordinates)
                S = tuple(Spatial(axis, anchor.cross(axis)) for axis in rot)  # body axes: MuJoCo's
            else:
                axis = rot @ g.axis
                rot = rot @ axis_angle_to_mat(g.axis, coordinates[0] - g.q0)
                S = (Spatial(axis, anchor.cross(axis)),)
            pos = anchor if g.anchor is None else anchor - rot @ g.anchor
        frames.append(Frame(pos, rot, origin, S))
    return frames


def joint_twist(g: Group, frame: Frame, v: list[Tensor]) -> Spatial:
    """Twist that the joint itself adds, v_J = S v. A free joint: world linear, body-frame angular velocity."""
    if g.kind == "free":
        return Spatial(frame.rot @ Vec(*v[3:]), Vec(*v[:3]))
    twist = frame.S[0] * v[0]
    for S, speed in zip(frame.S[1:], v[1:]):
        twist = twist + S * speed
    return twist


def twists(model: Model, frames: list[Frame], v: Grouped) -> list[Spatial]:
    """Velocity J v of every link: its parent's plus its joint's (RBDA 7.34)."""
    velocities: list[Spatial] = []
    for g, frame, speeds in zip(model.groups, frames, v):
        own = joint_twist(g, frame, speeds)
        velocities.append(own + from_parent(model, g, velocities[g.parent]) if g.parent >= 0 else own)
    return velocities


def project(model: Model, frames: list[Frame], wrenches: list[Spatial | None]) -> Grouped:
    """Joint forces sum_b J_b^T wrench_b of a wrench on every link: the transpose of `twists`."""
    wrenches, forces = list(wrenches), [[] for _ in frames]
    for i in reversed(range(len(frames))):
        g, frame, wrench = model.groups[i], frames[i], wrenches[i]
        if g.kind == "free":
            forces[i] = [*wrench.lin, *frame.rot.transpose_times(wrench.ang)]
        else:
            forces[i] = [S.dot(wrench) for S in frame.S]
        if g.parent >= 0:
            pushed = to_parent(model, g, wrench)
            wrenches[g.parent] = pushed if wrenches[g.parent] is None else wrenches[g.parent] + pushed
    return forces


def bias_accelerations(model: Model, frames: list[Frame], v: Grouped, velocities: list[Spatial]) -> list[Spatial]:
    """Acceleration of every link when all joint accelerations are zero, with gravity as one of the world, upwards.

    The joint adds c = v x v_J (RBDA 7.35).
    """
    accelerations: list[Spatial] = []
    for g, frame, speeds, vel in zip(model.groups, frames, v, velocities):
        if g.kind == "free":  # its linear coordinates are world axes: only the rotation carries a bias
            c = Spatial(vel.ang * 0.0, vel.lin.cross(vel.ang))
        else:
            own = joint_twist(g, frame, speeds) if g.parent >= 0 else vel
            c = Spatial(vel.ang.cross(own.ang), vel.ang.cross(own.lin) + vel.lin.cross(own.ang))
        if g.parent >= 0:
            accelerations.append(from_parent(model, g, accelerations[g.parent]) + c)
        else:
            accelerations.append(Spatial(c.ang, c.lin - model.gravity))
    return accelerations
