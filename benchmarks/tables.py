"""Write the tables of both READMEs from the committed CSVs: python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

import csv
import re
from pathlib import Path

import numpy as np
from figure import LABELS, ON_MUJOCO, RESULTS, column, runs, swept_softness
from gradient_lab import NAMES, curve, growth, probes

READMES = [Path(__file__).parents[1] / "README.md", Path(__file__).parent / "README.md"]


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values, digits=0) -> str:
    """median [min, max]; of a single run, its number"""
    values = np.asarray(values, float)
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    return f"{np.median(values):,.{digits}f} [{values.min():,.{digits}f}, {values.max():,.{digits}f}]"


def replays() -> dict:
    with open(RESULTS / "replay.csv") as f:
        return {(r["run"], r["physics"]): r for r in csv.DictReader(f)}


def played_on(played: dict, env: str, script: str, physics: str) -> list[dict]:
    """The replays of a script's seeds on one engine, in the order of the seeds."""
    return [played[k] for n in range(1, 10) if (k := (f"{env}__{script}__{n}", physics)) in played]


def tasks() -> list[str]:
    names = {p.stem.split("__")[0] for p in RESULTS.glob("*__*__*.csv")}
    return sorted(names, key=lambda name: ("-v" in name, name))


def outcome(seeds) -> list[str]:
    """Steps, number of seeds, return of the final policies, minutes."""
    final = [column(s, "eval_return")[~np.isnan(column(s, "eval_return"))][-1] for s in seeds]
    wall = [column(s, "wall_time_s")[-1] / 60 for s in seeds]
    return [f"{column(seeds[0], 'global_step')[-1] / 1e6:.1f}M", len(seeds), spread(final), f"{np.median(wall):.1f}"]


def worst(key: str, scale: float, digits: str, *engines) -> str:
    """Largest value in the replays of each engine"""
    return ", ".join(f"{scale * max(float(r[key]) for r in e):{digits}}" for e in engines if e)


def learning() -> str:
    rows, played = [], replays()
    for env in tasks():
        found = runs(env)
        for script in (s for s in LABELS if s in found and "-v" not in env):
            soft, hard = (played_on(played, env, script, physics) for physics in ("diffsim", "mujoco"))
            rows.append([
                env, LABELS[script], *outcome(found[script]),
                spread([float(r["return_mean"]) for r in hard]) if hard else "",
                worst("limit_violation_max", 1, ".2f", soft, hard), worst("penetration_max", 100, ".1f", soft, hard),
            ])  # fmt: skip
    header = ["task", "", "steps", "seeds", "return: median [min, max]", "minutes", "the same policies on MuJoCo"]
    return markdown([*header, "past a stop, rad: diffsim, MuJoCo", "into the ground, cm: diffsim, MuJoCo"], rows)


# Published returns of SHAC on other bodies, as far as known: cartpole and humanoid from its paper (arXiv 2204.07137),
# hopper and anymal from the repository of AHAC (arXiv 2405.17784).
MARKS = {"cartpole": -500, "cheetah": None, "hopper": 4800, "humanoid": 7950, "anymal": 15000}


def budgets() -> str:
    """SHAC with the papers' numbers of steps."""
    rows, played = [], replays()
    for env in MARKS:
        found = runs(env)
        script = next((s for s in ("shac-4M", "shac-12M", "shac-16M") if s in found), "shac")
        soft, hard = (played_on(played, env, script, physics) for physics in ("diffsim", "mujoco"))
        rows.append([
            env, *outcome(found[script]), f"{MARKS[env]:,}" if MARKS[env] else "",
            spread([float(r["speed_mean"]) for r in soft], 1) if env != "cartpole" else "",
            spread([float(r["return_mean"]) for r in hard]),
            worst("limit_violation_max", 1, ".2f", soft, hard), worst("penetration_max", 100, ".1f", soft, hard),
        ])  # fmt: skip
    header = ["task", "steps", "seeds", "return: median [min, max]", "minutes", "published, other body", "speed, m/s"]
    header += [
        "the same policies on MuJoCo",
        "past a stop, rad: diffsim, MuJoCo",
        "into the ground, cm: diffsim, MuJoCo",
    ]
    return markdown(header, rows)


