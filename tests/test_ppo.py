"""ppo_baseline.py: its small functions against sums written out, and the script as a user runs it."""

import importlib

import gymnasium
import numpy as np
import pytest
import torch

import ppo_baseline as ppo
from diffsim.flags import parse
from diffsim.gymnasium_env import GymnasiumEnv, is_gymnasium_id
from diffsim.play import load_policy
from tests import SCRIPTS, command_line, play, rows, run_script, the_run
from tests.test_shac import learned

TINY = "--no-compile --num-envs 2 --num-steps 4 --update-epochs 2 --num-minibatches 2 --eval-every 0".split()
TINY += "--eval-episodes 2 --save-every 8 --total-timesteps 4000".split()


def test_gae_against_a_brute_force_sum():
    steps, n, gamma, lam = 7, 4, 0.9, 0.8
    reward, value, after = (torch.randn(steps, n, dtype=torch.float64) for _ in range(3))
    terminated, truncated = torch.zeros(steps, n).bool(), torch.zeros(steps, n).bool()
    terminated[2, 1] = truncated[3, 2] = terminated[6, 3] = True
    advantages = ppo.gae(reward, value, after, terminated, truncated, gamma, lam)
    for i in range(n):
        for t in range(steps):
            end = next((k for k in range(t, steps) if terminated[k, i] or truncated[k, i]), steps - 1)
            expected = sum(
                (gamma * lam) ** (k - t) * (reward[k, i] + gamma * after[k, i] * ~terminated[k, i] - value[k, i])
                for k in range(t, end + 1)
            )
            assert float(advantages[t, i]) == pytest.approx(float(expected), rel=1e-12)


