"""NumPy views of an environment, for code that knows nothing of tensors or gradients: detached copies in and out."""

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from diffsim.gymnasium_env import as_action


def _array(x) -> np.ndarray:
    return x.detach().cpu().numpy().copy()


class NumpyVectorEnv(gymnasium.vector.VectorEnv):
    """A DiffEnv as an ordinary Gymnasium vector environment on arrays (autoreset SAME_STEP): `env.numpy()`.

    `info` has "final_obs" and "final_info" {"episode": {"r", "l"}} with their masks, as Gymnasium's own vector
    environments have them. No graph is built.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, env):
        self.env, self.num_envs = env, env.num_envs
        for name in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
            setattr(self, name, getattr(env, name))

    def reset(self, *, seed=None, options=None):
        """Observation (B, obs_dim)."""
        obs, _ = self.env.reset(seed=seed, options=options)
        return _array(obs), {}

    @torch.no_grad()
    def step(self, action: np.ndarray):
        """action (B, nu) -> obs (B, obs_dim), reward, terminated, truncated (B,), info."""
        obs, reward, terminated, truncated, tensors = self.env.step(action)
        info = {}
        if "episode" in tensors:
            mask = _array(tensors["_episode"])
            episode = {k: _array(v) for k, v in tensors["episode"].items()}
            info = {"final_obs": _array(tensors["final_obs"]), "_final_obs": mask, "_final_info": mask}
            info["final_info"] = {"episode": episode, "_episode": mask}
        return _array(obs), _array(reward), _array(terminated), _array(truncated), info


class NumpyEnv(gymnasium.Env):
    """One environment on arrays, as `gymnasium.make("diffsim/hopper")` returns it; resets only when told to."""

    metadata = {"render_modes": []}

    def __init__(self, env):
        if env.num_envs != 1:
            raise ValueError(f"a single environment is wanted, this one has {env.num_envs}; use env.numpy()")
        self.env = env
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space

    def reset(self, *, seed=None, options=None):
        """Observation (obs_dim,)."""
        super().reset(seed=seed)
        obs, _ = self.env.reset(seed=seed, options=options)
        return _array(obs[0]), {}

    @torch.no_grad()
    def step(self, action: np.ndarray):
        """action (nu,) -> obs (obs_dim,), reward, terminated, truncated, info."""
        action = as_action(action, self.action_space.shape, "cpu", torch.float32)[None]
        _, reward, terminated, truncated, info = self.env.step(action)
        return _array(info["final_obs"][0]), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}
