"""RP-PGM: model-based reparameterization policy gradients (Zhang et al., NeurIPS 2023, arXiv 2310.19927), in one file.

Here the simulator is a black box: it is sampled, and a smooth model of it is learned. The policy climbs the gradient of
an h-step expansion, V = sum_(i<h) gamma^i r(s_i, a_i) + gamma^h Q(s_h, a_h), by one of three estimators:

    dp  derivatives on predictions: back-propagate through the model's own trajectory
    dr  derivatives on real trajectories, their noise inferred: SVG(h) (Heess et al. 2015, arXiv 1510.09142)
    lr  likelihood ratio: the score function on the model's trajectories, no derivative of the model

Spectral normalisation of model and policy slows how the variance of dp and dr grows with h. SAC (Haarnoja et al. 2018)
is --unroll 0 --no-spectral-norm --policy-frequency 1 --policy-average 0 --tau 0.005 --end-cost 0 --quiet-episodes 0.

    python rp_pgm_mb.py --env Hopper-v5                             # or any Gymnasium id with continuous actions
    python -m diffsim.play runs/hopper-v5__rp_pgm_mb__1__<time>     # returns, and --video hopper.mp4
"""

import diffsim  # isort: skip  before torch: from here on Ctrl-C prints one line
import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
from torch.distributions import Normal
from torch.nn.utils.parametrizations import spectral_norm

from diffsim import ranks
from diffsim.flags import RunArgs, fail, one_line_errors, parse
from diffsim.graphs import compiler, update_spectral_norm
from diffsim.play import Evaluator
from diffsim.replay import ReplayBuffer, Rollouts, is_quiet
from diffsim.run import Run

# isort: split
from diffsim.flags import Count, Decay, Few, Fraction, Layers, Natural, Norm, Number, Rate, Ratio, Seed, Weight


