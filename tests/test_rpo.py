"""rpo_diffsim.py: the surrogate against SHAC, a naive gradient and a closed form; the script as a user runs it."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import diffsim
import rpo_diffsim as rpo
from tests import TINY, rows, run_script
from tests.test_shac import learned


@pytest.mark.parametrize("state_dependent", [False, True])
def test_first_epochs_gradient_is_shacs(state_dependent):
    torch.manual_seed(0)
    env = diffsim.make("hopper", 3, seed=1, compile=False, dtype=torch.float64)
    env.reset()
    start = env.get_state()
    actor = rpo.Actor(11, 3, rpo.Args(state_dependent_std=state_dependent)).double()
    for p in actor.parameters():
        p.data += 0.1 * torch.randn_like(p)
    noise = torch.randn(8, 3, 3, dtype=torch.float64)

    def rollout():
        env.set_state(start)
        obs, total, states, us = env.detach(), 0.0, [], []
        for t in range(8):
            policy = actor(obs)
            u = policy.mean + policy.stddev * noise[t]
            u = u if u.requires_grad else u.requires_grad_()
            states.append(obs.detach())
            us.append(u)
            obs, reward, *_ = env.step(torch.tanh(u))
            total = total + reward.sum()
        return total, torch.cat(states), us

    total, _, _ = rollout()
    through_physics = torch.autograd.grad(total, list(actor.parameters()), allow_unused=True)

    actor.requires_grad_(False)
    total, states, us = rollout()
    g = torch.cat(torch.autograd.grad(total, us))
    u = torch.cat(us).detach()
    actor.requires_grad_(True)
    old = actor(states).log_prob(u).sum(-1).detach()
    surrogate, ratio = rpo.rpo_surrogate(actor(states), u, old, g, 0.8, 1.0)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-12, atol=1e-12)
    cached = torch.autograd.grad(surrogate.sum(), list(actor.parameters()), allow_unused=True)
    for a, b in zip(through_physics, cached):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def problem(n=200):
    torch.manual_seed(1)
    s = torch.randn(n, 2, dtype=torch.float64)
    w = torch.randn(2, 3, dtype=torch.float64)
    old_mean, old_log_std = s @ w, torch.full((n, 3), -0.5, dtype=torch.float64)
    u = old_mean + old_log_std.exp() * torch.randn(n, 3, dtype=torch.float64)
    g = -2 * (u - 0.3)  # of a known return, R = -|u - 0.3|^2
    new_w = (w + 0.2 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    log_std = torch.full((3,), -0.4, dtype=torch.float64, requires_grad=True)
    return s, old_mean, old_log_std, u, g, new_w, log_std


def test_later_epochs_gradient_is_that_of_the_naive_surrogate():
    s, old_mean, old_log_std, u, g, w, log_std = problem()
    old = Normal(old_mean, old_log_std.exp()).log_prob(u).sum(-1)
    surrogate, ratio = rpo.rpo_surrogate(Normal(s @ w, log_std.exp().expand_as(u)), u, old, g, 0.5, 0.5)
    ours = torch.autograd.grad(surrogate.sum(), (w, log_std))
    assert 0.05 < float(((ratio < 0.5) | (ratio > 1.5)).double().mean()) < 0.95  # both sides of the clip are tried
    naive_w, naive_std = torch.zeros_like(w), torch.zeros_like(log_std)
    with torch.no_grad():
        new = torch.distributions.Normal(s @ w, log_std.exp())
        before = torch.distributions.Normal(old_mean, old_log_std.exp())
        weight = (new.log_prob(u) - before.log_prob(u)).sum(1).exp()
        for i in range(len(u)):
            if not 0.5 <= weight[i] <= 1.5:
                continue
            naive_w += weight[i] * torch.outer(s[i], g[i])  # du/dw = s
            naive_std += weight[i] * g[i] * (u[i] - s[i] @ w)  # du/dlog_std = std eps
    torch.testing.assert_close(ours[0], naive_w)
    torch.testing.assert_close(ours[1], naive_std)


def test_the_regenerated_action_is_the_sampled_one():
    s, old_mean, old_log_std, u, _, w, log_std = problem()
    old = Normal(old_mean, old_log_std.exp()).log_prob(u).sum(-1)
    for i in range(3):  # <e_i, regenerated> / ratio
        g = torch.eye(3, dtype=torch.float64)[i].expand_as(u)
        surrogate, ratio = rpo.rpo_surrogate(Normal(s @ w, log_std.exp().expand_as(u)), u, old, g, 1.0, float("inf"))
        torch.testing.assert_close(surrogate / ratio, u[:, i], rtol=1e-12, atol=1e-12)


def test_a_sample_out_of_range_feels_the_kl_only():
    mean = torch.tensor([[0.0], [3.0]], dtype=torch.float64, requires_grad=True)
    one, u = torch.ones(2, 1, dtype=torch.float64), torch.full((2, 1), 0.1, dtype=torch.float64)
    before, new = Normal(0 * one, one), Normal(mean, one)
    surrogate, ratio = rpo.rpo_surrogate(new, u, before.log_prob(u).sum(-1), one, 0.8, 1.0)
    assert ratio[1] < 0.2 and surrogate[1] == 0
    (grad,) = torch.autograd.grad(surrogate.sum(), mean)
    assert grad[0] == 1 and grad[1] == 0
    kl = kl_divergence(before, new).sum(-1)
    assert kl.tolist() == pytest.approx([0.0, 4.5])
    assert torch.autograd.grad(kl.sum(), mean)[0].flatten().tolist() == pytest.approx([0.0, 3.0])


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0.2, 1.0)])
def test_the_bounds_of_the_ratio_are_one_minus_low_and_one_plus_high(low, high):
    wanted = torch.linspace(0.11, 2.51, 49, dtype=torch.float64)  # ratios
    u, one = torch.zeros(49, 1, dtype=torch.float64), torch.ones(49, 1, dtype=torch.float64)
    new = Normal(torch.zeros_like(u), one)
    surrogate, ratio = rpo.rpo_surrogate(new, u, new.log_prob(u).sum(-1) - wanted.log(), one, low, high)
    torch.testing.assert_close(ratio, wanted)
    g = torch.where((wanted >= 1 - low - 1e-9) & (wanted <= 1 + high + 1e-9), wanted, 0.0)
    surrogate, _ = rpo.rpo_surrogate(
        Normal(one, one), one, Normal(one, one).log_prob(one).sum(-1) - wanted.log(), one, low, high
    )
    torch.testing.assert_close(surrogate, g)  # <g, u'> is 1


def test_proposition_1_on_a_linear_quadratic_problem():
    """Importance-weighted gradients of old samples average to the new policy's true gradient, known in closed form."""
    torch.manual_seed(2)
    n, b, sigma_old, theta_old = 400_000, 0.7, 0.5, 0.2
    theta = torch.tensor(0.35, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(-0.8, dtype=torch.float64, requires_grad=True)
    s = torch.randn(n, 1, dtype=torch.float64)
    u = theta_old * s + sigma_old * torch.randn(n, 1, dtype=torch.float64)
    old = Normal(theta_old * s, sigma_old).log_prob(u).sum(-1)
    g = -2 * (u - b * s)  # R = -(u - b s)^2
    surrogate, ratio = rpo.rpo_surrogate(Normal(theta * s, log_std.exp().expand_as(s)), u, old, g, 1.0, float("inf"))
    grads = torch.autograd.grad(surrogate.mean(), (theta, log_std))
    with torch.no_grad():  # J = -((theta - b)^2 + sigma^2) for s standard normal
        truth = (-2 * (theta - b), -2 * log_std.exp() ** 2)
        samples = (ratio * (g * s).squeeze(-1), ratio * (g * (u - theta * s)).squeeze(-1))
    for ours, exact, x in zip(grads, truth, samples):
        error = float(x.std()) / n**0.5
        assert error < 0.01 and abs(float(ours - exact)) < 4 * error


def test_the_old_policys_spread_counts_in_the_kl(tmp_path):
    """KL(old || new) in the script: the entropy bonus moves the log deviation by 0.1, and nothing moves the mean."""
    flags = [*TINY, "--env", "cartpole", "--update-epochs", 2, "--actor-learning-rate", 0.1, "--entropy-coef", 1]
    run_script("rpo_diffsim.py", *flags, "--max-action-grad-norm", 1e-30, "--stop-after", 1, "--run-dir", tmp_path)
    (row,) = rows(tmp_path)
    assert float(row["kl"]) == pytest.approx(0.1 + (math.exp(-0.2) - 1) / 2, rel=1e-3)


def test_a_symmetric_clip_takes_the_place_of_both_bounds(tmp_path):
    """In the second epoch no ratio is 1 any more: with a range of 0 none is inside."""
    shares = []
    for clip in (0, "inf"):
        flags = [*TINY, "--env", "cartpole", "--update-epochs", 2, "--clip-coef", clip, "--clip-low", 0.5]
        run_script("rpo_diffsim.py", *flags, "--stop-after", 1, "--run-dir", tmp_path / str(clip))
        shares.append(float(rows(tmp_path / str(clip))[0]["inside_clip"]))
    assert shares == [0, 1]


def test_rpo_learns(arm, tmp_path):
    """See test_shac_learns_a_task_from_a_file."""
    flags = "--horizon 6 --total-timesteps 46080 --critic-epochs 6 --actor-learning-rate 5e-3".split()
    assert learned("rpo_diffsim.py", arm, tmp_path, *flags) > -26
