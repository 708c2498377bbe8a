"""No stranger's file runs code: at each door a harmless payload, which would leave a mark if the door were open."""

import base64
import io
import json
import os
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
import torch

from diffsim import memory
from diffsim import play as player
from diffsim import policy as exported
from diffsim import policy as policy_module
from diffsim.physics import cache_dir
from diffsim.play import evaluate, load_policy, playback_env
from diffsim.policy import ENTRY, read_policy, write_policy
from tests import TINY, play, run_script, the_run

MARK = "mark-of-a-payload"


class Payload:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return Path.touch, (Path(MARK),)


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """Whether a payload ran, since the last time it was asked."""
    monkeypatch.chdir(tmp_path)

    def ran() -> bool:
        there = Path(MARK).exists()
        Path(MARK).unlink(missing_ok=True)
        return there

    return ran


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_script("shac.py", *TINY, "--env", "cartpole", "--stop-after", 1, "--run-dir", folder)
    return the_run(folder)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def doctored(archive: Path, change) -> Path:
    """The archive with change(name, content) in the place of each entry's content."""
    with zipfile.ZipFile(archive) as old:
        entries = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as new:
        for name, content in entries.items():
            new.writestr(name, content)
    return archive


def pickled(x) -> bytes:
    torch.save(x, MARK + ".pt")
    content = Path(MARK + ".pt").read_bytes()
    os.remove(MARK + ".pt")
    return content


def test_weights_marked_as_pickles_run_nothing(copy, marked):
    def change(name, content):
        if name.endswith("model_weights_config.json"):
            config = json.loads(content)
            for weight in config["config"].values():
                weight["use_pickle"] = True
            return json.dumps(config).encode()
        return pickled(Payload()) if "/weights/weight_" in name else content

    archive = doctored(copy / "policy.pt2", change)
    try:
        torch.export.load(archive)
    except Exception:  # a payload is no tensor
        pass
    assert marked()  # the door is real: this is what play does not call
    assert "2 episodes" in play(copy, "--episodes", 2).stdout
    assert not marked()


@pytest.mark.parametrize("where", ["itself", "weights", "nodes"])
def test_a_pickle_in_the_place_of_the_plain_data(copy, marked, where):
    data = plain_data(copy)
    if where == "itself":
        data = Payload()
    else:
        data["graph"][where] = Payload()
    replace_data(copy, data)
    assert "not a readable policy" in play(copy, expect=2).stderr
    assert not marked()


def plain_data(folder: Path) -> dict:
    with zipfile.ZipFile(folder / "policy.pt2") as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(ENTRY))
        return torch.load(io.BytesIO(base64.b64decode(archive.read(name))), weights_only=True)


def replace_data(folder: Path, data):
    doctored(folder / "policy.pt2", lambda n, c: base64.b64encode(pickled(data)) if n.endswith(ENTRY) else c)


@pytest.mark.parametrize(
    "op",
    "os.system builtins.eval aten.from_file.default aten.__class__.__init__ aten.save.default eval system "
    "aten.add_.Tensor aten..default prim.device.default __import__ aten.resize_.default aten._embedding_bag.default "
    "aten.max_pool2d_with_indices_backward.default".split(),
)
def test_only_core_operations_are_looked_up(copy, op):
    data = plain_data(copy)
    name, _, args, kwargs = data["graph"]["nodes"][0]
    data["graph"]["nodes"][0] = (name, op, args, kwargs)
    replace_data(copy, data)
    assert f"{op} is none of PyTorch's core operations" in play(copy, expect=2).stderr


@pytest.mark.parametrize("word", ["load", "hub", "ops", "nn.Linear", "utils"])
def test_only_types_of_numbers_are_words(word):
    with pytest.raises((ValueError, AttributeError)):
        exported.word(word)


def test_broken_policies_are_named_in_one_line(copy):
    whole = plain_data(copy)

    def last(data) -> list:
        return [{"node": data["graph"]["output"]}]

    for break_it in (
        lambda d: d.pop("graph"),
        lambda d: d.update(obs_dim=3),
        lambda d: d.update(obs_dim="five"),
        lambda d: d["graph"]["weights"].clear(),
        lambda d: d["graph"]["nodes"].reverse(),
        lambda d: d["graph"].update(output="nothing"),
        lambda d: d["graph"].update(nodes=7),
        lambda d: d["graph"]["weights"].update(extra=torch.zeros(2, 2).to_sparse()),
        lambda d: d["graph"]["weights"].update({k: w * torch.nan for k, w in d["graph"]["weights"].items()}),
        lambda d: d["graph"].update(output=d["graph"]["nodes"].append(("b", "aten.isnan.default", last(d), {})) or "b"),
        lambda d: d.update(obs_dim=True),
        lambda d: d.update(env=7),
        lambda d: d.update(env="ant\nreturn 9999"),
        lambda d: d.update(env="a" * 10**5),
        lambda d: d.update(physics=None),
    ):
        data = {**whole, "graph": {**whole["graph"], "weights": dict(whole["graph"]["weights"])}}
        data["graph"]["nodes"] = list(whole["graph"]["nodes"])
        break_it(data)
        replace_data(copy, data)
        said = play(copy, expect=2).stderr.strip()
        assert "not a readable policy" in said and len(said.splitlines()) == 1
    doctored(copy / "policy.pt2", lambda name, content: content if not name.endswith(ENTRY) else b"!")
    assert "not a readable policy" in play(copy, expect=2).stderr


