"""RP-PGM: model-based reparameterization policy gradients (Zhang et al., NeurIPS 2023, arXiv 2310.19927), in one file.

Here the simulator is a black box: it is sampled, and a smooth model of it is learned. The policy climbs the gradient of
an h-step expansion, V = sum_(i<h) gamma^i r(s_i, a_i) + gamma^h Q(s_h, a_h), by one of three estimators:

    dp  derivatives on predictions: back-propagate through the model's own trajectory
    dr  derivatives on real trajectories: the noise that explains them is inferred, and only the derivatives are the
        model's (SVG(h), Heess et al. 2015, arXiv 1510.09142)
    lr  likelihood ratio: the score function on the model's trajectories, no derivative of the model

Spectral normalisation of model and policy bounds how fast the gradient's variance grows with h. Critics, temperature
and replay buffer are soft actor-critic's (Haarnoja et al. 2018, arXiv 1812.05905); with --unroll 0 this is that.

    python rp_pgm_mb.py --env Hopper-v5                             # any Gymnasium id with continuous actions
    python rp_pgm_mb.py --env Hopper-v5 --gradient dr --no-spectral-norm
    python rp_pgm_mb.py --env hopper --probe-every 10000            # bias and variance of each estimator
    python -m diffsim.play runs/hopper-v5__rp_pgm_mb__1__<time>     # returns, and --video hopper.mp4
"""

import copy
import csv
import os
import random
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

START = time.time()  # wall-clock counts from here, imports and compilation included

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import tyro  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.nn.utils.parametrizations import spectral_norm  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

import diffsim  # noqa: E402
from diffsim.gymnasium_env import GymnasiumEnv, is_gymnasium_id  # noqa: E402


@dataclass
class Args:
    env: str = "Hopper-v5"
    """environment: a Gymnasium id, a diffsim task (see `python -m diffsim`), or path/to/my_task.py:MyTask"""
    physics: Literal["diffsim", "mujoco"] = "diffsim"
    """engine of a diffsim task (Gymnasium's environments have their own)"""
    seed: int = 1
    """seed of the networks, the noise and the environments"""
    num_envs: int = 1
    """environments stepped side by side"""
    total_timesteps: int = 150_000
    """environment steps over all environments"""
    gradient: Literal["dp", "dr", "lr"] = "dp"
    """estimator of the policy gradient: see the first lines of this file"""
    unroll: int = 3
    """h, steps of the expansion before the critic takes over; 0: soft actor-critic"""
    spectral_norm: bool = True
    """spectral normalisation of all layers of the model but the last, and of the policy's hidden-to-hidden layers"""
    power_iterations: int = 5
    """power iterations of the spectral normalisation in an update"""
    learning_starts: int = 1_000
    """environment steps of uniform random actions before the first update"""
    model_warmup: int = 5_000
    """environment steps until the expansion replaces soft actor-critic's gradient; the model learns meanwhile"""
    update_ratio: float = 1.0
    """updates of model, critic and policy per environment step"""
    model_updates: int = 1
    """updates of the model in such an update (the paper: 4)"""
    policy_frequency: int = 2
    """updates of model and critic to one of the policy"""
    batch_size: int = 128
    """samples of an update"""
    dr_recent: int = 10_000
    """dr: segments come from this many latest environment steps, weighted by truncated importance ratios"""
    buffer_size: int = 1_000_000
    """environment steps the replay buffer holds"""
    actor_learning_rate: float = 3e-4
    """learning rate of the policy (the paper: 1e-4)"""
    critic_learning_rate: float = 5e-4
    """learning rate of the critics (the paper: 1e-4)"""
    model_learning_rate: float = 1e-3
    """learning rate of the model"""
    anneal_lr: bool = False
    """let the learning rates of policy, temperature and critic fall linearly to 0"""
    max_grad_norm: float = 1.0
    """gradients of model and policy are scaled down to this norm"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target critics towards the critics at each update"""
    policy_average: float = 0.001
    """step, at each of its updates, towards the policy, of the average that is evaluated and saved; 1: the policy"""
    entropy_coef: float = 0.1
    """initial temperature: weight of the policy's entropy in every reward"""
    learn_entropy_coef: bool = True
    """adapt the temperature so that the entropy comes to target_entropy"""
    target_entropy: float | None = None
    """entropy of the policy, after the tanh, that the temperature aims at; default: -act_dim"""
    actor_hidden: tuple[int, ...] = (128, 128)
    """hidden layers of the policy (the paper: 512 512 512 512)"""
    critic_hidden: tuple[int, ...] = (128, 128)
    """hidden layers of a critic"""
    model_hidden: tuple[int, ...] = (128, 128, 128)
    """hidden layers of the dynamics (the paper: 256 256 256 256 256 256)"""
    outcome_hidden: tuple[int, ...] = (64, 64)
    """hidden layers of the network of reward and termination"""
    log_std_init: float = -1.0
    """initial log standard deviation of the policy, before the tanh; always kept between -5 and 2"""
    activation: Literal["elu", "relu"] = "relu"
    """activation function of all networks; both are 1-Lipschitz"""
    probe_every: int = 0
    """environment steps between measurements of the gradient estimators, to probe.csv; 0: none"""
    probe_draws: int = 32
    """independent draws of the gradient in a measurement"""
    probe_batch: int = 64
    """samples of a draw"""
    device: str = "cpu"
    """cpu or cuda"""
    compile: bool = True
    """compile the physics of a diffsim task (once for a task and num_envs, a minute or two, then cached)"""
    num_threads: int = 1
    """threads of torch; the same number gives the same bits"""
    eval_every: int = 10_000
    """environment steps between evaluations of the deterministic policy; 0: only at the end"""
    eval_episodes: int = 10
    """episodes of an evaluation (at most num_envs on diffsim)"""
    log_every: int = 1_000
    """environment steps between rows of metrics.csv"""
    save_every: int = 25_000
    """environment steps between checkpoints, replay buffer included"""
    stop_after: int | None = None
    """stop after this many iterations (steps of all environments), and save: --resume goes on"""
    resume: str | None = None
    """run folder or checkpoint.pt to continue, with the arguments it was started with"""
    run_dir: str = "runs"
    """where the run folder is made"""
    capture_video: bool = False
    """record the final policy as video.mp4 in the run folder (diffsim's tasks)"""


