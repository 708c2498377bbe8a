"""Physics in substeps/s beside MuJoCo C on one thread: python benchmarks/throughput.py [--env ant] [--batches 64 256]

Rows are written to results/throughput.csv as they come. Compiling takes about a minute for each new batch size.
"""

import csv
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import torch
import tyro
from mujoco import rollout

sys.path.insert(0, str(Path(__file__).parents[1]))
import diffsim  # noqa: E402

RESULTS = Path(__file__).parent / "results"


@dataclass
class Args:
    env: str = "ant"
    """task"""
    batches: tuple[int, ...] = (1, 16, 64, 256, 1024, 4096)
    """numbers of environments"""
    eager: tuple[int, ...] = (1, 64, 256, 1024)
    """of which also measured without compilation"""
    horizon: int = 32
    """control steps of a window"""
    num_threads: int = 1
    """threads of torch"""


def mujoco_speed(env, seconds=2.0) -> float:
    """Steps/s of MuJoCo C, one thread, Euler, same timestep, random controls, starting on the ground."""
    m = env.model.mj_model.__copy__()
    m.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    data = mujoco.MjData(m)
    data.qpos[:], data.qvel[:] = (x[:, 0].double().numpy() for x in env.task.reset(env.model, 1, torch.Generator()))
    mujoco.mj_step(m, data, nstep=200)
    layout = mujoco.mjtState.mjSTATE_FULLPHYSICS
    state = np.zeros(mujoco.mj_stateSize(m, layout))
    mujoco.mj_getState(m, data, state, layout)
    controls = np.random.default_rng(0).uniform(-1, 1, (1, 20000, m.nu))
    steps, start = 0, time.time()
    while time.time() - start < seconds:
        rollout.rollout(m, data, state[None], controls)
        steps += controls.shape[1]
    return steps / (time.time() - start)


def window(env, actions, backward: bool) -> float:
    """Seconds of one window through env.step, observation and reward included."""
    start = time.time()
    env.detach()
    total = 0.0
    with torch.set_grad_enabled(backward):
        for action in actions:
            total = total + env.step(action)[1].mean()
    if backward:
        total.backward()
    return time.time() - start


if __name__ == "__main__":
    args = tyro.cli(Args)
    torch.set_num_threads(args.num_threads)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "throughput.csv"
    new = not path.exists()
    with open(path, "a", newline="") as f:
        writer = csv.writer(f)
        if new:
            writer.writerow(
                "env,batch,compiled,threads,horizon,forward,forward_backward,mujoco,ratio,first_gradient_s,rss_mb".split(
                    ","
                )
            )
        for compiled, batches in ((True, args.batches), (False, args.eager)):
            for batch in batches:
                start = time.time()
                env = diffsim.make(args.env, batch, compile=compiled)
                env.reset()
                actions = (0.3 * torch.randn(args.horizon, batch, env.model.nu)).clamp(-1, 1).requires_grad_()
                window(env, actions[:1], True)
                first = time.time() - start
                repeats = 5 if compiled else 2
                both, forward, reference = [], [], []
                for _ in range(repeats):  # interleaved: the machine is shared
                    reference.append(mujoco_speed(env, 0.5))
                    both.append(window(env, actions, True))
                    forward.append(window(env, actions, False))
                work = batch * args.horizon * env.substeps
                fb, c = work / np.median(both), float(np.median(reference))
                rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                row = [
                    args.env,
                    batch,
                    compiled,
                    args.num_threads,
                    args.horizon,
                    round(work / np.median(forward)),
                    round(fb),
                ]
                writer.writerow([*row, round(c), round(fb / c, 2), round(first, 1), round(rss)])
                f.flush()
                print(batch, "compiled" if compiled else "eager", f"{fb:,.0f} substeps/s, MuJoCo {c:,.0f}", flush=True)
