"""diffsim's physics for a fixed batch: compiled ahead of time once, kept on disk, loaded in milliseconds.

The two functions of a substep (forward, adjoint) are traced to graphs of elementwise operations and compiled by
TorchInductor into one small library each, at the same time, in a child process each. Where the C++ compiler is missing
or fails they run eagerly, slower by an order of magnitude, and say so once.

In the cache a robot, precision, thread count and batch have a folder; while it is made it ends in .build, holds all
temporary files, and its .lock is held. A build that was killed has let go of its lock: the next process removes it.
"""

import ast
import gc
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path

import mujoco
import numpy as np
import torch
from torch import Tensor

from diffsim.builder import build_model
from diffsim.dynamics import Step, actuator_force, backward_substep, forward_substep
from diffsim.model import Model, Softness

# Thousands of scalar operations, each used a few times: keep every value instead of recomputing it in each user,
# fuse them into few large loops, and do not search for patterns that are not there. Halves the time to compile.
INDUCTOR = {
    "realize_reads_threshold": 1,
    "max_fusion_size": 256,
    "max_fusion_buffer_group_pairwise_attempts": 4,
    "loop_ordering_after_fusion": False,
    "pattern_matcher": False,
    "cpp.enable_tiling_heuristics": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,  # they take longer than two libraries can save
}

KINDS = ("forward", "backward")
SOURCES = (  # of the step
    "spatial", "contact", "kinematics", "rows", "forces", "pairs", "articulated", "dense", "dynamics", "model",
    "builder", "collisions", "mjcf", "physics",
)  # fmt: skip
UNCOMPILED: set[Path] = set()  # what this process could not compile
STEPS = ("writing out its equations", "turning them into loops", "compiling the C++")
CHILD = """import os, signal, sys, threading  # ends with its parent, even while torch is imported
threading.Thread(target=lambda: sys.stdin.read() or os.killpg(0, signal.SIGKILL), daemon=True).start()
from diffsim.physics import _child
_child(*sys.argv[1:])"""


class CacheError(ValueError):
    """The compiled step cannot be kept."""


