"""The committed results, the tables and figures made of them, and the script that adds to them."""

import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from fnmatch import fnmatch
from math import nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import diffsim
import rpo_diffsim as rpo
from diffsim.tasks import TASKS, Cartpole
from tests import run_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gradient_truth  # noqa: E402
import load  # noqa: E402
import opponents  # noqa: E402
import plot  # noqa: E402
import tables  # noqa: E402
import throughput  # noqa: E402
import train  # noqa: E402


@pytest.fixture(scope="module")
def runs():
    return tables.load_runs().set_index("run", drop=False)


# --- the committed files ------------------------------------------------------------------------------------------
def test_readmes_have_the_tables_of_the_csvs(monkeypatch):
    before = [readme.read_text() for readme in tables.READMES]
    assert "<!-- table learning -->" in before[1]
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables.main()  # exits where a table differs
    assert [readme.read_text() for readme in tables.READMES] == before


def test_readmes_have_no_returns_in_tables_of_their_own():
    for readme in tables.READMES:
        by_hand = tables.MARKED.sub("", readme.read_text())
        assert not [line for line in by_hand.splitlines() if line.startswith("|") and re.search(r"\d,\d{3}", line)]


def test_links_lead_somewhere():
    def anchors(page):
        headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
        return {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings}

    for page in [*tables.READMES, BENCHMARKS.parent / "diffsim" / "README.md"]:
        for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / file if file else page
            assert target.exists() and (not anchor or anchor in anchors(target)), f"{page}: {file}#{anchor}"


@pytest.mark.parametrize(
    "change, complaint", [(("12,", "13,"), "not from the CSVs"), (("learning", "lerning"), "asks")]
)
def test_check_finds_a_changed_number_and_an_unknown_table(change, complaint, monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((BENCHMARKS / "README.md").read_text().replace(*change))
    monkeypatch.setattr(tables, "READMES", [readme])
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match=complaint) as error:
        tables.main()
    assert "\n" not in str(error.value)


def test_a_run_is_named_by_what_it_is(runs):
    assert runs.index.is_unique
    for run in runs.itertuples():
        assert run.run == f"{run.env}__{run.script}{run.tag and '-' + run.tag}__{run.seed}"
        assert bool(run.tag) == bool(runs.loc[run.run, "flags"])
        assert re.fullmatch(r"[0-9a-f]{7,12}(\+dirty)?", run.commit) and run.versions.startswith("torch")
        assert (run.algorithm == "SAPO") == ("--learn-entropy-coef" in runs.loc[run.run, "flags"])


def test_curves_are_those_of_the_runs(runs):
    curves = tables.load_curves()
    recorded = pd.read_csv(BENCHMARKS / "curves.csv.gz").groupby("run").wall_time_s.last() / 60
    assert set(curves) == set(runs.index)
    for name, curve in curves.items():
        assert len(curve) <= train.POINTS and curve.global_step.is_monotonic_increasing
        assert curve.global_step.iloc[-1] == runs.steps[name]
        stopped = runs.seed[name] > 100  # a trial may have been, between two evaluations
        evaluations = curve.eval_return.dropna() if stopped else curve.eval_return
        assert evaluations.iloc[-1] == pytest.approx(runs.eval_return[name], rel=1e-4)
        assert recorded[name] == pytest.approx(runs.minutes[name], rel=1e-3)


def test_time_passes_by_a_measured_speed():
    curves, per_s = tables.load_curves(), load.speed("ant", "RPO", "diffsim")
    paced, other = curves["ant__rpo_diffsim__1"], curves["ant__rpo_diffsim-paper__1"]
    first, last = paced.iloc[0], paced.iloc[-1]
    assert per_s > 0 and not load.speed("ant", "RPO", "gymnasium") > 0
    assert last.wall_time_s - first.wall_time_s == pytest.approx((last.steps - first.steps) / per_s)
    recorded = load.load_runs().set_index("run").minutes["ant__rpo_diffsim-paper__1"]  # another setting keeps its own
    assert other.minutes.iloc[-1] == pytest.approx(recorded, rel=1e-3)