def engines() -> str:
    """PPO's policies trained on one engine and played on the other, no gradient involved: in diffsim with its default
    noise and budget and with those of the runs on MuJoCo (cartpole's default is those)."""
    rows, played = [], replays()
    trained = (("", "diffsim", "mujoco"), ("-less-noise", "diffsim", "mujoco"), ("-mujoco", "mujoco", "diffsim"))
    for env in (env for env in tasks() if "-v" not in env):
        row = [env]
        for variant, *physics in trained:
            script = "ppo_baseline" + variant
            returns = [[float(r["return_mean"]) for r in played_on(played, env, script, p)] for p in physics]
            ratio = f"{np.median(returns[1]) / np.median(returns[0]):.2f}" if returns[0] else ""
            row += [spread(x) if x else "" for x in returns] + [ratio]
        rows.append(row)
    header = ["task", "trained in diffsim: return there", "on MuJoCo", "ratio"]
    header += ["with MuJoCo's setting: in diffsim", "on MuJoCo", "ratio"]
    return markdown([*header, "trained on MuJoCo: return there", "in diffsim", "ratio"], rows)


def equal_time() -> str:
    """PPO's return while training after as many minutes as the median run of SHAC and RPO takes."""
    rows = []
    for env in (env for env in tasks() if "-v" not in env):
        found, row = runs(env), [env]
        for script in ("shac", "rpo_diffsim"):
            if script not in found:
                row += [""] * 3
                continue
            minutes = np.median([column(s, "wall_time_s")[-1] for s in found[script]]) / 60
            final = [np.nanmean(column(s, "episodic_return")[-5:]) for s in found[script]]
            ppo = [
                np.interp(60 * minutes, column(s, "wall_time_s"), column(s, "episodic_return"))
                for s in found["ppo_baseline"]
            ]
            row += [f"{minutes:.1f}", spread(final), spread(ppo)]
        rows.append(row)
    header = ["task", "SHAC's minutes", "SHAC", "PPO in that time", "RPO's minutes", "RPO", "PPO in that time"]
    return markdown(header, rows)


def mujoco() -> str:
    rows, played = [], replays()
    for env in tasks():
        found, twin = runs(env), "-v" in env
        if twin and "rpo_diffsim" not in found:
            continue
        labels = LABELS if twin else ON_MUJOCO
        for script in (s for s in labels if s in found):
            hard = played_on(played, env, script, "gymnasium" if twin else "mujoco")
            cosines = [np.nanmean(column(s, "jacobian_cosine")) for s in found[script] if s[-1].get("jacobian_cosine")]
            rows.append([
                env, labels[script], *outcome(found[script]),
                spread([float(r["return_mean"]) for r in hard]) if hard else "",
                spread([float(r["length_mean"]) for r in hard]) if hard else "",
                f"{np.mean(cosines):.2f}" if cosines else "",
            ])  # fmt: skip
    header = [
        "task",
        "",
        "steps",
        "seeds",
        "return at the end: median [min, max]",
        "minutes",
        "return of 10 more episodes",
    ]
    return markdown([*header, "their steps", "Jacobian cosine"], rows)


def mujoco_against_ppo() -> str:
    """Returns while training on MuJoCo's physics: PPO after as many steps and minutes as RPO's median run has taken."""
    rows = []
    for env in tasks():
        found, suffix = runs(env), "" if "-v" in env else "-mujoco"
        rpo, ppo = found.get(f"rpo_diffsim{suffix}"), found.get(f"ppo_baseline{suffix}")
        if rpo and ppo:
            spent = {key: np.median([column(s, key)[-1] for s in rpo]) for key in ("global_step", "wall_time_s")}
            then = [
                spread([np.interp(x, column(s, key), column(s, "episodic_return")) for s in ppo])
                for key, x in spent.items()
            ]
            budget = f"{spent['global_step'] / 1e6:.1f}M, {spent['wall_time_s'] / 60:.1f}"
            rows.append([env, budget, spread([np.nanmean(column(s, "episodic_return")[-5:]) for s in rpo]), *then])
    return markdown(["task", "steps, minutes of RPO", "RPO", "PPO after these steps", "PPO after these minutes"], rows)


