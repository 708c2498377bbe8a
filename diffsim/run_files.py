"""The folder of a run: made where it can be, files that are whole, config.json, and the tables of its numbers."""

import csv
import io
import json
import os
import shlex
import shutil
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

import torch
from torch.utils.tensorboard import SummaryWriter

import diffsim
from diffsim import ranks
from diffsim.tasks import is_file

COLUMNS = ["iteration", "global_step", "wall_time_s"]  # of metrics.csv, the first
HELD: dict[Path, int] = {}  # folders of this process, and the open files that lock them


def process_start() -> float:
    """When this process began, seconds since the epoch; where the system does not tell, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


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


def keep_code(folder: Path, env: str, iteration: int) -> list[str]:
    """Copies of the code that a commit need not have: the script, and the file of a task that is in one. What has
    changed when a run goes on is kept beside what it began with, my_idea.5.py from iteration 5 on; their names."""
    changed = []
    for file in (Path(name) for name in (sys.argv[0], is_file(env) and env.rpartition(":")[0]) if name):
        if file.is_file():
            kept = folder / file.name
            if iteration and kept.is_file() and kept.read_bytes() != file.read_bytes():
                kept = kept.with_name(f"{file.stem}.{iteration}{file.suffix}")
                changed.append(kept.name)
            write_whole(kept, lambda path, file=file: shutil.copy(file, path))
    return changed


def check_parts(parts: dict):
    """Raises ValueError, one line, for a part whose state a checkpoint could not give back."""
    for name, part in parts.items():
        try:
            part.load_state_dict  # noqa: B018
            torch.save(part.state_dict(), state := io.BytesIO())
            torch.load(io.BytesIO(state.getvalue()), weights_only=True)
        except Exception as e:
            reason = str(e).partition("\n")[0]
            wanted = "state_dict, of tensors, numbers and text, and load_state_dict are wanted"
            raise ValueError(f"run.restore: {name} cannot be saved as plain data ({reason}): {wanted}") from e


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
    of_rank_0 = dict(processes=ranks.WORLD) if ranks.WORLD > 1 else {}  # whose command line it is
    date, command = time.strftime("%Y-%m-%dT%H:%M:%S%z"), shlex.join(sys.orig_argv)
    return dict(date=date, command=command, commit=commit or None, versions=versions) | of_rank_0


def plain(x):
    """JSON has no inf."""
    return str(x) if isinstance(x, float) and isinf(x) else x


def config(args, script: str, iteration: int, before: Path) -> str:
    """config.json of a run that starts, or goes on at an iteration: then `before` is the one it had."""
    now, had = provenance(), {}
    if iteration:
        with suppress(OSError, ValueError, RecursionError):
            had = json.loads(before.read_text()) if before.is_file() else {}
        had = had if isinstance(had, dict) and isinstance(had.get("resumed", []), list) else {}
        now = had | dict(resumed=[*had.get("resumed", []), now | dict(iteration=iteration)])
    flags = {k: [*map(plain, v)] if isinstance(v, (tuple, list)) else plain(v) for k, v in asdict(args).items()}
    return json.dumps(now | dict(script=script, args=flags), indent=1) + "\n"


def write_whole(file: Path, write):
    """`write(path)` makes a file: it is there whole, or as it was before. Raises OSError."""
    temporary = file.with_name(f"tmp-{file.name}")
    try:
        temporary.unlink(missing_ok=True)  # a link in the folder of another's run would be followed
        write(temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as e:  # torch says with a RuntimeError that a disk is full
        with suppress(OSError):
            temporary.unlink()
        raise OSError(getattr(e, "errno", 0), getattr(e, "strerror", None) or str(e).split("\n")[0]) from e


class Tables:
    """metrics.csv, and the same numbers as TensorBoard's events."""

    def __init__(self, folder: Path, args, rows: list[dict], global_step: int):
        self.folder = folder
        self.rewrite(list(rows[0]) if rows else COLUMNS, rows)
        after = global_step + 1 if global_step else None  # the checkpoint's own row stays
        self.writer = SummaryWriter(str(folder), purge_step=after)
        table = "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    def add(self, row: dict, numbers: dict, global_step: int):
        """A row by column, and its numbers by tag."""
        for tag, x in numbers.items():
            self.writer.add_scalar(tag, x, global_step)
        if new := [name for name in row if name not in self.metrics.fieldnames]:  # logged for the first time
            with open(self.folder / "metrics.csv") as f:
                rows = list(csv.DictReader(f))
            self.rewrite([*self.metrics.fieldnames, *new], rows)
        self.metrics.writerow(row)

    def rewrite(self, columns: list[str], rows: list[dict]):
        """metrics.csv with these columns and rows; later rows are appended, each whole before the next."""

        def write(path: Path):
            file = open(path, "w", newline="", buffering=1)  # renamed while open: rows go on arriving
            self.metrics = csv.DictWriter(file, columns)
            self.metrics.writeheader()
            self.metrics.writerows(rows)

        write_whole(self.folder / "metrics.csv", write)


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
