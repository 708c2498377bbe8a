"""Write the README's tables from the committed CSVs: python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is learning, ablation or throughput.
"""

import csv
import re
from pathlib import Path

import numpy as np
from figure import LABELS, RESULTS, column, runs

README = Path(__file__).parents[1] / "README.md"


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values, digits=0) -> str:
    """median [min, max]"""
    values = np.asarray(values, float)
    return f"{np.median(values):,.{digits}f} [{values.min():,.{digits}f}, {values.max():,.{digits}f}]"


def learning() -> str:
    with open(RESULTS / "replay.csv") as f:
        replays = {(r["run"], r["physics"]): r for r in csv.DictReader(f)}
    rows = []
    for env in sorted({p.stem.split("__")[0] for p in RESULTS.glob("*__*__*.csv")}):
        for script, seeds in runs(env).items():
            if script not in LABELS:
                continue
            played = [
                {p: replays.get((f"{env}__{script}__{r}", p)) for p in ("diffsim", "mujoco")} for r in range(1, 9)
            ]
            soft, hard = ([x[p] for x in played if x[p]] for p in ("diffsim", "mujoco"))
            final = [column(s, "eval_return")[~np.isnan(column(s, "eval_return"))][-1] for s in seeds]
            steps = column(seeds[0], "global_step")[-1] / 1e6
            wall = [column(s, "wall_time_s")[-1] / 60 for s in seeds]
            rows.append([
                env, LABELS[script], f"{steps:.1f}M", len(seeds), spread(final), f"{np.median(wall):.1f}",
                spread([float(r["return_mean"]) for r in hard]) if hard else "",
                f"{max(float(r['limit_violation_max']) for r in soft):.3f}" if soft else "",
                f"{100 * max(float(r['penetration_max']) for r in soft):.1f}" if soft else "",
            ])  # fmt: skip
    header = ["task", "", "steps", "seeds", "return: median [min, max]", "minutes", "the same policies on MuJoCo"]
    return markdown([*header, "past a joint's stop, rad or m", "into the ground, cm"], rows)


def ablation() -> str:
    rows = []
    for script, seeds in runs("ant").items():
        if script.startswith("rpo_diffsim-1M"):
            final = [column(s, "eval_return")[-1] for s in seeds]
            kl, inside = (np.mean([np.nanmean(column(s, k)) for s in seeds]) for k in ("approx_kl", "inside_clip"))
            what = script.removeprefix("rpo_diffsim-1M").replace("-", " ").strip() or "defaults"
            rows.append([what, len(seeds), spread(final), f"{kl:.2f}", f"{100 * inside:.0f} %"])
    return markdown(["variant", "seeds", "return: median [min, max]", "KL", "samples inside the clip range"], rows)


def throughput() -> str:
    with open(RESULTS / "throughput.csv") as f:
        rows = list(csv.DictReader(f))
    rows.sort(key=lambda r: (r["env"] != "ant", r["env"], r["compiled"] != "True", int(r["threads"]), int(r["batch"])))
    keys = ("forward", "forward_backward", "mujoco")
    table = [
        [r["env"], r["batch"], "compiled" if r["compiled"] == "True" else "eager", r["threads"]]
        + [f"{int(r[k]):,}" for k in keys]
        + [r["ratio"], r["first_gradient_s"], r["rss_mb"]]
        for r in rows
    ]
    header = ["task", "environments", "", "threads", "forward", "forward + backward", "MuJoCo, one thread", "ratio"]
    return markdown([*header, "start to first gradient, s", "memory, MB"], table)


if __name__ == "__main__":
    text = README.read_text()
    for name, table in (("learning", learning), ("ablation", ablation), ("throughput", throughput)):
        block = re.compile(f"(<!-- table {name} -->\n).*?(<!-- end -->)", re.S)
        if block.search(text):
            text = block.sub(lambda m, table=table: f"{m[1]}{table()}\n{m[2]}", text)
    README.write_text(text)
