"""Write the tables of the READMEs and pages from the CSVs beside this file: python benchmarks/tables.py [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`. --check writes nothing, and fails if one is stale.
"""

import re
import signal
import sys
from functools import partial

__name__ == "__main__" and signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import load
import numpy as np
import pandas as pd
from load import ALGORITHMS, ESTIMATORS, HERE, evaluation_at, iqm, latest_ppo, load_curves, load_probes, load_runs

lowest, markdown, spread = load.lowest_after_1m, load.markdown, load.spread
READMES = [HERE.parent / "README.md", *sorted(HERE.glob("*.md"))]
VARIANT = ["env", "physics", "algorithm", "flags", "trial"]  # runs that differ in nothing but their seed


# --- cells --------------------------------------------------------------------------------------------------------
def after(group: pd.DataFrame, key: str, spent: float) -> str:
    """Interquartile mean of the runs' evaluations when `key` came to `spent`, and its 95 % interval."""
    values = [x for x in (evaluation_at(run, key, spent) for run in group.run) if x == x]
    return "{:,.0f} [{:,.0f}, {:,.0f}]".format(*iqm(values)) if len(values) > 1 else spread(values)


def both_worst(group: pd.DataFrame, name: str, scale: float, digits: int) -> str:
    """The largest value of the replays on diffsim and on MuJoCo"""
    worst = (scale * group[f"{name}_{engine}"].max() for engine in ("diffsim", "mujoco"))
    return ", ".join(f"{x:.{digits}f}" for x in worst if x == x)


def evaluations(run: str) -> list[float]:
    return load_curves()[run].eval_return.dropna().tolist()


def setting(group: pd.DataFrame) -> str:
    """The flags that make a variant: not its engine, budget and evaluations."""
    own = r"--(physics|total-timesteps|eval-every|algorithm|minutes|evaluations) \S+ ?"
    flags = re.sub(own, "", group["flags"].iloc[0]).strip()
    return dict(paper="the paper's", crossq="critics 256").get(group.tag.iloc[0], f"`{flags}`" if flags else "defaults")


def rival_after(algorithm: str, key: str, group: pd.DataFrame) -> str:
    """Its return while training in as many `steps` as a variant took, or `minutes`, by speeds measured together."""
    env, own, physics = group[["env", "algorithm", "physics"]].iloc[0]
    faster = load.speed(env, algorithm, physics) / load.speed(env, own, physics) if key == "minutes" else 1
    at, curves = faster * group.steps.median(), load.rivals(group, algorithm)
    over = "*" * any(at > 1.02 * c.steps.iloc[-1] for c in curves)
    return spread([np.interp(at, c.steps, c.episodic_return) for c in curves]) + over


def share_of_steps(algorithm: str, group: pd.DataFrame) -> str:
    """Steps until a variant's return while training came to the median of its last, as a share of its; inf: never."""
    last = [c.iloc[-1] for c in load.rivals(group, algorithm)]
    goal, steps = pd.DataFrame(last, columns=["episodic_return", "steps"]).median()
    late = (load_curves()[run].query("steps > steps.max() / 10") for run in group.run)  # the first mislead
    return spread([c.steps.where(c.episodic_return >= goal, np.inf).min() / steps for c in late], 2)


