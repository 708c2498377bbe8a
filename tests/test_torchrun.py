"""Several processes of one run. torchrun itself where signals are sent; elsewhere two forks of this process, which has
imported torch already, play its two processes."""

import gc
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import diffsim
import rpo_diffsim as rpo
from diffsim import ranks
from diffsim.board import LostError
from diffsim.policy import import_compiler
from diffsim.run import Run
from tests import ROOT, WINDOWS, command_line, rows, run_script, the_run
from tests.test_scripts import small

pytestmark = pytest.mark.skipif(not Path("/dev/shm").exists(), reason="forks, and looks into Linux's files")


def play_rank(rank: int, folder: Path, function, args):
    """What a fork does: rank `rank` of two, on the loopback interface."""
    gc.freeze()  # what other tests left, MuJoCo's thread pools among it, cannot be freed in a fork
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    os.environ |= dict(GLOO_SOCKET_IFNAME="lo", LOCAL_WORLD_SIZE="2")
    ranks.RANK = ranks.LOCAL_RANK = rank
    ranks.WORLD, store = 2, dist.FileStore(str(folder / "store"), 2)
    ranks.store = lambda: store
    torch.save(function(*args), folder / f"result{rank}")


def on_two_ranks(folder: Path, function, *args, said="") -> list:
    """function(*args) as two processes compute it; what they say on stderr."""
    import_compiler()  # once, not in each fork
    folder.mkdir()
    forks = [multiprocessing.get_context("fork").Process(target=play_rank, args=(rank, folder, function, args))
             for rank in (0, 1)]  # fmt: skip
    for fork in forks:
        fork.start()
    deadline = time.time() + 60
    while any([fork.is_alive() for fork in forks]) and time.time() < deadline:  # all are asked: no zombies
        time.sleep(0.01)
    for fork in forks:
        fork.kill()
        fork.join()
    out, err = ("".join((folder / f"{name}{rank}").read_text() for rank in (0, 1)) for name in ("out", "err"))
    assert [fork.exitcode for fork in forks] == [0, 0], err
    assert re.fullmatch(said, err.strip()) and out == (folder / "out0").read_text()  # one line, and rank 0 speaks
    return [torch.load(folder / f"result{rank}") for rank in (0, 1)]


# --- the same numbers as of one process ---------------------------------------------------------------------------
def gradients(states: dict, noise, model: dict) -> dict:
    """SHAC's gradient of three steps from given states, and RPO's other statistics, of this process's share of them."""
    ranks.start(noise.shape[1], "cpu")
    n = ranks.share(noise.shape[1])
    mine = slice(ranks.RANK * n, (ranks.RANK + 1) * n)
    env = diffsim.make("hopper", n, compile=False, dtype=torch.float64)
    env.set_state(env.get_state() | {k: x[..., mine] for k, x in states.items()})
    actor = rpo.Actor(11, 3, rpo.Args()).double()
    if ranks.RANK == 0:  # the other process has it from here
        actor.load_state_dict(model)
    ranks.broadcast(actor)
    obs, normalizer, rewards, seen = env.detach(), rpo.Normalizer(11).double(), [], []
    for z in noise[:, mine]:
        policy = actor(obs)
        seen.append(obs.detach())
        obs, reward, *_ = env.step(torch.tanh(policy.mean + policy.stddev * z))
        rewards.append(reward)
    (-torch.stack(rewards).mean()).backward()
    ranks.average_gradients(actor)
    normalizer.update(torch.cat(seen))
    normalizer.update(2 * torch.cat(seen) + 1)
    rewards = torch.stack(rewards).detach().flatten()
    statistics = dict(a_mean=ranks.mean(rewards), mean_std=torch.stack(ranks.mean_std(rewards)))
    return statistics | normalizer.state_dict() | {name: p.grad for name, p in actor.named_parameters()}


@pytest.mark.parametrize("way", ["memory", "gloo"])
def test_two_ranks_have_the_gradient_and_the_moments_of_one(way, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "ONE_MACHINE", way == "memory")
    env = diffsim.make("hopper", 6, seed=1, compile=False, dtype=torch.float64)
    env.reset()
    states = {k: x for k, x in env.get_state().items() if k not in ("start_qpos", "start_qvel", "generator")}
    model, noise = rpo.Actor(11, 3, rpo.Args()).state_dict(), torch.randn(3, 6, 3, dtype=torch.float64)
    one = gradients(states, noise, model)
    for of_rank in on_two_ranks(tmp_path / "two", gradients, states, noise, model):
        for name, x in one.items():
            torch.testing.assert_close(of_rank[name], x, rtol=1e-6, atol=1e-9, msg=name)
    assert one["mean.0.weight"].abs().max() > 1e-3


