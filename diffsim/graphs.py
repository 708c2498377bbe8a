"""Functions of tensors compiled by torch.compile, gradients inside, kept on disk; spectral normalisation for them."""

import os
import sys
import warnings

import torch

from diffsim import program
from diffsim.physics import cache_dir, compiler_error


def compiler(wanted: bool):
    """A decorator: of a function that takes and returns tensors of fixed shapes, and may call torch.autograd.grad, it
    makes one graph at the first call. Where it cannot be compiled it runs as it is, and a line says so once."""
    error = compiler_error() if wanted else None
    slow = "the updates run uncompiled, at half the speed (--no-compile silences this)"
    if error:
        warnings.warn(f"{error}: {slow}", stacklevel=2)
    if error or not wanted:
        return lambda function: function
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "updates"))
    torch._dynamo.config.trace_autograd_ops = True
    torch._inductor.config.compile_threads = 1
    # Networks and optimisers stay what they are: only what a function is given is checked at each call.
    unchecked = torch.compiler.skip_guard_on_globals_unsafe
    options = {"cpp_wrapper": True, "fallback_random": True, "guard_filter_fn": unchecked}

    def compiled(function):
        run = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        new = True

        def call(*inputs):
            nonlocal run, new
            if new:
                name = function.__name__.replace("<lambda>", "a function")
                print(f"compiling {name}: the first time up to a minute or two", file=sys.stderr, flush=True)
                new = False
            try:
                return run(*inputs)
            except torch._dynamo.exc.TorchDynamoException as e:
                if not program.told:  # Ctrl-C ends the C++ compiler, too
                    warnings.warn(f"{str(e).partition(chr(10))[0]}: {slow}", stacklevel=2)
                run = function
                return run(*inputs)

        return call

    return compiled


@torch.no_grad()
def update_spectral_norm(net: torch.nn.Sequential):
    """Power iterations on weights that have changed; at other times (eval mode) u and v of the estimate stay, so that
    a weight is the same number wherever a graph uses it."""
    for layer in filter(torch.nn.utils.parametrize.is_parametrized, net.train()):
        layer.weight  # noqa: B018  computing it iterates
    net.eval()
