"""SHAC: Short-Horizon Actor-Critic (Xu et al., ICLR 2022, arXiv 2204.07137), in one file.

1. Roll N differentiable environments forward for a window of H steps under a Gaussian policy, u = mean + std noise.
2. Add a smooth critic's value of the last state, and follow the gradient of the discounted sum of rewards through the
   simulator into the policy (eq. 5).
3. Fit the critics to TD(lambda) targets of the same window (SHAC, eq. 6-7); go on from where the environments are.

With entropy in the rewards, a learned temperature and two critics without target networks this is SAPO (Xing et al.,
ICLR 2025, arXiv 2412.12089; its targets take the critics' minimum). RPO is what `diff shac.py rpo_diffsim.py` says.

    python shac.py --env ant                                 # trains in minutes on a laptop's CPU
    python shac.py --env ant --entropy-coef 1 --learn-entropy-coef --state-dependent-std --num-critics 2 \
        --no-target-critic --activation silu --weight-decay 0.01 --max-grad-norm 0.5   # SAPO
    python shac.py --env ant --physics mujoco                # MuJoCo's steps, diffsim's gradients
    python -m diffsim.play runs/<run>                        # returns, and --video ant.mp4
"""

import diffsim  # isort: skip  before torch: from here on Ctrl-C prints one line
import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence

from diffsim import ranks  # torchrun's processes: a run of one has nothing to share
from diffsim.flags import PhysicsArgs, fail, one_line_errors, parse
from diffsim.play import Evaluator
from diffsim.run import Run

# isort: split
from diffsim.flags import Count, Decay, Few, Fraction, Layers, Norm, Number, Rate, Seed, Weight  # bounds


@dataclass
class Args(PhysicsArgs):
    # physics, derivative, stiffness, smoothing, device, eval_every, save_every, resume and the like: diffsim/flags.py
    env: str = "ant"
    """environment: see `python -m diffsim` for the list, or path/to/my_task.py:MyTask"""
    seed: Seed = 1
    """seed of the networks, the noise and the environments"""
    num_envs: Count = 256
    """environments simulated side by side (SHAC's paper: 64, RPO's 128 on Ant)"""
    horizon: Few = 12
    """H, control steps of a window, through which gradients flow (the paper: 32)"""
    total_timesteps: Count = 2_000_000
    """environment steps over all environments"""
    stagger: bool = True
    """begin the first episodes at random times, so that later ones do not all end in the same step"""
    actor_learning_rate: Rate = 3e-3
    """initial learning rate of the policy; falls to min_learning_rate (SHAC's paper: 2e-3, RPO's 5e-4)"""
    critic_learning_rate: Rate = 1e-3
    """initial learning rate of the critics; falls to min_learning_rate (SHAC's paper: 2e-3 on Ant, RPO's 5e-4)"""
    min_learning_rate: Weight = 1e-5
    """learning rate at the end"""
    learning_rate_decay: Literal["linear", "exponential"] = "linear"
    """from the initial learning rates to the last (RPO's paper: exponential)"""
    weight_decay: Weight = 0.0
    """AdamW's weight decay of policy and critics"""
    adam_betas: tuple[Decay, Decay] = (0.7, 0.95)
    """decay of Adam's first and second moment"""
    score_share: Weight = 0.0
    """not the papers': add PPO's gradient, which no derivative of physics enters, scaled to this share of the norm"""
    max_grad_norm: Norm = 1.0
    """gradients of policy and critics are scaled down to this norm"""
    policy_average: Decay = 0.0
    """share that is kept of an average of the policy, evaluated and exported; at first a plain mean; 0: no average"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of the TD(lambda) targets"""
    target_alpha: Fraction = 0.2
    """share of the target critics that is kept at each window (SHAC's paper: 0.2, RPO's 0.8)"""
    normalize_returns: bool = False
    """fit the critics to returns of mean 0 and deviation 1"""
    num_critics: Few = 2
    """critics, whose mean is the value (SHAC's paper: 1)"""
    target_critic: bool = True
    """bootstrap with a copy of the critics that lags behind them by target_alpha"""
    critic_epochs: Few = 16
    """passes over the window to fit the critics"""
    critic_minibatches: Count = 4
    """minibatches of such a pass"""
    actor_hidden: Layers = (128, 64, 32)
    """hidden layers of the policy (RPO's paper: 400 200 100)"""
    critic_hidden: Layers = (64, 64)
    """hidden layers of a critic (RPO's paper: 400 200 100)"""
    activation: Literal["elu", "silu"] = "elu"
    """activation function of policy and critics (RPO's paper: silu)"""
    log_std_init: Number = -1.0
    """initial log standard deviation of the policy's noise, before tanh"""
    state_dependent_std: bool = False
    """let the policy's noise depend on the observation, its log std between -5 and 2"""
    entropy_coef: Weight = 0.0
    """temperature: weight of the policy's entropy, scaled to about [0, 1], in every reward; 0: SHAC"""
    learn_entropy_coef: bool = False
    """adapt the temperature so that the entropy comes to -act_dim / 2"""
    entropy_learning_rate: Rate = 5e-3
    """learning rate of the temperature"""


