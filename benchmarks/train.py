"""Train scripts on tasks with several seeds, as a user starts them, and keep what tables and figures are made of.

    python benchmarks/train.py --envs ant --scripts shac rpo_diffsim --seeds 1 2 3
    python benchmarks/train.py --envs ant --scripts rpo_diffsim --tag no-kl --flags="--kl-coef 0"
    python benchmarks/train.py --all --results benchmarks --since v1.0           # all that is older than v1.0

A run <env>__<script>[-<tag>]__<seed> is a row of runs.csv and at most 200 of curves.csv.gz in the folder --results. Its
final policy is played there too: 10 episodes on each engine that has the task, 64 on MuJoCo to count falls. Runs that
the folder has are left out, so the same command goes on where it was stopped.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path

__name__ == "__main__" and signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import numpy as np
import pandas as pd
import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import diffsim
from diffsim.play import load_policy, playback_env, rollout
from diffsim.run_files import write_whole

FOLDERS = ROOT / "runs" / "benchmarks"
ALGORITHMS = {"rpo_diffsim": "RPO", "shac": "SHAC", "ppo_baseline": "PPO", "rp_pgm_mb": "RP-PGM"}
CURVES = ["global_step", "wall_time_s", "episodic_return", "eval_return", "norm_before_clip", "kl"]
EPISODES, MANY, POINTS = 10, 64, 200  # points of a curve
KEYS = "envs", "scripts", "seeds", "tag", "flags"
SAPO = "--entropy-coef 1 --learn-entropy-coef --state-dependent-std --num-critics 2 --no-target-critic "
SAPO += "--activation silu --weight-decay 0.01 --max-grad-norm 0.5"  # as in the first lines of shac.py
IDS, ON_MUJOCO = "HalfCheetah-v5 Walker2d-v5 Hopper-v5 Ant-v5 Humanoid-v5", "--physics mujoco"
PPO_ON_MUJOCO, SHORT = f"{ON_MUJOCO} --log-std-init -1 --total-timesteps 4000000", "--total-timesteps 1000000"
CHANGES = "clip-coef 0.2", "clip-coef inf", "kl-coef 0", "update-epochs 1"  # parts of RPO
PLAN = [  # what --all runs, in this order: tasks, scripts, number of seeds, tag, flags
    (IDS, "rpo_diffsim", 5, "", ""),
    ("hopper walker ant", "rpo_diffsim", 5, "mujoco", ON_MUJOCO),
    ("anymal cheetah humanoid cartpole", "rpo_diffsim", 3, "mujoco", ON_MUJOCO),
    (IDS, "ppo_baseline", 3, "", ""),
    ("hopper walker ant anymal cheetah humanoid cartpole", "shac", 3, "mujoco", ON_MUJOCO),
    ("hopper walker ant anymal cheetah humanoid cartpole", "ppo_baseline", 3, "mujoco", PPO_ON_MUJOCO),
    ("ant anymal humanoid hopper", "rpo_diffsim shac ppo_baseline", 5, "", ""),
    ("ant anymal humanoid hopper", "shac", 5, "sapo", SAPO),
    ("walker cheetah cartpole hand", "rpo_diffsim shac ppo_baseline", 3, "", ""),
    ("walker cheetah cartpole hand", "shac", 3, "sapo", SAPO),
    *(("ant walker", "rpo_diffsim", 5, f"1M-{x.replace(' ', '-')}", f"{SHORT} --{x}") for x in CHANGES),
    ("ant walker cheetah", "rpo_diffsim shac", 5, "1M", SHORT),
    ("anymal", "rpo_diffsim shac", 5, "1.5M", "--total-timesteps 1500000"),
    ("Hopper-v5 HalfCheetah-v5 Walker2d-v5 Ant-v5", "rp_pgm_mb", 5, "", ""),
]


@dataclass
class Args:
    envs: tuple[str, ...] = ("ant",)
    """tasks"""
    scripts: tuple[str, ...] = ("shac",)
    """scripts, without .py"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds"""
    flags: str = ""
    """more flags for the script, one string"""
    tag: str = ""
    """name of the variant those flags make"""
    results: Path = FOLDERS
    """folder of runs.csv and curves.csv.gz; `benchmarks` holds those of the READMEs"""
    again: bool = False
    """train again what --results has, and replace it"""
    since: str = ""
    """train again what was trained by a commit that is neither this one nor comes after it"""
    all: bool = False
    """the runs of PLAN in train.py, instead of those of envs, scripts, seeds, flags and tag"""
    dry_run: bool = False
    """only say which runs these would be, and how long they would take"""
    part: tuple[int, int] = (1, 1)
    """i n: the i-th of n parts of the runs, for n of these programs side by side, each with --results of its own"""


