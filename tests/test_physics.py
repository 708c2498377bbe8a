"""Physics against MuJoCo's engine and against closed forms, float64."""

import dataclasses
import math

import mujoco
import numpy as np
import pytest
import torch

import diffsim
from diffsim import codegen
from diffsim.contact import friction_weight, normal_law
from diffsim.dynamics import actuator_force, contact_points, forward_substep, integrate, solve
from diffsim.forces import assemble, residual
from diffsim.kinematics import forward_kinematics, join, split, twists
from diffsim.pairs import at_ends
from diffsim.spatial import Spatial, Vec
from diffsim.tasks.base import GYMNASIUM_ASSETS

pytestmark = pytest.mark.filterwarnings("ignore")
ROBOTS = ["ant", "hopper", "half_cheetah", "walker2d_v5", "humanoid", "inverted_double_pendulum", "reacher"]


def random_tree(seed: int) -> str:
    """A random MJCF: 6 bodies, all joint kinds, several joints on a body, welded bodies, all contact geoms."""
    rng = np.random.default_rng(seed)

    def number(n, scale=1.0):
        return " ".join(f"{x:.4f}" for x in rng.normal(size=n) * scale)

    def body(depth):
        joints = ""
        kind = rng.choice(["hinge", "slide", "ball", "two", "weld"] if depth else ["free", "hinge", "slide"])
        if kind == "free":
            joints = "<freejoint/>"
        elif kind == "ball":
            joints = f'<joint type="ball" pos="{number(3, 0.1)}" damping=".2" armature=".01"/>'
        elif kind != "weld":
            for _ in range(2 if kind == "two" else 1):
                t = kind if kind != "two" else rng.choice(["hinge", "slide"])
                joints += (
                    f'<joint type="{t}" axis="{number(3)}" pos="{number(3, 0.1)}" ref="{rng.normal():.2f}" '
                    f'damping="{rng.uniform():.3f}" armature="{rng.uniform(0, 0.1):.3f}" '
                    f'stiffness="{rng.uniform(0, 3):.3f}"/>'
                )
        geom = rng.choice(['type="sphere" size=".1"', 'type="capsule" size=".05 .2"', 'type="box" size=".1 .2 .05"'])
        children = "".join(body(depth + 1) for _ in range(rng.integers(1, 3))) if depth < 3 else ""
        return (
            f'<body pos="{number(3, 0.3)}" quat="{number(4)}">{joints}'
            f'<geom {geom} pos="{number(3, 0.1)}" quat="{number(4)}"/>{children}</body>'
        )

    floor = '<geom type="plane" size="1 1 1" pos="0 0 -5"/>'
    default = '<default><geom conaffinity="0"/><default class="f"><geom conaffinity="1"/></default></default>'
    world = floor.replace("<geom", '<geom class="f"') + body(0) + body(0)
    return f'<mujoco><option timestep=".004"/>{default}<worldbody>{world}</worldbody></mujoco>'


def load(source):
    xml = GYMNASIUM_ASSETS / f"{source}.xml" if isinstance(source, str) else random_tree(source)
    model = diffsim.load_model(xml, dtype=torch.float64)
    return model


def free_of_constraints(model):
    groups = [dataclasses.replace(g, contacts=None, limit_k=None) for g in model.groups]
    m = model.mj_model.__copy__()
    m.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT | mujoco.mjtDisableBit.mjDSBL_LIMIT
    m.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    return dataclasses.replace(model, groups=groups, contact_names=[], mj_model=m), m


