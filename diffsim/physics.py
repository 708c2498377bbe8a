"""diffsim's physics: the step of a robot, compiled once, kept on disk, loaded in milliseconds.

codegen.py writes it as C++, of which the compiler here makes a library, or CUDA for PyTorch's own compiler, NVRTC. It
serves any number of environments. Where the compiler is missing or fails the step runs eagerly, tens of times slower,
and says so once.

In the cache a robot and precision have a folder; while it is made it ends in .build, holds all temporary files, and its
.lock is held. A build that was killed has let go of its lock: the next process removes it.
"""

import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import mujoco
import numpy as np
import torch
from torch import Tensor

from diffsim.codegen import generate
from diffsim.dynamics import Eager, Step, check_rows
from diffsim.model import Model

SOURCES = (  # of the step
    "spatial.py", "contact.py", "kinematics.py", "forces.py", "pairs.py", "articulated.py", "dense.py", "dynamics.py",
    "model.py", "builder.py", "collisions.py", "mjcf.py", "physics.py", "codegen.py", "step.cpp",
)  # fmt: skip
# As imported: a file may be edited while this process runs.
SOURCE = hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in SOURCES))
KINDS = ("forward", "backward")
THREADS = 64  # of a GPU's block
UNCOMPILED: set[Path] = set()  # what this process could not compile
STEPS = ("writing out its equations", "compiling them")
# Vector registers in bytes, and the compiler's flags, by what PyTorch found in this processor.
VECTORS = {"AVX512": (64, "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma"), "AVX2": (32, "-mavx2 -mfma -mf16c")}


class CacheError(ValueError):
    """The compiled step cannot be kept."""


