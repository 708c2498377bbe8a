"""What the four scripts have in common, and what diffsim/flags.py and run.py do for each of them."""

import ast
import contextlib
import csv
import importlib
import io
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, asdict, dataclass, fields
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import diffsim
from diffsim.flags import RunArgs, bounds, fits, parse
from diffsim.policy import evaluating, read_policy, write_policy
from diffsim.program import start
from diffsim.run import Run
from tests import ROOT, SCRIPTS, WINDOWS, command_line, rows, run_fresh, run_script, the_run

# a few seconds' work for each script; with --stop-after N each has N rows or more
SMALL = {
    "shac.py": "--num-envs 2 --horizon 2 --critic-epochs 1 --critic-minibatches 2 --save-every 4".split(),
    "rpo_diffsim.py": "--num-envs 2 --horizon 2 --critic-epochs 1 --critic-minibatches 2 --save-every 4".split(),
    "ppo_baseline.py": "--num-envs 2 --num-steps 2 --num-minibatches 2 --save-every 4".split(),
    "rp_pgm_mb.py": (
        "--num-envs 2 --learning-starts 8 --model-warmup 10 --batch-size 4 --log-every 2 --save-every 2 "
        "--actor-hidden 8 --critic-hidden 8 --model-hidden 8 --outcome-hidden 8"
    ).split(),
}


