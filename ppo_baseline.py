"""PPO: Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347), in one file: the opponent.

1. Roll N environments forward for a batch of T steps; no gradient goes through physics.
2. Estimate the advantage of every action by GAE (Schulman et al. 2016, arXiv 1506.02438).
3. For some epochs of minibatches: improve the policy on the clipped surrogate (eq. 7), fit the critic to the returns.

The same tasks and policy layers as in shac.py and rpo_diffsim.py, but one critic, and actions are clipped where theirs
go through tanh. Runs on diffsim's tasks, on MuJoCo's physics, and on Gymnasium's environments of continuous actions.

    python ppo_baseline.py --env ant
    python ppo_baseline.py --env Hopper-v5                        # Gymnasium's task, many at a time on MuJoCo
    python ppo_baseline.py --env Hopper-v5 --physics gymnasium    # gymnasium.make itself, with CleanRL's settings
    python -m diffsim.play runs/ant__ppo_baseline__1__<time>      # returns, and --video ant.mp4
"""

import diffsim  # isort: skip  before torch: from here on Ctrl-C prints one line
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.distributions import Normal

from diffsim import ranks  # torchrun's processes: a run of one has nothing to share
from diffsim.flags import RunArgs, fail, one_line_errors, parse
from diffsim.play import Evaluator
from diffsim.run import Run

# isort: split
from diffsim.flags import Count, Few, Fraction, Layers, Norm, Number, Rate, Seed, Weight  # bounds


@dataclass
class Args(RunArgs):
    # device, compile, eval_every, eval_episodes, save_every, resume, capture_video and the like: diffsim/flags.py
    env: str = "ant"
    """environment: see `python -m diffsim` for the list, path/to/my_task.py:MyTask, or any Gymnasium id"""
    physics: Literal["diffsim", "mujoco", "gymnasium"] | None = None
    """engine that runs the task; gymnasium: gymnasium.make of that id; None: the task's own"""
    seed: Seed = 1
    """seed of the networks, the noise and the environments"""
    num_envs: Count = 256
    """environments simulated side by side"""
    num_steps: Few = 32
    """T, steps of each environment in a batch"""
    total_timesteps: Count = 4_000_000
    """environment steps over all environments"""
    stagger: bool = True
    """begin the first episodes at random times, so that later ones do not all end in the same step (not gymnasium's)"""
    learning_rate: Rate = 1e-3
    """initial learning rate"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0 (without desired_kl)"""
    desired_kl: Rate | None = None
    """adapt the learning rate, between 1e-5 and 1e-2, so that an epoch's KL stays near this"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of the advantages"""
    num_minibatches: Count = 4
    """minibatches of an epoch"""
    update_epochs: Few = 5
    """passes over a batch"""
    norm_adv: bool = True
    """normalise the advantages of a minibatch"""
    clip_coef: Norm = 0.2
    """clip range of the importance ratio (and of the value, with clip_vloss)"""
    clip_vloss: bool = True
    """clip the value's change, too; with --no-norm-reward clip_coef is in the reward's own units, often too little"""
    entropy_coef: Weight = 0.0
    """weight of the entropy bonus"""
    vf_coef: Weight = 0.5
    """weight of the value loss"""
    max_grad_norm: Norm = 0.5
    """the gradient is scaled down to this norm"""
    target_kl: Rate | None = None
    """stop a batch's epochs once the KL exceeds this"""
    norm_obs: bool = True
    """normalise observations by their running mean and variance, and clip them to 10 deviations"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return, and clip them at 10"""
    actor_hidden: Layers = (128, 64, 32)
    """hidden layers of the policy"""
    critic_hidden: Layers = (64, 64)
    """hidden layers of the critic"""
    activation: Literal["elu", "silu", "tanh"] = "elu"
    """activation of policy and critic; elu and silu are followed by LayerNorm"""
    log_std_init: Number = -0.5
    """initial log standard deviation of the policy's noise"""


# What differs from Args for a task or an engine; flags on the command line win. Budgets: up to four times RPO's.
TWIN = dict(num_envs=64, total_timesteps=3_000_000)  # Gymnasium's tasks: a quarter of the batch, four times the updates
DEFAULTS = {
    "cartpole": dict(total_timesteps=1_000_000, actor_hidden=(64, 64), log_std_init=-1.0),  # to balance
    "hopper": dict(total_timesteps=8_000_000),
    "anymal": dict(total_timesteps=8_000_000),
    "hand": dict(total_timesteps=4_100_000, gamma=0.995, log_std_init=-1.0),
    "humanoid": dict(total_timesteps=8_000_000, actor_hidden=(256, 128), critic_hidden=(128, 128)),
    "on mujoco": dict(log_std_init=-1.0),
    **{f"{x}-v5 on mujoco": TWIN for x in ("Ant", "HalfCheetah", "Hopper", "Walker2d")},
    "Humanoid-v5 on mujoco": TWIN | dict(actor_hidden=(256, 128), critic_hidden=(128, 128)),
    "on gymnasium": dict(  # CleanRL's settings for MuJoCo
        total_timesteps=1_000_000, num_envs=1, num_steps=2048, learning_rate=3e-4, num_minibatches=32,
        update_epochs=10, actor_hidden=(64, 64), activation="tanh", log_std_init=0.0, eval_episodes=10,
    ),
}  # fmt: skip


