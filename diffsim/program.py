"""What a program does about Ctrl-C and closed pipes, which a library must leave alone.

The first import of a program: `import diffsim` takes seconds. So little is imported here before Ctrl-C is handled.
"""

import atexit
import os
import signal
import sys

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # which starts several processes
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # the first of them speaks for all
told = False  # that it is interrupted


def is_ours() -> bool:
    """Whether `python -m diffsim...` runs, or a script that has its flags from diffsim.flags: not a notebook."""
    if sys.argv[:1] == ["-m"]:  # until the module is found
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
        return module.split(".")[0] == "diffsim"
    try:
        with open(sys.modules["__main__"].__file__, "rb") as file:
            return b"\nfrom diffsim.flags import" in file.read()
    except (AttributeError, TypeError, OSError):  # no file
        return False


def tell(text: str, number=signal.SIGINT):
    """A line on stderr from within a signal's handler: print may have been interrupted, and `2>&1 | tee` be gone.
    SIGTERM is torchrun's, when another process has ended and said why."""
    global told
    told = True
    if TORCHRUN and (RANK or number != signal.SIGINT):
        return
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:
        pass


def printable(text: str) -> str:
    """One line for a terminal: a name in a stranger's file may hold line ends and control sequences, or be endless."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:2000])


def end_at_once(*_):
    """Ctrl-C while modules are imported: some catch exceptions, and there is nothing to clean up."""
    tell("interrupted")
    os._exit(130)


def name_glfw():
    """MuJoCo imports glfw, which asks a child process for its version: that prints a traceback at Ctrl-C. A library
    that is named is not asked."""
    from importlib.util import find_spec

    session = "wayland" if os.environ.get("XDG_SESSION_TYPE") == "wayland" else "x11"
    glfw = find_spec("glfw")
    library = os.path.join(os.path.dirname(glfw.origin), session, "libglfw.so") if glfw else ""
    if os.path.isfile(library):
        os.environ.setdefault("PYGLFW_LIBRARY", library)


def unwind(number, *_):
    """Ctrl-C after that, or SIGTERM: child processes and temporary files go, too. Again: at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    tell("interrupted", number)
    sys.exit(128 + number)


def silence(failure):
    """TensorBoard's thread that cannot write tells the main thread, too, which says so in one line."""
    import threading

    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def start():
    """First call of a program's main: Ctrl-C is one line, `| head` none, and stdout may be closed."""
    import threading

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, unwind)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # no traceback from Python's own cleaning up
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    threading.excepthook = silence
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a folder's name, where the terminal has ASCII only


if is_ours():
    signal.signal(signal.SIGINT, end_at_once)  # until start()
    name_glfw()
