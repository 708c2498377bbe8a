"""A number that is not finite ends a run with one line and exit code 1; what was saved before stays, and is finite."""

import math
import runpy
import signal
import sys
import warnings

import pytest
import torch

import diffsim
from diffsim.run import PATIENCE, Run
from tests import ROOT, SCRIPTS, WINDOWS
from tests.test_scripts import small

SHAC, RPO, PPO, RP = SCRIPTS
LATE = """
import torch
from diffsim.tasks import TASKS


class Late(TASKS["cartpole"]):
    calls, max_episode_steps, substeps = 0, 5, 1

    def late(self, value=torch.nan):
        self.calls += 1
        return value if self.calls > 25 else 0.0


class Reward(Late):
    def reward(self, qpos, qvel, action):
        return super().reward(qpos, qvel, action) + self.late()


class Overflow(Late):
    def reward(self, qpos, qvel, action):
        return super().reward(qpos, qvel, action) * (1 + self.late(1e38))


class Observation(Late):
    def observe(self, qpos, qvel, action):
        return super().observe(qpos, qvel, action) + self.late()


class Start(Late):
    def reset(self, model, count, generator):
        self.calls += 1  # fewer resets are asked for than steps
        qpos, qvel = super().reset(model, count, generator)
        return qpos + self.late(), qvel


class Gradient(Late):
    def reward(self, qpos, qvel, action):
        return (0 * qvel[0]).sqrt()  # 0, of slope 0 * inf


class Steep(Late):
    def reward(self, qpos, qvel, action):
        return (1e25 * (qvel[0] - qvel[0].detach())).clamp(-1, 1)  # 0, of a slope whose square is no number
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script on a class of LATE in this process: exit code, lines of stderr, run folder."""
    (tmp_path / "late.py").write_text(LATE)
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("diffsim.run.write_policy", lambda *_, **__: None)  # takes a second
    monkeypatch.setattr("diffsim.run.Run._save_policy", lambda *_: None)

    def go(script, *flags, task="Late"):
        argv = [script, *small(script, f"{tmp_path}/late.py:{task}", tmp_path / "runs", total_timesteps=200), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            warnings.simplefilter("ignore")
            runpy.run_path(str(ROOT / script), run_name="__main__")
        (folder,) = (tmp_path / "runs").iterdir()
        return stopped.value.code, capsys.readouterr().err.strip().splitlines(), folder

    yield go
    signal.signal(signal.SIGINT, handler)


def poison(monkeypatch, name: str, method: str = "log"):
    """From iteration 6 on a tensor of a part ("critic.0.bias") or a number that is logged ("losses/kl") is NaN."""
    before = getattr(Run, method)

    def poisoned(self, *args):
        if self.iteration >= 6 and "/" in name:
            args = ({**args[0], name: math.nan},)
        elif self.iteration >= 6:
            part, _, key = name.partition(".")
            self.parts[part].state_dict()[key].view(-1)[0] = math.nan
        return before(self, *args)

    monkeypatch.setattr(Run, method, poisoned)


def floats(state):
    """All tensors of numbers in a checkpoint."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        return [x for part in state for x in floats(part)]
    return [state] if torch.is_tensor(state) and state.is_floating_point() else []


def assert_good(folder):
    """A checkpoint of before."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    held = floats(checkpoint)
    assert checkpoint["iteration"] >= 1 and len(held) > 10 and all(bool(torch.isfinite(x).all()) for x in held)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("task", ["Reward", "Overflow", "Observation", "Start"])
def test_a_task_that_fails_late(script, task, run):
    code, said, folder = run(script, task=task)
    assert code == 1 and len(said) <= 2 and "is not finite" in said[-1], said
    assert f"the last good checkpoint is {folder}" in said[-1]
    assert_good(folder)


@pytest.mark.parametrize(
    "script, name, method",
    [
        (SHAC, "critic.members.0.0.weight", "log"), (SHAC, "target_critic.members.1.0.bias", "log"),
        (SHAC, "actor.log_std", "log"), (SHAC, "normalizer.var", "log"), (SHAC, "temperature.0", "log"),
        (SHAC, "losses/entropy", "log"), (SHAC, "eval/episodic_return", "log"),
        (RPO, "actor.mean.0.weight", "log"), (RPO, "critic.members.0.0.bias", "log"), (RPO, "losses/kl", "log"),
        (PPO, "agent.log_std", "log"), (PPO, "return_scale.moments.var", "log"), (PPO, "losses/approx_kl", "log"),
        (RP, "model.dynamics.0.bias", "passed"), (RP, "average.net.0.bias", "passed"), (RP, "rewards.mean", "log"),
        (RP, "temperature.0", "passed"), (RP, "critic.members.0.0.bias", "log"), (RP, "losses/q_value", "mean"),
    ],
)  # fmt: skip
def test_a_part_or_a_loss_that_is_no_longer_finite(script, name, method, run, monkeypatch):
    """With the save in the same iteration, too: a row is not due in each of rp_pgm_mb.py's."""
    poison(monkeypatch, name, method)
    flags = ("--log-every", 1000) if script == RP and method == "passed" else ()
    code, said, folder = run(script, *map(str, flags))
    assert code == 1 and len(said) == 1 and name in said[0] and "is not finite" in said[0], said
    assert f"iteration {5 if method == 'passed' else 6}:" in said[0]
    assert_good(folder)


@pytest.mark.parametrize(
    "script, flags",
    [
        (SHAC, "--log-std-init 1000"), (SHAC, "--critic-learning-rate 1e30"), (SHAC, "--entropy-coef 1e38"),
        (SHAC, "--actor-learning-rate 1e30"), (RPO, "--kl-coef 1e38"), (RPO, "--log-std-init 1000"),
        (PPO, "--learning-rate 1e30"), (PPO, "--vf-coef 1e38"), (PPO, "--log-std-init 1000"),
        (RP, "--model-learning-rate 1e30"), (RP, "--critic-learning-rate 1e30"), (RP, "--actor-learning-rate 1e30"),
    ],
)  # fmt: skip
def test_a_flag_that_no_number_survives(script, flags, run):
    code, said, folder = run(script, *flags.split())
    assert code == 1 and len(said) <= 2 and "is not finite" in said[-1], said
    if (folder / "checkpoint.pt").exists():
        assert_good(folder)


@pytest.mark.parametrize("task", ["Gradient", "Steep"])
@pytest.mark.parametrize("script", WINDOWS)
def test_a_policy_that_never_sees_a_finite_gradient(script, task, run):
    code, said, folder = run(script, "--entropy-coef", "0", task=task)
    assert code == 1 and len(said) == 2, said
    assert "iteration 0: gradients that are not finite are left out" in said[0]
    assert f"iteration {PATIENCE - 1}: no gradient of the last {PATIENCE} rows was finite" in said[1]
    assert_good(folder)


def test_a_run_that_is_shorter_than_patience(run):
    code, said, _ = run(SHAC, "--total-timesteps", "12", task="Gradient")
    assert code == 1 and "iteration 2: no gradient of the last 3 rows was finite" in said[1]


def test_a_checkpoint_that_is_not_finite_is_refused(run):
    code, _, folder = run(SHAC, "--stop-after", "3")
    assert code == 0
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["critic"]["members.0.0.bias"][0] = math.nan
    torch.save(checkpoint, folder / "checkpoint.pt")
    code, said, _ = run(SHAC, "--resume", str(folder))
    assert code == 2 and said == [f"shac.py: --resume {folder}: its critic.members.0.0.bias is not finite"]


def test_an_interrupted_run_saves_nothing_that_is_not_finite(run, monkeypatch):
    """rp_pgm_mb.py has no row in the iteration that Ctrl-C ends."""
    passed = Run.passed

    def interrupted(self, every):
        if self.iteration == 6:
            self.interrupted = True
            self.parts["model"].state_dict()["dynamics.0.bias"][0] = math.nan
        return passed(self, every)

    monkeypatch.setattr(Run, "passed", interrupted)
    code, said, folder = run(RP, "--log-every", "1000", "--save-every", "10")
    assert code == 1 and "iteration 5: model.dynamics.0.bias is not finite" in said[-1]
    assert_good(folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_gradients_through_physics_warn_of_a_reward_without_one(script, tmp_path, monkeypatch):
    (tmp_path / "flat.py").write_text(
        "from diffsim.tasks import TASKS\n\n\nclass Flat(TASKS['cartpole']):\n"
        "    def reward(self, qpos, qvel, action):\n        return (qpos[0] > 0).float()\n"
    )
    monkeypatch.setattr(Run, "__iter__", lambda self: iter(()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for physics in ("diffsim", "mujoco"):
            flags = small(script, f"{tmp_path}/flat.py:Flat", tmp_path / "runs", physics=physics, seed=len(physics))
            monkeypatch.setattr(sys, "argv", [script, *flags])
            runpy.run_path(str(ROOT / script), run_name="__main__")
    said = [str(w.message) for w in caught if "no gradient of Flat.reward" in str(w.message)]
    assert len(said) == (2 if script in WINDOWS else 0)


def test_a_policy_of_finite_parameters_whose_action_is_not(run, monkeypatch):
    log = Run.log

    def poisoned(self, numbers):
        if self.iteration == 6:
            self.parts["average"].state_dict()["actor.mean.0.bias"].uniform_(0, 3e38)
        log(self, numbers)

    monkeypatch.setattr(Run, "log", poisoned)
    code, said, folder = run(SHAC)
    assert code == 1 and "iteration 6: the policy's action is not finite" in said[-1], said
    assert_good(folder)


@pytest.mark.parametrize("derivative", ["diffsim", "mujoco"])
def test_on_mujoco_an_action_that_is_not_a_number_leaves_the_gradient_before_it(derivative):
    """Of a robot with a quaternion, whose rotation is turned into another's: 0 * NaN is NaN."""
    env = diffsim.make("ant", 2, physics="mujoco", derivative=derivative, compile=False, seed=1)
    env.reset()
    action = torch.zeros(2, 8, requires_grad=True)
    reward = env.step(action)[1]
    with pytest.warns(UserWarning, match="action of environment 0 is not finite"):
        after = env.step(torch.tensor([[torch.nan] * 8, [0.0] * 8]))[1]
    (reward + after).sum().backward()
    assert bool(action.grad.isfinite().all()) and bool((action.grad != 0).any(1).all())
