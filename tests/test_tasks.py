"""Every task: shapes, rewards at states computed by hand, termination, gradients, the same task on both engines."""

import csv
import math
import subprocess
import sys
import textwrap

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import diffsim
from diffsim.play import playback_env, starts
from tests import ROOT

NAMES = list(diffsim.TASKS)
SIZES = dict(cartpole=(5, 1), hopper=(11, 3), cheetah=(17, 6), walker=(17, 6), ant=(37, 8))
SIZES |= dict(anymal=(49, 12), humanoid=(76, 21))
SIZES |= {"Ant-v5": (27, 8), "Hopper-v5": (11, 3), "HalfCheetah-v5": (17, 6), "Walker2d-v5": (17, 6)}


def make(name, num_envs=2, **kwargs):
    env = diffsim.make(name, num_envs, seed=4, compile=False, **kwargs)
    env.reset()
    return env


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_finite_gradients_through_32_steps(name):
    env = make(name)
    obs_dim, act_dim = SIZES[name]
    assert env.observation_space.shape == (2, obs_dim) and env.action_space.shape == (2, act_dim)
    actions = (0.2 * torch.randn(32, 2, act_dim)).requires_grad_()
    total = 0.0
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        assert obs.shape == info["final_obs"].shape == (2, obs_dim) and torch.isfinite(obs).all()
        assert reward.shape == terminated.shape == truncated.shape == (2,)
        total = total + reward.sum()
    (gradient,) = torch.autograd.grad(total, actions)
    assert torch.isfinite(gradient).all() and gradient[0].abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_both_engines_observe_and_reward_a_state_alike(name):
    soft, hard = make(name), make(name, physics="mujoco")
    action = torch.rand(2, SIZES[name][1]) * 2 - 1
    hard.step(action)
    soft.set_state(hard.get_state())
    torch.testing.assert_close(soft.detach(), hard.detach(), atol=1e-5, rtol=1e-5)
    task, state = soft.task, (hard.qpos, hard.qvel, action.T)
    rewards = [t.transition_reward(hard.qpos - 0.01, *state) for t in (task, hard.task)]
    torch.testing.assert_close(*rewards)
    for env in (soft, hard):  # and one control step later they are still close
        env.step(action)
    assert float((soft.qpos - hard.qpos).abs().max()) < 0.1


def state(env, qpos=None, qvel=None):
    """The initial pose at rest with some rows changed, one environment."""
    q = torch.tensor(env.model.mj_model.qpos0, dtype=torch.float32)[:, None]
    v = torch.zeros(env.model.nv, 1)
    for x, rows in ((q, qpos or {}), (v, qvel or {})):
        for row, value in rows.items():
            x[row] = value
    return q, v


TILT = (math.cos(0.15), 0.0, math.sin(0.15), 0.0)  # 0.3 rad about y: both cosines are cos(0.3)
HEADING = 1.1 * math.cos(0.3)


@pytest.mark.parametrize(
    "name, qpos, qvel, expected",
    [
        ("cartpole", {0: 2.0, 1: math.pi + 1.0}, {0: 0.5, 1: -1.5}, -((math.pi - 1) ** 2) - 0.2 - 0.025 - 0.225),
        ("hopper", {1: 1.25 - 0.2, 2: 0.1}, {0: 3.0}, 3.0 + 0.1 + 1 - (0.6 / math.pi) ** 2 - 0.1 * 3 * 0.25),
        ("hopper", {1: 1.25 - 0.4}, {0: 1.0}, 1.0 - 200 * 0.01 + 1 - 0.1 * 3 * 0.25),
        ("walker", {1: 1.25 + 0.2}, {0: 2.0}, 2.0 + 0.3 + 1 - 0.1 * 6 * 0.25),
        ("cheetah", {0: 9.0}, {0: 4.0, 1: 1.0}, 4.0 - 0.1 * 6 * 0.25),
        ("ant", {2: 0.6, **dict(zip((3, 4, 5, 6), TILT))}, {0: 5.0}, 5.0 + HEADING + 0.33),
        ("anymal", {2: 0.5, **dict(zip((3, 4, 5, 6), TILT))}, {0: 2.0}, 2.0 + HEADING + 0.25 - 0.005 * 12 * 0.25),
        ("humanoid", {2: 1.3, **dict(zip((3, 4, 5, 6), TILT))}, {0: 2.0}, 2.0 + HEADING + 1 - 0.002 * 21 * 0.25),
        ("humanoid", {2: 0.8}, {0: 0.0}, 1.1 - 200 * 0.0016 - 0.002 * 21 * 0.25),
    ],
)
def test_reward_of_a_state_computed_by_hand(name, qpos, qvel, expected):
    env = make(name, 1)
    q, v = state(env, qpos, qvel)
    action = torch.full((env.model.nu, 1), 0.5)
    assert float(env.task.reward(q, v, action)) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    "name, row, alive, fallen",
    [("hopper", 1, 0.81, 0.79), ("walker", 1, 0.81, 0.79), ("ant", 2, 0.28, 0.26), ("anymal", 2, 0.26, 0.24),
     ("humanoid", 2, 0.75, 0.73), ("cheetah", 1, -0.5, None), ("cartpole", 0, 3.9, None)],
)  # fmt: skip
def test_termination(name, row, alive, fallen):
    env = make(name, 1)
    assert not env.task.terminated(*state(env, {row: alive}))
    assert fallen is None or env.task.terminated(*state(env, {row: fallen}))


