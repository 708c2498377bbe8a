"""RPO: Reparameterization Proximal Policy Optimization (Zhong et al., ICML 2026, arXiv 2508.06214), in one file.

SHAC's window (see shac.py) yields, in one backward pass through the simulator, dR/du for the action of every sample.
That is kept, and used for several updates, as PPO uses its samples: the noise that makes the new policy output the
old action is regenerated, the sample is weighted by the importance ratio, left out where the ratio leaves the clip
range, and KL(old || new) holds the policy near.

Not to be confused with CleanRL's rpo_continuous_action.py, which is Robust Policy Optimization.

    python rpo_diffsim.py --env ant                          # trains in minutes on a laptop's CPU
    python rpo_diffsim.py --env ant --clip-coef 0.2          # PPO's symmetric clip
    python rpo_diffsim.py --env ant --physics mujoco         # MuJoCo's steps, diffsim's gradients
    python -m diffsim.play runs/ant__rpo_diffsim__1__<time>  # returns, and --video ant.mp4
"""

import copy
import csv
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

START = time.time()  # wall-clock counts from here, imports and compilation included

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import tyro  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

import diffsim  # noqa: E402
from diffsim.gymnasium_env import is_gymnasium_id  # noqa: E402
from diffsim.mujoco_physics import jacobian_cosine  # noqa: E402


@dataclass
class Args:
    env: str = "ant"
    """environment: see `python -m diffsim` for the list, or path/to/my_task.py:MyTask"""
    physics: Literal["diffsim", "mujoco"] = "diffsim"
    """engine that runs the task (Gymnasium's: mujoco); with mujoco the gradient is diffsim's at MuJoCo's states"""
    stiffness: float | None = None
    """stiffness of diffsim's contacts and joint limits, see diffsim.Softness; None: 2.4, and 0.6 with physics mujoco,
    where diffsim's contacts only shape the gradient"""
    smoothing: float | None = None
    """width of their smoothing, as a multiple of diffsim.Softness's; None: 1, and 3 with physics mujoco, where the
    gradient then sees a contact before it happens"""
    seed: int = 1
    """seed of the networks, the noise and the environments"""
    num_envs: int = 256
    """environments simulated side by side (the paper: 128 on Ant)"""
    horizon: int = 12
    """control steps of a window, through which gradients flow (the paper: 32)"""
    total_timesteps: int = 2_500_000
    """environment steps over all environments"""
    stagger: bool = True
    """begin the first episodes at random times, so that later ones do not all end in the same step"""
    update_epochs: int = 5
    """policy updates on a window's action-gradients; 1 makes it SHAC"""
    num_minibatches: int = 1
    """minibatches of such an epoch"""
    clip_low: float = 0.8
    """a sample whose importance ratio falls below 1 - clip_low gives no policy gradient"""
    clip_high: float = 1.0
    """nor one whose ratio rises above 1 + clip_high"""
    clip_coef: float | None = None
    """symmetric clip range; sets clip_low and clip_high when given (inf: no clipping)"""
    kl_coef: float = 0.25
    """weight of KL(old || new)"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus (the paper: 0.2 on Ant, 0.25 on Hopper)"""
    actor_learning_rate: float = 2e-3
    """initial learning rate of the policy; falls linearly to min_learning_rate (the paper: 5e-4)"""
    critic_learning_rate: float = 1e-3
    """initial learning rate of the critic; falls linearly to min_learning_rate"""
    min_learning_rate: float = 1e-5
    """learning rate at the end"""
    weight_decay: float = 0.0
    """AdamW's weight decay of policy and critic"""
    adam_beta1: float = 0.7
    """Adam's first moment decay"""
    adam_beta2: float = 0.95
    """Adam's second moment decay"""
    max_action_grad_norm: float = float("inf")
    """the return's gradient with respect to the action of a sample is scaled down to this norm: no sample outshouts
    the rest where contacts are stiff (the papers: inf)"""
    max_grad_norm: float = 1.0
    """gradients of policy and critic are scaled down to this norm"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the TD(lambda) targets"""
    target_alpha: float = 0.2
    """share of the target critic that is kept at each update"""
    num_critics: int = 2
    """critics whose mean is the value"""
    critic_epochs: int = 16
    """passes over the window to fit the critic"""
    critic_minibatches: int = 4
    """minibatches of such a pass"""
    actor_hidden: tuple[int, ...] = (128, 64, 32)
    """hidden layers of the policy"""
    critic_hidden: tuple[int, ...] = (64, 64)
    """hidden layers of the critic"""
    activation: Literal["elu", "silu"] = "elu"
    """activation function of policy and critic"""
    log_std_init: float = -1.0
    """initial log standard deviation of the policy's noise, before tanh"""
    state_dependent_std: bool = False
    """let the policy's noise depend on the observation"""
    device: str = "cpu"
    """cpu or cuda"""
    compile: bool = True
    """compile the physics (once for a task, num_envs and softness, a minute or two, then cached)"""
    num_threads: int = 1
    """threads of torch; the same number gives the same bits"""
    eval_every: int = 500_000
    """environment steps between evaluations of the deterministic policy; 0: only at the end"""
    eval_episodes: int = 64
    """episodes of an evaluation (at most num_envs on diffsim)"""
    eval_physics: bool = False
    """evaluate on the other engine too"""
    save_every: int = 250_000
    """environment steps between checkpoints"""
    stop_after: int | None = None
    """stop after this many iterations, and save: --resume goes on"""
    resume: str | None = None
    """run folder or checkpoint.pt to continue, with the arguments it was started with"""
    run_dir: str = "runs"
    """where the run folder is made"""
    capture_video: bool = False
    """record the final policy as video.mp4 in the run folder"""