def random_state(m, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    qpos = np.repeat(m.qpos0[:, None], batch, 1)
    for b in range(batch):
        q = qpos[:, b].copy()
        mujoco.mj_integratePos(m, q, rng.normal(size=m.nv), 0.5)
        qpos[:, b] = q
    return map(torch.tensor, (qpos, rng.normal(size=(m.nv, batch)), rng.uniform(-1, 1, (m.nu, batch))))


def put(m, qpos, qvel, ctrl):
    d = mujoco.MjData(m)
    d.qpos[:], d.qvel[:], d.ctrl[:] = qpos, qvel, ctrl
    mujoco.mj_forward(m, d)
    return d


def relative(a, b):
    return abs(np.asarray(a) - np.asarray(b)).max() / max(abs(np.asarray(b)).max(), 1e-12)


@pytest.mark.parametrize("source", [*ROBOTS, *range(12)])
def test_mass_bias_and_free_motion_equal_mujoco(source):
    model = load(source)
    free, m = free_of_constraints(model)
    qpos, qvel, ctrl = random_state(m)
    mass, bias = diffsim.mass_matrix(model, qpos), diffsim.bias_force(model, qpos, qvel)
    ends = []
    for b in range(qpos.shape[1]):
        d = put(m, qpos[:, b], qvel[:, b], ctrl[:, b])
        full = np.zeros((m.nv, m.nv))
        mujoco.mj_fullM(m, d, full)
        assert relative(mass[:, :, b], full) < 1e-9
        assert relative(bias[:, b], d.qfrc_bias) < 1e-9
        mujoco.mj_step(m, d, 10)
        ends.append((d.qpos.copy(), d.qvel.copy()))
    for _ in range(10):
        qpos, qvel = diffsim.step(free, qpos, qvel, ctrl)
    for b, (q, v) in enumerate(ends):
        assert relative(qpos[:, b], q) < 1e-9 and relative(qvel[:, b], v) < 1e-9


@pytest.mark.parametrize("source", [*ROBOTS, *range(4)])
def test_jacobians_equal_mujocos(source):
    free, m = free_of_constraints(load(source))
    qpos, qvel, ctrl = random_state(m, 1)
    d = put(m, qpos[:, 0], qvel[:, 0], ctrl[:, 0])
    a, b = np.zeros((2 * m.nv, 2 * m.nv)), np.zeros((2 * m.nv, m.nu))
    mujoco.mjd_transitionFD(m, d, 1e-6, True, a, b if m.nu else None, None, None)
    copies = [x.repeat(1, m.nv).requires_grad_() for x in (qpos, qvel, ctrl)]  # each row of the Jacobian from its own
    rows = torch.autograd.grad(diffsim.step(free, *copies)[1], copies, torch.eye(m.nv, dtype=qpos.dtype))
    by_qpos, by_qvel, by_ctrl = (x.T.numpy() for x in rows)
    tangent = np.zeros((m.nq, m.nv))  # of qpos, numerically: MuJoCo's Jacobians live on the tangent space
    for i in range(m.nv):
        for sign in (1, -1):
            q = qpos[:, 0].numpy().copy()
            mujoco.mj_integratePos(m, q, np.eye(m.nv)[i] * sign, 1e-6)
            tangent[:, i] += sign * q / 2e-6
    assert relative(by_qpos @ tangent, a[m.nv :, : m.nv]) < 1e-5
    assert relative(by_qvel, a[m.nv :, m.nv :]) < 1e-5
    if m.nu:
        assert relative(by_ctrl, b[m.nv :]) < 1e-5


@pytest.mark.parametrize("source", [*ROBOTS, *range(6)])
def test_derivative_of_a_step_with_contacts_and_limits(source):
    model = load(source)
    qpos, qvel, ctrl = random_state(model.mj_model, 1)
    if source in ("ant", "humanoid"):
        qpos[2] = 0.3  # down to the ground
    rows = [len(x) for x in (qpos, qvel, ctrl)]
    x = torch.cat([qpos, qvel, ctrl])

    def step(x):  # (rows, B) -> (nq + nv, B); columns are perturbed and differentiated in one batch
        return torch.cat(diffsim.step(model, *x.split(rows)))

    outputs, eps = len(step(x)), 1e-7
    with torch.no_grad():
        bump = eps * torch.eye(len(x), dtype=x.dtype)
        numeric = (step(x + bump) - step(x - bump)) / (2 * eps)
    copies = x.repeat(1, outputs).requires_grad_()
    (analytic,) = torch.autograd.grad(step(copies), copies, torch.eye(outputs, dtype=x.dtype))
    torch.testing.assert_close(analytic.T, numeric, atol=1e-5, rtol=1e-4)


def dense(model, equation, qpos):
    """A (nv, nv) and b (nv) of one state from its equation, by Jacobians that are written out."""
    nv = model.nv
    A, b = torch.zeros(nv, nv).double(), torch.zeros(nv).double()
    frames = forward_kinematics(model, split(qpos.repeat(1, nv), model.qpos_rows))
    velocities = twists(model, frames, split(torch.eye(nv).double(), model.dof_rows))  # column i: under unit velocity i

    def add(jacobian, inertia, impulse):  # (3, n, nv), (3, 3, n), (3, n)
        A.add_(torch.einsum("ani,abn,bnj->ij", jacobian, inertia, jacobian))
        b.add_(torch.einsum("ani,an->i", jacobian, impulse))

    def touch(t, vel, other):  # J: of one link's point less the other's
        jacobian = torch.stack(t.relative(vel, other))
        n, weights = torch.stack(t.normal)[..., 0], [x[..., 0] for x in (t.w_n - t.w_t, t.w_t)]
        weight = n * n[:, None] * weights[0] + torch.eye(3).double()[..., None, None] * weights[1]
        add(jacobian.flatten(1, 2), weight.flatten(2), (n * t.j_n[..., 0]).flatten(1))

    if equation.links is not None:
        ends = at_ends(model, [[*v.ang, *v.lin] for v in velocities], velocities)
        touch(equation.links, *(Spatial(Vec(*t[:3]), Vec(*t[3:])) for t in ends))
    for g, (body, contact, joint, pairs), vel in zip(model.groups, equation.groups, velocities):
        if body is not None:
            xx, yy, zz, xy, xz, yz = (t[:, 0] for t in body.inertia)
            inertia = torch.stack([torch.stack(r) for r in ((xx, xy, xz), (xy, yy, yz), (xz, yz, zz))])
            add(torch.stack(vel.ang), inertia, torch.stack(body.angular)[..., 0])
            at_com = torch.stack(vel.at(body.com))
            add(at_com, torch.eye(3)[..., None] * body.mass[:, 0], torch.stack(body.linear)[..., 0])
        if contact is not None:
            for i in range(len(g.contacts.index)):
                w_t, w_n, j_n = (t[i, :, 0] for t in (contact.w_t, contact.w_n, contact.j_n))
                weight = torch.eye(3)[..., None] * torch.stack([w_t, w_t, w_n])
                add(
                    torch.stack(vel.at(contact.pos.map(lambda t, i=i: t[i]))),
                    weight,
                    torch.stack([0 * j_n, 0 * j_n, j_n]),
                )
        for contacts, t in zip(g.pairs, pairs):
            touch(t, vel, None if contacts.other < 0 else velocities[contacts.other])
        for rows, d, j in zip(g.dofs, *joint):
            A[rows, rows] += d[:, 0]
            b[rows] += j[:, 0]
    return A, b


def state_on_the_ground(source):
    """A robot, or a random tree with its floor raised, in a random state: contacts and limits act."""
    if isinstance(source, str):
        model = load(source)
    else:
        model = diffsim.load_model(random_tree(source).replace("0 0 -5", "0 0 .3"), dtype=torch.float64)
    qpos, qvel, ctrl = random_state(model.mj_model, 1, seed=3)
    if source in ("ant", "humanoid", "hopper"):
        height = 1 if source == "hopper" else 2
        qpos[height] -= contact_points(model, qpos, qvel)[0].min() + 0.01  # the lowest point 1 cm inside
    return model, qpos, qvel, actuator_force(model, ctrl)


def assert_solves(A, x, b):
    assert abs(A @ x - b).max() < 1e-14 * (abs(A) @ abs(x)).max()  # the rounding of A x, no more
    # a dense solver's x, but for what the condition makes of rounding: within 1e-12 at a condition of 1e5
    assert relative(x, torch.linalg.solve(A, b)) < 1e-14 + 1e-17 * float(torch.linalg.cond(A))


@pytest.mark.parametrize("source", [*ROBOTS, *range(12)])
def test_a_substep_solves_the_dense_equation(source):
    model, qpos, qvel, qfrc = state_on_the_ground(source)
    q, v, tau = split(qpos, model.qpos_rows), split(qvel, model.dof_rows), split(qfrc, model.dof_rows)
    frames = forward_kinematics(model, q)
    equation = assemble(model, frames, q, v, tau, model.timestep)
    A, b = dense(model, equation, qpos)
    assert_solves(A, forward_substep(model, qpos, qvel, qfrc)[1][:, 0], b)
    rhs, other = torch.tensor(np.random.default_rng(5).normal(size=(2, model.nv, 1)))
    lam = solve(model, frames, equation, [None] * len(frames), split(rhs, model.dof_rows))  # the adjoint's call
    assert_solves(A, join(lam, model.dof_rows)[:, 0], rhs[:, 0])
    scalar = residual(model, frames, equation, split(rhs, model.dof_rows), split(other, model.dof_rows))
    assert relative(scalar, other[:, 0] @ (b - A @ rhs[:, 0])) < 1e-12
    # what A is made of: mass, damping and positive weights, no more
    free, m = free_of_constraints(model)
    equation = assemble(free, frames, q, v, tau, model.timestep)
    rest = dense(free, equation, qpos)[0] - diffsim.mass_matrix(model, qpos)[:, :, 0]
    assert relative(rest, np.diag(model.timestep * m.dof_damping)) < 1e-9 or abs(rest).max() < 1e-12
    assert float(torch.linalg.eigvalsh(A - dense(free, equation, qpos)[0])[0]) > -1e-9 * float(A.abs().max())


@pytest.mark.parametrize("source", ["ant", "humanoid", 1])
def test_the_states_of_the_dense_equation_touch_and_pass_stops(source):
    model, qpos, qvel, _ = state_on_the_ground(source)
    assert float(contact_points(model, qpos, qvel)[0].min()) < 0
    if isinstance(source, str):
        angles = [(g, qpos[g.qpos[0]]) for g in model.groups if g.limit_k is not None]
        assert any(bool(((x < g.limit_low) | (x > g.limit_high)).any()) for g, x in angles)


@pytest.mark.parametrize("release", [0.005, math.inf])
def test_the_law_is_its_force_linearised_at_the_end_of_the_substep(release):
    k, d, s, h = 1500.0, 5.0, 0.003, 0.004
    gap = torch.linspace(-0.01, 0.01, 9).double().repeat(9, 1).requires_grad_()
    speed = torch.linspace(-1.1, 1, 9).double()[:, None].repeat(1, 9).requires_grad_()  # from 1 / d = 0.2 on: no force
    force, weight, impulse = normal_law(gap, speed, k, d, s, h, release)
    depth = s * torch.log1p(torch.exp(-gap / s))
    bound = 1.0 if release == math.inf else torch.where(speed > 0, release / (release + depth), 1.0)
    expected = k * depth * (1 - d * bound * speed).clamp(min=0)
    torch.testing.assert_close(force, expected)
    by_gap, by_speed = torch.autograd.grad(expected.sum(), (gap, speed))
    for new_speed in (-0.7, 0.0, 0.3):
        linear = h * (expected + by_gap * h * new_speed + by_speed * (new_speed - speed))
        torch.testing.assert_close(impulse - weight * new_speed, linear)
    assert float(force.min()) == 0.0 and float(weight.min()) == 0.0 and float(weight.max()) > 0.01
    vx, vy, mu, slip = gap * 50, speed, 0.8, 0.02
    pull = friction_weight(force, vx**2 + vy**2, mu, slip, h) * torch.stack([vx, vy])
    size = torch.sqrt(vx**2 + vy**2)
    torch.testing.assert_close(pull.norm(dim=0), h * mu * force * size / torch.sqrt(size**2 + slip**2))


def test_second_derivatives_raise_one_line():
    model, qpos, qvel, _ = state_on_the_ground("hopper")
    ctrl = torch.zeros(model.nu, 1).double()

    def energy(qvel):
        return diffsim.step(model, qpos, qvel, ctrl)[1].square().sum()

    with pytest.raises(RuntimeError, match="differentiable once") as error:
        torch.autograd.functional.hessian(energy, qvel)
    assert "\n" not in str(error.value)
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="autograd.Function"):
            transform(energy)(qvel)