def test_every_run_is_in_a_table(runs):
    shown = {name for which, _ in tables.VARIANTS.values() for name in runs.query(which).run}
    shown |= set(runs.run[(runs.script == "ppo_baseline") & runs.tag.isin(load.ORDINARY)])  # beside others' returns
    shown |= set(pd.read_csv(BENCHMARKS / "probes.csv").run)
    assert set(runs.run) == shown


def test_benchmarks_stay_small():
    files = [path for path in BENCHMARKS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) <= 25
    assert max(len(path.read_text().splitlines()) for path in BENCHMARKS.glob("*.py")) <= 250
    assert sum(path.stat().st_size for path in files) <= 3e6
    assert sum(len(path.read_text().splitlines()) for path in BENCHMARKS.glob("*.py")) <= 1440


# --- several runs -------------------------------------------------------------------------------------------------
def test_interquartile_mean_and_its_interval():
    centre, low, high = load.iqm([1.0, 2, 3, 4, 5, 6, 7, 800])
    assert centre == 4.5 and low < centre < high == pytest.approx(205, abs=205) and low >= 1
    assert load.iqm([1.0, 2, 3, 4, 5, 6, 7, 800]) == (centre, low, high)
    assert load.iqm([1.0, 2, 6])[0] == 3  # of three, their mean
    assert load.iqm([7.0]) == (7, 7, 7)
    assert load.iqm([0.0, 0, 0], [1.0, 1, 1]) == (0.5, 0.5, 0.5)  # each task keeps its share of every draw
    low, high = load.iqm(np.random.default_rng(1).normal(10, 1, 400))[1:]
    assert high - low == pytest.approx(2 * 1.96 * 1.1 / 20, rel=0.2)  # 1.1: the IQM's deviation by the mean's


@pytest.fixture
def a_curve(monkeypatch):
    steps = 1e6 * np.array([0.25, 0.5, 0.995, 1.5, 2])
    evaluations = [nan, 100.0, 400, 300, 40]
    curve = pd.DataFrame(dict(steps=steps, minutes=steps / 6e5, eval_return=evaluations))
    monkeypatch.setattr(load, "load_curves", lambda: dict(long=curve, short=curve[:2]))


def test_evaluation_after_so_many_steps_or_minutes(a_curve):
    at = load.evaluation_at
    assert at("long", "steps", 747_500) == 250 and at("long", "minutes", 200 / 60) == 40
    assert np.isnan(at("long", "steps", 4e5))  # before the first evaluation
    assert np.isnan(at("short", "steps", 1e6)) and at("short", "minutes", 9e9) == 100
    assert np.isnan(at("long", "minutes", nan))


def test_rivals_after_as_many_minutes_and_the_share_of_their_steps(monkeypatch):
    curve = pd.DataFrame(dict(steps=[5, 20, 60, 100], episodic_return=[9.0, 1, 4, 8]))
    curves = dict(a=curve, b=curve, good=curve.assign(episodic_return=[9.0, 2, 8, 9]), bad=curve - 1)
    runs = pd.DataFrame(dict(run=list(curves), algorithm=["SHAC", "SHAC", "RPO", "RPO"], physics="diffsim"))
    runs = runs.assign(env="ant", mujoco=False, tag="", steps=100)
    monkeypatch.setattr(load, "load_runs", lambda: runs)
    monkeypatch.setattr(load, "speed", lambda env, algorithm, mujoco: dict(RPO=2000, SHAC=1000, PPO=nan)[algorithm])
    for module in (load, tables):
        monkeypatch.setattr(module, "load_curves", lambda: curves)
    rpo = runs[runs.algorithm == "RPO"]
    assert tables.COLUMNS["SHAC in these minutes"](rpo) == "3 [3, 3]"  # half the steps: 3.25
    assert tables.COLUMNS["SHAC in these steps"](rpo) == "8 [8, 8]"
    assert tables.COLUMNS["share of SHAC's steps"](rpo) == "inf [0.60, inf]"  # not the 9 at the beginning
    assert tables.COLUMNS["PPO in these minutes"](rpo) == tables.share_of_steps("PPO", rpo) == ""


