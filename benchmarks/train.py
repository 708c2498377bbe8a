"""Train scripts on tasks with several seeds, and keep what the README's tables and figures are made of.

    python benchmarks/train.py --envs ant --scripts shac rpo_diffsim --seeds 1 2 3

Each run's metrics.csv becomes results/<env>__<script>__<seed>.csv; its final policy is played for 10 episodes on both
engines (that of a Gymnasium id: on Gymnasium) into results/replay.csv. Two runs at a time, one thread each. A `--tag`
names a variant: <script>-<tag>.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import diffsim  # noqa: E402
from diffsim.gymnasium_env import is_gymnasium_id  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
KEYS = ("return", "length", "speed", "limit_violation", "penetration")
HEADER = ["run", "physics", "episodes", *(f"{k}_{s}" for k in KEYS for s in ("mean", "std", "max"))]


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
    compile: int = 256
    """number of environments to compile the physics for before the clock starts; 0: none"""
    jobs: int = 2
    """runs at a time"""
    run_dir: str = "runs/benchmarks"
    """where the run folders go"""


def train(args: Args, env: str, script: str, seed: int) -> Path:
    """One run as a user starts it; its folder."""
    folder = ROOT / args.run_dir / f"{env}__{script}{args.tag and '-' + args.tag}__{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, f"{script}.py", "--env", env, "--seed", str(seed), "--run-dir", str(folder)]
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "w") as log:
        subprocess.run(
            command + args.flags.split(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    run = next(p.parent for p in folder.glob("*/metrics.csv"))
    shutil.copy(run / "metrics.csv", RESULTS / f"{folder.name}.csv")
    if (run / "probe.csv").exists():
        (RESULTS / "probes").mkdir(exist_ok=True)
        shutil.copy(run / "probe.csv", RESULTS / "probes" / f"{folder.name}.csv")
    return run


def replay(run: Path, name: str) -> list[list]:
    """The final policy on both engines, in a process of its own."""
    code = (
        "import sys, json, torch; torch.set_num_threads(1)\n"
        "from diffsim.gymnasium_env import is_gymnasium_id\n"
        "from diffsim.play import load_policy, playback_env, policy_obs_dim, rollout\n"
        "policy, env = load_policy(sys.argv[1])\n"
        "for physics in ('gymnasium',) if is_gymnasium_id(env) else ('diffsim', 'mujoco'):\n"
        "    r = rollout(playback_env(env, 10, physics, policy_obs_dim(policy)), policy, 10)\n"
        f"    known = [r[k] if k in r else r['return'] * float('nan') for k in {KEYS}]\n"
        "    print(json.dumps([physics, *(float(f) for x in known for f in (x.mean(), x.std(), x.max()))]))"
    )
    done = subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return [[name, physics, 10, *(round(x, 4) for x in numbers)] for physics, *numbers in lines]


def keep(rows: list[list]):
    """Put rows in replay.csv, in the place of earlier ones of the same run."""
    path, table = RESULTS / "replay.csv", {}
    if path.exists():
        with open(path) as f:
            table = {tuple(r[:2]): r for r in list(csv.reader(f))[1:]}
    table |= {tuple(r[:2]): r for r in rows}
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([HEADER, *(table[k] for k in sorted(table))])


def main():
    args = tyro.cli(Args)
    RESULTS.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    if args.compile:
        for env in args.envs:
            # also what --physics mujoco differentiates with; two of the scripts leave Gymnasium's ids to Gymnasium
            if not is_gymnasium_id(env) or {"shac", "rpo_diffsim"} & set(args.scripts):
                diffsim.make(env, args.compile)

    def work(job):
        run = train(args, *job)
        return replay(run, run.parent.name)

    jobs = [(env, script, seed) for env in args.envs for seed in args.seeds for script in args.scripts]
    with ThreadPoolExecutor(args.jobs) as pool:
        for rows in pool.map(work, jobs):
            keep(rows)
            for row in rows:
                print(*row[:2], "return", row[3], flush=True)


if __name__ == "__main__":
    main()
