"""rp_pgm_mb.py: its estimators against closed forms and each other, and the script as a user runs it."""

import csv
import itertools
from functools import partial

import numpy as np
import pytest
import torch

import diffsim
import rp_pgm_mb as rp
from diffsim import graphs, program
from tests import run_fresh, run_script
from tests.test_shac import play, rows

TINY = "--no-compile --num-envs 2 --total-timesteps 4000 --learning-starts 20 --model-warmup 24 --batch-size 8".split()
TINY += "--eval-every 0 --eval-episodes 2 --log-every 2 --save-every 1000 --imagined-steps 20 --expand-critic".split()
GAMMA, H, OBS, ACT = 0.9, 4, 3, 2


class LinearWorld:
    """s' = A s + B a, reward -|s'|^2 - |a|^2 / 10, no end: a model and a world without error."""

    end_cost = 0.0

    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.A = 0.9 * torch.eye(OBS, dtype=torch.float64) + 0.1 * torch.randn(OBS, OBS, generator=g).double()
        self.B = 0.3 * torch.randn(OBS, ACT, generator=g).double()

    def step(self, z, action):
        return z @ self.A.T + action @ self.B.T

    def outcome(self, z, action, z_next):
        return -z_next.square().sum(-1) - 0.1 * action.square().sum(-1), torch.full_like(z[:, 0], torch.inf)


class LinearActor(torch.nn.Module):
    """a = K s + 0.2 noise"""

    def __init__(self):
        super().__init__()
        self.K = torch.nn.Parameter(0.3 * torch.randn(ACT, OBS, generator=torch.Generator().manual_seed(2)).double())

    def log_prob(self, z, u):
        return (-0.5 * ((u - z @ self.K.T) / 0.2).square() - np.log(0.2) - 0.5 * np.log(2 * np.pi)).sum(-1)

    def forward(self, z, noise):
        u = z @ self.K.T + 0.2 * noise
        return u, (-0.5 * noise.square() - np.log(0.2) - 0.5 * np.log(2 * np.pi)).sum(-1), u

    @torch.no_grad()
    def infer_noise(self, z, u):
        return (u - z @ self.K.T) / 0.2


def flat_grad(value, module):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])


def quadratic_critic(z, action):
    return -(2 * z.square().sum(-1) + 0.5 * action.square().sum(-1)).expand(2, -1)


def linear_problem(batch: int, h: int = H):
    world, actor = LinearWorld(), LinearActor()
    z, noise = torch.randn(batch, OBS).double(), torch.randn(h + 1, batch, ACT).double()
    return world, actor, z, noise


def gradient(name, world, actor, segment, noise, alpha=0.0):
    value, _ = rp.objective(name, actor, world, quadratic_critic, segment, noise, GAMMA, alpha)
    return flat_grad(value.mean(), actor).view(ACT, OBS)


def test_dp_on_a_perfect_model_is_the_analytic_gradient():
    """Forward sensitivities ds/dK, da/dK of the linear world, by hand, one sample and one entry of K at a time."""
    world, actor, z0, noise = linear_problem(3)
    found = gradient("dp", world, actor, {"z": z0[None]}, noise)
    K = actor.K.detach()
    expected = torch.zeros_like(K)
    for b in range(3):
        for r in range(ACT):
            for c in range(OBS):
                s, ds = z0[b], torch.zeros(OBS).double()
                for i in range(H + 1):
                    a = K @ s + 0.2 * noise[i, b]
                    da = K @ ds
                    da[r] += s[c]
                    if i < H:
                        s_next, ds_next = world.A @ s + world.B @ a, world.A @ ds + world.B @ da
                        expected[r, c] += GAMMA**i * (-2 * s_next @ ds_next - 0.2 * a @ da) / 3
                        s, ds = s_next, ds_next
                expected[r, c] += GAMMA**H * (-4 * s @ ds - a @ da) / 3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def real_segment(world, actor, z, noise):
    """What the world did under the policy."""
    steps = []
    with torch.no_grad():
        for eps in noise[:-1]:
            action, log_prob, u = actor(z, eps)
            z_next = world.step(z, action)
            flag = torch.zeros(len(z), dtype=torch.bool)
            step = dict(z=z, u=u, log_prob=log_prob, reward=world.outcome(z, action, z_next)[0], z_next=z_next)
            steps.append(step | dict(terminated=flag, truncated=flag))
            z = z_next
    return {k: torch.stack([s[k] for s in steps]) for k in steps[0]}


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_dr_equals_dp_on_trajectories_it_reproduces(alpha):
    world, actor, z, noise = linear_problem(50)
    segment = real_segment(world, actor, z, noise)
    dp, dr = (gradient(name, world, actor, segment, noise, alpha) for name in ("dp", "dr"))
    torch.testing.assert_close(dr, dp, rtol=1e-9, atol=1e-9)


