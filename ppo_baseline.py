"""PPO: Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347), in one file: the opponent.

The same tasks, networks and logs as shac.py and rpo_diffsim.py, and no gradient through physics: the policy is improved
by the clipped score-function surrogate on advantages from GAE (Schulman et al. 2016, arXiv 1506.02438). Runs on
diffsim's tasks, on the same tasks with MuJoCo's physics, and on any Gymnasium environment of continuous actions.

    python ppo_baseline.py --env ant
    python ppo_baseline.py --env ant --physics mujoco
    python ppo_baseline.py --env Hopper-v5                  # Gymnasium's own, with CleanRL's settings
"""

import csv
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

START = time.time()  # wall-clock counts from here, imports and compilation included

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import tyro  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

import diffsim  # noqa: E402
from diffsim.gymnasium_env import GymnasiumEnv, is_gymnasium_id  # noqa: E402


@dataclass
class Args:
    env: str = "ant"
    """environment: see `python -m diffsim`, path/to/my_task.py:MyTask, or a Gymnasium id (Hopper-v5)"""
    physics: Literal["diffsim", "mujoco"] = "diffsim"
    """engine of a diffsim task (Gymnasium's environments have their own)"""
    seed: int = 1
    """seed of the networks, the noise and the environments"""
    num_envs: int = 256
    """environments simulated side by side"""
    num_steps: int = 32
    """steps of each environment in a batch"""
    total_timesteps: int = 4_000_000
    """environment steps over all environments"""
    stagger: bool = True
    """begin the first episodes at random times, so that later ones do not all end in the same step (diffsim's tasks)"""
    learning_rate: float = 1e-3
    """initial learning rate"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0 (without desired_kl)"""
    desired_kl: float | None = None
    """adapt the learning rate so that an epoch's KL stays near this"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the advantages"""
    num_minibatches: int = 4
    """minibatches of an epoch"""
    update_epochs: int = 5
    """passes over a batch"""
    norm_adv: bool = True
    """normalise the advantages of a minibatch"""
    clip_coef: float = 0.2
    """clip range of the importance ratio (and of the value, with clip_vloss)"""
    clip_vloss: bool = True
    """clip the value's change, too"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm"""
    target_kl: float | None = None
    """stop a batch's epochs once the KL exceeds this"""
    norm_obs: bool = True
    """normalise observations by their running mean and variance"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    actor_hidden: tuple[int, ...] = (128, 64, 32)
    """hidden layers of the policy"""
    critic_hidden: tuple[int, ...] = (64, 64)
    """hidden layers of the critic"""
    activation: Literal["elu", "silu", "tanh"] = "elu"
    """activation of policy and critic; elu and silu are followed by LayerNorm"""
    log_std_init: float = -0.5
    """initial log standard deviation of the policy's noise"""
    device: str = "cpu"
    """cpu or cuda"""
    compile: bool = True
    """compile the physics (once for a task and num_envs, a minute or two, then cached)"""
    num_threads: int = 1
    """threads of torch; the same number gives the same bits"""
    eval_every: int = 500_000
    """environment steps between evaluations of the deterministic policy; 0: only at the end"""
    eval_episodes: int = 64
    """episodes of an evaluation (at most num_envs on diffsim)"""
    eval_physics: bool = False
    """evaluate on the other engine too (diffsim's tasks)"""
    save_every: int = 250_000
    """environment steps between checkpoints"""
    stop_after: int | None = None
    """stop after this many iterations, and save: --resume goes on"""
    resume: str | None = None
    """run folder or checkpoint.pt to continue, with the arguments it was started with"""
    run_dir: str = "runs"
    """where the run folder is made"""
    capture_video: bool = False
    """record the final policy as video.mp4 in the run folder (diffsim's tasks)"""


# What differs from Args for a task; flags on the command line win. Networks are SHAC's paper's; 8M steps last as long
# as a run of rpo_diffsim.py. A Gymnasium id has CleanRL's settings for MuJoCo.
DEFAULTS = {
    "cartpole": dict(total_timesteps=1_000_000, actor_hidden=(64, 64), log_std_init=-1.0),  # to balance
    "hopper": dict(total_timesteps=8_000_000),
    "anymal": dict(total_timesteps=8_000_000),
    "humanoid": dict(total_timesteps=8_000_000, actor_hidden=(256, 128), critic_hidden=(128, 128)),
    "gymnasium": dict(
        total_timesteps=1_000_000, num_envs=1, num_steps=2048, learning_rate=3e-4, num_minibatches=32,
        update_epochs=10, actor_hidden=(64, 64), activation="tanh", log_std_init=0.0, eval_episodes=10,
    ),
}  # fmt: skip