# --- one run ------------------------------------------------------------------------------------------------------
def commit() -> str:
    """What is checked out; +dirty if files differ from it. Results that come in do not count."""
    asked = ["git rev-parse --short HEAD", "git status --porcelain -- . :!benchmarks"]
    head, changes = (subprocess.run(x.split(), cwd=ROOT, capture_output=True, text=True).stdout.strip() for x in asked)
    return head + "+dirty" * bool(changes)


def start(job: dict, folder, *more: str, processes: int = 1, **how):
    """A script in a process of its own, or several, as a user starts it, with one thread."""
    flags = ["--env", job["env"], "--seed", str(job["seed"]), "--run-dir", str(folder), *job["flags"].split(), *more]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), f"{job['script']}.py", *flags]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def train(job: dict) -> Path | None:
    """The run's folder; none if it failed. One iteration is run before it, so that nothing is compiled in its time."""
    folder = FOLDERS / job["run"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as elsewhere, open(folder / "log.txt", "w") as log:
        start(job, elsewhere, "--stop-after", "1", capture_output=True)
        job["commit"] = commit()
        done = start(job, folder, stdout=log, stderr=subprocess.STDOUT)
    return next((p.parent for p in folder.glob("*/policy.pt2")), None) if done.returncode == 0 else None


def replay(policy, env: str) -> dict:
    """What a final policy does on every engine that has the task."""
    row, soft = {}, {"diffsim": policy.softness} if getattr(policy, "physics", None) == "diffsim" else {}  # SBX's: none
    for physics in ("gymnasium",) if diffsim.is_gymnasium_id(env) else ("diffsim", "mujoco"):
        played = rollout(playback_env(env, EPISODES, physics, **soft.get(physics, {})), policy, EPISODES)
        row[f"return_{physics}"] = float(played["return"].mean())
        if physics != "gymnasium":
            row[f"limit_{physics}"] = float(played["limit_violation"].max())
            row[f"depth_{physics}"] = float(played["penetration"].max())
    if env in diffsim.TASKS or not diffsim.is_gymnasium_id(env):
        played = rollout(on_mujoco := playback_env(env, MANY, "mujoco"), policy, MANY)
        fell = played["length"] < on_mujoco.max_episode_steps
        row |= dict(falls=int(fell.sum()), falls_return=float(played["return"].mean()))
        if "successes" in played:
            ours = rollout(playback_env(env, MANY, "diffsim", **soft.get("diffsim", {})), policy, MANY)
            row |= {"goals_diffsim": ours["successes"].mean(), "goals_mujoco": played["successes"].mean()}
    return row


def measured(folder: Path) -> tuple[dict, pd.DataFrame]:
    """The numbers of a run's row, and its curve: at most POINTS rows, the last and all with an evaluation among them.

    KL and share inside the clip range are over all iterations, as the script logs them.
    """
    args = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")["args"]
    metrics = pd.read_csv(folder / "metrics.csv").rename(columns=dict(approx_kl="kl"))
    metrics = metrics.reindex(columns=[*CURVES, "inside_clip", "std"])
    evaluated = np.flatnonzero(metrics.eval_return.notna())[-(POINTS - 2) :]
    even = np.linspace(0, len(metrics) - 1, POINTS - len(evaluated)).round().astype(int)
    last = metrics.iloc[-1]
    row = dict(
        physics=args["physics"], versions=" ".join(f"{name} {version(name)}" for name in ("torch", "mujoco")),
        steps=int(last.global_step), minutes=round(last.wall_time_s / 60, 3), eval_episodes=args["eval_episodes"],
        return_training=metrics.episodic_return.iloc[-5:].mean(), eval_return=metrics.eval_return.iloc[evaluated[-1]],
        kl=metrics.kl.median(), inside_clip=metrics.inside_clip.mean(), std=last["std"],
    )  # fmt: skip
    return row | replay(*load_policy(folder)), metrics[CURVES].iloc[np.union1d(even, evaluated)]


# --- the results --------------------------------------------------------------------------------------------------
def read(path: Path) -> pd.DataFrame:
    """As text, so that what is not replaced is written as it was."""
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame(columns=["run"])


def put(path: Path, new: pd.DataFrame, digits: int):
    """Add rows, in the place of earlier ones of the same run. The file is there whole, or as it was before."""
    new = new.map(lambda x: (f"{x:.{digits}g}" if x == x else "") if isinstance(x, float) else str(x))
    old = read(path)
    rows = pd.concat([old[~old.run.isin(new.run)], new]).sort_values("run", kind="stable").fillna("")
    path.parent.mkdir(parents=True, exist_ok=True)
    zipped = dict(method="gzip", mtime=0) if path.suffix == ".gz" else None  # same rows, same bytes
    write_whole(path, lambda temporary: rows.to_csv(temporary, index=False, compression=zipped))


def variants(args: Args) -> list[Args]:
    """args, or with --all those of each row of PLAN."""
    rows = [(envs.split(), scripts.split(), range(1, 1 + seeds), *more) for envs, scripts, seeds, *more in PLAN]
    return [replace(args, **dict(zip(KEYS, row))) for row in rows] if args.all else [args]


def descends(commit: str, since: str) -> bool:
    """Whether a row's commit is `since` or comes after it."""
    asked = ["git", "merge-base", "--is-ancestor", since, commit.removesuffix("+dirty")]
    return subprocess.run(asked, cwd=ROOT, capture_output=True).returncode == 0


def planned(args: Args) -> list[dict]:
    """The runs that --results does not have. Bad input ends the program with one line."""
    flags, own = " ".join(args.flags.split()), {"--env", "--seed", "--run-dir"}  # which a row says elsewhere
    if bool(flags) != bool(args.tag) or "__" in args.tag or own & {x.split("=")[0] for x in flags.split()}:
        sys.exit("train.py: --tag names what --flags make: both or neither; no __ in it; no --env, --seed, --run-dir")
    with diffsim.flags.one_line_errors():
        _ = [diffsim.default_physics(env) for env in args.envs]
    known, jobs = read(args.results / "runs.csv"), []
    done, commits = (dict(zip(known.run, known.get(key, []))) for key in ("flags", "commit"))
    for env, seed, script in dict.fromkeys(product(args.envs, args.seeds, args.scripts)):
        if not (ROOT / f"{script}.py").exists():
            sys.exit(f"train.py: there is no {script}.py; scripts are named without .py")
        name = f"{env.split(':')[-1]}__{script}{args.tag and '-' + args.tag}__{seed}"
        if (other := done.get(name, flags) != flags) and not args.all:
            sys.exit(f"train.py: {args.results} has {name} with flags '{done[name]}'; use another --tag")
        stale = args.again or other or args.since and not descends(commits.get(name, ""), args.since)
        if name in done and not stale:
            args.all or print(f"{name}: {args.results} has it; --again replaces it", flush=True)
            continue
        job = dict(run=name, env=env, script=script, tag=args.tag, seed=seed, flags=flags)
        jobs.append(job | dict(algorithm=algorithm(script, flags)))
    return jobs


def algorithm(script: str, flags: str) -> str:
    return "SAPO" if "--learn-entropy-coef" in flags else ALGORITHMS.get(script, script)


def duration(jobs: list[dict]) -> str:
    """What the committed runs let expect."""
    known = pd.read_csv(ROOT / "benchmarks" / "runs.csv", keep_default_na=False, na_values={"minutes": [""]})
    minutes = known.groupby(["env", "script", "tag"]).minutes.median().to_dict()
    spent = [minutes.get((job["env"], job["script"], job["tag"])) for job in jobs]
    return f"{len(jobs)} runs, {sum(filter(None, spent)) / 60:.1f} hours, {spent.count(None)} of them of unknown length"


def main(args: Args):
    torch.set_num_threads(1)
    args.results.is_file() and sys.exit(f"train.py: --results {args.results} is a file; it takes a folder")
    if args.since and not descends("HEAD", args.since):
        sys.exit(f"train.py: --since {args.since} is no commit that HEAD comes after")
    if args.all and (given := [key for key in KEYS if getattr(args, key) != getattr(Args, key)]):
        sys.exit(f"train.py: --all has tasks, scripts and seeds of its own; leave out --{given[0]}")
    if not 1 <= args.part[0] <= args.part[1]:
        sys.exit(f"train.py: --part {args.part[0]} {args.part[1]} is no part; the first of two is --part 1 2")
    jobs = [job for variant in variants(args) for job in planned(variant)][args.part[0] - 1 :: args.part[1]]
    if args.dry_run:
        return print(*[job["run"] for job in jobs], duration(jobs), sep="\n")
    args.all and print(f"{duration(jobs)}; the same command goes on after the last run that was over", flush=True)
    failed = []
    for job in jobs:
        print(f"{job['run']}: training, its log is {FOLDERS / job['run'] / 'log.txt'}", flush=True)
        if (folder := train(job)) is None:
            failed.append(job["run"])
            print(f"{job['run']}: failed, see {FOLDERS / job['run'] / 'log.txt'}", flush=True)
            continue
        numbers, curve = measured(folder)
        put(args.results / "runs.csv", pd.DataFrame([job | numbers]), 7)
        put(args.results / "curves.csv.gz", curve.assign(run=job["run"])[["run", *CURVES]], 5)
        print(f"{job['run']}: return {numbers['eval_return']:.0f}, {numbers['minutes']:.1f} minutes", flush=True)
    failed and sys.exit(f"train.py: {len(failed)} of {len(jobs)} runs failed")


if __name__ == "__main__":
    diffsim.program.start()
    main(tyro.cli(Args))
