"""The folder of a run: made where it can be, its config.json, and the rows that a resumed run keeps."""

import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from math import isinf
from pathlib import Path

import diffsim

COLUMNS = ["iteration", "global_step", "wall_time_s"]  # of metrics.csv, the first
HELD: dict[Path, int] = {}  # folders of this process, and the open files that lock them


def try_folder(path: str | Path):
    """Raises OSError where no folder can be made or written to; leaves nothing behind."""
    there = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
    tempfile.TemporaryFile(dir=there).close()


def make_folder(path: Path) -> Path:
    """A new folder of that name, or with a suffix: another run may begin in the same second."""
    for n in count(1):
        folder = path if n == 1 else path.with_name(f"{path.name}-{n}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def hold(folder: Path):
    """No other process may write in a run's folder until `release`, or the end of this one. Raises ValueError, one
    line. Holds where the system and the disk have locks."""
    with suppress(ImportError):  # Windows
        import fcntl

        if (path := folder.resolve()) not in HELD:
            HELD[path] = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(HELD[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                release(folder)
                raise ValueError(f"another process is at work on {folder}: end it first") from None
            except OSError:  # some network disks
                pass


def release(folder: Path):
    if (lock := HELD.pop(folder.resolve(), None)) is not None:
        os.close(lock)


def provenance() -> dict:
    """What runs: date, command line, versions, and the commit of the script's checkout, None without one."""
    asked, commit = "git describe --always --dirty --abbrev=40 --exclude=*".split(), ""
    with suppress(OSError):
        folder = Path(sys.argv[0]).resolve().parent
        commit = subprocess.run(asked, cwd=folder, capture_output=True, text=True).stdout.strip()
    versions = {name: version(name) for name in ("torch", "mujoco", "gymnasium", "numpy")}
    versions |= dict(python=sys.version.split()[0], diffsim=diffsim.__version__)
    date, command = time.strftime("%Y-%m-%dT%H:%M:%S%z"), shlex.join(sys.orig_argv)
    return dict(date=date, command=command, commit=commit or None, versions=versions)


def config(args, script: str, iteration: int, before: Path) -> str:
    """config.json of a run that starts, or goes on at an iteration: then `before` is the one it had."""
    now, had = provenance(), {}
    if iteration:
        with suppress(OSError, ValueError, RecursionError):
            had = json.loads(before.read_text()) if before.is_file() else {}
        had = had if isinstance(had, dict) and isinstance(had.get("resumed", []), list) else {}
        now = had | dict(resumed=[*had.get("resumed", []), now | dict(iteration=iteration)])
    flags = {k: str(v) if isinstance(v, float) and isinf(v) else v for k, v in asdict(args).items()}  # JSON has no inf
    return json.dumps(now | dict(script=script, args=flags), indent=1) + "\n"


def read_rows(file: Path, global_step: int) -> list[dict]:
    """metrics.csv up to a checkpoint; without it no rows. Raises ValueError for a line that no run wrote."""
    rows, step = [], 0
    if not file.is_file():
        return rows
    with open(file, newline="") as f:
        reader = csv.DictReader(f)
        try:
            if (reader.fieldnames or [])[: len(COLUMNS)] != COLUMNS:
                raise ValueError
            for row in reader:
                here = int(row["global_step"])
                if here > global_step:  # comes again
                    break
                if here <= step or None in row:
                    raise ValueError
                [float(x) for x in row.values() if x != ""]  # a value that is missing is None: TypeError
                rows.append(row)
                step = here
        except (ValueError, TypeError, csv.Error):
            line = f"line {max(1, reader.line_num)} of {file} is not this run's"
            raise ValueError(f"{line}; mend it, or move the file away to go on without the rows so far") from None
    return rows
