r"""Variance and bias of policy-gradient estimators, from what `rp_pgm_mb.py --probe-every N` measured.

    python benchmarks/train.py --envs Hopper-v5 --scripts rp_pgm_mb --seeds 1 --tag lab \
        --flags="--total-timesteps 30000 --probe-every 10000"
    python benchmarks/train.py --envs Hopper-v5 --scripts rp_pgm_mb --seeds 1 --tag lab-no-sn \
        --flags="--total-timesteps 30000 --no-spectral-norm --probe-every 10000"
    python benchmarks/train.py --envs InvertedDoublePendulum-v5 --scripts rp_pgm_mb --seeds 1 --tag lab \
        --flags="--total-timesteps 12000 --probe-every 6000"
    python benchmarks/train.py --envs InvertedDoublePendulum-v5 --scripts rp_pgm_mb --seeds 1 --tag lab-no-sn \
        --flags="--total-timesteps 12000 --no-spectral-norm --probe-every 6000"
    python benchmarks/train.py --envs hopper --scripts rp_pgm_mb --seeds 1 --tag lab \
        --flags="--total-timesteps 20000 --probe-every 10000"
    python benchmarks/gradient_lab.py

reads results/probes/<env>__rp_pgm_mb-lab*__<seed>.csv and draws results/gradient_variance.png: variance against h, with
and without spectral normalisation; and results/gradient_bias.png: bias and standard deviation of one draw, as shares of
the true gradient's norm, on diffsim's tasks, where the true gradient is known.
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

RESULTS = Path(__file__).parent / "results"
DRAWS = 32  # of a probe, rp_pgm_mb.py's default
NAMES = dict(dp="DP (FMG)", dr="DR (MVG)", lr="LR (FMG)", mfg="score function (MFG)", true="through the simulator")


def probes() -> dict[tuple[str, str], dict[tuple[str, int], dict[str, float]]]:
    """{(env, variant): {(estimator, h): numbers}}: geometric means over the run's probes and seeds (median of bias).

    The norm of the mean of DRAWS draws contains their noise, which is taken off; where nothing is left, bias is nan.
    """
    found: dict = defaultdict(lambda: defaultdict(list))
    for path in sorted((RESULTS / "probes").glob("*__rp_pgm_mb-lab*__*.csv")):
        env, script, _ = path.stem.split("__")
        with open(path) as f:
            rows = list(csv.DictReader(f))
        noise = {(r["global_step"], r["h"]): float(r["variance"]) / DRAWS for r in rows if r["estimator"] == "true"}
        for r in rows:
            if r["bias"]:
                norm = float(r["true_norm"]) ** 2 - noise[r["global_step"], r["h"]]
                r["true_norm"] = norm**0.5 if norm > 0 else np.nan
            found[env, script.removeprefix("rp_pgm_mb-")][r["estimator"], int(r["h"])].append(r)

    def summary(rows):
        numbers = dict(count=len(rows), variance=np.exp(np.mean([np.log(float(r["variance"])) for r in rows])))
        if rows[0]["bias"]:
            numbers |= dict(
                bias=np.median([float(r["bias"]) / r["true_norm"] for r in rows]),
                deviation=np.median([float(r["variance"]) ** 0.5 / r["true_norm"] for r in rows]),
            )
        return numbers

    return {key: {k: summary(rows) for k, rows in table.items()} for key, table in found.items()}


def curve(table: dict, estimator: str, key: str):
    hs = sorted(h for name, h in table if name == estimator and key in table[name, h])
    return np.array(hs), np.array([table[estimator, h][key] for h in hs])


def growth(hs, variance) -> float:
    """Factor of the variance per step of the expansion: fit of log variance over h >= 4."""
    late = hs >= 4
    return float(np.exp(np.polyfit(hs[late], np.log(variance[late]), 1)[0]))


def draw_variance(found: dict):
    envs = sorted({env for env, variant in found if (env, "lab-no-sn") in found and (env, "lab") in found})
    if not envs:
        return
    figure, axes = plt.subplots(1, len(envs), figsize=(4.6 * len(envs), 3.6), squeeze=False)
    for axis, env in zip(axes[0], envs):
        for i, name in enumerate(("dp", "dr", "lr")):
            for variant, style, label in (("lab", "-", ""), ("lab-no-sn", "--", ", no SN")):
                hs, variance = curve(found[env, variant], name, "variance")
                axis.plot(hs, variance / variance[0], style, color=f"C{i}", marker="o", ms=3, label=NAMES[name] + label)
        axis.axhline(10, color="grey", lw=0.5)
        axis.plot(hs, ((hs + 1) / 2) ** 2, ":", color="grey", lw=1, label="more parts, equal ones")
        axis.set(title=env, xlabel="h", xscale="log", yscale="log", xticks=hs, xticklabels=hs)
        axis.minorticks_off()
    axes[0][0].set_ylabel("variance / variance at h = 1")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "gradient_variance.png", dpi=110)


def draw_bias(found: dict):
    tables = {key: t for key, t in found.items() if any("bias" in x for x in t.values())}
    if not tables:
        return
    figure, axes = plt.subplots(2, len(tables), figsize=(4.6 * len(tables), 6.4), squeeze=False)
    for column, ((env, variant), table) in zip(axes.T, sorted(tables.items())):
        for axis, key in zip(column, ("bias", "deviation")):
            for i, name in enumerate(NAMES):
                hs, values = curve(table, name, key)
                if key == "deviation" or name in ("dp", "dr"):  # of the score functions it is not resolved
                    axis.plot(hs, values, color=f"C{i}", marker="o", ms=3, label=NAMES[name])
            title = env + (", no spectral norm" if "no-sn" in variant else "")
            axis.set(title=title, xlabel="h", xscale="log", yscale="log" if key == "deviation" else "linear")
            axis.set(xticks=hs, xticklabels=hs)
            axis.minorticks_off()
    for axis, label in zip(axes[:, 0], ("bias", "standard deviation of a draw")):
        axis.set_ylabel(f"{label} / true gradient")
    axes[1][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "gradient_bias.png", dpi=110)


if __name__ == "__main__":
    found = probes()
    draw_variance(found)
    draw_bias(found)
