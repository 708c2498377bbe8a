"""The committed results, and what is worked out from several runs: for tables.py and plot.py."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
ALGORITHMS = ["RPO", "SHAC", "SAPO", "PPO", "RP-PGM", "SAC (SBX)", "CrossQ (SBX)"]
ESTIMATORS = dict(dp="DP (FMG)", dr="DR (MVG)", lr="LR (FMG)", mfg="score function (MFG)", true="through the simulator")
ORDINARY = ["", "sapo", "mujoco", "gymnasium", "30k"]  # tags of runs that others are compared with
DRAWS = 128  # of 64 samples each, in a probe


@cache
def load_runs() -> pd.DataFrame:
    """runs.csv, diffsim's tasks before Gymnasium's, algorithms in the order of ALGORITHMS."""
    text = dict.fromkeys(("run", "env", "script", "algorithm", "tag", "physics", "flags", "commit", "versions"), str)
    runs = pd.read_csv(HERE / "runs.csv", dtype=text | {"eval_episodes": "Int64", "falls": "Int64"})
    runs = runs.fillna(dict.fromkeys(text, "")).assign(rank=runs.algorithm.map(list(ALGORITHMS).index))
    runs = runs.assign(gymnasium=runs.env.str.contains("-v"), mujoco=runs.physics != "diffsim")
    runs["trial"] = runs.tag.where(runs.seed > 100, "")  # some differ by their commit alone
    return runs.sort_values(["gymnasium", "env", "mujoco", "rank", "steps", "tag", "seed"], ignore_index=True)


@cache
def load_curves() -> dict[str, pd.DataFrame]:
    """curves.csv.gz by run. Where a speed was measured, time passes as it says: most runs were not side by side."""
    curves = pd.read_csv(HERE / "curves.csv.gz", low_memory=False).eval("steps = global_step")
    runs, first = load_runs().set_index("run", drop=False), curves.groupby("run")[["wall_time_s", "steps"]].first()
    start = first.wall_time_s.groupby([runs.env, runs.algorithm, runs.physics, runs.tag]).transform("median")
    per_s = {r.run: speed(r.env, r.algorithm, r.physics) for r in runs.itertuples() if r.tag in ORDINARY}
    paced = curves.run.map(start) + (curves.steps - curves.run.map(first.steps)) / curves.run.map(per_s)
    curves = curves.assign(wall_time_s=paced.fillna(curves.wall_time_s)).eval("minutes = wall_time_s / 60")
    return dict(tuple(curves.groupby("run", sort=False)))


@cache
def load_speeds() -> pd.DataFrame:
    """Environment steps/s of training, one process with a script's own number of environments, side by side."""
    rows = pd.read_csv(HERE / "throughput.csv").query("batch == 0")
    return rows.assign(physics=rows["flags"].str.extract(r"--physics (\w+)", expand=False).fillna("diffsim"))


def speed(env: str, algorithm: str, physics: str) -> float:
    """Of those the median; nan where it was not measured."""
    return load_speeds().query("env == @env and algorithm == @algorithm and physics == @physics").training.median()


def rivals(group: pd.DataFrame, algorithm: str) -> list[pd.DataFrame]:
    """Curves of another algorithm's ordinary runs, on the same task and engine."""
    env, engine = group[["env", "mujoco"]].iloc[0]
    same = load_runs().query("env == @env and mujoco == @engine and algorithm == @algorithm and tag in @ORDINARY")
    return [load_curves()[run] for run in latest_ppo(same).run]


def load_probes(*more: str) -> pd.DataFrame:
    """By env, spectral normalisation, estimator and h (`more`: run): geometric mean of the variance over the probes;
    medians of bias and of one draw's standard deviation, in units of the true gradient's norm.
    The norm of a mean of DRAWS draws contains their noise. It is taken off; where nothing is left, these are nan.
    """
    probes = pd.read_csv(HERE / "probes.csv").merge(load_runs()[["run", "env", "flags"]], on="run")
    at = ["run", "global_step", "h"]
    noise = probes[probes.estimator == "true"].set_index(at).variance / DRAWS
    square = probes.true_norm**2 - probes.join(noise.rename("noise"), on=at).noise
    norm = np.sqrt(square.where(square > 0))
    probes["bias"] /= norm
    probes["deviation"] = np.sqrt(probes.variance) / norm
    probes["spectral_norm"] = np.where(probes["flags"].str.contains("--no-spectral-norm"), "no", "yes")
    probes["estimator"] = pd.Categorical(probes.estimator, ESTIMATORS)
    groups = probes.groupby(["env", "spectral_norm", "estimator", *more, "h"], observed=True)
    summary = groups[["bias", "deviation"]].agg(lambda x: x.median(skipna=False)).assign(probes=groups.size())
    summary["variance"] = groups.variance.agg(lambda x: np.exp(np.log(x).mean()))
    return summary.reset_index().sort_values(["env", "spectral_norm"], ascending=[True, False])


def latest_ppo(runs: pd.DataFrame) -> pd.DataFrame:
    """Without PPO on gymnasium.make where PPO ran on the batched twin, too."""
    ppo = runs.algorithm == "PPO"
    return runs[~(ppo & (runs.physics == "gymnasium") & runs.env.isin(runs.env[ppo & (runs.physics == "mujoco")]))]


def evaluation_at(run: str, key: str, spent: float) -> float:
    """Evaluation of a run when `key` of its curve came to `spent`, between two on a line; nan before the first.

    A run that was over in fewer minutes keeps its last; one of fewer steps has none.
    """
    curve = load_curves()[run].dropna(subset="eval_return")
    if key == "steps" and curve[key].iloc[-1] < 0.99 * spent:
        return np.nan
    return float(np.interp(spent, curve[key], curve.eval_return, left=np.nan))


def lowest_after_1m(run: str) -> float:
    """Of the evaluations from a million steps on, as a share of their median; nan of fewer than two."""
    late = load_curves()[run].query("steps > 990_000").eval_return.dropna()
    return late.min() / late.median() if len(late) > 1 else np.nan


def iqm(*tasks, draws: int = 2000) -> tuple[float, float, float]:
    """Interquartile mean of the runs of all tasks, and its 95 % interval (Agarwal et al. 2021, arXiv 2108.13264).
    The bootstrap is stratified: it draws the runs of each task anew, each time with the same random numbers.
    """
    generator = np.random.default_rng(0)
    drawn = np.concatenate([generator.choice(x, (draws, len(x))) for x in tasks], axis=1)
    cut = drawn.shape[1] // 4  # of fewer than 4 runs nothing is cut: their mean
    centre, *means = np.sort(np.vstack([np.concatenate(tasks), drawn]))[:, cut : drawn.shape[1] - cut].mean(1)
    return centre, *np.quantile(means, [0.025, 0.975])


# --- text ---------------------------------------------------------------------------------------------------------
def spread(values, digits: int = 0) -> str:
    """median [min, max]; of a single run, its number; of none, nothing"""
    values = pd.Series(list(values), dtype=float).dropna()
    if len(values) < 2:
        return "".join(f"{x:,.{digits}f}" for x in values)
    return f"{values.median():,.{digits}f} [{values.min():,.{digits}f}, {values.max():,.{digits}f}]"


def markdown(header: list, rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, ["---"] * len(header), *rows))
