"""What several tests share."""

import contextlib
import csv
import io
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from diffsim import play as player

ROOT = Path(__file__).parents[1]
WINDOWS = ("shac.py", "rpo_diffsim.py")  # gradients through physics
SCRIPTS = (*WINDOWS, "ppo_baseline.py", "rp_pgm_mb.py")
TINY = "--no-compile --num-envs 2 --horizon 2 --critic-epochs 1 --eval-every 0 --eval-episodes 2 --save-every 4".split()


@contextlib.contextmanager
def command_line(*argv):
    before, sys.argv = sys.argv, [*map(str, argv)]
    try:
        yield
    finally:
        sys.argv = before


def run_script(script, *args) -> str:
    """What a script prints. It runs in this process (importing torch takes seconds) and must end well."""
    printed, handler = io.StringIO(), signal.getsignal(signal.SIGINT)
    try:
        with command_line(script, *args), contextlib.redirect_stdout(printed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
    finally:
        signal.signal(signal.SIGINT, handler)  # the scripts have their own
    return printed.getvalue()


def run_fresh(script, *args) -> str:
    """The same in a process of its own, as a run is resumed: nothing is left of the one before."""
    command = [sys.executable, script, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def play(*args, expect=0) -> SimpleNamespace:
    """What `python -m diffsim.play` prints: stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with command_line("play", *args), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            player.main()
        except SystemExit as stopped:
            code = stopped.code
    assert code == expect, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def rows(folder) -> list[dict]:
    """metrics.csv of the one run below a folder, without what a clock decides."""
    with open(next(Path(folder).glob("*/metrics.csv"))) as f:
        return [{k: v for k, v in r.items() if k != "SPS" and not k.endswith("_s")} for r in csv.DictReader(f)]


def the_run(folder) -> Path:
    """The one run below a folder."""
    (run,) = Path(folder).iterdir()
    return run