def test_dr_takes_values_from_the_world_and_derivatives_from_the_model():
    """In another world than the model's: the value is the real one, and the gradient is not DP's."""
    model, actor, z, noise = linear_problem(50)
    world = LinearWorld()
    world.A = world.A + 0.1
    segment = real_segment(world, actor, z, noise)
    value = rp.objective("dr", actor, model, quadratic_critic, segment, noise, GAMMA, 0.0)[0]  # all weights are 1
    truth = rp.objective("dp", actor, world, quadratic_critic, segment, noise, GAMMA, 0.0)[0]
    torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-9)
    dp, dr = (gradient(name, model, actor, segment, noise) for name in ("dp", "dr"))
    assert float((dp - dr).norm() / dp.norm()) > 0.01


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_lr_agrees_with_dp_in_expectation(alpha):
    world, actor, z, noise = linear_problem(200_000, 2)
    dp = gradient("dp", world, actor, {"z": z[None]}, noise, alpha)
    draws = torch.stack(
        [gradient("lr", world, actor, {"z": part[None]}, eps, alpha)
         for part, eps in zip(z.chunk(40), noise.chunk(40, 1))]
    )  # fmt: skip
    error = draws.std(0) / 40**0.5
    assert float(((draws.mean(0) - dp).abs() / error).max()) < 4.5
    assert float((draws.mean(0) - dp).norm() / dp.norm()) < 0.1


def test_inferred_noise_reproduces_action_and_next_state():
    args = rp.Args()
    actor, model = rp.Actor(OBS, ACT, args).eval(), rp.Model(OBS, ACT, args).eval()
    z, z_next, noise = torch.randn(20, OBS), torch.randn(20, OBS), torch.randn(20, ACT)
    action, _, u = actor(z, noise)
    torch.testing.assert_close(actor.infer_noise(z, u), noise, rtol=1e-5, atol=1e-5)
    again, _, _ = actor(z, actor.infer_noise(z, u))
    torch.testing.assert_close(again, action, rtol=0, atol=1e-6)
    flag = torch.zeros(20, dtype=torch.bool)
    segment = dict(z_next=z_next, reward=torch.randn(20), terminated=flag, truncated=flag)
    found, reward, goes_on, _ = rp.real_step(model, {k: x[None] for k, x in segment.items()}, 0, z, again)
    torch.testing.assert_close(found, z_next, rtol=0, atol=1e-6)
    torch.testing.assert_close(reward, segment["reward"], rtol=0, atol=1e-6)
    assert bool((goes_on == 1).all())


def test_the_expansion_ends_with_the_episode():
    """Sample 0 terminates in step 1, sample 1 is truncated there, sample 2 goes on."""
    actor, reward = LinearActor(), torch.tensor([1.0, 2.0, 4.0]).double()
    ends = dict(terminated=torch.tensor([True, False, False]), truncated=torch.tensor([False, True, False]))

    def step(i, z, action):
        over = (ends["terminated"] | ends["truncated"]) if i == 1 else torch.zeros(3, dtype=torch.bool)
        goes_on = (~(ends["terminated"] & over)).double()
        return torch.full_like(z, i + 1.0), reward, goes_on, over

    def critic(z, action):
        return 100 * z[:, 0].expand(2, -1)

    value, _, _ = rp.expansion(
        actor, critic, step, torch.zeros(3, OBS).double(), torch.zeros(4, 3, ACT).double(), 0.5, 0.0
    )
    # r + r/2, then nothing; then V(s_2) = 200 at gamma^2; a third reward and V(s_3) = 300 at gamma^3
    expected = torch.tensor([1.5, 2 * 1.5 + 50, 4 * 1.75 + 37.5]).double()
    torch.testing.assert_close(value, expected)