BLOCK = """<mujoco><option timestep=".002" gravity="{g} 0 -9.81"/><worldbody>
<geom type="plane" size="1 1 1" friction=".5"/>
<body pos="0 0 .1"><freejoint/><geom type="box" size=".1 .1 .1" mass="2" friction=".5"/></body></worldbody></mujoco>"""


def test_resting_weight_and_friction():
    model = diffsim.load_model(BLOCK.format(g=0), dtype=torch.float64)
    ctrl = torch.zeros(0, 1, dtype=torch.float64)
    qpos, qvel = torch.tensor(model.mj_model.qpos0)[:, None], torch.zeros(6, 1, dtype=torch.float64)
    for _ in range(1500):
        qpos, qvel = diffsim.step(model, qpos, qvel, ctrl)
    force = diffsim.contact_force(model, qpos, qvel)
    assert float(force[2].sum()) == pytest.approx(2 * 9.81, rel=0.01)
    assert float(contact_points(model, qpos, qvel)[0].min()) > -0.01
    mu = 0.5
    qvel[0] = 3.0
    for _ in range(100):  # settle into sliding
        qpos, qvel = diffsim.step(model, qpos, qvel, ctrl)
    before = float(qvel[0])
    for _ in range(50):
        qpos, qvel = diffsim.step(model, qpos, qvel, ctrl)
    assert (before - float(qvel[0])) / (50 * 0.002) == pytest.approx(mu * 9.81, rel=0.02)