def growing_messages() -> list:
    ranks.start(2, "cpu")
    sent = [
        torch.arange(n, dtype=dtype) + ranks.RANK for n in (1, 3, 10**6, 7) for dtype in (torch.float64, torch.int32)
    ]
    return [ranks._of_all(x) for x in sent] + [ranks.board.exists]


@pytest.mark.parametrize("room", [True, False])
def test_a_board_grows_with_the_messages_and_may_be_missing(room, tmp_path, monkeypatch):
    if not room:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    before = set(Path("/dev/shm").iterdir())
    for *messages, exists in on_two_ranks(tmp_path / "two", growing_messages):
        assert exists == room
        for x in messages:
            assert torch.equal(x[1], x[0] + 1) and len(x) == 2 and x.dtype in (torch.float64, torch.int32)
    assert set(Path("/dev/shm").iterdir()) == before


def waiting() -> str:
    """The second process ends; the first waits for it."""
    ranks.start(2, "cpu")
    ranks.agree(0)
    if ranks.RANK:
        return ""
    with pytest.raises(LostError) as lost:
        ranks.agree(0)
    return str(lost.value)


def test_a_process_that_has_ended_is_not_waited_for(tmp_path):
    assert on_two_ranks(tmp_path / "two", waiting)[0] == "rank 1 has ended"


def messages(order: Path) -> tuple:
    ranks.start(2, "cpu")
    with ranks.in_turn():
        time.sleep(0 if ranks.RANK else 0.3)
        with open(order, "a") as file:
            file.write(str(ranks.RANK))
    env = diffsim.make("cartpole", 1, seed=ranks.seed(1), compile=False)
    env.reset()
    return ranks.agree(15 * ranks.RANK), ranks.gather(ranks.RANK), ranks.share(5), ranks.speaks(), env.qpos


def test_ranks_agree_take_turns_and_have_random_streams_of_their_own(tmp_path):
    zero, one = on_two_ranks(tmp_path / "two", messages, tmp_path / "order")
    assert (tmp_path / "order").read_text() == "01"
    assert zero[:2] == one[:2] == (15, [0, 1]) and (zero[2], one[2]) == (3, 2)
    assert sorted((zero[3], one[3])) == [False, True]  # one line for both
    alone = diffsim.make("cartpole", 1, seed=1, compile=False)
    alone.reset()
    assert torch.equal(alone.qpos, zero[4]) and not torch.equal(zero[4], one[4])


# --- runs ---------------------------------------------------------------------------------------------------------
def run(script: str, *args) -> dict:
    """What a script's networks, normalisers and optimisers are at its end."""
    seen, restore = {}, Run.restore

    def spy(self, policy, env, **parts):
        seen.update(parts)
        restore(self, policy, env, **parts)

    Run.restore = spy
    with command_line(script, *args):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stopped:
            assert not stopped.code, stopped.code
    assert not dist.is_initialized()  # a process that ends before gloo's threads may abort
    return {name: part.state_dict() for name, part in seen.items() if name != "return_scale"}  # it is of a rank


def flags(script: str, env: str, folder: Path, **more) -> list:
    given = small(
        script, env, folder, num_envs=4, total_timesteps=32, save_every=16, eval_every=16, eval_episodes=3, **more
    )
    of_windows = ["--score-share", 0.5, "--normalize-returns", "--num-critics", 2]
    return given + (of_windows if script in WINDOWS else ["--target-kl", 0.001])


