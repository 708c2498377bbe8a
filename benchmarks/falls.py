"""How often a policy falls on MuJoCo: python benchmarks/falls.py runs/benchmarks/ant__rpo_diffsim-mujoco__*

64 episodes of each run that benchmarks/train.py left in these folders, to results/falls.csv. A fall is an episode that
ended early.
"""

import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffsim.play import load_policy, playback_env, rollout  # noqa: E402

PATH = Path(__file__).parent / "results" / "falls.csv"
EPISODES = 64
HEADER = ["run", "episodes", "return", "falls", "return_without_fall"]

if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = {}
    if PATH.exists():
        with open(PATH) as f:
            rows = {r["run"]: r for r in csv.DictReader(f)}
    folders = [Path(x) for x in sys.argv[1:]]
    if bad := [str(f) for f in folders if not list(f.glob("*/policy.pt2"))]:
        sys.exit(f"falls.py: no run of benchmarks/train.py in {', '.join(bad)}")
    for folder in folders:
        policy, name = load_policy(next(folder.glob("*/policy.pt2")))
        env = playback_env(name, EPISODES, "mujoco")
        played = rollout(env, policy, EPISODES)
        upright = played["length"] == env.max_episode_steps
        values = (
            played["return"].mean(),
            (~upright).sum(),
            played["return"][upright].mean() if upright.any() else float("nan"),
        )
        row = [folder.name, EPISODES, *(round(float(x), 1) for x in values)]
        rows[folder.name] = dict(zip(HEADER, row))
        print(*row)
    with open(PATH, "w", newline="") as f:
        writer = csv.DictWriter(f, HEADER)
        writer.writeheader()
        writer.writerows(rows[k] for k in sorted(rows))