def test_lowest_evaluation_shows_a_collapse(a_curve):
    assert load.lowest_after_1m("long") == 40 / 300  # of 400, 300 and 40
    assert np.isnan(load.lowest_after_1m("short"))


def test_ppo_on_the_twin_stands_before_that_on_gymnasium():
    rows = [("a", "PPO", "gymnasium"), ("a", "PPO", "mujoco"), ("a", "RPO", "gymnasium"), ("b", "PPO", "gymnasium")]
    assert load.latest_ppo(pd.DataFrame(rows, columns=["env", "algorithm", "physics"])).index.tolist() == [1, 2, 3]


# --- gradient_truth.py --------------------------------------------------------------------------------------------
class Ledge(Cartpole):
    """A cart that is faster than EDGE fell off."""

    EDGE, substeps = 0.05, 1

    def terminated(self, qpos, qvel):
        return qvel[0] > self.EDGE

    def reward(self, qpos, qvel, action):
        return 1 + 0.1 * qvel[0]


def rpo_checkpoint(folder: Path, monkeypatch, num_envs: int = 8, **flags) -> Path:
    """What RPO leaves on Ledge before its first update, all carts at rest. Time limits end some episodes, too."""
    monkeypatch.setitem(TASKS, "ledge", Ledge)
    args = dict(env="ledge", physics="diffsim", num_envs=num_envs, horizon=4, actor_hidden=(8,), critic_hidden=(8,))
    args = rpo.Args(**args | dict(max_action_grad_norm=0.5) | flags)
    env = diffsim.make("ledge", num_envs, physics="diffsim", compile=False)
    env.reset(options=dict(stagger=True))
    state = env.get_state()
    state |= {name: torch.zeros_like(state[name]) for name in ("qpos", "qvel")}
    parts = dict(actor=rpo.Actor(5, 1, args), target_critic=rpo.Critics(5, args), normalizer=rpo.Normalizer(5))
    checkpoint = {name: part.state_dict() for name, part in parts.items()} | dict(script="rpo_diffsim", env=state)
    folder.mkdir(exist_ok=True)
    torch.save(checkpoint | dict(args=asdict(args), iteration=3, global_step=12 * num_envs), folder / "checkpoint.pt")
    return folder


def estimates(folder: Path, delta: float):
    lab = gradient_truth.Lab(str(folder), "float64", compile=False)
    return lab.draw(delta)


def test_the_gradient_is_the_difference_of_windows_where_episodes_end_alike(monkeypatch, tmp_path):
    found, happened = estimates(rpo_checkpoint(tmp_path, monkeypatch, 256), delta=1e-3)
    assert 0.2 < happened["fell"].double().mean() < happened["ended"].double().mean() < 0.8
    same = ~happened["moved"]
    assert 0 < int((~same).sum()) < 16  # a step so small hardly moves an end; it counts for much
    torch.testing.assert_close(found["lambda 1"][same], found["truth"][same], rtol=1e-4, atol=1e-5)
    assert (found["lambda 1"] - found["truth"])[~same].abs().max() > 100
    assert not found["still"][~same].any() and torch.equal(found["still"][same], found["truth"][same])
    assert not torch.allclose(found["lambda 0.9"], found["lambda 1"], rtol=0.01)


