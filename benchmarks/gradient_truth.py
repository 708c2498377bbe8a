"""Is it the gradient? RPO's action-gradients beside central differences, on the policy and states of its checkpoints.

    python rpo_diffsim.py --env Hopper-v5 --seed 101 --total-timesteps 1000000 --stop-after 98
    python benchmarks/gradient_truth.py runs/Hopper-v5__rpo_diffsim__101__*       # rows to runs/benchmarks/truth.csv
    python benchmarks/gradient_truth.py runs/Hopper* --results benchmarks         # into what the tables are made of

The quantity: how a window's return changes with a constant added to the policy's mean,

    d/dc E[ sum_t gamma^t r_t + gamma^H V(s_H) ]  at c = 0,   u_t = mean(s_t) + c + std noise_t  in every step t,

one number a dimension of the action. Later actions react to the changed state, as they do in the graph of
g_t = dR/du_t; so dR/dc is the sum of g_t over the window. Where an episode ends in the window, its return is that of
td_lambda with lam = 1 (0 after a fall, V after a time limit), and the sums end there too.

- truth: (R(c = delta) - R(c = -delta)) / 2 delta, by running the engine from the same states with the same noise. A
  window counts as moved if its episode ends in another step, or in another way, for -delta, 0 and delta: that part of
  the truth is jumps, which no derivative of a trajectory has. "still" is the truth with 0 for these windows.
- lambda L: the sum of the g_t that rpo_diffsim.py caches with that --action-gradient-lambda; 0: each step's own
  derivative of r + gamma V. Bounded: each g_t scaled down to the norm BOUND. One that is not finite counts as 0.
- score: sum_t gamma^t A_t dlog pi(u_t)/dmean, A the TD(lambda) target less V (which is GAE), less its mean. Score 1:
  the same with lambda 1, which is unbiased, ends included: a second opinion on the truth.

Windows of one environment follow each other, so errors are those of a mean over environments, and the bootstrap draws
environments. Columns of truth.csv: deviation of a window and error of the mean are roots of the covariance's trace;
cosine is between the means over all windows, cosine_still that to "still", cosine_batch the mean cosine of one
iteration's windows to the truth; bias is the distance to the truth by the truth's norm, both less what noise adds.
"""

import signal
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

__name__ == "__main__" and signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import pandas as pd
import torch
import tyro
from torch.nn.functional import cosine_similarity
from train import FOLDERS, commit, put  # beside this file; it puts ROOT on the path

import diffsim
import rpo_diffsim as rpo
from diffsim.flags import Few, Rate, RunArgs, check_bounds, cli, fail, load, of_checkpoint, one_line_errors
from diffsim.tasks import is_file

LAMBDAS, BOUND, RESAMPLES = (0.0, 0.5, 0.7, 0.9, 1.0), 3.0, 1000