def mlp(sizes: list[int], activation: str, last_gain: float) -> nn.Sequential:
    """Linear layers, each but the last with its activation, and LayerNorm unless that is tanh."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(i, o), {"elu": nn.ELU, "silu": nn.SiLU, "tanh": nn.Tanh}[activation]()]
        if activation != "tanh":
            layers.append(nn.LayerNorm(o))
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 2**0.5 if layer is not layers[-1] else last_gain)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Agent(nn.Module):
    """Gaussian policy over the action, its deviation independent of the state, and a critic."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.mean = mlp([obs_dim, *args.actor_hidden, act_dim], args.activation, 0.01)
        self.log_std = nn.Parameter(torch.full((act_dim,), float(args.log_std_init)))
        self.critic = mlp([obs_dim, *args.critic_hidden, 1], args.activation, 1.0)

    def forward(self, obs) -> Normal:
        mean = self.mean(obs)
        return Normal(mean, self.log_std.exp().expand_as(mean), validate_args=False)

    def value(self, obs):
        return self.critic(obs).squeeze(-1)  # (...,)


class Normalizer(nn.Module):
    """Running mean and variance of observations; frozen inside a batch."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("var", torch.ones(obs_dim))
        self.register_buffer("count", torch.tensor(1e-4))

    def forward(self, obs):
        return ((obs - self.mean) * torch.rsqrt(self.var + 1e-5)).clamp(-10, 10)

    @torch.no_grad()
    def update(self, obs):
        """Merge the moments of a batch (Chan et al. 1979)."""
        mean, var, n = ranks.moments(obs)
        delta, total = mean - self.mean, self.count + n
        self.var.copy_((self.var * self.count + var * n + delta**2 * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)


class ReturnScale(nn.Module):
    """Running standard deviation of the discounted return, by which rewards are divided; their mean is kept."""

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma = gamma
        self.moments = Normalizer(1)
        self.register_buffer("returns", torch.zeros(num_envs))

    @torch.no_grad()
    def forward(self, rewards, ended):
        """Scaled rewards of a batch (T, N), whose returns are taken into account."""
        seen = []
        for reward, done in zip(rewards, ended):
            self.returns.copy_(self.gamma * self.returns + reward)
            seen.append(self.returns.clone())
            self.returns.masked_fill_(done, 0.0)
        self.moments.update(torch.stack(seen).flatten()[:, None])
        return (rewards * torch.rsqrt(self.moments.var + 1e-8)).clamp(-10, 10)


class DeterministicPolicy(nn.Module):
    """What is evaluated and exported: observation -> action within its bounds, its normaliser inside."""

    def __init__(self, normalizer: Normalizer, agent: Agent, space):
        super().__init__()
        self.normalizer, self.agent = normalizer, agent
        self.register_buffer("low", torch.as_tensor(space.low))
        self.register_buffer("high", torch.as_tensor(space.high))

    def forward(self, obs):
        return torch.clamp(self.agent(self.normalizer(obs)).mean, self.low, self.high)


def gae(rewards, values, next_values, terminated, truncated, gamma: float, lam: float):
    """Advantages of a batch (GAE, eq. 16), all (T, N): next_values[t] is V(final_obs[t]).

    A terminated state is worth nothing; a truncated episode bootstraps; no sum crosses into the next episode.
    """
    advantages, after = [], torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        error = rewards[t] + gamma * torch.where(terminated[t], 0.0, next_values[t]) - values[t]
        after = error + gamma * lam * torch.where(terminated[t] | truncated[t], 0.0, after)
        advantages.append(after)
    return torch.stack(advantages[::-1])


def clipped_surrogate_loss(log_ratio, advantage, clip_coef: float):
    """Clipped surrogate of each sample, to be minimised (PPO, eq. 7)."""
    ratio = log_ratio.clamp(max=10).exp()  # an infinite one has the gradient nan
    return torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef))


def clipped_value_loss(value, old_value, target, clip_coef: float | None):
    """Half the squared error of each sample; with a clip_coef the worse of that and of the clipped value's."""
    loss = (value - target).square()
    if clip_coef is not None:
        clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        loss = torch.max(loss, (clipped - target).square())
    return 0.5 * loss


