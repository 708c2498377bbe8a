"""rpo_diffsim.py: the surrogate against SHAC, a naive gradient and a closed form; the script as a user runs it."""

import copy
import math
import runpy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import diffsim
import rpo_diffsim as rpo
from tests import TINY, command_line, rows
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
    surrogate, ratio, _ = rpo.rpo_surrogate(actor(states), u, old, g, 0.8, 1.0)
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
    surrogate, ratio, _ = rpo.rpo_surrogate(Normal(s @ w, log_std.exp().expand_as(u)), u, old, g, 0.5, 0.5)
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
        surrogate, ratio, _ = rpo.rpo_surrogate(Normal(s @ w, log_std.exp().expand_as(u)), u, old, g, 1.0, float("inf"))
        torch.testing.assert_close(surrogate / ratio, u[:, i], rtol=1e-12, atol=1e-12)


def test_a_sample_out_of_range_feels_the_kl_only():
    mean = torch.tensor([[0.0], [3.0]], dtype=torch.float64, requires_grad=True)
    one, u = torch.ones(2, 1, dtype=torch.float64), torch.full((2, 1), 0.1, dtype=torch.float64)
    before, new = Normal(0 * one, one), Normal(mean, one)
    surrogate, ratio, _ = rpo.rpo_surrogate(new, u, before.log_prob(u).sum(-1), one, 0.8, 1.0)
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
    surrogate, ratio, _ = rpo.rpo_surrogate(new, u, new.log_prob(u).sum(-1) - wanted.log(), one, low, high)
    torch.testing.assert_close(ratio, wanted)
    g = torch.where((wanted >= 1 - low - 1e-9) & (wanted <= 1 + high + 1e-9), wanted, 0.0)
    surrogate, _, _ = rpo.rpo_surrogate(
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
    surrogate, ratio, _ = rpo.rpo_surrogate(Normal(theta * s, log_std.exp().expand_as(s)), u, old, g, 1.0, float("inf"))
    grads = torch.autograd.grad(surrogate.mean(), (theta, log_std))
    with torch.no_grad():  # J = -((theta - b)^2 + sigma^2) for s standard normal
        truth = (-2 * (theta - b), -2 * log_std.exp() ** 2)
        samples = (ratio * (g * s).squeeze(-1), ratio * (g * (u - theta * s)).squeeze(-1))
    for ours, exact, x in zip(grads, truth, samples):
        error = float(x.std()) / n**0.5
        assert error < 0.01 and abs(float(ours - exact)) < 4 * error


def after_run(tmp_path, *flags) -> dict:
    """What the script's names stand for at the end of its run, which evaluates nothing: that takes longer than all."""
    unplayed = mock.patch("diffsim.play.evaluate", lambda env, policy, episodes: torch.zeros(episodes))
    with unplayed, command_line("rpo_diffsim.py", *TINY, *flags, "--run-dir", tmp_path):
        return runpy.run_path("rpo_diffsim.py", run_name="__main__")


def test_kl_and_share_inside_are_those_after_the_last_update(tmp_path):
    """Already one epoch moves the policy; its spread counts in the KL."""
    flags = "--env cartpole --update-epochs 1 --actor-learning-rate 0.1 --total-timesteps 4 --clip-coef 1e-6 1"
    end = after_run(tmp_path, *flags.split())
    old, new = end["old"], end["new"]
    ratio = new.stddev / old.stddev
    kl = ratio.log() + ((old.mean - new.mean).square() + old.stddev**2) / (2 * new.stddev**2) - 0.5
    (row,) = rows(tmp_path)
    assert float(row["kl"]) == pytest.approx(float(kl.sum(-1).mean()), rel=1e-3)
    assert not torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-2)
    assert float(row["inside_clip"]) == float((end["ratio"] >= 1).float().mean()) < 1


