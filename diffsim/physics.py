"""diffsim's physics for a fixed batch: compiled ahead of time once, kept on disk, loaded in milliseconds.

The two functions of a substep (forward, adjoint) are traced to graphs of elementwise operations and compiled by
TorchInductor into one small library each. Both are compiled at the same time, one in a child process. Without a
C++ compiler they run eagerly, slower by an order of magnitude, and say so once.
"""

import gc
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import astuple
from pathlib import Path

import mujoco
import numpy as np
import torch
import torch._inductor
from torch import Tensor
from torch._inductor.package import package_aoti
from torch.fx.experimental.proxy_tensor import make_fx

from diffsim.dynamics import Step, actuator_force, backward_substep, forward_substep
from diffsim.model import Model, Softness, build_model

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
}

KINDS = ("forward", "backward")
SOURCES = ("spatial", "contact", "kinematics", "forces", "articulated", "dynamics", "model", "physics")  # of the step


class DiffsimPhysics:
    """`step` holds a control for `substeps` of `model.timestep`; differentiable."""

    def __init__(self, model: Model, substeps: int, num_envs: int, compile: bool = True):
        self.model, self.substeps = model, substeps

        def forward(q, v, f):
            return forward_substep(model, q, v, f)

        def backward(*args):
            return backward_substep(model, *args)

        self.forward, self.backward = forward, backward
        if compile and compiler_available(model.device):
            self.forward, self.backward = load_or_build(model, num_envs)

    def step(self, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
        """(nq, B), (nv, B) and controls (nu, B) -> qpos, qvel after `substeps`."""
        qfrc = actuator_force(self.model, ctrl)
        return Step.apply(qpos, qvel, qfrc, self.forward, self.backward, self.substeps)


def compiler_available(device: torch.device) -> bool:
    """Whether the step can be compiled for `device`; warns (once, Python's default) where it cannot."""
    if device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"):
        return True
    warnings.warn("no C++ compiler (g++): physics runs uncompiled, about ten times slower", stacklevel=2)
    return False


def cache_dir() -> Path:
    return Path(os.environ.get("DIFFSIM_CACHE", Path.home() / ".cache" / "diffsim"))


def load_or_build(model: Model, num_envs: int):
    """The compiled forward and backward substep for this robot, batch, precision, device and thread count."""
    paths = {k: _path(model, num_envs, k) for k in KINDS}
    missing = [k for k in KINDS if not paths[k].exists()]
    if missing:
        start = time.time()
        print(
            f"compiling the physics for {num_envs} environments, once: one to three minutes",
            file=sys.stderr,
            flush=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            binary = os.path.join(folder, "model.mjb")
            mujoco.mj_saveModel(model.mj_model, binary)
            child = None
            if len(missing) > 1:  # the longer one in a process of its own
                args = [binary, repr(astuple(model.softness)), model.device, model.dtype, num_envs]
                command = [sys.executable, "-W", "ignore", "-m", "diffsim.physics", *map(str, args)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
                environment["PYTHONPATH"] = os.pathsep.join(
                    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
                )
                child = subprocess.Popen([*command, str(paths["backward"])], env=environment, start_new_session=True)
            try:
                _build(model, num_envs, missing[0], paths[missing[0]])
                if child is not None and child.wait():
                    raise RuntimeError("compiling the physics failed (see above); --no-compile runs without")
            finally:  # Ctrl-C reaches this process only: the child prints no traceback
                if child is not None and child.poll() is None:
                    os.killpg(child.pid, signal.SIGTERM)  # and its compiler
        print(f"compiled in {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    return [_load(paths[kind]) for kind in KINDS]


def compiled_batches(model: Model) -> list[int]:
    """Numbers of environments for which this robot's step is compiled and kept already, ascending."""
    found = (int(p.stem.split("-")[1]) for p in cache_dir().glob(f"{_key(model)}-*-forward.pt2"))
    return sorted(n for n in found if _path(model, n, "backward").exists())


def _path(model: Model, num_envs: int, kind: str) -> Path:
    return cache_dir() / f"{_key(model)}-{num_envs}-{kind}.pt2"


def _load(path: Path):
    """The function in a package: tensors in, tensors out, no graph."""
    run = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
    return lambda *inputs: run([x.contiguous() for x in inputs])


def _key(model: Model) -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.stem in SOURCES:
            digest.update(source.read_bytes())
    buffer = np.empty(mujoco.mj_sizeModel(model.mj_model), np.uint8)
    mujoco.mj_saveModel(model.mj_model, None, buffer)
    digest.update(buffer.tobytes())
    what = (model.softness, model.device, model.dtype, torch.get_num_threads(), torch.__version__)
    digest.update(repr((what, torch.backends.cpu.get_cpu_capability(), mujoco.__version__)).encode())
    return digest.hexdigest()[:20]


def _build(model: Model, num_envs: int, kind: str, path: Path):
    """Trace, compile, and move the package into place (two processes may race: the last one wins, both are right)."""

    def zeros(rows):
        return torch.zeros(rows, num_envs, device=model.device, dtype=model.dtype)

    qpos, qvel = zeros(model.nq), zeros(model.nv)
    function = {"forward": forward_substep, "backward": backward_substep}[kind]
    inputs = (
        qpos,
        qvel,
        zeros(model.nv),
        *((zeros(model.nv), zeros(model.nq), zeros(model.nv)) if kind == "backward" else ()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    gc.disable()  # half a million small objects that all live until the end
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = make_fx(lambda *x: function(model, *x))(*inputs)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            for node in graph.graph.nodes:  # shapes as traced; the compiler infers its own
                node.meta.clear()
            temporary = path.with_name(f"{path.stem}.{os.getpid()}.pt2")
            files = torch._inductor.aot_compile(graph, inputs, options={**INDUCTOR, "aot_inductor.package": True})
            package_aoti(str(temporary), files)
            os.replace(temporary, path)
    finally:
        gc.enable()


def _child(binary, softness, device, dtype, num_envs, path):
    import ast

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    mj_model = mujoco.MjModel.from_binary_path(binary)
    dtype = getattr(torch, dtype.removeprefix("torch."))
    model = build_model(mj_model, Softness(*ast.literal_eval(softness)), device, dtype)
    _build(model, int(num_envs), "backward", Path(path))


if __name__ == "__main__":
    _child(*sys.argv[1:])