if __name__ == "__main__":
    args = parse(Args, DEFAULTS)
    batch_size = args.num_envs * args.num_steps
    if (samples := ranks.share(batch_size)) < 2 * args.num_minibatches:
        fail(f"--num-minibatches is {args.num_minibatches}; a batch of {samples} is too small")
    num_iterations = max(1, args.total_timesteps // batch_size)
    run = Run(args, num_iterations, batch_size)

    with one_line_errors(), ranks.in_turn():
        env = diffsim.make(args.env, ranks.share(args.num_envs), seed=ranks.seed(args.seed), **args.engine())
        evaluator = Evaluator(args)
    env.reset(options=dict(stagger=args.stagger))
    obs_dim, act_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]

    agent = Agent(obs_dim, act_dim, args).to(env.device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    normalizer = Normalizer(obs_dim).to(env.device) if args.norm_obs else nn.Identity()
    return_scale = ReturnScale(env.num_envs, args.gamma).to(env.device)
    policy = DeterministicPolicy(normalizer, agent, env.single_action_space).to(env.device)
    run.restore(policy, env, agent=agent, optimizer=optimizer, normalizer=normalizer, return_scale=return_scale)
    if args.resume and args.physics == "gymnasium":
        return_scale.returns.zero_()  # its episodes start anew

    for iteration in run:
        if args.anneal_lr and args.desired_kl is None:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        learning_rate = optimizer.param_groups[0]["lr"]

        # --- rollout: forward only -------------------------------------------------------------------------------
        obs, steps = env.detach(), []
        with torch.no_grad():
            for _ in range(args.num_steps):
                dist = agent(normalizer(obs))
                action = dist.mean + dist.stddev * torch.randn_like(dist.mean)
                next_obs, reward, terminated, truncated, info = env.step(action)
                step = dict(obs=obs, action=action, reward=reward, terminated=terminated, truncated=truncated)
                steps.append(step | dict(final_obs=info["final_obs"]))
                run.episodes(info)
                obs = next_obs
            batch = {key: torch.stack([step[key] for step in steps]) for key in steps[0]}  # (T, N, ...)
            ends = batch["terminated"], batch["truncated"]
            inputs = normalizer(batch["obs"])
            values, next_values = agent.value(inputs), agent.value(normalizer(batch["final_obs"]))
            rewards = return_scale(batch["reward"], ends[0] | ends[1]) if args.norm_reward else batch["reward"]
            advantages = gae(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
            targets = advantages + values
            inputs, action, values, advantages, targets = (
                x.flatten(0, 1) for x in (inputs, batch["action"], values, advantages, targets)
            )  # (T N, ...)
            old_log_prob = agent(inputs).log_prob(action).sum(-1)
        run.lap("simulate")

        # --- update: epochs on the clipped surrogate -------------------------------------------------------------
        epochs = 0
        for _ in range(args.update_epochs):
            kls = []
            for index in torch.randperm(len(targets), device=env.device).tensor_split(args.num_minibatches):
                new = agent(inputs[index])
                log_ratio = new.log_prob(action[index]).sum(-1) - old_log_prob[index]
                advantage = advantages[index]
                if args.norm_adv:
                    mean, std = ranks.mean_std(advantage)
                    advantage = (advantage - mean) / (std + 1e-8)
                policy_loss = clipped_surrogate_loss(log_ratio, advantage, args.clip_coef).mean()
                clip = args.clip_coef if args.clip_vloss else None
                value_loss = clipped_value_loss(agent.value(inputs[index]), values[index], targets[index], clip).mean()
                entropy = new.entropy().sum(-1).mean()
                loss = policy_loss - args.entropy_coef * entropy + args.vf_coef * value_loss
                optimizer.zero_grad()
                loss.backward()
                ranks.average_gradients(agent)
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                with torch.no_grad():  # Schulman's estimator of KL(old || new), http://joschu.net/blog/kl-approx.html
                    kls.append((log_ratio.exp() - 1 - log_ratio).mean())
                    run.mean({"losses/clipfrac": (log_ratio.exp() - 1).abs().gt(args.clip_coef).float().mean()})
            approx_kl, epochs = ranks.mean(torch.stack(kls)), epochs + 1
            if args.desired_kl is not None:
                factor = 1 / 1.5 if approx_kl > 2 * args.desired_kl else 1.5 if approx_kl < args.desired_kl / 2 else 1.0
                optimizer.param_groups[0]["lr"] = min(max(optimizer.param_groups[0]["lr"] * factor, 1e-5), 1e-2)
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        if args.norm_obs:
            normalizer.update(batch["obs"].flatten(0, 1))
        run.lap("update")

        # --- log and evaluate ------------------------------------------------------------------------------------
        run.log({
            "losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/entropy": entropy,
            "losses/approx_kl": approx_kl,
            "losses/explained_variance": 1 - (targets - values).var() / targets.var().clamp_min(1e-12),
            "policy/std": new.stddev.mean(), "charts/epochs": epochs, "charts/learning_rate": learning_rate,
            "grad/norm_before_clip": grad_norm, "grad/norm_after_clip": grad_norm.clamp(max=args.max_grad_norm),
        } | env.diagnostics())  # fmt: skip
        if run.last or run.passed(args.eval_every):
            run.log(evaluator(policy))
