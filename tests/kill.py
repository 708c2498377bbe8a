"""kill -9 at random moments: every run goes on, with nothing lost but what was not yet saved.

    python -m tests.kill            # 20 kills over the four scripts, minutes; exits 1 on a violation
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


def violations(run: Path, end: int | None = None) -> tuple[list[str], int, int]:
    """What is wrong with a run's files, the step of its checkpoint and that of its last row."""
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    text = (run / "metrics.csv").read_text()
    steps = [int(row["global_step"] or -1) for row in csv.DictReader(text.splitlines())]
    wrong = ["a torn line"] * (not text.endswith("\n") or any(None in r for r in csv.DictReader(text.splitlines())))
    wrong += ["a gap or a step twice"] * (steps != list(range(STEP, STEP * len(steps) + 1, STEP)))
    wrong += [f"{steps[-1] - saved} steps lost"] * (not 0 <= steps[-1] - saved <= SAVE)
    wrong += ["a torn policy.pt2"] * ((run / "policy.pt2").exists() and not zipfile.is_zipfile(run / "policy.pt2"))
    wrong += [f"ended at {saved}"] * (end is not None and saved != end)
    return wrong, saved, steps[-1]


def kill(process: subprocess.Popen, folder: Path, saving: bool) -> bool:
    """At a random moment, or within a save after one; returns whether it was still running."""
    begun, at, checkpoint = time.time(), random.uniform(0, 15), next(folder.glob("*/checkpoint.pt"), None)
    while process.poll() is None and (not checkpoint or time.time() < begun + at):
        time.sleep(0.01)
        checkpoint = next(folder.glob("*/checkpoint.pt"), None)
    while (
        saving
        and process.poll() is None
        and not (checkpoint.stat().st_mtime > begun and list(folder.glob("*/tmp-[cp]*")))
    ):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05) if saving else 0)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def main(kills: int = 20, seed: int = 1) -> int:
    random.seed(seed)
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        temporary = Path(scratch) / "tmp"
        temporary.mkdir()
        os.environ["TMPDIR"] = str(temporary)
        for i, script in enumerate(SCRIPTS):
            folder, run = Path(scratch) / script, None
            args = [
                "--no-compile",
                "--env",
                "cartpole",
                *FLAGS[script].split(),
                "--save-every",
                SAVE,
                "--eval-every",
                0,
            ]
            args += ["--eval-episodes", 2, "--total-timesteps", 10**9, "--run-dir", folder]
            for number in range(i, kills, len(SCRIPTS)):
                saving = number % 3 > 0
                process = start(script, *(["--resume", run] if run else args))
                alive = kill(process, folder, saving)
                (run,) = folder.iterdir()
                wrong, saved, last = violations(run)
                wrong += [] if alive else [f"ended by itself: {process.stderr.read()[-200:]}"]
                bad += bool(wrong)
                moment = "while saving" if saving else "at any moment"
                print(
                    f"{script:16} {moment:13}: saved {saved}, last row {last}; {', '.join(wrong) or 'ok'}", flush=True
                )
            if run is not None:
                process = start(script, "--resume", run, "--stop-after", saved // STEP + 15)
                error = process.communicate()[1]
                wrong = violations(run, saved + 15 * STEP)[0] + ([error[-200:]] if process.returncode else [])
                bad += bool(wrong)
                print(f"{script:16} resumed to its end: {', '.join(wrong) or 'ok'}", flush=True)
        left = [p.name for p in temporary.iterdir()]
    print(f"{kills} kills, {bad} violations; left in the temporary folder: {', '.join(left) or 'nothing'}")
    return int(bool(bad or left))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