def test_what_is_deep_comes_out_in_the_time_constant_of_its_contact():
    """With a damping that rises with the depth it leaves at 1 / d at most: 7 cm take 0.4 s, and feet stick."""
    xml = """<mujoco><option timestep=".004"/><worldbody><geom type="plane" size="1 1 1"/><body pos="0 0 .03">
    <joint type="slide" axis="0 0 1"/><geom size=".03" mass="1"/></body></worldbody></mujoco>"""
    after = []
    for release in (diffsim.Softness.release_depth, math.inf):
        model = diffsim.load_model(xml, dtype=torch.float64, softness=diffsim.Softness(release_depth=release))
        qpos, qvel = torch.tensor([[-0.07]]).double(), torch.zeros(1, 1).double()
        for _ in range(10):  # two time constants
            qpos, qvel = diffsim.step(model, qpos, qvel, torch.zeros(0, 1).double())
        after.append(float(contact_points(model, qpos, qvel)[0]))
    assert after[0] > -0.015 and after[1] < -0.06


def test_a_stop_bears_what_pushes_against_it():
    xml = """<mujoco><option timestep=".002" gravity="0 0 0"/><worldbody><body>
    <joint name="j" axis="0 1 0" limited="true" range="-30 20" damping="20"/><geom size=".1" pos="0 0 -1" contype="0"
    conaffinity="0" mass="1"/></body></worldbody><actuator><motor joint="j"/></actuator></mujoco>"""
    model = diffsim.load_model(xml, dtype=torch.float64)
    (g,) = model.groups
    torque = torch.tensor([[3.0, -3.0]]).double()  # one environment against each stop
    q, v = torch.tensor([[0.34, -0.51]]).double(), torch.zeros(1, 2).double()
    for _ in range(800):
        q, v = diffsim.step(model, q, v, torque)
    gap = torch.stack([g.limit_high[0, 0] - q[0, 0], q[0, 1] - g.limit_low[0, 0]])
    force, _, _ = normal_law(gap, 0 * gap, g.limit_k[0], g.limit_damping[0], model.softness.limit_width, 0.002)
    torch.testing.assert_close(force, torque[0].abs(), rtol=1e-3, atol=0)
    assert float(gap.abs().max()) < 0.05


