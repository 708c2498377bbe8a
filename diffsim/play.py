"""Watch a trained policy, and measure it: python -m diffsim.play RUN_OR_POLICY [--physics mujoco] [--video ant.mp4]"""

import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

import diffsim
from diffsim import memory, ranks
from diffsim.builder import without_margins
from diffsim.dynamics import contact_points
from diffsim.flags import Bound, Seed, check_bounds, cli
from diffsim.gymnasium_env import GymnasiumEnv
from diffsim.physics import CacheError
from diffsim.policy import evaluating, read_policy
from diffsim.program import printable, start
from diffsim.render import check_path, render
from diffsim.tasks import is_file


@dataclass
class Args:
    policy: Annotated[str, tyro.conf.Positional]
    """run folder, or policy.pt2"""
    env: str | None = None
    """environment (default: the one it was trained on, which must be named here if it is a file: its code runs)"""
    physics: Literal["diffsim", "mujoco", "gymnasium"] | None = None
    """engine to run on (default: the one it was trained on); gymnasium: gymnasium.make of that id itself"""
    episodes: Annotated[int, Bound(1, 10_000, "between 1 and 10,000")] = 10
    """episodes to average"""
    seed: Seed = 0
    """seed of the initial states"""
    video: str | None = None
    """write the first episode as .mp4, and a strip of frames beside it as .png"""


def load_policy(path) -> tuple[torch.nn.Module, str]:
    """The policy of a run folder or policy.pt2, obs (B, obs_dim) -> action (B, act_dim), and its environment's name."""
    policy = read_policy(path)
    return policy, policy.env


def playback_env(name: str, episodes: int, physics: str | None = None, obs_dim: int | None = None, **softness):
    """An environment for each episode, with compiled physics where episodes are long enough for that to pay.
    softness: stiffness and smoothing, see `diffsim.make`.

    Raises ValueError, one line, where observations are not those a policy wants, obs_dim.
    """
    env = diffsim.make(name, episodes, physics=physics, compile=False, **softness)
    given = env.single_observation_space.shape[0]
    if obs_dim not in (None, given):
        raise ValueError(f"the policy wants {obs_dim} observations, {name} on {physics} has {given}")
    if not isinstance(env, GymnasiumEnv) and env.max_episode_steps >= 500:
        with suppress(CacheError):  # then nothing is compiled, and play works without
            return diffsim.make(name, episodes, physics=physics, **softness)
    return env