class DiffsimPhysics:
    """`step` holds a control for `substeps` of `model.timestep`; differentiable."""

    def __init__(self, model: Model, substeps: int, compile: bool = True):
        self.model, self.substeps = model, substeps
        self.engine = (load_or_build(model) if compile else None) or Eager(model)

    def step(self, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
        """(nq, B), (nv, B) and controls (nu, B) -> qpos, qvel after `substeps`. Raises ValueError for other shapes."""
        m = self.model
        check_rows(m, qpos=(qpos, m.nq), qvel=(qvel, m.nv), ctrl=(ctrl, m.nu))  # C++ would read elsewhere
        return Step.apply(qpos, qvel, ctrl, self.engine, self.substeps)


class Compiled:
    """`Eager`'s two functions, from a folder of the cache."""

    def __init__(self, model: Model, folder: Path):
        self.model = model
        if model.device.type == "cuda":
            from torch.cuda._utils import _cuda_load_module

            with torch.cuda.device(model.device):
                self.kernels = _cuda_load_module((folder / "step.cubin").read_bytes(), list(KINDS))
        else:
            self.library = ctypes.CDLL(str(folder / "step.so"))

    def _run(self, kind: str, arrays: list[Tensor], substeps: int, batch: int):
        if self.model.device.type == "cuda":
            with torch.cuda.device(self.model.device):
                arrays[-1].zero_()  # an output: only an operation of torch's binds the GPU to a thread of autograd's
                self.kernels[kind]((-(-batch // THREADS), 1, 1), (THREADS, 1, 1), [*arrays, int(substeps), batch])
        else:
            pointers = (ctypes.c_void_p(x.data_ptr()) for x in arrays)
            getattr(self.library, kind)(*pointers, ctypes.c_int(substeps), ctypes.c_int(batch))

    def forward(self, qpos: Tensor, qvel: Tensor, ctrl: Tensor, substeps: int):
        m, batch = self.model, qpos.shape[1]
        inputs = [x.to(m.dtype).contiguous() for x in (qpos, qvel, ctrl)]
        outputs = [inputs[0].new_empty(*shape, batch) for shape in ((substeps, m.nq + m.nv), (m.nq,), (m.nv,))]
        self._run("forward", [*inputs, *outputs], substeps, batch)
        return outputs

    def backward(self, states: Tensor, *inputs: Tensor):
        inputs = [x.to(self.model.dtype).contiguous() for x in inputs]
        outputs = [states.new_empty(rows, states.shape[2]) for rows in (self.model.nq, self.model.nv, self.model.nu)]
        self._run("backward", [states, *inputs, *outputs], len(states), states.shape[2])
        return outputs


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


def load_or_build(model: Model) -> Compiled | None:
    """The compiled step of this robot, in its precision and on its device.

    None, with a warning, where it cannot be compiled. Raises CacheError, one line, where it cannot be kept.
    """
    entry = cache_dir() / _key(model)
    if entry in UNCOMPILED:
        return None
    try:
        for folder in entry.parent.glob("*.build"):
            with suppress(OSError), _locked(folder, wait=False):
                shutil.rmtree(folder)
        if engine := _load(model, entry):
            return engine
        with _locked(entry):
            if engine := _load(model, entry):  # another process has built it meanwhile
                return engine
            if error := (model.device.type == "cpu" and compiler_error()) or _build(model, entry):
                UNCOMPILED.add(entry)
                slow = "physics runs uncompiled, tens of times slower"
                warnings.warn(f"{error}: {slow} (--no-compile silences this)", stacklevel=3)
                return None
            return _load(model, entry)
    except OSError as e:
        raise cannot_keep(entry.parent, e) from None


def _compiler() -> str:
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compiler_error() -> str | None:
    """What is wrong with the C++ compiler, in one line."""
    compiler = _compiler()
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


def _build(model: Model, entry: Path) -> str | None:
    """Compile the step into the folder `entry`; returns what went wrong, in one line. Its lock is held."""
    work, cuda = entry.with_suffix(".build"), model.device.type == "cuda"
    temporary, start = work / "temporary", time.time()

    def report(step: int):
        print(f"step {step + 1} of {len(STEPS)}: {STEPS[step]}", file=sys.stderr, flush=True)

    print("compiling the physics of this robot and softness, once: up to a minute", file=sys.stderr, flush=True)
    try:
        temporary.mkdir(parents=True)
        report(0)
        try:
            files = generate(model, cuda)
        except NotImplementedError as e:
            return f"compiling the physics failed ({e})"
        report(1)
        if error := _compile_cuda(files[0], model, work) if cuda else _compile(files, model, temporary, work):
            return f"compiling the physics failed{error}"
        shutil.rmtree(temporary)
        (work / "sha256").write_text(_digest(work))
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
        os.replace(work, entry)
        entry.with_suffix(".lock").unlink()  # who waits for it finds the folder
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"compiled in {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    return None


def _compile(files: list[str], model: Model, temporary: Path, work: Path) -> str | None:
    """A library of C++ files, as many at a time as there are cores; returns the compiler's complaint, in brackets."""
    capability, root = torch.backends.cpu.get_cpu_capability(), Path(torch.__file__).parent
    capability = capability if capability in VECTORS else "DEFAULT"
    size, flags = VECTORS.get(capability, (32, ""))
    command = [_compiler(), *f"-std=c++20 -O1 -fPIC -w {flags}".split(), f"-DLANES={size // model.dtype.itemsize}"]
    command += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", "-I", str(root / "include")]
    names, waiting, running = [temporary / f"{i}.cpp" for i in range(len(files))], [], []
    for name, text in zip(names, files):
        name.write_text(text)
        waiting.append([*command, "-c", str(name), "-o", str(name.with_suffix(".o"))])
    link = [_compiler(), "-shared", *(str(x.with_suffix(".o")) for x in names), "-o", str(work / "step.so")]
    link += ["-L", str(root / "lib"), "-ltorch_cpu", "-lc10"]

    def begin(command):
        with open(temporary / "log", "ab") as log:
            how = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(temporary)})
            running.append(subprocess.Popen(command, start_new_session=True, **how))  # Ctrl-C is ours

    try:
        waiting.reverse()  # the longest first: the last one, with PyTorch's headers
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                begin(waiting.pop(0))
            for process in [x for x in running if x.poll() is not None]:
                if process.returncode:
                    return _reason(process, (temporary / "log").read_text(errors="replace"))
                running.remove(process)
            time.sleep(0.01)
            if link and not waiting and not running:
                waiting, link = [link], None
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None


def _compile_cuda(file: str, model: Model, work: Path) -> str | None:
    """The kernels of a CUDA file, by the compiler that comes with PyTorch."""
    import torch.utils.cpp_extension as toolkit
    from torch.cuda._utils import _nvrtc_compile

    toolkit.CUDA_HOME = toolkit.CUDA_HOME or "/usr"  # torch looks for CUDA's headers, of which nothing is included
    try:
        with torch.cuda.device(model.device):
            binary, _ = _nvrtc_compile(file, KINDS[0])  # it holds both
    except (RuntimeError, OSError) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        return f" ({next((x for x in lines if 'error' in x), lines[-1])[:160]})"
    (work / "step.cubin").write_bytes(binary)
    return None


def _load(model: Model, entry: Path) -> Compiled | None:
    """The step in a folder. None if there is none, or a damaged one."""
    if not entry.exists():
        return None
    try:
        if _digest(entry) != (entry / "sha256").read_text():
            raise ValueError
    except (OSError, ValueError):
        print(f"{entry} is damaged: compiled again", file=sys.stderr, flush=True)
        return None
    return Compiled(model, entry)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(x for x in folder.iterdir() if x.name != "sha256"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _key(model: Model) -> str:
    digest = SOURCE.copy()
    binary = np.empty(mujoco.mj_sizeModel(model.mj_model), np.uint8)
    mujoco.mj_saveModel(model.mj_model, None, binary)
    digest.update(binary.tobytes())
    device, on = model.device.type, torch.backends.cpu.get_cpu_capability()
    if device == "cuda" and torch.cuda.is_available():
        on = torch.cuda.get_device_capability(model.device)  # all GPUs of a kind share an entry
    what = (model.softness, model.collisions, device, on, model.dtype, torch.__version__, mujoco.__version__)
    digest.update(repr(what).encode())
    return digest.hexdigest()[:20]
