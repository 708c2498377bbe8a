"""Every task: shapes, rewards at states computed by hand, termination, gradients, the same task on both engines."""

import math
import sys
import textwrap

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import diffsim
from diffsim.dynamics import contact_points
from diffsim.play import playback_env, rollout, starts
from tests import ROOT

NAMES = list(diffsim.TASKS)
SIZES = dict(cartpole=(5, 1), hopper=(11, 3), cheetah=(17, 6), walker=(17, 6), ant=(37, 8))
SIZES |= dict(anymal=(49, 12), humanoid=(76, 21), push=(16, 2), hand=(72, 16))
SIZES |= {"Ant-v5": (27, 8), "Hopper-v5": (11, 3), "HalfCheetah-v5": (17, 6), "Walker2d-v5": (17, 6)}
SIZES |= {"Humanoid-v5": (45, 17)}


def make(name, num_envs=2, physics="diffsim", **kwargs):
    env = diffsim.make(name, num_envs, seed=4, physics=physics, compile=False, **kwargs)
    env.reset()
    return env


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_finite_gradients_of_a_window_on_the_ground(name):
    env = make(name)
    obs_dim, act_dim = SIZES[name]
    assert env.observation_space.shape == (2, obs_dim) and env.action_space.shape == (2, act_dim)
    touched = False
    with torch.no_grad():  # a third of the time of steps with a gradient
        while not touched:  # until it has come down, where there is a ground
            env.step(0.2 * torch.randn(2, act_dim))
            gap, _ = contact_points(env.model, env.qpos, env.qvel)
            touched = len(gap) == 0 or float(gap.amin(0).max()) < 0.005
            assert env.episode_length.min() > 0  # before it has fallen
    actions = (0.2 * torch.randn(4, 2, act_dim)).requires_grad_()  # not compiled, a step takes a tenth of a second
    total = 0.0
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        assert obs.shape == info["final_obs"].shape == (2, obs_dim) and torch.isfinite(obs).all()
        assert reward.shape == terminated.shape == truncated.shape == (2,)
        total = total + reward.sum()
    (gradient,) = torch.autograd.grad(total, actions)
    assert torch.isfinite(gradient).all() and (gradient.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_both_engines_observe_and_reward_a_state_alike(name):
    soft, hard = make(name), make(name, physics="mujoco")
    action = 0.1 * (torch.rand(2, SIZES[name][1]) * 2 - 1)  # with all their torque walkers differ by up to 0.3 rad
    hard.step(action)
    soft.set_state(hard.get_state())
    torch.testing.assert_close(soft.detach(), hard.detach(), atol=1e-5, rtol=1e-5)
    before = soft.qpos
    for env in (soft, hard):  # one control step later they are still close
        obs, reward, terminated, *_ = env.step(action)
        expected = env.task.transition_reward(before, env.qpos, env.qvel, action.T)
        assert not terminated.any() and not torch.equal(env.qpos, before)
        torch.testing.assert_close(reward, expected)  # of where this engine's step went
        torch.testing.assert_close(obs, env.task.observe(env.qpos, env.qvel, action.T).T)
    assert float((soft.qpos - hard.qpos).abs().max()) < 0.05


@pytest.mark.parametrize(
    "name, before, qpos, qvel, expected",
    [
        ("Hopper-v5", {0: 1.0}, {0: 1.02, 1: 1.2}, {}, 0.02 / 0.008 + 1 - 1e-3 * 3 * 0.25),
        ("Hopper-v5", {0: 1.0}, {0: 1.02, 1: 0.69}, {}, 0.02 / 0.008 - 1e-3 * 3 * 0.25),  # too low to be healthy
        ("HalfCheetah-v5", {0: 1.0}, {0: 0.9}, {}, -0.1 / 0.05 - 0.1 * 6 * 0.25),
        ("Walker2d-v5", {}, {1: 1.2, 2: 1.1}, {}, -1e-3 * 6 * 0.25),  # leans too far
        ("Ant-v5", {0: 0.0}, {0: 0.2, 2: 0.5}, {}, 0.2 / 0.05 + 1 - 0.5 * 8 * 0.25),
        ("Humanoid-v5", {0: 1.0}, {0: 1.03}, {}, 1.25 * 0.03 / 0.015 + 5 - 0.1 * 17 * 0.2**2),
        ("Humanoid-v5", {}, {2: 0.99}, {}, -0.1 * 17 * 0.2**2),  # too low to be healthy
    ],
)
def test_reward_of_a_twins_transition_computed_by_hand(name, before, qpos, qvel, expected):
    env = make(name, 1)
    (q0, _), (q, v) = state(env, before), state(env, qpos, qvel)
    action = torch.full((env.model.nu, 1), 0.5)
    assert float(env.task.transition_reward(q0, q, v, action)) == pytest.approx(expected, abs=2e-4)


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
        ("push", {2: 0.3, 3: 0.4, 10: 0.0}, {}, -0.5 - 0.3 * 0.5 - 0.01 * 2 * 0.25),  # the arm is stretched along x
        ("hand", {18: 0.61, 19: TILT[0], 21: TILT[2]}, {}, 1 / 0.4 - 10 * 0.05 - 2e-4 * 16 * 0.25),
        ("hand", {18: 0.56, 19: 0.9992, 20: 0.04}, {}, 1 / (2 * math.asin(0.04) + 0.1) + 125 - 2e-4 * 16 * 0.25),
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
     ("humanoid", 2, 0.75, 0.73), ("hand", 18, 0.321, 0.319),
     ("cheetah", 1, -0.5, None), ("cartpole", 0, 3.9, None)],
)  # fmt: skip
def test_termination(name, row, alive, fallen):
    env = make(name, 1)
    assert not env.task.terminated(*state(env, {row: alive}))
    assert fallen is None or env.task.terminated(*state(env, {row: fallen}))


