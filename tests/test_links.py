"""Links of robots that touch links: the dense solve, momentum, derivatives, friction, and what MuJoCo makes of it."""

import textwrap

import mujoco
import numpy as np
import pytest
import torch

import diffsim
from diffsim.builder import SelfCollisionWarning
from diffsim.codegen import Expressions, outputs
from diffsim.dynamics import actuator_force, backward_substep, contact_points, forward_substep
from diffsim.spatial import Vec, quat_to_mat
from tests import ROOT
from tests.test_pairs import BALL, FREE, WORLD, assert_is_the_dense_equation, load
from tests.test_physics import relative

LEG = (
    '<body pos="{0} 0 0"><joint name="{1}" axis="0 1 0" damping=".05"/><joint axis="1 0 0" damping=".05"/>'
    '<geom name="{1}" type="capsule" size=".04" fromto="0 0 0 0 0 -.3" mass=".4"/><body pos="0 0 -.35">'
    '<joint axis="1 0 0"/><geom name="{1} foot" type="box" size=".03 .06 .02" mass=".1"/></body></body>'
)
MOTORS = '<actuator><motor joint="{}"/><motor joint="{}"/></actuator>'
ROBOT = (
    '<body name="{0}" pos="{1}"><freejoint/><geom name="{0}" type="box" size=".12 .1 .05" pos="0 0 .1" mass="1"/>'
    + LEG.format(-0.1, "{0} left")
    + LEG.format(0.1, "{0} right")
    + '<body pos="0 .15 .1"><joint type="ball"/><geom name="{0} hand" size=".05" pos="0 .1 0" mass=".2"/></body></body>'
)
# Two robots that float, and a ball between them.
SCENE = WORLD.format(
    ROBOT.format("a", "100 0 0") + ROBOT.format("b", "100 .9 0") + FREE.format("ball", "100 .5 .1", 0.3, 'size=".1"'),
    g=0, end=MOTORS.format("a left", "b right"),
)  # fmt: skip


def scene(touching):
    """The scene with nothing that touches, with the legs of a crossed, and all close together."""
    model = load(SCENE)
    qpos = torch.tensor(model.mj_model.qpos0)[:, None]

    def at(joint):
        return int(model.mj_model.joint(joint).qposadr[0])

    for robot in "ab"[:touching]:  # crossed legs
        qpos[at(f"{robot} left")], qpos[at(f"{robot} right")] = -0.45, 0.45
        qpos[at(f"{robot} left") + 1], qpos[at(f"{robot} right") + 1] = 0.16, -0.16
    if touching > 1:  # the hand of a at the trunk of b, which the ball lies on
        free = [int(a) for a, kind in zip(model.mj_model.jnt_qposadr, model.mj_model.jnt_type) if kind == 0]
        qpos[free[1] + 1] = 0.39
        qpos[free[2] + 1], qpos[free[2] + 2] = 0.39, 0.24
    generator = torch.Generator().manual_seed(1)
    qvel = torch.randn(model.nv, 1, generator=generator).double() * 0.3
    return model, qpos, qvel, actuator_force(model, torch.ones(2, 1).double())


def names_that_touch(model, qpos, qvel):
    gap, _ = contact_points(model, qpos, qvel)
    return [name for name, x in zip(model.contact_names, gap[:, 0]) if x < 0]


@pytest.mark.parametrize("touching", [0, 1, 4])
def test_a_substep_solves_the_dense_equation(touching):
    model, qpos, qvel, qfrc = scene(touching)
    assert len(names_that_touch(model, qpos, qvel)) == touching
    assert_is_the_dense_equation(model, qpos, qvel, qfrc)