# What differs from Args for a task, on an engine; flags on the command line win. Budgets are a few minutes on a CPU.
BIG_CRITIC = dict(critic_hidden=(128, 128))
ON_MUJOCO = dict(actor_learning_rate=1e-3, eval_every=250_000)  # its gradient is noisier: smaller steps
LEGGED = dict(horizon=16, gamma=0.995, stiffness=2.4, smoothing=1.0)  # longer windows, stiffer contacts
DEFAULTS = {
    "cartpole": dict(total_timesteps=1_000_000, actor_hidden=(64, 64), actor_learning_rate=1e-2),
    "ant": dict(total_timesteps=2_500_000), "anymal": dict(total_timesteps=3_000_000),
    "push": dict(horizon=32), "hand": dict(total_timesteps=4_100_000, horizon=32, gamma=0.995),
    "humanoid": BIG_CRITIC | dict(horizon=16, actor_learning_rate=1e-3, actor_hidden=(256, 128)),  # windows see a fall
    "ant on mujoco": ON_MUJOCO | BIG_CRITIC | dict(
        total_timesteps=3_000_000, num_envs=512, horizon=8, critic_epochs=8, critic_minibatches=8, gamma=0.995,
        actor_learning_rate=2e-3,
    ),
    "cheetah on mujoco": ON_MUJOCO | BIG_CRITIC | dict(num_envs=512, horizon=8),
    "hopper on mujoco": ON_MUJOCO | LEGGED | dict(score_share=0.5, normalize_returns=True),
    "walker on mujoco": ON_MUJOCO | LEGGED,
}  # fmt: skip


def mlp(sizes: list[int], activation: str) -> nn.Sequential:
    """Linear - activation - LayerNorm; the last layer plain and small, so that actions and values start near zero."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(i, o), {"elu": nn.ELU, "silu": nn.SiLU}[activation](), nn.LayerNorm(o)]
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 2**0.5 if layer is not layers[-1] else 0.01)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """Gaussian over u, the action before tanh."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim, *args.actor_hidden, act_dim]
        self.mean = mlp(sizes, args.activation)
        self.log_std = nn.Parameter(torch.full((act_dim,), float(args.log_std_init)))
        self.log_std_net = mlp(sizes, args.activation) if args.state_dependent_std else None

    def forward(self, obs) -> Normal:
        log_std = self.log_std if self.log_std_net is None else (self.log_std + self.log_std_net(obs)).clamp(-5, 2)
        mean = self.mean(obs)
        return Normal(mean, log_std.exp().expand_as(mean), validate_args=False)