@dataclass
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders of rpo_diffsim.py, or checkpoints of it"""
    draws: Few = 16
    """windows of each environment, one after the other"""
    delta: Rate = 0.05
    """half the distance of the two actions, before tanh"""
    dtype: Literal["float32", "float64"] = "float32"
    """precision of networks and physics"""
    compile: bool = True
    """compile the physics, as the run did"""
    env: str | None = None
    """the task, where it is a class in a file: its code runs"""
    results: Path = FOLDERS
    """folder of truth.csv; `benchmarks` holds that of the READMEs"""


class Lab:
    """Policy, target critics, normaliser and environments of a checkpoint."""

    def __init__(self, run: str, dtype: str = "float32", compile: bool = True, env: str | None = None):
        checkpoint = load(run, "run", by="rpo_diffsim")
        self.args = args = of_checkpoint(rpo.Args, "run", run, by="rpo_diffsim")
        if is_file(args.env) and not (env and is_file(env)):
            fail(f"run {run}: on code in a file; if you trust that file: --env {quote(args.env)}")
        if args.num_envs < 8:
            fail(f"run {run}: {args.num_envs} environments, too few to tell a standard error; it takes 8")
        with one_line_errors():
            self.env = diffsim.make(
                env if is_file(args.env) else args.env, args.num_envs, physics=args.physics, derivative=args.derivative,
                stiffness=args.stiffness, smoothing=args.smoothing, compile=compile, dtype=getattr(torch, dtype),
            )  # fmt: skip
            self.env.load_state_dict(checkpoint["env"])
        obs_dim, act_dim = self.env.single_observation_space.shape[0], self.env.single_action_space.shape[0]
        self.actor, self.critic = rpo.Actor(obs_dim, act_dim, args), rpo.Critics(obs_dim, args)
        self.normalizer = rpo.Normalizer(obs_dim)
        self.discount = args.gamma ** torch.arange(args.horizon, dtype=self.env.dtype)[:, None]  # (H, 1)
        for name, part in dict(actor=self.actor, target_critic=self.critic, normalizer=self.normalizer).items():
            part.load_state_dict(checkpoint[name])
            part.to(self.env.dtype)
        self.iteration, self.global_step = checkpoint["iteration"], checkpoint["global_step"]

    def rollout(self, noise, shift=0.0, cut: bool = False) -> dict:
        """A window from where the environments are: noise (H, N, act_dim), shift (act_dim,) -> tensors (H, N, ...).

        "first" marks the steps of the episodes that the window begins in, "end" (N,) tells when and how they end. With
        `cut` the graph of each step begins in that step.
        """
        obs, window = self.env.detach(), defaultdict(list)
        for eps in noise:
            policy = self.actor(self.normalizer(obs))
            u = policy.mean + policy.stddev * eps + shift
            next_obs, reward, terminated, truncated, info = self.env.step(torch.tanh(u))
            step = dict(obs=obs, std=policy.stddev, u=u, reward=reward, terminated=terminated, truncated=truncated)
            for key, x in (step | dict(final_obs=info["final_obs"])).items():
                window[key].append(x)
            obs = self.env.detach() if cut else next_obs
        us, window = window["u"], {key: torch.stack(x) for key, x in window.items()}
        window["next_values"] = self.critic(self.normalizer(window["final_obs"])).mean(0)
        ended = (window["terminated"] | window["truncated"]).long()
        window["first"] = first = ended.cumsum(0) == ended
        fell = (window["terminated"] & first).any(0)
        return window | dict(us=us, end=2 * first.sum(0) + fell, fell=fell, ended=ended.any(0))

    def returns(self, window: dict, lam: float):
        """TD(lam) returns (H, N)."""
        keys = "reward", "next_values", "terminated", "truncated"
        return rpo.td_lambda(*(window[key] for key in keys), self.args.gamma, lam)

    def action_gradients(self, noise, lam: float) -> tuple[dict, torch.Tensor]:
        """The window, and g (H, N, act_dim) as rpo_diffsim.py caches it before it scales it."""
        window = self.rollout(noise, cut=lam == 0)
        returns, ends = self.returns(window, lam), (window["terminated"], window["truncated"])
        if lam == 0:  # the limit; there the weights lam^t, by which the graph's gradients are divided, are 0
            g = torch.stack(torch.autograd.grad((self.discount * returns).sum(), window["us"]))
        else:
            g = rpo.action_gradients(returns, window["us"], *ends, lam).view_as(noise)
        return window, torch.where(torch.isfinite(g).all(-1, keepdim=True), g, 0.0)

    def draw(self, delta: float) -> tuple[dict, dict]:
        """Estimates of dR/dc by name, (N, act_dim), and what happened, (N,) or (N, act_dim). Moves on by a window."""
        env, start, estimates = self.env, self.env.get_state(), {}
        noise = torch.randn(self.args.horizon, *env.action_space.shape, dtype=env.dtype)
        for lam in LAMBDAS:
            env.set_state(start)
            window, g = self.action_gradients(noise, lam)
            bounded = g * (BOUND / g.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp(max=1.0)
            for name, x in ((f"lambda {lam:g}", g), (f"lambda {lam:g} bounded", bounded)):
                estimates[name] = (x * window["first"][..., None]).sum(0)
        after = env.get_state()
        with torch.no_grad():
            for name, lam in (("score", self.args.gae_lambda), ("score 1", 1.0)):
                advantage = self.returns(window, lam) - self.critic(self.normalizer(window["obs"])).mean(0)
                weight = self.discount * (advantage - advantage.mean()) * window["first"]
                estimates[name] = (weight[..., None] * noise / window["std"]).sum(0)
            truth, moved = [], []
            for shift in delta * torch.eye(noise.shape[-1], dtype=noise.dtype):
                returns, ends = [], [window["end"]]
                for sign in (1, -1):
                    env.set_state(start)
                    shifted = self.rollout(noise, sign * shift)
                    returns.append(self.returns(shifted, 1.0)[0])
                    ends.append(shifted["end"])
                truth.append((returns[0] - returns[1]) / (2 * delta))
                moved.append((ends[0] != ends[1]) | (ends[0] != ends[2]))
        env.set_state(after)
        truth, moved = torch.stack(truth, -1), torch.stack(moved, -1)
        estimates = dict(truth=truth, still=torch.where(moved, 0.0, truth)) | estimates
        return estimates, dict(ended=window["ended"], fell=window["fell"], moved=moved)

    def command(self) -> str:
        """What trained this checkpoint: the flags that are not the task's settings."""
        args, settings = self.args, {}
        name = diffsim.settings_of(args.env) if not is_file(args.env) else args.env
        for key in (f"on {args.physics}", name, f"{name} on {args.physics}"):
            settings |= rpo.DEFAULTS.get(key, {})
        usual = replace(rpo.Args(env=args.env, physics=args.physics, seed=args.seed), **settings)
        flags = [f"--env {quote(args.env)} --physics {args.physics} --seed {args.seed}"]
        for name in (f.name for f in fields(args) if f.name not in {f.name for f in fields(RunArgs)}):
            value, flag = getattr(args, name), name.replace("_", "-")
            words = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
            if value != getattr(usual, name):
                flags.append(f"--{'no-' * (value is False)}{flag}" + "".join(f" {x}" for x in words))
        return f"rpo_diffsim.py {' '.join(flags)} --stop-after {self.iteration}"