@pytest.mark.parametrize("touching", [1, 4])
def test_links_that_touch_keep_the_momentum_of_all(touching):
    """At a fixed position a substep's change of it is that of the velocity terms, which no force inside changes."""
    model, qpos, qvel, qfrc = scene(touching)
    assert names_that_touch(model, qpos, qvel)
    free = [int(a) for a, kind in zip(model.mj_model.jnt_dofadr, model.mj_model.jnt_type) if kind == 0]
    places = [int(a) for a, kind in zip(model.mj_model.jnt_qposadr, model.mj_model.jnt_type) if kind == 0]

    def total(p):  # of joint momenta (nv,): linear, and angular about a point by the bodies
        momentum = torch.zeros(6).double()
        for dof, place in zip(free, places):
            pos, quat = qpos[place : place + 3, 0], qpos[place + 3 : place + 7, 0]
            spin = torch.stack(quat_to_mat(*quat) @ Vec(*p[dof + 3 : dof + 6]))
            arm = pos - torch.tensor([100.0, 0, 0]).double()
            momentum += torch.cat([p[dof : dof + 3], torch.linalg.cross(arm, p[dof : dof + 3]) + spin])
        return momentum

    pushed = 0.0
    for _ in range(10):
        M, bias = diffsim.mass_matrix(model, qpos)[:, :, 0], diffsim.bias_force(model, qpos, qvel)[:, 0]
        _, x = forward_substep(model, qpos, qvel, qfrc)
        before = total(M @ qvel[:, 0] - model.timestep * bias)
        assert relative(total(M @ x[:, 0]), before) < 1e-12
        pushed = max(pushed, float(contact_points(model, qpos, qvel)[1].abs().max()))
        qpos, qvel = diffsim.step(model, qpos, qvel, torch.ones(2, 1).double())
    assert pushed > 5  # N


ARM = (
    '<body pos="0 0 {0}"><joint axis="0 1 0" damping=".02" name="{1}"/><geom name="{1}" type="capsule" size=".03" '
    'fromto="0 0 0 .3 0 0" mass=".3"/>{2}</body>'
)


def arms():
    """Three links, of which the last one folds onto the first, and a second arm."""
    fold = (
        '<body pos=".3 0 0"><joint axis="0 1 0" damping=".02"/><geom size=".02" mass=".1"/>'
        '<body pos="0 .01 .12"><joint name="k" axis="0 1 0" damping=".02"/>'
        '<geom name="tip" type="capsule" size=".02" mass=".1" fromto="0 0 0 -.2 .02 0"/></body></body>'
    )
    return WORLD.format(ARM.format(0, "one", fold) + ARM.format(-0.11, "two", ""), g=0, end=MOTORS.format("two", "k"))


def test_derivatives_through_making_and_breaking_contact():
    """Of 40 substeps in which the arm folds, and is hit by the other one."""
    model = load(arms())
    places = [model.contact_names.index(name) for name in ("one on tip", "one on two")]
    start = torch.tensor(model.mj_model.qpos0)[:, None]

    def end(x):  # velocities, then torques of the two motors: (4 + 4, B)
        q, v, forces = start.expand(-1, x.shape[1]), x[:4], []
        for u in x[4:].view(2, 2, -1).repeat_interleave(20, 0):
            q, v = diffsim.step(model, q, v, u)
            forces.append(contact_points(model, q, v)[1][:, places].norm(dim=0).detach())
        return torch.cat([q, v]), torch.stack(forces)

    x = torch.tensor([0.2, 0.3, -8.0, -4.0, -0.1, -0.2, 0.1, 0.1]).double()[:, None]
    with torch.no_grad():
        state, forces = end(x)
        bump = 1e-6 * torch.eye(len(x)).double()
        numeric = (end(x + bump)[0] - end(x - bump)[0]) / 2e-6
    for force in forces[:, :, 0].T:  # N
        assert force[0] < 0.1 and force.max() > 5 and force[-1] < 0.1
    copies = x.repeat(1, len(state)).requires_grad_()
    (analytic,) = torch.autograd.grad(end(copies)[0], copies, torch.eye(len(state)).double())
    assert relative(analytic.T, numeric) < 1e-5


def test_the_step_can_be_written_out():
    model = load(WORLD.format(ARM.format(0, "one", "") + ARM.format(-0.11, "two", ""), g=0, end=""))
    sizes = [model.nq, model.nv, model.nv, model.nv, model.nq, model.nv]
    outputs(model, backward_substep, sizes, Expressions())  # raises where torch's graph has what codegen.py lacks


