"""How far diffsim's step is from MuJoCo's at states a policy visits there, against the softness of contacts and limits.

    python benchmarks/mismatch.py runs/ant__rpo_diffsim__1__<time>      # a policy trained with --physics mujoco

For each stiffness (and each width of the smoothing) in turn, the others at their defaults: mean absolute difference of
the joints, length of the difference of the base's velocity after one control step, and the cosine of the Jacobians of
one substep (diffsim/mujoco_physics.py). Rows go to results/mismatch.csv.
"""

import csv
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import diffsim  # noqa: E402
from diffsim.mujoco_physics import jacobian_cosine  # noqa: E402
from diffsim.play import load_policy  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SWEEPS = {
    "stiffness": (0.3, 0.6, 1.2, 2.4, 4.8, 9.6, 19.2),
    "contact_width": (0.001, 0.003, 0.006),
    "contact_depth": (0.0025, 0.005, 0.01),
    "limit_width": (0.003, 0.01, 0.03),
    "limit_depth": (0.01, 0.03, 0.1),
}
NUM_ENVS, NOISE = 48, 0.3


def visited(name: str, policy) -> list:
    """States of MuJoCo's environment on the way of the policy with some noise, and the actions taken there."""
    env, states = diffsim.make(name, NUM_ENVS, physics="mujoco"), []
    obs, _ = env.reset(seed=0)
    with torch.no_grad():
        for t in range(160):
            u = torch.atanh(policy(obs).clamp(-0.999, 0.999))
            action = torch.tanh(u + NOISE * torch.randn_like(u))
            if t >= 60 and t % 20 == 0:
                states.append((env.get_state(), action))
            obs, *_ = env.step(action)
    return states


def measure(name: str, states: list, softness: diffsim.Softness) -> dict[str, float]:
    env = diffsim.make(name, NUM_ENVS, physics="mujoco", compile=False, softness=softness)
    found = []
    for state, action in states:
        env.set_state(state)
        env.last_action = action.T
        cosine = jacobian_cosine(env, 16)
        env.step(action.clone().requires_grad_())
        found.append((env.physics.mismatch.joint_angle(), env.physics.mismatch.base_velocity(), cosine))
        env.detach()
    return dict(zip(("joint", "base_velocity", "cosine"), np.mean(found, 0).round(5)))


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if len(sys.argv) != 2:
        sys.exit("mismatch.py RUN: the folder of a run with --physics mujoco")
    policy, name = load_policy(sys.argv[1])
    states, defaults, rows = visited(name, policy), diffsim.Softness(), []
    for parameter, values in SWEEPS.items():
        for value in values:
            row = dict(env=name, parameter=parameter, value=value, default=value == asdict(defaults)[parameter])
            row |= measure(name, states, replace(defaults, **{parameter: value}))
            print(row, flush=True)
            rows.append(row)
    path = RESULTS / "mismatch.csv"
    before = []
    if path.exists():
        with open(path) as f:
            before = [r for r in csv.DictReader(f) if r["env"] != name]
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(before + rows)


if __name__ == "__main__":
    main()