def test_replay_buffer_keeps_order_and_terminated_apart_from_truncated():
    buffer = rp.ReplayBuffer(20, 2)
    for t in range(25):  # of 10 steps each: wrapped twice and a half
        buffer.add(
            obs=torch.tensor([[t], [100.0 + t]]),
            terminated=torch.tensor([t % 4 == 0, False]),
            truncated=torch.tensor([False, t % 4 == 0]),
        )
    assert len(buffer) == 10
    sample = buffer.sample(500, 3)
    obs = sample["obs"][..., 0]
    assert bool((obs.diff(dim=0) == 1).all())
    time, second = obs % 100, obs >= 100
    assert (int(time.min()), int(time.max())) == (15, 24)
    assert bool((sample["terminated"] == ((time % 4 == 0) & ~second)).all())
    assert bool((sample["truncated"] == ((time % 4 == 0) & second)).all())
    assert float((buffer.sample(500, 1, recent=4)["obs"] % 100).min()) == 23
    other = rp.ReplayBuffer(20, 2)
    other.load_state_dict(buffer.state_dict())
    assert all(torch.equal(x, other.data[k]) for k, x in buffer.data.items()) and other.count == 25
    for one in buffer, other:
        ends, share = one.ends(500)  # steps 16, 20 and 24 of the first environment
        assert set(ends["obs"][:, 0].tolist()) == {16, 20, 24} and float(share) == pytest.approx(3 / 20)
        assert ends["obs"].shape == (500, 1) and bool(ends["terminated"].all())
    other.load_state_dict(rp.ReplayBuffer(20, 2).state_dict())  # saved before the first step
    assert len(other) == 0


@pytest.mark.parametrize("every", [1, 17, 1000])
def test_the_share_of_quiet_episodes(every):
    begun = every * torch.arange(1000)
    quiet = torch.cat([rp.is_quiet(x[None], 0.5) for x in begun])  # of one environment, one after the other
    assert max(len(list(same)) for _, same in itertools.groupby(quiet.tolist())) < 16
    assert 0.4 < rp.is_quiet(torch.full((200,), every), 0.5).float().mean() < 0.6  # of many that begin together
    for share in (0.0, 0.25, 0.9, 1.0):
        quiet = rp.is_quiet(begun, torch.full((1000,), share))
        assert abs(quiet.float().mean() - share) < 0.05, share
    grows = rp.is_quiet(begun, begun / (1000 * every)).float()
    assert grows[:200].mean() < 0.2 < 0.8 < grows[-200:].mean()


def test_the_cost_of_an_end_grows_with_the_steps_and_the_model_knows_it(tmp_path):
    """Of --end-cost times the size of the mean reward it is a half after 30 of 60 steps."""
    flags = ["--env", "Pendulum-v1", *TINY, "--growth-steps", 60, "--end-cost", 100, "--stop-after", 15]
    run_script("rp_pgm_mb.py", *flags, "--run-dir", tmp_path)
    saved = torch.load(next(tmp_path.iterdir()) / "checkpoint.pt", weights_only=True)
    mean, cost = saved["rewards"]["mean"][0], saved["model"]["end_cost"]
    assert mean < 0
    torch.testing.assert_close(cost, -mean * 100 * 0.5, rtol=0.1, atol=0)