def crossed_legs():
    """Two thighs on one base that floats, at a right angle to each other, that motors press together."""
    thigh = (
        '<body pos="{1} {2} 0" euler="0 {3} 0"><joint name="{0}" axis="1 0 0" damping="1" armature=".05"/>'
        '<geom name="{0}" type="capsule" size=".06" fromto="0 0 0 0 0 -.5" mass="4"/></body>'
    )
    legs = thigh.format("left", -0.18, 0.07, -45) + thigh.format("right", 0.18, -0.07, 45)
    base = f'<body><freejoint/><geom type="box" size=".05 .05 .05" pos="0 0 .2" mass="5"/>{legs}</body>'
    return WORLD.format(base, g=0, end=MOTORS.format("left", "right"))


def test_legs_that_are_pressed_together_stay_crossed_as_in_mujoco():
    model = load(crossed_legs())
    (place,) = (i for i, name in enumerate(model.contact_names) if name == "left on right")
    torque = torch.tensor([[-10.0], [10.0]]).double()
    qpos, qvel = torch.tensor(model.mj_model.qpos0)[:, None], torch.zeros(model.nv, 1).double()
    data = mujoco.MjData(model.mj_model)
    data.ctrl[:] = torque[:, 0]
    gaps, there = [], []
    for _ in range(60):
        qpos, qvel = diffsim.step(model, qpos, qvel, torque)
        mujoco.mj_step(model.mj_model, data)
        gap, force = (x[..., place, 0] for x in contact_points(model, qpos, qvel))
        gaps.append(float(gap))
        there += [*data.contact.dist]
    mujoco.mj_contactForce(model.mj_model, data, 0, pressed := np.zeros(6))
    assert gaps[0] > 0.015 and -0.005 < min(gaps) < 0 and -0.005 < min(there) < 0
    assert gaps[-1] == pytest.approx(there[-1], abs=0.001)
    assert float(force.norm()) == pytest.approx(pressed[0], rel=0.01) and float(force[1]) > 0  # left is pushed left
    assert abs(torch.tensor(data.qpos)[7:] - qpos[7:, 0]).max() < 0.005


def test_friction_between_links_holds_to_its_cone():
    """Of one base: a ball that cannot roll is pressed on a sled, and pulled."""
    xml = """<mujoco><option timestep=".002" gravity="0 0 -10"/><worldbody><body><joint axis="0 0 1" armature="9"/>
    <geom size=".01" pos="5 5 5"/>
    <body pos="0 0 .16"><joint name="x" type="slide" axis="1 0 0"/><joint type="slide" axis="0 0 1"/>
    <geom name="ball" size=".1" mass="1" friction=".4"/></body>
    <body><joint type="slide" axis="1 0 0" stiffness="2000" damping="150"/>
    <geom name="sled" type="box" size=".5 .1 .06" mass="3" friction=".4"/></body></body></worldbody>
    <actuator><motor joint="x"/></actuator></mujoco>"""
    model = load(xml)
    qpos, qvel = torch.tensor(model.mj_model.qpos0)[:, None], torch.zeros(model.nv, 1).double()
    place = model.contact_names.index("ball on sled")
    for push, slides in ((0.5, False), (8.0, True)):
        for _ in range(150):
            qpos, qvel = diffsim.step(model, qpos, qvel, torch.tensor([[push]]).double())
        force = diffsim.contact_force(model, qpos, qvel)[:, place, 0]
        assert float(force[2]) == pytest.approx(10, rel=0.01)  # on the ball, upwards
        ratio = -float(force[0] / force[2])
        assert ratio == pytest.approx(0.4 if slides else push / 10, rel=0.02)


