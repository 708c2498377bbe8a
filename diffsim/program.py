"""What a program does about Ctrl-C and closed pipes, which a library must leave alone.

`import diffsim` takes seconds and comes first in a program, so it asks `is_ours` and is quiet from there on.
"""

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path


def is_ours() -> bool:
    """Whether `python -m diffsim...` runs, or a script that has its flags from diffsim.flags: not a notebook."""
    if sys.argv[:1] == ["-m"]:  # until the module is found
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
        return module.split(".")[0] == "diffsim"
    file = getattr(sys.modules["__main__"], "__file__", None)
    with suppress(OSError):
        return bool(file) and b"\nfrom diffsim.flags import" in Path(file).read_bytes()
    return False


def tell(text: str):
    """A line on stderr from within a signal handler: print may have been interrupted, and `2>&1 | tee` be gone."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def end_at_once(*_):
    """Ctrl-C while modules are imported: some catch exceptions, and there is nothing to clean up."""
    tell("interrupted")
    os._exit(130)


def unwind(*_):
    """Ctrl-C after that: child processes and temporary files go, too. Again: at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    tell("interrupted")
    sys.exit(130)


def silence(failure):
    """TensorBoard's thread that cannot write tells the main thread, too, which says so in one line."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def start():
    """First call of a program's main: Ctrl-C is one line, `| head` none, and stdout may be closed."""
    signal.signal(signal.SIGINT, unwind)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # no traceback from Python's own cleaning up
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    threading.excepthook = silence
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))


def name_glfw():
    """MuJoCo imports glfw, which asks a child process for its version: that prints a traceback at Ctrl-C. A library
    that is named is not asked."""
    session = "wayland" if os.environ.get("XDG_SESSION_TYPE") == "wayland" else "x11"
    glfw = find_spec("glfw")
    library = Path(glfw.origin).parent / session / "libglfw.so" if glfw else Path()
    if library.is_file():
        os.environ.setdefault("PYGLFW_LIBRARY", str(library))


if is_ours():  # until start()
    signal.signal(signal.SIGINT, end_at_once)
    name_glfw()
