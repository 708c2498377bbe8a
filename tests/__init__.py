"""What several tests share."""

import contextlib
import io
import runpy
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_script(script: str, *args) -> str:
    """What a script prints. It runs in this process (importing torch takes seconds) and must end well."""
    printed, argv, handler = io.StringIO(), sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)  # the scripts have their own
    return printed.getvalue()


def run_fresh(script: str, *args) -> str:
    """The same in a process of its own, as a run is resumed: nothing is left of the one before."""
    command = [sys.executable, script, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
