"""MuJoCo's physics with diffsim's derivatives: the value is MuJoCo's, the gradient diffsim's at the same state."""

import copy
import math

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

import diffsim
from diffsim import DiffEnv, Softness
from diffsim.mujoco_physics import MujocoPhysics, RealValue, motions
from diffsim.physics import DiffsimPhysics
from diffsim.play import playback_env
from diffsim.tasks import find_task
from tests import TINY, WINDOWS, rows, run_script, the_run


def landed(name, **kwargs):
    """Environments some steps into an episode, with feet on the ground."""
    env = diffsim.make(name, 3, seed=2, physics="mujoco", compile=False, dtype=torch.float64, **kwargs)
    env.reset()
    for _ in range(30):
        env.step(0.5 * torch.ones(3, env.model.nu))
    return env


@pytest.mark.parametrize("name", list(diffsim.TASKS))
def test_the_next_state_is_mujocos(name):
    env = landed(name)
    qpos, qvel = env.qpos.clone(), env.qvel.clone()
    action = torch.linspace(-1, 1, env.model.nu, dtype=torch.float64).repeat(3, 1).requires_grad_()
    env.step(action)
    m = env.model.mj_model
    if not env.task.own_integrator:
        m.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    d = mujoco.MjData(m)
    for i in range(3):
        mujoco.mj_resetData(m, d)
        d.qpos, d.qvel = qpos[:, i].numpy(), qvel[:, i].numpy()
        low, high = np.where(m.actuator_ctrllimited[:, None], m.actuator_ctrlrange, [[-1, 1]]).T
        d.ctrl = (low + high) / 2 + (high - low) / 2 * action[i].detach().numpy()
        mujoco.mj_step(m, d, env.substeps)
        np.testing.assert_allclose(env.qpos[:, i].detach(), d.qpos, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(env.qvel[:, i].detach(), d.qvel, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["hopper", "ant", "humanoid"])
def test_the_gradient_is_diffsims_at_that_state(name):
    env = landed(name)
    start = env.get_state()
    action = (0.3 * torch.ones(3, env.model.nu, dtype=torch.float64)).requires_grad_()
    free = env.model.mj_model.jnt_type[0] == 0
    torch.manual_seed(0)
    of_qpos, of_qvel = torch.randn(env.model.nq, 3).double(), torch.randn(env.model.nv, 3).double()
    if free:
        of_qpos[3:7] = 0  # directions off the unit sphere are no rotations: see the next test
    gradients, softness = [], Softness(0.6, limit_stiffness=1.0, release_depth=math.inf).widened(3.0)
    assert softness == diffsim.make(name, 3, physics="mujoco", compile=False).model.softness
    for physics in ("mujoco", "diffsim"):
        env = DiffEnv(find_task(name), 3, physics=physics, compile=False, dtype=torch.float64, softness=softness)
        env.set_state(start)
        env.step(action)
        loss = (env.qpos * of_qpos).sum() + (env.qvel * of_qvel).sum()
        gradients.append(torch.autograd.grad(loss, action)[0])
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_a_rotations_gradient_moves_to_the_predicted_quaternion():
    """The cotangent at the real quaternion and the one handed on agree on every rotation in body axes."""
    torch.manual_seed(0)
    predicted, real = (torch.nn.functional.normalize(torch.randn(4, 5).double(), dim=0) for _ in range(2))
    predicted.requires_grad_()
    g = torch.randn(4, 5).double()
    qpos, _ = RealValue.apply(predicted, torch.zeros(1, 5).double(), real, torch.zeros(1, 5).double(), [0])
    assert torch.equal(qpos, real)
    (handed_on,) = torch.autograd.grad((qpos * g).sum(), predicted)
    for i in range(5):
        for axis in np.eye(3):
            turned = []
            for quat in (real[:, i], predicted[:, i].detach()):
                delta, out = np.zeros(4), np.zeros(4)
                mujoco.mju_axisAngle2Quat(delta, axis, 1e-6)
                mujoco.mju_mulQuat(out, quat.numpy(), delta)
                turned.append((out - quat.numpy()) / 1e-6)
            assert turned[0] @ g[:, i].numpy() == pytest.approx(turned[1] @ handed_on[:, i].numpy(), abs=1e-5)


def test_no_graph_means_no_differentiator():
    env = diffsim.make("hopper", 2, physics="mujoco")
    env.reset()
    with torch.no_grad():
        _, reward, *_ = env.step(torch.zeros(2, 3))
    assert not reward.requires_grad and env.physics.mismatch is None and env.physics._differentiator is None


def test_mismatch_is_the_engines_difference():
    env = landed("hopper")
    start = env.get_state()
    action = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    env.step(action)
    soft = DiffEnv(find_task("hopper"), 3, compile=False, dtype=torch.float64, softness=env.model.softness)
    soft.set_state(start)
    soft.step(action)
    joint = (soft.qpos - env.qpos)[3:].detach().abs().mean()
    base = (soft.qvel - env.qvel)[:2].detach().norm(dim=0).mean()
    expected = {"physics/mismatch_joint": float(joint), "physics/mismatch_base": float(base)}
    assert env.diagnostics() == pytest.approx(expected, rel=1e-9) and min(expected.values()) > 0
    assert soft.diagnostics() == {}


@pytest.mark.parametrize("script", WINDOWS)
def test_a_script_trains_on_mujoco_and_logs_the_mismatch(script, tmp_path):
    """Softness reaches the gradient and not the trajectory."""
    found = []
    for smoothing in (1, 3):
        where = tmp_path / f"{smoothing}"
        flags = [*TINY, "--env", "hopper", "--physics", "mujoco", "--smoothing", smoothing, "--run-dir", where]
        run_script(script, *flags, "--horizon", 6, "--stop-after", 1, "--no-stagger")
        found.append(rows(where)[0])
    assert all(float(row[f"mismatch_{part}"]) > 0 for row in found for part in ("joint", "base"))
    assert found[0]["value_loss"] == found[1]["value_loss"]  # of the first window: the same rewards
    assert found[0]["norm_before_clip"] != found[1]["norm_before_clip"]
    saved = torch.load(the_run(tmp_path / "3") / "checkpoint.pt", weights_only=True)
    assert (saved["args"]["physics"], saved["args"]["smoothing"]) == ("mujoco", 3)


TWINS = ["Ant-v5", "Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Humanoid-v5"]


# --- MuJoCo's own derivative --------------------------------------------------------------------------------------
FLYING = """<mujoco><option timestep="0.005"/><default><geom size="0.1" contype="0"/><joint damping="0.2"/></default>
<worldbody><body><freejoint/><geom type="box" size="0.1 0.2 0.3"/><body pos="0 0 0.3"><joint type="ball"/>
<geom pos="0.1 0 0.2"/><body pos="0 0 0.3"><joint name="j" axis="1 1 0" stiffness="3"/><geom pos="0 0.2 0.1"/></body>
</body></body></worldbody><actuator><motor joint="j" ctrlrange="-1 1" gear="3"/></actuator></mujoco>"""


def test_without_contacts_the_engines_have_the_same_derivative():
    """Where MuJoCo and diffsim move alike; a control at either end of its range has a slope, too."""
    model = diffsim.load_model(FLYING, dtype=torch.float64)
    shapes, found = ((model.nq, 3), (model.nv, 3)), []
    qpos, qvel = (torch.randn(shape).double() for shape in shapes)
    for row in (3, 7):
        qpos[row : row + 4] /= qpos[row : row + 4].norm(dim=0)
    start = [x.requires_grad_() for x in (qpos, qvel, torch.tensor([[-1.0, 0.3, 1.0]]).double())]
    cotangents = [torch.randn(shape).double() for shape in shapes]
    for differentiator in (lambda: DiffsimPhysics(model, 4, compile=False), None):
        end = MujocoPhysics(model, 4, differentiator).step(*start)
        of_qpos, *others = torch.autograd.grad(end, start, cotangents)
        of_dofs = torch.einsum("kib,ib->kb", motions(model, qpos.detach()), of_qpos)
        found.append(torch.cat([of_dofs, *others]))
    assert found[0].abs().min() > 0
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["hopper", "Ant-v5"])
def test_a_windows_gradient_is_mujocos(name):
    """With feet on the ground, against central differences of the window's return."""
    env = landed(name, derivative="mujoco")
    start = env.get_state()
    actions = (torch.rand(5, 3, env.model.nu).double() - 0.5).requires_grad_()

    def returns(actions):
        env.set_state(start)
        return sum(env.step(action)[1] for action in actions)

    (gradient,) = torch.autograd.grad(returns(actions).sum(), actions)
    direction = torch.randn_like(actions)
    with torch.no_grad():
        difference = (returns(actions + 1e-6 * direction) - returns(actions - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum((0, 2)), difference, rtol=1e-3, atol=1e-4)


def test_mujocos_derivative_is_the_first():
    env = diffsim.make("hopper", 1, physics="mujoco", derivative="mujoco")  # needs nothing compiled
    _, reward, *_ = env.step(action := torch.zeros(1, 3, requires_grad=True))
    assert env.diagnostics() == {}
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(reward.sum(), action, create_graph=True)


def where(reference) -> float:
    """x of Gymnasium's robot at its qpos, of its centre of mass if it is the humanoid."""
    robot, data = reference.unwrapped.model, reference.unwrapped.data
    if reference.spec.id != "Humanoid-v5":
        return data.qpos[0]
    data = copy.copy(data)
    mujoco.mj_kinematics(robot, data)
    return robot.body_mass @ data.xipos[:, 0] / robot.body_mass.sum()


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_gymnasiums_environment(name):
    env = diffsim.make(name, 1, physics="mujoco", dtype=torch.float64)
    env.reset(seed=1)
    kwargs = dict(env.task.gymnasium_kwargs)
    if name in ("Ant-v5", "Humanoid-v5"):
        kwargs["contact_cost_weight"] = 0.0
    reference = gymnasium.make(name, **kwargs)
    reference.reset(seed=0)
    assert reference.unwrapped.dt == pytest.approx(env.control_dt)
    rng = np.random.default_rng(0)
    ended = False
    for _ in range(100):
        reference.unwrapped.set_state(env.qpos[:, 0].numpy(), env.qvel[:, 0].numpy())
        action = rng.uniform(-1, 1, env.model.nu)
        with torch.no_grad():
            _, reward, terminated, _, info = env.step(torch.from_numpy(action)[None])
        before = where(reference)
        obs, expected, ends, _, parts = reference.step(action * reference.action_space.high)
        if "contact_cost_weight" in kwargs:  # the speed of where qpos is, not of body positions, which lag behind it
            speed = (where(reference) - before) / env.control_dt
            expected += reference.unwrapped._forward_reward_weight * speed - parts["reward_forward"]
        np.testing.assert_allclose(info["final_obs"][0], obs, rtol=1e-6, atol=1e-6)
        assert float(reward[0]) == pytest.approx(float(expected), abs=1e-6) and bool(terminated[0]) == ends
        ended |= ends
    assert ended or name == "HalfCheetah-v5"
    obs, _ = env.reset()
    assert obs.shape == (1, reference.observation_space.shape[0])


def test_gymnasiums_robots_have_the_observations_and_actions_of_their_twins():
    """Without contact forces, actions in [-1, 1], whether it is trained on or played."""
    for name, size in (("Ant-v5", 27), ("Humanoid-v5", 45)):
        for env in (diffsim.make(name, physics="gymnasium"), playback_env(name, 1, "gymnasium")):
            assert env.single_observation_space.shape == (size,)
            assert (env.single_action_space.high == 1).all()
    env.reset(seed=3)
    reference = gymnasium.make("Humanoid-v5", **diffsim.TASKS["Humanoid-v5"].gymnasium_kwargs)
    reference.reset(seed=3)
    action = torch.linspace(-1, 1, 17)[None]
    obs, expected = env.step(action)[4]["final_obs"][0], reference.step(0.4 * action[0].numpy())[0]
    np.testing.assert_allclose(obs, expected, rtol=1e-4, atol=1e-5)


def test_the_engine_of_a_task_is_its_own_unless_asked_otherwise():
    for name in diffsim.TASKS:
        assert diffsim.default_physics(name) == ("mujoco" if name in TWINS else "diffsim")
    assert diffsim.default_physics("Pendulum-v1") == "gymnasium"
    engines = {p: type(diffsim.make("Hopper-v5", 1, physics=p, compile=False)).__name__ for p in diffsim.PHYSICS}
    assert engines == dict(diffsim="DiffEnv", mujoco="DiffEnv", gymnasium="GymnasiumEnv")
    env = diffsim.make("Hopper-v5", 1, compile=False)
    assert type(env.physics).__name__ == "MujocoPhysics" and env.model.softness.stiffness == 0.6
    assert diffsim.make("hopper", 1, compile=False).model.softness == diffsim.Softness()
    soft = diffsim.make("hopper", 1, stiffness=0.3, smoothing=2.0, compile=False).model.softness
    assert soft == diffsim.Softness(0.3).widened(2.0) != diffsim.Softness()


@pytest.mark.parametrize("name", diffsim.TASKS)
def test_every_task_tells_how_far_the_engines_are_apart(name):
    env = diffsim.make(name, 2, physics="mujoco", compile=False)
    env.reset()
    env.step(torch.zeros(env.action_space.shape, requires_grad=True))
    assert all(0 <= x < 1 for x in env.diagnostics().values()) and len(env.diagnostics()) == 2


def test_what_explodes_in_mujoco_ends_its_episode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = diffsim.make("ant", 3, physics="mujoco", compile=False)
    env.reset()
    state = env.get_state()
    state["qvel"][3, 1] = 1e12
    env.set_state(state)
    with pytest.warns(UserWarning, match="1 environment.s. ended: a speed of environment 1 came to 1000"):
        _, _, terminated, _, info = env.step(torch.zeros(3, 8))
    assert terminated.tolist() == info["nonfinite"].tolist() == [False, True, False]
    assert not list(tmp_path.iterdir())  # MuJoCo would keep a log of it


@pytest.mark.parametrize(
    "name, value, instead",
    [("reward", lambda *_: 0.0, "transition_reward"), ("control_dt", 0.05, "frame_skip and"), ("substeps", 2, "frame")],
)
def test_what_a_twin_does_not_ask_is_named(name, value, instead):
    with pytest.raises(ValueError, match=rf"Calm.{name} is never asked on a Gymnasium task; write {instead}"):
        type("Calm", (diffsim.TASKS["Hopper-v5"],), {name: value})