def beside_mujoco(xml: str, ctrl: list[float], steps: int, qpos=0.0):
    """Where both come to from rest at qpos: (nq,), (nq,)."""
    model = diffsim.load_model(xml, dtype=torch.float64)
    q, v = (torch.full((n, 1), x).double() for n, x in ((model.nq, qpos), (model.nv, 0.0)))
    data = mujoco.MjData(model.mj_model)
    data.ctrl[:], data.qpos[:] = ctrl, qpos
    for _ in range(steps):
        q, v = diffsim.step(model, q, v, torch.tensor(ctrl).double()[:, None])
        mujoco.mj_step(model.mj_model, data)
    return q[:, 0].numpy(), data.qpos


@pytest.mark.parametrize(
    "height, joint, geom, ctrl",
    [(0.09, "0 0 1", 'type="box" size=".1 .1 .04"', 1.0), (0.15, "0 1 0", 'size=".1"', 0.1)],
    ids=["turret", "wheel"],
)
def test_a_body_that_turns_about_its_centre_turns_above_the_ground(height, joint, geom, ctrl):
    """MuJoCo's inverse weight of it is 0: contacts as stiff as that would hold it, centimetres above the ground."""
    xml = f"""<mujoco><option timestep=".004"/><worldbody><geom type="plane" size="1 1 1"/><body pos="0 0 {height}">
    <joint name="j" axis="{joint}" damping=".1"/><geom {geom} mass="2"/></body></worldbody>
    <actuator><motor joint="j"/></actuator></mujoco>"""
    ours, theirs = beside_mujoco(xml, [ctrl], 100)
    assert theirs > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0.01)


