"""ppo_baseline.py: its small functions against sums written out, and the script as a user runs it."""

import gymnasium
import numpy as np
import pytest
import torch

import ppo_baseline as ppo
from diffsim.gymnasium_env import GymnasiumEnv, is_gymnasium_id
from tests import run_fresh, run_script
from tests.test_shac import play, rows

TINY = "--no-compile --num-envs 2 --num-steps 4 --update-epochs 2 --num-minibatches 2 --eval-every 0".split()
TINY += "--eval-episodes 2 --save-every 8 --total-timesteps 4000".split()


def test_gae_against_a_brute_force_sum():
    torch.manual_seed(0)
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
    torch.testing.assert_close(ppo.ppo_loss(ratio.log(), advantage, 0.2), expected)
    value, old, target = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.9]), torch.tensor([2.0, 0.0])
    torch.testing.assert_close(ppo.value_loss_of(value, old, target, 0.2), torch.tensor([0.5 * 1.8**2, 0.5]))
    torch.testing.assert_close(ppo.value_loss_of(value, old, target, None), torch.tensor([0.5, 0.5]))


def test_normalisers_have_the_statistics_of_what_they_saw():
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(5, 40, 3)
    normalizer = ppo.Normalizer(3)
    for part in x:
        normalizer.update(part)
    whole = x.flatten(0, 1)
    torch.testing.assert_close(normalizer.mean, whole.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.var, whole.var(0, unbiased=False), rtol=1e-4, atol=1e-4)

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


@pytest.mark.parametrize("env", ["hopper", "Pendulum-v1"])
def test_same_seed_same_bits_and_resume(env, tmp_path):
    flags = ["--env", env, *TINY]
    run_script("ppo_baseline.py", *flags, "--run-dir", tmp_path / "a", "--stop-after", 4)
    run_script("ppo_baseline.py", *flags, "--run-dir", tmp_path / "b", "--stop-after", 2)
    run = next((tmp_path / "b").iterdir())
    out = run_fresh("ppo_baseline.py", "--resume", run, "--stop-after", 4)
    a, b = ([{k: v for k, v in r.items() if not k.endswith("_s")} for r in rows(tmp_path / x)] for x in "ab")
    assert len(a) == len(b) == 4 and a[:2] == b[:2]
    assert a == b if env == "hopper" else "episodes start anew" in out
    program = torch.export.load(run / "policy.pt2")
    obs_dim, act_dim = {"hopper": (11, 3), "Pendulum-v1": (3, 1)}[env]
    action = program.module()(torch.randn(5, obs_dim)).detach()
    assert action.shape == (5, act_dim) and float(action.abs().max()) <= {"hopper": 1, "Pendulum-v1": 2}[env]
    out = play(run, "--episodes", 1).stdout
    assert f"{env} on {'diffsim' if env == 'hopper' else 'gymnasium'}, 1 episodes" in out
    if env == "hopper":
        assert "hopper is no Gymnasium environment" in play(run, "--physics", "gymnasium", expect=2).stderr


def test_on_mujocos_physics_without_a_graph(tmp_path):
    flags = [*TINY, "--env", "cartpole", "--physics", "mujoco", "--run-dir", tmp_path]
    out = run_script("ppo_baseline.py", *flags, "--stop-after", 1)
    assert "cartpole" in out and len(rows(tmp_path)) == 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["--env", "antt"], "unknown env 'antt'"),
        (["--env", "CartPole-v1"], "Discrete(2)"),
        (["--env", "Pendulum-v1", "--capture-video"], "not for Pendulum-v1"),
        (["--num-envs", 0], "--num-envs is 0"),
        (["--critic-hidden", 64, 0], "--critic-hidden is (64, 0)"),
        (["--clip-coef", -0.1], "--clip-coef is -0.1"),
        (["--num-minibatches", 100000], "--num-minibatches is 100000"),
        (["--resume", "nowhere"], "--resume nowhere"),
    ],
)
def test_bad_input_is_one_line(args, message, refused):
    assert message in refused("ppo_baseline.py", *args, "--no-compile")


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
