"""What a run keeps, how it goes on, where a new one may begin; Ctrl-C, closed pipes, places that cannot be written."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import diffsim
from diffsim import render
from diffsim.program import is_ours
from diffsim.run_files import provenance
from tests import ROOT, SCRIPTS, command_line, play, rows, run_script, the_run
from tests.test_scripts import small


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """A run of shac.py that has done two iterations of ten."""
    folder = tmp_path_factory.mktemp("cartpole")
    run_script("shac.py", *small("shac.py", run_dir=folder, total_timesteps=40, stop_after=2))
    return the_run(folder)


def checkpoint(run) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


# --- what it keeps ------------------------------------------------------------------------------------------------
def test_config_json_says_what_ran(tmp_path):
    flags = small("shac.py", run_dir=tmp_path, total_timesteps=16, stop_after=1)
    run_script("shac.py", *flags, "--max-grad-norm", "inf")
    run = the_run(tmp_path)
    config = json.loads((run / "config.json").read_text(), parse_constant=pytest.fail)  # no Infinity, which is no JSON
    assert config["script"] == "shac" and config["command"] and config["date"].startswith("20")
    assert set(config["args"]) == set(checkpoint(run)["args"]) and config["args"]["max_grad_norm"] == "inf"
    assert config["versions"]["torch"] == torch.__version__ and config["versions"]["diffsim"] == diffsim.__version__
    assert {"python", "mujoco", "gymnasium", "numpy"} <= set(config["versions"]) and "resumed" not in config
    for stop in (2, 3):
        run_script("shac.py", "--resume", run, "--stop-after", stop)
        again = json.loads((run / "config.json").read_text())
        assert [x["iteration"] for x in again["resumed"]] == list(range(1, stop)) and again["date"] == config["date"]


def test_the_commit_is_that_of_the_scripts_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    script = tmp_path / "idea.py"
    script.write_text("")
    with command_line(script):
        assert provenance()["commit"] is None
        git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
        for more in (["init", "-q"], ["add", "idea.py"], ["commit", "-q", "-m", "idea"]):
            subprocess.run([*git, *more], check=True)
        assert re.fullmatch("[0-9a-f]{40}", commit := provenance()["commit"])
        script.write_text("pass")
        assert provenance()["commit"] == f"{commit}-dirty"
        monkeypatch.setenv("PATH", "")  # no git
        assert provenance()["commit"] is None


# --- longer, or from another --------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_complete_run_can_be_lengthened_and_every_column_is_explained(script, arm, tmp_path):
    engines = ["--physics", "mujoco"] + ["--eval-physics"] * (script != "rp_pgm_mb.py")
    run_script(script, *small(script, arm, tmp_path, total_timesteps=12), *engines)
    run, done = the_run(tmp_path), 6 if script == "rp_pgm_mb.py" else 3
    said = run_script(script, "--resume", run, "--env", arm, "--total-timesteps", 24)
    assert "--total-timesteps 24, was 12: 50% of the run is done, was 100%; learning rates" in said
    assert f"{done} iterations of " in said
    assert checkpoint(run)["global_step"] == checkpoint(run)["args"]["total_timesteps"] == 24
    table = rows(tmp_path)
    assert [int(row["global_step"]) for row in table if row["eval_return"]] == [12, 24]
    if "learning_rate" in table[0]:  # as it would be in the middle of a run of 24 steps, not at the end
        rates = [float(row["learning_rate"]) for row in table]
        assert rates[2] < rates[3] and rates[3] == pytest.approx(rates[0] / 2, rel=0.01)
    known = (ROOT / "diffsim" / "README.md").read_text().partition("| column | meaning |")[2].splitlines()
    explained = set(re.findall("`([a-zA-Z_]+)`", "\n".join(line.split("|")[1] for line in known if "|" in line)))
    columns = set((run / "metrics.csv").read_text().split("\n")[0].split(","))
    assert columns - explained == set() and len(columns) > 15


def test_a_run_cannot_end_before_it_is(cartpole, refused):
    said = refused("shac.py", "--resume", cartpole, "--total-timesteps", 4, "--capture-video")
    assert f"--total-timesteps comes to 1 iterations, --resume {cartpole} has done 2" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_run_begins_with_the_networks_of_another(script, tmp_path, refused):
    """Other environment of the same sizes, seed and number of environments; nothing is learned in its first steps."""
    task = tmp_path / "task.py"
    task.write_text("from diffsim.tasks import Cartpole\nclass Mine(Cartpole):\n    max_episode_steps = 9\n")
    off_policy = script == "rp_pgm_mb.py"
    run_script(script, *small(script, run_dir=tmp_path / "a", stop_after=12 if off_policy else 6))
    old = the_run(tmp_path / "a")
    flags = small(script, f"{task}:Mine", tmp_path / "b", stop_after=1, seed=3)
    flags += ["--learning-starts", 20] * off_policy
    run_script(script, *flags, "--init-from", old, "--num-envs", 3)
    new = the_run(tmp_path / "b")
    one, two = checkpoint(old), checkpoint(new)
    assert two["iteration"] == 1 and two["args"]["init_from"] == str(old) and len(rows(tmp_path / "b")) <= 1
    network = "agent" if script == "ppo_baseline.py" else "actor"
    moved = max(float((two[network][k] - x).abs().max()) for k, x in one[network].items())
    assert moved < 0.1  # a few steps
    assert two["normalizer"]["count"] > one["normalizer"]["count"] > 20
    if off_policy:
        assert moved == 0 and two["buffer"]["count"] == 1 and not two["actor_optimizer"]["state"]
    run_script(script, "--resume", new, "--env", f"{task}:Mine", "--stop-after", 2)  # not begun again
    assert checkpoint(new)["iteration"] == 2
    assert (new / script).read_bytes() == (ROOT / script).read_bytes() and (new / "task.py").exists()
    said = refused(script, "--resume", new, "--env", f"{task}:Other")
    assert said.endswith(f"the run is on {task}:Mine; --init-from begins a new run with its networks")


def test_networks_that_do_not_fit_are_one_line(cartpole, tmp_path, refused):
    for flags, own in ((["--actor-hidden", 7], "7x5"), (["--env", "hopper"], "128x11")):
        args = [*small("shac.py", run_dir=tmp_path, total_timesteps=8), *flags]
        said = refused("shac.py", *args, "--init-from", cartpole)
        assert f"--init-from {cartpole}: its actor differs: " in said
        assert f"mean.0.weight is 64x5 there, {own} here" in said
    args = small("ppo_baseline.py", run_dir=tmp_path, total_timesteps=8)
    assert refused("ppo_baseline.py", *args, "--init-from", cartpole).endswith("a run of shac.py, which has no agent")
    args = small("rpo_diffsim.py", run_dir=tmp_path, total_timesteps=8, activation="silu")
    said = refused("rpo_diffsim.py", *args, "--init-from", cartpole)
    assert said.endswith("networks of another activation; they need --activation elu")
    said = refused("shac.py", *small("shac.py", run_dir=tmp_path), "--normalize-returns", "--init-from", cartpole)
    assert said.endswith("its critics know plain returns; they need --no-normalize-returns")
    assert "--init-from nowhere: no checkpoint.pt there" in refused("shac.py", "--init-from", "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_network_that_a_fork_adds_begins_new(cartpole, tmp_path):
    (tmp_path / "fork.py").write_text((ROOT / "shac.py").read_text().replace(
        "actor=actor,", "actor=actor, extra=nn.Linear(2, 2),"))  # fmt: skip
    args = small("shac.py", run_dir=tmp_path / "runs", stop_after=1)
    said = run_script(tmp_path / "fork.py", *args, "--init-from", cartpole)
    assert f"--init-from {cartpole} has no extra: it begins new" in said
    assert "extra" in checkpoint(the_run(tmp_path / "runs"))


def test_rpo_begins_with_the_networks_of_shac(cartpole, tmp_path):
    args = small("rpo_diffsim.py", run_dir=tmp_path, num_envs=2, stop_after=1, actor_learning_rate=1e-9)
    run_script("rpo_diffsim.py", *args, "--init-from", cartpole)
    one, two = checkpoint(cartpole)["actor"], checkpoint(the_run(tmp_path))["actor"]
    assert one and all(torch.allclose(one[name], x, atol=1e-6) for name, x in two.items())


# --- places that cannot be written --------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere", "x" * 300, "locked"])
def test_a_run_dir_that_cannot_be_is_one_line_before_anything_is_made(where, tmp_path, refused, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    if where == "locked" and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("root may write anywhere")
    monkeypatch.setattr(diffsim, "make", lambda *_, **__: pytest.fail("environments were made"))
    path = tmp_path / where
    said = refused("shac.py", *small("shac.py", run_dir=path))
    assert said.startswith(f"shac.py: --run-dir {path}: cannot write there (")


@pytest.mark.parametrize("video", ["ant.gif", "file/ant.mp4", "folder.mp4", "/proc/nowhere/ant.mp4"])
def test_a_video_that_cannot_be_is_one_line_before_anything_is_simulated(video, cartpole, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    monkeypatch.setattr(diffsim, "make", lambda *_, **__: pytest.fail("environments were made"))
    said = play(cartpole, "--video", tmp_path / video, expect=2).stderr.strip()
    assert f"cannot write {tmp_path / video}: " in said and len(said.splitlines()) == 1


def test_a_video_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def interrupted(command, **how):
        Path(command[-1]).write_bytes(b"a part of it")
        raise SystemExit(130)

    def drawn(command, **how):
        for suffix in (".mp4", ".png"):
            Path(command[-1]).with_suffix(suffix).write_bytes(b"all of it")
        return types.SimpleNamespace(returncode=0)

    model, path = diffsim.make("cartpole", 1, compile=False).mj_model, tmp_path / "cartpole.mp4"
    monkeypatch.setattr(render.subprocess, "run", interrupted)
    with pytest.raises(SystemExit):
        render.render(model, np.zeros((2, 2)), 0.01, path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(render.subprocess, "run", drawn)
    render.render(model, np.zeros((2, 2)), 0.01, path)
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {b"all of it"} and path.with_suffix(".png").exists()


# --- play ---------------------------------------------------------------------------------------------------------
def test_play_takes_sensible_numbers_only(cartpole):
    for flag, value in (("episodes", 0), ("episodes", -1), ("episodes", 10**9), ("seed", -1), ("seed", 2**32)):
        said = play(cartpole, f"--{flag}={value}", expect=2).stderr.strip()
        assert said.startswith(f"diffsim.play: --{flag} is {value}; it must be") and len(said.splitlines()) == 1


def test_play_tells_the_speed_of_robots_that_run(cartpole, tmp_path, monkeypatch):
    for name in ("cartpole", "hopper"):
        monkeypatch.setattr(diffsim.TASKS[name], "max_episode_steps", 3)
    assert "speed" not in play(cartpole, "--episodes", 1).stdout
    assert {name for name, task in diffsim.TASKS.items() if not task.runs} == {"cartpole", "push", "hand"}
    run_script("shac.py", *small("shac.py", "hopper", tmp_path, stop_after=1))
    assert " m/s" in play(the_run(tmp_path), "--episodes", 1).stdout


# --- Ctrl-C and closed pipes, of real processes -------------------------------------------------------------------
def python(*args, **how) -> subprocess.Popen:
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) | how
    return subprocess.Popen([sys.executable, *map(str, args)], **how)


@pytest.mark.parametrize("delay", [0.3, 1.5, 4.0])
def test_ctrl_c_at_any_time_is_one_line(delay, cartpole, tmp_path):
    """As a terminal sends it, to child processes too; all programs are interrupted at once."""
    flags = small("shac.py", run_dir=tmp_path, total_timesteps=10**6)
    programs = [python("shac.py", *flags), python("-m", "diffsim.play", cartpole, "--episodes", 5000)]
    time.sleep(delay)
    for program in programs:
        os.killpg(program.pid, signal.SIGINT)
    for program in programs:
        said = program.communicate(timeout=120)[0]
        assert "Traceback" not in said and "KeyboardInterrupt" not in said and "ignored" not in said
        assert program.returncode == 130 and said.count("interrupted") == 1
        with pytest.raises(ProcessLookupError):  # no child is left
            os.killpg(program.pid, 0)


def test_other_programs_keep_their_ctrl_c(tmp_path, monkeypatch):
    fork, notebook = tmp_path / "my_idea.py", types.ModuleType("__main__")
    fork.write_text((ROOT / "shac.py").read_text())
    (tmp_path / "other.py").write_text("import diffsim\n")
    files = {ROOT / name: True for name in SCRIPTS} | {fork: True, tmp_path / "other.py": False, tmp_path / "no": False}
    assert not is_ours()  # pytest
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    assert not is_ours()
    for file, ours in files.items():
        monkeypatch.setattr(notebook, "__file__", str(file), raising=False)
        assert is_ours() == ours
    for module, ours in (("diffsim.play", True), ("diffsim", True), ("diffsimilar", False), ("pytest", False)):
        monkeypatch.setattr(sys, "argv", ["-m"])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "ignore", "-m", module])
        assert is_ours() == ours


def test_a_reader_that_leaves_is_not_told(cartpole):
    reads, writes = os.pipe()
    os.close(reads)  # as `| head` that has seen enough
    commands = ("-m", "diffsim"), ("-m", "diffsim.play", cartpole, "--episodes", 1), ("shac.py", "--help")
    for program in [python(*args, stdout=writes, stderr=subprocess.PIPE) for args in commands]:
        assert program.communicate()[1] == ""
        assert program.returncode == -signal.SIGPIPE
    os.close(writes)