def test_a_goal_that_is_reached_gives_way_to_the_next():
    env = make("hand", 2)
    env.qpos[26:30, 0] = env.qpos[19:23, 0]
    goal = env.qpos[23:30].clone()
    state = env.get_state()
    obs, reward, terminated, truncated, info = env.step(torch.zeros(2, 16))
    assert float(reward[0]) > 100 > float(reward[1]) and not terminated.any() and "episode" not in info
    assert torch.equal(obs, info["final_obs"]) and torch.equal(obs[:, 45:52].T, env.qpos[23:30])
    moved = (env.qpos[23:30] - goal).abs()
    assert moved[3:, 0].max() > 0.1 and max(moved[:3].max(), moved[3:, 1].max()) < 1e-6
    env.set_state(state)  # and goes on from a checkpoint with the same goals
    assert torch.equal(env.step(torch.zeros(2, 16))[0], obs)
    env.episode_length[:] = env.max_episode_steps - 1
    info = env.step(torch.zeros(2, 16))[-1]
    assert info["episode"]["successes"].tolist() == [1, 0] and not env.episode_successes.any()


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


def test_a_task_from_a_file(reach, tmp_path):
    env = diffsim.make(reach, 3, compile=False)
    assert env.reset()[0].shape == (3, 6)
    assert torch.isfinite(env.step(torch.ones(3, 2))[1]).all()
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


def test_the_calls_in_the_readme():
    """Of diffsim/README.md, as a user would paste them."""
    readme = (ROOT / "diffsim" / "README.md").read_text()
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


def raises_zero_division(*_):
    return 1 / 0