@pytest.mark.parametrize("gradient", ["dp", "dr"])
def test_an_end_costs_its_probability_times_the_cost(gradient):
    """A world that may end at any step, and a policy that cannot help it: the expansions differ by the cost alone."""
    torch.manual_seed(1)
    args = rp.Args(actor_hidden=(8,), model_hidden=(8,), outcome_hidden=(8,), critic_hidden=(8,))
    actor, model, critic = (part(OBS, ACT, args) for part in (rp.Actor, rp.Model, rp.Critics))
    z, noise = torch.randn(50, OBS), torch.zeros(2, 50, ACT)
    action, log_prob, u = actor(z, noise[0])
    segment = dict(z=z, u=u, log_prob=log_prob, z_next=torch.randn(50, OBS), reward=torch.randn(50))
    segment |= dict(terminated=torch.arange(50) % 3 == 0, truncated=torch.zeros(50).bool())
    segment = {k: x[None].detach() for k, x in segment.items()}
    step = rp.partial(rp.real_step, model, segment) if gradient == "dr" else rp.partial(rp.predicted_step, model)
    without, _, _ = rp.expansion(actor, critic, step, z, noise, GAMMA, 0.1)
    _, free, goes_on, _ = step(0, z, action)
    model.end_cost.fill_(7.0)
    (with_cost, _, _), (_, dear, _, _) = rp.expansion(actor, critic, step, z, noise, GAMMA, 0.1), step(0, z, action)
    torch.testing.assert_close(without - with_cost, 7 * (1 - goes_on), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(free - dear, 7 * (1 - goes_on), atol=1e-5, rtol=1e-5)
    if gradient == "dr":
        torch.testing.assert_close(1 - goes_on, segment["terminated"][0].float(), atol=1e-6, rtol=0)


def test_without_an_end_those_of_termination_have_no_share():
    buffer = rp.ReplayBuffer(20, 2)
    buffer.add(obs=torch.zeros(2, 1), terminated=torch.tensor([False, False]))
    ends, share = buffer.ends(5)
    assert ends["obs"].shape == (5, 1) and float(share) == 0


def test_loss_of_termination_is_the_mean_over_all_steps():
    """With the ends from a batch of their own; here that batch is all of them, so that no chance is left."""
    torch.manual_seed(1)
    model = rp.Model(OBS, ACT, rp.Args())
    batch = dict(z=torch.randn(50, OBS), z_next=torch.randn(50, OBS), u=torch.randn(50, ACT), reward=torch.randn(50))
    batch["terminated"] = torch.arange(50) % 10 == 0
    _, logit = model.outcome(batch["z"], torch.tanh(batch["u"]), batch["z_next"])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logit, (~batch["terminated"]).float())
    ends = {k: x[batch["terminated"]] for k, x in batch.items()}
    torch.testing.assert_close(model.losses(batch, ends, torch.tensor(0.1))[2], expected)


def test_rollouts_go_on_for_so_many_steps_or_to_an_end():
    torch.manual_seed(1)
    rollouts, lengths = rp.Rollouts(8, 3, torch.zeros(1, 2)), []

    def model(obs):
        """Counts its steps in the first number; where the second is 1, the episode ends."""
        return dict(final_obs=obs + torch.tensor([1.0, 0.0]), goes_on=1 - obs[:, 1], obs=obs)

    for i in range(60):
        starts = torch.stack([torch.zeros(4), torch.full((4,), float(i % 2))], -1)
        step = rollouts.step(model, starts)
        lengths.append(step["obs"])
        if i == 29:
            saved = {k: x.clone() for k, x in rollouts.state_dict().items()}
    age, ends = torch.cat(lengths).long().unbind(1)
    for counts, n in (
        (age[ends == 0].bincount(), 3),
        (age[ends == 1].bincount(), 1),
    ):  # all ages alike
        assert len(counts) == n and counts.max() < 1.3 * counts.min()
    rollouts.load_state_dict(saved)
    assert torch.equal(rollouts.obs, saved["obs"]) and torch.equal(rollouts.age, saved["age"])


def test_truncated_weights_forget_the_next_episode():
    log_ratio = torch.tensor([[-1.0, 0.5, -1.0], [-2.0, 0.5, -2.0], [-4.0, 0.5, -4.0]]).double()
    ended = torch.zeros(3, 3, dtype=torch.bool)
    ended[1, 2] = True  # sample 2: its third action is the next episode's
    expected = torch.tensor([-7.0, 0.0, -3.0]).double().exp()
    torch.testing.assert_close(rp.truncated_weights(log_ratio, ended), expected / expected.mean())


