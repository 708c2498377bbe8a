"""Learning curves from the committed CSVs: python benchmarks/figure.py -> results/<env>.png and <env>_mujoco.png

One figure a task and engine: return while training against environment steps and wall-clock, mean and range of the
seeds for every script; and the gradient norms before clipping. ablation.png: the variants of RPO on Ant. softness.png:
mismatch and learning against the softness of diffsim's contacts, on MuJoCo's physics.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

RESULTS = Path(__file__).parent / "results"
LABELS = {"rpo_diffsim": "RPO", "shac": "SHAC", "shac-sapo": "SAPO", "ppo_baseline": "PPO"}
ON_MUJOCO = {f"{script}-mujoco": label for script, label in LABELS.items()}


def column(rows, key):
    return np.array([float(r[key]) if r[key] else np.nan for r in rows])


def runs(env: str) -> dict[str, list[list[dict]]]:
    """Rows of every run of a task, by script (and variant)."""
    found = defaultdict(list)
    for path in sorted(RESULTS.glob(f"{env}__*__*.csv")):
        with open(path) as f:
            found[path.stem.split("__")[1]].append(list(csv.DictReader(f)))
    return found


def swept_softness() -> list[tuple[dict, str]]:
    """Stiffness and smoothing of the runs of RPO on MuJoCo's Ant with 1M steps, and what the runs are called."""
    prefix, found = "rpo_diffsim-mujoco-1M", []
    for script in runs("ant"):
        if script.startswith(prefix):
            words = script.removeprefix(prefix).strip("-").split("-")
            given = {name: float(value) for name, value in zip(words[::2], words[1::2])}
            found.append((dict(stiffness=0.6, smoothing=3.0) | given, script))
    return sorted(found, key=lambda x: tuple(x[0].values()))


def draw(title: str, scripts: dict, labels: dict, path: Path):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for script, seeds in scripts.items():
        i = list(labels).index(script)
        label, color = f"{labels[script]} ({len(seeds)} seed{'s'[: len(seeds) > 1]})", f"C{i}"
        for axis, key, scale in ((axes[0], "global_step", 1e6), (axes[1], "wall_time_s", 60)):
            xs = [column(rows, key) / scale for rows in seeds]
            grid = np.linspace(0, min(x[-1] for x in xs), 300)
            ys = np.stack([np.interp(grid, x, column(r, "episodic_return")) for x, r in zip(xs, seeds)])
            axis.plot(grid, ys.mean(0), color=color, label=label)
            axis.fill_between(grid, ys.min(0), ys.max(0), color=color, alpha=0.2, lw=0)
        for rows in seeds:
            axes[2].semilogy(column(rows, "global_step") / 1e6, column(rows, "grad_norm_before_clip"), color, lw=0.3)
    steps, minutes = "million environment steps", "minutes, start-up included"
    for axis, x, y in zip(axes, (steps, minutes, steps), ("return while training",) * 2 + ("gradient norm",)):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[0].set_title(title)
    axes[0].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ablation(path: Path):
    """What each part of RPO does on Ant within 1M steps: return and KL(old || new)."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for script, seeds in sorted(runs("ant").items()):
        if script.startswith("rpo_diffsim-1M"):
            label = script.removeprefix("rpo_diffsim-1M").replace("-", " ").strip() or "defaults"
            for axis, key in zip(axes, ("episodic_return", "approx_kl")):
                steps = column(seeds[0], "global_step") / 1e6
                ys = np.stack([np.interp(steps, column(r, "global_step") / 1e6, column(r, key)) for r in seeds])
                line = axis.plot(steps, ys.mean(0), label=f"{label} ({len(seeds)} seeds)", lw=1)
                axis.fill_between(steps, ys.min(0), ys.max(0), color=line[0].get_color(), alpha=0.2, lw=0)
    for axis, label in zip(axes, ("return while training", "KL(old || new) after the epochs")):
        axis.set(xlabel="million environment steps", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_title("RPO on ant")
    axes[0].legend(loc="lower right", fontsize=8)
    axes[1].set(yscale="log", ylim=(1e-3, None))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_softness(path: Path):
    """Ant on MuJoCo: the engines' distance against diffsim's stiffness, and what RPO learns against both softnesses."""
    with open(RESULTS / "mismatch.csv") as f:
        swept = [r for r in csv.DictReader(f) if r["env"] == "ant" and r["parameter"] == "stiffness"]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    axes[0].plot(column(swept, "value"), column(swept, "base_velocity"), "o-")
    axes[0].set(ylabel="base velocity off by, m/s", title="ant on MuJoCo's physics")
    for axis, name, constant in zip(axes[1:], ("stiffness", "smoothing"), (dict(smoothing=3), dict(stiffness=2.4))):
        found = [(s, runs("ant")[r]) for s, r in swept_softness() if constant.items() <= s.items()]
        values = sorted({s[name] for s, _ in found})
        returns = [np.mean([float(x[-1]["eval_return"]) for s, r in found for x in r if s[name] == v]) for v in values]
        axis.plot(values, returns, "o-", color="C1")
        other, value = next(iter(constant.items()))
        axis.set(ylabel="return after 1M steps of RPO", title=f"{other} {value}")
    for axis, name, default in zip(axes, ("stiffness", "stiffness", "smoothing"), (0.6, 0.6, 3)):
        axis.axvline(default, color="0.7", lw=0.8)
        axis.set(xscale="log", xlabel=f"{name} (line: default on MuJoCo)")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_ablation(RESULTS / "ablation.png")
    draw_softness(RESULTS / "softness.png")
    for env in sys.argv[1:] or sorted({p.stem.split("__")[0] for p in RESULTS.glob("*__*__*.csv")}):
        found = runs(env)
        for labels, suffix, title in (
            (LABELS | {"rp_pgm_mb": "RP-PGM"}, "", env),
            (ON_MUJOCO, "_mujoco", f"{env} on MuJoCo's physics"),
        ):
            scripts = {script: found[script] for script in labels if script in found}
            if scripts:
                draw(title, scripts, labels, RESULTS / f"{env}{suffix}.png")