def test_capsules_touch_where_mujoco_sees_it():
    for pose, other in (('pos=".02 .03 .095" euler="20 80 0"', 'size=".03 .2"'), ('pos="0 .1 .2"', 'size=".08 .1"')):
        arm = f'<body {pose}><joint axis="0 0 1"/><geom name="a" type="capsule" size=".05 .2"/></body>'
        second = f'<body><joint/><geom name="b" type="capsule" {other}/></body>'
        model = load(WORLD.format(arm + second, g=0, end=""))
        data = mujoco.MjData(model.mj_model)
        mujoco.mj_forward(model.mj_model, data)
        gap, force = contact_points(model, torch.zeros(2, 1).double(), torch.zeros(2, 1).double())
        assert data.ncon and float(gap) == pytest.approx(data.contact.dist.min(), abs=1e-5)
        normal = (force / force.norm())[:, 0, 0].numpy()
        assert -normal @ data.contact.frame[0, :3] == pytest.approx(1, abs=1e-3)  # MuJoCo's: from a to b


def test_links_apart_move_as_if_nothing_could_touch():
    model, qpos, qvel, qfrc = scene(0)
    with pytest.warns(SelfCollisionWarning, match=r"moving geoms is ignored \(68 pairs"):
        alone = diffsim.load_model(SCENE, dtype=torch.float64)
    for one, two in zip(forward_substep(model, qpos, qvel, qfrc), forward_substep(alone, qpos, qvel, qfrc)):
        assert relative(one, two) < 1e-12


def test_collisions_change_no_bit_where_no_links_touch():
    xml = diffsim.TASKS["ant"]().xml
    with pytest.warns(UserWarning, match="collisions=True changes nothing"):
        model = diffsim.load_model(xml, collisions=True)
    plain = diffsim.load_model(xml)
    assert model.links is None
    generator = torch.Generator().manual_seed(0)
    qpos, qvel = torch.tensor(plain.mj_model.qpos0).float()[:, None], torch.randn(plain.nv, 1, generator=generator)
    ctrl = torch.randn(plain.nu, 1, generator=generator)
    for one, two in zip(diffsim.step(model, qpos, qvel, ctrl), diffsim.step(plain, qpos, qvel, ctrl)):
        assert torch.equal(one, two)


def test_what_touches_and_what_is_left_out():
    one = '<body name="{0}" pos="{1} 0 0"><joint/><geom name="{0}" type="{2}" size=".1 .1 .1"/>{3}</body>'
    child = one.format("hand", 0.5, "capsule", one.format("finger", 0.5, "box", ""))
    arms = one.format("left", 0, "capsule", child) + one.format("right", 3, "cylinder", "")
    xml = WORLD.format(arms + FREE.format("ball", "5 0 0", 1, BALL), g=0, end="")
    with pytest.warns(SelfCollisionWarning, match=r"ignored \(4 pairs, geom 'left' and geom 'right' first"):
        model = diffsim.load_model(xml, collisions=True)  # the cylinder's
    expected = {"left on finger", "finger on left", "ball on left", "ball on hand", "ball on finger"}
    assert set(model.contact_names) == expected
    assert len(model.contact_names) == 2 + 8 + 3
    excluded = xml.replace("</mujoco>", '<contact><exclude body1="left" body2="finger"/></contact></mujoco>')
    model = load(excluded)
    assert model.links is None and {*model.contact_names} == {"left on ball", "hand on ball", "finger on ball"}


PLANAR = (
    '<body pos="0 0 {0}"><joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 0 1"/><joint axis="0 1 0"/>'
    '<geom type="capsule" size=".05" fromto="0 0 0 .3 0 0" mass="1"/></body>'
)


def test_planar_robots_touch_in_the_same_way_at_any_height():
    """Two slides of one body: the origin of a tree is where the last one has brought it."""
    model, found = load(WORLD.format(PLANAR.format(1) + PLANAR.format(1.09), g=0, end="")), []
    speeds, free = torch.tensor([0.3, 1, 0.5, -0.2, -1, 0.1]).double()[:, None], torch.zeros(0, 1).double()
    for height in (0.0, 0.5, 2.0):
        start = torch.tensor([0, height, 0.05, 0.1, height, -0.05]).double()[:, None]
        qpos, qvel = start, speeds
        for _ in range(20):
            qpos, qvel = diffsim.step(model, qpos, qvel, free)

        def end(qvel, start=start):
            return diffsim.step(model, start, qvel, free)[1].sum()

        x = speeds.clone().requires_grad_()
        (slope,) = torch.autograd.grad(end(x), x)
        aside = torch.eye(6).double()[:, [1]] * 1e-6
        assert float(slope[1]) == pytest.approx(float(end(speeds + aside) - end(speeds - aside)) / 2e-6, rel=1e-6)
        found.append(torch.cat([qvel, slope]))
    assert (found[0][:6] - speeds).norm() > 1  # they met
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)
    assert_is_the_dense_equation(model, qpos, qvel, torch.zeros(6, 1).double())