def starts(env, episodes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial qpos, qvel of a batch, (rows, num_envs): episode i begins alike on each engine, in any batch."""
    generator = torch.Generator(device=env.device).manual_seed(seed)
    drawn = [env.task.reset(env.model, 1, generator) for _ in range(episodes)]
    copies = torch.arange(env.num_envs, device=env.device) % episodes
    qpos, qvel = (torch.cat(states, 1)[:, copies] for states in zip(*drawn))
    return qpos, qvel


@torch.no_grad()
def rollout(env, policy, episodes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """First episode of the first `episodes` environments. Returns per episode: return, length, speed (m/s along x),
    limit_violation (rad or m past a joint's stop), penetration (m of a geom into the ground or a body), saturation
    (share of the actions beyond 95 % of their bound), of a task with goals successes, and the qpos of environment 0
    (T, nq). Of a Gymnasium environment: return, length and, where it runs on MuJoCo, qpos."""
    if isinstance(env, GymnasiumEnv):
        return _rollout_gymnasium(env, policy, episodes, seed)
    free = without_margins(env.model)
    env.reset(seed=seed)
    qpos, qvel = starts(env, episodes, seed)
    env.set_state(env.get_state() | dict(qpos=qpos, qvel=qvel))
    obs = env.detach()
    batch, m = env.num_envs, env.model.mj_model
    running = torch.ones(batch, dtype=torch.bool)
    total, length, violation, depth, saturated = torch.zeros(5, batch)
    successes = None
    start, end = env.qpos[0].clone(), env.qpos[0].clone()
    limited = np.flatnonzero(m.jnt_limited & (m.jnt_type >= 2))
    rows = torch.as_tensor(m.jnt_qposadr[limited], dtype=torch.long)
    low, high = (torch.as_tensor(m.jnt_range[limited, i], dtype=env.dtype)[:, None] for i in (0, 1))
    frames = [env.qpos[:, 0].numpy().copy()]
    for _ in range(env.max_episode_steps):
        action = policy(obs)
        obs, reward, terminated, truncated, info = env.step(action)
        total += torch.where(running, reward, 0.0)
        saturated += torch.where(running, (action.abs() > 0.95).float().mean(-1), 0.0)
        length += running
        if "successes" in info.get("episode", {}):
            before = torch.zeros(batch) if successes is None else successes
            successes = torch.where(running & info["_episode"], info["episode"]["successes"], before)
        going = running & ~(terminated | truncated)  # the rest has been reset, its state is a new episode's
        q = env.qpos
        if len(limited):
            over = torch.maximum(low - q[rows], q[rows] - high).amax(0)
            violation = torch.where(going, torch.maximum(violation, over), violation)
        gap, _ = contact_points(free, q, env.qvel)
        if len(gap):
            depth = torch.where(going, torch.maximum(depth, -gap.amin(0)), depth)
        end = torch.where(going, q[0], end)
        running = going
        if bool(running[0]):
            frames.append(q[:, 0].numpy().copy())
        if not running[:episodes].any():
            break
    time = (length - 1).clamp(min=1) * env.control_dt  # until `end`, before the last step
    values = dict(length=length, speed=(end - start) / time, saturation=saturated / length)
    values |= {"return": total, "limit_violation": violation, "penetration": depth}
    values |= {} if successes is None else dict(successes=successes)
    return {**{k: v[:episodes].numpy() for k, v in values.items()}, "qpos": np.stack(frames)}


def _rollout_gymnasium(env: GymnasiumEnv, policy, episodes: int, seed: int) -> dict[str, np.ndarray]:
    obs, _ = env.reset(seed=10_000 * seed)  # environment i has this seed + i
    data = getattr(env.envs.envs[0].unwrapped, "data", None)
    total, length = torch.full((episodes,), torch.nan), torch.zeros(episodes)
    frames = []
    while bool(torch.isnan(total).any()):
        if data is not None and bool(torch.isnan(total[0])):
            frames.append(data.qpos.copy())
        obs, _, _, _, info = env.step(policy(obs))
        if "episode" in info:
            first = info["_episode"] & torch.isnan(total)
            total = torch.where(first, info["episode"]["r"], total)
            length = torch.where(first, info["episode"]["l"].float(), length)
    return {"return": total.numpy(), "length": length.numpy(), "qpos": np.array(frames)}


@torch.no_grad()
def evaluate(env, policy, episodes: int) -> torch.Tensor:
    """Return of the first episode of each of the first `episodes` environments: (episodes,). Under torchrun each
    process has other ones."""
    obs, _ = env.reset(seed=ranks.seed(12345))
    returns = torch.full((env.num_envs,), float("nan"), device=env.device)
    for _ in range(env.max_episode_steps):
        obs, _, terminated, truncated, info = env.step(policy(obs))
        if "episode" in info:
            first = info["_episode"] & torch.isnan(returns)
            returns = torch.where(first, info["episode"]["r"], returns)
            if not torch.isnan(returns[:episodes]).any():
                break
    return returns[:episodes]


class Evaluator:
    """Measures a deterministic policy as a script's flags say: on --physics, with --eval-physics on another, too.
    Under torchrun each process runs its share of the episodes."""

    def __init__(self, args):
        device = dict(device=args.device, compile=args.compile)
        known = device | {k: getattr(args, k) for k in ("physics", "stiffness", "smoothing") if hasattr(args, k)}
        self.episodes = ranks.share(args.eval_episodes)
        if args.eval_physics and args.physics == "gymnasium" and args.env not in diffsim.TASKS:
            raise ValueError(f"--eval-physics: {args.env} runs on gymnasium only")
        make, self.others = partial(diffsim.make, args.env, max(1, self.episodes)), {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say of a task was said of the run's own environment
            self.env = make(**known)
            if args.eval_physics:
                other = "mujoco" if args.physics == "diffsim" else "diffsim"
                self.others[other] = make(physics=other, **device)

    def __call__(self, policy) -> dict[str, torch.Tensor]:
        """Numbers by TensorBoard tag, of all processes' episodes."""
        with evaluating(policy):
            return self._numbers(policy)

    def _numbers(self, policy) -> dict[str, torch.Tensor]:
        returns = self._returns(self.env, policy)
        numbers = {"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std(correction=0)}
        for name, env in self.others.items():
            numbers[f"eval/{name}_return"] = self._returns(env, policy).mean()
        return numbers

    def _returns(self, env, policy) -> torch.Tensor:
        return torch.cat(ranks.gather(evaluate(env, policy, self.episodes).cpu()))


def film(env, qpos: np.ndarray, video: str | Path):
    """Draw the qpos (T, nq) of an episode. Raises ValueError, one line, where there is nothing to draw."""
    if env.mj_model is None:
        raise ValueError(f"{env.name} does not run on MuJoCo: no video")
    render(env.mj_model, qpos, env.control_dt, str(video))


def record(run: Path, video: Path):
    """Film one episode of a run's policy on the engine that it was trained on."""
    policy = read_policy(run)
    env = playback_env(policy.env, 1, policy.physics, **policy.softness)
    for file in (video, video.with_suffix(".png")):  # a link in the folder of another's run must not be followed
        file.unlink(missing_ok=True)
    film(env, rollout(env, policy, 1)["qpos"], video)


def main():
    start()
    args = cli(Args, prog="python -m diffsim.play")
    try:
        check_bounds(args)
        if args.video is not None:
            check_path(args.video)
        memory.limit()  # a file may ask for more than there is
        policy = read_policy(args.policy)
        name, physics = args.env or policy.env, args.physics or policy.physics
        if is_file(name) and not args.env:
            trust = f"if you trust that file: --env {quote(name)}"
            raise ValueError(f"{args.policy} was trained on code in a file; {trust}")
        softness = policy.softness if physics == policy.physics == "diffsim" else {}
        env = playback_env(name, args.episodes, physics, policy.obs_dim, **softness)
        contacts = "".join(f", {k} {x:g} as trained" for k, x in softness.items())
        print(f"{name} on {physics}{contacts}, {args.episodes} episodes, deterministic policy", flush=True)
        result = rollout(env, policy, args.episodes, args.seed)
        for key, unit in (
            ("return", ""), ("successes", ""), ("length", "steps"), ("speed", "m/s"), ("limit_violation", "rad or m"),
            ("penetration", "m"), ("saturation", ""),
        ):  # fmt: skip
            x = result.get(key)
            if x is None or (key == "speed" and not env.task.runs):
                continue
            print(f"{key:16s} {x.mean():10.3f} +- {x.std():.3f}   [{x.min():.3f}, {x.max():.3f}] {unit}")
        if args.video:
            print(f"drawing the first episode, {len(result['qpos'])} frames: a minute or two without a GPU", flush=True)
            film(env, result["qpos"], args.video)
            print(f"wrote {args.video}, and a strip of frames beside it as .png")
    except ValueError as e:
        print(printable(f"diffsim.play: {e}"), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    main()
