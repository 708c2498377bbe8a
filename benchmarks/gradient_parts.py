"""What the variance of an h-step policy gradient is made of: the parts of its h + 1 actions.

    python rp_pgm_mb.py --env InvertedDoublePendulum-v5 --total-timesteps 12000 --run-dir runs/parts
    python rp_pgm_mb.py --env InvertedDoublePendulum-v5 --total-timesteps 12000 --no-spectral-norm --run-dir runs/parts
    python rp_pgm_mb.py --env Hopper-v5 --total-timesteps 20000 --run-dir runs/parts
    python rp_pgm_mb.py --env Hopper-v5 --total-timesteps 20000 --no-spectral-norm --run-dir runs/parts
    python benchmarks/gradient_parts.py runs/parts/*

The gradient of the expansion is a sum over its actions, each with its own effect on all that follows. As many copies of
the policy as there are actions give the parts in one backward pass. If only the number of actions grew with h, the
parts' mean variance would stay and the variance of the sum grow by up to ((h + 1) / 2)^2 from h = 1; what the parts'
own variance grows by is the model's doing. Rows go to results/gradient_parts.csv.
"""

import copy
import csv
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rp_pgm_mb as rp  # noqa: E402

DRAWS, BATCH = 32, 64


class OneEach:
    """A policy for every action of an expansion, all the same."""

    def __init__(self, actor, number: int):
        self.copies, self.taken = [copy.deepcopy(actor) for _ in range(number)], 0

    def __call__(self, z, noise):
        self.taken += 1
        return self.copies[self.taken - 1](z, noise)


def parts(run: Path):
    """(env, spectral_norm) and {h: (DRAWS, h + 1, number of parameters)}: dp's gradient of a run's last checkpoint."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    args = rp.Args(**checkpoint["args"])
    data = checkpoint["buffer"]["data"]
    obs_dim, act_dim = data["obs"].shape[-1], data["u"].shape[-1]
    modules = dict(
        actor=rp.Actor(obs_dim, act_dim, args), model=rp.Model(obs_dim, act_dim, args),
        critic=rp.Critics(obs_dim, act_dim, args), normalizer=rp.Normalizer(obs_dim),
    )  # fmt: skip
    for name, module in modules.items():
        module.load_state_dict(checkpoint[name])
        module.eval()
    alpha = float(checkpoint["temperature"]["0"].exp())
    torch.manual_seed(0)
    found = {}
    for h in rp.HORIZONS:
        draws = []
        for _ in range(DRAWS):
            index = torch.randint(len(data["obs"]), (BATCH,)), torch.randint(args.num_envs, (BATCH,))
            z = modules["normalizer"](data["obs"][index])
            actors = OneEach(modules["actor"], h + 1)
            step = partial(rp.predicted_step, modules["model"])
            noise = torch.randn(h + 1, BATCH, act_dim)
            value, _ = rp.expansion(actors, modules["critic"], step, z, noise, args.gamma, alpha)
            grads = torch.autograd.grad(value.mean(), [p for a in actors.copies for p in a.parameters()])
            draws.append(torch.cat([g.flatten() for g in grads]).view(h + 1, -1))
        found[h] = torch.stack(draws)
    return (args.env, args.spectral_norm), found


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = []
    for run in map(Path, sys.argv[1:]):
        (env, spectral), found = parts(run)
        for h, g in found.items():
            each = g.var(0).sum(-1)  # (h + 1,)
            total = float(g.sum(1).var(0).sum())
            row = dict(env=env, spectral_norm=spectral, h=h, variance=total, mean_part=float(each.mean()))
            rows.append(row | dict(first_part=float(each[0]), largest_part=float(each.max())))
            print(*(f"{k} {x:.4g}" if isinstance(x, float) else f"{k} {x}" for k, x in rows[-1].items()))
    with open(Path(__file__).parent / "results" / "gradient_parts.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
