"""Draw the READMEs' figures from the committed results, or a user's own runs (return against steps and minutes).

    python benchmarks/plot.py                                  # results.png, mujoco.png, opponents.png, gradients.png
    python benchmarks/plot.py runs/ant__* --out mine.png

Runs that differ in their seed are one curve: mean and range, of those that came so far.
"""

import json
import signal
import sys
import textwrap
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Annotated

__name__ == "__main__" and signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from load import ALGORITHMS, ESTIMATORS, HERE, latest_ppo, load_curves, load_probes, load_runs
from tables import AGAINST, IN_DIFFSIM, ON_MUJOCO

plt.switch_backend("Agg")
plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.3}
# flags in which runs may differ and still be one variant
INCIDENTAL = "seed run_dir resume stop_after save_every num_threads capture_video compile device eval_every".split()
INCIDENTAL += "eval_episodes eval_physics total_timesteps log_every".split()
Panels = dict[str, dict[str, list[pd.DataFrame]]]  # {title: {label: curves of its seeds}}


def draw(panels: Panels, path: Path, y: str = "episodic_return", axes_x=("global_step", "wall_time_s")):
    """Mean and range of the seeds against steps (above) and minutes (below), a column a panel."""
    n, rows = len(panels), len(axes_x)
    figure, axes = plt.subplots(rows, n, figsize=(3.6 * n + 0.6, 2.7 * rows), squeeze=False, layout="constrained")
    for column, (title, variants) in zip(axes.T, panels.items()):
        for axis, key in zip(column, axes_x):
            scale = 1e6 if key == "global_step" else 60
            for i, (label, seeds) in enumerate(variants.items()):
                seeds = [s.dropna(subset=y) for s in seeds]
                color = f"C{ALGORITHMS.index(label) if label in ALGORITHMS else i}"
                grid = np.linspace(max(s[key].min() for s in seeds), max(s[key].max() for s in seeds), 300)
                ys = np.stack([np.interp(grid, s[key], s[y], np.nan) for s in seeds])
                ys[np.stack([grid > 1.02 * s[key].max() for s in seeds])] = np.nan  # it was over before
                text = "\n".join(textwrap.wrap(label, 44, max_lines=3, placeholder=" ..."))
                mark = "." if grid[0] == grid[-1] else ""  # runs of one row
                axis.plot(grid / scale, np.nanmean(ys, 0), color=color, marker=mark, label=f"{text} ({len(seeds)})")
                axis.fill_between(grid / scale, np.nanmin(ys, 0), np.nanmax(ys, 0), color=color, alpha=0.2, lw=0)
            axis.set(xlabel="minutes" if scale == 60 else "million environment steps", xlim=(0, None))
        column[0].set_title(title)
        column[0].legend(fontsize=7, framealpha=0.5)
    figure.supylabel("return while training" if y == "episodic_return" else "evaluations", fontsize="medium")
    try:
        figure.savefig(path, dpi=100, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as e:  # ValueError: a suffix that is no format
        sys.exit(f"plot.py: cannot write {path}: {getattr(e, 'strerror', None) or e}")
    print(f"wrote {path}")


def committed(which: str, *envs: str) -> Panels:
    runs, panels = latest_ppo(load_runs().query(which)), defaultdict(dict)
    for (env, algorithm), group in runs[runs.env.isin(envs)].groupby(["env", "algorithm"], sort=False):
        panels[env][algorithm] = [load_curves()[run] for run in group.run]
    return panels


def settings(folder: Path) -> dict:
    """Script and flags of a run; of one without a readable config.json what its name says."""
    env, script, *_ = f"{folder.resolve().name}__".split("__")
    file, flags = folder / "config.json", {}
    try:
        if file.is_file():
            config = json.loads(file.read_text())
            flags, script = dict(config["args"]), str(config["script"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        print(f"plot.py: {file} is not readable ({type(e).__name__})", file=sys.stderr)
    flags = {name: x for name, x in flags.items() if name not in INCIDENTAL}
    return dict(env=env) | flags | dict(script=script)


def of_user(folders: tuple[Path, ...]) -> Panels:
    """Runs by environment; runs of a script that differ in more than the seed are named by what differs."""
    variants, panels = [], defaultdict(dict)
    for folder in dict.fromkeys(folders):
        file, curve, columns = folder / "metrics.csv", pd.DataFrame(), ["global_step", "wall_time_s", "episodic_return"]
        with suppress(OSError, ValueError):  # what pandas raises for no table of numbers is a ValueError
            if file.is_file():
                curve = pd.read_csv(file, usecols=columns, dtype=float).dropna(subset="episodic_return")
        if curve.empty:
            print(f"plot.py: {folder} has no metrics.csv with returns: left out", file=sys.stderr)
        else:
            variants.append((settings(folder), curve))
    if not variants:
        sys.exit("plot.py: nothing to draw; name run folders, like runs/ant__*")
    for mine, curve in variants:
        rivals = [x for x, _ in variants if (x["env"], x["script"]) == (mine["env"], mine["script"])]
        differ = [f"{k}={mine[k]}" for k in mine if any(x.get(k) != mine[k] for x in rivals)]
        panels[mine["env"]].setdefault(" ".join([mine["script"], *differ]), []).append(curve)
    return panels


def draw_gradients(path: Path):
    """Variance of the estimators against h, and bias and deviation where the true gradient is known."""
    found, figure = load_probes(), plt.figure(figsize=(14, 3.6), layout="constrained")
    envs, keys = ["Hopper-v5", *3 * ["hopper"]], ["variance", "variance", "bias", "deviation"]
    for axis, env, key in zip(figure.subplots(1, 4), envs, keys):
        of_env = found[found.env == env].groupby(["estimator", "spectral_norm"], observed=True, sort=False)
        for (name, sn), group in of_env:
            if key == "bias" and name not in ("dp", "dr"):  # the score functions' noise hides their bias
                continue
            values, style = group[key] / (group[key].iloc[0] if key == "variance" else 1), "-" if sn == "yes" else "--"
            color, label = f"C{list(ESTIMATORS).index(name)}", ESTIMATORS[name] + ", no SN" * (sn == "no")
            axis.plot(group.h, values, style, color=color, marker="o", ms=3, label=label)
        hs = sorted(found.h.unique())
        unit = "variance at h = 1" if key == "variance" else "norm of the true gradient"
        axis.set(title=env, xlabel="h", ylabel=f"{key} / {unit}", xscale="log", xticks=hs, xticklabels=hs)
        axis.set_yscale("linear" if key == "bias" else "log")
        axis.minorticks_off()
        key == "variance" and axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main(folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = (), out: Path | None = None):
    """Draw these run folders into --out (None: runs.png), or without any the READMEs' figures."""
    if folders or out:
        return draw(of_user(folders), out or Path("runs.png"))
    draw(committed(IN_DIFFSIM, "ant", "anymal", "humanoid", "hand"), HERE / "results.png")
    on_mujoco = committed(ON_MUJOCO, "ant", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
    draw(on_mujoco, HERE / "mujoco.png", axes_x=("global_step",))  # minutes of few were measured side by side
    against = committed(f"{AGAINST} and tag in ['', 'sac', 'crossq']", *load_runs().query(AGAINST).env.unique())
    draw(against, HERE / "opponents.png", "eval_return", ("wall_time_s",))
    draw_gradients(HERE / "gradients.png")


if __name__ == "__main__":
    tyro.cli(main)