def test_clipped_losses_at_values_computed_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0])
    # 1.5 is cut to 1.2 where that is the worse objective, 0.5 to 0.8
    expected = torch.tensor([-2.4, 3.0, -1.0, 1.6, -3.3])
    torch.testing.assert_close(ppo.clipped_surrogate_loss(ratio.log(), advantage, 0.2), expected)
    value, old, target = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.9]), torch.tensor([2.0, 0.0])
    torch.testing.assert_close(ppo.clipped_value_loss(value, old, target, 0.2), torch.tensor([0.5 * 1.8**2, 0.5]))
    torch.testing.assert_close(ppo.clipped_value_loss(value, old, target, None), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_normaliser_has_the_statistics_of_what_it_saw(script):
    x = 3 + 2 * torch.randn(5, 40, 3)
    normalizer = importlib.import_module(script.removesuffix(".py")).Normalizer(3)
    for part in x:
        normalizer.update(part)
    whole = x.flatten(0, 1)
    torch.testing.assert_close(normalizer.mean, whole.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.var, whole.var(0, unbiased=False), rtol=1e-4, atol=1e-4)


def test_rewards_are_divided_by_the_deviation_of_the_return():
    reward, done = torch.randn(6, 2), torch.zeros(6, 2).bool()
    done[2, 0] = True
    scale = ppo.ReturnScale(2, 0.9)
    scaled = scale(reward, done)
    returns = np.zeros((6, 2))
    for i in range(2):
        total = 0.0
        for t in range(6):
            total = 0.9 * total + float(reward[t, i])
            returns[t, i] = total
            total = 0.0 if done[t, i] else total
    torch.testing.assert_close(scaled, reward / float(returns.std()), rtol=1e-3, atol=1e-3)


def test_on_a_gymnasium_environment(tmp_path):
    """Whose episodes start anew when a run is resumed, as it says; the policy acts within the bounds of that world."""
    flags = ["--env", "Pendulum-v1", *TINY]
    run_script("ppo_baseline.py", *flags, "--run-dir", tmp_path / "a", "--stop-after", 4)
    run_script("ppo_baseline.py", *flags, "--run-dir", tmp_path / "b", "--stop-after", 2)
    run = the_run(tmp_path / "b")
    out = run_script("ppo_baseline.py", "--resume", run, "--stop-after", 4)
    a, b = (rows(tmp_path / x) for x in "ab")
    assert len(a) == len(b) == 4 and a[:2] == b[:2] and "episodes start anew" in out
    policy, name = load_policy(run)
    action = policy(1000 * torch.randn(50, 3)).detach()
    assert name == "Pendulum-v1" and action.shape == (50, 1) and float(action.abs().max()) <= 2
    assert "Pendulum-v1 on gymnasium, 1 episodes" in play(run, "--episodes", 1).stdout
    assert "Pendulum-v1 is Gymnasium's alone" in play(run, "--physics", "diffsim", expect=2).stderr
    assert "does not run on MuJoCo: no video" in play(run, "--video", tmp_path / "v.mp4", expect=2).stderr


def test_settings_on_gymnasium_are_cleanrls_and_on_mujoco_its_own():
    wanted = dict(gymnasium=(1, 1_000_000, 0.0, 10), mujoco=(64, 3_000_000, -1.0, 64))
    for physics, expected in wanted.items():
        with command_line("ppo_baseline.py", "--env", "Hopper-v5", "--physics", physics):
            args = parse(ppo.Args, ppo.DEFAULTS)
        assert (args.num_envs, args.total_timesteps, args.log_std_init, args.eval_episodes) == expected
    with command_line("ppo_baseline.py", "--env", "Ant-v5"):
        assert parse(ppo.Args, ppo.DEFAULTS).physics == "mujoco"


def test_a_policy_of_gymnasiums_ant_plays_on_every_engine(tmp_path):
    """Without the contact forces, which diffsim's twin does not observe either: 27 numbers."""
    flags = [*TINY, "--env", "Ant-v5", "--physics", "gymnasium", "--run-dir", tmp_path, "--stop-after", 1]
    run_script("ppo_baseline.py", *flags)
    for physics in ("gymnasium", "mujoco"):
        assert (
            f"Ant-v5 on {physics}, 1 episodes" in play(the_run(tmp_path), "--physics", physics, "--episodes", 1).stdout
        )


def test_on_mujocos_physics_without_a_graph(tmp_path):
    flags = [*TINY, "--env", "cartpole", "--physics", "mujoco", "--run-dir", tmp_path]
    out = run_script("ppo_baseline.py", *flags, "--stop-after", 1)
    assert "cartpole" in out and len(rows(tmp_path)) == 1


def test_learning_rates(tmp_path):
    """Annealed, adapted to the KL, or left alone."""
    found = {}
    for name, flags in (("annealed", []), ("alone", ["--no-anneal-lr"]), ("adapted", ["--desired-kl", 1e-9])):
        given = [*TINY, "--env", "cartpole", "--run-dir", tmp_path / name, "--learning-rate", 1e-3, *flags]
        run_script("ppo_baseline.py", *given, "--total-timesteps", 32, "--stop-after", 3)
        found[name] = [float(r["learning_rate"]) for r in rows(tmp_path / name)]
    assert found["annealed"] == pytest.approx([1e-3, 0.75e-3, 0.5e-3]) and found["alone"] == pytest.approx([1e-3] * 3)
    assert found["adapted"] == pytest.approx([1e-3, 1e-3 / 1.5**2, 1e-3 / 1.5**4])  # every epoch's KL is too large


def test_minibatches_are_of_nearly_equal_size(tmp_path):
    """None has one sample, whose advantage has no deviation."""
    flags = "--no-compile --env cartpole --num-envs 10 --num-steps 10 --num-minibatches 12 --total-timesteps 100"
    run_script("ppo_baseline.py", *flags.split(), *"--eval-episodes 2 --update-epochs 1 --run-dir".split(), tmp_path)
    assert float(rows(tmp_path)[-1]["policy_loss"]) < 1


def test_observations_stay_as_they_are_unless_they_are_normalised(tmp_path):
    flags = "--no-compile --env cartpole --num-envs 2 --num-steps 2 --num-minibatches 2 --total-timesteps 4"
    flags = [*flags.split(), *"--no-norm-obs --eval-episodes 2 --run-dir".split(), tmp_path]
    run_script("ppo_baseline.py", *flags)
    saved = torch.load(the_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["normalizer"] == {}


def test_a_batchs_epochs_stop_at_the_target_kl(tmp_path):
    for name, kl in (("a", 1e-12), ("b", 1e3)):
        flags = [*TINY, "--env", "cartpole", "--target-kl", kl, "--run-dir", tmp_path / name, "--stop-after", 1]
        run_script("ppo_baseline.py", *flags)
    assert [rows(tmp_path / x)[0]["epochs"] for x in "ab"] == ["1", "2"]


def test_ppo_learns(learnable, tmp_path):
    """See test_shac_learns_a_task_from_a_file; it needs more steps."""
    flags = "--num-steps 30 --total-timesteps 115200 --learning-rate 2e-3".split()
    assert learned("ppo_baseline.py", learnable, tmp_path, *flags) > -26


def test_an_environment_without_a_time_limit_is_refused():
    gymnasium.register("Endless-v0", entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv")
    try:
        with pytest.raises(ValueError, match="^env 'Endless-v0' has no time limit"):
            GymnasiumEnv("Endless-v0")
    finally:
        del gymnasium.registry["Endless-v0"]


def test_gymnasium_env_is_gymnasiums():
    """Same observations, rewards and ends as the environment itself; the next episode starts in the same step."""
    assert is_gymnasium_id("Pendulum-v1") and not is_gymnasium_id("diffsim/ant") and not is_gymnasium_id("ant")
    env, reference = GymnasiumEnv("Pendulum-v1", 2), gymnasium.make("Pendulum-v1")
    obs, _ = env.reset(seed=3)
    expected, _ = reference.reset(seed=3)
    np.testing.assert_allclose(obs[0], expected, rtol=1e-6)
    total = 0.0
    for t in range(200):
        action = torch.full((2, 1), 5.0 * np.sin(t))  # beyond the bounds of 2 at times: clipped
        obs, reward, terminated, truncated, info = env.step(action)
        expected, r, _, last, _ = reference.step(np.clip(action[0].numpy(), -2, 2))
        total += r
        np.testing.assert_allclose(info["final_obs"][0], expected, rtol=1e-5, atol=1e-6)
        assert float(reward[0]) == pytest.approx(float(r), rel=1e-5) and bool(truncated[0]) == last == (t == 199)
    assert float(info["episode"]["r"][0]) == pytest.approx(total, rel=1e-5) and int(info["episode"]["l"][0]) == 200
    assert not torch.allclose(obs[0], info["final_obs"][0])
