"""shac.py: its small functions against sums written out and integrals, its learning, and watching what it learned."""

import os

import pytest
import torch

import rpo_diffsim
import shac
from diffsim.play import evaluate, load_policy, playback_env
from tests import TINY, WINDOWS, play, rows, run_script, the_run

SAPO = (
    "--entropy-coef 1 --learn-entropy-coef --state-dependent-std --num-critics 2 --no-target-critic --activation silu "
    "--weight-decay 0.01 --max-grad-norm 0.5"
).split()


def windows(count: int, horizon: int = 16):
    """Rewards, values, terminated, truncated (horizon, count) of windows with many ends in them."""
    reward, value = torch.randn(2, horizon, count, dtype=torch.float64)
    terminated, truncated = torch.rand(2, horizon, count) < 0.1
    return reward.requires_grad_(), value.requires_grad_(), terminated, truncated & ~terminated


def running_sums(reward, value, terminated, truncated, gamma: float):
    """SHAC's objective of each window (count,), kept up while it is rolled out: each episode has its own discount."""
    discount, total = torch.ones_like(reward[0]), torch.zeros_like(reward[0])
    for t in range(len(reward)):
        total = total + discount * reward[t]
        discount = discount * gamma
        done = terminated[t] | truncated[t]
        closed = done if t < len(reward) - 1 else torch.ones_like(done)
        total = total + torch.where(closed & ~terminated[t], discount * value[t], 0.0)
        discount = torch.where(done, 1.0, discount)
    return total


def test_the_windows_objective_is_the_running_sum():
    """td_lambda(lam=1) at the episodes' starts, against discounts that run with the steps: values and gradients."""
    reward, value, *ends = windows(2000)
    returns = shac.td_lambda(reward, value, *ends, 0.97, lam=1.0)
    alone = [shac.sum_of_starts(*(x[:, i : i + 1] for x in (returns, *ends))) for i in range(2000)]
    expected = running_sums(reward, value, *ends, 0.97)
    size = running_sums(reward.abs(), value.abs(), *ends, 0.97)  # sums of both signs cancel
    assert ((torch.stack(alone) - expected).abs() <= 5e-15 * size).all()
    gradients = [torch.autograd.grad(x, (reward, value)) for x in (shac.sum_of_starts(returns, *ends), expected.sum())]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=5e-15, atol=0)
    assert (gradients[0][1][:-1] != 0).any() and (gradients[0][1] == 0).any()


def test_td_lambda_against_a_brute_force_sum():
    horizon, n, gamma, lam = 6, 4, 0.9, 0.8
    reward, value = torch.randn(horizon, n), torch.randn(horizon, n)
    terminated, truncated = torch.zeros(horizon, n).bool(), torch.zeros(horizon, n).bool()
    terminated[2, 1] = truncated[3, 2] = True
    targets = shac.td_lambda(reward, value, terminated, truncated, gamma, lam)
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


def test_entropy_of_the_squashed_policy_by_quadrature():
    mean, log_std = torch.tensor([0.3, -1.0]).double(), torch.tensor([-1.0, 0.5]).double()
    u = mean + log_std.exp() * torch.randn(400_000, 2, dtype=torch.float64)
    estimate = shac.squashed_entropy(torch.distributions.Normal(mean, log_std.exp()), u)
    exact = 0.0
    for m, s in zip(mean, log_std.exp()):  # -integral p(a) log p(a) da with a = tanh(x)
        x = torch.linspace(float(m - 12 * s), float(m + 12 * s), 200_001, dtype=torch.float64)
        log_p = torch.distributions.Normal(m, s).log_prob(x)
        exact -= torch.trapezoid(log_p.exp() * (log_p - 2 * torch.log(1 / torch.cosh(x))), x)
    assert float(estimate.mean()) == pytest.approx(float(exact), abs=4 * float(estimate.std()) / 400_000**0.5)


@pytest.mark.parametrize("script", [shac, rpo_diffsim])
def test_an_initial_deviation_may_be_an_integer(script):
    assert script.Actor(3, 2, script.Args(log_std_init=-1)).log_std.is_floating_point()


@pytest.mark.parametrize("state_dependent", [False, True])
@pytest.mark.parametrize("script", [shac, rpo_diffsim])
def test_a_policys_distribution_stays_as_it_was(script, state_dependent):
    """RPO keeps the old policy's while the optimiser changes its parameters in place."""
    actor = script.Actor(3, 2, script.Args(state_dependent_std=state_dependent, log_std_init=-0.3))
    with torch.no_grad():
        policy = actor(torch.randn(5, 3))
        mean, std = policy.mean.clone(), policy.stddev.clone()
        assert std.shape == (5, 2)
        for p in actor.parameters():
            p.add_(0.5)
        assert torch.equal(policy.mean, mean) and torch.equal(policy.stddev, std)
        assert not torch.allclose(actor(torch.randn(5, 3)).stddev, std)


