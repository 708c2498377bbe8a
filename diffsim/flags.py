"""The flags of a script: their bounds, those that all scripts share, and what is wrong with them in one line."""

import io
import os
import re
import sys
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from shlex import quote
from types import UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
import tyro
from tyro.constructors import PrimitiveConstructorSpec

import diffsim
from diffsim import ranks
from diffsim.physics import CacheError
from diffsim.program import printable, start
from diffsim.tasks import is_file


class Bound(NamedTuple):
    """Least and largest value of a flag, and how to say so. No range holds nan."""

    low: float
    high: float
    words: str


SMALLEST, LARGEST = 1e-38, 1e38  # of float32
CORES = os.cpu_count() or 1


def whole_number(texts: list[str]) -> int:
    """Of what stands after a flag; 1e6 is one, too."""
    try:
        number = float(texts[0])
        return int(number) if "e" in texts[0].lower() and number.is_integer() else int(texts[0])
    except ValueError:
        raise ValueError(f"{texts[0]!r} is not a whole number, like 1000000 or 1e6") from None


WHOLE = PrimitiveConstructorSpec(1, "INT", whole_number, lambda x: type(x) is int, lambda x: [str(x)])
Count = Annotated[int, WHOLE, Bound(1, 2**53, "between 1 and 2^53")]
Natural = Annotated[int, WHOLE, Bound(0, 2**53, "between 0 and 2^53")]
Few = Annotated[int, WHOLE, Bound(1, 100_000, "between 1 and 100,000")]  # within one iteration, which must end
MOST = max(256, CORES)
Threads = Annotated[int, WHOLE, Bound(1, MOST, f"between 1 and {MOST}: this machine has {CORES} cores")]
Ratio = Annotated[float, Bound(SMALLEST, 1000, "above 0 and at most 1000")]
Seed = Annotated[int, WHOLE, Bound(0, 2**32 - 1, "between 0 and 2^32 - 1")]
Number = Annotated[float, Bound(-LARGEST, LARGEST, "between -1e38 and 1e38")]
Rate = Annotated[float, Bound(SMALLEST, 1e30, "above 0 (1e-38) and at most 1e30")]  # torch multiplies it
Norm = Annotated[float, Bound(SMALLEST, inf, "above 0")]
Weight = Annotated[float, Bound(0, LARGEST, "between 0 and 1e38")]
Clip = Annotated[float, Bound(0, inf, "at least 0")]
Fraction = Annotated[float, Bound(0, 1, "between 0 and 1")]
Decay = Annotated[float, Bound(0, 1 - 1e-9, "at least 0 and below 1")]
Layers = tuple[Annotated[int, WHOLE, Bound(1, 8192, "between 1 and 8192")], ...]


@dataclass
class RunArgs:
    """Flags of every script that say nothing of its algorithm."""

    device: str = "cpu"
    """cpu or cuda"""
    compile: bool = True
    """compile physics (once for a robot and softness, up to a minute, then kept) and RP-PGM's updates (a minute)"""
    num_threads: Threads = 1
    """threads of torch; the same number gives the same bits"""
    eval_every: Natural = 500_000
    """environment steps between evaluations of the deterministic policy; 0: only at the end"""
    eval_episodes: Few = 64
    """episodes of an evaluation"""
    eval_physics: bool = False
    """evaluate on the other engine too"""
    save_every: Count = 250_000
    """environment steps between checkpoints"""
    stop_after: Count | None = None
    """stop after this many iterations since the run began, and save: --resume goes on"""
    resume: str | None = None
    """run folder or checkpoint.pt to continue, with its arguments; another --total-timesteps lengthens the run"""
    init_from: str | None = None
    """run folder or checkpoint.pt whose networks, noise and normalisers a new run has; SHAC's and RPO's are alike"""
    run_dir: str = "runs"
    """where the run folder is made"""
    capture_video: bool = False
    """record the final policy as video.mp4 in the run folder"""

    def engine(self) -> dict:
        """Arguments of diffsim.make, as far as a script has them."""
        names = ("physics", "derivative", "stiffness", "smoothing", "device", "compile")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


@dataclass
class PhysicsArgs(RunArgs):
    """And of those that differentiate through physics."""

    physics: Literal["diffsim", "mujoco", "gymnasium"] | None = None
    """engine that runs the task; None: the task's own"""
    derivative: Literal["diffsim", "mujoco"] = "diffsim"
    """whose gradient physics mujoco has: diffsim's at MuJoCo's states, or MuJoCo's by finite differences (slower)"""
    stiffness: Rate | None = None
    """stiffness of diffsim's contacts and joint limits, see diffsim.Softness; None: 2.4, and 0.6 with physics mujoco"""
    smoothing: Rate | None = None
    """width of their smoothing, as a multiple of diffsim.Softness's; None: 1, and 3 with physics mujoco"""