def test_recorded_segments_of_older_policies_count_less():
    """dr's objective is the value times the truncated importance weight of the segment."""
    world, actor, z, noise = linear_problem(50)
    segment = real_segment(world, actor, z, noise)
    value = rp.objective("dr", actor, world, quadratic_critic, segment, noise, GAMMA, 0.0)[0]
    unlikely = segment | dict(log_prob=segment["log_prob"] + torch.linspace(0, 1, 50).double())
    weighted = rp.objective("dr", actor, world, quadratic_critic, unlikely, noise, GAMMA, 0.0)[0]
    weight = torch.exp(-H * torch.linspace(0, 1, 50).double())
    torch.testing.assert_close(weighted, value * weight / weight.mean())


def singular_values(net):
    return [
        float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
        for layer in net
        if isinstance(layer, torch.nn.Linear) and torch.nn.utils.parametrize.is_parametrized(layer)
    ]


def test_spectral_norm_after_training(tmp_path):
    flags = "--batch-size 64 --model-learning-rate 3e-4 --actor-hidden 64 64 64 --power-iterations 50".split()
    flags += ["--stop-after", 60]
    run_script("rp_pgm_mb.py", "--env", "Pendulum-v1", *TINY, *flags, "--run-dir", tmp_path)
    checkpoint = torch.load(next(tmp_path.iterdir()) / "checkpoint.pt", weights_only=True)
    args = rp.Args(**checkpoint["args"])
    actor, model = rp.Actor(3, 1, args).eval(), rp.Model(3, 1, args).eval()
    start = [x.clone() for x in model.parameters()]
    actor.load_state_dict(checkpoint["actor"])
    model.load_state_dict(checkpoint["model"])
    assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters()))
    values = singular_values(actor.net) + singular_values(model.dynamics)
    assert len(values) == 2 + 3 and not singular_values(model.outcomes)
    assert max(abs(x - 1) for x in values) < 1e-2


@pytest.mark.parametrize("target, rises", [(5, True), (-50, False)])
def test_temperature_follows_the_target_entropy(target, rises, tmp_path):
    flags = ["--env", "Pendulum-v1", *TINY, "--target-entropy", target, "--stop-after", 24]
    run_script("rp_pgm_mb.py", *flags, "--run-dir", tmp_path)
    checkpoint = torch.load(next(tmp_path.iterdir()) / "checkpoint.pt", weights_only=True)
    assert (checkpoint["temperature"]["0"] > np.log(rp.Args.entropy_coef)) == rises


@pytest.mark.parametrize("gradient", ["dp", "dr", "lr"])
def test_every_weight_of_the_policy_is_trained(gradient, tmp_path):
    flags = ["--gradient", gradient, "--stop-after", 20, "--run-dir", tmp_path]
    run_script("rp_pgm_mb.py", "--env", "Pendulum-v1", *TINY, "--model-warmup", 0, *flags)
    checkpoint = torch.load(next(tmp_path.iterdir()) / "checkpoint.pt", weights_only=True)
    actor = rp.Actor(3, 1, rp.Args(**checkpoint["args"]))
    assert len(checkpoint["actor_optimizer"]["state"]) == len(list(actor.parameters()))


def test_the_average_follows_the_normalised_weights():
    actor, average = rp.Actor(4, 2, rp.Args()).eval(), rp.Actor(4, 2, rp.Args(spectral_norm=False))

    def weights():
        return torch.nn.utils.parameters_to_vector(average.parameters()).detach().clone()

    start = weights()
    rp.move_average(average, actor, 0.25)
    quarter = weights()
    rp.move_average(average, actor, 1.0)
    z = torch.randn(5, 4)
    for ours, theirs in zip(*((p.mean, p.stddev) for p in (average.distribution(z), actor.distribution(z)))):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(quarter, start + 0.25 * (weights() - start))