def test_a_bomb_is_not_unpacked(copy, monkeypatch):
    limits = []
    monkeypatch.setattr(memory, "limit", lambda: limits.append(1))
    with zipfile.ZipFile(copy / "policy.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"policy/extra/{ENTRY}", "A" * 10**7)
    assert "it is compressed" in play(copy, expect=2).stderr and limits


# --- what it says, and where it writes ----------------------------------------------------------------------------
def test_a_strangers_names_neither_forge_lines_nor_commands(copy, refused):
    data = plain_data(copy)
    replace_data(copy, data | dict(env="theirs.py:T; echo"))
    assert "--env 'theirs.py:T; echo'" in play(copy, expect=2).stderr
    checkpoint = torch.load(copy / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | dict(script="shac\n\x1b[2Jdone"), copy / "checkpoint.pt")
    assert r"a checkpoint of shac\n\x1b[2Jdone.py" in refused("shac.py", "--resume", copy)
    checkpoint["args"]["env"] = "theirs.py:T; echo"
    torch.save(checkpoint, copy / "checkpoint.pt")
    assert "--env 'theirs.py:T; echo'" in refused("shac.py", "--resume", copy)


def test_links_in_a_run_folder_are_not_followed(copy, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("tmp-checkpoint.pt", "tmp-policy.pt2", "tmp-metrics.csv", "tmp-config.json", "video.mp4", "video.png"):
        (copy / name).symlink_to(mine)
    run_script("shac.py", "--resume", copy, "--stop-after", 3)
    monkeypatch.setattr(player, "film", lambda env, qpos, video: (video.touch(), video.with_suffix(".png").touch()))
    player.record(copy, copy / "video.mp4")
    assert mine.read_text() == "mine" and not any(file.is_symlink() for file in copy.iterdir())


def test_pipes_in_a_run_folder_are_not_waited_for(copy, refused):
    def pipe(name):
        (copy / name).unlink()
        os.mkfifo(copy / name)

    pipe("metrics.csv")
    pipe("config.json")
    run_script("shac.py", "--resume", copy, "--stop-after", 3)
    pipe("policy.pt2")
    pipe("checkpoint.pt")
    assert "no policy at" in play(copy, expect=2).stderr
    for flag in ("--resume", "--init-from"):
        assert "no checkpoint.pt there" in refused("shac.py", flag, copy)


# --- code in a task's file ----------------------------------------------------------------------------------------
@pytest.fixture
def stranger(reach, tmp_path, marked):
    """A run on a task whose file, when imported, leaves the mark."""
    code = Path(reach.rpartition(":")[0]).read_text()
    file = tmp_path / "theirs.py"
    file.write_text(code + f"\n\nclass Theirs(Reach):\n    substeps = 1\n\n\nPath({MARK!r}).touch()\n")
    if "from pathlib import Path" not in code:
        file.write_text("from pathlib import Path\n" + file.read_text())
    env = f"{file}:Theirs"
    run_script("shac.py", *TINY, "--env", env, "--stop-after", 1, "--run-dir", tmp_path / "runs")
    assert marked()  # the user named it: its code runs
    return the_run(tmp_path / "runs"), env


def test_play_imports_a_file_that_the_user_names(stranger, marked):
    folder, env = stranger
    said = play(folder, "--episodes", 1, expect=2).stderr
    assert f"if you trust that file: --env {env}" in said and len(said.strip().splitlines()) == 1 and not marked()
    assert "2 episodes" in play(folder, "--episodes", 2, "--env", env).stdout and marked()
    assert "the policy wants" in play(folder, "--env", "ant", expect=2).stderr and not marked()


def test_resume_imports_a_file_that_the_user_names(stranger, marked, refused):
    folder, env = stranger
    assert f"if you trust that file: --env {env}" in refused("shac.py", "--resume", folder) and not marked()
    assert "resuming keeps its arguments" in refused("shac.py", "--resume", folder, "--env", env, "--seed", 7)
    marked()
    run_script("shac.py", "--resume", folder, "--env", env, "--stop-after", 2)
    assert marked()
    file, _, name = env.rpartition(":")
    moved = shutil.move(file, f"{file[:-3]}_moved.py")
    run_script("shac.py", "--resume", folder, "--env", f"{moved}:{name}", "--stop-after", 3)
    assert marked()


def test_a_checkpoint_is_data(copy, marked, refused):
    (copy / "checkpoint.pt").write_bytes(pickled(dict(script="shac", args=Payload())))
    assert "not a readable checkpoint" in refused("shac.py", "--resume", copy)
    assert not marked()


# --- compiled physics is machine code -----------------------------------------------------------------------------
def test_the_cache_is_this_users_alone(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "cache"
    monkeypatch.setenv("DIFFSIM_CACHE", str(folder))
    assert stat.S_IMODE(cache_dir().stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="chmod 700"):
        cache_dir()
    folder.chmod(0o755)
    assert cache_dir() == folder
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match="another user's: set DIFFSIM_CACHE"):
        cache_dir()
    monkeypatch.setenv("DIFFSIM_CACHE", "/proc/nowhere")
    with pytest.raises(ValueError, match="set DIFFSIM_CACHE to another folder"):
        cache_dir()


# --- what is written ----------------------------------------------------------------------------------------------
class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = torch.nn.Conv1d(1, 4, 3), torch.nn.Linear(32, 2)

    def forward(self, obs):
        return torch.tanh(self.out(self.conv(obs[:, None]).relu().flatten(1)))


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = torch.nn.Linear(1, 8), torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, obs):
        x = self.embed(obs[..., None])
        return self.mix(x, x, x, need_weights=False)[0].mean(1).clamp(-1, 1)


class Constants(torch.nn.Module):
    def forward(self, obs):
        kept = torch.where(obs[:, :1] > 0, obs.new_tensor([1.0, 2.0]), 0.5)
        return kept + torch.arange(obs.shape[0])[:, None] + torch.zeros(1, dtype=torch.float64).float()


class Branches(torch.nn.Module):
    def forward(self, obs):
        return obs if obs.sum() > 0 else -obs


@pytest.mark.parametrize("network", [Conv, Attention, Constants])
def test_a_forks_network_is_read_as_it_was_written(network, tmp_path):
    policy, obs = network(), torch.randn(7, 10)
    write_policy(policy, 10, "cpu", tmp_path / "policy.pt2", env="ant", physics="mujoco", stiffness=0.5, smoothing=2)
    read = read_policy(tmp_path)
    assert (read.env, read.physics, read.obs_dim) == ("ant", "mujoco", 10)
    assert read.softness == dict(stiffness=0.5, smoothing=2)  # a fork may write an integer
    torch.testing.assert_close(read(obs), policy(obs))
    torch.testing.assert_close(torch.export.load(tmp_path / "policy.pt2").module()(obs), policy(obs))


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = torch.nn.Linear(10, 2), 1.0

    def forward(self, obs):
        return self.scale * self.layer(obs)


def test_a_policy_is_traced_again_only_where_more_than_its_weights_has_changed(tmp_path, monkeypatch):
    traced, trace, policy, obs = [], policy_module.trace, Scaled(), torch.randn(7, 10)
    monkeypatch.setattr(policy_module, "trace", lambda *args: traced.append(1) or trace(*args))

    def times_traced() -> int:
        write_policy(policy, 10, "cpu", tmp_path / "policy.pt2")
        torch.testing.assert_close(read_policy(tmp_path)(obs), policy(obs))
        torch.testing.assert_close(torch.export.load(tmp_path / "policy.pt2").module()(obs), policy(obs))
        return len(traced)

    assert times_traced() == times_traced() == 1
    torch.nn.init.normal_(policy.layer.weight)
    assert times_traced() == 1
    policy.scale = 2.0
    assert times_traced() == 2
    policy.layer = torch.nn.Linear(10, 2)
    assert times_traced() == 3


def test_a_network_that_is_no_graph_is_named_before_training(tmp_path, capfd):
    with pytest.raises(ValueError, match="the policy cannot be exported, so nobody could play it: .*data-dependent"):
        write_policy(Branches(), 10, "cpu", tmp_path / "policy.pt2")
    out = capfd.readouterr()
    assert not out.out and not out.err and not (tmp_path / "policy.pt2").exists()


def test_plain_data_is_plain(run):
    """Strings, numbers and tensors, which need no class to be read."""

    def check(x):
        if isinstance(x, dict):
            x = [*x.keys(), *x.values()]
        if isinstance(x, (list, tuple)):
            return all(map(check, x))
        return x is None or type(x) in (str, int, float, bool, torch.Tensor)

    assert check(plain_data(run))


def test_the_best_policy_is_kept_beside_the_last(arm, tmp_path):
    """policy_best.pt2 has the return of the best evaluation, and a run that goes on knows it."""
    flags = [*TINY, "--env", arm, "--run-dir", tmp_path, "--eval-every", 4, "--total-timesteps", 12]
    run_script("shac.py", *flags, "--stop-after", 1)
    run = the_run(tmp_path)
    best, name = load_policy(run / "policy_best.pt2")
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert float(evaluate(playback_env(name, 2), best, 2).mean()) == pytest.approx(checkpoint["best"], rel=1e-4)
    first = (run / "policy_best.pt2").read_bytes()
    for better, kept in ((1e9, True), (-1e9, False)):  # than what the next iteration comes to
        torch.save(torch.load(run / "checkpoint.pt", weights_only=True) | dict(best=better), run / "checkpoint.pt")
        run_script("shac.py", "--resume", run, "--env", arm, "--stop-after", 2 if kept else 3)
        assert ((run / "policy_best.pt2").read_bytes() == first) == kept