def test_a_humanoid_whose_limbs_touch(tmp_path):
    """As diffsim/README.md has it."""
    text = (ROOT / "diffsim/README.md").read_text().split("legs touch each other:\n\n")[1].split("\n\n`mjcf.py`")[0]
    (tmp_path / "my_task.py").write_text(textwrap.dedent(text))
    env = diffsim.make(f"{tmp_path}/my_task.py:SelfColliding", num_envs=2, seed=1, compile=False)
    env.reset()
    of_ground = [i for i, name in enumerate(env.model.contact_names) if " on " not in name]
    gap, _ = contact_points(env.model, env.qpos, env.qvel)  # only the ground raises a start
    assert bool((gap[of_ground].amin(0) > -1e-6).all())
    low = diffsim.make("humanoid", num_envs=2, seed=1, compile=False)
    low.reset()
    torch.testing.assert_close(env.qpos, low.qpos)
    action = torch.zeros(2, env.model.nu, requires_grad=True)
    env.step(action)[1].sum().backward()
    assert len(env.model.links.index[0]) == 36 and torch.isfinite(action.grad).all()


GRIPPER = WORLD.format(
    '<body><joint name="palm" type="slide" axis="0 0 1"/><geom size=".02" contype="0" conaffinity="0"/>'
    '<body pos="-.1 0 0"><joint type="slide" axis="1 0 0"/><geom name="left" size=".03" mass=".1"/></body>'
    '<body pos=".1 0 0"><joint type="slide" axis="1 0 0"/><geom name="right" size=".03" mass=".1"/></body></body>'
    + FREE.format("ball", "0 .01 0", 0.2, 'size=".04"'),
    g=0, end="",
)  # fmt: skip


def test_fingers_that_slide_on_a_sliding_palm():
    """Slides below a slide: the links of one tree, and one origin."""
    model = load(GRIPPER)
    qpos = torch.tensor([0.3, 0.04, -0.04, 0, 0.01, 0.3, 1, 0, 0, 0]).double()[:, None]
    qvel = torch.tensor([0.2, 0.5, -0.3, 0, 0, 0, 1, 2, 3]).double()[:, None]
    gap, _ = contact_points(model, qpos, qvel)
    data = mujoco.MjData(model.mj_model)
    data.qpos[:] = qpos[:, 0]
    mujoco.mj_forward(model.mj_model, data)
    touching = sorted(float(x) for x in gap.flatten() if x < 0)
    assert touching == pytest.approx(sorted(c.dist for c in data.contact), abs=1e-6) and len(touching) == 2
    assert_is_the_dense_equation(model, qpos, qvel, torch.zeros(9, 1).double())


def test_fingers_of_a_sliding_palm_stop_each_other():
    model = load(GRIPPER.replace('name="ball"', 'name="ball" contype="0" conaffinity="0"', 2).replace(
        'body name="ball" contype="0" conaffinity="0"', 'body name="ball"'))  # fmt: skip
    qpos, qvel = torch.tensor(model.mj_model.qpos0)[:, None], torch.zeros(9, 1).double()
    qvel[1:3, 0], closest = torch.tensor([1.0, -1.0]), 0.0
    for _ in range(150):
        qpos, qvel = diffsim.step(model, qpos, qvel, torch.zeros(0, 1).double())
        closest = max(closest, float(qpos[1] - qpos[2]))
    assert 0.14 < closest < 0.16 and qvel[1] < 0 < qvel[2]  # at 0.14 they touch, and bounce
