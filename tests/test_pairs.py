"""Contact between moving bodies: momentum, the coupled solve, derivatives, friction, which geoms touch."""

import warnings

import mujoco
import pytest
import torch

import diffsim
from diffsim.builder import SelfCollisionWarning
from diffsim.dynamics import actuator_force, contact_points, forward_substep, solve
from diffsim.forces import assemble, residual
from diffsim.kinematics import forward_kinematics, join, split
from diffsim.spatial import Vec, quat_to_mat
from tests.test_physics import assert_solves, dense, relative

WORLD = '<mujoco><option timestep=".004" gravity="0 0 {g}"/><worldbody>{}</worldbody>{end}</mujoco>'
FREE = '<body name="{0}" pos="{1}"><freejoint/><geom name="{0}" mass="{2}" {3}/></body>'
BALL, CUBE, ROD = 'size=".05"', 'type="box" size=".06 .06 .06"', 'type="capsule" size=".03 .06"'
# A hand fixed to the world with two fingers on a swivel, a floating robot with two arms, a shelf, two bodies to touch.
SCENE = WORLD.format(
    '<geom name="shelf" type="box" size=".2 .2 .02" pos="0 0 -.13" euler="5 0 0"/>'
    '<body pos="0 .3 0"><joint name="j" axis="0 0 1" damping=".1"/><geom size=".02" mass=".3"/>'
    '<body pos=".1 -.1 0"><joint axis="1 0 0" armature=".01"/><geom size=".03" pos="0 -.09 0" mass=".2"/></body>'
    '<body pos="-.1 -.1 0"><joint type="ball"/><geom type="capsule" size=".03 .04" pos="0 -.09 0" mass=".2"/></body>'
    "</body>"
    '<body pos="0 -.3 .1"><freejoint/><geom type="box" size=".1 .06 .1" mass="1"/>'
    '<body pos=".1 .1 0"><joint axis="1 0 0" type="slide"/><geom size=".04" pos="0 .09 0" mass=".2"/></body>'
    '<body pos="-.1 .1 0"><joint axis="0 0 1"/><geom size=".04" pos="0 .09 0" mass=".2"/></body></body>'
    + FREE.format("cube", "0 0 0", 0.5, 'type="box" size=".11 .11 .11"')
    + FREE.format("ball", "0 0 .2", 0.3, 'size=".1"'),
    g=-9.81, end='<actuator><motor joint="j"/></actuator>',
)  # fmt: skip


def load(xml, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SelfCollisionWarning)
        return diffsim.load_model(xml, dtype=torch.float64, collisions=True, **kwargs)


def scene(touching, links=False):
    """The scene with its bodies far away, with the ball at the cube, and all together. links: may links touch links?"""
    xml = (
        SCENE
        if links
        else SCENE.replace("<geom size", '<geom conaffinity="0" size').replace(
            "<geom type", '<geom conaffinity="0" type'
        )
    )
    model = load(xml if touching else xml.replace("0 0 -.13", "0 0 -9"))
    assert (model.links is not None) == links
    qpos = torch.tensor(model.mj_model.qpos0)[:, None]
    rows = {"cube": [], "ball": []}
    for name in rows:
        adr = int(model.mj_model.jnt_qposadr[model.mj_model.body(name).jntadr[0]])
        rows[name] = list(range(adr, adr + 3))
    if touching < 10:
        qpos[rows["cube"] + rows["ball"]] += 5.0
        qpos[rows["ball"][2]] += 0.0 if touching else 1.0
    else:
        qpos[rows["cube"][2]] -= 0.03
    generator = torch.Generator().manual_seed(1)
    qvel = torch.randn(model.nv, 1, generator=generator).double() * 0.3
    return model, qpos, qvel, actuator_force(model, torch.ones(1, 1).double())


def assert_is_the_dense_equation(model, qpos, qvel, qfrc):
    """The substep's solution, the adjoint's and the residual, beside the matrix written out."""
    q, v, tau = split(qpos, model.qpos_rows), split(qvel, model.dof_rows), split(qfrc, model.dof_rows)
    frames = forward_kinematics(model, q)
    equation = assemble(model, frames, q, v, tau, model.timestep)
    A, b = dense(model, equation, qpos)
    x = forward_substep(model, qpos, qvel, qfrc)[1][:, 0]
    assert_solves(A, x, b)
    assert relative(x, torch.linalg.solve(A, b)) < 1e-12
    rhs, other = torch.randn(2, model.nv, 1, generator=torch.Generator().manual_seed(5)).double()
    lam = solve(model, frames, equation, [None] * len(frames), split(rhs, model.dof_rows))  # the adjoint's call
    assert_solves(A, join(lam, model.dof_rows)[:, 0], rhs[:, 0])
    scalar = residual(model, frames, equation, split(rhs, model.dof_rows), split(other, model.dof_rows))
    assert relative(scalar, other[:, 0] @ (b - A @ rhs[:, 0])) < 1e-12


