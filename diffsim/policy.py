"""policy.pt2: a policy as a program that needs no script, for other people's programs and, as plain data, for play.

The file is torch.export's. To load it with torch.export.load is to trust who made it: that function unpickles what the
archive asks it to, and evaluates its expressions. So the same graph stands in it a second time as plain data, lists of
names and numbers and the weights, and `read_policy` looks at nothing else: it can run PyTorch's core operations on
tensors, and no other code.
"""

import base64
import copy
import io
import logging
import operator
import os
import tempfile
import warnings
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ENTRY = "diffsim_policy"  # the plain data's name in the archive
LAYERS = [f"aten.{name}" for name in (  # as harmless, if not core: of the scripts' networks
    "linear.default", "layer_norm.default", "silu.default", "flatten.using_ints", "mv.default", "vdot.default",
    "chunk.default", "broadcast_tensors.default",
)]  # fmt: skip
WORDS = (torch.dtype, torch.memory_format, torch.layout)
# what sizes of a batch are reckoned with
PYTHON = {f.__name__: f for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)}
PROGRAMS: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # what policies were traced to, a second's work


def import_compiler():
    """Import what optimizers and torch.export need, without the empty folder torchinductor_<user> that it would leave:
    it is told to use the temporary folder itself, which exists."""
    unset = "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    import torch._dynamo.package
    import torch._inductor.compiler_bisector  # noqa: F401

    if unset:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]


@contextmanager
def evaluating(policy: nn.Module):
    """In eval mode, and back: dropout or batch norm in layers that the policy may share with training."""
    before = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def differences(theirs, own: dict) -> str:
    """What two state_dicts of a network do not share, the first few: "mean.0.weight is 64x5 there, 7x5 here"."""
    states = (state if isinstance(state, dict) else {} for state in (theirs, own))
    there, here = ({k: "x".join(map(str, getattr(x, "shape", ()))) for k, x in state.items()} for state in states)
    differ = [k for k in here | there if there.get(k) != here.get(k)]
    words = [f"{k} is {there.get(k, 'missing')} there, {here.get(k, 'missing')} here" for k in differ[:4]]
    return "; ".join(words + [f"and {len(differ) - 4} more"] * (len(differ) > 4)) or "not in shapes"


def write_policy(policy: nn.Module, obs_dim: int, device, file, **trained_on):
    """`policy`: obs (B, obs_dim) -> action (B, act_dim), for any B; `trained_on`: env, physics, stiffness, smoothing,
    as `diffsim.make` has them. Raises ValueError, one line, for a policy that is no graph of PyTorch's core operations
    (one that branches on the values of its tensors, say)."""
    obs, said, buffer = torch.linspace(-1, 1, 2 * obs_dim, device=device).view(2, obs_dim), io.StringIO(), io.BytesIO()
    import_compiler()
    logging.disable(logging.CRITICAL)  # torch tells of a failure in three ways before it raises
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings(), evaluating(policy):
            warnings.simplefilter("ignore")
            if policy not in PROGRAMS or not computes(PROGRAMS[policy], policy, obs):
                PROGRAMS[policy] = trace(policy, obs)
            program, core = PROGRAMS[policy]
            data = dict(graph=plain(core), obs_dim=obs_dim, env="", physics="") | trained_on
            Policy(data)(obs)
            torch.save(data, buffer)
            if obs.is_cuda:  # who has no GPU loads it, too
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(copy.deepcopy(program), "cpu")
            torch.export.save(program, file, extra_files={ENTRY: base64.b64encode(buffer.getvalue()).decode()})
    except OSError:
        raise
    except Exception as e:
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise ValueError(f"the policy cannot be exported, so nobody could play it: {reason}") from e
    finally:
        logging.disable(logging.NOTSET)


