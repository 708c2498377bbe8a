"""rpo_diffsim.py: the surrogate against SHAC, a naive gradient and a closed form; the script as a user runs it."""

import pytest
import torch

import diffsim
import rpo_diffsim as rpo
from tests import run_fresh, run_script
from tests.test_shac import TINY, rows


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
            mean, log_std = actor(obs)
            u = mean + log_std.exp() * noise[t]
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
    old = rpo.log_prob(*(x.detach() for x in actor(states)), u)
    surrogate, ratio = rpo.rpo_surrogate(*actor(states), u, old, g, 0.8, 1.0)
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
    old = rpo.log_prob(old_mean, old_log_std, u)
    surrogate, ratio = rpo.rpo_surrogate(s @ w, log_std.expand_as(u), u, old, g, 0.5, 0.5)
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
    old = rpo.log_prob(old_mean, old_log_std, u)
    for i in range(3):  # <e_i, regenerated> / ratio
        g = torch.eye(3, dtype=torch.float64)[i].expand_as(u)
        surrogate, ratio = rpo.rpo_surrogate(s @ w, log_std.expand_as(u), u, old, g, 1.0, float("inf"))
        torch.testing.assert_close(surrogate / ratio, u[:, i], rtol=1e-12, atol=1e-12)


def test_a_sample_out_of_range_feels_the_kl_only():
    mean = torch.tensor([[0.0], [3.0]], dtype=torch.float64, requires_grad=True)
    log_std, u = torch.zeros(2, 1, dtype=torch.float64), torch.tensor([[0.1], [0.1]], dtype=torch.float64)
    old = rpo.log_prob(torch.zeros(2, 1, dtype=torch.float64), log_std, u)
    surrogate, ratio = rpo.rpo_surrogate(mean, log_std, u, old, torch.ones(2, 1), 0.8, 1.0)
    assert ratio[1] < 0.2 and surrogate[1] == 0
    (grad,) = torch.autograd.grad(surrogate.sum(), mean, retain_graph=True)
    assert grad[0] == 1 and grad[1] == 0
    kl = rpo.gaussian_kl(torch.zeros(2, 1), log_std, mean, log_std)
    assert kl.tolist() == pytest.approx([0.0, 4.5])
    assert torch.autograd.grad(kl.sum(), mean)[0].flatten().tolist() == pytest.approx([0.0, 3.0])


def test_kl_equals_torchs():
    _, old_mean, old_log_std, u, _, w, log_std = problem()
    new = (u, log_std.expand_as(u))
    ours = rpo.gaussian_kl(old_mean, old_log_std, *new)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(old_mean, old_log_std.exp()), normal(new[0], new[1].exp()))
    torch.testing.assert_close(ours, theirs.sum(1))


def test_proposition_1_on_a_linear_quadratic_problem():
    """Importance-weighted gradients of old samples average to the new policy's true gradient, known in closed form."""
    torch.manual_seed(2)
    n, b, sigma_old, theta_old = 400_000, 0.7, 0.5, 0.2
    theta = torch.tensor(0.35, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(-0.8, dtype=torch.float64, requires_grad=True)
    s = torch.randn(n, 1, dtype=torch.float64)
    u = theta_old * s + sigma_old * torch.randn(n, 1, dtype=torch.float64)
    old = rpo.log_prob(theta_old * s, torch.full_like(s, sigma_old).log(), u)
    g = -2 * (u - b * s)  # R = -(u - b s)^2
    surrogate, ratio = rpo.rpo_surrogate(theta * s, log_std.expand_as(s), u, old, g, 1.0, float("inf"))
    grads = torch.autograd.grad(surrogate.mean(), (theta, log_std))
    with torch.no_grad():  # J = -((theta - b)^2 + sigma^2) for s standard normal
        truth = (-2 * (theta - b), -2 * log_std.exp() ** 2)
        samples = (ratio * (g * s).squeeze(-1), ratio * (g * (u - theta * s)).squeeze(-1))
    for ours, exact, x in zip(grads, truth, samples):
        error = float(x.std()) / n**0.5
        assert error < 0.01 and abs(float(ours - exact)) < 4 * error


def numbers(folder):
    timing = ("simulate_s", "policy_s", "critic_s")
    return [{k: v for k, v in r.items() if k not in timing} for r in rows(folder)]


def test_same_seed_same_bits_and_resume_is_exact(tmp_path):
    small = [*TINY, "--env", "hopper", "--num-minibatches", 2, "--state-dependent-std", "--entropy-coef", 0.1]
    run_script("rpo_diffsim.py", *small, "--run-dir", tmp_path / "a", "--stop-after", 4)
    run_script("rpo_diffsim.py", *small, "--run-dir", tmp_path / "b", "--stop-after", 2)
    run_fresh("rpo_diffsim.py", "--resume", next((tmp_path / "b").iterdir()), "--stop-after", 4)
    run_script("rpo_diffsim.py", *small, "--run-dir", tmp_path / "c", "--stop-after", 4, "--seed", 2)
    a, b, c = (numbers(tmp_path / x) for x in "abc")
    assert len(a) == 4 and a == b and a != c
    program = torch.export.load(next((tmp_path / "b").iterdir()) / "policy.pt2")
    assert program.module()(torch.zeros(5, 11)).shape == (5, 3)


@pytest.mark.parametrize("script", ["shac.py", "rpo_diffsim.py"])
def test_no_sample_counts_more_than_its_bound(script, tmp_path):
    """With a bound far below every sample's gradient, the policy's gradient is proportional to the bound."""
    norms = []
    for bound in (1e-5, 1e-6):
        where = tmp_path / str(bound)
        flags = [*TINY, "--env", "hopper", "--max-action-grad-norm", bound, "--run-dir", where, "--stop-after", 1]
        flags += ["--update-epochs", 1] if script == "rpo_diffsim.py" else []
        run_script(script, *flags)
        norms.append(float(rows(where)[0]["grad_norm_before_clip"]))
    assert norms[0] == pytest.approx(10 * norms[1], rel=1e-2) and norms[1] > 0


@pytest.mark.parametrize(
    "args, message",
    [
        (["--clip-coef", -0.2], "--clip-coef is -0.2"),
        (["--clip-low", -1], "--clip-low is -1"),
        (["--max-action-grad-norm", 0], "--max-action-grad-norm is 0"),
        (["--smoothing", 0], "--smoothing is 0"),
        (["--stiffness", "nan"], "--stiffness is nan"),
        (["--critic-hidden", 64, 0], "--critic-hidden is (64, 0)"),
        (["--seed", -1], "--seed is -1"),
        (["--update-epochs", 0], "--update-epochs is 0"),
        (["--num-minibatches", 10**6], "--num-minibatches is 1000000, more than"),
        (["--kl-coef", "nan"], "--kl-coef is nan"),
        (["--env", "antt"], "unknown env 'antt'"),
    ],
)
def test_bad_input_is_one_line(args, message, refused):
    assert message in refused("rpo_diffsim.py", *args, "--no-compile")