def test_a_geared_joint_presses_as_a_heavy_body():
    """Armature makes the arm heavier at its tip than all its mass: contacts are as stiff as that asks for."""
    xml = """<mujoco><option timestep=".002"/><worldbody><geom type="plane" size="1 1 1"/><body pos="0 0 .05">
    <joint name="j" axis="0 1 0" armature="30"/><geom type="capsule" fromto="0 0 0 1 0 0" size=".02" mass="1"
    contype="0" conaffinity="0"/><geom pos="1 0 0" size=".05" mass=".01"/></body></worldbody>
    <actuator><motor joint="j"/></actuator></mujoco>"""
    ours, theirs = beside_mujoco(xml, [300.0], 1500)
    assert 0 < theirs < 1e-3 and 0 < ours < 2e-3  # rad


def test_a_hard_core_in_a_soft_skin_carries():
    xml = """<mujoco><option timestep=".002"/><worldbody><geom type="plane" size="1 1 1"/><body pos="0 0 .1">
    <joint type="slide" axis="0 0 1"/><geom name="skin" size=".1" mass="1" solref=".5 1"/>
    <geom name="core" size=".095" mass="1e-6" solref=".01 1"/><geom name="within" size=".05" mass="1e-6" solref=".5 1"/>
    </body></worldbody></mujoco>"""
    ours, theirs = beside_mujoco(xml, [], 1500)
    assert diffsim.load_model(xml).contact_names == ["skin", "core"]
    np.testing.assert_allclose(ours, theirs, atol=0.005)


def test_a_short_slide_closes():
    """The stops of a gripper's finger, whose stroke is 4 cm, act over a millimetre or two."""
    xml = """<mujoco><option timestep=".004" gravity="0 0 0"/><worldbody><body><joint name="f" type="slide" axis="0 0 1"
    range="0 .04" damping="1"/><geom type="box" size=".01 .01 .02" mass=".1"/></body></worldbody><actuator>
    <motor joint="f"/></actuator></mujoco>"""
    for force in (-5.0, -1.0, 1.0, 5.0):
        ours, theirs = beside_mujoco(xml, [force], 200, qpos=0.02)
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_pendulum_keeps_its_energy_to_first_order():
    xml = """<mujoco><worldbody><body><joint axis="0 1 0"/><geom type="sphere" size=".05" pos="0 0 -1"
    contype="0" conaffinity="0"/></body></worldbody></mujoco>"""

    def drift(h):
        model = diffsim.load_model(xml, dtype=torch.float64, timestep=h)
        q, v = torch.tensor([[1.0]]).double(), torch.zeros(1, 1).double()
        inertia = float(diffsim.mass_matrix(model, q)[0, 0, 0])
        mass = float(model.mj_model.body_mass[1])
        energy = lambda: 0.5 * inertia * float(v) ** 2 - mass * 9.81 * math.cos(float(q))  # noqa: E731
        start = energy()
        for _ in range(round(0.6 / h)):
            q, v = diffsim.step(model, q, v, torch.zeros(0, 1).double())
        return abs(energy() - start)

    coarse, fine = drift(0.004), drift(0.002)
    assert fine < coarse
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.2)