@dataclass
class Args(RunArgs):
    # device, compile, eval_every, eval_episodes, save_every, resume, capture_video and the like: diffsim/flags.py
    env: str = "Hopper-v5"
    """environment: a Gymnasium id, a diffsim task (see `python -m diffsim`), or path/to/my_task.py:MyTask"""
    physics: Literal["diffsim", "mujoco", "gymnasium"] | None = None
    """engine that runs the task; gymnasium: gymnasium.make of that id; None: the task's own"""
    seed: Seed = 1
    """seed of the networks, the noise and the environments"""
    num_envs: Count = 1
    """environments stepped side by side"""
    total_timesteps: Count = 200_000
    """environment steps over all environments"""
    gradient: Literal["dp", "dr", "lr"] = "dp"
    """estimator of the policy gradient: see the first lines of this file"""
    unroll: Natural = 3
    """h, steps of the expansion before the critic takes over; 0: soft actor-critic, whatever --gradient"""
    expand_critic: bool = False
    """the critics' targets are expansions too, where h > 0: they follow faster (Feinberg et al. 2018, 1803.00101)"""
    imagined_steps: Natural = 0
    """steps of the policy's roll-outs in the model, which add as many samples again (MBPO, 1906.08253); 0: none"""
    spectral_norm: bool = True
    """spectral normalisation of all layers of the dynamics but the last, and of the policy's hidden-to-hidden layers"""
    power_iterations: Few = 5
    """power iterations of the spectral normalisation in an update"""
    learning_starts: Count = 1_000
    """environment steps of uniform random actions before the first update"""
    model_warmup: Natural = 5_000
    """environment steps until the expansion replaces SAC's gradient, if a run gets there (the paper: 10,000)"""
    end_cost: Weight = 0.0
    """what an end costs, as a multiple of the mean reward: a fall some way ahead weighs more"""
    quiet_episodes: Fraction = 0.0
    """share of episodes without noise: they meet what evaluations do"""
    growth_steps: Count = 100_000
    """environment steps over which --end-cost and --quiet-episodes grow from nothing, whatever the run's length"""
    update_ratio: Ratio = 1.0
    """updates of model, critic and policy per environment step"""
    model_updates: Few = 1
    """updates of the model in such an update (the paper: 4)"""
    policy_frequency: Count = 2
    """updates of model and critic to one of the policy"""
    batch_size: Count = 128
    """samples of an update, beside as many of --imagined-steps"""
    dr_recent: Count = 10_000
    """dr: segments come from this many latest environment steps, weighted by truncated importance ratios"""
    buffer_size: Count = 1_000_000
    """environment steps the replay buffer holds"""
    actor_learning_rate: Rate = 3e-4
    """learning rate of the policy (the paper: 1e-4)"""
    critic_learning_rate: Rate = 5e-4
    """learning rate of the critics (the paper: 1e-4)"""
    model_learning_rate: Rate = 1e-3
    """learning rate of the model"""
    max_grad_norm: Norm = 1.0
    """gradients of model and policy are scaled down to this norm"""
    gamma: Fraction = 0.99
    """discount factor"""
    tau: Fraction = 0.005
    """step of the target critics towards the critics at each update"""
    policy_average: Decay = 0.999
    """share of the averaged policy, the one evaluated and saved, that is kept; at first a plain mean; 0: the last"""
    entropy_coef: Rate = 0.1
    """initial temperature: weight of the policy's entropy in every reward"""
    learn_entropy_coef: bool = True
    """adapt the temperature so that the entropy comes to target_entropy"""
    target_entropy: Number | None = None
    """entropy of the policy, after the tanh, that the temperature aims at; None: -act_dim"""
    actor_hidden: Layers = (128, 128)
    """hidden layers of the policy (the paper: 512 512 512 512)"""
    critic_hidden: Layers = (128, 128)
    """hidden layers of a critic"""
    model_hidden: Layers = (128, 128, 128)
    """hidden layers of the dynamics (the paper: 256 256 256 256 256 256)"""
    outcome_hidden: Layers = (64, 64)
    """hidden layers of the network of reward and termination"""
    log_std_init: Number = -1.0
    """initial log standard deviation of the policy, before the tanh; always kept between -5 and 2"""
    eval_every: Natural = 10_000
    log_every: Count = 1_000
    """environment steps between rows of metrics.csv"""
    save_every: Count = 25_000


# What differs from Args for an environment or an engine; flags on the command line win.
DEFAULTS = {  # Hopper-v5: benchmarks/learned_model.md; its target entropy is MBPO's
    "Hopper-v5": dict(total_timesteps=100_000, expand_critic=True, imagined_steps=20, tau=0.02, end_cost=250.0,
                      quiet_episodes=1.0, target_entropy=-1.0),
    "InvertedDoublePendulum-v5": dict(total_timesteps=30_000, model_warmup=0, log_std_init=0.0),
    **{env: dict(update_ratio=2.0) for env in ("HalfCheetah-v5", "Walker2d-v5", "Ant-v5")},
    "on diffsim": dict(num_envs=16),  # at its best with many
}  # fmt: skip


