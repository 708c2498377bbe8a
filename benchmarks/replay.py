"""Final policies on both engines: python benchmarks/replay.py RUN... -> results/replay.csv"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffsim.play import load_policy, playback_env, rollout  # noqa: E402

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    with open(RESULTS / "replay.csv", "w", newline="") as f:
        writer = csv.writer(f)
        keys = ["return", "length", "speed", "limit_violation", "penetration"]
        writer.writerow(["run", "physics", "episodes", *(f"{k}_{s}" for k in keys for s in ("mean", "std", "max"))])
        for run in map(Path, sys.argv[1:]):
            policy, name = load_policy(run)
            for physics in ("diffsim", "mujoco"):
                result = rollout(playback_env(name, 10, physics), policy, 10)
                numbers = [
                    round(float(v), 4) for k in keys for v in (result[k].mean(), result[k].std(), result[k].max())
                ]
                writer.writerow([run.name.rsplit("__", 1)[0], physics, 10, *numbers])
                f.flush()
