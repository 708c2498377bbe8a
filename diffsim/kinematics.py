"""Where the links are and how fast they move, group by group from root to leaf.

Arrays are batch-last: qpos (nq, B), qvel (nv, B), everything in between (n, B) with n the joints of a group. All
vectors of a tree are in world axes about its own origin (the root's position), so nothing is ever transformed between
links, and float32 keeps its digits far from the world's origin.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffsim.model import Group, Model
from diffsim.spatial import Mat, Spatial, Vec, axis_angle_to_mat, quat_to_mat


# --- rows: from MuJoCo's order to groups, from group to group ---------------------------------------------------
def rows_of(x: Tensor, rows: list[int]) -> Tensor:
    """Rows of x; evenly spaced ones as a view."""
    if len(rows) == 1:
        return x[rows[0] : rows[0] + 1]
    step = rows[1] - rows[0]
    if step > 0 and rows == list(range(rows[0], rows[-1] + 1, step)):
        return x[rows[0] : rows[-1] + 1 : step]
    return x[rows]


def to_rows(pieces: list[tuple[Tensor, list[int]]]) -> Tensor:
    """Inverse of `rows_of`: put the rows of every piece where they belong."""
    where = sorted((row, i, k) for i, (_, rows) in enumerate(pieces) for k, row in enumerate(rows))
    return torch.cat([pieces[i][0][k : k + 1] for _, i, k in where])


def from_parent(model: Model, g: Group, x):
    """Rows of the parent group as the children see them: a lone parent is repeated, equal rows need nothing.

    Repeating once, rather than broadcasting in every use, leaves the gradient one sum instead of many.
    """
    n = len(model.groups[g.parent].joints)
    if n == 1:
        return x if len(g.joints) == 1 else x.map(lambda t: t.expand(len(g.joints), -1))
    if g.parent_rows == list(range(n)):
        return x
    return x.map(lambda t: t if t.shape[0] == 1 else rows_of(t, g.parent_rows))


def to_parent(model: Model, g: Group, t: Tensor) -> Tensor:
    """Sum of the children's rows per parent."""
    n = len(model.groups[g.parent].joints)
    if n == 1:
        return t if t.shape[0] == 1 else t.sum(0, keepdim=True)
    if g.parent_rows == list(range(n)):
        return t
    sums: list = [None] * n
    for i, parent in enumerate(g.parent_rows):
        row = t[i : i + 1]
        sums[parent] = row if sums[parent] is None else sums[parent] + row
    return torch.cat([torch.zeros_like(t[:1]) if row is None else row for row in sums])


# --- poses and velocities ----------------------------------------------------------------------------------------
class Frame(NamedTuple):
    """Where the links of a group are: position relative to the tree's origin, rotation, the tree's origin, and
    the unit twist of each of its dofs (a free joint has none: its six are the axes themselves)."""

    pos: Vec
    rot: Mat
    origin: Vec
    screws: tuple[Spatial, ...]


def forward_kinematics(model: Model, qpos: Tensor) -> list[Frame]:
    """Pose of every link; qpos (nq, B) with unit quaternions."""
    zero = torch.zeros_like(qpos[:1])
    still = Vec(zero, zero, zero)
    frames: list[Frame] = []
    for g in model.groups:
        q = [rows_of(qpos, rows) for rows in g.qpos]
        if g.kind == "free":
            frames.append(Frame(still, quat_to_mat(*q[3:]), Vec(*q[:3]), ()))
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
        if g.kind == "ball":
            anchor = pos if g.anchor is None else pos + rot @ g.anchor
            rot = rot @ quat_to_mat(*q)
            screws = tuple(Spatial(a, anchor.cross(a)) for a in rot)
            pos = anchor if g.anchor is None else anchor - rot @ g.anchor
        else:
            axis = rot @ g.axis
            angle = q[0] - g.q0
            if g.kind == "hinge":
                anchor = pos if g.anchor is None else pos + rot @ g.anchor
                rot = rot @ axis_angle_to_mat(g.axis, angle)
                pos = anchor if g.anchor is None else anchor - rot @ g.anchor
                screws = (Spatial(axis, anchor.cross(axis)),)
            else:  # slide; those that carry a whole tree move its origin, not the links relative to it
                if g.shifts_tree:
                    origin = origin + axis * angle
                else:
                    pos = pos + axis * angle
                screws = (Spatial(still, axis),)
        frames.append(Frame(pos, rot, origin, screws))
    return frames


def joint_velocity(g: Group, frame: Frame, qvel: Tensor) -> Spatial:
    """Twist that the joint itself adds. A free joint: world linear, body-frame angular velocity (MuJoCo's)."""
    v = [rows_of(qvel, rows) for rows in g.dofs]
    if g.kind == "free":
        return Spatial(frame.rot @ Vec(*v[3:]), Vec(*v[:3]))
    twist = frame.screws[0] * v[0]
    for screw, speed in zip(frame.screws[1:], v[1:]):
        twist = twist + screw * speed
    return twist


def twists(model: Model, frames: list[Frame], qvel: Tensor) -> list[Spatial]:
    """Velocity of every link."""
    out: list[Spatial] = []
    for g, frame in zip(model.groups, frames):
        v = joint_velocity(g, frame, qvel)
        out.append(v + from_parent(model, g, out[g.parent]) if g.parent >= 0 else v)
    return out