def trace(policy: nn.Module, obs: Tensor) -> tuple:
    """A policy as torch.export's program, which has the policy's own weights, and the same in core operations."""
    program = torch.export.export(policy, (obs,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    try:
        plain(program)
        return program, program
    except ValueError:  # takes half a second
        return program, program.run_decompositions()


@torch.no_grad()
def computes(programs: tuple, policy: nn.Module, obs: Tensor) -> bool:
    """Whether an earlier trace of a policy is still what it does: it may have changed in more than its weights."""
    core = Policy(dict(graph=plain(programs[1]), obs_dim=obs.shape[1], env="", physics=""))
    same = all(x is programs[0].state_dict.get(name) for name, x in policy.state_dict(keep_vars=True).items())
    return same and torch.allclose(core(obs), policy(obs), equal_nan=True)


def plain(program: torch.export.ExportedProgram) -> dict:
    """The graph as lists of names and numbers: weights by name, nodes (name, operation, args, kwargs), the output.

    Raises ValueError for an operation that `operation` does not know.
    """
    tensors = {**program.state_dict, **program.constants}
    kept = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    weights, nodes, output, obs = {}, [], None, None

    def data(x):
        if isinstance(x, torch.fx.Node):
            return {"node": x.name}
        if isinstance(x, WORDS):
            return {"torch": str(x).removeprefix("torch.")}
        if isinstance(x, torch.device):
            return {"device": "of obs"}
        return [data(y) for y in x] if isinstance(x, (list, tuple)) else x

    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in kept and node.users:
                weights[node.name] = tensors[kept[node.name]].detach().cpu()
            elif node.name not in kept:
                obs = node.name
        elif node.op == "output":
            ((output,),) = node.args
        elif node.users:  # what none uses are assertions
            op = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
            operation(op)
            nodes.append((node.name, op, data(node.args), {k: data(v) for k, v in node.kwargs.items()}))
    return dict(weights=weights, nodes=nodes, obs=obs, output=output.name)


def operation(name: str):
    """The operation of that name, if it is one of PyTorch's core operations: mathematics on tensors, no files. Those
    that write into a tensor, those of a backward pass and _embedding_bag do not all check where they read and write."""
    if name in PYTHON:
        return PYTHON[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    core = namespace == "aten" and isinstance(found, torch._ops.OpOverload)
    core = core and (torch.Tag.core in found.tags or name in LAYERS)
    if not core or found._schema.is_mutable or packet.endswith("_backward") or packet == "_embedding_bag":
        raise ValueError(f"{name} is none of PyTorch's core operations of a forward pass")
    return found


def word(name: str):
    """torch.float32, torch.contiguous_format and the like, which torch.load does not read."""
    found = getattr(torch, name)
    if not isinstance(found, WORDS):
        raise ValueError(f"torch.{name} is not a type of numbers or a layout")
    return found


class Policy(nn.Module):
    """obs (B, obs_dim) -> action (B, act_dim), and what it was trained on: `env`, `physics`, `obs_dim`, `softness`."""

    def __init__(self, data: dict):
        super().__init__()
        self.env, self.physics, self.obs_dim = data["env"], data["physics"], data["obs_dim"]
        self.softness = {k: x for k in ("stiffness", "smoothing") if (x := data.get(k)) is not None}
        graph = data["graph"]
        self.weights, self.obs, self.output = dict(graph["weights"]), graph["obs"], graph["output"]
        if not all(type(w) is Tensor and w.layout == torch.strided and not w.is_nested for w in self.weights.values()):
            raise ValueError("its weights are no plain tensors")
        self.nodes = [(name, operation(op), args, kwargs) for name, op, args, kwargs in graph["nodes"]]

    def forward(self, obs: Tensor) -> Tensor:
        values = {**{k: w.to(obs.device) for k, w in self.weights.items()}, self.obs: obs}

        def value(x):
            if isinstance(x, dict):
                return values[x["node"]] if "node" in x else obs.device if "device" in x else word(x["torch"])
            return [value(y) for y in x] if isinstance(x, list) else x

        try:
            for name, run, args, kwargs in self.nodes:
                values[name] = run(*map(value, args), **{k: value(v) for k, v in kwargs.items()})
            action = values[self.output]
        except Exception as e:
            raise ValueError(f"the policy fails on {len(obs)} observations: {type(e).__name__}") from e
        if not isinstance(action, Tensor) or not action.is_floating_point():
            raise ValueError("the policy's action is no tensor of real numbers")
        return action


def read_policy(path) -> Policy:
    """The policy of a run folder or a policy.pt2. Raises ValueError, one line. Runs no code of the file's."""
    path = Path(path)
    path = path / "policy.pt2" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no policy at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = [entry for entry in archive.infolist() if entry.filename.endswith(f"/extra/{ENTRY}")]
            if entry and entry[0].file_size > path.stat().st_size:
                raise ValueError("it is compressed, as no file of diffsim is: it may be too large for the memory")
            packed = base64.b64decode(archive.read(entry[0])) if entry else None
        if packed is None:
            raise ValueError("it holds no plain data: no policy.pt2, or another program's, or an older diffsim's")
        data = torch.load(io.BytesIO(packed), weights_only=True, map_location="cpu")
        policy = Policy(data)
        if not all(isinstance(x, str) and x.isprintable() and len(x) < 4096 for x in (policy.env, policy.physics)):
            raise ValueError("the names in it are no names")
        if type(policy.obs_dim) is not int or not all(type(x) in (int, float) for x in policy.softness.values()):
            raise TypeError
        if not policy(torch.zeros(2, policy.obs_dim)).isfinite().all():
            raise ValueError("its action is not finite")
    except Exception as e:
        reason = " ".join(str(e).split())[:100] if type(e) is ValueError else type(e).__name__
        raise ValueError(f"{path} is not a readable policy ({reason})") from None
    return policy