def small(script: str, env="cartpole", run_dir="runs", **flags) -> list[str]:
    flags = {"eval_every": 0, "eval_episodes": 2, "total_timesteps": 4000} | flags
    given = [str(x) for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", v)]
    return ["--no-compile", *SMALL[script], "--env", env, "--run-dir", str(run_dir), *given]


def module(script: str):
    return importlib.import_module(script.removesuffix(".py"))


def parsed(script: str, *args):
    with command_line(script, *args):
        return parse(module(script).Args, module(script).DEFAULTS)


# --- the text of the scripts --------------------------------------------------------------------------------------
def lines(script: str) -> list[str]:
    return (ROOT / script).read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short(script):
    assert len(lines(script)) <= (500 if script == "rp_pgm_mb.py" else 400)


def test_the_readme_is_two_screens_and_knows_the_scripts():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 1500
    for script in SCRIPTS:
        assert f"[{script}]({script}) | {len(lines(script))} |" in readme
    prose = re.sub(r"```.*?```|^(    |\|).*?$|\(.*?\)", "", readme, flags=re.S | re.M)  # no code, tables, links
    assert len(re.findall(r"(?<!\w)\d[\d,.]*", prose)) <= 0.015 * len(prose.split())


def test_the_difference_of_shac_and_rpo_is_small():
    diff = subprocess.run(["diff", *WINDOWS], cwd=ROOT, capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^[<>]", diff, re.MULTILINE)) <= 150


def source(script: str, name: str) -> str:
    """The text of a function, class or method "Class.method"."""
    text = (ROOT / script).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        (node,) = (n for n in node.body if getattr(n, "name", None) == part)
    return ast.get_source_segment(text, node)


@pytest.mark.parametrize(
    "name, scripts",
    [(n, WINDOWS) for n in ("td_lambda", "sum_of_starts", "mlp", "Critics", "Normalizer", "DeterministicPolicy")]
    + [(n, WINDOWS) for n in ("squashed_entropy", "ppo_surrogate")]
    + [("Normalizer.update", SCRIPTS)],
)
def test_what_scripts_share_is_the_same_text(name, scripts):
    assert len({source(script, name) for script in scripts}) == 1


def test_the_run_knows_no_reinforcement_learning():
    """diffsim/run.py holds no networks, losses or buffers: its names and imports have no such words."""
    tree = ast.parse((ROOT / "diffsim" / "run.py").read_text())
    annotations = {id(n) for a in ast.walk(tree) if isinstance(a, ast.arg) and a.annotation for n in ast.walk(a)}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            assert not any(m.startswith(("torch.nn", "torch.optim", "torch.distributions")) for m in modules)
        if isinstance(node, ast.Attribute) and id(node) not in annotations:
            names.add(node.attr)
        names |= {getattr(node, key) for key in ("id", "name", "arg") if isinstance(getattr(node, key, None), str)}
    words = {w.lower() for name in names for w in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}
    learning = "nn loss critic critics actor advantage gae replay entropy gamma reward normal optimizer backward grad"
    assert not words & set(learning.split())
    assert {"interrupt", "checkpoint", "save"} <= words  # the words of a run are found


# --- flags --------------------------------------------------------------------------------------------------------
def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def bounded() -> list[tuple[str, str]]:
    hints = {s: get_type_hints(module(s).Args, include_extras=True) for s in SCRIPTS}
    return [(script, name) for script, types in hints.items() for name, hint in types.items() if bounds(hint)]


def out_of(bound, is_float: bool) -> list:
    """Values just outside a bound."""
    if not is_float:
        return [bound.low - 1] + [bound.high + 1] * (bound.high < math.inf)
    above = [math.nextafter(bound.high, math.inf)] * (bound.high < math.inf)
    return [math.nextafter(bound.low, -math.inf), *above, math.nan]


@pytest.mark.parametrize("script, name", bounded())
def test_a_flag_out_of_its_bounds_is_one_line(script, name, capsys):
    hint = get_type_hints(module(script).Args, include_extras=True)[name]
    (bound,) = set(bounds(hint))
    flag = flag_of(name)
    many = getattr(hint, "__origin__", None) is tuple
    for value in out_of(bound, "float" in str(hint)):
        args = [flag, 64, value] if many else [f"{flag}={value!r}"]
        with pytest.raises(SystemExit) as stopped:
            parsed(script, "--env", "cartpole", *args)
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and len(said.splitlines()) == 1
        assert said.startswith(f"{script}: {flag} is ") and said.endswith(f"must be {bound.words}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_bounds_and_every_flag_a_word_of_help(script, capsys):
    Args = module(script).Args
    for name, hint in get_type_hints(Args, include_extras=True).items():
        assert bounds(hint) or not {int, float} & {hint, *get_args(hint)}, name
    with pytest.raises(SystemExit):
        parsed(script, "--env", "cartpole", "--help")
    said = capsys.readouterr().out
    assert all(flag_of(f.name) in said.replace("--no-", "--") for f in fields(Args))


# Every flag of every script, each unlike its default where a test can have it so.
COMMON = dict(
    device="cpu", compile=False, num_threads=1, save_every=1000, capture_video=False, env="cartpole", physics="mujoco",
    seed=7, num_envs=3, total_timesteps=5000, gamma=0.9, actor_hidden=(8, 4), critic_hidden=(4,), log_std_init=-0.7,
    eval_every=9, eval_episodes=2, eval_physics=True, max_grad_norm=0.4, entropy_coef=0.2,
)  # fmt: skip
THROUGH_PHYSICS = dict(
    activation="silu", derivative="mujoco",
    stiffness=1.2, smoothing=2.0, stagger=False, horizon=2, actor_learning_rate=1e-4, critic_learning_rate=2e-3,
    min_learning_rate=1e-6, learning_rate_decay="exponential", weight_decay=0.01, adam_betas=(0.8, 0.9),
    score_share=0.3, gae_lambda=0.8, normalize_returns=True, policy_average=0.3,
    target_alpha=0.4, num_critics=3, critic_epochs=2, critic_minibatches=2, state_dependent_std=True,
)  # fmt: skip
GIVEN = {
    "shac.py": COMMON | THROUGH_PHYSICS
    | dict(target_critic=False, learn_entropy_coef=True, entropy_learning_rate=1e-2),
    "rpo_diffsim.py": COMMON | THROUGH_PHYSICS
    | dict(update_epochs=2, clip_coef=(0.5, 0.6), kl_coef=0.5, action_gradient_lambda=0.9,
        normalize_action_gradients=True, max_action_grad_norm=2.0),
    "ppo_baseline.py": COMMON | dict(
        activation="silu", num_steps=2,
        stagger=False, learning_rate=1e-4, anneal_lr=False, desired_kl=0.02, gae_lambda=0.8,
        num_minibatches=2, update_epochs=2, norm_adv=False, clip_coef=0.3, clip_vloss=False, vf_coef=0.4, target_kl=0.1,
        norm_obs=False, norm_reward=False,
    ),
    "rp_pgm_mb.py": COMMON | dict(
        gradient="dr", unroll=2, spectral_norm=False, expand_critic=True, imagined_steps=3, learning_starts=9,
        model_warmup=12, power_iterations=2, update_ratio=0.5, model_updates=2, policy_frequency=1, batch_size=4,
        end_cost=0.5, quiet_episodes=0.7, growth_steps=50, dr_recent=100, buffer_size=200, learn_entropy_coef=False,
        eval_every=30, actor_learning_rate=1e-4, critic_learning_rate=2e-3, model_learning_rate=2e-3, tau=0.01,
        policy_average=0.01, target_entropy=-2.0, model_hidden=(8,), outcome_hidden=(8,), log_every=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_can_be_given(script, tmp_path):
    """Each is taken, is in the checkpoint, may be repeated with --resume, and may not be changed."""
    Args, given = module(script).Args, GIVEN[script] | dict(run_dir=str(tmp_path))
    assert set(given) == {f.name for f in fields(Args)} - {"resume", "stop_after", "init_from"}
    same = {f.name for f in fields(Args) if f.default is not MISSING and given.get(f.name, MISSING) == f.default}
    assert same <= {"device", "num_threads", "capture_video"}
    args = []
    for name, value in given.items():
        if isinstance(value, bool):
            args += [flag_of(name) if value else f"--no-{name.replace('_', '-')}"]
        else:
            args += [flag_of(name), *(value if isinstance(value, tuple) else (value,))]
    iterations = 12 if script == "rp_pgm_mb.py" else 2
    run_script(script, *args, "--stop-after", iterations - 1)
    run = the_run(tmp_path)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert {k: v for k, v in saved["args"].items() if k not in ("resume", "stop_after", "init_from")} == given
    run_script(script, *args, "--resume", run, "--stop-after", iterations)
    assert int(rows(tmp_path)[-1]["iteration"]) == iterations - 1
    with pytest.raises(SystemExit):
        parsed(script, "--resume", run, "--seed", 8)


@pytest.fixture(scope="module")
def robots(tmp_path_factory) -> str:
    """A file of robots that derive from those of diffsim."""
    path = tmp_path_factory.mktemp("robots") / "robots.py"
    path.write_text(
        "import torch\nfrom diffsim.tasks import Cartpole, HopperV5, Humanoid\n"
        "class Walks(Humanoid):\n    max_episode_steps = 7\nclass Hops(HopperV5):\n    pass\n"
        "class Blind(Cartpole):\n    def reward(self, qpos, qvel, action):\n        return qpos[0] * torch.nan\n"
    )
    return str(path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_task_in_a_file_inherits_settings_and_engine(script, robots):
    for name, parent, physics in (("Walks", "humanoid", "diffsim"), ("Hops", "Hopper-v5", "mujoco")):
        ours, theirs = (vars(parsed(script, "--env", env)) for env in (f"{robots}:{name}", parent))
        assert ours.pop("env") == f"{robots}:{name}" and theirs.pop("env") == parent
        assert ours == theirs and ours["physics"] == physics
    defaults = module(script).DEFAULTS
    if "humanoid" in defaults:
        assert (defaults["humanoid"] | defaults.get("on diffsim", {})).items() <= vars(
            parsed(script, "--env", f"{robots}:Walks")
        ).items()
    args = parsed(script, "--env", f"{robots}:Walks", "--total-timesteps", "5e3", "--actor-hidden", 8, "1e1")  # win
    assert (args.total_timesteps, args.actor_hidden) == (5000, (8, 10)) and type(args.total_timesteps) is int


def test_settings_of_a_task_and_an_engine_are_put_together(monkeypatch):
    defaults = {"on mujoco": dict(num_envs=1, gamma=0.1, horizon=1), "ant": dict(num_envs=2, gamma=0.2)}
    defaults["ant on mujoco"] = dict(num_envs=3)
    with command_line("shac.py", "--env", "ant", "--physics", "mujoco"):
        args = parse(module("shac.py").Args, defaults)
    assert (args.num_envs, args.gamma, args.horizon) == (3, 0.2, 1)
    with command_line("shac.py", "--env", "ant", "--gamma", 0.3):
        args = parse(module("shac.py").Args, defaults)
    assert (args.num_envs, args.gamma, args.horizon, args.physics) == (2, 0.3, 12, "diffsim")


# --- one line for bad input ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, args, message",
    [(s, ["--env", "antt"], "unknown env 'antt'; did you mean ant? There is cartpole") for s in SCRIPTS]
    + [(s, ["--env", "CartPole-v1"], "Discrete(2)") for s in SCRIPTS[2:]]
    + [(s, ["--env", "Pendulum-v1", "--physics", "mujoco"], "Pendulum-v1 is Gymnasium's alone") for s in SCRIPTS]
    + [(s, ["--env", "Pendulum-v1", "--capture-video"], "Pendulum-v1 does not run on MuJoCo") for s in SCRIPTS[2:]]
    + [(s, ["--env", "cartpole", "--physics", "gymnasium"], "cartpole is no Gymnasium env") for s in SCRIPTS[2:]]
    + [(s, ["--env", "Pendulum-v1"], "Pendulum-v1 on physics gymnasium has no gradient") for s in WINDOWS]
    + [(s, ["--env", "Hopper-v5", "--physics", "gymnasium"], "has no gradient") for s in WINDOWS]
    + [(s, ["--critic-minibatches", 10**6], "--critic-minibatches") for s in WINDOWS]
    + [("ppo_baseline.py", ["--num-minibatches", 10**6], "--num-minibatches")]
    + [("rpo_diffsim.py", ["--action-gradient-lambda", 0], "--action-gradient-lambda 0.0 vanishes over --horizon 12")]
    + [("shac.py", ["--learn-entropy-coef"], "--learn-entropy-coef needs an --entropy-coef above 0")]
    + [
        pytest.param(
            s, ["--device", "cuda"], "finds no CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ) for s in SCRIPTS
    ],
)  # fmt: skip
def test_bad_input_is_one_line(script, args, message, tmp_path, refused):
    said = refused(script, *args, "--no-compile", "--num-envs", 2, "--run-dir", tmp_path)
    assert said.startswith(f"{script}: ") and message in said
    assert not list(tmp_path.iterdir())  # no folder of a run that never was


FLUID = "<mujoco><option viscosity='1'/><worldbody><body><joint/><geom size='.1'/></body></worldbody></mujoco>"


@pytest.mark.parametrize(
    "xml, message",
    [("<mujoco><nonsense/></mujoco>", "cannot read MJCF"), ("robot.xml", "no such file"), (FLUID, "fluid")],
)
def test_a_bad_robot_is_one_line(xml, message, tmp_path, refused):
    (tmp_path / "bad.py").write_text(f"import diffsim\nclass Bad(diffsim.Task):\n    xml = {xml!r}\n")
    assert message in refused("shac.py", "--env", f"{tmp_path / 'bad.py'}:Bad", "--no-compile")


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_checkpoints_are_one_line(script, tmp_path, refused, monkeypatch):
    name, file = script.removesuffix(".py"), tmp_path / "checkpoint.pt"
    nowhere = tmp_path / "nowhere"
    assert f"--resume {nowhere}: no checkpoint.pt there" in refused(script, "--resume", nowhere)
    file.write_bytes(b"not a checkpoint")
    assert "not a readable checkpoint" in refused(script, "--resume", tmp_path)
    torch.save([1, 2], file)
    assert "not a readable checkpoint" in refused(script, "--resume", file)
    torch.save(dict(args=dict(env="ant")), file)  # as versions before this one wrote it
    assert "not a readable checkpoint" in refused(script, "--resume", tmp_path)
    for wrong in (dict(script=name), torch.zeros(3), "text", None):
        torch.save(wrong, file)
        for flag in ("--resume", "--init-from"):
            assert f"{flag} {file}: not a readable checkpoint" in refused(script, flag, tmp_path)
    torch.save(dict(script="idea", args={}), file)
    assert f"--resume {tmp_path}: a checkpoint of idea.py" in refused(script, "--resume", tmp_path)
    args = asdict(module(script).Args(env="cartpole", physics="diffsim", compile=False, num_envs=2))
    version = f"a checkpoint of another version of {script}"
    for wrong, message in (
        (args | dict(softness=1.0), f"{version} (softness)"),
        ({k: v for k, v in args.items() if k != "gamma"}, f"{version} (gamma)"),
        ([1], f"{version} (no flags)"),
        (args | dict(gamma="high"), "(gamma is 'high')"),
        (args | dict(num_envs=2.5), "(num_envs is 2.5)"),
        (args | dict(actor_hidden=64), "(actor_hidden is 64)"),
        (args | dict(physics="bullet"), "(physics is 'bullet')"),
        (args | dict(compile=1), "(compile is 1)"),
        (args | dict(num_envs=-1), "--num-envs is -1"),
    ):
        torch.save(dict(script=name, args=wrong), file)
        assert message in refused(script, "--resume", tmp_path)
    torch.save(dict(script=name, args=args), file)
    assert "--env is ant, the run has cartpole" in refused(script, "--resume", tmp_path, "--env", "ant")
    assert "--seed is 3, the run has 1" in refused(script, "--resume", tmp_path, "--seed", 3)
    assert "a checkpoint of another version, without" in refused(script, "--resume", tmp_path)
    monkeypatch.chdir(tmp_path)
    file.unlink()
    assert "--resume : no checkpoint.pt there" in refused(script, "--resume", "")


def test_another_robots_checkpoint_is_one_line(tmp_path, refused):
    """The task in the file changed between the two: its networks no longer fit."""
    task = tmp_path / "task.py"
    text = "from diffsim.tasks import Cartpole\nclass Mine(Cartpole):\n    pass\n"
    task.write_text(text)
    run_script("shac.py", *small("shac.py", f"{task}:Mine", tmp_path / "runs", stop_after=1))
    task.write_text(f"{text}    def observe(self, qpos, qvel, action):\n        return qvel\n")
    said = refused("shac.py", "--resume", the_run(tmp_path / "runs"), "--env", f"{task}:Mine")
    assert "another version" in said


# --- a run's life -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_fork_has_its_own_name(script, tmp_path, refused):
    fork = tmp_path / "my_idea.py"
    fork.write_text((ROOT / script).read_text())
    run_script(fork, *small(script, run_dir=tmp_path / "a", stop_after=1))
    run_script(script, *small(script, run_dir=tmp_path / "b", stop_after=1))
    ours, theirs = the_run(tmp_path / "a"), the_run(tmp_path / "b")
    assert ours.name.startswith("cartpole__my_idea__1__")
    assert torch.load(ours / "checkpoint.pt", weights_only=True)["script"] == "my_idea"
    assert (
        refused(fork, "--resume", theirs, "--stop-after", 1)
        == f"my_idea.py: --resume {theirs}: a checkpoint of {script}; "
        "that script goes on with it, --init-from takes its networks"
    )
    assert "a checkpoint of my_idea.py" in refused(script, "--resume", ours, "--stop-after", 1)


def test_a_killed_and_an_interrupted_run_go_on(tmp_path):
    """kill -9 loses at most one interval of saving; Ctrl-C saves and ends with 130."""
    args = small("shac.py", run_dir=tmp_path, save_every=40, total_timesteps=10**6)
    streams = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([sys.executable, "shac.py", *args], **streams)
    while not list(tmp_path.glob("*/checkpoint.pt")) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    run = the_run(tmp_path)
    step = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    with open(run / "metrics.csv") as f:
        text = f.read()
    assert step >= 40 and step % 40 == 0 and text.endswith("\n")
    assert step <= int(rows(tmp_path)[-1]["global_step"]) < step + 2 * 40  # it may have been killed while it saved

    process = subprocess.Popen([sys.executable, "shac.py", "--resume", str(run)], **streams)
    for line in process.stdout:
        if line.startswith("step"):  # the first iteration after it
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "done" not in out
    assert (
        f"interrupted and saved; continue with: {os.path.relpath(sys.executable, ROOT)} shac.py --resume {run}" in out
    )
    done = torch.load(run / "checkpoint.pt", weights_only=True)["iteration"]
    assert done > step / 4
    steps = [int(row["global_step"]) for row in rows(tmp_path)]
    assert steps == [4 * (i + 1) for i in range(done)]  # no row twice, none left out
    run_script("shac.py", "--resume", run, "--stop-after", done + 1)
    assert len(rows(tmp_path)) == done + 1


def test_ctrl_c_while_environments_are_made_is_one_line(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(diffsim, "make", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(AssertionError, match="130"):
        run_script("shac.py", *small("shac.py", run_dir=tmp_path))
    assert capfd.readouterr().err.strip() == "interrupted"


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_a_second_one_ends_at_once(name, code, still, capfd):
    number = signal.Signals[name]
    for times in (1, 2):
        run = still()
        with pytest.raises(SystemExit, match=str(code)):
            for _ in run:
                run.log({"losses/kl": 1.0})
                for _ in range(times):
                    signal.raise_signal(number)
        said = capfd.readouterr()
        assert ("interrupted and saved" in said.out) == (times == 1) == (run.folder / "checkpoint.pt").exists()
        assert said.err.count("interrupted") == times - 1


def test_two_processes_do_not_write_one_run(still, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    run = still(stop_after=2, run_dir=str(tmp_path / "my runs"))
    with pytest.raises(SystemExit):
        for _ in run:
            run.log({"losses/kl": 1.0})
    assert f"--resume '{run.folder}'" in capsys.readouterr().out  # to be pasted
    files = {file: file.read_bytes() for file in run.folder.iterdir()}
    other = os.open(run.folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)  # as the other process does
    with pytest.raises(SystemExit, match="2"):
        still(resume=str(run.folder))
    assert capsys.readouterr().err == f"idea.py: another process is at work on {run.folder}: end it first\n"
    assert files == {file: file.read_bytes() for file in run.folder.iterdir()}
    os.close(other)
    for _ in still(resume=str(run.folder)):
        pass


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
def test_a_full_disk_under_stdout_saves_the_run(still, monkeypatch, capfd):
    run = still()
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    with pytest.raises(SystemExit, match="130"):
        for _ in run:
            run.log({"losses/kl": 1.0})
    assert (run.folder / "checkpoint.pt").exists() and run.iteration == 1


def test_a_terminal_with_ascii_only(monkeypatch):
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, "ascii"))
    start()
    print("runs/\xfc", flush=True)
    assert written.getvalue() == b"runs/\\xfc\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_is_exact_and_a_policy_needs_no_script(script, arm, tmp_path):
    """On bits: networks, optimisers, environments and random numbers; of the last evaluation, too."""
    total = 24 if script == "rp_pgm_mb.py" else 16
    batch = 2 if script == "rp_pgm_mb.py" else 4
    flags = dict(env=arm, total_timesteps=total, eval_every=8)
    run_script(script, *small(script, run_dir=tmp_path / "a", **flags))
    run_script(script, *small(script, run_dir=tmp_path / "b", stop_after=total // batch // 2, **flags))
    run_script(script, *small(script, run_dir=tmp_path / "c", seed=2, **flags))  # leaves other random numbers
    resume = run_fresh if script == "shac.py" else run_script
    run = the_run(tmp_path / "b")
    out = resume(script, "--resume", run, "--env", arm)
    assert "done; watch it" in out
    a, b, c = (rows(tmp_path / x) for x in "abc")
    assert a == b and a != c and float(a[-1]["eval_return"]) < 0
    one, two = (torch.load(the_run(tmp_path / x) / "checkpoint.pt", weights_only=True) for x in "ab")
    assert one["python_rng"] == two["python_rng"] and str(one["numpy_rng"]) == str(two["numpy_rng"])
    for key in one.keys() - {"script", "args", "wall_time_s", "python_rng", "numpy_rng"}:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    program = torch.export.load(run / "policy.pt2").module()
    assert program(torch.randn(5, 6)).shape == (5, 2) and bool((program(100 * torch.randn(5, 6)).abs() <= 1).all())
    if script == "shac.py":  # in a process that never saw the script; TensorBoard has the rows of both
        events = EventAccumulator(str(run)).Reload().Scalars("charts/SPS")
        assert [event.step for event in events] == [int(float(row["global_step"])) for row in b]
        command = [sys.executable, "-m", "diffsim.play", str(run), "--episodes", "2", "--env", arm]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f"{arm} on diffsim, 2 episodes" in said


def test_a_run_that_is_done_stays_done(arm, tmp_path):
    flags = small("shac.py", arm, tmp_path, total_timesteps=8)
    run_script("shac.py", *flags)
    before = rows(tmp_path)
    said = run_script("shac.py", "--resume", the_run(tmp_path), "--env", arm).strip()
    assert said == f"--resume {the_run(tmp_path)} is complete, 8 steps: a larger --total-timesteps lengthens it"
    assert rows(tmp_path) == before


# --- diffsim/run.py alone -----------------------------------------------------------------------------------------
@dataclass
class Flags(RunArgs):
    env: str = "robot"
    physics: str = "diffsim"
    seed: int = 1


class Still(torch.nn.Module):
    """Policy, environment and everything else of a run that does nothing."""

    mj_model, device = None, torch.device("cpu")
    single_observation_space = torch.zeros(3)

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, obs):
        return self.layer(obs)


@pytest.fixture
def still(tmp_path, monkeypatch):
    """Makes a Run of some iterations of ten steps each in tmp_path."""
    monkeypatch.setattr(sys, "argv", ["idea.py"])
    handler = signal.getsignal(signal.SIGINT)

    def make(iterations=4, **flags):
        part = Still()
        run = Run(Flags(**dict(run_dir=str(tmp_path), save_every=10**6) | flags), iterations, 10)
        run.restore(part, part, part=part)
        return run

    yield make
    signal.signal(signal.SIGINT, handler)


def table(run) -> list[dict]:
    with open(run.folder / "metrics.csv") as f:
        head, *body = csv.reader(f)
    assert all(len(line) == len(head) for line in body) and len(set(head)) == len(head)
    return [dict(zip(head, line)) for line in body]


class Odd(Still):
    """A part with a state that plain data cannot hold."""

    def state_dict(self, **_):
        return dict(mean=np.zeros(3))


@pytest.mark.parametrize("part", [Odd(), torch.zeros(3)])
def test_a_part_that_could_not_be_resumed_is_named_before_training(part, tmp_path, capsys):
    run, still = Run(Flags(run_dir=str(tmp_path)), 4, 10), Still()
    with pytest.raises(SystemExit):
        run.restore(still, still, mean=part)
    said = capsys.readouterr().err.strip()
    assert "run.restore: mean cannot be saved as plain data" in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_number_of_numpys_and_its_generators_are_in_the_checkpoint(still):
    run = still()
    for iteration in run:
        run.log({"eval/episodic_return": np.float64(iteration)})
    drawn = np.random.rand(), random.random()
    for _ in (run := still(iterations=8, resume=str(run.folder))):
        assert (np.random.rand(), random.random()) == drawn and run.best == 3
        break


def test_code_that_changed_is_kept_beside_what_a_run_began_with(still, tmp_path, monkeypatch, capsys):
    (script := tmp_path / "idea.py").write_text("first = 1\n")
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit):
        for _ in (run := still(stop_after=2)):
            pass
    for text, kept in (("first = 1\n", ["idea.py"]), ("second = 2\n", ["idea.3.py", "idea.py"])):
        script.write_text(text)
        with contextlib.suppress(SystemExit):
            for _ in still(resume=str(run.folder), stop_after=3 if "first" in text else None):
                pass
        assert sorted(file.name for file in run.folder.glob("*.py")) == kept
    assert (run.folder / "idea.py").read_text() == "first = 1\n" and (run.folder / "idea.3.py").read_text() == text
    assert f"the code has changed since the run began: {run.folder} has idea.3.py, too" in capsys.readouterr().out


def test_a_flag_that_a_checkpoint_could_not_hold_is_named(refused, tmp_path):
    code = (ROOT / "shac.py").read_text().replace("    gamma: Fraction", "    steps: KIND\n    gamma: Fraction", 1)
    for kind, said in (("__import__('pathlib').Path = '.'", "Args.steps is "), ("list[int] = ()", "Args.steps is ()")):
        (fork := tmp_path / "fork.py").write_text(code.replace("KIND", kind))
        assert said in refused(fork, "--env", "cartpole", "--run-dir", tmp_path)
    assert fits([1, 2], list[int]) and fits((1, "a"), tuple[int, str]) and not fits((1,), tuple[int, str])


def test_dropout_is_for_training_alone(tmp_path):
    policy = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    write_policy(policy, 3, "cpu", tmp_path / "policy.pt2")
    assert all(module.training for module in policy.modules())
    read, obs = read_policy(tmp_path / "policy.pt2"), torch.randn(5, 3)
    with evaluating(policy):
        torch.testing.assert_close(read(obs), policy(obs))


def test_numbers_become_columns(still):
    run = still()
    for iteration in run:
        run.mean({"losses/value_loss": torch.tensor(1.0 + iteration, requires_grad=True)})
        run.mean({"losses/value_loss": 3.0})
        episode = dict(r=torch.tensor([4.0, 9.0]), l=torch.tensor([6, 1]))
        run.episodes(dict(episode=episode, _episode=torch.tensor([True, False])))
        run.lap("simulate")
        if iteration == 2:
            continue  # logs nothing: no row
        numbers = {"losses/kl": torch.tensor(0.5), "grad/norm_before_clip": iteration}
        if iteration == 3:
            numbers |= {"eval/episodic_return": 7.0, "eval/mujoco_return": 8.0}
        run.log(numbers)
    first, second, last = table(run)
    assert list(first) == [
        "iteration", "global_step", "wall_time_s", "SPS", "kl", "norm_before_clip", "value_loss", "episodic_return",
        "episodic_length", "simulate_s", "eval_return", "mujoco_return",
    ]  # fmt: skip
    assert (first["kl"], first["value_loss"], first["episodic_return"]) == ("0.5", "2.0", "4.0")
    assert [r["iteration"] for r in (first, second, last)] == ["0", "1", "3"]
    assert [r["global_step"] for r in (first, second, last)] == ["10", "20", "40"]
    assert second["eval_return"] == "" and (last["eval_return"], last["mujoco_return"]) == ("7.0", "8.0")
    assert last["value_loss"] == "3.25"  # (3 + 3 + 4 + 3) / 4: of the iteration without a row, too


def test_a_failed_write_leaves_the_file_as_it_was(still, monkeypatch):
    """As a kill in the middle of it would."""
    run = still()
    for _ in run:
        run.log({"losses/kl": 1.0})
    before = {p.name: p.read_bytes() for p in run.folder.iterdir() if p.suffix in (".csv", ".pt", ".pt2")}
    assert set(before) == {"metrics.csv", "checkpoint.pt", "policy.pt2"}

    def half(path, *_):
        path.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", lambda state, path: half(path))
    monkeypatch.setattr(torch.export, "save", lambda program, path, **_: half(path))
    with pytest.raises(OSError):
        run.save()
    monkeypatch.undo()
    monkeypatch.setattr(csv.DictWriter, "writerows", lambda self, rows: half(run.folder / "tmp-metrics.csv"))
    with pytest.raises(OSError):
        run.tables.rewrite(["iteration"], table(run))
    for name, content in before.items():
        assert (run.folder / name).read_bytes() == content


def test_a_resumed_run_forgets_the_rows_after_its_checkpoint(still):
    run = still(6, stop_after=2)
    run.start -= 1e6  # it took long
    with pytest.raises(SystemExit):
        for _ in run:
            run.log({"losses/kl": 1.0})
    saved = table(run)
    with open(run.folder / "metrics.csv", "a") as f:  # rows of iterations that a kill then took
        f.write("2,30,9.9,1,1.0\n3,40,9.9,1,1.0\n")
    again = still(6, resume=str(run.folder))
    assert again.iteration == 2 and again.global_step == 20 and table(again) == saved
    for _ in again:
        again.log({"losses/kl": 2.0})
    assert [r["kl"] for r in table(again)] == ["1.0"] * 2 + ["2.0"] * 4
    walls = [float(r["wall_time_s"]) for r in table(again)]
    assert walls == sorted(walls) and walls[0] > 1e6


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(iteration="2"), "iteration"), (dict(iteration=-1), "iteration"), (dict(global_step=25), "iteration"),
        (dict(part=3), "part"), (dict(part={}), "part"), (dict(rng=None), "state of the run"),
        (dict(recent=[1]), "state of the run"), (dict(sums=dict(a="b")), "state of the run"),
        (dict(wall_time_s="long"), "state of the run"), (dict(means=dict(a=[1])), "state of the run"),
    ],
)  # fmt: skip
def test_a_checkpoint_with_wrong_contents_is_one_line(wrong, message, still, capsys):
    run = still(stop_after=2)
    with pytest.raises(SystemExit):
        for _ in run:
            run.log({"losses/kl": 1.0})
    file = run.folder / "checkpoint.pt"
    torch.save(torch.load(file, weights_only=True) | wrong, file)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        still(resume=str(file))
    said = capsys.readouterr().err.strip()
    assert f"its {message} does not fit" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "line, change",
    [
        (1, lambda text: ""), (1, lambda text: "x" + text), (2, lambda text: text.replace("\n0,", "\n0,,")),
        (2, lambda text: text.replace("0,10,", "0,ten,")), (3, lambda text: text.replace("1,20,", "1,5,")),
        (3, lambda text: text[:-20]),
    ],
)  # fmt: skip
def test_a_metrics_csv_that_was_edited_is_one_line(line, change, still, capsys):
    run = still(stop_after=2)
    with pytest.raises(SystemExit):
        for _ in run:
            run.log({"losses/kl": 1.0, "losses/longer_than_twenty_characters": 0.123456789012})
    file = run.folder / "metrics.csv"
    text = file.read_text()
    file.write_text(change(text))
    assert file.read_text() != text
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        still(resume=str(run.folder))
    said = capsys.readouterr().err.strip()
    assert f"line {line} of {file} is not this run's; mend it, or move the file away" in said and "\n" not in said
    file.rename(run.folder / "away")
    assert table(still(resume=str(run.folder))) == []
    assert "no metrics.csv there; a new one begins at step 20" in capsys.readouterr().out


def test_rows_without_a_gradient_are_counted_over_a_resume(still, capsys):
    """A run that has moved is not stuck because its last row left a gradient out."""

    def rows_of(run, gone):
        for i in run:
            run.log({"grad/nonfinite": float(i in gone)})

    run = still(stop_after=3)
    with pytest.raises(SystemExit, match="0"):
        rows_of(run, gone=())
    rows_of(still(resume=str(run.folder)), gone=(3,))
    assert "done" in capsys.readouterr().out


def test_iterations_to_go_are_those_until_stop_after(still, capsys):
    run = still(5, stop_after=2)
    assert "2 iterations of 10 steps, 3 more after --stop-after; " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        for _ in run:
            run.log({})
    still(5, resume=str(run.folder), stop_after=4)
    assert "2 iterations of 10 steps, 1 more after --stop-after; " in capsys.readouterr().out
    still(5, resume=str(run.folder))
    assert "3 iterations of 10 steps; " in capsys.readouterr().out
    for total, stop, message in (
        (5, 2, "--stop-after 2 counts from the beginning: "),
        (1, None, "--total-timesteps comes to 1 iterations, "),
    ):
        with pytest.raises(SystemExit, match="2"):
            still(total, resume=str(run.folder), stop_after=stop)
        assert f"{message}--resume {run.folder} has done 2" in capsys.readouterr().err


def test_runs_of_the_same_second_have_a_folder_each(still, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    assert [still().folder.name.rpartition("__")[2] for _ in range(3)] == [
        "20260101-000000", "20260101-000000-2", "20260101-000000-3"
    ]  # fmt: skip


@pytest.mark.parametrize("fails", ["torch", "disk", "gone"])
def test_a_disk_that_is_full_is_one_line_and_the_old_checkpoint(fails, still, monkeypatch, capsys):
    run = still(4)
    steps = iter(run)
    next(steps)
    run.log({"losses/kl": 1.0})
    run.save()
    before = (run.folder / "checkpoint.pt").read_bytes()
    if fails == "torch":  # as torch.save says it
        said = "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file"

        def full(state, path):
            path.write_bytes(b"half of it")
            raise RuntimeError(f"{said}\nframe #0")

        monkeypatch.setattr(torch, "save", full)
    elif fails == "disk":
        said = "No space left on device"

        def full(self, row):
            raise OSError(28, said)

        monkeypatch.setattr(csv.DictWriter, "writerow", full)
    else:
        said = ""
        shutil.rmtree(run.folder)
    run.args.save_every = 1
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        next(steps)
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"idea.py: cannot write in {run.folder} (") and said in err and "\n" not in err
    if fails == "gone":
        assert err.endswith("no checkpoint is there") and not run.folder.exists()
    else:
        assert err.endswith("the files of before are whole") and not list(run.folder.glob("tmp-*"))
        assert (run.folder / "checkpoint.pt").read_bytes() == before


def test_a_reader_of_stdout_that_leaves_ends_the_run_saved(still, monkeypatch, tmp_path):
    run = still(4)
    with open(tmp_path / "stdout", "w") as file:

        class Gone(io.StringIO):
            fileno = file.fileno

            def write(self, text):
                raise BrokenPipeError

        monkeypatch.setattr(sys, "stdout", Gone())
        with pytest.raises(SystemExit, match="130"):
            for _ in run:
                run.log({"losses/kl": 1.0})
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["iteration"] == 1


def test_saves_and_evaluations_are_due_once_an_interval(still):
    run, due = still(10), []
    for iteration in run:
        run.log({})
        if run.passed(25):
            due.append(run.global_step)
        assert not run.passed(0) and run.last == (iteration == 9)
    assert due == [30, 50, 80, 100]


def test_defaults_that_no_field_of_args_takes_are_named(monkeypatch, capsys):
    """A fork that removes a flag is told on every task, not on the one whose settings name it."""
    with command_line("shac.py"), pytest.raises(SystemExit) as stopped:
        parse(module("shac.py").Args, {"hopper": dict(kl_coef=1.0)})
    assert stopped.value.code == 2 and 'DEFAULTS["hopper"] sets kl_coef, which is no' in capsys.readouterr().err


def test_defaults_may_choose_an_engine():
    with command_line("shac.py"):
        args = parse(module("shac.py").Args, {"ant": dict(physics="mujoco"), "on mujoco": dict(horizon=5)})
    assert (args.physics, args.horizon) == ("mujoco", 5)
    with command_line("shac.py", "--physics", "diffsim"):
        assert parse(module("shac.py").Args, {"ant": dict(physics="mujoco")}).physics == "diffsim"


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"losses/vec": torch.zeros(3)}, "losses/vec is a Tensor of the shape (3,)"),
        ({"note": "hello"}, "note is a str of the shape ()"),
        ({"losses/x": 1.0, "policy/x": 2.0}, "policy/x and losses/x would both be the column x"),
    ],
)
def test_what_cannot_be_logged_is_one_line(numbers, message, capsys):
    run = Run(parsed("shac.py"), 1, 1)
    for log in (run.log, run.mean):
        with pytest.raises(SystemExit):
            log(numbers)
        assert message in capsys.readouterr().err