WITHOUT_ACTUATOR = "<mujoco><worldbody><body><joint/><geom size='1'/></body></worldbody></mujoco>"
BROKEN = [  # of a class that derives from cartpole's: an attribute, its value, what is said
    (
        "reward",
        lambda *_: torch.zeros(1, 2),
        r"\.reward returned shape \(1, 2\) for 2 environments, expected the shape",
    ),
    ("reward", lambda s, q, v, a: q[:1].squeeze(), r"reward returned shape \(\) for 1 environment, expected .* \(1,\)"),
    ("reward", lambda *_: 1.0, r"reward returned a float, expected a tensor of the shape \(2,\)"),
    ("reward", lambda s, q, v, a: q[0].double(), "reward returned torch.float64, expected torch.float32"),
    ("reward", lambda s, q, v, a: q[0] / 0, "reward returned a value that is not finite"),
    ("reward", lambda s, q, v, a: v.add_(1)[0], "reward changes qvel in place"),
    ("reward", lambda s, q, v, a: v.mul_(0).mul_(2)[0], "reward changes qvel in place"),
    (
        "reward",
        lambda s, q, v: q[0],
        r"reward raised TypeError: .* takes 3 .* but 4 .* \(.*test_tasks.py:\d+\)$",
    ),
    ("reward", raises_zero_division, r"reward raised ZeroDivisionError: division by zero \(.*test_tasks.py:\d+\)$"),
    ("reward", diffsim.Task.reward, "does not define reward: see diffsim.Task"),
    ("transition_reward", lambda *_: None, "transition_reward returned a NoneType"),
    ("observe", lambda *_: torch.zeros(2), r"observe returned shape \(2,\)"),
    (
        "observe",
        lambda s, q, v, a: q.T,
        r"observe returned shape \(1, 2\) for 1 environment, expected .* \(2, 1\)",
    ),
    ("observe", lambda s, q, v, a: q[:0], r"observe returned shape \(0, 2\) .* \(obs_dim, 2\)"),
    ("observe", lambda s, q, v, a: q.double(), "observe returned torch.float64, expected torch.float32"),
    ("observe", lambda s, q, v, a: q.to("meta"), "observe returned a tensor on meta, expected one on cpu"),
    ("observe", lambda s, q, v, a: q * math.nan, "observe returned a value that is not finite"),
    ("observe", lambda s, q, v, a: q.mul_(2), "observe changes qpos in place"),
    ("terminated", lambda *_: False, "terminated returned a bool"),
    ("terminated", lambda *_: torch.zeros(2), "terminated returned torch.float32, expected torch.bool"),
    ("reset", lambda *_: (torch.zeros(5, 2), torch.zeros(2, 2)), r"reset returned shape \(5, 2\)"),
    ("reset", lambda *_: (torch.zeros(2, 2),) * 2, r"reset returned shape \(2, 2\) for 1 environment"),
    ("reset", lambda s, m, n, g: torch.zeros(2, n), "reset returned a Tensor, expected two: qpos, qvel"),
    ("reset", lambda s, m, n, g: (torch.zeros(2, n),) * 3, "reset returned 3 values, expected two"),
    (
        "reset",
        lambda s, m, n, g: (torch.zeros(2, n) / 0, torch.zeros(2, n)),
        "reset returned a value that is not finite",
    ),
    ("reset", lambda s, m, n, g: (torch.zeros(2, n).long(), torch.zeros(2, n)), "reset returned torch.int64"),
    ("reset", diffsim.Task.reset, "does not define reset"),
    ("control_dt", 0, "control_dt is 0; it must be"),
    ("control_dt", math.nan, "control_dt is nan"),
    ("control_dt", math.inf, "control_dt is inf"),
    ("control_dt", "1", "control_dt is '1'"),
    ("substeps", 0, "substeps is 0; it must be a whole number between 1 and 2"),
    ("substeps", 2.0, "substeps is 2.0"),
    ("max_episode_steps", 0, "max_episode_steps is 0"),
    ("max_episode_steps", None, "max_episode_steps is None"),
    ("collisions", 1, "collisions is 1; it must be True or False"),
    ("success", lambda s, q, v: q[0], "success returned torch.float32, expected torch.bool"),
    ("renew", lambda *_: None, "renew returned a NoneType, expected two: qpos, qvel"),
    ("renew", lambda s, q, v, g: (q[:1], v), r"renew returned shape \(1, 2\) for 2 environments, expected .* \(2, 2\)"),
    ("xml", 3, "xml is a int; it must be the path"),
    ("xml", WITHOUT_ACTUATOR, "xml has no actuator"),
    ("__init__", lambda self, size: None, r"\(\) raised TypeError: .* missing 1 .*; a task is made without arguments"),
    ("__init__", raises_zero_division, r"\(\) raised ZeroDivisionError: .* \(.*test_tasks.py:\d+\); a task is made"),
]


@pytest.mark.parametrize("attribute, value, message", BROKEN)
def test_what_is_wrong_with_a_task_is_one_line_when_it_is_made(attribute, value, message):
    broken = type("Broken", (diffsim.TASKS["cartpole"],), {attribute: value})
    with pytest.raises(ValueError, match=f"^Broken.*{message}") as error:
        diffsim.make(broken, 3, compile=False)
    assert "\n" not in str(error.value)
    assert "raised" not in message or error.value.__cause__ is not None