def test_lambda_0_is_the_limit_and_a_bound_bounds(monkeypatch, tmp_path):
    folder = rpo_checkpoint(tmp_path, monkeypatch)
    monkeypatch.setattr(gradient_truth, "LAMBDAS", (0.0, 1e-4))
    monkeypatch.setattr(gradient_truth, "BOUND", 1e-3)
    found, _ = estimates(folder, delta=0.05)
    torch.testing.assert_close(found["lambda 0"], found["lambda 0.0001"], rtol=1e-3, atol=1e-6)
    assert found["lambda 0"].abs().max() > 4.1e-3 > found["lambda 0 bounded"].abs().max()


def test_ends_that_move_are_the_score_functions_to_see(monkeypatch, tmp_path):
    found, _ = estimates(rpo_checkpoint(tmp_path, monkeypatch, 512), delta=0.05)
    rows = {row["estimator"]: row for row in gradient_truth.summary({name: x[None] for name, x in found.items()})}
    truth, score, cached = rows["truth"], rows["score 1"], rows["lambda 1"]
    assert float(truth["mean"]) < -8 * truth["error"]  # who speeds up falls
    assert abs(float(score["mean"]) - float(truth["mean"])) < 4 * (truth["error"] ** 2 + score["error"] ** 2) ** 0.5
    assert float(cached["mean"]) > 20 * cached["error"] and cached["cosine"] == -1 and cached["bias"] > 1
    assert truth["by_moved"] == pytest.approx(1, abs=0.1) and score["cosine"] == 1 and score["bias"] < 0.3


def test_truth_adds_rows_in_place_of_those_of_the_same_checkpoint(monkeypatch, tmp_path):
    folder, others = rpo_checkpoint(tmp_path / "a", monkeypatch), rpo_checkpoint(tmp_path / "b", monkeypatch, gamma=0.9)
    flags = "--draws", "1", "--no-compile", "--results", tmp_path
    for given in ((folder, others), (folder / "checkpoint.pt",)):
        run_script("benchmarks/gradient_truth.py", *given, *flags)
    rows = pd.read_csv(tmp_path / "truth.csv")
    assert len(rows) == 2 * (4 + 2 * len(gradient_truth.LAMBDAS)) and not rows.duplicated(["run", "estimator"]).any()
    first, second = sorted(rows.run.unique(), key=len)
    assert first == second.replace("--gamma 0.9 ", "") != second
    assert "rpo_diffsim.py --env ledge --physics diffsim --seed 1" in first and first.endswith(" --stop-after 3")
    assert (rows.windows == 8).all() and rows.cosine.between(-1.001, 1.001).all()


def test_truth_of_what_is_no_run_of_rpo_is_one_line(monkeypatch, tmp_path, refused):
    def said(run):
        return refused("benchmarks/gradient_truth.py", run, "--no-compile", "--results", tmp_path / "results")

    assert "no checkpoint.pt there" in said(tmp_path / "nowhere")
    assert "a checkpoint of shac.py" in said(run_folder(tmp_path / "shac"))
    assert "unknown env 'antt'" in said(rpo_checkpoint(tmp_path / "a", monkeypatch, env="antt"))
    assert "if you trust that file" in said(rpo_checkpoint(tmp_path / "b", monkeypatch, env="my.py:Task"))
    assert "too few" in said(rpo_checkpoint(tmp_path / "c", monkeypatch, 2))
    assert "another version" in said(run_folder(tmp_path / "d", script="rpo_diffsim"))
    assert "name run folders" in refused("benchmarks/gradient_truth.py")
    assert not (tmp_path / "results").exists()


# --- plots --------------------------------------------------------------------------------------------------------
def run_folder(path: Path, seed=1, rows=300, script="shac", **flags) -> Path:
    """What a script leaves, without training."""
    path.mkdir(parents=True)
    steps = 64 * np.arange(1, rows + 1)
    metrics = dict(iteration=range(rows), global_step=steps, wall_time_s=0.1 * steps, episodic_return=seed * steps)
    metrics |= dict(eval_return=np.where(np.arange(rows) % 100 == 99, 2.0 * steps, nan), approx_kl=0.5, std=0.25)
    pd.DataFrame(metrics).to_csv(path / "metrics.csv", index=False)
    args = dict(env="ant", seed=seed, physics="diffsim", eval_episodes=64, run_dir=str(path.parent)) | flags
    torch.save(dict(script=script, args=args), path / "checkpoint.pt")
    (path / "config.json").write_text(json.dumps(dict(script=script, args=args)))
    return path