def test_without_its_flags_it_is_the_papers_rpo(tmp_path):
    """Three iterations bit for bit: eq. 10-14 written out, without score function, lambda, or any normalised return."""
    flags = "--env cartpole --num-envs 4 --horizon 3 --total-timesteps 36 --kl-coef 0.2 --entropy-coef 0.1"
    end = after_run(tmp_path, *flags.split())
    args = end["args"]
    torch.manual_seed(args.seed)
    env = diffsim.make("cartpole", 4, seed=args.seed, compile=False)
    env.reset(options=dict(stagger=True))
    actor, critic = rpo.Actor(5, 1, args), rpo.Critics(5, args)
    target_critic, normalizer = copy.deepcopy(critic), rpo.Normalizer(5)
    adams = [torch.optim.AdamW(m.parameters(), betas=(0.7, 0.95), weight_decay=0, fused=True) for m in (actor, critic)]
    for iteration in range(3):
        for adam, rate in zip(adams, (args.actor_learning_rate, args.critic_learning_rate)):
            adam.param_groups[0]["lr"] = 1e-5 + (1 - iteration / 3) * (rate - 1e-5)
        obs, steps = env.detach(), []
        for _ in range(3):
            policy = actor(normalizer(obs))
            u = policy.mean + policy.stddev * torch.randn_like(policy.mean)
            following, reward, terminated, truncated, info = env.step(torch.tanh(u))
            steps.append((obs, u, reward, terminated, truncated, info["final_obs"]))
            obs = following
        obs, u, reward, terminated, truncated, final_obs = map(torch.stack, zip(*steps))
        value = target_critic(normalizer(final_obs)).mean(0)
        returns = rpo.td_lambda(reward, value, terminated, truncated, 0.99, lam=1.0)
        objective = rpo.sum_of_starts(returns, terminated, truncated)
        g = torch.cat(torch.autograd.grad(objective, [step[1] for step in steps]))
        x, u = normalizer(obs.detach()).flatten(0, 1), u.detach().flatten(0, 1)
        with torch.no_grad():
            old, targets = actor(x), rpo.td_lambda(reward, value, terminated, truncated, 0.99, 0.95).flatten()
        for _ in range(5):
            new = actor(x)
            noise = ((u - new.mean) / new.stddev).detach()
            ratio = (new.log_prob(u).sum(-1) - old.log_prob(u).sum(-1)).exp().detach()
            weight = torch.where((ratio >= 1 - 0.8) & (ratio <= 2), ratio, 0.0)
            loss = -(weight * (g * (new.mean + new.stddev * noise)).sum(-1)).mean()
            loss = loss + 0.2 * kl_divergence(old, new).sum(-1).mean()
            loss = loss - 0.1 * rpo.squashed_entropy(new, new.rsample()).mean()
            adams[0].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            adams[0].step()
        for index in torch.randperm(12).chunk(4):
            loss = (critic(x[index]) - targets[index]).square().mean(1).sum()
            adams[1].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            adams[1].step()
        for slow, fast in zip(target_critic.parameters(), critic.parameters()):
            slow.data.lerp_(fast.data, 0.8)
        normalizer.update(obs.detach().flatten(0, 1))
    for name, part in dict(actor=actor, critic=critic, target_critic=target_critic, normalizer=normalizer).items():
        for ours, theirs in zip(part.state_dict().values(), end[name].state_dict().values()):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("lam", [0.3, 0.9, 1.0])