def test_anymal_has_the_robots_mass_and_stands_on_its_feet():
    env = make("anymal", 1)
    assert env.model.mj_model.body_subtreemass[0] == pytest.approx(44.95, abs=0.1)  # 19.2 + 4 (2.78 + 3.07 + .588)
    for _ in range(120):
        env.step(torch.zeros(1, 12))
    force = diffsim.contact_force(env.model, env.qpos, env.qvel)[2].sum()
    assert env.episode_length[0] == 120 and float(force) == pytest.approx(44.95 * 9.81, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_make_passes_its_checker(name):
    with pytest.warns(UserWarning, match="infinity|inf"):  # unbounded observations, on purpose
        check_env(gymnasium.make(f"diffsim/{name}").unwrapped)


def test_numpy_view_is_the_same_environment():
    tensors, arrays = make("hopper"), make("hopper").numpy()
    (a, _), (b, _) = tensors.reset(seed=1), arrays.reset(seed=1)
    np.testing.assert_array_equal(a, b)
    for _ in range(70):  # a hopper that does nothing falls in a second
        action = np.zeros((2, 3), np.float32)
        a, ra, *_ = tensors.step(torch.from_numpy(action))
        b, rb, terminated, truncated, info = arrays.step(action)
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(ra, rb)
        assert isinstance(b, np.ndarray) and bool(info) == bool((terminated | truncated).any())
        if info:
            assert info["final_obs"][info["_final_obs"]][0, 0] < 0.81
            assert (info["final_info"]["episode"]["l"][info["_final_info"]] > 10).all()
            break
    else:
        raise AssertionError("no hopper fell")


@pytest.fixture
def reach(tmp_path):
    """The task of the README, as a user would copy it."""
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python\n# my_task.py\n")[1].split("```")[0]
    assert len(code.splitlines()) < 40
    path = tmp_path / "my_task.py"
    path.write_text(code)
    return f"{path}:Reach"


def test_a_task_from_a_file(reach, tmp_path):
    env = diffsim.make(reach, 3, compile=False)
    assert env.reset()[0].shape == (3, 6)
    assert playback_env(reach, 2).num_envs >= 2
    file = reach.rpartition(":")[0]
    (tmp_path / "broken.py").write_text("1 / 0")
    for name, message in (
        (f"{file}:Reech", "no class Reech"),
        (f"{file}:torch", "no class torch"),
        ("nowhere.py:Reach", "no file nowhere.py"),
        (f"{tmp_path}/broken.py:Reach", "ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            diffsim.make(name)
        assert "\n" not in str(error.value)


def test_shac_learns_a_task_from_a_file(reach, tmp_path):
    flags = "--num-envs 64 --horizon 30 --total-timesteps 60000 --eval-every 10000 --num-threads 1".split()
    command = [sys.executable, "shac.py", "--env", reach, "--run-dir", str(tmp_path / "runs"), *flags]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    with open(next(tmp_path.glob("runs/reach__shac__1__*/metrics.csv"))) as f:
        returns = [float(r["eval_return"]) for r in csv.DictReader(f) if r["eval_return"]]
    assert returns[0] < -35 and returns[-1] > -24  # no policy does much better than -18: the arm is not faster


def test_the_calls_in_the_readme():
    """Under "How a step works", as a user would paste them."""
    readme = (ROOT / "README.md").read_text()
    block = "    import torch, diffsim\n" + readme.split("    import torch, diffsim\n")[1].split("\nAfter ")[0]
    names = {}
    exec(textwrap.dedent(block), names)
    assert names["action"].grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"qpos has shape \(64, 15\), expected \(15, environments\)"):
        diffsim.mass_matrix(names["model"], names["qpos"].T)


def test_playback_starts_alike_on_both_engines_and_in_any_batch():
    soft, hard = (make("hopper", n, physics=p) for n, p in ((8, "diffsim"), (3, "mujoco")))
    for many, few in zip(starts(soft, 4, seed=1), starts(hard, 2, seed=1)):
        assert many.shape[1] == 8 and torch.equal(many[:, :2], few[:, :2]) and torch.equal(many[:, 4:], many[:, :4])
        assert not torch.equal(many[:, 0], many[:, 1])