def script() -> str:
    """Name of the file that runs: a fork has its own runs and checkpoints."""
    return Path(sys.argv[0]).stem


def fail(message: str, code: int = 2):
    """One clear line for bad input; code 1: for what goes wrong later."""
    if ranks.speaks():
        print(printable(f"{script()}.py: {message}"), file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def one_line_errors():
    """Bad input that shows while environments are made ends the program with one line."""
    try:
        yield
    except ValueError as e:
        fail(str(e))


def explain(kind, error, traceback):
    """sys.excepthook of a run: what a machine cannot do is one line, too; all else is a bug, with its traceback."""
    if not ranks.speaks():
        return
    text, bar = str(error).partition("\n")[0], "\n" if sys.stdout.isatty() else ""  # to be ended
    said = ("can't allocate", "out of memory", "bad_alloc", "Storage size calculation overflowed")
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(x in text for x in said):
        asked = f" ({text.split('DefaultCPUAllocator: ')[-1].split('. Error code')[0]})" if text else ""
        fewer = "fewer --num-envs, a shorter window, smaller networks or buffers need less"
        print(f"{bar}{script()}.py: out of memory{asked}: {fewer}", file=sys.stderr)
    elif isinstance(error, ranks.LostError):
        print(f"{bar}{script()}.py: a process was lost ({text}); --resume goes on from what was saved", file=sys.stderr)
    elif isinstance(error, CacheError):
        print(f"{bar}{script()}.py: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def cli(Args, **how):
    """tyro.cli, whose box of ten lines around an error becomes one line."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(Args, **how)
    except SystemExit as stopped:
        if stopped.code != 2:
            raise
    lines = [line.strip("│╭╮╰╯ ") for line in said.getvalue().strip().splitlines()[1:]]  # without the title
    text = " ".join("\n" if set(line) <= {"─", "-"} else line for line in lines)
    parts = [part for part in text.split("\n") if part.strip()]
    meant = [part.split()[3] for part in parts if part.split()[:3] == ["Perhaps", "you", "meant:"]]
    if wrong := re.search(r"(--\S+): no type matching (.+) could be instantiated from \[(.*)\]", parts[0]):
        kinds = re.sub("[{}]", "", wrong[2].replace("{None}|", "")).replace("|", " or ")
        parts[0] = f"{wrong[1]} takes {kinds}, not {wrong[3]}"
    fail(f"{parts[0].strip()}{f' (perhaps {meant[0]}?)' if meant else ''}; --help lists all flags")


def bounds(hint) -> list[Bound]:
    """Those of a type, and of the types in it: `Count | None`, `tuple[Count, ...]`."""
    own = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Bound)]
    return own + [b for inner in get_args(hint) for b in bounds(inner)]


def check_bounds(args):
    """Raises ValueError, one line, for a flag out of its bounds."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        if value == () and bounds(hint):
            raise ValueError(f"--{name.replace('_', '-')} is empty; give at least one width")
        for bound in bounds(hint) if value is not None else ():
            given = value if isinstance(value, tuple) else (value,)
            if not all(bound.low <= x <= bound.high for x in given):
                raise ValueError(f"--{name.replace('_', '-')} is {' '.join(map(str, given))}; it must be {bound.words}")


PLAIN = (bool, int, float, str, type(None))  # what a checkpoint holds of flags, and tuples and lists of it


def fits(value, hint) -> bool:
    """Whether a value is of the type of a flag; what a checkpoint holds need not be."""
    origin, kinds = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, kinds[0])
    if origin is Literal:
        return value in kinds
    if origin in (Union, UnionType):
        return any(fits(value, kind) for kind in kinds)
    if origin is tuple and len(kinds) > 1 and kinds[1] is not ...:
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin in (tuple, list):
        return isinstance(value, origin) and all(fits(x, kinds[0]) for x in value)
    return type(value) in ((int, float) if hint is float else (hint,)) and type(value) in PLAIN


def of_checkpoint(Args, flag: str, path: str, by: str | None = None):
    """The arguments of the run that left a checkpoint. Those of another version end the program with one line."""
    checkpoint = load(path, flag, by)
    args, others = checkpoint["args"], checkpoint.get("others")
    before = 1 + len(others) if isinstance(others, list) else 1
    if flag == "--resume" and before != ranks.WORLD:
        how = f"with torchrun --nproc-per-node {before}" if before > 1 else "without torchrun"
        fail(f"{flag} {path}: a run of {before} process(es) does not go on with {ranks.WORLD}; start it {how}")
    hints = get_type_hints(Args, include_extras=True)
    if not isinstance(args, dict) or set(args) != set(hints):
        differ = ", ".join(map(str, set(args) ^ set(hints))) if isinstance(args, dict) else "no flags"
        instead = "; --init-from begins a new run with its networks" if flag == "--resume" and args else ""
        fail(f"{flag} {path}: a checkpoint of another version of {by or script()}.py ({differ}){instead}")
    if wrong := [name for name, hint in hints.items() if not fits(args[name], hint)]:
        fail(f"{flag} {path}: not a readable checkpoint ({wrong[0]} is {args[wrong[0]]!r})")
    return Args(**args)


def parse(Args, defaults: dict, one_process: bool = False):
    """Arguments from the command line, over the settings of the task, over those of the dataclass Args.

    `defaults` names settings by task ("ant"), task and engine ("ant on mujoco") or engine ("on gymnasium"); a task in a
    file has those of the task that it derives from. With --resume they are the run's own, of which a flag may change
    total_timesteps and capture_video only. Under torchrun the processes are connected, unless the script runs as one.
    """
    start()
    if one_process and ranks.WORLD > 1:
        fail("it runs as one process: start it without torchrun")
    for key, settings in defaults.items():
        if unknown := set(settings) - {f.name for f in fields(Args)}:
            fail(f'DEFAULTS["{key}"] sets {", ".join(sorted(unknown))}, which is no field of Args')
    argv = [a for a in sys.argv[1:] if a not in ("-h", "--help")]  # so that --help shows the task's settings
    args = cli(Args, args=argv)
    if args.resume is not None:
        default = replace(of_checkpoint(Args, "--resume", args.resume), resume=args.resume, stop_after=None)
        if is_file(default.env) and is_file(args.env):
            if default.env.split(":")[-1] != args.env.split(":")[-1]:
                fail(f"--env {args.env}: the run is on {default.env}; --init-from begins a new run with its networks")
            default = replace(default, env=args.env)  # the file may lie elsewhere now
        elif is_file(default.env):
            fail(f"--resume {args.resume}: a run on code in a file; if you trust that file: --env {quote(default.env)}")
    else:
        with one_line_errors():
            name = diffsim.settings_of(args.env)
            physics = args.physics or defaults.get(name, {}).get("physics") or diffsim.default_physics(args.env)
        settings: dict = {}
        for key in (f"on {physics}", name, f"{name} on {physics}"):
            settings |= defaults.get(key, {})
        default = replace(args, **settings | dict(physics=physics))
    final = cli(Args, default=default)
    if args.resume is not None:
        free = ("stop_after", "total_timesteps", "capture_video", "device")
        for key, value in vars(final).items():
            if key not in free and value != getattr(default, key):
                flag = f"--{key.replace('_', '-')}"
                fail(f"{flag} is {value}, the run has {getattr(default, key)}: resuming keeps its arguments")
    for name, hint in get_type_hints(Args, include_extras=True).items():
        if not fits(getattr(final, name), hint):
            kinds = "bool, int, float, str, None, Literal, tuples and lists of these"
            fail(f"Args.{name} is {getattr(final, name)!r}: a checkpoint holds flags of the types {kinds}")
    with one_line_errors():
        check_bounds(final)
        ranks.start(final.num_envs, final.device)
    if args.init_from is not None and args.resume is None:
        of_run = load(args.init_from, "--init-from")["args"]
        of_run = of_run if isinstance(of_run, dict) else {}  # what shapes do not say of networks:
        theirs = of_run.get("activation")
        if theirs not in (None, getattr(final, "activation", theirs)):
            fail(f"--init-from {args.init_from}: networks of another activation; they need --activation {theirs}")
        if getattr(final, "normalize_returns", False) and of_run.get("normalize_returns") is False:
            fail(f"--init-from {args.init_from}: its critics know plain returns; they need --no-normalize-returns")
    return final


def run_folder(path: str) -> Path:
    """Of a run folder or its checkpoint.pt."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def load(path: str, flag: str = "--resume", by: str | None = None) -> dict:
    """The checkpoint.pt of a run folder, of this script or the one named. Else the program ends with one line."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        if file.suffix == ".pt2":
            fail(f"{flag} {path}: a policy; what goes on is the run folder, or its checkpoint.pt")
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise FileNotFoundError
        checkpoint = torch.load(file, weights_only=True, map_location="cpu")
        if not isinstance(checkpoint, dict):
            raise TypeError
        writer, _ = checkpoint["script"], checkpoint["args"]
    except FileNotFoundError:
        fail(f"{flag} {path}: no checkpoint.pt there")
    except Exception as e:
        fail(f"{flag} {file}: not a readable checkpoint ({type(e).__name__})")
    if writer != (by or script()) and flag != "--init-from":  # networks either fit or do not
        more = "; that script goes on with it, --init-from takes its networks" if flag == "--resume" else ""
        fail(f"{flag} {path}: a checkpoint of {writer}.py{more}")
    return checkpoint
