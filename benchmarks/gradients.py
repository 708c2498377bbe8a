"""Bias and variance of rp_pgm_mb.py's gradient estimators, on the networks and states of its checkpoints.

    python rp_pgm_mb.py --env hopper --total-timesteps 20000 --run-dir runs/lab     # and with --no-spectral-norm
    python benchmarks/gradients.py runs/lab/*                               # rows to runs/gradients.csv
    python benchmarks/gradients.py runs/lab/* --out benchmarks/probes.csv   # into what the tables are made of

For each length h of the expansion: the trace of the covariance of the flattened policy gradient over independent draws
of states and noise; and of dp also the variance of the parts that its h + 1 actions have in it. On a diffsim task the
same expansion through the simulator gives the true gradient ("true") and, from the same trajectories, the score
function's ("mfg"): bias is the distance of the means, less what the number of draws contributes. The end of an episode
is a step without derivative in the simulator: "true" does not see it, "mfg" does.
"""

import copy
import signal
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

__name__ == "__main__" and signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import pandas as pd
import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import diffsim
import rp_pgm_mb as rp


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of rp_pgm_mb.py"""
    horizons: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """h, lengths of the expansion"""
    draws: int = 128
    """independent draws of the gradient"""
    batch: int = 64
    """samples of a draw"""
    out: Path = ROOT / "runs" / "gradients.csv"
    """table to add rows to, in the place of earlier ones of the same task, normalisation, seed and step"""


class Lab:
    """Networks and data of a checkpoint."""

    def __init__(self, run: Path, batch: int):
        try:
            checkpoint = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
            self.args = rp.Args(**checkpoint["args"])
            data = checkpoint["buffer"]["data"]
            sizes = data["obs"].shape[-1], data["u"].shape[-1]
            self.actor, self.model = rp.Actor(*sizes, self.args), rp.Model(*sizes, self.args)
            self.critic, self.normalizer = rp.Critics(*sizes, self.args), rp.Normalizer(sizes[0])
            self.buffer = rp.ReplayBuffer(self.args.buffer_size, self.args.num_envs)
            for name in ("actor", "model", "critic", "normalizer", "buffer"):
                part = getattr(self, name)
                part.load_state_dict(checkpoint[name])
                if isinstance(part, torch.nn.Module):
                    part.eval()
        except (OSError, TypeError, KeyError, RuntimeError):  # RuntimeError: networks of another version
            sys.exit(f"gradients.py: {run} is no run folder of this rp_pgm_mb.py with a checkpoint.pt")
        self.global_step, self.alpha = checkpoint["global_step"], float(checkpoint["temperature"]["0"].exp())
        self.batch, self.env, self.states = batch, None, []
        if self.args.physics == "diffsim":
            self.env = diffsim.make(self.args.env, batch, physics="diffsim", compile=self.args.compile)
            self.policy = rp.DeterministicPolicy(self.normalizer, self.actor, self.env.single_action_space)
            self.collect(200)

    @torch.no_grad()
    def collect(self, steps: int):
        """States that the policy visits in the simulator."""
        obs, _ = self.env.reset(seed=0)
        for _ in range(steps):
            action, _, u = self.actor(self.normalizer(obs), torch.randn(self.batch, self.env.model.nu))
            self.states.append(torch.cat([self.env.qpos, self.env.qvel, self.env.last_action]))
            obs, *_ = self.env.step(self.policy.scale(action))

    def flat_grad(self, value) -> torch.Tensor:
        grads = torch.autograd.grad(value.mean(), list(self.actor.parameters()))
        return torch.cat([g.flatten() for g in grads])

    def simulator_step(self, record: list, i, z, action):
        """The world itself, what happens recorded for dr."""
        _, reward, terminated, truncated, info = self.env.step(self.policy.scale(action))
        z_next = self.normalizer(info["final_obs"])
        record.append(dict(z=z, reward=reward, z_next=z_next, terminated=terminated, truncated=truncated))
        goes_on = (~terminated).to(z.dtype)
        return z_next, reward - self.model.end_cost * (1 - goes_on), goes_on, terminated | truncated

    def through_the_simulator(self, noise) -> tuple[dict, dict]:
        """Gradients "true" and "mfg" of one draw, and its trajectories as a segment."""
        pool = torch.cat(self.states, 1)
        state = pool[:, torch.randint(pool.shape[1], (self.batch,))]
        model, begun = self.env.model, dict(episode_length=torch.zeros_like(self.env.episode_length))
        begun |= dict(zip(("qpos", "qvel", "last_action"), state.split([model.nq, model.nv, model.nu])))
        self.env.set_state(self.env.get_state() | begun)
        record: list[dict] = []
        z, step = self.normalizer(self.env.detach()), partial(self.simulator_step, record)
        value, _, visited = rp.expansion(self.actor, self.critic, step, z, noise, self.args.gamma, self.alpha)
        visited = [{k: x.detach() for k, x in v.items()} for v in visited]
        score = rp.score_surrogate(self.actor, self.critic, visited, self.alpha)
        segment = {k: torch.stack([r[k].detach() for r in record]) for k in record[0]}
        segment |= {k: torch.stack([v[k] for v in visited[:-1]]) for k in ("u", "log_prob")}
        return dict(true=self.flat_grad(value), mfg=self.flat_grad(score)), segment

    def draw(self, h: int) -> dict[str, torch.Tensor]:
        """One gradient of each estimator, on the same states."""
        grads, segment = {}, self.normalizer.of(self.buffer.sample(self.batch, h, self.args.dr_recent))
        noise = torch.randn(h + 1, *segment["u"].shape[1:])
        if self.env is not None:
            grads, segment = self.through_the_simulator(noise)
        for name in ("dp", "dr", "lr"):
            inputs = (name, self.actor, self.model, self.critic, segment, noise, self.args.gamma, self.alpha)
            grads[name] = self.flat_grad(rp.objective(*inputs)[0])
        return grads | dict(parts=self.parts(segment["z"][0], noise))

    def parts(self, z, noise) -> torch.Tensor:
        """(h + 1, number of parameters): dp's gradient by its actions, from as many copies of the policy."""
        copies = [copy.deepcopy(self.actor) for _ in noise]
        turns, step = iter(copies), partial(rp.predicted_step, self.model)
        others = self.critic, step, z, noise, self.args.gamma, self.alpha
        value, _, _ = rp.expansion(lambda z, eps: next(turns)(z, eps), *others)
        grads = torch.autograd.grad(value.mean(), [p for actor in copies for p in actor.parameters()])
        return torch.cat([g.flatten() for g in grads]).view(len(noise), -1)

    def rows(self, h: int, draws: int) -> list[dict]:
        grads: dict[str, list] = defaultdict(list)
        for _ in range(draws):
            for name, g in self.draw(h).items():
                grads[name].append(g)
        each = torch.stack(grads.pop("parts")).var(0).sum(-1)  # (h + 1,)
        rows = []
        for name, found in grads.items():
            g = torch.stack(found)
            row = dict(estimator=name, h=h, variance=float(g.var(0).sum()), mean_norm=float(g.mean(0).norm()))
            if name == "dp":
                row |= dict(mean_part=float(each.mean()), first_part=float(each[0]))
            if "true" in grads:
                d = g - torch.stack(grads["true"])
                bias = float(d.mean(0).square().sum() - d.var(0).sum() / len(d))
                row |= dict(bias=max(bias, 0.0) ** 0.5, true_norm=float(torch.stack(grads["true"]).mean(0).norm()))
            rows.append(row)
        return rows


def main(args: Args):
    torch.set_num_threads(1)
    for run in args.runs:
        torch.manual_seed(0)
        lab = Lab(run, args.batch)
        variant = "lab" if lab.args.spectral_norm else "lab-no-sn"
        name = dict(run=f"{lab.args.env}__rp_pgm_mb-{variant}__{lab.args.seed}", global_step=lab.global_step)
        rows = [name | row for h in args.horizons if h <= len(lab.buffer) for row in lab.rows(h, args.draws)]
        table = pd.DataFrame(rows)
        if args.out.exists():
            old = pd.read_csv(args.out)
            same = (old.run == name["run"]) & (old.global_step == name["global_step"])
            table = pd.concat([old[~same], table])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(args.out, index=False)
        print(f"{name['run']} at {lab.global_step}: {len(rows)} rows in {args.out}", flush=True)


if __name__ == "__main__":
    diffsim.program.start()
    main(tyro.cli(Args))