@pytest.mark.parametrize("method", ["observe", "reward"])
def test_one_environment_must_not_depend_on_another_though_all_begin_alike(method):
    class Alike(diffsim.TASKS["cartpole"]):
        def reset(self, model, count, generator):
            return torch.full((2, count), 0.1), torch.zeros(2, count)

    over_all = {"observe": lambda self, q, v, a: q - q.mean(), "reward": lambda self, q, v, a: q[0] - q.square().mean()}
    diffsim.make(Alike, 3, compile=False)
    setattr(Alike, method, over_all[method])
    with pytest.raises(ValueError, match=f"Alike.{method} of one environment depends on another's"):
        diffsim.make(Alike, 3, compile=False)


@pytest.mark.parametrize("joint, rows", [("free", "3 to 6"), ("ball", "0 to 3")])
def test_a_reset_to_no_orientation_is_one_line(joint, rows):
    class Ball(diffsim.Task):
        xml = f"""<mujoco><worldbody><body><joint type="{joint}"/><geom size=".1"/><body><joint name="j"/>
        <geom size=".1" pos="0 0 .3"/></body></body></worldbody><actuator><motor joint="j"/></actuator></mujoco>"""

        def reset(self, model, count, generator):
            return torch.zeros(model.nq, count), torch.zeros(model.nv, count)

    said = f"Ball.reset returned a quaternion of length 0, rows {rows} of qpos; begin with model.mj_model.qpos0"
    with pytest.raises(ValueError, match=f"^{said}$"):
        diffsim.make(Ball, 2, compile=False)


def test_what_is_no_task_is_one_line(tmp_path):
    for task, message in ((3, "3 is no task"), (int, "'int'> is no task"), (diffsim.Task, "Task does not define xml")):
        with pytest.raises(ValueError, match=message):
            diffsim.make(task, 3, compile=False)
    (tmp_path / "late.py").write_text("import torch\n\nx = torch.zeros(2) @ torch.zeros(3)\n")
    with pytest.raises(ValueError, match=r"late.py does not import: RuntimeError: .* \(.*late.py:3\)$"):
        diffsim.make(f"{tmp_path}/late.py:Late")


class Slider(diffsim.Task):
    xml = """<mujoco><option gravity="0 0 0"/><worldbody><body><joint name="x" type="slide" axis="1 0 0"/>
      <geom size="1"/></body></worldbody><actuator><motor joint="x" ctrlrange="-1 1"/></actuator></mujoco>"""
    max_episode_steps = 5

    def reset(self, model, count, generator):
        return torch.zeros(1, count), torch.ones(1, count)

    def observe(self, qpos, qvel, action):
        return qpos

    def reward(self, qpos, qvel, action):
        return qvel[0]


def test_an_actuator_without_a_range_and_a_robot_that_cannot_be_read_are_named():
    class Free(Slider):
        xml = Slider.xml.replace(' ctrlrange="-1 1"', "")

    with pytest.warns(
        UserWarning, match="^actuator '0' has no ctrlrange: its control is the action, between -1 and 1$"
    ):
        diffsim.make(Free, 2, compile=False)
    Free.xml = "nowhere.xml"
    with pytest.raises(ValueError, match="^Free: cannot read MJCF nowhere.xml: no such file$"):
        diffsim.make(Free, 2, compile=False)


def test_play_tells_a_speed_of_one_metre_a_second():
    played = rollout(diffsim.make(Slider, 2, compile=False), lambda obs: torch.zeros(2, 1), 2)
    assert played["speed"].tolist() == pytest.approx([1, 1]) and played["length"].tolist() == [5, 5]


def test_a_robot_beside_its_task_needs_an_xml_that_can_be_set(tmp_path):
    (tmp_path / "arm.xml").write_text("<mujoco/>")
    code = "import diffsim\n\nclass Arm(diffsim.Task):\n    xml = property(lambda self: 'arm.xml')\n"
    (tmp_path / "arm.py").write_text(code)
    with pytest.raises(ValueError, match="Arm.xml is a property; it must give the robot's whole path"):
        diffsim.make(f"{tmp_path}/arm.py:Arm", 1)


def test_a_file_of_a_task_may_have_dataclasses(tmp_path):
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom diffsim.tasks import TASKS\n\n"
    code += "@dataclass\nclass Gain:\n    x: float = 1.0\n\nclass Mine(TASKS['cartpole']):\n    gain = Gain()\n"
    (tmp_path / "math.py").write_text(code)  # of a name that another module has
    assert diffsim.make(f"{tmp_path}/math.py:Mine", 1, compile=False).task.gain.x == 1.0
    assert sys.modules["math"] is math