# CleanRL's PPO after 1M steps; a round number for Ant
PUBLISHED = {"HalfCheetah-v5": 1443, "Hopper-v5": 2383, "Walker2d-v5": 2600, "Ant-v5": 5000}


def minutes_to_mark() -> str:
    """When the return while training first passes what CleanRL publishes for PPO (Ant: a round number)."""
    rows = []
    for env, mark in PUBLISHED.items():
        found, row = runs(env), [env, f"{mark:,}"]
        for script in ("rpo_diffsim", "ppo_baseline"):
            minutes = []
            for seed in found.get(script, []):
                above = column(seed, "episodic_return") > mark
                minutes.append(column(seed, "wall_time_s")[above.argmax()] / 60 if above.any() else np.inf)
            row.append(spread(minutes, 1).replace("inf", "never") if minutes else "")
        wall = [column(s, "wall_time_s")[-1] / 60 for s in found.get("ppo_baseline", [])]
        rows.append([*row, spread(wall, 1) if wall else ""])
    header = ["task", "return", "RPO's minutes to it: median [min, max]", "PPO's", "PPO's minutes for 1M steps"]
    return markdown(header, rows)


def overtaking(labels=LABELS, suffix="") -> str:
    """When a run's return while training first exceeds the median of SHAC's last ones, in SHAC's budget of steps.

    Not in its first tenth: first episodes begin at random times, so the earliest that end are short, and where rewards
    are negative (cartpole) short is good.
    """
    rows = []
    for env in (env for env in tasks() if "-v" not in env):
        found, shac = runs(env), "shac" + suffix
        for script in (s for s in labels if s in found and s != shac and shac in found):
            goal = np.median([np.nanmean(column(s, "episodic_return")[-5:]) for s in found[shac]])
            budget = column(found[shac][0], "global_step")[-1]
            shares = []
            for seed in found[script]:
                steps = column(seed, "global_step")
                above = (column(seed, "episodic_return") > goal) & (steps > budget / 10)
                shares.append(100 * steps[above.argmax()] / budget if above.any() else np.inf)
            text = "never" if min(shares) == np.inf else f"{spread(shares)} %".replace("inf", "never")
            rows.append([env, labels[script], text])
    return markdown(["task", "", "steps to SHAC's final return: median [min, max]"], rows)