def fail(message: str):
    """One clear line for bad input."""
    print(f"ppo_baseline.py: {message}", file=sys.stderr)
    raise SystemExit(2)


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
        self.log_std = nn.Parameter(torch.full((act_dim,), args.log_std_init))
        self.critic = mlp([obs_dim, *args.critic_hidden, 1], args.activation, 1.0)

    def value(self, obs):
        """(...,)"""
        return self.critic(obs).squeeze(-1)

    def log_prob(self, mean, action):
        """Log density of an action, summed over its dimensions: (...,)"""
        z = (action - mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * np.log(2 * np.pi)).sum(-1)

    def entropy(self):
        return (self.log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()


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
        mean, var, n = obs.mean(0), obs.var(0, unbiased=False), obs.shape[0]
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
    def forward(self, rewards, done):
        """Scaled rewards of a batch (num_steps, N), whose returns are taken into account."""
        seen = []
        for reward, ended in zip(rewards, done):
            self.returns.copy_(self.gamma * self.returns + reward)
            seen.append(self.returns.clone())
            self.returns.masked_fill_(ended, 0.0)
        self.moments.update(torch.stack(seen).flatten()[:, None])
        return (rewards * torch.rsqrt(self.moments.var + 1e-8)).clamp(-10, 10)


class DeterministicPolicy(nn.Module):
    """What is saved as policy.pt2: observation -> action within its bounds, its normaliser inside."""

    def __init__(self, normalizer, agent, space):
        super().__init__()
        self.normalizer, self.mean = normalizer, agent.mean
        self.register_buffer("low", torch.as_tensor(space.low))
        self.register_buffer("high", torch.as_tensor(space.high))

    def forward(self, obs):
        return torch.clamp(self.mean(self.normalizer(obs)), self.low, self.high)


def gae(rewards, values, next_values, terminated, truncated, gamma: float, lam: float):
    """Advantages of a batch, all (num_steps, N): next_values[t] is V(final_obs[t]).

    A terminated state is worth nothing; a truncated episode bootstraps, and the sum does not cross into the next.
    """
    advantages = torch.empty_like(rewards)
    after = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        error = rewards[t] + gamma * next_values[t] * ~terminated[t] - values[t]
        after = advantages[t] = error + gamma * lam * after * ~(terminated[t] | truncated[t])
    return advantages


def ppo_loss(log_ratio, advantage, clip_coef: float):
    """Clipped surrogate of each sample, to be minimised (eq. 7)."""
    ratio = log_ratio.exp()
    return torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef))