# What differs from Args for an environment; flags on the command line win.
DEFAULTS = {
    "InvertedPendulum-v5": dict(total_timesteps=10_000, model_warmup=0, log_std_init=0.0),
    "InvertedDoublePendulum-v5": dict(total_timesteps=30_000, model_warmup=0, log_std_init=0.0),
    "Hopper-v5": dict(total_timesteps=100_000, target_entropy=-1.0),  # as MBPO's (Janner et al. 2019, arXiv 1906.08253)
    "HalfCheetah-v5": dict(total_timesteps=200_000),
    "diffsim": dict(num_envs=16, eval_episodes=16),  # the simulator is at its best with many
}
HORIZONS = (1, 2, 4, 8, 16, 32)  # of a probe


def fail(message: str):
    """One clear line for bad input."""
    print(f"rp_pgm_mb.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def mlp(sizes: list[int], args: Args, normalized: range = range(0)) -> nn.Sequential:
    """Linear layers with activations between; those of the indices `normalized` have a largest singular value of 1."""
    layers: list[nn.Module] = []
    for k, (i, o) in enumerate(zip(sizes[:-1], sizes[1:])):
        linear = nn.Linear(i, o)
        nn.init.orthogonal_(linear.weight, 0.01 if k == len(sizes) - 2 else 1.0 if k in normalized else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers.append(spectral_norm(linear, n_power_iterations=args.power_iterations) if k in normalized else linear)
        layers.append(nn.ELU() if args.activation == "elu" else nn.ReLU())
    return nn.Sequential(*layers[:-1])


def squashed_log_prob(noise, log_std, u):
    """Log density (...,) of tanh(u), u = mean + std noise."""
    slope = 2 * (np.log(2) - u - nn.functional.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return -(0.5 * noise.square() + log_std + slope).sum(-1) - 0.5 * np.log(2 * np.pi) * u.shape[-1]


@torch.no_grad()
def follow_spectral_norm(net: nn.Sequential):
    """Power iterations on weights that have changed; at other times (eval mode) u and v of the estimate stay."""
    for layer in net:
        if parametrize.is_parametrized(layer):
            layer.parametrizations.train()
            layer.weight  # noqa: B018  computing it iterates
            layer.parametrizations.eval()


class Actor(nn.Module):
    """Gaussian over u, squashed: action = tanh(u) in (-1, 1)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim, *args.actor_hidden, 2 * act_dim]
        self.net = mlp(sizes, args, range(1, len(args.actor_hidden) if args.spectral_norm else 0))
        self.log_std_init = args.log_std_init

    def distribution(self, z):
        """Mean and log standard deviation of u, both (..., act_dim)."""
        mean, log_std = self.net(z).chunk(2, -1)
        return mean, (log_std + self.log_std_init).clamp(-5.0, 2.0)

    def log_prob(self, z, u):
        """Log density of tanh(u): (...,)"""
        mean, log_std = self.distribution(z)
        return squashed_log_prob((u - mean) * (-log_std).exp(), log_std, u)

    def forward(self, z, noise):
        """Action (..., act_dim), its log density (...,) and u: differentiable in the policy's parameters and in z."""
        mean, log_std = self.distribution(z)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), squashed_log_prob(noise, log_std, u), u

    @torch.no_grad()
    def infer_noise(self, z, u):
        """The noise with which the policy outputs u."""
        mean, log_std = self.distribution(z)
        return (u - mean) * (-log_std).exp()


@torch.no_grad()
def follow(average: Actor, actor: Actor, step: float):
    """Move an average, which has plain weights, towards the normalised weights of the policy."""
    for mean, layer in zip(average.net, actor.net):
        if isinstance(layer, nn.Linear):
            mean.weight.lerp_(layer.weight, step)
            mean.bias.lerp_(layer.bias, step)


class Critics(nn.Module):
    """Two soft Q functions."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim + act_dim, *args.critic_hidden, 1]
        self.members = nn.ModuleList(mlp(sizes, args) for _ in range(2))

    def forward(self, z, action):
        """(2, ...)"""
        inputs = torch.cat([z, action], -1)
        return torch.stack([member(inputs).squeeze(-1) for member in self.members])


class Model(nn.Module):
    """Learned world, in normalised observations: s' = s + f(s, a), reward and probability of going on."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        normalized = range(len(args.model_hidden) if args.spectral_norm else 0)
        self.dynamics = mlp([obs_dim + act_dim, *args.model_hidden, obs_dim], args, normalized)
        self.outcomes = mlp([2 * obs_dim + act_dim, *args.outcome_hidden, 2], args)
        self.register_buffer("change", torch.ones(obs_dim))  # root mean square of s' - s
        self.register_buffer("reward", torch.tensor([0.0, 1.0]))  # mean and deviation

    def step(self, z, action):
        """Next observation (B, obs_dim)."""
        return z + self.change * self.dynamics(torch.cat([z, action], -1))

    def outcome(self, z, action, z_next):
        """Reward and logit of going on, both (B,)."""
        reward, logit = self.outcomes(torch.cat([z, action, z_next], -1)).unbind(-1)
        return self.reward[0] + self.reward[1] * reward, logit + 3.0  # few steps end an episode

    def loss(self, z, action, reward, z_next, terminated):
        """Squared errors of the next observation and of the reward, cross entropy of termination."""
        wanted = (z_next - z) / self.change
        state_loss = (self.dynamics(torch.cat([z, action], -1)) - wanted).square().mean()
        predicted, logit = self.outcome(z, action, z_next)
        reward_loss = ((predicted - reward) / self.reward[1]).square().mean()
        return state_loss, reward_loss, nn.functional.binary_cross_entropy_with_logits(logit, (~terminated).float())


class Normalizer(nn.Module):
    """Running mean and variance."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.tensor(1e-4))

    def forward(self, obs):
        return (obs - self.mean) * torch.rsqrt(self.var + 1e-5)

    @torch.no_grad()
    def update(self, obs):
        """Merge the moments of a batch (Chan et al. 1979)."""
        mean, var, n = obs.mean(0), obs.var(0, unbiased=False), obs.shape[0]
        delta, total = mean - self.mean, self.count + n
        self.var.copy_((self.var * self.count + var * n + delta**2 * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)


class DeterministicPolicy(nn.Module):
    """Observation -> action within its bounds, its normaliser inside."""

    def __init__(self, normalizer, actor, space):
        super().__init__()
        self.normalizer, self.actor = normalizer, actor
        low, high = (torch.as_tensor(x, dtype=torch.float32) for x in (space.low, space.high))
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("half_range", (high - low) / 2)

    def scale(self, action):
        """From (-1, 1) to the environment's bounds."""
        return self.middle + self.half_range * action

    def forward(self, obs):
        return self.scale(torch.tanh(self.actor.distribution(self.normalizer(obs))[0]))


class ReplayBuffer:
    """The latest `capacity` steps of N environments, in order. Terminated and truncated are kept apart."""

    def __init__(self, capacity: int, num_envs: int, device="cpu", **shapes: tuple[int, ...]):
        self.capacity, self.num_envs, self.count = max(1, capacity // num_envs), num_envs, 0
        flags = ("terminated", "truncated")
        self.data = {
            k: torch.zeros(
                self.capacity, num_envs, *shape, dtype=torch.bool if k in flags else torch.float32, device=device
            )
            for k, shape in shapes.items()
        }

    def __len__(self):
        """Steps of each environment that are held."""
        return min(self.count, self.capacity)

    def add(self, **step):
        """One step of every environment, each (N, ...)."""
        for k, x in step.items():
            self.data[k][self.count % self.capacity] = x
        self.count += 1

    def sample(self, size: int, length: int = 1, recent: int | None = None) -> dict[str, torch.Tensor]:
        """Segments of `length` successive steps, (length, size, ...), among the `recent` latest environment steps."""
        held = len(self) if recent is None else min(len(self), max(recent // self.num_envs, length))
        start = self.count - held + torch.randint(held - length + 1, (size,))
        index = (start + torch.arange(length)[:, None]) % self.capacity
        env = torch.randint(self.num_envs, (size,)).expand(length, size)
        return {k: x[index, env] for k, x in self.data.items()}

    def state_dict(self):
        return dict(count=self.count, data={k: x[: len(self)].clone() for k, x in self.data.items()})

    def load_state_dict(self, state):
        self.count = state["count"]
        for k, x in state["data"].items():
            self.data[k][: len(x)] = x


def expansion(actor, critic, step, z, noise, gamma: float, alpha: float, visited: list | None = None):
    """V (B,) = sum_(i<h) gamma^i (r_i - alpha log pi_i) + gamma^h (Q(s_h, a_h) - alpha log pi_h), and mean entropy.

    `step(i, z, action)` -> next z, reward, share of episodes that go on, and which have ended (None: unknown): of a
    model, or of the world. Where an episode ends the expansion ends, with the value of its last state. noise:
    (h + 1, B, act_dim). `visited` receives what the score function wants to know about each step.
    """
    running = torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
    value, weight, entropies = 0.0, torch.ones_like(z[:, 0]), []
    for i in range(len(noise)):
        action, log_prob, u = actor(z, noise[i])
        entropies.append(-log_prob.mean())
        last = i == len(noise) - 1
        if last:
            gain = weight * (critic(z, action).amin(0) - alpha * log_prob)
        else:
            z_next, reward, goes_on, ended = step(i, z, action)
            gain = weight * (reward - alpha * log_prob)
            gain = gain if ended is None else torch.where(running, gain, 0.0)
        value = value + gain
        if visited is not None:
            visited.append(dict(z=z, u=u, gain=gain, weight=weight, counts=running | last))
        if not last and ended is None:
            weight, z = weight * gamma * goes_on, z_next
        elif not last:
            weight = torch.where(running, weight * gamma * goes_on, weight)
            z = torch.where(running[:, None], z_next, z)
            running = running & ~ended
    return value, torch.stack(entropies).mean()


def predicted_step(model, i, z, action):
    """dp, lr: the model's own next state."""
    z_next = model.step(z, action)
    reward, logit = model.outcome(z, action, z_next)
    return z_next, reward, torch.sigmoid(logit), None


def real_step(model, segment, i, z, action):
    """dr: the recorded next state, reward and end; only their derivatives are the model's."""

    def real(x, derivative):
        return x + (derivative - derivative.detach())

    terminated = segment["terminated"][i]
    z_next = real(segment["z_next"][i], model.step(z, action))
    reward, logit = model.outcome(z, action, z_next)
    goes_on = real((~terminated).to(z.dtype), torch.sigmoid(logit))
    return z_next, real(segment["reward"][i], reward), goes_on, terminated | segment["truncated"][i]


def simulator_step(env, policy, record: list, i, z, action):
    """The world itself: a differentiable environment of diffsim, what happens recorded for dr."""
    _, reward, terminated, truncated, info = env.step(policy.scale(action))
    z_next = policy.normalizer(info["final_obs"])
    record.append(dict(z=z, reward=reward, z_next=z_next, terminated=terminated, truncated=truncated))
    return z_next, reward, (~terminated).to(z.dtype), terminated | truncated


def score_surrogate(actor, critic, visited: list, alpha: float):
    """(B,) whose gradient is the score function's: log pi(a_i | s_i) times what followed, less a baseline.

    The baseline is the critic's value of another action in the same state: independent of a_i, so without bias.
    """
    surrogate = 0.0
    following = torch.zeros_like(visited[0]["gain"])
    for step in reversed(visited):
        following = following + step["gain"]
        with torch.no_grad():
            other, log_prob, _ = actor(step["z"], torch.randn_like(step["u"]))
            baseline = step["weight"] * (critic(step["z"], other).amin(0) - alpha * log_prob)
            advantage = torch.where(step["counts"], following - baseline, 0.0)
        surrogate = surrogate + actor.log_prob(step["z"], step["u"]) * advantage
    return surrogate


def truncated_weights(log_ratio, ended):
    """(B,), of mean 1: probability of a segment's actions under the policy by that when recorded, at most 1.

    Both arguments are (h, B); actions after the segment's episode ended are another episode's and do not count.
    """
    running = torch.cat([torch.ones_like(ended[:1]), ~ended[:-1]]).cumprod(0)
    weight = torch.where(running > 0, log_ratio, 0.0).sum(0).clamp(max=0.0).exp()
    return weight / weight.mean().clamp_min(1e-3)


def objective(gradient: str, actor, model, critic, segment: dict, noise, gamma: float, alpha: float):
    """What the policy's gradient is the derivative of, (B,), and the mean entropy.

    segment: (h, B, ...) of z, u, reward, z_next, terminated, truncated; of it dp and lr take the first state only.
    """
    z = segment["z"][0]
    step = partial(predicted_step, model)
    if gradient == "dp":
        return expansion(actor, critic, step, z, noise, gamma, alpha)
    if gradient == "dr":
        h = len(noise) - 1
        noise = torch.cat([actor.infer_noise(segment["z"][:h], segment["u"][:h]), noise[h:]])
        value, _ = expansion(actor, critic, partial(real_step, model, segment), z, noise, gamma, alpha)
        with torch.no_grad():  # recorded actions are older policies': they say nothing of this one's entropy
            _, log_prob, _ = actor(z, torch.randn_like(segment["u"][0]))
        return value, -log_prob.mean()
    visited: list[dict] = []
    with torch.no_grad():
        _, entropy = expansion(actor, critic, step, z, noise, gamma, alpha, visited)
    return score_surrogate(actor, critic, visited, alpha), entropy


def normalized(normalizer, sample: dict) -> dict:
    """A sample of the buffer with z and z_next, normalised observations, instead of obs and final_obs."""
    rest = {k: x for k, x in sample.items() if k not in ("obs", "final_obs")}
    return rest | dict(z=normalizer(sample["obs"]), z_next=normalizer(sample["final_obs"]))


def flat_grad(loss, module) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def probe(args: Args, actor, model, critic, policy, buffer: ReplayBuffer, env, alpha: float) -> list[dict]:
    """Variance and bias of the estimators, on the same states and networks, for each h.

    Variance: the trace of the covariance of the flattened policy gradient over independent draws of states and noise.
    With `env`, a diffsim environment of probe_batch, the expansion through the simulator itself gives the true
    gradient ("true") and, from the same trajectories, the score function's ("mfg"); bias is the distance of the means,
    less what the finite number of draws contributes. dr then has these trajectories too, not the buffer's. The end of
    an episode is a step without derivative in the simulator: "true" does not see it, "mfg" does.
    """
    rows = []
    for h in (h for h in HORIZONS if h <= len(buffer)):
        grads: dict[str, list] = defaultdict(list)
        for _ in range(args.probe_draws):
            segment = buffer.sample(args.probe_batch, h, args.dr_recent)
            noise = torch.randn(h + 1, *segment["u"].shape[1:], device=segment["u"].device)
            common = dict(gamma=args.gamma, alpha=alpha)
            if env is not None:
                state, nq, nv = segment["state"][0].T, env.model.nq, env.model.nv
                parts = dict(zip(("qpos", "qvel", "last_action"), state.split([nq, nv, env.model.nu])))
                env.set_state(env.get_state() | parts | dict(episode_length=torch.zeros_like(env.episode_length)))
                record, visited = [], []
                z = policy.normalizer(env.detach())
                world = partial(simulator_step, env, policy, record)
                value, _ = expansion(actor, critic, world, z, noise, visited=visited, **common)
                grads["true"].append(flat_grad(value.mean(), actor))
                visited = [{k: x.detach() for k, x in step.items()} for step in visited]
                grads["mfg"].append(flat_grad(score_surrogate(actor, critic, visited, alpha).mean(), actor))
                segment = {k: torch.stack([r[k].detach() for r in record]) for k in record[0]}
                segment["u"] = torch.stack([step["u"] for step in visited])
            else:
                segment = normalized(policy.normalizer, segment)
            for name in ("dp", "dr", "lr"):
                value, _ = objective(name, actor, model, critic, segment, noise, **common)
                grads[name].append(flat_grad(value.mean(), actor))
        for name, draws in grads.items():
            g = torch.stack(draws)
            row = dict(estimator=name, h=h, variance=float(g.var(0).sum()), mean_norm=float(g.mean(0).norm()))
            if "true" in grads:
                d = g - torch.stack(grads["true"])
                bias = float(d.mean(0).square().sum() - d.var(0).sum() / len(d))
                row |= dict(bias=max(bias, 0.0) ** 0.5, true_norm=float(torch.stack(grads["true"]).mean(0).norm()))
            rows.append(row)
    return rows


@torch.no_grad()
def evaluate(env, policy, episodes: int):
    """Return of the first episode of each of the first `episodes` environments, deterministic policy: (episodes,)."""
    obs, _ = env.reset(seed=12345)
    returns = torch.full((env.num_envs,), float("nan"), device=env.device)
    for _ in range(env.max_episode_steps):
        obs, _, terminated, truncated, info = env.step(policy(obs))
        if "episode" in info:
            first = info["_episode"] & torch.isnan(returns)
            returns = torch.where(first, info["episode"]["r"], returns)
            if not torch.isnan(returns[:episodes]).any():
                break
    return returns[:episodes]


def atomic_save(thing, path: Path):
    torch.save(thing, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def check(args: Args):
    """One line for every argument that cannot work."""
    if not 0 <= args.seed < 2**32:
        fail(f"--seed is {args.seed}; it must be between 0 and 2^32 - 1")
    positive = "num_envs total_timesteps batch_size learning_starts model_updates policy_frequency power_iterations "
    positive += "dr_recent buffer_size probe_batch num_threads eval_episodes log_every save_every"
    for name, least in (*((n, 1) for n in positive.split()), ("unroll", 0), ("model_warmup", 0), ("probe_draws", 2)):
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    rates = ("actor_learning_rate", "critic_learning_rate", "model_learning_rate", "max_grad_norm", "update_ratio")
    for name in (*rates, "entropy_coef", "policy_average"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    for name in ("actor_hidden", "critic_hidden", "model_hidden", "outcome_hidden"):
        if min(getattr(args, name), default=1) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; a layer is at least 1 wide")
    for name in ("gamma", "tau", "policy_average"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be between 0 and 1")
    if not -5 <= args.log_std_init <= 2:
        fail(f"--log-std-init is {args.log_std_init}; it must be between -5 and 2")
    if args.target_entropy is not None and not np.isfinite(args.target_entropy):
        fail(f"--target-entropy is {args.target_entropy}; it must be a number, as -act_dim is")
    if args.buffer_size // args.num_envs <= args.unroll or args.learning_starts // args.num_envs <= args.unroll:
        fail(f"--unroll is {args.unroll}; buffer_size and learning_starts, of {args.num_envs} envs, must exceed it")
    if is_gymnasium_id(args.env) and (args.capture_video or args.device != "cpu"):
        fail(f"--capture-video and --device cuda are for diffsim's tasks, not for {args.env}")


def make(args: Args, num_envs: int, seed: int = 0, physics: str | None = None):
    if is_gymnasium_id(args.env):
        return GymnasiumEnv(args.env, num_envs, seed)
    physics = physics or args.physics
    return diffsim.make(args.env, num_envs, seed=seed, device=args.device, physics=physics, compile=args.compile)


if __name__ == "__main__":
    args = tyro.cli(
        Args, args=[a for a in sys.argv[1:] if a not in ("-h", "--help")]
    )  # --help shows the environment's defaults
    on_gymnasium = is_gymnasium_id(args.env)
    defaults = DEFAULTS.get(args.env, {} if on_gymnasium else DEFAULTS["diffsim"])
    args = tyro.cli(Args, default=replace(args, **defaults))  # explicit flags are parsed last
    checkpoint = None
    if args.resume:
        path = Path(args.resume) / "checkpoint.pt" if Path(args.resume).is_dir() else Path(args.resume)
        try:
            checkpoint = torch.load(path, weights_only=True, map_location="cpu")
            saved = checkpoint["args"]
        except FileNotFoundError:
            fail(f"--resume {args.resume}: no checkpoint.pt there")
        except Exception as e:
            fail(f"--resume {path}: not a readable checkpoint ({type(e).__name__})")
        try:
            started_with = replace(Args(**saved), resume=None, stop_after=None)
        except TypeError:
            fail(f"--resume {path}: not a checkpoint of rp_pgm_mb.py")
        args = tyro.cli(Args, default=started_with)
        if args.env != started_with.env:
            fail(f"--resume {path}: a checkpoint of {started_with.env}, not of {args.env}")
        for name, value in asdict(args).items():
            if name not in ("resume", "stop_after") and value != getattr(started_with, name):
                flag = name.replace("_", "-")
                fail(f"--{flag} is {value}, the run has {getattr(started_with, name)}: resuming keeps its arguments")
        on_gymnasium = is_gymnasium_id(args.env)
    check(args)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    try:
        env = make(args, args.num_envs, args.seed)
        # diffsim's step is compiled for num_envs; others run any number
        num_eval = args.num_envs if args.physics == "diffsim" and not on_gymnasium else args.eval_episodes
        eval_env = make(args, num_eval)
        probe_env = make(args, args.probe_batch, physics="diffsim") if args.probe_every and not on_gymnasium else None
    except ValueError as e:
        fail(str(e))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted before the first step: nothing to save")
    obs_dim, act_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    num_iterations = max(1, args.total_timesteps // args.num_envs)

    actor = Actor(obs_dim, act_dim, args).to(env.device)
    model = Model(obs_dim, act_dim, args).to(env.device)
    critic = Critics(obs_dim, act_dim, args).to(env.device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    normalizer, changes = Normalizer(obs_dim).to(env.device), Normalizer(obs_dim).to(env.device)
    rewards = Normalizer(1).to(env.device)
    policy = DeterministicPolicy(normalizer, actor, env.single_action_space).to(env.device)
    average = Actor(obs_dim, act_dim, replace(args, spectral_norm=False)).to(env.device).requires_grad_(False)
    follow(average, actor, 1.0)
    averaged_policy = DeterministicPolicy(normalizer, average, env.single_action_space).to(env.device)
    adam = partial(torch.optim.Adam, fused=True)
    actor_optimizer = adam(actor.parameters(), args.actor_learning_rate)
    critic_optimizer = adam(critic.parameters(), args.critic_learning_rate)
    model_optimizer = adam(model.parameters(), args.model_learning_rate)
    temperature = nn.ParameterList([torch.tensor(args.entropy_coef).log()]).to(env.device)
    target_entropy = -act_dim if args.target_entropy is None else args.target_entropy
    temperature_optimizer = torch.optim.Adam(temperature, args.actor_learning_rate)
    shapes = dict(obs=(obs_dim,), u=(act_dim,), log_prob=(), reward=(), final_obs=(obs_dim,))
    if not on_gymnasium:  # what a probe starts the simulator from
        shapes["state"] = (env.model.nq + env.model.nv + env.model.nu,)
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, env.device, **shapes, terminated=(), truncated=())

    modules = dict(
        actor=actor, average=average, model=model, critic=critic, target_critic=target_critic, normalizer=normalizer
    )
    modules |= dict(changes=changes, rewards=rewards, temperature=temperature, buffer=buffer)
    modules |= dict(actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    modules |= dict(model_optimizer=model_optimizer, temperature_optimizer=temperature_optimizer)
    for module in (actor, model, critic, target_critic):
        module.eval()  # spectral normalisation iterates in training mode only: see follow_spectral_norm
    global_step = first_iteration = 0
    updates, elapsed_before, owed = 0, 0.0, 0.0  # owed: updates due
    recent: list[list[float]] = []  # return and length of the latest episodes
    obs, _ = env.reset()
    if checkpoint is None:
        run_name = f"{args.env.split(':')[-1].lower()}__rp_pgm_mb__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        run = Path(args.run_dir) / run_name
        run.mkdir(parents=True, exist_ok=True)
    else:
        run = path.parent
        if missing := [name for name in modules if name not in checkpoint]:
            fail(f"--resume {path}: an older version's checkpoint, without {', '.join(missing)}; start anew")
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        global_step, first_iteration = checkpoint["global_step"], checkpoint["iteration"]
        owed, updates = checkpoint["owed"], checkpoint["updates"]
        elapsed_before, recent = checkpoint["wall_time_s"], checkpoint["recent"]
        if on_gymnasium:
            print(f"{args.env} cannot be saved: its episodes start anew, everything else goes on")
            buffer.data["truncated"][(buffer.count - 1) % buffer.capacity] = True
        else:
            env.set_state(checkpoint["env_state"])
            obs = env.detach()

    writer = SummaryWriter(str(run), purge_step=global_step if checkpoint else None)
    table = "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    left = num_iterations - first_iteration
    print(f"{run}: {args.env}, {args.num_envs} envs, {left} iterations to go", flush=True)
    if defaults and checkpoint is None:
        print("for this environment:", *(f"{k}={v}" for k, v in defaults.items() if getattr(args, k) == v), flush=True)
    fields = (
        "iteration,global_step,wall_time_s,SPS,episodic_return,episodic_length,eval_return,eval_return_std,policy_loss,"
        "value_loss,q_value,state_loss,reward_loss,termination_loss,grad_norm_before_clip,nonfinite_grads,entropy,"
        "entropy_coef,env_s,model_s,critic_s,actor_s"
    ).split(",")
    probe_fields = "global_step,estimator,h,variance,mean_norm,bias,true_norm".split(",")
    files = {}
    for name, header in (("metrics", fields), ("probe", probe_fields)):
        rows = []
        if checkpoint is not None and (run / f"{name}.csv").exists():  # drop what came after the checkpoint
            with open(run / f"{name}.csv") as f:
                rows = [r for r in csv.DictReader(f) if int(r["global_step"]) <= global_step]
        if name == "metrics" or args.probe_every:
            files[name] = csv.DictWriter(open(run / f"{name}.csv", "w", newline="", buffering=1), header)
            files[name].writeheader()
            files[name].writerows(rows)

    def save(iteration: int):
        state = {name: module.state_dict() for name, module in modules.items()}
        state |= dict(args=asdict(args), rng=torch.get_rng_state(), recent=recent, owed=owed, updates=updates)
        state |= dict(global_step=global_step, iteration=iteration, wall_time_s=elapsed_before + time.time() - START)
        if not on_gymnasium:
            state["env_state"] = env.get_state()
        atomic_save(state, run / "checkpoint.pt")
        example = torch.zeros(2, obs_dim, device=env.device)
        program = torch.export.export(
            averaged_policy, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        torch.export.save(program, run / "policy.tmp.pt2", extra_files={"env": args.env})
        os.replace(run / "policy.tmp.pt2", run / "policy.pt2")

    def every(steps: int) -> bool:
        """Whether this iteration reached another multiple of `steps`."""
        return bool(steps) and global_step // steps > (global_step - args.num_envs) // steps

    end = min(num_iterations, args.stop_after or num_iterations)
    seen: dict[str, list[float]] = defaultdict(list)  # since the last row
    stop = []  # Ctrl-C lets the iteration finish, so that what is saved can be resumed bit for bit
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    for iteration in range(first_iteration, end):
        # --- one step of every environment ----------------------------------------------------------------
        tick = time.perf_counter()
        with torch.no_grad():
            if global_step < args.learning_starts:
                u = torch.atanh((2 * torch.rand(args.num_envs, act_dim, device=env.device) - 1).clamp(-0.9999, 0.9999))
                action, log_prob = torch.tanh(u), u.new_full((args.num_envs,), -act_dim * np.log(2))
            else:
                noise = torch.randn(args.num_envs, act_dim, device=env.device)
                action, log_prob, u = actor(normalizer(obs), noise)
            step = dict(obs=obs, u=u, log_prob=log_prob)
            if not on_gymnasium:
                step["state"] = torch.cat([env.qpos, env.qvel, env.last_action]).T
            obs, reward, terminated, truncated, info = env.step(policy.scale(action))
            final_obs = info["final_obs"]
            buffer.add(**step, reward=reward, final_obs=final_obs, terminated=terminated, truncated=truncated)
            normalizer.update(step["obs"])
            changes.update(final_obs - step["obs"])
            rewards.update(reward[:, None])
        if "episode" in info:
            done = info["_episode"]
            r, l = info["episode"]["r"][done], info["episode"]["l"][done]
            recent = (recent + torch.stack([r, l.float()], 1).tolist())[-20:]
        global_step += args.num_envs
        seen["env_s"].append(time.perf_counter() - tick)

        if global_step >= args.learning_starts:
            owed += args.num_envs * args.update_ratio
            model.change.copy_((changes.mean.square() + changes.var).sqrt() * torch.rsqrt(normalizer.var + 1e-5) + 1e-6)
            model.reward.copy_(torch.cat([rewards.mean, rewards.var.sqrt() + 1e-6]))
        while owed >= 1:
            owed -= 1
            if args.anneal_lr:
                frac = 1 - iteration / num_iterations
                critic_optimizer.param_groups[0]["lr"] = frac * args.critic_learning_rate
                for optimizer in (actor_optimizer, temperature_optimizer):
                    optimizer.param_groups[0]["lr"] = frac * args.actor_learning_rate
            # --- model: one-step predictions --------------------------------------------------------------
            tick = time.perf_counter()
            for _ in range(args.model_updates):
                batch = normalized(normalizer, {k: x[0] for k, x in buffer.sample(args.batch_size).items()})
                names = ("z", "action", "reward", "z_next", "terminated")
                losses = model.loss(*((batch | dict(action=torch.tanh(batch["u"])))[k] for k in names))
                model_optimizer.zero_grad()
                sum(losses).backward()
                nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                model_optimizer.step()
                follow_spectral_norm(model.dynamics)
            seen["model_s"].append(time.perf_counter() - tick)

            # --- critic: soft Bellman targets from real steps ---------------------------------------------
            tick = time.perf_counter()
            alpha = float(temperature[0].detach().exp())
            with torch.no_grad():
                z_next = batch["z_next"]
                next_action, log_prob, _ = actor(z_next, torch.randn_like(batch["u"]))
                next_value = target_critic(z_next, next_action).amin(0) - alpha * log_prob
                target = batch["reward"] + args.gamma * ~batch["terminated"] * next_value
            value = critic(batch["z"], torch.tanh(batch["u"]))
            value_loss = (value - target).square().mean(1).sum()
            critic_optimizer.zero_grad()
            value_loss.backward()
            critic_optimizer.step()
            torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
            seen["critic_s"].append(time.perf_counter() - tick)

            # --- policy: the gradient of the expansion ----------------------------------------------------
            updates += 1
            if updates % args.policy_frequency:
                continue
            tick = time.perf_counter()
            h = args.unroll if global_step > args.model_warmup else 0
            gradient = args.gradient if h else "dp"
            weight = 1.0
            if gradient == "dr":  # recorded trajectories of older policies count less
                segment = normalized(normalizer, buffer.sample(args.batch_size, h, args.dr_recent))
            else:
                segment = {k: x[None] for k, x in batch.items()}
            noise = torch.randn(h + 1, args.batch_size, act_dim, device=env.device)
            with parametrize.cached():  # the normalised weights once, not once per step of the expansion ...
                for layer in actor.net:
                    if parametrize.is_parametrized(layer):
                        layer.weight  # noqa: B018  ... and with their graph: dr and lr begin without one
                value, entropy = objective(gradient, actor, model, critic, segment, noise, args.gamma, alpha)
                if gradient == "dr":
                    with torch.no_grad():
                        log_ratio = actor.log_prob(segment["z"], segment["u"]) - segment["log_prob"]
                        weight = truncated_weights(log_ratio, segment["terminated"] | segment["truncated"])
                policy_loss = -(weight * value).mean()
                actor_optimizer.zero_grad()
                policy_loss.backward(inputs=list(actor.parameters()))
            norm_before = float(nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm))
            if np.isfinite(norm_before):
                actor_optimizer.step()
                follow_spectral_norm(actor.net)
                follow(average, actor, max(args.policy_average, args.policy_frequency / updates))  # first a plain mean
                if args.learn_entropy_coef:
                    temperature_optimizer.zero_grad()
                    (temperature[0].exp() * (entropy.detach() - target_entropy)).backward()
                    temperature_optimizer.step()
            seen["actor_s"].append(time.perf_counter() - tick)
            if len(seen["actor_s"]) % 20 == 1:
                numbers = [policy_loss, value_loss, target.mean(), *losses, entropy]
                names = "policy_loss,value_loss,q_value,state_loss,reward_loss,termination_loss,entropy".split(",")
                for name, x in zip(names, numbers):
                    seen[name].append(float(x.detach()))
            seen["grad_norm_before_clip"].append(norm_before)
            seen["nonfinite_grads"].append(float(not np.isfinite(norm_before)))

        # --- log, evaluate, save --------------------------------------------------------------------------
        row = dict.fromkeys(fields, "")
        last = iteration == num_iterations - 1
        if last or every(args.eval_every):
            returns = evaluate(eval_env, averaged_policy, min(args.eval_episodes, num_eval))
            row["eval_return"], row["eval_return_std"] = float(returns.mean()), float(returns.std(correction=0))
            writer.add_scalar("eval/episodic_return", row["eval_return"], global_step)
            print(f"\rstep {global_step:>9,}  evaluation {row['eval_return']:.0f}", flush=True)
        if every(args.probe_every) and global_step >= args.learning_starts:
            rng = torch.get_rng_state()  # probing changes nothing of the run
            for measured in probe(args, actor, model, critic, policy, buffer, probe_env, float(temperature[0].exp())):
                files["probe"].writerow(dict(global_step=global_step) | measured)
                for key in ("variance", "bias"):
                    if key in measured:
                        tag = f"probe/{key}_{measured['estimator']}_h{measured['h']}"
                        writer.add_scalar(tag, measured[key], global_step)
            torch.set_rng_state(rng)
        if last or every(args.log_every) or row["eval_return"] != "":
            wall = elapsed_before + time.time() - START
            row |= dict(iteration=iteration, global_step=global_step, wall_time_s=round(wall, 3))
            row |= dict(SPS=int(global_step / wall), entropy_coef=float(temperature[0].detach().exp()))
            row |= {k: float(np.mean(x)) for k, x in seen.items()}
            row |= {k: round(sum(x), 3) for k, x in seen.items() if k.endswith("_s") or k == "nonfinite_grads"}
            seen.clear()
            if row["nonfinite_grads"]:
                print(f"{row['nonfinite_grads']:.0f} non-finite policy gradients, updates skipped", file=sys.stderr)
            if recent:
                row["episodic_return"], row["episodic_length"] = (float(x) for x in np.mean(recent, 0))
            files["metrics"].writerow(row)
            for key, tag in dict(
                episodic_return="charts/episodic_return", episodic_length="charts/episodic_length", SPS="charts/SPS",
                value_loss="losses/value_loss", policy_loss="losses/policy_loss", q_value="losses/q_value",
                state_loss="losses/state_loss", reward_loss="losses/reward_loss", entropy="losses/entropy",
                termination_loss="losses/termination_loss", grad_norm_before_clip="grad/norm_before_clip",
                nonfinite_grads="grad/nonfinite", entropy_coef="losses/entropy_coef",
            ).items():  # fmt: skip
                if row[key] != "":
                    writer.add_scalar(tag, row[key], global_step)
            tty = sys.stdout.isatty()
            done_share = (iteration + 1) / num_iterations
            bar = f"[{'#' * int(20 * done_share):<20}] " if tty else ""
            r = row["episodic_return"]
            text = f"{bar}step {global_step:>9,}  return {r if r == '' else round(r)}  SPS {row['SPS']}  {wall:.0f} s"
            print(("\r" if tty else "") + text, end="" if tty and not last else "\n", flush=True)
        if every(args.save_every):
            save(iteration + 1)
        if stop:
            end = iteration + 1
            break
    save(end)
    writer.close()
    python = os.path.relpath(sys.executable)
    if end < num_iterations:
        print(f"{'interrupted and ' * len(stop)}saved; continue with: {python} rp_pgm_mb.py --resume {run}", flush=True)
        sys.exit(130 if stop else 0)
    if args.capture_video:
        from diffsim.play import record

        record(args.env, run / "policy.pt2", run / "video.mp4", args.physics)
    physics = "gymnasium" if on_gymnasium else args.physics
    print(f"done; watch it: {python} -m diffsim.play {run} --physics {physics} --video video.mp4", flush=True)
