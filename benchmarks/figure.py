"""Learning curves of committed CSVs: python benchmarks/figure.py -> results/ant_shac.png"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def column(rows, key):
    return np.array([float(r[key]) if r[key] else np.nan for r in rows])


if __name__ == "__main__":
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for path in sorted(RESULTS.glob("ant__shac__*.csv")):
        with open(path) as f:
            rows = list(csv.DictReader(f))
        seed = path.stem.split("__")[2]
        step, wall, ret = (column(rows, k) for k in ("global_step", "wall_time_s", "episodic_return"))
        axes[0].plot(step / 1e6, ret, label=f"seed {seed}")
        axes[1].plot(wall / 60, ret)
        axes[2].semilogy(step / 1e6, column(rows, "grad_norm_before_clip"), lw=0.4)
    for axis, x, y in zip(
        axes,
        ("million environment steps", "minutes, start-up included", "million environment steps"),
        ("return while training", "return while training", "gradient norm before clipping"),
    ):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "ant_shac.png", dpi=110)