def value_loss_of(value, old_value, target, clip_coef: float | None):
    """Half the squared error of each sample; with a clip_coef the worse of that and of the clipped value's."""
    loss = (value - target).square()
    if clip_coef is not None:
        clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        loss = torch.max(loss, (clipped - target).square())
    return 0.5 * loss


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
    positive = ("num_envs", "num_steps", "total_timesteps", "num_minibatches", "update_epochs", "num_threads")
    for name in (*positive, "eval_episodes", "save_every"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name in ("learning_rate", "max_grad_norm", "clip_coef", "target_kl", "desired_kl"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    for name in ("actor_hidden", "critic_hidden"):
        if min(getattr(args, name), default=1) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; a layer is at least 1 wide")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be between 0 and 1")
    for name in ("ent_coef", "vf_coef"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must not be negative")
    if args.num_steps * args.num_envs < 2 * args.num_minibatches:
        fail(f"--num-minibatches is {args.num_minibatches}; a batch of {args.num_steps * args.num_envs} is too small")
    if is_gymnasium_id(args.env) and (args.eval_physics or args.capture_video or args.device != "cpu"):
        fail(f"--eval-physics, --capture-video and --device cuda are for diffsim's tasks, not for {args.env}")


def make(args: Args, num_envs: int, physics: str, seed: int = 0):
    if is_gymnasium_id(args.env):
        return GymnasiumEnv(args.env, num_envs, seed)
    return diffsim.make(args.env, num_envs, seed=seed, device=args.device, physics=physics, compile=args.compile)


if __name__ == "__main__":
    args = tyro.cli(
        Args, args=[a for a in sys.argv[1:] if a not in ("-h", "--help")]
    )  # --help shows the task's defaults
    kind = "gymnasium" if is_gymnasium_id(args.env) else args.env
    args = tyro.cli(Args, default=replace(args, **DEFAULTS.get(kind, {})))  # explicit flags are parsed last
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
            fail(f"--resume {path}: not a checkpoint of ppo_baseline.py")
        args = tyro.cli(Args, default=started_with)
        if args.env != started_with.env:
            fail(f"--resume {path}: a checkpoint of {started_with.env}, not of {args.env}")
        for name, value in asdict(args).items():
            if name not in ("resume", "stop_after") and value != getattr(started_with, name):
                flag = name.replace("_", "-")
                fail(f"--{flag} is {value}, the run has {getattr(started_with, name)}: resuming keeps its arguments")
    check(args)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    other_physics = "mujoco" if args.physics == "diffsim" else "diffsim"
    on_gymnasium = is_gymnasium_id(args.env)
    try:
        env = make(args, args.num_envs, args.physics, args.seed)
        # diffsim's step is compiled for num_envs; others run any number
        num_eval = args.num_envs if args.physics == "diffsim" and not on_gymnasium else args.eval_episodes
        eval_env = make(args, num_eval, args.physics)
        other_env = make(args, args.eval_episodes, other_physics) if args.eval_physics else None
    except ValueError as e:
        fail(str(e))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted before the first step: nothing to save")
    obs_dim, act_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    batch_size = args.num_envs * args.num_steps
    num_iterations = max(1, args.total_timesteps // batch_size)

    agent = Agent(obs_dim, act_dim, args).to(env.device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    normalizer = Normalizer(obs_dim).to(env.device)
    return_scale = ReturnScale(args.num_envs, args.gamma).to(env.device)
    policy = DeterministicPolicy(normalizer, agent, env.single_action_space).to(env.device)

    modules = dict(agent=agent, optimizer=optimizer, normalizer=normalizer, return_scale=return_scale)
    global_step = first_iteration = 0
    elapsed_before = 0.0
    recent: list[list[float]] = []  # return and length of the latest episodes
    obs, _ = env.reset()
    if checkpoint is None:
        if args.stagger and not on_gymnasium:
            env.episode_length.random_(0, env.max_episode_steps)
        run_name = f"{args.env.split(':')[-1].lower()}__ppo_baseline__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        run = Path(args.run_dir) / run_name
        run.mkdir(parents=True, exist_ok=True)
    else:
        run = path.parent
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        global_step, first_iteration = checkpoint["global_step"], checkpoint["iteration"]
        elapsed_before, recent = checkpoint["wall_time_s"], checkpoint["recent"]
        if on_gymnasium:
            print(f"{args.env} cannot be saved: its episodes start anew, everything else goes on")
        else:
            env.set_state(checkpoint["env_state"])
            obs = env.detach()

    writer = SummaryWriter(str(run), purge_step=global_step if checkpoint else None)
    table = "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    left = num_iterations - first_iteration
    print(f"{run}: {args.env}, {args.num_envs} envs x {args.num_steps} steps, {left} iterations to go", flush=True)
    if kind in DEFAULTS:
        print("for this task:", *(f"{k}={v}" for k, v in DEFAULTS[kind].items() if getattr(args, k) == v), flush=True)
    fields = (
        "iteration,global_step,wall_time_s,SPS,episodic_return,episodic_length,eval_return,eval_return_std,other_return,"
        "policy_loss,value_loss,explained_variance,grad_norm_before_clip,nonfinite_states,entropy,approx_kl,clipfrac,std,"
        "epochs,learning_rate,simulate_s,update_s"
    ).split(",")
    rows = []
    if checkpoint is not None and (run / "metrics.csv").exists():  # drop what came after the checkpoint
        with open(run / "metrics.csv") as f:
            rows = [r for r in csv.DictReader(f) if int(r["global_step"]) <= global_step]
    metrics_file = open(run / "metrics.csv", "w", newline="")
    metrics = csv.DictWriter(metrics_file, fields)
    metrics.writeheader()
    metrics.writerows(rows)

    def save(iteration: int):
        state = {name: module.state_dict() for name, module in modules.items()}
        state |= dict(args=asdict(args), rng=torch.get_rng_state(), recent=recent)
        state |= dict(global_step=global_step, iteration=iteration, wall_time_s=elapsed_before + time.time() - START)
        if not on_gymnasium:
            state["env_state"] = env.get_state()
        atomic_save(state, run / "checkpoint.pt")
        example = torch.zeros(2, obs_dim, device=env.device)
        program = torch.export.export(policy, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch.export.save(program, run / "policy.tmp.pt2", extra_files={"env": args.env})
        os.replace(run / "policy.tmp.pt2", run / "policy.pt2")

    end = min(num_iterations, args.stop_after or num_iterations)
    next_save = (global_step // args.save_every + 1) * args.save_every
    stop = []  # Ctrl-C lets the iteration finish, so that what is saved can be resumed bit for bit
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    for iteration in range(first_iteration, end):
        if args.anneal_lr and args.desired_kl is None:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

        # --- rollout: forward only ------------------------------------------------------------------------
        tick = time.perf_counter()
        keys = ("obs", "action", "value", "reward", "terminated", "truncated", "final_value")
        storage: dict[str, list] = {k: [] for k in keys}
        nonfinite_states = 0
        with torch.no_grad():
            for _ in range(args.num_steps):
                inputs = normalizer(obs)
                mean, value = agent.mean(inputs), agent.value(inputs)
                action = mean + agent.log_std.exp() * torch.randn_like(mean)
                next_obs, reward, terminated, truncated, info = env.step(action)
                final_value = torch.zeros_like(value)  # of the last observation of episodes that end here
                if "episode" in info:
                    done = info["_episode"]
                    final_value[done] = agent.value(normalizer(info["final_obs"][done]))
                    r, l = info["episode"]["r"][done], info["episode"]["l"][done]
                    recent = (recent + torch.stack([r, l.float()], 1).tolist())[-100:]
                    nonfinite_states += int(info["nonfinite"].sum()) if "nonfinite" in info else 0
                for key, x in zip(keys, (obs, action, value, reward, terminated, truncated, final_value)):
                    storage[key].append(x)
                obs = next_obs
            batch = {k: torch.stack(v) for k, v in storage.items()}
            reward, value, ended = batch["reward"], batch["value"], batch["terminated"] | batch["truncated"]
            next_values = torch.cat([value[1:], agent.value(normalizer(obs))[None]])
            next_values = torch.where(ended, batch["final_value"], next_values)
            if args.norm_reward:
                reward = return_scale(reward, ended)
            advantages = gae(
                reward, value, next_values, batch["terminated"], batch["truncated"], args.gamma, args.gae_lambda
            ).flatten()
            batch_obs, action, value = (batch[k].flatten(0, 1) for k in ("obs", "action", "value"))
            inputs = normalizer(batch_obs)
            targets = advantages + value
            old_log_prob = agent.log_prob(agent.mean(inputs), action)
        simulate_s = time.perf_counter() - tick

        # --- update: epochs on the clipped surrogate ------------------------------------------------------
        tick = time.perf_counter()
        clipfracs, epochs, lr_of_iteration = [], 0, optimizer.param_groups[0]["lr"]
        for _ in range(args.update_epochs):
            kls = []
            for index in torch.randperm(batch_size, device=env.device).chunk(args.num_minibatches):
                mean = agent.mean(inputs[index])
                log_ratio = agent.log_prob(mean, action[index]) - old_log_prob[index]
                advantage = advantages[index]
                if args.norm_adv:
                    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                policy_loss = ppo_loss(log_ratio, advantage, args.clip_coef).mean()
                clip = args.clip_coef if args.clip_vloss else None
                value_loss = value_loss_of(agent.value(inputs[index]), value[index], targets[index], clip).mean()
                loss = policy_loss - args.ent_coef * agent.entropy() + args.vf_coef * value_loss
                optimizer.zero_grad()
                loss.backward()
                norm_before = float(nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm))
                optimizer.step()
                with torch.no_grad():  # Schulman's estimator of KL(old || new), http://joschu.net/blog/kl-approx.html
                    kls.append(float((log_ratio.exp() - 1 - log_ratio).mean()))
                    clipfracs.append(float((log_ratio.exp() - 1).abs().gt(args.clip_coef).float().mean()))
            approx_kl, epochs = float(np.mean(kls)), epochs + 1
            if args.desired_kl is not None:
                factor = 1 / 1.5 if approx_kl > 2 * args.desired_kl else 1.5 if approx_kl < args.desired_kl / 2 else 1.0
                group = optimizer.param_groups[0]
                group["lr"] = min(max(group["lr"] * factor, 1e-5), 1e-2)
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        explained = 1 - float((targets - value).var() / targets.var().clamp_min(1e-12))
        update_s = time.perf_counter() - tick
        if args.norm_obs:
            normalizer.update(batch_obs)

        # --- log, evaluate, save --------------------------------------------------------------------------
        before, global_step = global_step, global_step + batch_size
        row = dict.fromkeys(fields, "")
        last = iteration == num_iterations - 1
        if last or (args.eval_every and global_step // args.eval_every > before // args.eval_every):
            returns = evaluate(eval_env, policy, min(args.eval_episodes, num_eval))
            row["eval_return"], row["eval_return_std"] = float(returns.mean()), float(returns.std())
            writer.add_scalar("eval/episodic_return", row["eval_return"], global_step)
            if other_env is not None:
                row["other_return"] = float(evaluate(other_env, policy, args.eval_episodes).mean())
                writer.add_scalar(f"eval/{other_physics}_return", row["other_return"], global_step)
            on_other = f", on {other_physics} {row['other_return']:.0f}" if other_env is not None else ""
            print(f"\rstep {global_step:>9,}  evaluation {row['eval_return']:.0f}{on_other}", flush=True)
        wall = elapsed_before + time.time() - START
        row |= dict(
            iteration=iteration, global_step=global_step, wall_time_s=round(wall, 3), SPS=int(global_step / wall),
            policy_loss=float(policy_loss.detach()), value_loss=float(value_loss.detach()),
            explained_variance=explained, grad_norm_before_clip=norm_before, nonfinite_states=nonfinite_states,
            entropy=float(agent.entropy().detach()), approx_kl=approx_kl, clipfrac=float(np.mean(clipfracs)),
            std=float(agent.log_std.detach().exp().mean()), epochs=epochs, learning_rate=lr_of_iteration,
            simulate_s=round(simulate_s, 4), update_s=round(update_s, 4),
        )  # fmt: skip
        if recent:
            row["episodic_return"], row["episodic_length"] = (float(x) for x in np.mean(recent, 0))
        metrics.writerow(row)
        for key, tag in dict(
            episodic_return="charts/episodic_return", episodic_length="charts/episodic_length", SPS="charts/SPS",
            learning_rate="charts/learning_rate", value_loss="losses/value_loss", policy_loss="losses/policy_loss",
            entropy="losses/entropy", approx_kl="losses/approx_kl", clipfrac="losses/clipfrac",
            explained_variance="losses/explained_variance", grad_norm_before_clip="grad/norm_before_clip",
            std="policy/std",
        ).items():  # fmt: skip
            if row[key] != "":
                writer.add_scalar(tag, row[key], global_step)
        tty = sys.stdout.isatty()
        if tty or iteration % 20 == 0 or last:
            done_share = (iteration + 1) / num_iterations
            bar = f"[{'#' * int(20 * done_share):<20}] " if tty else ""
            r = row["episodic_return"]
            text = f"{bar}step {global_step:>9,}  return {r if r == '' else round(r)}  SPS {row['SPS']}  {wall:.0f} s"
            print(("\r" if tty else "") + text, end="" if tty and not last else "\n", flush=True)
        if global_step >= next_save:
            next_save = (global_step // args.save_every + 1) * args.save_every
            metrics_file.flush()
            save(iteration + 1)
        if stop:
            end = iteration + 1
            break
    metrics_file.close()
    save(end)
    writer.close()
    python = os.path.relpath(sys.executable)
    if end < num_iterations:
        print(
            f"{'interrupted and ' * len(stop)}saved; continue with: {python} ppo_baseline.py --resume {run}", flush=True
        )
        sys.exit(130 if stop else 0)
    if args.capture_video:
        from diffsim.play import record

        record(args.env, run / "policy.pt2", run / "video.mp4", args.physics)
    physics = "gymnasium" if on_gymnasium else args.physics
    print(f"done; watch it: {python} -m diffsim.play {run} --physics {physics} --video video.mp4", flush=True)