def test_same_seed_same_bits_of_sapo(tmp_path):
    flags = [*TINY, *SAPO, "--env", "cartpole", "--total-timesteps", 40]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_script("shac.py", *flags, "--run-dir", tmp_path / name, "--stop-after", 4, "--seed", seed)
    a, b, c = (rows(tmp_path / x) for x in "abc")
    assert len(a) == 4 and a == b and a != c
    assert float(a[-1]["entropy_coef"]) not in (0.0, 1.0)  # it has learned


def test_the_targets_critic_follows(tmp_path):
    """--target-alpha 1 keeps the target critic as it began, 0 makes it the critic of the last window."""
    for alpha in (0, 1):
        flags = [*TINY, "--env", "cartpole", "--target-alpha", alpha, "--run-dir", tmp_path / str(alpha)]
        run_script("shac.py", *flags, "--stop-after", 2)
    follows, stays = (torch.load(next(tmp_path.glob(f"{a}/*/checkpoint.pt")), weights_only=True) for a in (0, 1))
    for name, x in follows["critic"].items():
        torch.testing.assert_close(x, follows["target_critic"][name])
    assert any(not torch.equal(x, stays["target_critic"][name]) for name, x in stays["critic"].items())
    flags = [*TINY, "--env", "cartpole", "--no-target-critic", "--critic-learning-rate", 1e-38]
    flags += ["--init-from", the_run(tmp_path / "1"), "--run-dir", tmp_path / "new", "--stop-after", 1]
    run_script("shac.py", *flags)
    new = torch.load(next(tmp_path.glob("new/*/checkpoint.pt")), weights_only=True)["critic"]
    assert all(torch.equal(x, stays["critic"][name]) for name, x in new.items())  # not the target


def test_the_score_function_is_ppos():
    """In range its gradient is ratio A dlog pi; out of range, on the side where A would drive it further, nothing."""
    mean = torch.zeros(4, 1, requires_grad=True)
    u, advantage = torch.full((4, 1), 0.5), torch.tensor([2.0, 2.0, -2.0, -2.0])
    policy = torch.distributions.Normal(mean, torch.ones(4, 1))
    old_log_prob = policy.log_prob(u).sum(-1).detach() - torch.tensor([1.1, 1.3, 1.3, 0.7]).log()
    (gradient,) = torch.autograd.grad(shac.ppo_surrogate(policy, u, old_log_prob, advantage).sum(), mean)
    assert gradient.flatten().tolist() == pytest.approx([1.1 * 2 * 0.5, 0, 1.3 * -2 * 0.5, 0])
    far = shac.ppo_surrogate(policy, u, old_log_prob - 1000, advantage)  # the ratio overflows
    assert torch.isfinite(torch.autograd.grad(far.sum(), mean)[0]).all()


@pytest.mark.parametrize("script", WINDOWS)
def test_the_score_functions_share(script, tmp_path):
    """The gradient that is added has this share of the norm of the one that is there."""
    norms = []
    for share in (0, 1e-3, 1, 1e3):
        flags = [*TINY, "--env", "cartpole", "--score-share", share, "--run-dir", tmp_path / str(share)]
        run_script(script, *flags, *(["--update-epochs", 1] if script == "rpo_diffsim.py" else []), "--stop-after", 1)
        (row,) = rows(tmp_path / str(share))
        assert float(row["kl"]) > 0
        norms.append(float(row["norm_before_clip"]))
    alone = norms[0]
    assert 0 < abs(norms[1] / alone - 1) < 1.1e-3 and norms[2] <= 2.01 * alone
    assert norms[3] == pytest.approx(1000 * alone, rel=1.1e-3)


@pytest.mark.parametrize("script", WINDOWS)
def test_critics_of_normalised_returns(script, tmp_path):
    """They take the scale of the targets, which their values then have; the bits are the same where it is 0 and 1."""
    critic = shac.Critics(3, shac.Args())
    obs = torch.randn(7, 3)
    plain = torch.stack([member(obs).squeeze(-1) for member in critic.members])
    assert torch.equal(critic(obs), plain)
    critic.returns.update(torch.tensor([[90.0], [110.0]]))
    torch.testing.assert_close(critic(obs), 100 + 10 * plain, rtol=1e-3, atol=1e-3)
    flags = [*TINY, "--env", "cartpole", "--normalize-returns", "--run-dir", tmp_path, "--stop-after", 2]
    run_script(script, *flags)
    saved = torch.load(the_run(tmp_path) / "checkpoint.pt", weights_only=True)
    for name in ("critic", "target_critic"):
        assert saved[name]["returns.mean"] != 0 and float(saved[name]["returns.count"]) == pytest.approx(8, rel=1e-3)