@pytest.mark.parametrize("gradient, obs_dim, act_dim, bound", [("dr", 6, 2, 1), ("lr", 3, 1, 2)])
def test_same_seed_same_bits_and_resume(gradient, obs_dim, act_dim, bound, arm, tmp_path):
    env = arm if gradient == "dr" else "Pendulum-v1"
    flags = ["--env", env, *TINY, "--gradient", gradient, "--spectral-norm" if env == arm else "--no-spectral-norm"]
    run_script("rp_pgm_mb.py", *flags, "--run-dir", tmp_path / "a", "--stop-after", 24)
    run_script("rp_pgm_mb.py", *flags, "--run-dir", tmp_path / "b", "--stop-after", 17)
    run = next((tmp_path / "b").iterdir())
    out = run_fresh("rp_pgm_mb.py", "--resume", run, "--env", env, "--stop-after", 24)
    a, b = ([{k: v for k, v in r.items() if not k.endswith("_s")} for r in rows(tmp_path / x)] for x in "ab")
    assert len(a) == len(b) == 24 and a[:17] == b[:17]
    assert a == b if env == arm else "episodes start anew" in out
    action = torch.export.load(run / "policy.pt2").module()(10 * torch.randn(5, obs_dim)).detach()
    assert action.shape == (5, act_dim) and float(action.abs().max()) <= bound
    assert f"{env} on " in play(run, "--episodes", 1, "--env", env).stdout