def test_plot_draws_the_runs_of_a_user(tmp_path):
    folders = [run_folder(tmp_path / f"ant__shac__{seed}__now", seed, gamma=0.99) for seed in (1, 3)]
    (label, seeds), *others = plot.of_user(tuple(folders))["ant"].items()
    assert (label, len(seeds), others) == ("shac", 2, [])
    folders.append(run_folder(tmp_path / "ant__shac__1__later", 1, gamma=0.9))
    assert set(plot.of_user(tuple(folders))["ant"]) == {"shac gamma=0.99", "shac gamma=0.9"}
    plot.main(tuple(folders), tmp_path / "mine.png")
    height, width, _ = plot.plt.imread(tmp_path / "mine.png").shape
    assert width > 300 and height > 300


def test_plot_draws_rpo_against_its_opponents(tmp_path):
    against = plot.committed(plot.AGAINST, "Ant-v5", "HalfCheetah-v5", "Hopper-v5")
    plot.draw(against, tmp_path / "opponents.png", "eval_return", ("wall_time_s",))
    height, width, _ = plot.plt.imread(tmp_path / "opponents.png").shape
    assert width > 1000 and height > 200


def test_plot_draws_a_shorter_run_as_far_as_it_came(tmp_path, monkeypatch):
    drawn, long, short = [], *(plot.of_user((run_folder(tmp_path / f"ant__shac__{n}", n, n),)) for n in (300, 100))
    monkeypatch.setattr(plot.plt.Axes, "plot", lambda self, x, y, **how: drawn.append((x, y)))
    monkeypatch.setattr(plot.plt.Axes, "legend", lambda self, **how: None)
    plot.draw({"ant": {"shac": [*long["ant"]["shac"], *short["ant"]["shac"]]}}, tmp_path / "mine.png")
    x, y = drawn[0]
    assert x[-1] * 1e6 == 300 * 64 and y[-1] == 300 * 300 * 64
    at = np.searchsorted(x * 1e6, 50 * 64)
    assert y[at] == pytest.approx(200 * x[at] * 1e6)  # the mean of both


def test_plot_says_in_a_line_where_it_cannot_write(tmp_path):
    curve = plot.pd.DataFrame(dict(global_step=[1, 2], wall_time_s=[1, 2], episodic_return=[0.0, 1.0]))
    for path in (tmp_path / "no" / "a.png", tmp_path / "a.xyz"):
        with pytest.raises(SystemExit, match=f"^plot.py: cannot write {path}: .*"):
            plot.draw({"ant": {"shac": [curve]}}, path)


@pytest.mark.parametrize("script, flag", [("throughput.py", "--env"), ("train.py", "--envs")])
def test_an_unknown_task_is_one_line(script, flag, tmp_path, refused):
    said = refused(f"benchmarks/{script}", flag, "antt", "--results", tmp_path)
    assert said.startswith(f"{script}: unknown env 'antt'; did you mean ant?")


