"""Watch a trained policy, and measure it: python -m diffsim.play RUN_OR_POLICY [--physics mujoco] [--video ant.mp4]"""

import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

import diffsim
from diffsim.dynamics import contact_points
from diffsim.gymnasium_env import GymnasiumEnv, is_gymnasium_id
from diffsim.physics import compiled_batches
from diffsim.render import check_path, render


@dataclass
class Args:
    policy: Annotated[str, tyro.conf.Positional]
    """run folder, or policy.pt2"""
    physics: Literal["diffsim", "mujoco", "gymnasium"] | None = None
    """engine to run on; gymnasium: the environment of that id itself (default: that for such an id, else diffsim)"""
    episodes: int = 10
    """episodes to average"""
    seed: int = 0
    """seed of the initial states"""
    video: str | None = None
    """write the first episode as .mp4, and a strip of frames beside it as .png"""


def load_policy(path) -> tuple[torch.nn.Module, str]:
    """The exported policy, obs (B, obs_dim) -> action (B, act_dim), and the name of its environment."""
    path = Path(path)
    path = path / "policy.pt2" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no policy at {path}")
    extra = {"env": ""}
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it prints a traceback before it raises
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as e:
        raise ValueError(f"{path} is not a readable policy ({type(e).__name__})") from None
    name = extra["env"].decode() if isinstance(extra["env"], bytes) else extra["env"]
    return program.module(), name


def policy_obs_dim(policy: torch.nn.Module) -> int:
    """How many observations an exported policy takes."""
    return next(b.shape[0] for name, b in policy.named_buffers() if name.endswith("normalizer.mean"))


def playback_env(name: str, episodes: int, physics: str = "diffsim", obs_dim: int | None = None):
    """Environments for at least that many episodes: a batch that is compiled already (training left one), or eager.

    On Gymnasium, that with obs_dim observations: its own, or what diffsim's task of the same name leaves of them.
    """
    if physics == "gymnasium":
        if not is_gymnasium_id(name):
            raise ValueError(f"{name} is no Gymnasium environment; --physics diffsim or mujoco")
        env, twin = GymnasiumEnv(name, episodes), diffsim.TASKS.get(name)
        if twin and obs_dim is not None and env.single_observation_space.shape[0] != obs_dim:
            env = GymnasiumEnv(name, episodes, **twin.gymnasium_kwargs)
        return env
    if is_gymnasium_id(name) and name not in diffsim.TASKS:
        raise ValueError(f"{name} is Gymnasium's alone; --physics gymnasium")
    env = diffsim.make(name, episodes, physics=physics, compile=False)
    if physics == "diffsim":
        ready = [n for n in compiled_batches(env.model) if n >= episodes]
        env = diffsim.make(name, ready[0]) if ready else env
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
    limit_violation (rad or m past a joint's stop), penetration (m of a geom into the ground), saturation (share of the
    actions beyond 95 % of their bound), and the qpos of environment 0 (T, nq). Of a Gymnasium environment: return,
    length and, where it runs on MuJoCo, qpos."""
    if isinstance(env, GymnasiumEnv):
        return _rollout_gymnasium(env, policy, episodes, seed)
    free = env.model.without_margins()
    env.reset(seed=seed)
    qpos, qvel = starts(env, episodes, seed)
    env.set_state(env.get_state() | dict(qpos=qpos, qvel=qvel))
    obs = env.detach()
    batch, m = env.num_envs, env.model.mj_model
    running = torch.ones(batch, dtype=torch.bool)
    total, length = torch.zeros(batch), torch.zeros(batch)
    violation, depth, saturated = torch.zeros(batch), torch.zeros(batch), torch.zeros(batch)
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
    values = dict(length=length, speed=(end - start) / (length * env.control_dt), saturation=saturated / length)
    values |= {"return": total, "limit_violation": violation, "penetration": depth}
    return {**{k: v[:episodes].numpy() for k, v in values.items()}, "qpos": np.stack(frames)}


def _rollout_gymnasium(env: GymnasiumEnv, policy, episodes: int, seed: int) -> dict[str, np.ndarray]:
    obs, _ = env.reset(seed=seed)
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


def record(env_name: str, policy_path, video: str, physics: str = "diffsim"):
    """Render one episode of a saved policy."""
    policy, _ = load_policy(policy_path)
    env = playback_env(env_name, 1, physics, policy_obs_dim(policy))
    qpos = rollout(env, policy, 1)["qpos"]
    render(env.model.mj_model, qpos, env.control_dt, str(video))


def main():
    args = tyro.cli(Args)
    try:
        if args.episodes < 1:
            raise ValueError(f"--episodes is {args.episodes}; it must be at least 1")
        if args.video:
            check_path(args.video)
        policy, name = load_policy(args.policy)
        physics = args.physics or ("gymnasium" if is_gymnasium_id(name) else "diffsim")
        wanted = policy_obs_dim(policy)
        env = playback_env(name, args.episodes, physics, wanted)
        given = env.single_observation_space.shape[0]
        if wanted != given:
            raise ValueError(f"the policy wants {wanted} observations, {name} on {physics} has {given}")
        result = rollout(env, policy, args.episodes, args.seed)
        print(f"{name} on {physics}, {args.episodes} episodes, deterministic policy")
        for key, unit in (
            ("return", ""), ("length", "steps"), ("speed", "m/s"), ("limit_violation", "rad"), ("penetration", "m"),
            ("saturation", ""),
        ):  # fmt: skip
            x = result.get(key)
            if x is None:
                continue
            print(f"{key:16s} {x.mean():10.3f} +- {x.std():.3f}   [{x.min():.3f}, {x.max():.3f}] {unit}")
        if args.video:
            if isinstance(env, GymnasiumEnv):
                robot = env.envs.envs[0].unwrapped
                if not len(result["qpos"]):
                    raise ValueError(f"{name} does not run on MuJoCo: no video")
                render(robot.model, result["qpos"], robot.dt, args.video)
            else:
                render(env.model.mj_model, result["qpos"], env.control_dt, args.video)
            print(f"wrote {args.video}")
    except ValueError as e:
        print(f"diffsim.play: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    main()