class DiffsimPhysics:
    """`step` holds a control for `substeps` of `model.timestep`; differentiable."""

    def __init__(self, model: Model, substeps: int, num_envs: int, compile: bool = True):
        self.model, self.substeps = model, substeps

        def forward(q, v, f):
            return forward_substep(model, q, v, f)

        def backward(*args):
            return backward_substep(model, *args)

        self.forward, self.backward = forward, backward
        if compile and (compiled := load_or_build(model, num_envs)):
            self.forward, self.backward = compiled

    def step(self, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
        """(nq, B), (nv, B) and controls (nu, B) -> qpos, qvel after `substeps`."""
        qfrc = actuator_force(self.model, ctrl)
        return Step.apply(qpos, qvel, qfrc, self.forward, self.backward, self.substeps)


def cache_dir() -> Path:
    """Where compiled physics is kept. It is machine code: raises CacheError if others own it or may write there."""
    path = Path(os.environ.get("DIFFSIM_CACHE") or Path.home() / ".cache" / "diffsim").absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as e:
        raise cannot_keep(path, e) from None
    if hasattr(os, "getuid"):
        if found.st_uid != os.getuid():
            raise CacheError(f"compiled physics is machine code and {path} is another user's: set DIFFSIM_CACHE")
        if found.st_mode & 0o022:
            raise CacheError(f"compiled physics is machine code and others may write to {path}: chmod 700 {path}")
    return path


def cannot_keep(path: Path, error: Exception) -> CacheError:
    why = getattr(error, "strerror", None) or str(error).splitlines()[0]
    where = f"compiled physics cannot be kept in {path}: {why}"
    return CacheError(f"{where}; set DIFFSIM_CACHE to another folder, or use --no-compile")


def load_or_build(model: Model, num_envs: int):
    """The compiled forward and backward substep for this robot, batch, precision, device and thread count.

    None, with a warning, where they cannot be compiled. Raises CacheError, one line, where they cannot be kept.
    """
    entry = cache_dir() / f"{_key(model)}-{num_envs}"
    if entry in UNCOMPILED:
        return None
    try:
        for folder in entry.parent.glob("*.build"):
            with suppress(OSError), _locked(folder, wait=False):
                shutil.rmtree(folder)
        if functions := _load(entry, model.device):
            return functions
        with _locked(entry):
            if functions := _load(entry, model.device):  # another process has built it meanwhile
                return functions
            if error := compiler_error() or _build(model, num_envs, entry):
                UNCOMPILED.add(entry)
                slow = "physics runs uncompiled, about ten times slower"
                warnings.warn(f"{error}: {slow} (--no-compile silences this)", stacklevel=3)
                return None
            return _load(entry, model.device)
    except (OSError, RuntimeError) as e:
        raise cannot_keep(entry.parent, e) from None


def compiled_batches(model: Model) -> list[int]:
    """Numbers of environments for which this robot's step is compiled and kept already, ascending."""
    key = _key(model)
    return sorted(int(p.name.removeprefix(f"{key}-")) for p in cache_dir().glob(f"{key}-*") if not p.suffix)


def compiler_error() -> str | None:
    """What is wrong with the C++ compiler, in one line."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler})"
    command = [compiler, "-x", "c++", "-", "-fsyntax-only"]
    try:
        tried = subprocess.run(command, input="#include <cmath>", capture_output=True, text=True, errors="replace")
    except OSError as e:  # such as an empty file
        return f"the C++ compiler {compiler} cannot be run ({e.strerror})"
    return f"the C++ compiler {compiler} fails{_reason(tried)}" if tried.returncode else None


def _reason(process, said: str | None = None) -> str:
    """Why a process failed, in brackets: the line of its output that speaks of an error, or the last, or its signal."""
    lines = [x.strip() for x in (process.stderr if said is None else said).splitlines() if x.strip()]
    if process.returncode < 0:
        lines = [f"killed by {signal.Signals(-process.returncode).name}"]
    found = [x for x in lines if "error" in x.lower()] or lines
    return f" ({found[-1][:160]})" if found else f" (it returned {process.returncode})"


@contextmanager
def _locked(folder: Path, wait: bool = True):
    """Hold the lock of a cached folder, which the system frees when a process dies. Raises BlockingIOError."""
    import fcntl  # not on Windows

    with open(folder.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            print("waiting for another process, which compiles the same physics", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(model: Model, num_envs: int, entry: Path) -> str | None:
    """Compile both functions into the folder `entry`; returns what went wrong, in one line. Its lock is held."""
    work = entry.with_suffix(".build")
    temporary, start = work / "temporary", time.time()
    print(f"compiling the physics for {num_envs} environments, once: one to three minutes", file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment |= dict.fromkeys(("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"), str(temporary))
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    arguments = [
        repr(astuple(model.softness)),
        str(model.device),
        str(model.dtype),
        repr(model.collisions),
        str(num_envs),
    ]
    children: list[subprocess.Popen] = []
    try:
        temporary.mkdir(parents=True)
        (temporary / "model.mjb").write_bytes(_binary(model))
        for kind in KINDS:
            command = [sys.executable, "-W", "ignore", "-c", CHILD, str(work / kind), *arguments]
            with open(temporary / f"{kind}.log", "w") as log:
                how = dict(stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)  # Ctrl-C is ours
                children.append(subprocess.Popen(command, env=environment, **how))
        _report(work, children)
        for kind, child in zip(KINDS, children):
            if child.wait():
                said = (temporary / f"{kind}.log").read_text(errors="replace")
                return f"compiling the physics failed{_reason(child, said)}"
        shutil.rmtree(temporary)
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
        os.replace(work, entry)
        entry.with_suffix(".lock").unlink()  # who waits for it finds the functions
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        shutil.rmtree(work, ignore_errors=True)
    print(f"compiled in {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    return None


def _report(work: Path, children: list[subprocess.Popen]):
    """Wait until the children have ended, or one has failed, and say what they have come to."""
    reached = 0
    while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
        traced = all((work / kind).exists() for kind in KINDS)
        generated = sum(1 for _ in (work / "temporary").rglob("*.kernel.cpp")) == len(KINDS)
        for step in range(reached, 1 + traced + generated):
            print(f"step {step + 1} of {len(STEPS)}: {STEPS[step]}", file=sys.stderr, flush=True)
        reached = max(reached, 1 + traced + generated)
        time.sleep(0.2)


def _load(entry: Path, device: torch.device):
    """The functions in a folder: tensors in, tensors out, no graph. None if there are none, or damaged ones."""
    if not entry.exists():
        return None
    try:
        if any(_digest(entry / kind) != (entry / f"{kind}.sha256").read_text() for kind in KINDS):
            raise ValueError
    except (OSError, ValueError):
        print(f"{entry} is damaged: compiled again", file=sys.stderr, flush=True)
        return None
    return [_function(entry / kind, device) for kind in KINDS]


def _function(folder: Path, device: torch.device):
    """Of the library in a folder, which is not copied to the temporary folder, as that of a package would be."""
    library = str(folder / "step.so")
    if device.type == "cuda":
        run = torch._C._aoti.AOTIModelContainerRunnerCuda(library, 1, str(device), str(folder)).run
    else:
        run = torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1).run
    return lambda *inputs: run([x.contiguous() for x in inputs])


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _binary(model: Model) -> bytes:
    buffer = np.empty(mujoco.mj_sizeModel(model.mj_model), np.uint8)
    mujoco.mj_saveModel(model.mj_model, None, buffer)
    return buffer.tobytes()


def _key(model: Model) -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.stem in SOURCES:
            digest.update(source.read_bytes())
    digest.update(_binary(model))
    what = (model.softness, model.collisions, model.device.type, model.dtype)
    what += (torch.get_num_threads(), torch.__version__)
    digest.update(repr((what, torch.backends.cpu.get_cpu_capability(), mujoco.__version__)).encode())
    return digest.hexdigest()[:20]


# --- in a child process -------------------------------------------------------------------------------------------
def _compile(model: Model, num_envs: int, folder: Path):
    """Trace and compile the function that the folder is named after, and leave the library there."""
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    def zeros(rows):
        return torch.zeros(rows, num_envs, device=model.device, dtype=model.dtype)

    function = {"forward": forward_substep, "backward": backward_substep}[folder.name]
    inputs = [zeros(rows) for rows in (model.nq, model.nv, model.nv)]
    if folder.name == "backward":
        inputs += [zeros(rows) for rows in (model.nv, model.nq, model.nv)]
    gc.disable()  # half a million small objects that all live until the end
    graph = make_fx(lambda *x: function(model, *x))(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    for node in graph.graph.nodes:  # shapes as traced; the compiler infers its own
        node.meta.clear()
    folder.mkdir()  # says that the function is traced
    for file in torch._inductor.aot_compile(graph, tuple(inputs), options={**INDUCTOR, "aot_inductor.package": True}):
        if isinstance(file, str) and not file.endswith((".cpp", ".json")):  # on a GPU there are its kernels, too
            shutil.copy(file, folder / ("step.so" if file.endswith(".so") else Path(file).name))
    folder.with_suffix(".sha256").write_text(_digest(folder))


def _child(folder, softness, device, dtype, collisions, num_envs):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    mj_model = mujoco.MjModel.from_binary_path(str(Path(folder).parent / "temporary" / "model.mjb"))
    dtype = getattr(torch, dtype.removeprefix("torch."))
    model = build_model(mj_model, Softness(*ast.literal_eval(softness)), device, dtype, collisions == "True")
    _compile(model, int(num_envs), Path(folder))