@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize("touching", [0, 1, 10])
def test_a_substep_solves_the_dense_equation(touching, links):
    model, qpos, qvel, qfrc = scene(touching, links)
    found = int((contact_points(model, qpos, qvel)[0] < 0).sum())
    assert found == touching if touching < 10 else found >= 10
    assert_is_the_dense_equation(model, qpos, qvel, qfrc)


def momentum(model, qpos, qvel):
    """Linear and angular, about the world's origin, of free bodies: (6,)."""
    p = (diffsim.mass_matrix(model, qpos)[:, :, 0] @ qvel[:, 0]).view(-1, 2, 3)
    total = torch.zeros(6).double()
    for (lin, ang), q in zip(p, qpos[:, 0].view(-1, 7)):
        spin = torch.stack(quat_to_mat(*q[3:]) @ Vec(*ang))
        total += torch.cat([lin, torch.linalg.cross(q[:3], lin) + spin])
    return total


@pytest.mark.parametrize("first, second", [(BALL, BALL), (BALL, CUBE), (CUBE, BALL), (CUBE, CUBE), (BALL, ROD)])
def test_two_bodies_that_collide_keep_their_momentum(first, second):
    bodies = FREE.format("a", "100 0 0", 0.3, first) + FREE.format("b", "100 .13 .02", 0.5, second)
    model = load(WORLD.format(bodies, g=0, end=""))
    qpos, qvel = torch.tensor(model.mj_model.qpos0)[:, None], torch.zeros(12, 1).double()
    qvel[[1, 7]] = torch.tensor([[1.0], [-0.5]]).double()
    qvel[3] = 2.0 if ROD not in (first, second) else 0.0  # a gyroscope is integrated to first order
    before, touched = momentum(model, qpos, qvel), 0
    for _ in range(50):
        qpos, qvel = diffsim.step(model, qpos, qvel, torch.zeros(0, 1).double())
        touched += int((contact_points(model, qpos, qvel)[0] < 0.002).any())
    assert touched >= 3 and float(contact_points(model, qpos, qvel)[0].min()) > 0.003  # they met, and parted
    parts = 3 if ROD in (first, second) else 6
    assert relative(momentum(model, qpos, qvel)[:parts], before[:parts]) < 1e-12
    assert qvel[1] < qvel[7]


def test_derivatives_through_making_and_breaking_contact():
    """Of 40 substeps in which a finger hits a ball, which rolls on the ground into a box, against differences."""
    xml = WORLD.format(
        '<geom type="plane" size="1 1 1"/>'
        '<body pos="0 0 .3"><joint name="j" axis="0 1 0" damping=".02"/>'
        '<geom name="tip" size=".03" pos="0 0 -.2"/></body>'
        + FREE.format("ball", ".1 .01 .06", 0.1, 'size=".05"') + FREE.format("box", ".225 -.01 .07", 0.2, CUBE),
        g=-9.81, end='<actuator><motor joint="j"/></actuator>',
    )  # fmt: skip
    model = load(xml)
    names = [i for i, name in enumerate(model.contact_names) if " on " in name]
    start = torch.tensor(model.mj_model.qpos0)[:, None]

    def end(x):  # velocity of the finger, torques: (1 + 4, B)
        batch = x.shape[1]
        q, v = start.expand(-1, batch), torch.cat([x[:1], x.new_zeros(model.nv - 1, batch)])
        gaps = []
        for u in x[1:].repeat_interleave(10, 0):
            q, v = diffsim.step(model, q, v, u[None])
            gaps.append(contact_points(model, q, v)[0][names].detach())
        return torch.cat([q, v]), torch.stack(gaps)

    x = torch.tensor([-8.0, -0.3, 0.1, -0.2, 0.1]).double()[:, None]
    with torch.no_grad():
        state, gaps = end(x)
        bump = 1e-6 * torch.eye(len(x)).double()
        numeric = (end(x + bump)[0] - end(x - bump)[0]) / 2e-6
    tip_on_ball, _, box_on_ball = gaps[:, :, 0].T
    assert all(gap[0] > 0.01 and gap.min() < 0 < gap[-1] for gap in (tip_on_ball, box_on_ball))
    copies = x.repeat(1, len(state)).requires_grad_()
    (analytic,) = torch.autograd.grad(end(copies)[0], copies, torch.eye(len(state)).double())
    assert relative(analytic.T, numeric) < 1e-5


def test_friction_holds_to_its_cone():
    """A ball that cannot roll is pulled over a free box: it drags with mu times what presses it on, and no more."""
    xml = """<mujoco><option timestep=".002" gravity="0 0 -10"/><worldbody>
    <body pos="0 0 .159"><joint name="x" type="slide" axis="1 0 0"/><joint type="slide" axis="0 0 1"/>
    <geom size=".1" mass="1" friction=".4"/></body>
    <body pos="0 0 0"><freejoint/><geom type="box" size=".5 .1 .06" mass="3" friction=".4"/></body>
    <geom type="plane" size="1 1 1" pos="0 0 -.06" friction=".4"/></worldbody>
    <actuator><motor joint="x"/></actuator></mujoco>"""
    model = load(xml)
    qpos, qvel = torch.tensor(model.mj_model.qpos0)[:, None], torch.zeros(8, 1).double()
    place = model.contact_names.index(next(name for name in model.contact_names if " on " in name))
    for push, slides in ((0.5, False), (8.0, True)):
        for _ in range(150):
            qpos, qvel = diffsim.step(model, qpos, qvel, torch.tensor([[push]]).double())
        force = diffsim.contact_force(model, qpos, qvel)[:, place, 0]
        assert float(force[2]) == pytest.approx(10, rel=0.01)
        ratio = -float(force[0] / force[2])
        assert ratio == pytest.approx(0.4 if slides else push / 10, rel=0.02)