def test_an_initial_state_carries_no_gradient():
    start = torch.zeros(2, 1, requires_grad=True)
    reset = lambda self, model, count, generator: (start.repeat(1, count), torch.zeros(2, count))  # noqa: E731
    env = diffsim.make(type("Learned", (diffsim.TASKS["cartpole"],), dict(reset=reset)), 3, compile=False)
    obs, _ = env.reset()
    assert not obs.requires_grad and not env.step(torch.zeros(3, 1))[0].requires_grad


# --- tasks in files -----------------------------------------------------------------------------------------------
def test_a_tasks_xml_and_imports_may_be_beside_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "its folder"
    folder.mkdir()
    (folder / "cart.xml").write_bytes(diffsim.TASKS["cartpole"].xml.read_bytes())
    (tmp_path / "cart.xml").write_text("<mujoco>nor this one</mujoco>")
    (folder / "beside_it.py").write_text("from diffsim.tasks import Cartpole\n")
    (folder / "torch.py").write_text("not torch\n")
    code = "import torch\nfrom beside_it import Cartpole\n\n\nclass Mine(Cartpole):\n    xml = 'cart.xml'\n"
    (folder / "task.py").write_text(code)
    monkeypatch.setattr("sys.path", list(sys.path))
    assert make("its folder/task.py:Mine").model.nv == 2


@pytest.mark.parametrize(
    "base, written, said",
    [
        ("cartpole", dict(max_steps=5), "Mine.max_steps means nothing to diffsim; is it max_episode_steps?"),
        ("Ant-v5", dict(healthy_rewards=2), "Mine.healthy_rewards means nothing to diffsim; is it healthy_reward?"),
        ("cartpole", dict(__init__=lambda self: setattr(self, "max_episode_step", 4)), "is it max_episode_steps?"),
        (
            "cartpole", dict(reset=lambda self, model, n, _: (torch.rand(model.nq, n), torch.rand(model.nv, n))),
            "Mine.reset draws other numbers than its generator's",
        ),
        ("progress", dict(reward=lambda self, q, v, a: q[0]), "reward counts only if Progress.transition_reward calls"),
        ("progress", {}, None), ("cartpole", dict(observe=lambda self, q, v, a: torch.cat([q, v]), obs=1), None),
    ],
)  # fmt: skip
def test_what_a_task_has_and_diffsim_never_asks_for(base, written, said, recwarn):
    class Progress(diffsim.TASKS["cartpole"]):
        def transition_reward(self, before, qpos, qvel, action):
            return qpos[0] - before[0]

    make(type("Mine", (Progress if base == "progress" else diffsim.TASKS[base],), {"__module__": "mine"} | written))
    warned = [str(w.message) for w in recwarn]
    assert len(warned) == (said is not None) and (said or "") in "".join(warned), warned


def test_starts_are_drawn_anew_when_all_episodes_begin():
    class Lesson(diffsim.TASKS["cartpole"]):
        level = 0.0

        def reset(self, model, count, generator):
            return tuple(x + self.level for x in super().reset(model, count, generator))

    env = diffsim.make(task := Lesson(), 4, compile=False)
    env.set_state(env.get_state() | dict(start_qpos=env.qpos.clone(), start_qvel=env.qvel.clone()))  # drawn ahead
    task.level = 100.0
    env.reset()
    assert (env.qpos > 50).all()


def test_gymnasium_decides_how_long_an_episode_lasts():
    env = gymnasium.make("diffsim/hopper", max_episode_steps=3)
    env.reset(seed=1)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    assert gymnasium.spec("diffsim/hopper").max_episode_steps == diffsim.TASKS["hopper"].max_episode_steps
    one, two = (gymnasium.make_vec("diffsim/hopper", 2, compile=False, max_episode_steps=9) for _ in range(2))
    assert one.max_episode_steps == 9 and not torch.equal(one.reset()[0], two.reset()[0])
    with pytest.raises(ValueError, match="diffsim/hopper has no render_mode; python -m diffsim.play"):
        gymnasium.make("diffsim/hopper", render_mode="rgb_array")


def test_a_misspelt_method_is_named_in_a_warning():
    class Mine(diffsim.TASKS["cartpole"]):
        noise = 3

        def rewards(self, qpos, qvel, action):
            return qpos[0]

    with pytest.warns(UserWarning, match="Mine.rewards means nothing to diffsim; is it reward\\?") as said:
        make(Mine)
    assert len(said) == 1
