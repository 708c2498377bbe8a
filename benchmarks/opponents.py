"""Train SAC or CrossQ, as SBX has them, on one of Gymnasium's tasks, and keep what tables and figures are made of.

    pip install sbx-rl            # 0.28 was used: Stable-Baselines3's algorithms in JAX
    python benchmarks/opponents.py --algorithm SAC --env HalfCheetah-v5 --seed 1 --minutes 10
    python benchmarks/opponents.py --algorithm CrossQ --env Ant-v5 --core 1 --results benchmarks

The deterministic policy is evaluated as our scripts evaluate theirs: 64 episodes on the task's batched twin. Minutes
count from the start of the process, imports and JAX's compilation in, these evaluations out (our scripts' minutes have
theirs in). Hyperparameters are the RL Zoo's for MuJoCo (github.com/DLR-RM/rl-baselines3-zoo, sac.yml and crossq.yml),
else the library's; but CrossQ's critics, 2,048 wide there, are 256 wide: wider ones are too slow for one core.
"""

import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import pandas as pd
import torch
import train  # ends Ctrl-C with one line, and finds diffsim

import diffsim
from diffsim.flags import Count, Few, Natural, Ratio, Seed, check_bounds, cli, fail, one_line_errors
from diffsim.play import evaluate
from diffsim.run_files import process_start

EPISODES = 64  # of an evaluation
CHUNK = 250  # steps between looks at the clock
TWINS = [name for name, task in diffsim.TASKS.items() if hasattr(task, "gymnasium_kwargs")]
ZOO = dict(SAC=dict(learning_starts=10_000), CrossQ=dict(learning_starts=5_000, learning_rate=1e-3, policy_delay=3))


@dataclass
class Args:
    algorithm: Literal["SAC", "CrossQ"] = "SAC"
    """of SBX"""
    env: str = "HalfCheetah-v5"
    """one of Gymnasium's tasks that diffsim has a twin of"""
    seed: Seed = 1
    """seed"""
    minutes: Ratio = 10.0
    """stop after so many minutes of training"""
    total_timesteps: Count = 1_000_000
    """stop after so many environment steps"""
    evaluations: Few = 20
    """evaluations, evenly over the minutes"""
    critic_width: Few = 256
    """units in each of the two hidden layers of a critic; the policy's have 256"""
    train_freq: Count = 1
    """environment steps between gradient steps"""
    tag: str = ""
    """name of the variant that other flags than the budget make"""
    core: Natural = 0
    """core that the run is bound to"""
    results: Path = train.FOLDERS
    """folder of runs.csv and curves.csv.gz; `benchmarks` holds those of the README"""
    again: bool = False
    """train again what --results has, and replace it"""


def named(args: Args) -> dict:
    """What identifies a run in runs.csv. Every run here has a tag, the algorithm's name."""
    own = "algorithm", "env", "seed", "tag", "core", "results", "again"
    changed = {k: x for k, x in vars(args).items() if k not in own and x != getattr(Args, k)}
    flags = " ".join(f"--{k.replace('_', '-')} {x}" for k, x in (dict(algorithm=args.algorithm) | changed).items())
    tag = args.algorithm.lower() + (args.tag and f"-{args.tag}")
    names = dict(run=f"{args.env}__opponents-{tag}__{args.seed}", env=args.env, script="opponents")
    return names | dict(algorithm=f"{args.algorithm} (SBX)", tag=tag, seed=args.seed, flags=flags)


def learn(model, evaluation, args: Args, start: float) -> pd.DataFrame:
    """Train until minutes or steps are spent: the curve, one row an evaluation. `evaluation` () is the mean return."""
    rows, due = [], 60 * args.minutes / args.evaluations
    while True:
        model.learn(min(CHUNK, args.total_timesteps - model.num_timesteps), reset_num_timesteps=False)
        spent = time.time() - start
        over = spent >= 60 * args.minutes or model.num_timesteps >= args.total_timesteps
        if over or spent >= due * (len(rows) + 1):
            training = np.mean([episode["r"] for episode in model.ep_info_buffer] or np.nan)
            row = dict(global_step=model.num_timesteps, wall_time_s=round(spent, 3), episodic_return=float(training))
            rows.append(row | dict(eval_return=evaluation()))
            print(" ".join(f"{key} {x:.0f}" for key, x in rows[-1].items()), flush=True)
            start = time.time() - spent  # evaluations do not count
        if over:
            return pd.DataFrame(rows).reindex(columns=train.CURVES)


def main(args: Args):
    start = process_start()
    with one_line_errors():
        check_bounds(args)
    if args.env not in TWINS:
        fail(f"--env is {args.env}; there is {', '.join(TWINS)}")
    job, known = named(args), train.read(args.results / "runs.csv").set_index("run")
    if job["run"] in known.index and not args.again:
        has = f"{args.results} has it with flags '{known['flags'][job['run']]}'"
        return print(f"{job['run']}: {has}; --again replaces it, --tag names another")
    try:
        os.sched_setaffinity(0, {args.core})  # before JAX makes its threads
    except (AttributeError, OSError):
        fail(f"--core {args.core}: this system cannot bind a run to that core")
    try:
        import sbx
    except ImportError as e:
        fail(f"SBX is not installed ({e}): pip install sbx-rl")
    torch.set_num_threads(1)

    env = gymnasium.make(args.env, **diffsim.TASKS[args.env].gymnasium_kwargs)
    twin = diffsim.make(args.env, EPISODES, compile=False)
    widths = dict(net_arch=dict(pi=[256, 256], qf=2 * [args.critic_width]))
    flags = ZOO[args.algorithm] | dict(train_freq=args.train_freq, policy_kwargs=widths)
    model = getattr(sbx, args.algorithm)("MlpPolicy", env, seed=args.seed, **flags)
    scale = torch.as_tensor(env.action_space.high)

    def policy(obs):
        """(B, obs_dim) -> (B, act_dim) in [-1, 1], the twin's bounds."""
        return torch.as_tensor(model.predict(obs.numpy(), deterministic=True)[0].copy()) / scale

    commit = train.commit()
    curve = learn(model, lambda: float(evaluate(twin, policy, EPISODES).mean()), args, start)
    last = curve.iloc[-1]
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "mujoco", "sbx-rl", "jax"))
    row = job | dict(
        physics="gymnasium", commit=commit, versions=versions, steps=int(last.global_step),
        minutes=round(last.wall_time_s / 60, 3), return_training=last.episodic_return, eval_return=last.eval_return,
        eval_episodes=EPISODES,
    )  # fmt: skip
    train.put(args.results / "runs.csv", pd.DataFrame([row | train.replay(policy, args.env)]), 7)
    train.put(args.results / "curves.csv.gz", curve.assign(run=job["run"])[["run", *train.CURVES]], 5)
    print(f"{job['run']}: return {last.eval_return:.0f}, {last.wall_time_s / 60:.1f} minutes")


if __name__ == "__main__":
    diffsim.program.start()
    main(cli(Args))