def test_bodies_that_do_not_touch_move_as_in_mujoco():
    model, qpos, qvel, _ = scene(0)
    data = mujoco.MjData(model.mj_model)
    data.qpos[:], data.qvel[:], data.ctrl[:] = qpos[:, 0], qvel[:, 0], 1.0
    for _ in range(5):
        mujoco.mj_step(model.mj_model, data)
        assert data.ncon == 0
        qpos, qvel = diffsim.step(model, qpos, qvel, torch.ones(1, 1).double())
    assert relative(qpos[:, 0], data.qpos) < 1e-9 and relative(qvel[:, 0], data.qvel) < 1e-9


def test_where_a_sphere_touches_is_where_mujoco_sees_it():
    ball = FREE.format("ball", ".02 .03 {}", 1, 'size=".1"')
    for other, height in ((BALL, 0.14), (ROD, 0.12), (CUBE, 0.155)):
        model = load(WORLD.format(ball.format(height) + FREE.format("other", "0 0 0", 1, other), g=0, end=""))
        data = mujoco.MjData(model.mj_model)
        mujoco.mj_forward(model.mj_model, data)
        qpos, qvel = torch.tensor(model.mj_model.qpos0)[:, None], torch.zeros(12, 1).double()
        gap, force = contact_points(model, qpos, qvel)
        assert data.ncon == 1 and float(gap) == pytest.approx(data.contact.dist[0], abs=1e-6)
        normal = (force / force.norm())[:, 0, 0].numpy()
        assert abs(normal @ data.contact.frame[0, :3]) == pytest.approx(1, abs=1e-6)


def test_what_touches_and_what_is_left_out():
    arms = "".join(
        f'<body name="{n}" pos="{x} 0 0"><joint/><geom name="{n}" type="{kind}" size=".1 .1" conaffinity="0"/></body>'
        for n, x, kind in (("left", 0, "capsule"), ("right", 1, "cylinder"))
    )
    xml = WORLD.format(arms + FREE.format("rod", "2 0 0", 1, ROD) + FREE.format("ball", "3 0 0", 1, BALL), g=0, end="")
    with pytest.warns(SelfCollisionWarning, match=r"ignored \(2 pairs, geom 'right' and geom 'rod' first"):
        model = diffsim.load_model(xml, collisions=True)
    assert set(model.contact_names) == {"left on rod", "left on ball", "ball on rod"}
    with pytest.warns(SelfCollisionWarning, match="5 pairs"):
        assert diffsim.load_model(xml).contact_names == []
    shelf = WORLD.format('<geom name="shelf" {}/>' + FREE.format("rod", "2 0 0", 1, ROD), g=0, end="")
    for fixed, points in ((CUBE, 10), (ROD, 1)):
        assert load(shelf.format(fixed)).contact_names == ["rod on shelf"] * points
    for fixed, kwargs, message in (
        (CUBE, {}, "contact with the fixed geom 'shelf' is not supported by diffsim; only planes"),
        (
            'type="ellipsoid" size="1 1 1"',
            dict(collisions=True),
            r"contact of geom 'rod' \(capsule\) and geom 'shelf' \(ellipsoid\) is not supported",
        ),
        (CUBE + ' gap="1"', dict(collisions=True), "gap of geom 'shelf'"),
    ):
        with pytest.raises(diffsim.UnsupportedError, match=message):
            diffsim.load_model(shelf.format(fixed), **kwargs)


def test_the_hand_carries_the_weight_of_a_cube_at_rest():
    model = diffsim.load_model(diffsim.TASKS["hand"].xml, dtype=torch.float64, timestep=0.04, collisions=True)
    qpos = torch.tensor(model.mj_model.qpos0)[:, None]
    qpos[:19, 0] = torch.tensor([0, 0.3, 0.3, 0.3] * 3 + [0.9, 0.3, 0.3, 0.3] + [0, -0.07, 0.565])  # palm up, curled
    hold = torch.tensor([0, 0.2, 0.12, 0.06] * 3 + [0.0] * 4).double()[:, None]
    qvel = torch.zeros(model.nv, 1).double()
    for _ in range(25):
        qpos, qvel = diffsim.step(model, qpos, qvel, hold)
    up = diffsim.contact_force(model, qpos, qvel)[2, :, 0]
    on_cube = [-f if name.endswith("on cube") else f for name, f in zip(model.contact_names, up)]
    assert float(sum(on_cube)) == pytest.approx(0.5 * 9.81, rel=0.01)
    assert sum(f > 0.1 for f in on_cube) >= 3
