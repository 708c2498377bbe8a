"""What the variance of an h-step policy gradient is made of: the parts of its h + 1 actions.

    python rp_pgm_mb.py --env InvertedDoublePendulum-v5 --total-timesteps 12000 --run-dir runs/parts
    python rp_pgm_mb.py --env InvertedDoublePendulum-v5 --total-timesteps 12000 --no-spectral-norm --run-dir runs/parts
    python rp_pgm_mb.py --env Hopper-v5 --total-timesteps 20000 --run-dir runs/parts
    python rp_pgm_mb.py --env Hopper-v5 --total-timesteps 20000 --no-spectral-norm --run-dir runs/parts
    python benchmarks/gradient_parts.py runs/parts/*

The gradient of the expansion is a sum over its actions, each with its own effect on all that follows. As many copies of
the policy as there are actions give the parts in one backward pass. The variance of the sum is that of the average part
times their number times how alike they are: 1 where parts are uncorrelated, h + 1 where they are equal. Rows go to
results/gradient_parts.csv, replacing those of the same environment and spectral normalisation.
"""

import copy
import csv
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rp_pgm_mb as rp  # noqa: E402

DRAWS, BATCH = 128, 64
RESULT = Path(__file__).parent / "results" / "gradient_parts.csv"


class OneEach:
    """A policy for every action of an expansion, all the same."""

    def __init__(self, actor, number: int):
        self.copies, self.taken = [copy.deepcopy(actor) for _ in range(number)], 0

    def __call__(self, z, noise):
        self.taken += 1
        return self.copies[self.taken - 1](z, noise)


def parts(run: Path):
    """(env, spectral_norm) and {h: (DRAWS, h + 1, number of parameters)}: dp's gradient of a run's last checkpoint."""
    try:
        checkpoint = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
        args, data = rp.Args(**checkpoint["args"]), checkpoint["buffer"]["data"]
    except (OSError, TypeError, KeyError):
        sys.exit(f"gradient_parts.py: {run} is no run folder of rp_pgm_mb.py with a checkpoint.pt")
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
    held = len(data["obs"])
    recent = min(held, args.dr_recent // args.num_envs)  # the states that a probe takes, too
    found = {}
    for h in rp.HORIZONS:
        draws = []
        for _ in range(DRAWS):
            index = torch.randint(held - recent, held, (BATCH,)), torch.randint(args.num_envs, (BATCH,))
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
    if not sys.argv[1:]:
        sys.exit("gradient_parts.py: name the run folders, as in: python benchmarks/gradient_parts.py runs/parts/*")
    rows = []
    for run in map(Path, sys.argv[1:]):
        (env, spectral), found = parts(run)
        for h, g in found.items():
            each = g.var(0).sum(-1)  # (h + 1,)
            row = dict(env=env, spectral_norm=str(spectral), h=h, variance=float(g.sum(1).var(0).sum()))
            rows.append(row | dict(mean_part=float(each.mean()), first_part=float(each[0])))
            print(*(f"{k} {x:.4g}" if isinstance(x, float) else f"{k} {x}" for k, x in rows[-1].items()))
    new = {(r["env"], r["spectral_norm"]) for r in rows}
    if RESULT.exists():
        with open(RESULT) as f:
            rows = [r for r in csv.DictReader(f) if (r["env"], r["spectral_norm"]) not in new] + rows
    with open(RESULT, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[-1])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: (r["env"], r["spectral_norm"] == "False")))