def assert_equal(one, two, name=""):
    """Of checkpoints, but for clocks and folders."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), name
        for key in one.keys() - {"wall_time_s", "run_dir", "stop_after", "resume", "sums"}:
            assert_equal(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), name
        for i, pair in enumerate(zip(one, two)):
            assert_equal(*pair, f"{name}.{i}")
    else:
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, name


@pytest.mark.parametrize("script", [*WINDOWS, "ppo_baseline.py"])
def test_two_ranks_stay_equal_and_a_resumed_run_equals_another(script, arm, tmp_path, refused):
    at_once, in_two = tmp_path / "at_once", tmp_path / "in_two"
    parts, others = on_two_ranks(tmp_path / "a", run, script, *flags(script, arm, at_once))
    assert_equal(parts, others)
    on_two_ranks(tmp_path / "b", run, script, *flags(script, arm, in_two, stop_after=2))
    assert "-m torch.distributed.run --standalone --nproc-per-node 2" in (tmp_path / "b" / "out0").read_text()
    said = refused(script, "--resume", the_run(in_two), "--env", arm)
    assert "a run of 2 process(es) does not go on with 1; start it with torchrun --nproc-per-node 2" in said
    on_two_ranks(tmp_path / "c", run, script, "--resume", the_run(in_two), "--env", arm)
    one, two = (torch.load(the_run(folder) / "checkpoint.pt", weights_only=True) for folder in (at_once, in_two))
    assert_equal(one, two)
    assert rows(at_once) == rows(in_two)
    (other,) = one["others"]
    assert not torch.equal(other["env"]["qpos"], one["env"]["qpos"]) and not torch.equal(other["rng"], one["rng"])
    assert one["global_step"] == 32 and one["env"]["qpos"].shape[1] == 2  # --num-envs is the number over all processes


def misfortune(what: str, *args) -> int:
    """The exit code of a run of which the second process alone has a NaN in a state, or gets a signal."""
    lap = Run.lap

    def strike(self, name):
        lap(self, name)
        if ranks.RANK and self.iteration == 2 and name == "critic":
            if what == "signal":
                signal.raise_signal(signal.SIGTERM)
            else:
                self.env.qpos[0, 0] = torch.nan

    Run.lap = strike
    with command_line("rpo_diffsim.py", *args), pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "rpo_diffsim.py"), run_name="__main__")
    return stopped.value.code


def test_what_befalls_one_process_ends_all(tmp_path):
    args = small("rpo_diffsim.py", "cartpole", tmp_path / "run", save_every=8, num_envs=4)
    said = r"rpo_diffsim.py: iteration 2: env.qpos is not finite; the last good checkpoint is .*checkpoint.pt"
    assert on_two_ranks(tmp_path / "nan", misfortune, "nan", *args, said=said) == [1, 1]
    resumed = ["--resume", the_run(tmp_path / "run")]
    assert torch.load(resumed[1] / "checkpoint.pt", weights_only=True)["iteration"] == 2
    said = "finishing this iteration; after 30 s torchrun ends it, unsaved"
    assert on_two_ranks(tmp_path / "signal", misfortune, "signal", *resumed, said=said) == [143, 143]
    assert torch.load(resumed[1] / "checkpoint.pt", weights_only=True)["iteration"] == 3


def test_what_two_processes_cannot_do_is_one_line(tmp_path, refused, monkeypatch):
    run_script("shac.py", *small("shac.py", run_dir=tmp_path, stop_after=1))
    monkeypatch.setattr(ranks, "WORLD", 2)
    monkeypatch.setattr(ranks, "speaks", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(ranks, "store", lambda: None)
    odd = small("rpo_diffsim.py", run_dir=tmp_path, num_envs=3)
    assert "--num-envs 3 is the number over all 2 processes, which must divide it" in refused("rpo_diffsim.py", *odd)
    said = refused("shac.py", "--resume", the_run(tmp_path))
    assert "a run of 1 process(es) does not go on with 2; start it without torchrun" in said
    assert "start it without torchrun" in refused("rp_pgm_mb.py", "--env", "cartpole")
    few = small("ppo_baseline.py", run_dir=tmp_path, num_envs=2, num_steps=3)
    assert "--num-minibatches is 2; a batch of 3 is too small" in refused("ppo_baseline.py", *few)


# --- torchrun itself ----------------------------------------------------------------------------------------------
def torchrun(command: list[str]) -> subprocess.Popen:
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, **streams)


def processes_of(launcher: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def test_ctrl_c_saves_and_a_killed_process_ends_all(tmp_path):
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 rpo_diffsim.py".split()
    args = small("rpo_diffsim.py", run_dir=tmp_path, num_envs=4, total_timesteps=10**7, save_every=80)
    program = torchrun([sys.executable, *launch, *args])
    for line in program.stdout:
        if line.startswith("step "):
            break
    program.send_signal(signal.SIGINT)
    out = program.communicate(timeout=60)[0]
    run = the_run(tmp_path)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    assert saved == int(rows(tmp_path)[-1]["global_step"])  # nothing is lost
    command = re.search("interrupted and saved; continue with: (.*)", out)[1]
    assert out.count("finishing this iteration") == 1 and "rpo_diffsim.py: " not in out and program.returncode

    program = torchrun(shlex.split(command))
    for line in program.stdout:
        if line.startswith("step ") and int(line.split()[1].replace(",", "")) > saved + 80:
            break
    ranks_of_it = processes_of(program)
    os.kill(ranks_of_it[1], signal.SIGKILL)
    begun = time.time()
    out = program.communicate(timeout=60)[0]
    assert len(lines := [x for x in out.splitlines() if x.startswith("rpo_diffsim.py: ")]) == 1, out
    assert "a process was lost (" in lines[0] and lines[0].endswith("--resume goes on from what was saved")
    assert "finishing" not in out and out.count("Traceback") <= 1 and time.time() - begun < 60 and program.returncode
    for pid in ranks_of_it:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    last = int(rows(tmp_path)[-1]["global_step"])
    assert 0 <= last - torch.load(run / "checkpoint.pt", weights_only=True)["global_step"] <= 80 < last
