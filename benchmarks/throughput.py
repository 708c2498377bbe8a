"""Physics in substeps/s beside MuJoCo C on one thread: OMP_NUM_THREADS=1 python benchmarks/throughput.py [--env ant]

With --processes 1 or 2, a script's training in steps/s, and seconds until an evaluation comes to --until.
Rows are added to throughput.csv in --results as they come (`--results benchmarks`: the committed file).
"""

import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

__name__ == "__main__" and signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import mujoco
import numpy as np
import pandas as pd
import torch
import tyro
from mujoco import rollout
from train import FOLDERS, algorithm, commit, diffsim, start

HORIZON, REPEATS = 32, 5  # control steps of a window; turns of measurements, the median is kept


@dataclass
class Args:
    env: str = "ant"
    """task"""
    batches: tuple[int, ...] = (1, 16, 64, 256, 1024, 4096)
    """numbers of environments; in training 0 is the script's own"""
    compile: bool = True
    """compile the physics"""
    processes: int = 0
    """measure training by so many processes, each with `batches` environments"""
    script: str = "rpo_diffsim"
    """script that trains"""
    flags: str = ""
    """more flags for that training, one string"""
    until: float = 0.0
    """a return, to measure seconds to it in a training of a million steps"""
    results: Path = FOLDERS
    """folder of throughput.csv"""


def mujoco_speed(env, steps: int = 50_000) -> float:
    """Steps/s of MuJoCo C, one thread, Euler, same timestep, random controls, starting on the ground."""
    m = env.model.mj_model.__copy__()
    m.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    data, layout = mujoco.MjData(m), mujoco.mjtState.mjSTATE_FULLPHYSICS
    data.qpos[:], data.qvel[:] = (x[:, 0].double().numpy() for x in env.task.reset(env.model, 1, torch.Generator()))
    mujoco.mj_step(m, data, nstep=200)
    state = np.zeros(mujoco.mj_stateSize(m, layout))
    mujoco.mj_getState(m, data, state, layout)
    controls = np.random.default_rng(0).uniform(-1, 1, (1, steps, m.nu))
    start = time.time()
    rollout.rollout(m, data, state[None], controls)
    return steps / (time.time() - start)


def window(env, actions, backward: bool) -> float:
    """Seconds of one window through env.step, observation and reward included."""
    start = time.time()
    env.detach()
    with torch.set_grad_enabled(backward):
        total = sum(env.step(action)[1].mean() for action in actions)
    if backward:
        total.backward()
    return time.time() - start


def physics_row(args: Args, batch: int) -> dict:
    with diffsim.flags.one_line_errors():
        env = diffsim.make(args.env, batch, physics="diffsim", compile=args.compile)
    env.reset()
    actions = (0.3 * torch.randn(HORIZON, batch, env.model.nu)).clamp(-1, 1).requires_grad_()
    window(env, actions[:1], True)
    seen = [(window(env, actions, False), window(env, actions, True), 1 / mujoco_speed(env)) for _ in range(REPEATS)]
    substeps = batch * HORIZON * env.substeps
    speeds = [round(work / x) for work, x in zip((substeps, substeps, 1), np.median(seen, 0))]
    row = dict(env=args.env, batch=batch, compiled=args.compile, threads=torch.get_num_threads(), horizon=HORIZON)
    return row | dict(zip(("forward", "forward_backward", "mujoco"), speeds)) | dict(commit=commit())


def training(args: Args, batch: int, *flags: str) -> pd.DataFrame:
    """metrics.csv of a training."""
    more = f"--num-envs {batch * args.processes} " * (batch > 0) + args.flags
    job = dict(script=args.script, env=args.env, seed=1, flags=more)
    with tempfile.TemporaryDirectory() as folder:
        if failed := start(job, folder, *flags, processes=args.processes, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(failed)  # it has said why
        return pd.read_csv(next(Path(folder).glob("*/metrics.csv")))


def training_row(args: Args, batch: int) -> dict:
    iterations = 4000 if args.script == "rp_pgm_mb" else 30 if batch <= 1024 else 12  # its own are single steps
    curve = training(args, batch, "--eval-every", "0", "--stop-after", str(iterations))
    later = curve[curve.iteration >= iterations // 3]
    speed = np.polyfit(later.wall_time_s, later.global_step, 1)[0]
    row = dict(env=args.env, batch=batch, processes=args.processes, training=round(speed), commit=commit())
    row |= dict(algorithm=algorithm(args.script, args.flags), flags=args.flags)
    parts = [name for name in ("simulate", "policy", "critic") if f"{name}_s" in later]
    each = later.iteration.diff().median()  # iterations of a row
    row |= {name: round(1000 * later[f"{name}_s"].mean() / each) for name in parts}  # milliseconds
    if args.until:
        curve = training(args, batch, "--total-timesteps", "1000000", "--eval-every", "50000")
        took, evaluated = curve.wall_time_s.diff().fillna(curve.wall_time_s), curve.eval_return.notna()
        took[evaluated] = took[~evaluated].median()  # evaluations are the ruler, not what is measured
        row["seconds"] = took.cumsum()[curve.eval_return >= args.until].min()
    return row


if __name__ == "__main__":
    diffsim.program.start()
    args = tyro.cli(Args)
    args.results.is_file() and diffsim.flags.fail(f"--results {args.results} is a file; it takes a folder")
    args.until and not args.processes and diffsim.flags.fail("--until is a training's; it needs --processes 1 or 2")
    path = args.results / "throughput.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    for batch in args.batches:
        row = training_row(args, batch) if args.processes else physics_row(args, batch)
        before = pd.read_csv(path, dtype=dict(commit=str)) if path.exists() else pd.DataFrame()
        pd.concat([before, pd.DataFrame([row])]).convert_dtypes().to_csv(path, index=False)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