def test_what_does_not_matter_is_ignored():
    with pytest.raises(diffsim.UnsupportedError, match="fluid"):
        diffsim.load_model(GYMNASIUM_ASSETS / "swimmer.xml")
    xml = """<mujoco><worldbody><light/><camera/><geom type="plane" size="1 1 1"/><body><joint/><site name="s"/>
    <geom size=".1" contype="0" conaffinity="0"/><geom type="cylinder" size=".1 .1" contype="0" conaffinity="0"/>
    </body></worldbody><sensor><framepos objtype="site" objname="s"/></sensor></mujoco>"""
    assert diffsim.load_model(xml).contact_names == []


@pytest.mark.parametrize("source", ["ant", "hopper"])
def test_gradcheck_of_every_stage(source):
    model = load(source)
    qpos, qvel, _ = random_state(model.mj_model, 1)
    if source == "ant":
        qpos[2] = 0.3
    q, v = qpos.requires_grad_(), qvel.requires_grad_()
    check = lambda f, *x: torch.autograd.gradcheck(f, x, eps=1e-7, atol=1e-5, rtol=1e-4)  # noqa: E731
    check(lambda q: diffsim.mass_matrix(model, q), q)
    check(lambda q, v: diffsim.bias_force(model, q, v), q, v)
    check(lambda q, v: integrate(model, q, v, 0.01), q, v)
    if model.contact_names:
        check(lambda q, v: diffsim.contact_force(model, q, v) / 1e3, q, v)
    gap, u = (
        torch.linspace(-0.01, 0.01, 9).double().requires_grad_(),
        torch.linspace(-1, 1, 9).double().requires_grad_(),
    )
    for release in (0.005, math.inf):
        check(lambda g, s: normal_law(g, s, 1500.0, 5.0, 0.003, 0.004, release), gap, u + 0.01)  # noqa: B023
    force = torch.linspace(0.1, 5, 9).double().requires_grad_()
    check(lambda f, x, y: friction_weight(f, x * x + y * y, 0.8, 0.02, 0.004), force, u, gap)


def test_a_point_that_slides_has_a_gradient_and_can_be_compiled():
    """Nothing in its step depends on where it is."""
    xml = """<mujoco><worldbody><body><joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide"
    axis="0 1 0"/><geom size=".1" mass="1"/></body></worldbody><actuator><motor joint="x"/><motor joint="y"/></actuator>
    </mujoco>"""
    model = diffsim.load_model(xml, dtype=torch.float64)
    qpos, ctrl = torch.zeros(2, 1).double(), torch.ones(2, 1, requires_grad=True, dtype=torch.float64)
    new, _ = diffsim.step(model, qpos, torch.zeros(2, 1).double(), ctrl)
    (gradient,) = torch.autograd.grad(new.sum(), ctrl)
    torch.testing.assert_close(gradient, torch.full((2, 1), model.timestep**2).double())
    assert codegen.generate(model, False)


def test_a_sphere_within_another_counts_where_their_friction_differs():
    geoms = '<geom size=".1" friction="1" condim="{}"/><geom size=".1" mass="0" friction="{}" condim="{}"/>'
    xml = """<mujoco><worldbody><geom type="plane" size="1 1 1" condim="1"/><body pos="0 0 .1"><freejoint/>{}</body>
    </worldbody></mujoco>"""
    alike = diffsim.load_model(xml.format(geoms.format(3, 1, 3)))
    other = diffsim.load_model(xml.format(geoms.format(1, 1, 3)))
    assert (len(alike.contact_names), len(other.contact_names)) == (1, 2)