def test_plot_leaves_out_files_that_no_run_wrote(tmp_path, capsys):
    good, *bad = [run_folder(tmp_path / f"ant__shac__{seed}__now", seed) for seed in range(5)]
    (good / "config.json").write_bytes(b"junk")
    head = "global_step,wall_time_s,episodic_return\n"
    for folder, text in zip(bad, (head + "1,1,=1\n", "episodic_return\n1\n", "a\n1,2\n", head + "\xff\n")):
        (folder / "metrics.csv").write_text(text, encoding="latin-1")
    assert len(plot.of_user((good, *bad))["ant"]["shac"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and "config.json is not readable" in " ".join(said), said
    for name in ("metrics.csv", "config.json"):  # a pipe would be waited for
        (bad[0] / name).unlink(missing_ok=True)
        os.mkfifo(bad[0] / name)
    assert plot.of_user((good, bad[0])) and "seed" not in plot.settings(bad[0])


def test_plot_tells_runs_apart_that_have_no_checkpoint_yet(tmp_path):
    folders = [run_folder(tmp_path / f"ant__{seed}", seed, env="Ant-v5", gamma=0.9 + seed // 2) for seed in range(3)]
    for folder in folders:
        (folder / "checkpoint.pt").unlink()
    drawn = plot.of_user(tuple(folders))["Ant-v5"]
    assert {label: len(curves) for label, curves in drawn.items()} == {"shac gamma=0.9": 2, "shac gamma=1.9": 1}


def test_plot_says_in_a_line_what_is_no_run(tmp_path):
    for folders in ((tmp_path,), ()):
        with pytest.raises(SystemExit, match="nothing to draw; name run folders"):
            plot.main(folders, tmp_path / "mine.png")


# --- train.py -----------------------------------------------------------------------------------------------------
@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Names of the runs that train.py starts; they cost nothing."""
    started = []

    def fake(job):
        started.append(job["run"])
        job["commit"] = "1234567"
        return run_folder(tmp_path / f"{job['run']}-{len(started)}", len(started))

    monkeypatch.setattr(train, "train", fake)
    monkeypatch.setattr(train, "load_policy", lambda folder: (None, "ant"))
    monkeypatch.setattr(train, "replay", lambda policy, env: dict(return_mujoco=12.5, falls=3))
    return started


def test_train_adds_a_row_and_a_thinned_curve(trained, tmp_path):
    train.main(train.Args(seeds=(1, 2), results=tmp_path / "results"))
    rows = pd.read_csv(tmp_path / "results" / "runs.csv").set_index("run")
    curves = pd.read_csv(tmp_path / "results" / "curves.csv.gz")
    assert trained == list(rows.index) == ["ant__shac__1", "ant__shac__2"]
    row = rows.loc["ant__shac__2"]
    assert (row.steps, row.minutes, row.eval_return) == (19200, 32.0, 38400.0)
    assert (row.return_training, row.falls, row.kl, row.physics) == (2 * 64 * 298, 3, 0.5, "diffsim")
    curve = curves[curves.run == "ant__shac__2"]
    assert len(curve) <= 200 and curve.eval_return.notna().sum() == 3 and curve.global_step.iloc[-1] == 19200


def test_train_leaves_results_that_are_there(trained, tmp_path):
    for name in ("runs.csv", "curves.csv.gz"):
        shutil.copy(BENCHMARKS / name, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    train.main(train.Args(results=tmp_path, scripts=("rpo_diffsim",), seeds=(1, 2)))  # on ant: committed
    assert trained == [] and {path: path.read_bytes() for path in before} == before
    assert train.Args().results != BENCHMARKS and BENCHMARKS not in train.Args().results.parents

    train.main(train.Args(results=tmp_path, seeds=(1,), again=True))
    lines, after = before[tmp_path / "runs.csv"].splitlines(), (tmp_path / "runs.csv").read_bytes().splitlines()
    assert trained == ["ant__shac__1"] and len(after) == len(lines)
    assert [x.split(b",")[0] for x, y in zip(lines, after) if x != y] == [b"ant__shac__1"]


def test_train_all_goes_on_and_makes_old_rows_anew(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "PLAN", [("ant hopper", "shac", 2, "", ""), ("ant", "shac", 1, "sapo", "--gamma .9")])
    monkeypatch.setattr(train, "descends", lambda commit, since: commit == since)
    everything = dict(all=True, results=tmp_path / "results")
    train.main(train.Args(**everything, part=(2, 2)))
    assert trained == ["ant__shac__2", "hopper__shac__2"]
    assert re.search(r"^2 runs, 0\.\d hours", capsys.readouterr().out)
    rest = ["ant__shac__1", "hopper__shac__1", "ant__shac-sapo__1"]
    train.main(train.Args(**everything, dry_run=True))
    assert trained[2:] == [] and capsys.readouterr().out.splitlines()[:3] == rest
    train.main(train.Args(**everything))
    assert trained[2:] == rest
    train.main(train.Args(**everything, since="HEAD"))  # all are of commit 1234567
    assert len(trained) == 10 and len(pd.read_csv(tmp_path / "results" / "runs.csv")) == 5
    monkeypatch.setattr(train, "descends", lambda commit, since: True)
    train.main(train.Args(**everything, since="HEAD"))
    train.PLAN[1] = ("ant", "shac", 1, "sapo", "--gamma .8")  # the plan has changed
    train.main(train.Args(**everything))
    assert trained[10:] == ["ant__shac-sapo__1"]


def test_train_all_has_every_task_once(tmp_path):
    jobs = [job for args in train.variants(train.Args(all=True, results=tmp_path)) for job in train.planned(args)]
    assert len({job["run"] for job in jobs}) == len(jobs) and {job["env"] for job in jobs} == {*TASKS} - {"push"}


@pytest.mark.parametrize("flags", [dict(since="no-such-commit"), dict(part=(3, 2)), dict(all=True, envs=("hopper",))])
def test_train_refuses_bad_flags_in_one_line(flags, trained, tmp_path):
    with pytest.raises(SystemExit, match="train.py: --(since|part|all) ") as error:
        train.main(train.Args(results=tmp_path, **flags))
    assert trained == [] and "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [
    dict(tag="g"), dict(flags="--gamma 0.9"), dict(flags="--gamma 0.9", tag="sapo"), dict(tag="s", flags="--seed=7"),
])  # fmt: skip
def test_train_refuses_a_name_for_two_things(flags, trained, tmp_path):
    shutil.copy(BENCHMARKS / "runs.csv", tmp_path)
    with pytest.raises(SystemExit, match="tag") as error:
        train.main(train.Args(results=tmp_path, **flags))
    assert trained == [] and "\n" not in str(error.value)


def test_results_that_are_a_file_are_refused_before_anything_runs(trained, tmp_path, refused):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="train.py: --results .*mine is a file; it takes a folder"):
        train.main(train.Args(results=tmp_path / "mine"))
    assert trained == []
    assert "mine is a file; it takes" in refused("benchmarks/throughput.py", "--results", tmp_path / "mine")


def test_throughput_passes_on_why_a_training_failed(tmp_path, capfd):
    args = throughput.Args(env="cartpole", processes=1, flags="--bogus 3", results=tmp_path)
    with pytest.raises(SystemExit, match="2"):
        throughput.training(args, 0)
    assert "rpo_diffsim.py: Unrecognized options: --bogus" in capfd.readouterr().err


def test_train_goes_on_after_a_run_that_failed(trained, monkeypatch, tmp_path, capsys):
    fake = train.train
    monkeypatch.setattr(train, "train", lambda job: None if job["seed"] == 1 else fake(job))
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        train.main(train.Args(seeds=(1, 2), results=tmp_path))
    assert "ant__shac__1: failed" in capsys.readouterr().out
    assert list(pd.read_csv(tmp_path / "runs.csv").run) == ["ant__shac__2"]


# --- opponents.py -------------------------------------------------------------------------------------------------
class FakeSAC:
    """As much of SBX's as opponents.py uses."""

    def __init__(self, policy, env, seed, **flags):
        self.env, self.flags, self.num_timesteps, self.ep_info_buffer = env, flags, 0, []

    def learn(self, steps, reset_num_timesteps):
        assert 0 < steps <= 250 and not reset_num_timesteps
        self.num_timesteps += steps
        self.ep_info_buffer.append(dict(r=self.num_timesteps))

    def predict(self, obs, deterministic):
        assert deterministic and obs.shape[1:] == (11,)
        return np.full((len(obs), 3), 0.5, np.float32), None


@pytest.fixture
def unbound(monkeypatch):
    """The tests' own process stays on all cores."""
    monkeypatch.setattr(opponents.os, "sched_setaffinity", lambda pid, cores: None, raising=False)


def test_opponents_write_rows_as_train_does(unbound, monkeypatch, tmp_path, capsys):
    def evaluated(env, policy, episodes):
        assert env.num_envs == episodes == 64 and policy(env.reset(seed=0)[0]).shape == (64, 3)
        return torch.full((64,), 7.0)

    monkeypatch.setitem(sys.modules, "sbx", SimpleNamespace(SAC=FakeSAC))
    monkeypatch.setattr(opponents, "evaluate", evaluated)
    monkeypatch.setattr(opponents, "version", lambda name: "1.2")
    args = opponents.Args(env="Hopper-v5", seed=4, total_timesteps=600, results=tmp_path)
    opponents.main(args)
    row, curve = pd.read_csv(tmp_path / "runs.csv").iloc[0], pd.read_csv(tmp_path / "curves.csv.gz")
    assert (row.run, row.tag, row.algorithm) == ("Hopper-v5__opponents-sac__4", "sac", "SAC (SBX)")
    assert (row["flags"], row.physics) == ("--algorithm SAC --total-timesteps 600", "gymnasium")
    assert row.versions == "torch 1.2 mujoco 1.2 sbx-rl 1.2 jax 1.2"
    assert (row.steps, row.eval_return, row.eval_episodes, row.falls) == (600, 7, 64, 64)
    assert row.return_gymnasium == pytest.approx(row.falls_return, rel=0.2)  # the same falls, on either
    assert list(curve) == ["run", *train.CURVES] and curve.wall_time_s.iloc[-1] == pytest.approx(60 * row.minutes, 1e-2)
    before = (tmp_path / "runs.csv").read_bytes()
    opponents.main(args)
    assert (tmp_path / "runs.csv").read_bytes() == before and "--again replaces it" in capsys.readouterr().out


def test_evaluations_do_not_count_as_minutes(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(opponents, "time", SimpleNamespace(time=lambda: clock[0]))

    class Model(FakeSAC):
        def learn(self, *steps, **how):
            super().learn(*steps, **how)
            clock[0] += 5  # seconds

    def evaluation():
        clock[0] += 1000
        return 1.0

    curve = opponents.learn(Model("", None, 1), evaluation, opponents.Args(minutes=1, evaluations=3), start=90.0)
    assert curve.wall_time_s.tolist() == [20, 40, 60] and curve.global_step.tolist() == [500, 1500, 2500]


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(), "opponents.py: SBX is not installed (*): pip install sbx-rl"),
        (dict(env="ant"), "opponents.py: --env is ant; there is *Hopper-v5*"),
        (dict(minutes=0.0), "opponents.py: --minutes is 0.0; it must be above 0*"),
    ],
)
def test_opponents_refuse_in_one_line(flags, said, unbound, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sbx", None)  # not installed
    monkeypatch.setattr(sys, "argv", ["benchmarks/opponents.py"])
    with pytest.raises(SystemExit) as stopped:
        opponents.main(opponents.Args(results=tmp_path, **flags))
    line = capsys.readouterr().err.rstrip("\n")
    assert stopped.value.code == 2 and fnmatch(line, said) and "\n" not in line, line


def test_a_core_that_is_not_there_is_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        opponents.main(opponents.Args(core=100_000, results=tmp_path))
    assert "cannot bind a run to that core" in capsys.readouterr().err