def summary(draws: dict[str, torch.Tensor]) -> list[dict]:
    """A row for each estimator: draws (draws, N, act_dim) by name, "truth" and "still" among them."""
    by_env = {name: x.double().mean(0) for name, x in draws.items()}  # (N, act_dim)
    truth, num_envs = by_env["truth"], len(by_env["truth"])
    means = {name: x.mean(0) for name, x in by_env.items()}
    chosen = torch.randint(num_envs, (RESAMPLES, num_envs))
    weights = torch.zeros(RESAMPLES, num_envs).double().scatter_add_(1, chosen, torch.ones_like(chosen).double())
    resampled = {name: weights @ x / num_envs for name, x in by_env.items()}  # (RESAMPLES, act_dim)

    def less_noise(x):  # the norm of the mean of x (N, act_dim), less what noise adds to its square
        return max(0.0, float(x.mean(0).square().sum() - x.var(0).sum() / num_envs)) ** 0.5

    def moved_share(truth, still):  # of the truth's norm; the part of `still` along the truth is the rest
        return 1 - (truth * still).sum(-1) / truth.square().sum(-1)

    shares = moved_share(resampled["truth"], resampled["still"])
    common = dict(
        truth_norm=less_noise(truth), truth_error=float(truth.var(0).sum() / num_envs) ** 0.5,
        by_moved=float(moved_share(means["truth"], means["still"])), by_moved_error=float(shares.std()),
    )  # fmt: skip
    rows = []
    for name, x in by_env.items():
        batches = cosine_similarity(draws[name].double().mean(1), means["truth"][None])
        rows.append(common | dict(
            estimator=name, mean=" ".join(f"{m:.4g}" for m in means[name].tolist()),
            deviation=float(draws[name].double().flatten(0, 1).var(0).sum()) ** 0.5,
            error=float(x.var(0).sum() / num_envs) ** 0.5,
            cosine=float(cosine_similarity(means[name], means["truth"], 0)),
            cosine_error=float(cosine_similarity(resampled[name], resampled["truth"]).std()),
            cosine_still=float(cosine_similarity(means[name], means["still"], 0)),
            cosine_batch=float(batches.mean()),
            bias=less_noise(x - truth) / common["truth_norm"] if common["truth_norm"] else float("nan"),
        ))  # fmt: skip
    return rows


def main(args: Args):
    torch.set_num_threads(1)
    if not args.runs:
        fail("name run folders of rpo_diffsim.py")
    for run in args.runs:
        torch.manual_seed(0)
        lab = Lab(run, args.dtype, args.compile, args.env)
        pairs = [lab.draw(args.delta) for _ in range(args.draws)]
        estimates, happened = ({k: torch.stack([p[i][k] for p in pairs]) for k in pairs[0][i]} for i in (0, 1))
        a = lab.args
        about = dict(
            run=lab.command(), env=a.env, physics=a.physics, seed=a.seed, global_step=lab.global_step,
            progress=lab.global_step / a.total_timesteps, commit=commit(),
            versions=" ".join(f"{name} {version(name)}" for name in ("torch", "mujoco")),
            horizon=a.horizon, delta=args.delta, dtype=args.dtype, windows=args.draws * a.num_envs,
        ) | {k: float(x.double().mean()) for k, x in happened.items()}  # fmt: skip
        rows = [about | row for row in summary(estimates)]
        put(args.results / "truth.csv", pd.DataFrame(rows), 5)
        print(f"{about['run']}: {len(rows)} rows in {args.results / 'truth.csv'}", flush=True)


if __name__ == "__main__":
    diffsim.program.start()
    args = cli(Args)
    with one_line_errors():
        check_bounds(args)
    main(args)
