"""Contact between moving bodies: momentum, the coupled solve, derivatives, friction, which geoms touch."""

import warnings

import mujoco
import numpy as np
import pytest
import torch

import diffsim
from diffsim.articulated import solve
from diffsim.builder import SelfCollisionWarning
from diffsim.dynamics import actuator_force, contact_points, forward_substep
from diffsim.forces import assemble, residual
from diffsim.kinematics import forward_kinematics, join, split
from diffsim.spatial import Vec, quat_to_mat
from tests.test_physics import assert_solves, dense, relative

WORLD = '<mujoco><option timestep=".002" gravity="0 0 {g}"/><worldbody>{}</worldbody>{end}</mujoco>'
FREE = '<body name="{0}" pos="{1}"><freejoint/><geom name="{0}" mass="{2}" {3}/></body>'
BALL, CUBE = 'size=".05"', 'type="box" size=".06 .06 .06"'
# A hand fixed to the world with two fingers on a swivel, a floating robot with two arms, a shelf, two bodies to touch.
SCENE = WORLD.format(
    '<geom name="shelf" type="box" size=".2 .2 .02" pos="0 0 -.13" euler="5 0 0"/>'
    '<body pos="0 .3 0"><joint name="j" axis="0 0 1" damping=".1"/><geom size=".02" mass=".3"/>'
    '<body pos=".1 -.1 0"><joint axis="1 0 0" armature=".01"/><geom size=".03" pos="0 -.09 0" mass=".2"/></body>'
    '<body pos="-.1 -.1 0"><joint type="ball"/><geom type="capsule" size=".03 .04" pos="0 -.09 0" mass=".2"/></body></body>'
    '<body pos="0 -.3 .1"><freejoint/><geom type="box" size=".1 .06 .1" mass="1"/>'
    '<body pos=".1 .1 0"><joint axis="1 0 0" type="slide"/><geom size=".04" pos="0 .09 0" mass=".2"/></body>'
    '<body pos="-.1 .1 0"><joint axis="0 0 1"/><geom size=".04" pos="0 .09 0" mass=".2"/></body></body>'
    + FREE.format("cube", "0 0 0", 0.5, 'type="box" size=".11 .11 .11"') + FREE.format("ball", "0 0 .2", 0.3, 'size=".1"'),
    g=-9.81, end='<actuator><motor joint="j"/></actuator>',
)  # fmt: skip


def load(xml, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SelfCollisionWarning)
        return diffsim.load_model(xml, dtype=torch.float64, collisions=True, **kwargs)


def scene(touching):
    """The scene with its bodies far away, with the ball at the cube, and all together."""
    model = load(SCENE)
    qpos = torch.tensor(model.mj_model.qpos0)[:, None]
    rows = {"cube": [], "ball": []}
    for name in rows:
        adr = int(model.mj_model.jnt_qposadr[model.mj_model.body(name).jntadr[0]])
        rows[name] = list(range(adr, adr + 3))
    if touching < 10:
        for i, row in enumerate((*rows["cube"], *rows["ball"])):
            qpos[row] += 5.0
        qpos[rows["ball"][2]] += 0.0 if touching else 1.0
    generator = torch.Generator().manual_seed(1)
    qvel = torch.randn(model.nv, 1, generator=generator).double() * 0.3
    return model, qpos, qvel, actuator_force(model, torch.ones(1, 1).double())


@pytest.mark.parametrize("touching", [0, 1, 10])
def test_a_substep_solves_the_dense_equation(touching):
    model, qpos, qvel, qfrc = scene(touching)
    gap = contact_points(model, qpos, qvel)[0]
    print(int((gap < 0).sum()), len(gap))
    q, v, tau = split(qpos, model.qpos_rows), split(qvel, model.dof_rows), split(qfrc, model.dof_rows)
    frames = forward_kinematics(model, q)
    terms = assemble(model, frames, q, v, tau, model.timestep)
    A, b = dense(model, terms, qpos)
    x = forward_substep(model, qpos, qvel, qfrc)[1][:, 0]
    assert_solves(A, x, b)
    assert relative(x, torch.linalg.solve(A, b)) < 1e-12
    rhs, other = torch.randn(2, model.nv, 1, generator=torch.Generator().manual_seed(5)).double()
    lam = solve(model, frames, terms, [None] * len(terms), split(rhs, model.dof_rows))  # the adjoint's call
    assert_solves(A, join(lam, model.dof_rows)[:, 0], rhs[:, 0])
    scalar = residual(model, frames, terms, split(rhs, model.dof_rows), split(other, model.dof_rows))
    assert relative(scalar, other[:, 0] @ (b - A @ rhs[:, 0])) < 1e-12
