"""kill -9 at random moments: every run goes on, with nothing lost but what was not yet saved.

    python -m tests.kill            # 20 kills over the four scripts, a few minutes; exits 1 on a violation
    python -m tests.kill 4 7        # four kills, at the moments of seed 7

A script is started, killed, resumed, killed again, ... and resumed to its end. Every third kill comes at any moment
since the process began, the others while a file is being saved.
"""

import csv
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from tests import ROOT, SCRIPTS

STEP, SAVE = 4, 40  # environment steps of a row of metrics.csv, and between checkpoints
SHARED = (
    f"--no-compile --env cartpole --save-every {SAVE} --eval-every 0 --eval-episodes 2 --total-timesteps 1000000000"
)
WINDOW = "--num-envs 2 --horizon 2 --critic-epochs 1 --critic-minibatches 2"
FLAGS = {
    "shac.py": WINDOW,
    "rpo_diffsim.py": WINDOW,
    "ppo_baseline.py": "--num-envs 2 --num-steps 2 --num-minibatches 2",
    "rp_pgm_mb.py": "--num-envs 4 --learning-starts 16 --model-warmup 20 --batch-size 4 --log-every 4",
}


def start(script: str, *args) -> subprocess.Popen:
    streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, script, *map(str, args)], cwd=ROOT, **streams)


def kill(process: subprocess.Popen, folder: Path, saving: bool) -> bool:
    """At a random moment, once there is a checkpoint, or within a save; returns whether it was still running."""

    def wait(until):
        while process.poll() is None and not until():
            time.sleep(0.001)

    begun, delay = time.time(), random.uniform(0, 20)
    if saving:
        wait(lambda: any(p.stat().st_mtime > begun for p in folder.glob("*/checkpoint.pt")))
        time.sleep(delay / 10)
        wait(lambda: any(folder.glob(f"*/tmp-{random.choice(['checkpoint.pt', 'policy.pt2'])}")))
        time.sleep(delay / 2000)
    else:
        wait(lambda: time.time() > begun + delay and any(folder.glob("*/checkpoint.pt")))
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def look(run: Path, end: int | None = None) -> tuple[str, list[str], int]:
    """What a run's files say, what is wrong with them, and the step of its checkpoint."""
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    text = (run / "metrics.csv").read_text()
    steps = [int(row["global_step"] or -1) for row in csv.DictReader(text.splitlines())]
    checks = {
        "a torn line": text.endswith("\n") and len({line.count(",") for line in text.splitlines()}) == 1,
        "a gap, or a step twice": steps == list(range(STEP, STEP * len(steps) + 1, STEP)),
        "more lost than an interval": saved <= steps[-1] <= saved + SAVE,
        "a torn policy.pt2": not (run / "policy.pt2").exists() or zipfile.is_zipfile(run / "policy.pt2"),
        f"not ended at {end}": end in (None, saved),
    }
    return f"saved {saved}, last row {steps[-1]}", [what for what, right in checks.items() if not right], saved


def main(kills: int = 20, seed: int = 1) -> int:
    random.seed(seed)
    violations = 0

    def tell(script: str, when: str, said: str, wrong: list[str]):
        nonlocal violations
        violations += len(wrong)
        print(f"{script:15} {when:19} {said}: {', '.join(wrong) or 'ok'}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TMPDIR"] = f"{scratch}/temporary"
        os.mkdir(os.environ["TMPDIR"])
        for i, script in enumerate(SCRIPTS[:kills]):
            folder, run = Path(scratch) / script, None
            for number in range(i, kills, len(SCRIPTS)):
                fresh = [*SHARED.split(), *FLAGS[script].split(), "--run-dir", folder]
                process, saving = start(script, *(["--resume", run] if run else fresh)), number % 3 > 0
                alive = kill(process, folder, saving)
                (run,) = folder.iterdir()
                said, wrong, saved = look(run)
                wrong += [] if alive else [f"ended by itself, {process.stderr.read()[-200:]}"]
                tell(script, "killed in a save" if saving else "killed", said, wrong)
            process = start(script, "--resume", run, "--stop-after", saved // STEP + 15)
            error = process.communicate()[1]
            said, wrong, _ = look(run, saved + 15 * STEP)
            tell(script, "resumed to its end", said, wrong + [error[-200:]] * bool(process.returncode))
        left = os.listdir(os.environ["TMPDIR"])
    print(f"{kills} kills, {violations} violations; left in the temporary folder: {', '.join(left) or 'nothing'}")
    return int(bool(violations or left))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