# What differs from Args for a task; flags on the command line win. Networks and cartpole's learning rate are SHAC's
# paper's. Budgets are for a few minutes on a CPU (the paper: 16M steps on hopper, 4M on cheetah and humanoid). Humanoid
# falls within half a second at first: a longer window sees it, and its larger gradients want smaller steps.
DEFAULTS = {
    "cartpole": dict(total_timesteps=1_000_000, actor_hidden=(64, 64), actor_learning_rate=1e-2),
    "hopper": dict(total_timesteps=2_000_000),
    "cheetah": dict(total_timesteps=2_000_000),
    "walker": dict(total_timesteps=2_000_000),
    "anymal": dict(total_timesteps=3_000_000),
    "humanoid": dict(
        total_timesteps=2_000_000, horizon=16, actor_learning_rate=7e-4, actor_hidden=(256, 128),
        critic_hidden=(128, 128),
    ),
    # On MuJoCo's physics the gradient is noisier: smaller steps, and on the running tasks more environments, shorter
    # windows, a critic that knows more of what makes a fall. What hops or walks on two feet did better with longer
    # windows, a bound on what a sample counts, and diffsim's own softness (but Hopper-v5, which wants a heavier KL).
    "ant on mujoco": dict(
        total_timesteps=3_000_000, num_envs=512, horizon=8, actor_learning_rate=1e-3, critic_hidden=(128, 128),
        critic_epochs=8, critic_minibatches=8, gamma=0.995, eval_episodes=32,
    ),
    "cheetah on mujoco": dict(
        num_envs=512, horizon=8, actor_learning_rate=1e-3, critic_hidden=(128, 128), eval_episodes=32,
    ),
    "hopper on mujoco": dict(
        horizon=16, actor_learning_rate=1e-3, max_action_grad_norm=3.0, gamma=0.995, stiffness=2.4, smoothing=1.0,
        eval_episodes=32,
    ),
    "walker on mujoco": dict(
        horizon=16, actor_learning_rate=1e-3, max_action_grad_norm=3.0, gamma=0.995, stiffness=2.4, smoothing=1.0,
        eval_episodes=32,
    ),
    "humanoid on mujoco": dict(max_action_grad_norm=3.0),
    "Ant-v5": dict(
        physics="mujoco", total_timesteps=2_000_000, num_envs=512, horizon=4, actor_learning_rate=1e-3,
        critic_hidden=(128, 128), eval_episodes=10,
    ),
    "HalfCheetah-v5": dict(
        physics="mujoco", total_timesteps=1_000_000, horizon=4, actor_learning_rate=1e-3, eval_episodes=10,
    ),
    "Hopper-v5": dict(
        physics="mujoco", total_timesteps=2_000_000, horizon=8, kl_coef=1.0, actor_learning_rate=1e-3,
        max_action_grad_norm=3.0, gamma=0.995, eval_episodes=10,
    ),
    "Walker2d-v5": dict(
        physics="mujoco", total_timesteps=2_000_000, horizon=32, actor_learning_rate=1e-3, max_action_grad_norm=3.0,
        gamma=0.995, stiffness=2.4, smoothing=1.0, eval_episodes=10,
    ),
}  # fmt: skip