def test_what_is_compiled_computes_the_same(tmp_path, monkeypatch):
    """Each function in one graph, its gradient inside; the C++ is left out, which takes a minute."""
    graphs_made = []

    def traced(function, options, **how):
        graphs_made.append(function.__name__)
        return compile_(function, backend="eager", **how)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(graphs, "compiler_error", lambda: None)
    monkeypatch.setenv("DIFFSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = ["--env", "Pendulum-v1", *TINY, *"--unroll 1 --model-hidden 8 --stop-after 16".split()]
    run_script("rp_pgm_mb.py", *flags, "--run-dir", tmp_path / "plain")
    assert not graphs_made
    run_script("rp_pgm_mb.py", *flags, "--compile", "--run-dir", tmp_path / "compiled")
    assert {"model_gradient", "imagine", "critic_gradient", "policy_gradient"} < set(graphs_made)
    plain, compiled = (rows(tmp_path / x)[-1] for x in ("plain", "compiled"))
    for name in ("policy_loss", "value_loss", "q_value", "state_loss", "norm_before_clip", "entropy_coef"):
        assert float(compiled[name]) == pytest.approx(float(plain[name]), rel=1e-3), name


@pytest.mark.parametrize("broken", [False, True])
def test_without_a_compiler_a_line_says_so_and_functions_run_as_they_are(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSIM_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if broken:  # it says so only when it is asked to compile
        monkeypatch.setattr(graphs, "compiler_error", lambda: None)

        def fails(*inputs):
            raise torch._dynamo.exc.TorchDynamoException("no space left\nand more")

        monkeypatch.setattr(torch, "compile", lambda function, **how: fails)
    else:
        monkeypatch.setenv("CXX", "/nonsense")
    with pytest.warns(UserWarning, match="^(no C|no space left).*: the updates run uncompiled") as said:
        double = graphs.compiler(True)(lambda x: 2 * x)
        assert double(3) == double(3) == 6
    assert len(said) == 1 and len(str(said[0].message).splitlines()) == 1


def test_ctrl_c_while_an_update_is_compiled_is_not_its_error(tmp_path, monkeypatch, recwarn):
    """A terminal sends it to the C++ compiler, too, so that compiling fails."""

    def interrupted(*inputs):
        program.tell("interrupted")
        raise torch._dynamo.exc.TorchDynamoException("C++ compile error")

    monkeypatch.setenv("DIFFSIM_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(program, "told", False)
    monkeypatch.setattr(graphs, "compiler_error", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **how: interrupted)
    assert graphs.compiler(True)(lambda x: 2 * x)(3) == 6 and not recwarn


def test_the_lab_measures_every_estimator(tmp_path):
    from benchmarks import gradients

    for env in ("cartpole", "Pendulum-v1"):
        flags = ["--env", env, *TINY, "--imagined-steps", 0, "--stop-after", 30]
        run_script("rp_pgm_mb.py", *flags, "--run-dir", tmp_path / "runs")
    lab = dict(horizons=(1, 4), draws=4, batch=4, out=tmp_path / "probes.csv")
    for runs in ("*", "Pendulum*"):  # the second time in the place of the first
        gradients.main(gradients.Args(tuple((tmp_path / "runs").glob(runs)), **lab))
    with open(tmp_path / "probes.csv") as f:
        rows = list(csv.DictReader(f))
    expected = {(env, name, h) for env in ("cartpole", "Pendulum-v1") for name in ("dp", "dr", "lr") for h in (1, 4)}
    expected |= {("cartpole", name, h) for name in ("true", "mfg") for h in (1, 4)}
    found = [(r["run"].split("__")[0], r["estimator"], int(r["h"])) for r in rows]
    assert len(found) == len(set(found)) and set(found) == expected
    assert all(float(r["variance"]) > 0 for r in rows)
    bias = {
        name: sum(float(r["bias"]) for r in rows if r["bias"] and r["estimator"] == name) for name in ("dp", "true")
    }
    assert bias["dp"] > 0 == bias["true"]


def test_the_parts_of_the_gradient_sum_to_it(tmp_path):
    from benchmarks import gradients

    run_script("rp_pgm_mb.py", "--env", "Pendulum-v1", *TINY, "--stop-after", 30, "--run-dir", tmp_path)
    lab = gradients.Lab(next(tmp_path.iterdir()), 4)
    z, noise = torch.randn(4, 3), torch.randn(5, 4, 1)
    value, _ = rp.objective("dp", lab.actor, lab.model, lab.critic, {"z": z[None]}, noise, lab.args.gamma, lab.alpha)
    parts = lab.parts(z, noise)
    assert parts.shape[0] == 5 and bool((parts.norm(dim=1) > 0).all())
    torch.testing.assert_close(parts.sum(0), lab.flat_grad(value), rtol=1e-4, atol=1e-6)


def test_through_the_simulator_the_score_function_agrees_with_the_true_gradient():
    """The lab's "mfg" and "true", on one state and many draws of noise."""
    from benchmarks.gradients import Lab

    torch.manual_seed(0)
    args = rp.Args(spectral_norm=False, actor_hidden=(8,))
    batch, h = 2048, 3
    lab = Lab.__new__(Lab)  # without a checkpoint
    lab.env = env = diffsim.make("cartpole", batch, compile=False)
    lab.actor, lab.normalizer, lab.model = actor, _, _ = rp.Actor(5, 1, args), rp.Normalizer(5), rp.Model(5, 1, args)

    def critic(z, action):
        return (3 * z.sum(-1) - (action[:, 0] - 1).square()).expand(2, -1)

    lab.policy = rp.DeterministicPolicy(lab.normalizer, actor, env.single_action_space)
    start = env.get_state()
    start = {k: x[:, :1].expand_as(x) if k in ("qpos", "qvel") else x for k, x in start.items()}
    true, mfg = [], []
    for _ in range(12):
        env.set_state(start)
        noise = torch.randn(h + 1, batch, 1)
        step = partial(lab.simulator_step, [])
        value, _, visited = rp.expansion(actor, critic, step, lab.normalizer(env.detach()), noise, 0.9, 0.1)
        true.append(flat_grad(value.mean(), actor))
        visited = [{k: x.detach() for k, x in s.items()} for s in visited]
        mfg.append(flat_grad(rp.score_surrogate(actor, critic, visited, 0.1).mean(), actor))
    true, mfg = torch.stack(true), torch.stack(mfg)
    direction = true.mean(0) / true.mean(0).square().sum()
    along = mfg @ direction  # 1 where it has no bias
    error = float(along.std()) / 12**0.5
    assert error < 0.2 and abs(float(along.mean()) - 1) < 4 * error


@pytest.mark.parametrize(
    "args, message",
    [
        (["--env", "antt"], "unknown env 'antt'"),
        (["--env", "CartPole-v1"], "Discrete(2)"),
        (["--num-envs", 0], "--num-envs is 0"),
        (["--critic-hidden", 64, 0], "--critic-hidden is 64 0;"),
        (["--unroll", -1], "--unroll is -1"),
        (["--unroll", 2000], "above --unroll"),
        (["--log-std-init", "nan"], "--log-std-init is nan"),
        (["--target-entropy", "nan"], "--target-entropy is nan"),
        (["--policy-average", 2], "--policy-average is 2"),
        (["--update-ratio", 0], "--update-ratio is 0"),
        (["--resume", "nowhere"], "--resume nowhere"),
    ],
)
def test_bad_input_is_one_line(args, message, refused):
    assert message in refused("rp_pgm_mb.py", *args, "--no-compile")