def mlp(sizes: list[int], args: Args, normalized: range = range(0)) -> nn.Sequential:
    """Linear layers with activations between; those of the indices `normalized` have a largest singular value of 1."""
    layers, normalized = [], normalized if args.spectral_norm else range(0)
    for k, (i, o) in enumerate(zip(sizes[:-1], sizes[1:])):
        linear = nn.Linear(i, o)
        nn.init.orthogonal_(linear.weight, 0.01 if k == len(sizes) - 2 else 1.0 if k in normalized else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [spectral_norm(linear, "weight", args.power_iterations) if k in normalized else linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()  # power iterations only where train() asks; dropout would be off, too


def squashed_log_prob(policy: Normal, u):
    """Log density (...,) of tanh(u), u (..., act_dim) a sample of the policy."""
    return (policy.log_prob(u) - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)  # - log(1 - tanh(u)^2)


class Actor(nn.Module):
    """Gaussian over u, squashed: action = tanh(u) in (-1, 1)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.net = mlp([obs_dim, *args.actor_hidden, 2 * act_dim], args, range(1, len(args.actor_hidden)))
        self.register_buffer("log_std_init", torch.tensor(float(args.log_std_init)))  # --init-from keeps it

    def distribution(self, z) -> Normal:
        """Of u, (..., act_dim)."""
        mean, log_std = self.net(z).chunk(2, -1)
        return Normal(mean, (log_std + self.log_std_init).clamp(-5.0, 2.0).exp(), validate_args=False)

    def log_prob(self, z, u):
        return squashed_log_prob(self.distribution(z), u)  # (...,)

    def forward(self, z, noise):
        """Action (..., act_dim), its log density (...,) and u: differentiable in the policy's parameters and in z."""
        policy = self.distribution(z)
        u = policy.mean + policy.stddev * noise
        return torch.tanh(u), squashed_log_prob(policy, u), u

    @torch.no_grad()
    def infer_noise(self, z, u):
        """The noise with which the policy outputs u."""
        policy = self.distribution(z)
        return (u - policy.mean) / policy.stddev


@torch.no_grad()
def move_average(average: Actor, actor: Actor, rate: float):
    """Normalise the weights of the policy, which have changed, and move an average of them, plain weights, there."""
    update_spectral_norm(actor.net)
    for mean, layer in zip(average.net[::2], actor.net[::2]):  # the linear ones
        mean.weight.lerp_(layer.weight, rate)
        mean.bias.lerp_(layer.bias, rate)


class Critics(nn.Module):
    """Two soft Q functions."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.members = nn.ModuleList(mlp([obs_dim + act_dim, *args.critic_hidden, 1], args) for _ in range(2))

    def forward(self, z, action):
        return torch.stack([member(torch.cat([z, action], -1)).squeeze(-1) for member in self.members])  # (2, ...)


class Model(nn.Module):
    """Learned world, in normalised observations: s' = s + f(s, a), reward and probability of going on."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.dynamics = mlp([obs_dim + act_dim, *args.model_hidden, obs_dim], args, range(len(args.model_hidden)))
        self.outcomes = mlp([2 * obs_dim + act_dim, *args.outcome_hidden, 2], args)
        self.register_buffer("change", torch.ones(obs_dim))  # root mean square of s' - s
        self.register_buffer("reward", torch.tensor([0.0, 1.0]))  # mean and deviation
        self.register_buffer("end_cost", torch.tensor(0.0))  # what an end takes from the reward, by its probability

    def step(self, z, action):
        return z + self.change * self.dynamics(torch.cat([z, action], -1))  # next observation (B, obs_dim)

    def outcome(self, z, action, z_next):
        """Reward and logit of going on, both (B,)."""
        reward, logit = self.outcomes(torch.cat([z, action, z_next], -1)).unbind(-1)
        return self.reward[0] + self.reward[1] * reward, logit + 3.0  # few steps end an episode

    def losses(self, batch: dict, ends: dict, share):
        """Squared errors of next observation and reward; cross entropy of termination: (1 - share) * E[loss of a step
        that goes on] + share * E[loss of one that ends]. Those are one of hundreds: `ends` is a batch of them alone."""
        z, action, z_next = batch["z"], torch.tanh(batch["u"]), batch["z_next"]
        state_loss = (self.dynamics(torch.cat([z, action], -1)) - (z_next - z) / self.change).square().mean()
        reward, logit = self.outcome(z, action, z_next)
        reward_loss = ((reward - batch["reward"]) / self.reward[1]).square().mean()
        _, end_logit = self.outcome(ends["z"], torch.tanh(ends["u"]), ends["z_next"])
        not_ended = torch.where(batch["terminated"], 0.0, nn.functional.softplus(-logit)).mean()
        return state_loss, reward_loss, not_ended + share * nn.functional.softplus(end_logit).mean()


class Normalizer(nn.Module):
    """Running mean and variance."""

    def __init__(self, dim: int):
        super().__init__()
        for name, start in dict(mean=torch.zeros(dim), var=torch.ones(dim), count=torch.tensor(1e-4)).items():
            self.register_buffer(name, start)

    def forward(self, obs):
        return (obs - self.mean) * torch.rsqrt(self.var + 1e-5)

    def of(self, sample: dict) -> dict:
        """A sample of the buffer with z and z_next, its normalised observations."""
        return sample | dict(z=self(sample["obs"]), z_next=self(sample["final_obs"]))

    @torch.no_grad()
    def update(self, obs):
        """Merge the moments of a batch (Chan et al. 1979)."""
        mean, var, n = ranks.moments(obs)
        delta, total = mean - self.mean, self.count + n
        self.var.copy_((self.var * self.count + var * n + delta**2 * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)


class DeterministicPolicy(nn.Module):
    """What is evaluated and exported: observation -> action in its bounds (none: -1, 1), its normaliser inside."""

    def __init__(self, normalizer: Normalizer, actor: Actor, space):
        super().__init__()
        self.normalizer, self.actor = normalizer, actor
        low, high = (torch.as_tensor(x).float().nan_to_num(posinf=1.0, neginf=-1.0) for x in (space.low, space.high))
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("half_range", (high - low) / 2)

    def scale(self, action):
        """From (-1, 1) to the environment's bounds."""
        return self.middle + self.half_range * action

    def forward(self, obs):
        return self.scale(torch.tanh(self.actor.distribution(self.normalizer(obs)).mean))


def expansion(actor, critic, step, z, noise, gamma: float, alpha: float):
    """V (B,) = sum_(i<h) gamma^i (r_i - alpha log pi_i) + gamma^h (Q(s_h, a_h) - alpha log pi_h).

    Also the mean entropy, and what the score function wants to know of each step. noise: (h + 1, B, act_dim).
    `step(i, z, action)`, of a model or of the world -> next z, reward, probability of going on, and which are over:
    they close with the value of their last state, by that probability (0 if terminated, 1 if truncated).
    """
    running, weight, visited = torch.ones_like(z[:, 0]).bool(), torch.ones_like(z[:, 0]), []
    for i, eps in enumerate(noise[:-1]):
        action, log_prob, u = actor(z, eps)
        z_next, reward, goes_on, ended = step(i, z, action)
        gain = torch.where(running, weight * (reward - alpha * log_prob), 0.0)
        visited.append(dict(z=z, u=u, log_prob=log_prob, gain=gain, weight=weight, counts=running))
        weight = torch.where(running, weight * gamma * goes_on, weight)
        z = torch.where(running[:, None], z_next, z)
        running = running & ~ended
    action, log_prob, u = actor(z, noise[-1])
    gain = weight * (critic(z, action).amin(0) - alpha * log_prob)
    visited.append(dict(z=z, u=u, log_prob=log_prob, gain=gain, weight=weight, counts=torch.ones_like(running)))
    return sum(v["gain"] for v in visited), -torch.stack([v["log_prob"] for v in visited]).mean(), visited


def predicted_step(model, i, z, action):
    """dp, lr: the model's own next state, whose end is a probability."""
    reward, logit = model.outcome(z, action, z_next := model.step(z, action))
    return z_next, reward - model.end_cost * torch.sigmoid(-logit), torch.sigmoid(logit), torch.zeros_like(logit).bool()


def real_step(model, segment, i, z, action):
    """dr: the recorded next state, reward and end; only their derivatives are the model's."""
    terminated, predicted = segment["terminated"][i], model.step(z, action)
    z_next = segment["z_next"][i] + (predicted - predicted.detach())
    reward, logit = model.outcome(z, action, z_next)
    predicted, recorded = torch.stack([reward, torch.sigmoid(logit)]), (segment["reward"][i], (~terminated).to(z.dtype))
    reward, goes_on = torch.stack(recorded) + (predicted - predicted.detach())
    return z_next, reward - model.end_cost * (1 - goes_on), goes_on, terminated | segment["truncated"][i]


def score_surrogate(actor, critic, visited: list, alpha: float):
    """(B,) whose gradient is the score function's: log pi(a_i | s_i) times what followed, less a baseline: the critic's
    value of another action in the same state, independent of a_i, so without bias."""
    surrogate = following = 0.0
    for step in reversed(visited):
        following = following + step["gain"]
        with torch.no_grad():
            other, log_prob, _ = actor(step["z"], torch.randn_like(step["u"]))
            baseline = step["weight"] * (critic(step["z"], other).amin(0) - alpha * log_prob)
            advantage = torch.where(step["counts"], following - baseline, 0.0)
        surrogate = surrogate + actor.log_prob(step["z"], step["u"]) * advantage
    return surrogate


def truncated_weights(log_ratio, ended):
    """(B,), of mean 1: probability of a segment's actions (h, B) under the policy by that when recorded, at most 1."""
    running = torch.cat([torch.ones_like(ended[:1]), ~ended[:-1]]).cumprod(0)  # what follows is another episode's
    weight = torch.where(running > 0, log_ratio, 0.0).sum(0).clamp(max=0.0).exp()
    return weight / weight.mean().clamp_min(1e-3)


def objective(gradient: str, actor, model, critic, segment: dict, noise, gamma: float, alpha: float):
    """What the policy's gradient is the derivative of, (B,), and the mean entropy.

    segment: (h, B, ...) of z, u, log_prob, reward, z_next, terminated, truncated; dp and lr take its first z only.
    """
    z, step = segment["z"][0], partial(predicted_step, model)
    if gradient == "dp":
        return expansion(actor, critic, step, z, noise, gamma, alpha)[:2]
    if gradient == "dr":
        noise = torch.cat([actor.infer_noise(segment["z"], segment["u"]), noise[-1:]])
        value, _, _ = expansion(actor, critic, partial(real_step, model, segment), z, noise, gamma, alpha)
        with torch.no_grad():  # recorded actions are older policies': they count less, and say nothing of the entropy
            _, log_prob, _ = actor(z, torch.randn_like(segment["u"][0]))
            log_ratio = actor.log_prob(segment["z"], segment["u"]) - segment["log_prob"]
            weight = truncated_weights(log_ratio, segment["terminated"] | segment["truncated"])
        return weight * value, -log_prob.mean()
    with torch.no_grad():
        _, entropy, visited = expansion(actor, critic, step, z, noise, gamma, alpha)
    return score_surrogate(actor, critic, visited, alpha), entropy


def differentiate(loss, module: nn.Module, max_norm: float = math.inf):
    """Leaves the gradient in the module's parameters, scaled down to a norm; returns its norm before."""
    module.zero_grad()
    loss.backward(inputs=list(module.parameters()))
    return nn.utils.clip_grad_norm_(module.parameters(), max_norm, foreach=False)


if __name__ == "__main__":
    args = parse(Args, DEFAULTS, one_process=True)
    starts, num_iterations = args.learning_starts, max(1, args.total_timesteps // args.num_envs)
    if min(starts, args.buffer_size) <= args.unroll * args.num_envs:
        fail(f"--learning-starts {starts}, --buffer-size {args.buffer_size} must lie above --unroll x --num-envs")
    if starts >= num_iterations * args.num_envs:
        fail(f"--learning-starts {starts} must lie below --total-timesteps {args.total_timesteps}")
    run = Run(args, num_iterations, args.num_envs, episodes=20)

    with one_line_errors():
        env = diffsim.make(args.env, args.num_envs, seed=args.seed, **args.engine())
        evaluator = Evaluator(args)
    env.reset()
    obs_dim, act_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    target_entropy = -act_dim if args.target_entropy is None else args.target_entropy

    actor, model = Actor(obs_dim, act_dim, args).to(env.device), Model(obs_dim, act_dim, args).to(env.device)
    critic = Critics(obs_dim, act_dim, args).to(env.device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    normalizer, changes, rewards = (Normalizer(dim).to(env.device) for dim in (obs_dim, obs_dim, 1))
    average = Actor(obs_dim, act_dim, replace(args, spectral_norm=False)).to(env.device).requires_grad_(False)
    move_average(average, actor, 1.0)
    policy = DeterministicPolicy(normalizer, average, env.single_action_space).to(env.device)
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.actor_learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate, fused=True)
    model_optimizer = torch.optim.Adam(model.parameters(), args.model_learning_rate, fused=True)
    temperature = nn.ParameterList([torch.tensor(args.entropy_coef).log()]).to(env.device)
    temperature_optimizer = torch.optim.Adam(temperature, args.actor_learning_rate * args.learn_entropy_coef)
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, env.device)
    rollouts = Rollouts(8 * args.batch_size, args.imagined_steps, env.detach())
    run.restore(policy, env, actor=actor, average=average, model=model, critic=critic, target_critic=target_critic,
        normalizer=normalizer, changes=changes, rewards=rewards, temperature=temperature, buffer=buffer,
        rollouts=rollouts, temperature_optimizer=temperature_optimizer, actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer, model_optimizer=model_optimizer)  # fmt: skip
    if args.resume and buffer.count and args.physics == "gymnasium":
        buffer.data["truncated"][(buffer.count - 1) % buffer.capacity] = True  # its episodes start anew

    # --- what is computed in a step: each function is one graph, where it is compiled ------------------------------
    compiled = compiler(args.compile and args.device == "cpu")
    act = compiled(lambda obs, noise: actor(normalizer(obs), noise))
    follow = compiled(lambda rate: move_average(average, actor, rate))

    @compiled
    def note(obs, reward, final_obs):
        normalizer.update(obs)
        changes.update(final_obs - obs)
        rewards.update(reward[:, None])
        model.change.copy_((changes.mean.square() + changes.var).sqrt() * torch.rsqrt(normalizer.var + 1e-5) + 1e-6)
        model.reward.copy_(torch.cat([rewards.mean, rewards.var.sqrt() + 1e-6]))

    @compiled
    def model_gradient(sample, ends, share):  # one-step predictions
        losses = model.losses(normalizer.of(sample), normalizer.of(ends), share)
        differentiate(sum(losses), model, args.max_grad_norm)
        return torch.stack(losses).detach()

    @compiled
    def imagine(obs, noise):  # what the policy does in the model
        with torch.no_grad():
            action, _, u = actor(z := normalizer(obs), noise)
            reward, logit = model.outcome(z, action, z_next := model.step(z, action))
        final_obs = normalizer.mean + z_next * (normalizer.var + 1e-5).sqrt()
        return dict(obs=obs, u=u, reward=reward, final_obs=final_obs, goes_on=torch.sigmoid(logit))

    def critic_gradient(sample, noise, alpha):  # soft Bellman targets: a real step, then the model's expansion
        batch, step = normalizer.of(sample), partial(predicted_step, model)
        with torch.no_grad():
            torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
            next_value, _, _ = expansion(actor, target_critic, step, batch["z_next"], noise, args.gamma, alpha)
            reward = batch["reward"] - model.end_cost * (1 - batch["goes_on"])
            target = reward + args.gamma * batch["goes_on"] * next_value
        value_loss = (critic(batch["z"], torch.tanh(batch["u"])) - target).square().mean(1).sum()
        differentiate(value_loss, critic)
        return value_loss.detach(), target.mean()

    def policy_gradient(gradient, segment, noise, alpha):
        value, entropy = objective(gradient, actor, model, critic, normalizer.of(segment), noise, args.gamma, alpha)
        return -value.mean().detach(), entropy.detach(), differentiate(-value.mean(), actor, args.max_grad_norm)

    warm_up, then = (critic_gradient, policy_gradient), (compiled(critic_gradient), compiled(policy_gradient))
    randn, obs = partial(torch.randn, device=env.device), env.detach()
    for iteration in run:
        # --- one step of every environment -----------------------------------------------------------------------
        grown = min(run.global_step / args.growth_steps, 1.0)
        model.end_cost.copy_(args.end_cost * grown * rewards.mean[0].abs())
        loud = ~is_quiet(iteration - torch.as_tensor(env.episode_length), args.quiet_episodes * grown)
        with torch.no_grad():
            if run.global_step - args.num_envs < args.learning_starts:
                u = torch.atanh(torch.empty(args.num_envs, act_dim, device=env.device).uniform_(-0.9999, 0.9999))
                action, log_prob = torch.tanh(u), u.new_full((args.num_envs,), -act_dim * math.log(2))
            else:
                action, log_prob, u = act(obs, loud[:, None] * randn(args.num_envs, act_dim))
            next_obs, reward, terminated, truncated, info = env.step(policy.scale(action))
            transition = dict(obs=obs, u=u, log_prob=log_prob, reward=reward, final_obs=info["final_obs"])
            buffer.add(**transition, terminated=terminated, truncated=truncated, goes_on=(~terminated).float())
            note(obs, reward, info["final_obs"])
        run.episodes(info)
        obs = next_obs
        run.lap("env")

        # --- updates of model, critics and policy ----------------------------------------------------------------
        n = run.global_step - args.learning_starts
        for update in range(int(max(0, n - args.num_envs) * args.update_ratio), int(max(0, n) * args.update_ratio)):
            for _ in range(args.model_updates):
                batch = {k: x[0] for k, x in buffer.sample(args.batch_size).items()}
                model.dynamics.train()  # power iterations, within the graph, of weights that have changed
                losses = model_gradient(batch, *buffer.ends(args.batch_size))
                model.dynamics.eval()
                model_optimizer.step()
            run.lap("model")

            alpha, h = temperature[0].detach().exp(), args.unroll if run.global_step > args.model_warmup else 0
            fit, ascend, gradient = (*then, args.gradient) if h else (*warm_up, "dp")
            if h and args.imagined_steps:
                imagined = rollouts.step(lambda obs: imagine(obs, randn(len(obs), act_dim)), batch["obs"])
                batch = {k: torch.cat([batch[k], x]) for k, x in imagined.items()}
            value_loss, q_value = fit(batch, randn(1 + h * args.expand_critic, len(batch["u"]), act_dim), alpha)
            critic_optimizer.step()
            run.lap("critic")

            if (update + 1) % args.policy_frequency:
                continue
            now = {k: x[None] for k, x in batch.items()}
            segment = buffer.sample(args.batch_size, h, args.dr_recent) if gradient == "dr" else now
            policy_loss, entropy, grad_norm = ascend(gradient, segment, randn(h + 1, *segment["u"].shape[1:]), alpha)
            if grad_norm.isfinite():
                actor_optimizer.step()
                follow(alpha.new_tensor(max(1 - args.policy_average, args.policy_frequency / (update + 1))))
                temperature[0].grad = alpha * (entropy - target_entropy)
                temperature_optimizer.step()
            run.lap("actor")
            run.mean({
                "losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/q_value": q_value,
                "losses/state_loss": losses[0], "losses/reward_loss": losses[1], "losses/termination_loss": losses[2],
                "losses/entropy": entropy, "grad/norm_before_clip": grad_norm, "grad/nonfinite": ~grad_norm.isfinite(),
            })  # fmt: skip

        # --- log and evaluate ------------------------------------------------------------------------------------
        if run.last or run.passed(args.log_every) or run.passed(args.eval_every):
            run.log({"losses/entropy_coef": temperature[0].exp(), "model/end_cost": model.end_cost} | env.diagnostics())
        if run.last or run.passed(args.eval_every):
            run.log(evaluator(policy))