def learned(script, env, tmp_path, *flags) -> float:
    """Return of the policy at the end, which its last row and its exported program tell alike."""
    learn = "--no-compile --num-envs 128 --gamma 0.95 --eval-every 0 --eval-episodes 128".split()
    out = run_script(script, "--env", env, *learn, "--run-dir", tmp_path, *flags)
    run = the_run(tmp_path)
    (told,) = (float(r["eval_return"]) for r in rows(tmp_path) if r["eval_return"])
    assert f"eval_return {told:.2f}" in out
    policy, name = load_policy(run)
    again = float(evaluate(playback_env(name, 128), policy, 128).mean())
    assert name == env and again == pytest.approx(told, rel=1e-3)
    return told


# No policy does much better than -18 on this task: the arm is not faster. One that does nothing comes to about -40.
def test_shac_learns_a_task_from_a_file(learnable, tmp_path):
    flags = "--horizon 6 --total-timesteps 61440 --critic-epochs 6 --actor-learning-rate 1e-2".split()
    flags += "--min-learning-rate 3e-3 --max-grad-norm 10".split()
    assert learned("shac.py", learnable, tmp_path, *flags) > -26


@pytest.mark.parametrize("script", WINDOWS)
def test_learning_rates_fall_linearly_or_exponentially(script, tmp_path):
    flags = "--env cartpole --actor-learning-rate 1e-2 --min-learning-rate 1e-4 --total-timesteps 16".split()
    for decay, expected in (("linear", [1e-2, 0.7525e-2, 0.505e-2]), ("exponential", [1e-2, 10**-2.5, 1e-3])):
        given = [*TINY, *flags, "--learning-rate-decay", decay, "--run-dir", tmp_path / decay]
        run_script(script, *given, "--stop-after", 3)
        assert [float(r["learning_rate"]) for r in rows(tmp_path / decay)] == pytest.approx(expected)
    run_script(script, *TINY, *flags, "--actor-learning-rate", 1e-5, "--run-dir", tmp_path / "low", "--stop-after", 3)
    assert [float(r["learning_rate"]) for r in rows(tmp_path / "low")] == pytest.approx([1e-5] * 3)  # it does not rise


def test_play_measures_on_both_engines(tmp_path):
    run_script("shac.py", *TINY, "--env", "hopper", "--stop-after", 1, "--run-dir", tmp_path)
    run = the_run(tmp_path)
    for physics in ("diffsim", "mujoco"):
        out = play(run, "--episodes", 2, "--physics", physics).stdout
        for said in (f"hopper on {physics}, 2 episodes", "limit_violation", "penetration", "saturation"):
            assert said in out
    assert "hopper is no Gymnasium environment" in play(run, "--physics", "gymnasium", expect=2).stderr
    assert "must be an .mp4" in play(run, "--video", "ant.gif", expect=2).stderr
    assert "--episodes is 0" in play(run, "--episodes", 0, expect=2).stderr


def test_play_on_the_engine_it_was_trained_on_and_a_video(arm, tmp_path):
    run_script("shac.py", *TINY, "--env", arm, "--physics", "mujoco", "--stop-after", 1, "--run-dir", tmp_path)
    run = the_run(tmp_path)
    assert f"{arm} on mujoco, 2 episodes" in play(run, "--episodes", 2, "--env", arm).stdout  # not the task's own
    video = [run, "--episodes", 1, "--env", arm, "--video", tmp_path / "v.mp4"]
    try:
        said = play(*video).stdout
    except AssertionError:  # no OpenGL here: one line that says what to install
        said = play(*video, expect=2).stderr
        assert "without OpenGL" in said and len(said.strip().splitlines()) == 1
    else:
        assert "wrote" in said
        assert (tmp_path / "v.mp4").stat().st_size > 1000 and (tmp_path / "v.png").stat().st_size > 1000


def test_a_run_films_its_policy_or_says_what_is_missing(arm, tmp_path, refused, monkeypatch):
    flags = [*TINY, "--env", arm, "--total-timesteps", 4, "--capture-video", "--run-dir", tmp_path]
    monkeypatch.setitem(os.environ, "MUJOCO_GL", "nothing")
    assert "without OpenGL" in refused("shac.py", *flags)
    assert (the_run(tmp_path) / "policy.pt2").exists()  # what was learned is there


def test_play_names_what_it_cannot_read(tmp_path):
    (tmp_path / "policy.pt2").write_bytes(b"nothing")
    for path, message in ((tmp_path / "nowhere", "no policy at"), (tmp_path, "not a readable policy")):
        said = play(path, expect=2).stderr
        assert message in said and len(said.strip().splitlines()) == 1
