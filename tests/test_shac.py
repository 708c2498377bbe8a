"""shac.py as a user runs it, and its small functions."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import ROOT, run_fresh, run_script

TINY = "--no-compile --num-envs 2 --horizon 2 --critic-epochs 1 --eval-every 0 --eval-episodes 2 --save-every 4".split()


def rows(folder):
    with open(next(Path(folder).glob("*/metrics.csv"))) as f:
        return [{k: v for k, v in r.items() if k not in ("wall_time_s", "SPS")} for r in csv.DictReader(f)]


def short_episodes(tmp_path):
    """The evaluation at the end runs 1000 steps: stop before it."""
    return ["--total-timesteps", 40, "--run-dir", tmp_path]


SAPO = (
    "--entropy-coef 1 --learn-entropy-coef --state-dependent-std --num-critics 2 --no-target-critic --activation silu "
    "--weight-decay 0.01 --max-grad-norm 0.5"
).split()


@pytest.mark.parametrize("flags", [[], SAPO], ids=["shac", "sapo"])
def test_same_seed_same_bits_and_resume_is_exact(flags, tmp_path):
    run_script("shac.py", *TINY, *flags, *short_episodes(tmp_path / "a"), "--stop-after", 4)
    run_script("shac.py", *TINY, *flags, *short_episodes(tmp_path / "b"), "--stop-after", 2)
    run = next((tmp_path / "b").iterdir())
    run_fresh("shac.py", "--resume", run, "--stop-after", 4)
    run_script("shac.py", *TINY, *flags, *short_episodes(tmp_path / "c"), "--stop-after", 4, "--seed", 2)
    a, b, c = (rows(tmp_path / x) for x in "abc")
    assert len(a) == 4 and a == b and a != c
    one, two = (torch.load(next((tmp_path / x).iterdir()) / "checkpoint.pt", weights_only=True) for x in "ab")
    for key, value in one["actor"].items():
        assert torch.equal(value, two["actor"][key])
    program = torch.export.load(run / "policy.pt2")
    assert program.module()(torch.zeros(5, 37)).shape == (5, 8)


def test_kill_loses_at_most_one_save_interval(tmp_path):
    command = [sys.executable, "shac.py", *TINY, "--run-dir", str(tmp_path), "--total-timesteps", "4000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for _ in range(600):
        if list(tmp_path.glob("*/checkpoint.pt")):
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = next(tmp_path.iterdir())
    step = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    run_fresh("shac.py", "--resume", run, "--stop-after", step // 4 + 1)
    assert int(rows(tmp_path)[-1]["global_step"]) == step + 4


@pytest.mark.parametrize(
    "args, message",
    [
        (["--env", "antt"], "unknown env 'antt'"),
        (["--num-envs", 0], "--num-envs is 0"),
        (["--critic-hidden", 64, 0], "--critic-hidden is (64, 0)"),
        (["--horizon", 0], "--horizon is 0"),
        (["--actor-learning-rate", -1], "--actor-learning-rate is -1"),
        (["--gamma", 2], "--gamma is 2"),
        (["--smoothing", "inf"], "--smoothing is inf"),
        (["--resume", "nowhere"], "--resume nowhere"),
        pytest.param(
            ["--device", "cuda"],
            "finds no CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)
def test_bad_input_is_one_line(args, message, refused):
    assert message in refused("shac.py", *args, "--no-compile")


@pytest.mark.parametrize(
    "xml, message",
    [
        ("<mujoco><nonsense/></mujoco>", "cannot read MJCF"),
        ("robot.xml", "no such file"),
        (
            "<mujoco><option viscosity='1'/><worldbody><body><joint/><geom size='.1'/></body></worldbody></mujoco>",
            "fluid",
        ),
    ],
)
def test_a_bad_robot_is_one_line(xml, message, tmp_path, refused):
    (tmp_path / "bad.py").write_text(f"import diffsim\nclass Bad(diffsim.Task):\n    xml = {xml!r}\n")
    assert message in refused("shac.py", "--env", f"{tmp_path / 'bad.py'}:Bad", "--no-compile")


def test_bad_checkpoints_are_one_line(tmp_path, refused):
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "not a readable checkpoint" in refused("shac.py", "--resume", tmp_path)
    torch.save({"args": {"env": "hopper"}}, tmp_path / "checkpoint.pt")
    assert "a checkpoint of hopper, not of ant" in refused("shac.py", "--resume", tmp_path, "--env", "ant")
    assert "--seed is 3, the run has 1" in refused("shac.py", "--resume", tmp_path, "--seed", 3)
    torch.save({"args": {"clip_low": 0.8}}, tmp_path / "checkpoint.pt")
    assert "not a checkpoint of shac.py" in refused("shac.py", "--resume", tmp_path)


def test_td_lambda_against_a_brute_force_sum():
    from shac import td_lambda

    torch.manual_seed(0)
    horizon, n, gamma, lam = 6, 4, 0.9, 0.8
    reward, value = torch.randn(horizon, n), torch.randn(horizon, n)
    terminated, truncated = torch.zeros(horizon, n).bool(), torch.zeros(horizon, n).bool()
    terminated[2, 1] = truncated[3, 2] = True
    targets = td_lambda(reward, value, terminated, truncated, gamma, lam)
    for i in range(n):
        for t in range(horizon):
            end = next((k for k in range(t, horizon) if terminated[k, i] or truncated[k, i]), horizon - 1)

            def n_step(k, t=t, i=i):  # return that bootstraps after step k
                total = sum(gamma ** (j - t) * reward[j, i] for j in range(t, k + 1))
                return total + gamma ** (k + 1 - t) * value[k, i] * ~terminated[k, i]

            expected = (1 - lam) * sum(lam ** (k - t) * n_step(k) for k in range(t, end)) + lam ** (end - t) * n_step(
                end
            )
            assert float(targets[t, i]) == pytest.approx(float(expected), rel=1e-5)


def test_ctrl_c_saves_and_can_be_resumed(tmp_path):
    command = [sys.executable, "shac.py", *TINY, "--run-dir", str(tmp_path), "--total-timesteps", "40000"]
    process = subprocess.Popen(
        [*command, "--save-every", "1000000"], cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
    )
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted and saved; continue with" in out and "done" not in out
    run = next(tmp_path.iterdir())
    done = torch.load(run / "checkpoint.pt", weights_only=True)["iteration"]
    assert len(rows(tmp_path)) == done and (run / "policy.pt2").exists()
    run_fresh("shac.py", "--resume", run, "--stop-after", done + 1)
    assert len(rows(tmp_path)) == done + 1


def play(*args, expect=0, **env):
    command = [sys.executable, "-m", "diffsim.play", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **env})
    assert done.returncode == expect, done.stderr
    return done


def test_play_evaluates_on_both_engines_and_renders(tmp_path):
    run_script("shac.py", *TINY, *short_episodes(tmp_path), "--env", "hopper", "--stop-after", 1)
    run = next(tmp_path.iterdir())
    for physics in ("diffsim", "mujoco"):
        out = play(run, "--episodes", 2, "--physics", physics).stdout
        for said in (f"hopper on {physics}, 2 episodes", "limit_violation", "penetration", "saturation"):
            assert said in out
    done = subprocess.run(
        [sys.executable, "-m", "diffsim.play", run, "--episodes", "1", "--video", tmp_path / "v.mp4"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode:  # no OpenGL here: one line that says what to install
        assert "without OpenGL" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    else:
        assert (tmp_path / "v.mp4").stat().st_size > 1000 and (tmp_path / "v.png").stat().st_size > 1000


def test_play_names_what_it_cannot_read(tmp_path):
    (tmp_path / "policy.pt2").write_bytes(b"nothing")
    for path, message in ((tmp_path / "nowhere", "no policy at"), (tmp_path, "not a readable policy")):
        done = play(path, expect=2)
        assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_entropy_of_the_squashed_policy_by_quadrature():
    from shac import squashed_entropy

    torch.manual_seed(0)
    mean, log_std = torch.tensor([0.3, -1.0]).double(), torch.tensor([-1.0, 0.5]).double()
    u = mean + log_std.exp() * torch.randn(400_000, 2, dtype=torch.float64)
    estimate = squashed_entropy(u, log_std.expand_as(u))
    exact = 0.0
    for m, s in zip(mean, log_std.exp()):  # -integral p(a) log p(a) da with a = tanh(x)
        x = torch.linspace(float(m - 12 * s), float(m + 12 * s), 200_001, dtype=torch.float64)
        log_p = torch.distributions.Normal(m, s).log_prob(x)
        exact -= torch.trapezoid(log_p.exp() * (log_p - 2 * torch.log(1 / torch.cosh(x))), x)
    assert float(estimate.mean()) == pytest.approx(float(exact), abs=4 * float(estimate.std()) / 400_000**0.5)
