"""The flags of a script: their bounds, those that all scripts share, and what is wrong with them in one line."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Annotated, NamedTuple, get_args, get_type_hints

import torch
import tyro

import diffsim


class Bound(NamedTuple):
    """Least and largest value of a flag, and how to say so. No range holds nan."""

    low: float
    high: float
    words: str


SMALLEST, LARGEST = 5e-324, sys.float_info.max  # above 0, below infinity
Count = Annotated[int, Bound(1, inf, "at least 1")]
Natural = Annotated[int, Bound(0, inf, "at least 0")]
Seed = Annotated[int, Bound(0, 2**32 - 1, "between 0 and 2^32 - 1")]
Number = Annotated[float, Bound(-LARGEST, LARGEST, "a finite number")]
Rate = Annotated[float, Bound(SMALLEST, LARGEST, "above 0, and finite")]
Norm = Annotated[float, Bound(SMALLEST, inf, "above 0")]
Weight = Annotated[float, Bound(0, LARGEST, "at least 0, and finite")]
Fraction = Annotated[float, Bound(0, 1, "between 0 and 1")]
Decay = Annotated[float, Bound(0, 1 - 1e-9, "at least 0 and below 1")]
Layers = tuple[Count, ...]


@dataclass
class RunArgs:
    """Flags of every script that say nothing of its algorithm."""

    device: str = "cpu"
    """cpu or cuda"""
    compile: bool = True
    """compile the physics (once for a robot, num_envs and softness, a minute or two, then cached)"""
    num_threads: Count = 1
    """threads of torch; the same number gives the same bits"""
    eval_every: Natural = 500_000
    """environment steps between evaluations of the deterministic policy; 0: only at the end"""
    eval_episodes: Count = 64
    """episodes of an evaluation (at most num_envs on diffsim)"""
    eval_physics: bool = False
    """evaluate on the other engine too"""
    save_every: Count = 250_000
    """environment steps between checkpoints"""
    stop_after: Count | None = None
    """stop after this many iterations, and save: --resume goes on"""
    resume: str | None = None
    """run folder or checkpoint.pt to continue, with the arguments it was started with"""
    run_dir: str = "runs"
    """where the run folder is made"""
    capture_video: bool = False
    """record the final policy as video.mp4 in the run folder"""


def script() -> str:
    """Name of the file that runs: a fork has its own runs and checkpoints."""
    return Path(sys.argv[0]).stem


def fail(message: str):
    """One clear line for bad input."""
    print(f"{script()}.py: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line_errors():
    """Bad input that shows while environments are made, or Ctrl-C there, ends the program with one line."""
    try:
        yield
    except ValueError as e:
        fail(str(e))
    except KeyboardInterrupt:
        print("\ninterrupted before the first step: nothing to save", file=sys.stderr)
        raise SystemExit(130) from None


def bounds(hint) -> list[Bound]:
    """Those of a type, and of the types in it: `Count | None`, `tuple[Count, ...]`."""
    own = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Bound)]
    return own + [b for inner in get_args(hint) for b in bounds(inner)]


def parse(Args, defaults: dict):
    """Arguments from the command line, over the settings of the task, over those of the dataclass Args.

    `defaults` names settings by task ("ant"), task and engine ("ant on mujoco") or engine ("on gymnasium"); a task in a
    file has those of the task that it derives from. With --resume they are the run's own, which no flag may change.
    """
    for key, settings in defaults.items():
        if unknown := set(settings) - {f.name for f in fields(Args)}:
            fail(f'DEFAULTS["{key}"] sets {", ".join(sorted(unknown))}, which is no field of Args')
    argv = [a for a in sys.argv[1:] if a not in ("-h", "--help")]  # so that --help shows the task's settings
    args = tyro.cli(Args, args=argv)
    if args.resume is not None:
        try:
            default = replace(Args(**load(args.resume)["args"]), resume=args.resume, stop_after=None)
        except (KeyError, TypeError):
            fail(f"--resume {args.resume}: a checkpoint of another version of {script()}.py")
    else:
        with one_line_errors():
            physics = args.physics or diffsim.default_physics(args.env)
            name = diffsim.settings_of(args.env)
        settings: dict = {}
        for key in (f"on {physics}", name, f"{name} on {physics}"):
            settings |= defaults.get(key, {})
        default = replace(args, physics=physics, **settings)
    final = tyro.cli(Args, default=default)
    for key, hint in get_type_hints(Args, include_extras=True).items():
        value, flag = getattr(final, key), f"--{key.replace('_', '-')}"
        if args.resume is not None and key != "stop_after" and value != getattr(default, key):
            fail(f"{flag} is {value}, the run has {getattr(default, key)}: resuming keeps its arguments")
        for bound in bounds(hint) if value is not None else ():
            if not all(bound.low <= x <= bound.high for x in (value if isinstance(value, tuple) else (value,))):
                fail(f"{flag} is {value}; it must be {bound.words}")
    return final


def load(path: str) -> dict:
    """The checkpoint.pt of a run folder. Whatever else is there ends the program with one line."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(file, weights_only=True, map_location="cpu")
        by = checkpoint["script"]
    except FileNotFoundError:
        fail(f"--resume {path}: no checkpoint.pt there")
    except Exception as e:
        fail(f"--resume {file}: not a readable checkpoint ({type(e).__name__})")
    if by != script():
        fail(f"--resume {path}: a checkpoint of {by}.py")
    return checkpoint
