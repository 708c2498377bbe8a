"""Any Gymnasium environment behind DiffEnv's interface: tensors in and out, no gradients."""

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RescaleAction
from torch import Tensor

from diffsim import memory
from diffsim.mjcf import quiet_mujoco


def is_gymnasium_id(name: str) -> bool:
    """Whether `name` is an environment registered with Gymnasium itself, such as "Hopper-v5"."""
    return name in gymnasium.registry and not name.startswith("diffsim/")


def as_action(action, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """What a caller steps with as a tensor of that shape, its graph kept. Raises ValueError, one line."""
    try:
        action = torch.as_tensor(action, device=device, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"action is a {type(action).__name__}, expected numbers of shape {shape}") from None
    if action.shape != shape:
        raise ValueError(f"action has shape {tuple(action.shape)}, expected {shape}")
    return action


class GymnasiumEnv:
    """`num_envs` copies of `gymnasium.make(name, **kwargs)` with Box spaces, reset in the step that ends an episode.

    Actions are clipped to the action space, which `unit_actions` makes [-1, 1], as a twin's is. `info` is that of
    `DiffEnv.step`. `with_gradient` names what an error tells those to use who need a gradient. Raises ValueError, one
    line, for an environment that cannot be made or has other spaces.
    """

    with_gradient: str | None = None
    metadata, spec = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}, None  # as gymnasium.make_vec asks
    unwrapped = property(lambda self: self)

    def __init__(self, name: str, num_envs: int = 1, seed: int = 0, unit_actions: bool = False, **kwargs):
        memory.check(num_envs, 100_000)

        def make():
            env = gymnasium.make(name, **kwargs)
            return RescaleAction(env, np.float32(-1), np.float32(1)) if unit_actions else env

        try:
            with quiet_mujoco():  # what is deprecated in its files is Gymnasium's business
                self.envs = SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        except (gymnasium.error.Error, ImportError) as e:
            raise ValueError(f"env '{name}': Gymnasium cannot make it: {' '.join(str(e).split())}") from None
        self.single_observation_space = self.envs.single_observation_space
        self.single_action_space = self.envs.single_action_space
        for space in (self.single_observation_space, self.single_action_space):
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
                raise ValueError(f"env '{name}' has the space {space}; vectors of numbers (Box) are supported")
        self.name, self.num_envs, self.seed = name, num_envs, seed
        self.device = torch.device("cpu")
        first = self.envs.envs[0]
        self.max_episode_steps = first.spec.max_episode_steps
        if self.max_episode_steps is None:
            raise ValueError(f"env '{name}' has no time limit: gymnasium.register it with max_episode_steps")
        robot = getattr(first.unwrapped, "model", None)
        self.mj_model = robot if isinstance(robot, mujoco.MjModel) else None  # None: cannot be drawn
        self.control_dt = getattr(first.unwrapped, "dt", None)
        self._start()

    def _start(self):
        self.episode_return = np.zeros(self.num_envs)
        self.episode_length = np.zeros(self.num_envs, np.int64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Start every episode anew: observation (B, obs_dim), float32. Options are diffsim's, and mean nothing here."""
        obs, _ = self.envs.reset(seed=seed if seed is not None else self.seed)
        self.seed = None  # later resets go on with the environments' own random numbers
        self._start()
        self.obs = torch.from_numpy(obs.astype(np.float32))
        return self.obs, {}

    def detach(self) -> Tensor:
        """The current observation."""
        return self.obs

    def state_dict(self) -> dict:
        """Nothing: what a Gymnasium environment remembers cannot be read."""
        return {}

    def load_state_dict(self, state: dict):
        print(f"{self.name} cannot be saved: its episodes start anew, everything else goes on")
        self.reset()

    def check_gradient(self, steps: int):
        instead = f"{self.with_gradient}, " * bool(self.with_gradient) + "ppo_baseline.py or rp_pgm_mb.py"
        raise ValueError(f"{self.name} on physics gymnasium has no gradient: use {instead}")

    def close(self):
        self.envs.close()

    def diagnostics(self) -> dict[str, float]:
        return {}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """action (B, act_dim) -> obs (B, obs_dim), reward, terminated, truncated (B,), info."""
        space = self.single_action_space
        action = as_action(action, self.envs.action_space.shape, self.device, torch.float32)
        obs, reward, terminated, truncated, infos = self.envs.step(
            np.clip(action.detach().numpy(), space.low, space.high).astype(space.dtype)
        )
        self.episode_return += reward
        self.episode_length += 1
        done = terminated | truncated
        final_obs = obs
        info = {}
        if done.any():
            final_obs = obs.copy()
            final_obs[done] = np.stack(infos["final_obs"][done])
            info["_episode"] = torch.from_numpy(done)
            info["episode"] = {
                "r": torch.from_numpy(self.episode_return.astype(np.float32)),
                "l": torch.from_numpy(self.episode_length.copy()),
            }
            self.episode_return = np.where(done, 0.0, self.episode_return)
            self.episode_length = np.where(done, 0, self.episode_length)
        info["final_obs"] = torch.from_numpy(final_obs.astype(np.float32))
        self.obs = torch.from_numpy(obs.astype(np.float32))
        ends = torch.from_numpy(terminated), torch.from_numpy(truncated)
        return self.obs, torch.from_numpy(reward.astype(np.float32)), *ends, info