class Critics(nn.Module):
    """Values V(obs); with normalize_returns the networks learn returns of mean 0 and deviation 1, scaled back here."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim, *args.critic_hidden, 1]
        self.members = nn.ModuleList(mlp(sizes, args.activation) for _ in range(args.num_critics))
        self.returns = Normalizer(1)  # mean 0 and variance 1 until it is updated

    def forward(self, obs):
        values = torch.stack([member(obs).squeeze(-1) for member in self.members])  # (num_critics, ...)
        return self.returns.mean + self.returns.var.sqrt() * values


class Normalizer(nn.Module):
    """Running mean and variance of observations; frozen inside a window."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("var", torch.ones(obs_dim))
        self.register_buffer("count", torch.tensor(1e-4))

    def forward(self, obs):
        return (obs - self.mean) * torch.rsqrt(self.var + 1e-5)

    @torch.no_grad()
    def update(self, obs):
        """Merge the moments of a batch (Chan et al. 1979)."""
        mean, var, n = ranks.moments(obs)
        delta, total = mean - self.mean, self.count + n
        self.var.copy_((self.var * self.count + var * n + delta**2 * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)


class DeterministicPolicy(nn.Module):
    """What is evaluated and exported: observation -> action, its normaliser inside."""

    def __init__(self, normalizer: Normalizer, actor: Actor):
        super().__init__()
        self.normalizer, self.actor = normalizer, actor

    def forward(self, obs):
        return torch.tanh(self.actor(self.normalizer(obs)).mean)


def td_lambda(rewards, next_values, terminated, truncated, gamma: float, lam: float):
    """TD(lambda) targets of a window (SHAC, eq. 7), all (H, N): next_values[t] is V(final_obs[t]).

    A terminated state is worth nothing; a truncated episode bootstraps; no sum crosses into the next episode.
    With lam = 1 they are the discounted returns up to the episode's end, or the window's and its value (eq. 5).
    """
    targets, after = [], next_values[-1]
    closes = terminated | truncated  # the window or the episode ends here: the sum takes V, and no more
    closes[-1] = True
    for t in reversed(range(len(rewards))):
        following = torch.where(closes[t], next_values[t], (1 - lam) * next_values[t] + lam * after)
        after = rewards[t] + gamma * torch.where(terminated[t], 0.0, following)
        targets.append(after)
    return torch.stack(targets[::-1])


def sum_of_starts(returns, terminated, truncated):
    """Returns (H, N) at the window's first step and at each episode's first step in it, summed: what SHAC maximises."""
    ended = terminated | truncated
    starts = torch.cat([torch.ones_like(ended[:1]), ended[:-1]])
    return torch.where(starts, returns, 0.0).sum()


def squashed_entropy(policy: Normal, u):
    """Entropy (...,) of tanh(u), u (..., act_dim) a sample of the policy: exact but for the tanh, which u estimates."""
    log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return (policy.entropy() + log_slope).sum(-1)


def ppo_surrogate(policy: Normal, u, old_log_prob, advantage, clip=0.2):
    """PPO's clipped objective of each sample (Schulman et al. 2017, eq. 7): (...,). It needs no derivative of R."""
    ratio = (policy.log_prob(u).sum(-1) - old_log_prob).clamp(max=10).exp()  # an infinite one has the gradient nan
    return torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


if __name__ == "__main__":
    args = parse(Args, DEFAULTS)
    batch_size = args.num_envs * args.horizon
    if (samples := ranks.share(batch_size)) < args.critic_minibatches:
        fail(f"--critic-minibatches is {args.critic_minibatches}, more than the {samples} samples of a window")
    if args.learn_entropy_coef and not args.entropy_coef:
        fail("--learn-entropy-coef needs an --entropy-coef above 0 to start from")
    if args.learning_rate_decay == "exponential" and args.min_learning_rate == 0:
        fail("--learning-rate-decay exponential never comes to --min-learning-rate 0; use one above 0, or linear")
    num_iterations = max(1, args.total_timesteps // batch_size)
    run = Run(args, num_iterations, batch_size)

    with one_line_errors(), ranks.in_turn():
        env = diffsim.make(args.env, ranks.share(args.num_envs), seed=ranks.seed(args.seed), **args.engine())
        env.check_gradient(args.horizon)  # warns if rewards do not depend on the actions
        evaluator = Evaluator(args)
    env.reset(options=dict(stagger=args.stagger))
    obs_dim, act_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]

    actor, critic = Actor(obs_dim, act_dim, args).to(env.device), Critics(obs_dim, args).to(env.device)
    target_critic = copy.deepcopy(critic) if args.target_critic else critic
    normalizer = Normalizer(obs_dim).to(env.device)
    policy = DeterministicPolicy(normalizer, actor)
    average = copy.deepcopy(policy).eval()
    settings = dict(betas=args.adam_betas, weight_decay=args.weight_decay, fused=True)
    actor_optimizer = torch.optim.AdamW(actor.parameters(), args.actor_learning_rate, **settings)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), args.critic_learning_rate, **settings)
    temperature = nn.ParameterList([torch.tensor(max(args.entropy_coef, 1e-8)).log()]).to(env.device)
    temperature_optimizer = torch.optim.Adam(temperature, args.entropy_learning_rate)
    target_entropy = -act_dim / 2
    run.restore(
        average, env, actor=actor, average=average, normalizer=normalizer, target_critic=target_critic, critic=critic,
        actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer, temperature=temperature,
        temperature_optimizer=temperature_optimizer,
    )  # fmt: skip

    for iteration in run:
        left, low, linear = 1 - iteration / num_iterations, args.min_learning_rate, args.learning_rate_decay == "linear"
        for adam, rate in ((actor_optimizer, args.actor_learning_rate), (critic_optimizer, args.critic_learning_rate)):
            adam.param_groups[0]["lr"] = min(rate, low + left * (rate - low) if linear else low * (rate / low) ** left)

        # --- rollout: one window with its graph ------------------------------------------------------------------
        obs, steps = env.detach(), []
        entropy_coef = temperature[0].detach().exp() if args.entropy_coef else 0.0
        for _ in range(args.horizon):
            dist = actor(normalizer(obs))
            u = dist.mean + dist.stddev * torch.randn_like(dist.mean)
            next_obs, reward, terminated, truncated, info = env.step(torch.tanh(u))
            entropy = squashed_entropy(dist, u)
            if args.entropy_coef:  # SAPO: the entropy, offset and scaled to about [0, 1], is part of the reward
                reward = reward + entropy_coef * (entropy - target_entropy) / (-2 * target_entropy)
            step = dict(obs=obs, u=u, reward=reward, terminated=terminated, truncated=truncated, entropy=entropy)
            steps.append(step | dict(final_obs=info["final_obs"]))
            run.episodes(info)
            obs = next_obs
        window = {key: torch.stack([step[key] for step in steps]) for key in steps[0]}  # (H, N, ...)
        ends = window["terminated"], window["truncated"]

        # --- gradients: one backward pass through physics --------------------------------------------------------
        next_values = target_critic(normalizer(window["final_obs"]))  # (num_critics, H, N)
        returns = td_lambda(window["reward"], next_values.mean(0), *ends, args.gamma, lam=1.0)
        policy_loss = -sum_of_starts(returns, *ends) / returns.numel()
        actor_optimizer.zero_grad()
        policy_loss.backward(inputs=list(actor.parameters()))
        window, next_values = {key: x.detach() for key, x in window.items()}, next_values.detach()
        inputs, u = normalizer(window["obs"]).flatten(0, 1), window["u"].flatten(0, 1)
        run.lap("simulate")

        # --- policy: follow them ---------------------------------------------------------------------------------
        with torch.no_grad():
            old = actor(inputs)
            old_log_prob = old.log_prob(u).sum(-1)
            targets = td_lambda(window["reward"], next_values.mean(0), *ends, args.gamma, args.gae_lambda).flatten()
            advantage = targets - target_critic(inputs).mean(0) if args.score_share else None
        if args.score_share:  # often noisier, but stiff contacts do not raise its variance
            score = ppo_surrogate(actor(inputs), u, old_log_prob, advantage - ranks.mean(advantage)).mean()
            gradients = [p.grad for p in actor.parameters()], grad(score, actor.parameters(), retain_graph=True)
            norm, score_norm = (nn.utils.get_total_norm(ranks.average(x)) for x in gradients)
            (-args.score_share * norm / score_norm.clamp_min(1e-30) * score).backward()
        ranks.average_gradients(actor)
        grad_norm = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
        nonfinite = ~grad_norm.isfinite()
        if not nonfinite:
            actor_optimizer.step()
        entropy = ranks.mean(window["entropy"])
        if args.learn_entropy_coef:
            temperature_optimizer.zero_grad()
            (temperature[0].exp() * (entropy - target_entropy)).backward()
            temperature_optimizer.step()
        with torch.no_grad():
            new = actor(inputs)  # how far the update went
            kl = kl_divergence(old, new).sum(-1).mean()
        run.lap("policy")

        # --- critics: TD(lambda) regression ----------------------------------------------------------------------
        for part in {critic, target_critic} if args.normalize_returns else ():  # in shac.py both may be one
            part.returns.update(targets[:, None])
        for _ in range(args.critic_epochs):
            for index in torch.randperm(len(targets), device=env.device).tensor_split(args.critic_minibatches):
                value_loss = (critic(inputs[index]) - targets[index]).square().mean(1).sum() / critic.returns.var
                critic_optimizer.zero_grad()
                value_loss.backward()
                ranks.average_gradients(critic)
                nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
                critic_optimizer.step()
                run.mean({"losses/value_loss": value_loss / args.num_critics})
        with torch.no_grad():
            kept = min(args.policy_average, iteration / (iteration + 1))
            for slow, fast, share in (target_critic, critic, args.target_alpha), (average, policy, kept):
                for x, new_x in zip(slow.parameters(), fast.parameters()):
                    x.lerp_(new_x, 1 - share)
        normalizer.update(window["obs"].flatten(0, 1))
        average.load_state_dict(dict(policy.named_buffers()), strict=False)
        run.lap("critic")

        # --- log and evaluate ------------------------------------------------------------------------------------
        run.log({
            "losses/entropy_coef": entropy_coef,
            "losses/kl": kl, "policy/std": new.stddev.mean(),
            "losses/policy_loss": policy_loss, "losses/entropy": entropy,
            "grad/norm_before_clip": grad_norm, "grad/norm_after_clip": grad_norm.clamp(max=args.max_grad_norm),
            "grad/nonfinite": nonfinite.float().mean(), "charts/learning_rate": actor_optimizer.param_groups[0]["lr"],
        } | env.diagnostics())  # fmt: skip
        if run.last or run.passed(args.eval_every):
            run.log(evaluator(average))