def fail(message: str):
    """One clear line for bad input."""
    print(f"rpo_diffsim.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def mlp(sizes: list[int], activation: str) -> nn.Sequential:
    """Linear - activation - LayerNorm; the last layer plain and small, so that actions and values start near zero."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(i, o), nn.ELU() if activation == "elu" else nn.SiLU(), nn.LayerNorm(o)]
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 2**0.5 if layer is not layers[-1] else 0.01)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """Gaussian over u, the action before tanh; ratio, KL and entropy are those of u (tanh cancels in the ratio)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim, *args.actor_hidden, act_dim]
        self.mean = mlp(sizes, args.activation)
        self.log_std = nn.Parameter(torch.full((act_dim,), args.log_std_init))
        self.log_std_net = mlp(sizes, args.activation) if args.state_dependent_std else None

    def forward(self, obs):
        """mean and log standard deviation, both (..., act_dim)"""
        mean, log_std = self.mean(obs), self.log_std
        if self.log_std_net is not None:
            log_std = (log_std + self.log_std_net(obs)).clamp(-5, 2)
        return mean, log_std.expand_as(mean)


class Critics(nn.Module):
    """One critic or several."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim, *args.critic_hidden, 1]
        self.members = nn.ModuleList(mlp(sizes, args.activation) for _ in range(args.num_critics))

    def forward(self, obs):
        """(num_critics, ...)"""
        return torch.stack([member(obs).squeeze(-1) for member in self.members])


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
        mean, var, n = obs.mean(0), obs.var(0, unbiased=False), obs.shape[0]
        delta, total = mean - self.mean, self.count + n
        self.var.copy_((self.var * self.count + var * n + delta**2 * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)


class DeterministicPolicy(nn.Module):
    """What is saved as policy.pt2: observation -> action, its normaliser inside."""

    def __init__(self, normalizer, actor):
        super().__init__()
        self.normalizer, self.mean = normalizer, actor.mean

    def forward(self, obs):
        return torch.tanh(self.mean(self.normalizer(obs)))


def log_prob(mean, log_std, u):
    """Log density of u under the Gaussian, summed over action dimensions."""
    return (-0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)


def gaussian_kl(mean, log_std, new_mean, new_log_std):
    """KL(old || new) of diagonal Gaussians, summed over action dimensions."""
    ratio = (2 * (log_std - new_log_std)).exp()
    distance = ((mean - new_mean) / new_log_std.exp()) ** 2
    return 0.5 * (ratio + distance - 1 - 2 * (log_std - new_log_std)).sum(-1)


def rpo_surrogate(mean, log_std, u, old_log_prob, action_gradient, clip_low: float, clip_high: float):
    """The clipped reparameterization surrogate of each sample (...,), and its importance ratio.

    The noise that makes the new policy output the old u is regenerated, so the sampled action is the same number with
    the new policy's gradient. A sample out of range contributes nothing, whatever the sign of its gradient.
    """
    std = log_std.exp()
    noise = ((u - mean) / std).detach()
    regenerated = mean + std * noise  # equals u
    ratio = (log_prob(mean, log_std, u) - old_log_prob).exp().detach()
    inside = (ratio >= 1 - clip_low) & (ratio <= 1 + clip_high)
    return torch.where(inside, ratio * (action_gradient * regenerated).sum(-1), 0.0), ratio


def td_lambda(rewards, next_values, terminated, truncated, gamma: float, lam: float):
    """TD(lambda) targets of a window (eq. 7), all (horizon, N): next_values[t] is V(final_obs[t]).

    A terminated state is worth nothing; a truncated episode bootstraps, and the sum does not cross into the next.
    """
    targets = torch.empty_like(rewards)
    after = next_values[-1]
    for t in reversed(range(len(rewards))):
        last = (terminated[t] | truncated[t]).float() if t < len(rewards) - 1 else torch.ones_like(rewards[t])
        follow = last * next_values[t] + (1 - last) * ((1 - lam) * next_values[t] + lam * after)
        after = targets[t] = rewards[t] + gamma * (1 - terminated[t].float()) * follow
    return targets


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
    positive = ("num_envs", "horizon", "total_timesteps", "critic_epochs", "critic_minibatches", "num_threads")
    positive += ("update_epochs", "num_minibatches", "num_critics")
    for name in (*positive, "eval_episodes", "save_every"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name in ("stiffness", "smoothing", "actor_learning_rate", "critic_learning_rate"):
        if not 0 < getattr(args, name) < float("inf"):
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0, and finite")
    for name in ("max_grad_norm", "max_action_grad_norm"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    for name in ("actor_hidden", "critic_hidden"):
        if min(getattr(args, name), default=1) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; a layer is at least 1 wide")
    for name in ("gamma", "gae_lambda", "target_alpha"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be between 0 and 1")
    for name in ("clip_low", "clip_high", "clip_coef", "kl_coef", "entropy_coef"):
        if getattr(args, name) is not None and not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must not be negative")
    for name in ("num_minibatches", "critic_minibatches"):
        if args.horizon * args.num_envs < getattr(args, name):
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}, more than the samples of a window")


if __name__ == "__main__":
    args = tyro.cli(
        Args, args=[a for a in sys.argv[1:] if a not in ("-h", "--help")]
    )  # --help shows the task's defaults
    defaults = DEFAULTS.get(args.env, {}) | DEFAULTS.get(f"{args.env} on {args.physics}", {})
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
            fail(f"--resume {path}: not a checkpoint of rpo_diffsim.py")
        args = tyro.cli(Args, default=started_with)
        if args.env != started_with.env:
            fail(f"--resume {path}: a checkpoint of {started_with.env}, not of {args.env}")
        for name, value in asdict(args).items():
            if name not in ("resume", "stop_after") and value != getattr(started_with, name):
                flag = name.replace("_", "-")
                fail(f"--{flag} is {value}, the run has {getattr(started_with, name)}: resuming keeps its arguments")
    if args.stiffness is None:
        args.stiffness = 0.6 if args.physics == "mujoco" else diffsim.Softness.stiffness
    if args.smoothing is None:
        args.smoothing = 3.0 if args.physics == "mujoco" else 1.0
    check(args)
    if args.clip_coef is not None:
        args.clip_low = args.clip_high = args.clip_coef

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    other_physics = "mujoco" if args.physics == "diffsim" else "diffsim"
    num_eval = args.num_envs if args.physics == "diffsim" else args.eval_episodes  # diffsim's is compiled for num_envs
    softness = diffsim.Softness(stiffness=args.stiffness)
    for name in ("contact_width", "limit_width"):
        softness = replace(softness, **{name: getattr(softness, name) * args.smoothing})
    make = partial(diffsim.make, args.env, device=args.device, compile=args.compile, softness=softness)
    try:
        env = make(args.num_envs, seed=args.seed, physics=args.physics)
        eval_env = make(num_eval, physics=args.physics)
        other = dict(physics=other_physics, compile=False, softness=None)  # judged on diffsim's own contacts
        other_env = make(args.eval_episodes, **other) if args.eval_physics else None
    except ValueError as e:
        fail(str(e))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted before the first step: nothing to save")
    obs_dim, act_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    batch_size = args.num_envs * args.horizon
    num_iterations = max(1, args.total_timesteps // batch_size)

    actor = Actor(obs_dim, act_dim, args).to(env.device)
    critic = Critics(obs_dim, args).to(env.device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    normalizer = Normalizer(obs_dim).to(env.device)
    policy = DeterministicPolicy(normalizer, actor)
    betas = (args.adam_beta1, args.adam_beta2)
    adam = partial(torch.optim.AdamW, betas=betas, weight_decay=args.weight_decay, fused=True)
    actor_optimizer = adam(actor.parameters(), args.actor_learning_rate)
    critic_optimizer = adam(critic.parameters(), args.critic_learning_rate)

    modules = dict(actor=actor, critic=critic, target_critic=target_critic, normalizer=normalizer)
    modules |= dict(actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    global_step = first_iteration = 0
    elapsed_before = 0.0
    recent: list[list[float]] = []  # return and length of the latest episodes
    env.reset()
    if checkpoint is None:
        if args.stagger:
            env.episode_length.random_(0, env.max_episode_steps)
        run_name = f"{args.env.split(':')[-1].lower()}__rpo_diffsim__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        run = Path(args.run_dir) / run_name
        run.mkdir(parents=True, exist_ok=True)
    else:
        run = path.parent
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        env.set_state(checkpoint["env_state"])
        torch.set_rng_state(checkpoint["rng"])
        global_step, first_iteration = checkpoint["global_step"], checkpoint["iteration"]
        elapsed_before, recent = checkpoint["wall_time_s"], checkpoint["recent"]

    writer = SummaryWriter(str(run), purge_step=global_step if checkpoint else None)
    table = "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    left = num_iterations - first_iteration
    print(f"{run}: {args.env}, {args.num_envs} envs x {args.horizon} steps, {left} iterations to go", flush=True)
    if args.physics == "mujoco":
        print(f"gradient through contacts of stiffness {args.stiffness:g}, smoothing {args.smoothing:g}", flush=True)
    if defaults and checkpoint is None:
        print("for this task:", *(f"{k}={v}" for k, v in defaults.items() if getattr(args, k) == v), flush=True)
    fields = (
        "iteration,global_step,wall_time_s,SPS,episodic_return,episodic_length,eval_return,eval_return_std,other_return,"
        "policy_loss,value_loss,grad_norm_before_clip,grad_norm_after_clip,nonfinite_grads,nonfinite_states,"
        "entropy,learning_rate,approx_kl,inside_clip,max_ratio,std,action_grad_norm,simulate_s,policy_s,critic_s,"
        "mismatch_joint,mismatch_base,jacobian_cosine"
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
        state |= dict(args=asdict(args), env_state=env.get_state(), rng=torch.get_rng_state(), recent=recent)
        state |= dict(global_step=global_step, iteration=iteration, wall_time_s=elapsed_before + time.time() - START)
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
        frac = 1 - iteration / num_iterations
        for optimizer, initial in (
            (actor_optimizer, args.actor_learning_rate),
            (critic_optimizer, args.critic_learning_rate),
        ):
            optimizer.param_groups[0]["lr"] = args.min_learning_rate + frac * (initial - args.min_learning_rate)

        # --- rollout: one window with its graph, in which the policy's parameters are constants --------------
        tick = time.perf_counter()
        obs = env.detach()
        actor.requires_grad_(False)
        loss = torch.zeros((), device=env.device)
        discount = torch.ones(args.num_envs, device=env.device)
        storage: dict[str, list] = {k: [] for k in ("obs", "u", "final_obs", "reward", "terminated", "truncated")}
        nonfinite_states = 0
        for t in range(args.horizon):
            mean, log_std = actor(normalizer(obs))
            u = mean + log_std.exp() * torch.randn(args.num_envs, act_dim, device=env.device)
            u = u if u.requires_grad else u.requires_grad_()  # the first one has no past
            storage["obs"].append(obs.detach())
            storage["u"].append(u)
            obs, reward, terminated, truncated, info = env.step(torch.tanh(u))
            final_obs = info["final_obs"]
            loss = loss - (discount * reward).sum()
            discount = discount * args.gamma
            done = terminated | truncated
            any_done = bool(done.any())
            if any_done or t == args.horizon - 1:  # an episode, or the window, ends: add its value (SHAC, eq. 5)
                ends = done if t < args.horizon - 1 else torch.ones_like(done)
                bootstrap = ends & ~terminated
                value = target_critic(normalizer(final_obs)).mean(0)
                loss = loss - torch.where(bootstrap, discount * value, 0.0).sum()
                discount = torch.where(done, 1.0, discount)
            if any_done:
                r, l = info["episode"]["r"][done], info["episode"]["l"][done]
                recent = (recent + torch.stack([r, l.float()], 1).tolist())[-100:]
                nonfinite_states += int(info["nonfinite"].sum())
            for key, x in zip(("final_obs", "reward"), (final_obs.detach(), reward.detach())):
                storage[key].append(x)
            storage["terminated"].append(terminated)
            storage["truncated"].append(truncated)

        # --- one backward pass through physics: dR/du of every sample ---------------------------------------
        action_gradient = -torch.stack(torch.autograd.grad(loss, storage["u"]))  # of the sum over samples
        nonfinite_grads = int((~torch.isfinite(action_gradient)).any(-1).sum())
        if nonfinite_grads:
            print(
                f"iteration {iteration}: {nonfinite_grads} samples with non-finite gradients left out", file=sys.stderr
            )
            action_gradient = torch.where(torch.isfinite(action_gradient).all(-1, True), action_gradient, 0.0)
        norm = action_gradient.norm(dim=-1, keepdim=True)
        action_gradient = action_gradient * (args.max_action_grad_norm / norm.clamp_min(1e-30)).clamp(max=1.0)
        window = {k: torch.stack(v).detach() for k, v in storage.items()}
        inputs, u, g = (x.flatten(0, 1) for x in (normalizer(window["obs"]), window["u"], action_gradient))
        simulate_s = time.perf_counter() - tick

        # --- policy: epochs on the cached gradients ---------------------------------------------------------
        tick = time.perf_counter()
        actor.requires_grad_(True)
        with torch.no_grad():
            old_mean, old_log_std = actor(inputs)
            old_log_prob = log_prob(old_mean, old_log_std, u)
        whole = torch.arange(batch_size, device=env.device)
        for _ in range(args.update_epochs):
            shuffled = torch.randperm(batch_size, device=env.device) if args.num_minibatches > 1 else whole
            for index in shuffled.chunk(args.num_minibatches):
                mean, log_std = actor(inputs[index])
                surrogate, ratio = rpo_surrogate(
                    mean, log_std, u[index], old_log_prob[index], g[index], args.clip_low, args.clip_high
                )
                kl = gaussian_kl(old_mean[index], old_log_std[index], mean, log_std).mean()
                entropy = (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum(-1).mean()
                policy_loss = -surrogate.mean() + args.kl_coef * kl - args.entropy_coef * entropy
                actor_optimizer.zero_grad()
                policy_loss.backward()
                norm_before = float(nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm))
                actor_optimizer.step()
        norm_after = min(norm_before, args.max_grad_norm)
        inside = ((ratio >= 1 - args.clip_low) & (ratio <= 1 + args.clip_high)).float().mean()
        policy_s = time.perf_counter() - tick

        # --- critic: TD(lambda) regression ----------------------------------------------------------------
        tick = time.perf_counter()
        with torch.no_grad():
            next_values = target_critic(normalizer(window["final_obs"])).mean(0)
            targets = td_lambda(
                window["reward"], next_values, window["terminated"], window["truncated"], args.gamma, args.gae_lambda
            ).flatten()
        value_loss = 0.0
        for _ in range(args.critic_epochs):
            for index in torch.randperm(batch_size, device=env.device).chunk(args.critic_minibatches):
                error = ((critic(inputs[index]) - targets[index]) ** 2).mean(1).sum()
                critic_optimizer.zero_grad()
                error.backward()
                nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
                critic_optimizer.step()
                value_loss += float(error.detach()) / (args.critic_epochs * args.critic_minibatches * args.num_critics)
        with torch.no_grad():
            for p, q in zip(target_critic.parameters(), critic.parameters()):
                p.lerp_(q, 1 - args.target_alpha)
        critic_s = time.perf_counter() - tick
        normalizer.update(window["obs"].flatten(0, 1))

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
            if args.physics == "mujoco":  # how good can the gradient be?
                row["jacobian_cosine"] = jacobian_cosine(env)
                writer.add_scalar("grad/jacobian_cosine", row["jacobian_cosine"], global_step)
            on_other = f", on {other_physics} {row['other_return']:.0f}" if other_env is not None else ""
            print(f"\rstep {global_step:>9,}  evaluation {row['eval_return']:.0f}{on_other}", flush=True)
        wall = elapsed_before + time.time() - START
        row |= dict(
            iteration=iteration, global_step=global_step, wall_time_s=round(wall, 3), SPS=int(global_step / wall),
            policy_loss=float(loss.detach()) / batch_size, value_loss=value_loss, grad_norm_before_clip=norm_before,
            grad_norm_after_clip=norm_after, nonfinite_grads=nonfinite_grads, nonfinite_states=nonfinite_states,
            entropy=float(entropy.detach()), approx_kl=float(kl.detach()),
            learning_rate=actor_optimizer.param_groups[0]["lr"],
            inside_clip=float(inside), max_ratio=float(ratio.max()), std=float(log_std.detach().exp().mean()),
            action_grad_norm=float(norm.mean()), simulate_s=round(simulate_s, 4),
            policy_s=round(policy_s, 4), critic_s=round(critic_s, 4),
        )  # fmt: skip
        if args.physics == "mujoco":  # of the window's last step
            mismatch = env.physics.mismatch
            row["mismatch_joint"], row["mismatch_base"] = mismatch.joint_angle(), mismatch.base_velocity()
        if recent:
            row["episodic_return"], row["episodic_length"] = (float(x) for x in np.mean(recent, 0))
        metrics.writerow(row)
        for key, tag in dict(
            episodic_return="charts/episodic_return", episodic_length="charts/episodic_length", SPS="charts/SPS",
            learning_rate="charts/learning_rate", value_loss="losses/value_loss", policy_loss="losses/policy_loss",
            entropy="losses/entropy", grad_norm_before_clip="grad/norm_before_clip",
            grad_norm_after_clip="grad/norm_after_clip", nonfinite_grads="grad/nonfinite",
            mismatch_joint="physics/mismatch_joint", mismatch_base="physics/mismatch_base",
            approx_kl="losses/approx_kl", inside_clip="policy/inside_clip", max_ratio="policy/max_ratio",
            std="policy/std", action_grad_norm="grad/action_grad_norm",
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
            f"{'interrupted and ' * len(stop)}saved; continue with: {python} rpo_diffsim.py --resume {run}", flush=True
        )
        sys.exit(130 if stop else 0)
    if args.capture_video:
        from diffsim.play import record

        record(args.env, run / "policy.pt2", run / "video.mp4", args.physics)
    physics = "gymnasium" if is_gymnasium_id(args.env) else args.physics
    print(f"done; watch it: {python} -m diffsim.play {run} --physics {physics} --video video.mp4", flush=True)