COLUMNS = {
    "task": lambda g: g.env.iloc[0],
    "algorithm": lambda g: g.algorithm.iloc[0],
    "engine": lambda g: g.physics.iloc[0],
    "steps": lambda g: ", ".join(dict.fromkeys(f"{n / 1e6:.1f}M" if n > 950e3 else f"{n / 1e3:.0f}k" for n in g.steps)),
    "seeds": lambda g: len(g),
    "seed": lambda g: ", ".join(map(str, g.seed)),
    "trial": lambda g: g.trial.iloc[0],
    "return": lambda g: spread(g.eval_return),
    "evaluations": lambda g: "; ".join(" ".join(f"{x:,.0f}" for x in evaluations(run)) for run in g.run),
    "own minutes": lambda g: f"{g.minutes.median():.1f}",
    "on MuJoCo": lambda g: spread(g.return_mujoco),
    "past a stop (rad)": lambda g: both_worst(g, "limit", 1, 2),
    "goals reached": lambda g: spread(g.goals_diffsim, 2),
    "goals on MuJoCo": lambda g: spread(g.goals_mujoco, 2),
    "into the ground (cm)": lambda g: both_worst(g, "depth", 100, 1),
    "while training": lambda g: spread(g.return_training),
    "10 more episodes": lambda g: spread(g.return_gymnasium.fillna(g.return_mujoco)),
    "return of 64": lambda g: spread(g.falls_return),
    "falls in 64": lambda g: ", ".join(map(str, g.falls.dropna())),
    "setting": setting,
    "KL": lambda g: spread(g.kl, 3),
    "inside the clip range": lambda g: f"{100 * g.inside_clip.mean():.0f} %",
    "std of its noise": lambda g: spread(g["std"], 2),
    "best evaluation": lambda g: spread([max(evaluations(run)) for run in g.run]),
    "lowest since half-way": lambda g: spread([min(x[(len(x) - 1) // 2 :]) for x in map(evaluations, g.run)]),
    "minutes together": lambda g: f"{np.median([load_curves()[run].minutes.iloc[-1] for run in g.run]):.1f}",
    "after 10 minutes": lambda g: after(g, "minutes", 10),
    "at 1M steps": lambda g: after(g, "steps", 1e6),
    "lowest / median": lambda g: spread(map(lowest, g.run), 2),
    "share of SHAC's steps": partial(share_of_steps, "SHAC"),
}
for key in ("steps", "minutes"):
    COLUMNS |= {f"{name} in these {key}": partial(rival_after, name, key) for name in ("SHAC", "SAPO", "PPO")}


def by_variant(which: str, columns: str) -> str:
    """One row a variant of the runs of a query, with these of COLUMNS."""
    groups = [group for _, group in load_runs().query(which).groupby(VARIANT, sort=False)]
    names = columns.split(", ")
    return markdown(names, [[COLUMNS[name](group) for name in names] for group in groups])


def by_algorithm(which: str) -> str:
    """One row a task of the runs of a query, with the returns of every algorithm and RPO's steps and minutes."""
    runs, rows = latest_ppo(load_runs().query(which)), []
    names = [name for name in ALGORITHMS if name in set(runs.algorithm)]
    for env, task in runs.groupby("env", sort=False):
        parts = [task[task.algorithm == name] for name in names]
        returns = [f"{spread(g.eval_return)} ({len(g)})" if len(g) else "" for g in parts]
        spent = [COLUMNS[name](parts[0]) if len(parts[0]) else "" for name in ("steps", "minutes together")]
        rows.append([env, *returns, *spent])
    return markdown(["task", *names, "steps", "minutes"], rows)


# --- the tables ---------------------------------------------------------------------------------------------------
def variance() -> str:
    """Of the gradient against the length of the expansion, relative to that at h = 1."""
    rows, keys = [], ["env", "spectral_norm", "estimator"]
    late = load_probes("run").query("h >= 4").groupby([*keys, "run"], observed=True)
    factors = late.apply(lambda g: np.exp(np.polyfit(g.h, np.log(g.variance), 1)[0]), include_groups=False)
    for (env, sn, name), group in load_probes().groupby(keys, observed=True, sort=False):
        relative, runs = group.variance.iloc[1:] / group.variance.iloc[0], factors[env, sn, name]
        cells = [f"{x:.3g}" if x < 100 else f"{x:,.0f}" if x < 1e5 else f"{x:.1e}" for x in relative]
        rows.append([env, sn, ESTIMATORS[name], len(runs), *cells, spread(runs, 2)])
    return markdown(["task", "SN", "estimator", "runs", *(f"h = {h}" for h in (2, 4, 8, 16, 32)), "per step"], rows)


def bias() -> str:
    """Against the true gradient of the same objective, where diffsim gives it."""
    known, rows = load_probes("run").query("env == 'hopper'"), []
    for (sn, name), group in known.groupby(["spectral_norm", "estimator"], observed=True, sort=False):
        bias = ["-" if name == "true" else spread(g.bias, 2) for _, g in group.groupby("h")]
        deviation = group.groupby("h").deviation.median()
        rows.append([sn, ESTIMATORS[name], *(f"{b} / {d:.2f}" for b, d in zip(bias, deviation))])
    return markdown(["SN", "bias / deviation", *(f"h = {h}" for h in sorted(known.h.unique()))], rows)


def truth() -> str:
    """Of RPO's gradient: cosine of an estimator and the truth, standard deviation of a window by the truth's norm."""
    names = ["lambda 1", "lambda 0.9", "lambda 0.7", "lambda 0", "lambda 1 bounded", "lambda 0.9 bounded", "score"]
    order, rows = ["physics", "env", "global_step", "run"], []
    measured = pd.read_csv(HERE / "truth.csv").sort_values(order, ascending=[False, True, True, True])
    measured["truth_norm"] = measured.truth_norm.replace(0, np.nan)  # nothing is left of it beside its noise
    measured["cell"] = [
        f"{g.cosine:.2f} ± {g.cosine_error:.2f} / {g.deviation / g.truth_norm:.1f}" for g in measured.itertuples()
    ]
    for _, group in measured.groupby(order, sort=False):
        g = group.iloc[0]
        shares = [f"{100 * g.fell:.1f} %", f"{100 * g.by_moved:.0f} ± {100 * g.by_moved_error:.0f} %"]
        shares.append(f"{100 * g.truth_error / g.truth_norm:.0f} %" if g.truth_norm > 0 else "unresolved")
        cells = group.set_index("estimator").cell[names].str.replace("nan", "-")
        rows.append([g.env, g.physics, f"{g.global_step / 1e3:.0f}k", g.horizon, *shares, *cells])
    return markdown(["task", "engine", "steps", "window", "with falls", "by moved ends", "truth's error", *names], rows)


def throughput() -> str:
    speeds = pd.read_csv(HERE / "throughput.csv", dtype=dict(commit=str)).dropna(subset="mujoco")
    speeds = speeds.sort_values(["env", "compiled", "threads", "batch"], ascending=[True, False, True, True])
    speeds["ratio"] = (speeds.forward_backward / speeds.mujoco).map("{:.2f}".format)
    speeds["compiled"] = np.where(speeds.compiled, "yes", "no")
    numbers = ["threads", "forward", "forward_backward", "mujoco"]
    speeds[numbers] = speeds[numbers].map("{:,.0f}".format)
    names = ["env", "batch", "compiled", *numbers, "ratio", "commit"]
    return markdown([name.replace("_", " + ") for name in names], speeds[names].values.tolist())


def scaling() -> str:
    found = pd.read_csv(HERE / "throughput.csv", dtype=dict(commit=str, flags=str))
    found = found.query("processes > 0 and batch > 0 and algorithm not in ['SHAC', 'PPO']")
    alike = found.fillna(dict(flags="")).groupby(["env", "flags", "batch", "processes"])  # in this order, as well
    commits = alike.commit.agg(lambda x: " ".join(x.unique()))
    found = alike.median(numeric_only=True).assign(commit=commits, times=alike.size()).reset_index()
    one = found[found.processes == 1].set_index(["env", "flags", "batch"]).training
    whole = lambda x: f"{x:.0f}" if x == x else ""  # noqa: E731
    rows = [
        [g.env, f"`{g.flags}`" if g.flags else "defaults", f"{g.batch:,}", f"{g.processes:.0f}", f"{g.training:,.0f}",
         *map(whole, (g.simulate, g.policy, g.critic)),
         f"{g.training / all_in_one:.2f}" if (all_in_one := one.get((g.env, g.flags, g.batch * g.processes))) else "",
         whole(g.seconds), g.times, g.commit]
        for g in found.itertuples()
    ]  # fmt: skip
    names = "env, setting, environments a process, processes, steps/s, simulate (ms), policy (ms), critic (ms)"
    return markdown([*names.split(", "), "times one process of as many", "seconds", "measured", "commit"], rows)


def speeds() -> str:
    found = load.load_speeds().pivot_table("training", ["physics", "env"], "algorithm", "median").reset_index()
    found = found.map(lambda x: x if isinstance(x, str) else f"{x:,.0f}" if x == x else "")
    names = ["physics", *(name for name in ALGORITHMS if name in found)]
    return markdown(["task", "engine", *names[1:]], found[["env", *names]].values.tolist())


IN_DIFFSIM = "physics == 'diffsim' and tag in ['', 'sapo']"
ON_MUJOCO = "physics != 'diffsim' and tag in ['', 'mujoco', 'gymnasium'] and algorithm != 'RP-PGM'"
AGAINST = "(script == 'opponents' or physics == 'mujoco' and gymnasium and algorithm in ['RPO', 'PPO'] and tag == '')"
CHANGED = "env in ['ant', 'walker'] and physics == 'diffsim' and (tag.str.startswith('1M') or tag in ['', 'paper'])"
BASIC = "task, algorithm, steps, seeds, return, own minutes"
VARIANTS = {  # tables of by_variant
    "learning": (f"{IN_DIFFSIM} and env != 'hand'", f"{BASIC}, on MuJoCo, past a stop (rad), into the ground (cm)"),
    "opponents": (
        AGAINST,
        "task, algorithm, setting, seeds, steps, minutes together, after 10 minutes, at 1M steps, lowest / median",
    ),
    "mujoco": (ON_MUJOCO, f"{BASIC}, engine, 10 more episodes, falls in 64, return of 64"),
    "hand": (
        f"{IN_DIFFSIM} and env == 'hand'",
        f"{BASIC}, goals reached, goals on MuJoCo, return of 64, falls in 64, past a stop (rad)",
    ),
    "budgets": ("tag.str.fullmatch('(mujoco-)?[0-9.]+M')", f"{BASIC}, engine, on MuJoCo"),
    "equal_time": (
        f"({IN_DIFFSIM} or {ON_MUJOCO}) and algorithm == 'RPO'",
        "task, engine, steps, while training, SHAC in these steps, SAPO in these steps, PPO in these steps, "
        "SHAC in these minutes, SAPO in these minutes, PPO in these minutes, share of SHAC's steps",
    ),
    "ablation": (
        f"algorithm == 'RPO' and seed < 100 and ({CHANGED} or tag == 'no-score' or tag == 'mujoco' and "
        "env in ['hopper', 'walker'] or tag == '' and env == 'HalfCheetah-v5')",
        "task, engine, setting, steps, seeds, return, KL, inside the clip range, std of its noise",
    ),
    "trials": ("seed > 100", "task, algorithm, trial, setting, seed, steps, evaluations, own minutes"),
    "model": (
        "algorithm == 'RP-PGM' and seed < 100 and (env == 'hopper' or not tag.str.startswith('lab'))",
        "task, setting, steps, seeds, return, best evaluation, lowest since half-way, own minutes, PPO in these steps",
    ),
}
TABLES = {name: partial(by_variant, *what) for name, what in VARIANTS.items()}
TABLES |= dict(results=partial(by_algorithm, IN_DIFFSIM), results_mujoco=partial(by_algorithm, ON_MUJOCO))
TABLES |= dict(variance=variance, bias=bias, truth=truth, throughput=throughput, scaling=scaling, speeds=speeds)
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)


def main():
    for readme in READMES:
        name, text = f"{readme.parent.name}/{readme.name}", readme.read_text()
        if unknown := {match[1] for match in MARKED.findall(text)} - set(TABLES):
            sys.exit(f"tables.py: {name} asks for {', '.join(sorted(unknown))}; there is {', '.join(TABLES)}")
        new = MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)
        if "--check" not in sys.argv[1:]:
            readme.write_text(new)
        elif new != text:
            sys.exit(f"tables.py: {name} has tables that are not from the CSVs; run python benchmarks/tables.py")


if __name__ == "__main__":
    sys.argv[1:] in ([], ["--check"]) or sys.exit(f"tables.py: --check, or nothing; not {' '.join(sys.argv[1:])}")
    main()
