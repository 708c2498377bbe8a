"""What the machine does: the compiler, the disk, memory, kills. Nothing is compiled here."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import diffsim
from diffsim import codegen, memory, physics
from diffsim.flags import explain
from diffsim.play import playback_env
from tests import ROOT, SCRIPTS, WINDOWS, run_script, the_run


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """A run limits its process's memory and has an excepthook."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limit)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(physics, "UNCOMPILED", set())
    return tmp_path / "cache"


def program(path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n" if text else "")
    path.chmod(0o755)
    return str(path)


def uncompiled(env) -> bool:
    env.reset()
    return bool(torch.isfinite(env.step(torch.zeros(2, 1))[0]).all())


# --- the compiler -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "compiler, message",
    [
        ("exit 7", r"the C\+\+ compiler \S+ fails \(it returned 7\)"),
        ("echo 'g++: fatal error: no cmath' >&2; echo >&2; exit 1", r"fails \(g\+\+: fatal error: no cmath\)"),
        ("kill -9 $$", r"fails \(killed by SIGKILL\)"),
        ("", r"\S+ cannot be run \(Exec format error\)"),
        (None, r"no C\+\+ compiler \(/nonsense\)"),
    ],
)
def test_a_compiler_that_does_not_work_is_one_line_once(compiler, message, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonsense" if compiler is None else program(tmp_path / "g++", compiler))
    with pytest.warns(UserWarning, match=f"{message}: physics runs uncompiled, tens of times slower") as said:
        assert uncompiled(diffsim.make("cartpole", 2)) and uncompiled(diffsim.make("cartpole", 2))
    assert len(said) == 1 and "\n" not in str(said[0].message) and not list(cache.glob("*.build"))


@pytest.mark.parametrize(
    "fails, message",
    [("echo a; echo 'X: error: b' >&2; echo c; exit 1", r"\(X: error: b\)"), ("kill -9 $$", r"\(killed by SIGKILL\)")],
)
def test_a_compilation_that_fails_is_one_line(fails, message, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(physics, "compiler_error", lambda: None)
    monkeypatch.setenv("CXX", program(tmp_path / "g++", fails))
    with pytest.warns(UserWarning, match=f"compiling the physics failed {message}: physics runs uncompiled"):
        assert uncompiled(diffsim.make("cartpole", 2))
    assert not list(cache.glob("*.build"))


def test_an_operation_that_codegen_lacks_is_one_line(cache, monkeypatch):
    monkeypatch.setattr(physics, "compiler_error", lambda: None)
    known = codegen.operations
    monkeypatch.setattr(codegen, "operations", lambda e: {k: v for k, v in known(e).items() if k != "sin"})
    with pytest.warns(UserWarning, match=r"failed \(no C\+\+ for torch's operation sin\): physics runs uncompiled"):
        assert uncompiled(diffsim.make("cartpole", 2))


# --- the cache ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["/proc/x", "file", "file/below"])
def test_a_cache_that_cannot_be_written_is_one_line(where, tmp_path, refused, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFSIM_CACHE", str(tmp_path / where))
    args = ["--env", "cartpole", "--num-envs", 3, "--run-dir", tmp_path]
    assert f"cannot be kept in {tmp_path / where}: " in (said := refused("shac.py", *args)) and "DIFFSIM_CACHE" in said


def test_an_empty_name_of_the_cache_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSIM_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert physics.cache_dir() == tmp_path / ".cache" / "diffsim"  # not the current folder


def test_play_needs_no_cache(monkeypatch):
    monkeypatch.setenv("DIFFSIM_CACHE", "/proc/x")
    assert playback_env("cartpole", 2).num_envs == 2


def test_a_cache_that_cannot_be_written_is_one_line_where_mujoco_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFSIM_CACHE", "/proc/x")
    env = diffsim.make("cartpole", 2, physics="mujoco")
    env.reset()
    with pytest.raises(physics.CacheError) as error:
        env.step(torch.zeros(2, 1, requires_grad=True))
    explain(type(error.value), error.value, None)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_all_gpus_of_a_machine_share_an_entry():
    model = diffsim.make("cartpole", 2, compile=False).model
    assert physics._key(replace(model, device=torch.device("cuda:0"))) == physics._key(
        replace(model, device=torch.device("cuda", 1))
    )


@pytest.mark.parametrize("damage", ["empty file", "text", "empty folder", "cut off"])
def test_a_damaged_entry_is_compiled_again(damage, cache, monkeypatch, capfd):
    env = diffsim.make("cartpole", 2, compile=False)
    entry = cache / physics._key(env.model)
    cache.mkdir()
    if damage in ("empty file", "text"):
        entry.write_text("nothing" * (damage == "text"))
    else:
        entry.mkdir()
    if damage == "cut off":
        (entry / "step.so").write_bytes(b"whole")
        (entry / "sha256").write_text(physics._digest(entry))
        (entry / "step.so").write_bytes(b"who")
    built = []
    monkeypatch.setattr(physics, "compiler_error", lambda: None)
    monkeypatch.setattr(physics, "_build", lambda model, entry: built.append(entry) or "not here")
    with pytest.warns(UserWarning, match="not here"):
        diffsim.make("cartpole", 2)
    assert built == [entry] and f"{entry} is damaged: compiled again\n" in capfd.readouterr().err


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_does_is_not(cache, monkeypatch):
    monkeypatch.setattr(physics, "compiler_error", lambda: "none here")
    dead, living = cache / "a-1.build", cache / "b-1.build"
    for folder in (dead, living):
        (folder / "temporary").mkdir(parents=True)
    with physics._locked(living), pytest.warns(UserWarning, match="none here"):
        diffsim.make("cartpole", 2)
        assert living.exists() and not dead.exists()


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_ends_its_children_and_is_removed(signal_, cache, tmp_path, monkeypatch):
    heeded = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # nohup does not
    code = f"{heeded}; import diffsim; diffsim.make('cartpole', 2)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (logs := list(cache.glob("*.build/temporary/log"))) and process.poll() is None:
        time.sleep(0.02)
    assert logs, "no compiler" if physics.compiler_error() else process.returncode
    children = list_children(process.pid)
    process.send_signal(signal_)
    process.wait()
    until = time.time() + 60  # they finish a file of their own
    while any(os.path.exists(f"/proc/{pid}/cmdline") and open(f"/proc/{pid}/cmdline").read() for pid in children):
        assert time.time() < until
        time.sleep(0.1)
    assert bool(list(cache.glob("*.build"))) == (signal_ == signal.SIGKILL)
    monkeypatch.setattr(physics, "compiler_error", lambda: "none here")
    with pytest.warns(UserWarning, match="none here"):
        diffsim.make("cartpole", 2)
    assert not list(cache.glob("*.build"))


def list_children(pid: int) -> list[str]:
    return open(f"/proc/{pid}/task/{pid}/children").read().split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_left_in_the_temporary_folder(script, arm, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    tiny = "--no-compile --num-envs 2 --eval-every 0 --eval-episodes 2 --stop-after 1".split()
    run_script(script, "--env", arm, *tiny, "--run-dir", tmp_path / "runs")
    assert (the_run(tmp_path / "runs") / "policy.pt2").exists() and not list(temporary.iterdir())


# --- memory -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, args, message",
    [(s, ["--num-envs", 10**12], "num_envs is 1000000000000: that takes ") for s in SCRIPTS[:3]]
    + [("ppo_baseline.py", ["--env", "Hopper-v5", "--num-envs", 10**9, "--physics", "gymnasium"], " fit")]
    + [(s, ["--num-threads", 100_000], f"this machine has {os.cpu_count()} cores") for s in SCRIPTS]
    + [(s, ["--horizon", 10**12], "between 1 and 100,000") for s in WINDOWS]
    + [(s, ["--critic-epochs", 10**12], "between 1 and 100,000") for s in WINDOWS]
    + [(s, ["--eval-episodes", 10**12], "between 1 and 100,000") for s in SCRIPTS]
    + [(s, ["--actor-hidden", 10**9], "between 1 and 8192") for s in SCRIPTS]
    + [("rp_pgm_mb.py", ["--update-ratio", 1e300], "at most 1000")],
)  # fmt: skip
def test_what_no_machine_can_do_is_one_line(script, args, message, tmp_path, refused):
    args = args if "--env" in args else [*args, "--env", "cartpole"]
    assert message in refused(script, *args, "--no-compile", "--run-dir", tmp_path)


def test_memory_that_is_not_free_cannot_be_allocated():
    """Linux grants a process more than there is, and kills it when it is used."""
    code = "import torch; from diffsim import memory; memory.available = lambda: 2e8; memory.limit(); "
    code += "torch.empty(3 * 10**7); print('fits'); torch.empty(10**8)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "fits\n" and "can't allocate" in done.stderr, done.stderr


def test_out_of_memory_is_one_line_and_a_bug_has_its_traceback(capsys):
    for make in (lambda: torch.empty(10**17), lambda: torch.empty(2**62), lambda: bytearray(2**62)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            make()
        explain(error.type, error.value, error.tb)
        said = capsys.readouterr().err.strip()
        assert "out of memory" in said and "fewer --num-envs" in said and len(said.splitlines()) == 1
    with pytest.raises(RuntimeError) as error:
        torch.zeros(2) @ torch.zeros(3)
    explain(error.type, error.value, error.tb)
    assert "Traceback" in capsys.readouterr().err


def test_free_memory_is_known():
    assert 0 < memory.available() < 1e15
    memory.check(10, 100)
    with pytest.raises(ValueError, match=r"num_envs is 10: that takes .* GiB of memory, .* free; at most \d fit"):
        memory.check(10, int(memory.available() / 2))