def test_lambda_weighted_action_gradients_against_their_sums(lam):
    """gamma^c d/du_t sum_k (gamma lam)^k delta_(t+k) of every sample alone, in a backward pass of its own."""
    torch.manual_seed(3)
    horizon, n, gamma = 6, 3, 0.9
    terminated, truncated = torch.zeros(2, horizon, n, dtype=torch.bool)
    terminated[2, 1] = truncated[3, 2] = terminated[5, 0] = True
    ended = terminated | truncated
    us = list(torch.randn(horizon, n, 2, dtype=torch.float64).requires_grad_().unbind())
    state, rewards, values, next_values = torch.zeros(n, 2, dtype=torch.float64), [], [], []
    for t, u in enumerate(us):  # states and values that depend on all earlier actions of their episode
        values.append(state.sin().sum(1))
        state = (state + u).tanh() + u.square()
        rewards.append((state * u).sum(1))
        next_values.append(state.sin().sum(1))
        state = torch.where(ended[t, :, None], 0.1, state)
    rewards, values, next_values = map(torch.stack, (rewards, values, next_values))
    returns = rpo.td_lambda(rewards, next_values, terminated, truncated, gamma, lam)
    delta = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    slow = torch.zeros(horizon, n, 2, dtype=torch.float64)
    for i in range(n):
        c = 0
        for t in range(horizon):
            end = next(k for k in range(t, horizon) if ended[k, i] or k == horizon - 1)
            total = sum((gamma * lam) ** (k - t) * delta[k, i] for k in range(t, end + 1))
            slow[t, i] = gamma**c * torch.autograd.grad(total, us[t], retain_graph=True)[0][i]
            c = 0 if ended[t, i] else c + 1
    ours = rpo.action_gradients(returns, us, terminated, truncated, lam)
    torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-12)


def test_normalised_action_gradients_have_the_root_mean_square_one(tmp_path):
    end = after_run(tmp_path, *"--env cartpole --total-timesteps 4 --normalize-action-gradients".split())
    assert float(end["g"].square().mean()) == pytest.approx(1, rel=1e-5)


def test_no_sample_counts_more_than_its_bound(tmp_path):
    flags = "--env cartpole --num-envs 8 --total-timesteps 16 --normalize-action-gradients --max-action-grad-norm 0.8"
    norms = after_run(tmp_path, *flags.split())["g"].norm(dim=1)
    assert float(norms.max()) == pytest.approx(0.8, rel=1e-5) and float(norms.min()) < 0.79


def test_the_averaged_policy_is_the_one_that_is_kept(tmp_path):
    """At first, a plain mean: after one update the policy itself, after two of both. Then a share of it is kept."""
    runs = {}
    for steps, keep in ((1, 0.9), (1, 0.0), (2, 0.9), (2, 0.0), (2, 0.25)):
        flags = f"--env cartpole --total-timesteps {4 * steps} --policy-average {keep}"
        runs[steps, keep] = after_run(tmp_path / f"{steps}-{keep}", *flags.split())
    average = {k: nn.utils.parameters_to_vector(run["average"].parameters()) for k, run in runs.items()}
    one, two, between = average[1, 0.0], average[2, 0.0], runs[2, 0.25]
    assert torch.equal(one, average[1, 0.9]) and not torch.allclose(one, two)
    assert torch.equal(two, nn.utils.parameters_to_vector(runs[2, 0.0]["policy"].parameters()))
    for keep, share in ((0.9, 0.5), (0.25, 0.25)):
        torch.testing.assert_close(average[2, keep], share * one + (1 - share) * two)
    assert between["run"].policy is between["average"]
    torch.testing.assert_close(between["average"].normalizer.mean, between["normalizer"].mean)


def test_rpo_learns(learnable, tmp_path):
    """See test_shac_learns_a_task_from_a_file."""
    flags = "--horizon 6 --total-timesteps 46080 --critic-epochs 6 --actor-learning-rate 5e-3".split()
    assert learned("rpo_diffsim.py", learnable, tmp_path, *flags) > -26


def test_without_a_clip_an_overflowing_ratio_is_left_out():
    policy, u = Normal(torch.zeros(2, 1), torch.full((2, 1), 0.1)), torch.tensor([[0.0], [0.1]])
    old_log_prob = torch.tensor([-1e4, 0.5])
    surrogate, ratio, inside = rpo.rpo_surrogate(policy, u, old_log_prob, torch.ones(2, 1), math.inf, math.inf)
    assert ratio[0] == math.inf and inside.tolist() == [False, True]
    assert surrogate[0] == 0 and float(surrogate[1]) == pytest.approx(0.1 * float(ratio[1]))