def weight_of_kl() -> str:
    """RPO on MuJoCo's physics with either weight of the KL, where both were run."""
    rows, played = [], replays()
    for env in tasks():
        found = runs(env)
        for variant in sorted(found):
            if not (match := re.fullmatch(r"(rpo_diffsim(?:-mujoco)?)-kl-(0\.25|1)", variant)):
                continue
            base, weight = match.groups()
            default = {"0.25": "1", "1": "0.25"}[weight]
            for script, coef in sorted([(variant, weight), (base, f"{default} (default)")], key=lambda x: x[1]):
                seeds = found[script]
                kl = spread([np.nanmedian(column(s, "approx_kl")) for s in seeds], 3)
                evaluations = [(x := column(s, "eval_return"))[~np.isnan(x)] for s in seeds]
                second_half = [x[len(x) // 2 - 1 :] for x in evaluations]
                moments = [[f(x) for x in second_half] for f in (lambda x: x[0], min, lambda x: x[-1])]
                physics = "gymnasium" if "-v" in env else "mujoco"
                final = [float(r["return_mean"]) for r in played_on(played, env, script, physics)]
                rows.append([env, coef, len(seeds), kl, *map(spread, moments), spread(final)])
    header = ["task", "`--kl-coef`", "seeds", "KL of a window", "return half-way", "lowest since", "at the end"]
    return markdown([*header, "10 more episodes"], rows)


def model_based() -> str:
    """rp_pgm_mb.py's runs, and PPO's return while training after as many steps."""
    rows = []
    for env in tasks():
        found = runs(env)
        for script in sorted(s for s in found if s.startswith("rp_pgm_mb") and "-lab" not in s):
            seeds, steps = found[script], column(found[script][0], "global_step")[-1]
            evaluations = [column(s, "eval_return") for s in seeds]
            ppo = [
                np.interp(steps, column(s, "global_step"), column(s, "episodic_return"))
                for s in found.get("ppo_baseline", [])
            ]
            wall = [column(s, "wall_time_s")[-1] / 60 for s in seeds]
            variant = script.removeprefix("rp_pgm_mb").strip("-").replace("-", " ") or "dp (default)"
            rows.append([
                env, variant, f"{steps / 1e3:.0f}k", len(seeds),
                spread([e[~np.isnan(e)][-1] for e in evaluations]), spread([np.nanmax(e) for e in evaluations]),
                f"{np.median(wall):.1f}", spread(ppo) if ppo and "-" not in script else "",
            ])  # fmt: skip
    header = ["environment", "", "steps", "seeds", "return at the end: median [min, max]", "best evaluation", "minutes"]
    return markdown([*header, "PPO after as many steps"], rows)


def growth_of_variance() -> str:
    """Of the gradient, against the length of the expansion."""
    rows = []
    for (env, variant), table in sorted(probes().items()):
        for name in ("dp", "dr", "lr", "true", "mfg"):
            hs, variance = curve(table, name, "variance")
            if len(hs):
                at = dict(zip(hs, variance / variance[0]))
                by_equal_parts = " / ".join(f"{at[h] / ((h + 1) / 2) ** 2:.2g}" for h in (16, 32) if h in at)
                rows.append(
                    [env, "no" if "no-sn" in variant else "yes", NAMES[name], table[name, 1]["count"]]
                    + [f"{at[h]:.3g}" if h in at else "" for h in (2, 4, 8, 16, 32)]
                    + [by_equal_parts, f"{growth(hs, variance):.2f}"]
                )
    header = ["environment", "SN", "estimator", "probes", *(f"h = {h}" for h in (2, 4, 8, 16, 32))]
    return markdown([*header, "h = 16 / 32, by ((h + 1) / 2)²", "factor per step, h >= 4"], rows)


def bias() -> str:
    """Against the true gradient of the same objective, on diffsim's tasks."""
    rows = []
    for (env, variant), table in sorted(probes().items()):
        for name in ("dp", "dr", "lr", "mfg", "true"):
            hs, deviation = curve(table, name, "deviation")
            if len(hs):
                _, distance = curve(table, name, "bias")
                cells = [
                    "" if np.isnan(d) else f"- / {d:.2f}" if name == "true" else f"{b:.2f} / {d:.2f}"
                    for b, d in zip(distance, deviation)
                ]
                rows.append([env, "no" if "no-sn" in variant else "yes", NAMES[name], *cells])
    return markdown(["environment", "SN", "bias / deviation", *(f"h = {h}" for h in (1, 2, 4, 8, 16, 32))], rows)


def parts() -> str:
    """The h + 1 actions' parts of the gradient, and their sum."""
    with open(RESULTS / "gradient_parts.csv") as f:
        measured = list(csv.DictReader(f))
    rows = []
    for env, sn in dict.fromkeys((r["env"], r["spectral_norm"]) for r in measured):
        run = [r for r in measured if (r["env"], r["spectral_norm"]) == (env, sn)]
        h, total, mean, first = (
            np.array([float(r[k]) for r in run]) for k in ("h", "variance", "mean_part", "first_part")
        )
        lines = {
            "variance of the first part": (first / first[0])[1:],
            "mean variance of a part": (mean / mean[0])[1:],
            "variance of the sum": (total / total[0])[1:],
            "how alike the parts are, 1 to h + 1": (total / ((h + 1) * mean))[1:],
        }
        for name, values in lines.items():
            rows.append([env, "yes" if sn == "True" else "no", name, *(f"{x:.3g}" for x in values)])
    return markdown(["environment", "SN", "", *(f"h = {r['h']}" for r in run[1:])], rows)


def mismatch() -> str:
    with open(RESULTS / "mismatch.csv") as f:
        rows = list(csv.DictReader(f))
    rows = [
        [r["env"], f"{r['parameter'].replace('_', ' ')} {r['value']}" + " (diffsim's)" * (r["default"] == "True")]
        + [f"{float(r[k]):.{d}f}" for k, d in (("joint", 4), ("base_velocity", 3), ("cosine", 2))]
        for r in rows
    ]
    return markdown(["task", "softness", "joints, rad", "base velocity, m/s", "Jacobian cosine"], rows)


def softness() -> str:
    """What RPO learns on MuJoCo's Ant within 1M steps, against the softness of the gradient."""
    rows = []
    for what, script in swept_softness():
        seeds = runs("ant")[script]
        final = [column(s, "eval_return")[-1] for s in seeds]
        cosine = np.mean([np.nanmean(column(s, "jacobian_cosine")) for s in seeds])
        rows.append([*(f"{x:g}" for x in what.values()), len(seeds), spread(final), f"{cosine:.2f}"])
    header = ["stiffness", "smoothing", "seeds", "return: median [min, max]", "Jacobian cosine"]
    return markdown(header, rows)


def softness_falls() -> str:
    """Falls of the first seeds of those runs."""
    with open(RESULTS / "falls.csv") as f:
        fallen = {r["run"]: r for r in csv.DictReader(f)}
    rows = []
    for what, script in swept_softness():
        if r := fallen.get(f"ant__{script}__1"):
            numbers = f"{float(r['return']):,.0f}", r["falls"].removesuffix(".0")
            rows.append([*(f"{x:g}" for x in what.values()), *numbers])
    return markdown(["stiffness", "smoothing", "return", "falls"], rows)


def falls() -> str:
    with open(RESULTS / "falls.csv") as f:
        rows = [
            [r["run"].replace("__", ", "), r["episodes"], r["falls"].removesuffix(".0")]
            + [f"{float(r[k]):,.0f}" for k in ("return", "return_without_fall")]
            for r in csv.DictReader(f)
        ]
    return markdown(["run", "episodes", "falls", "return", "return of the episodes without a fall"], rows)


def cost() -> str:
    rows = []
    for env in tasks():
        seeds = runs(env).get("rpo_diffsim", [])
        if seeds and "-v" not in env:
            parts = [
                np.mean([np.nanmedian(column(s, k)) for s in seeds]) for k in ("simulate_s", "policy_s", "critic_s")
            ]
            rows.append([env, *(f"{1000 * x:.0f}" for x in parts), f"{100 * parts[0] / sum(parts):.0f} %"])
    return markdown(["task", "simulate, ms", "policy epochs, ms", "critic, ms", "share of physics"], rows)


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


TABLES = dict(
    learning=learning,
    model=model_based,
    variance=growth_of_variance,
    bias=bias,
    parts=parts,
    budgets=budgets,
    engines=engines,
    equal_time=equal_time,
    overtaking=overtaking,
    overtaking_mujoco=lambda: overtaking(ON_MUJOCO, "-mujoco"),
    mujoco=mujoco,
    mujoco_against_ppo=mujoco_against_ppo,
    minutes_to_mark=minutes_to_mark,
    kl=weight_of_kl,
    mismatch=mismatch,
    softness=softness,
    falls=falls,
    softness_falls=softness_falls,
    ablation=ablation,
    cost=cost,
    throughput=throughput,
)

if __name__ == "__main__":
    for readme in READMES:
        text = readme.read_text()
        for name, table in TABLES.items():
            block = re.compile(f"(<!-- table {name} -->\n).*?(<!-- end -->)", re.S)
            if block.search(text):
                text = block.sub(lambda m, table=table: f"{m[1]}{table()}\n{m[2]}", text)
        readme.write_text(text)
