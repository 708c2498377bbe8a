"""A batch of environments with gradients: a gymnasium VectorEnv on tensors, batch-first at its boundary.

The gradient contract:
- `step` is differentiable in the action and in everything that came before, until `detach()` cuts the graph;
- an environment whose episode ends starts a new one in the same step: `obs` is then the new episode's first
  observation and carries no gradient; `info["final_obs"]` is the last of the old one and does;
- actions are clipped to [-1, 1], with zero gradient outside, and scaled to the actuators' ctrlrange;
- a state that is no longer finite, or an action that is NaN, ends its own episode (reward 0), and no gradient flows
  through that step.
"""

import hashlib
import warnings
from functools import partial
from numbers import Integral

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from diffsim import memory
from diffsim.builder import SelfCollisionWarning, load_model
from diffsim.gymnasium_env import as_action
from diffsim.mjcf import label
from diffsim.model import Softness
from diffsim.mujoco_physics import MujocoPhysics
from diffsim.numpy_env import NumpyVectorEnv
from diffsim.physics import DiffsimPhysics
from diffsim.tasks import Task
from diffsim.tasks.check import check_methods, check_settings, reward_method, warn_of_typos

STATE = ("qpos", "qvel", "last_action", "episode_length", "episode_return", "episode_successes")  # of each copy
GENERATORS = {5056, 16}  # bytes of the states of a CPU's random generator and a GPU's
EXPLODED = 1e3  # m/s or rad/s: no robot here comes near it


class DiffEnv(gymnasium.vector.VectorEnv):
    """`num_envs` copies of a task. See diffsim.make for the arguments."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(
        self,
        task: Task,
        num_envs: int = 1,
        seed: int = 0,
        device: str = "cpu",
        physics: str = "diffsim",
        derivative: str = "diffsim",
        compile: bool = True,
        dtype: torch.dtype = torch.float32,
        softness: Softness | None = None,
    ):
        if not isinstance(task, Task):
            raise ValueError(f"task is {task!r}; it must be a diffsim.Task. diffsim.make finds one by its name")
        for name, value in (("physics", physics), ("derivative", derivative)):
            if value not in ("diffsim", "mujoco"):
                raise ValueError(f"{name} is {value!r}; it must be diffsim or mujoco")
        check_settings(task)
        warn_of_typos(task)
        self.task, self.num_envs = task, num_envs
        self.control_dt, self.substeps, self.max_episode_steps = task.control_dt, task.substeps, task.max_episode_steps
        timestep = task.control_dt / task.substeps
        with warnings.catch_warnings():
            if not task.warn_of_self_collision:
                warnings.simplefilter("ignore", SelfCollisionWarning)
            how = dict(device=device, dtype=dtype, timestep=timestep, softness=softness, collisions=task.collisions)
            try:
                self.model = load_model(task.xml, **how)
            except ValueError as e:
                raise type(e)(f"{type(task).__name__}: {e}") from None
        self.mj_model, self.device, self.dtype = self.model.mj_model, self.model.device, dtype
        memory.check(num_envs, 64 * (self.model.nq + self.model.nv) * dtype.itemsize, self.device)  # once they are made
        obs_dim = check_methods(task, self.model)  # before anything is compiled
        differentiable = partial(DiffsimPhysics, self.model, task.substeps, compile)
        if physics == "mujoco":
            differentiator = differentiable if derivative == "diffsim" else None
            self.physics = MujocoPhysics(self.model, task.substeps, differentiator, task.own_integrator)
        else:
            self.physics = differentiable()
        low, high = (t.clamp(-1e9, 1e9) for t in (self.model.ctrl_low, self.model.ctrl_high))
        free = low <= -1e9  # an actuator without ctrlrange takes the action itself
        if bool(free.any()):
            name = label(self.mj_model, "actuator", int(free.flatten().nonzero()[0]))
            warnings.warn(f"{name} has no ctrlrange: its control is the action, between -1 and 1", stacklevel=2)
        self._ctrl_mid = torch.where(free, 0.0, (low + high) / 2)
        self._ctrl_half = torch.where(free, 1.0, (high - low) / 2)
        self._generator = torch.Generator(device=self.device).manual_seed(seed)
        box = gymnasium.spaces.Box
        kind = np.float64 if dtype == torch.float64 else np.float32
        self.single_observation_space = box(-np.inf, np.inf, (obs_dim,), kind)
        self.single_action_space = box(-1.0, 1.0, (self.model.nu,), np.float32)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self._starts = [torch.zeros(n, 0, device=self.device, dtype=dtype) for n in (self.model.nq, self.model.nv)]
        self._start(*self._fresh(num_envs))
        self._told = False

    # --- episodes -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _fresh(self, count: int):
        """Initial states, drawn by the batch: a task's reset costs as much for one environment as for all."""
        if self._starts[0].shape[1] < count:
            drawn = self.task.reset(self.model, self.num_envs, self._generator)
            self._starts = [torch.cat(pair, 1) for pair in zip(self._starts, drawn)]
        taken, self._starts = ([x[:, s] for x in self._starts] for s in (slice(count), slice(count, None)))
        return taken

    def _start(self, qpos, qvel):
        self.qpos, self.qvel = qpos, qvel
        self.last_action = qpos.new_zeros(self.model.nu, self.num_envs)
        self.episode_length = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        self.episode_return, self.episode_successes = qpos.new_zeros(2, self.num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Start every episode anew: observation (B, obs_dim) without gradient.

        options: {"stagger": True} lets these first episodes begin at random times, so that they do not all end in
        the same step later on.
        """
        if seed is not None:
            if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
                raise ValueError(f"seed is {seed!r}; it must be an integer between 0 and 2^63 - 1")
            self._generator.manual_seed(int(seed))
        if options is not None and (not isinstance(options, dict) or options.keys() - {"stagger"}):
            raise ValueError(f'options is {options!r}; it must be {{"stagger": True}}, or nothing')
        self._starts = [x[:, :0] for x in self._starts]  # a task may have changed since they were drawn
        self._start(*self._fresh(self.num_envs))
        if (options or {}).get("stagger"):
            self.episode_length.random_(0, self.max_episode_steps, generator=self._generator)
        return self._observe(self.qpos, self.qvel, self.last_action), {}

    def _observe(self, qpos, qvel, action) -> Tensor:
        return self.task.observe(qpos, qvel, action).T

    def ctrl(self, action: Tensor) -> Tensor:
        """The actuators' controls (nu, B) of an action (nu, B) in [-1, 1]."""
        return self._ctrl_mid + self._ctrl_half * action

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """action (B, nu) -> obs (B, obs_dim), reward, terminated, truncated (B,), info.

        info: "final_obs" (B, obs_dim), before any reset; "episode" {"r", "l"}, of a task with goals "successes", too,
        with the mask "_episode", for episodes that ended in this step; "nonfinite" (B,), episodes ended because their
        state was not finite or a speed came to EXPLODED. Those have reward 0 and a new start's final_obs.
        """
        action = as_action(action, self.action_space.shape, self.device, self.dtype)
        action = torch.clamp(action, -1.0, 1.0).T  # (nu, B)
        ctrl = self.ctrl(action)
        qpos, qvel = self.physics.step(self.qpos, self.qvel, ctrl)
        self.episode_length = self.episode_length + 1

        q, v, u = (x.detach().abs().amax(0) for x in (qpos, qvel, action))  # NaN stays
        nonfinite = ~((q < torch.inf) & (v < EXPLODED) & (u <= 1))
        any_nonfinite = bool(nonfinite.any())
        if any_nonfinite:
            self._report(nonfinite, action=action, qpos=qpos, qvel=qvel)
            qpos, qvel, action = self._replace(nonfinite, qpos, qvel, action)
        reward = self.task.transition_reward(self.qpos, qpos, qvel, action)
        terminated = self.task.terminated(qpos, qvel)
        success = self.task.success(qpos, qvel)
        qpos, qvel = self.task.renew(qpos, qvel, self._generator)
        final_obs = self._observe(qpos, qvel, action)
        if any_nonfinite:
            reward, terminated = torch.where(nonfinite, 0.0, reward), terminated | nonfinite
        truncated = (self.episode_length >= self.max_episode_steps) & ~terminated
        self.episode_return = self.episode_return + reward.detach()
        if success is not None:
            self.episode_successes = self.episode_successes + torch.where(nonfinite, False, success)

        info = {"final_obs": final_obs, "nonfinite": nonfinite}
        done, obs = terminated | truncated, final_obs
        if bool(done.any()):
            info["episode"] = {"r": self.episode_return, "l": self.episode_length}
            if success is not None:
                info["episode"]["successes"] = self.episode_successes
                self.episode_successes = torch.where(done, 0.0, self.episode_successes)
            info["_episode"] = done
            qpos, qvel, action = self._replace(done, qpos, qvel, action)
            obs = torch.where(done[:, None], self._observe(qpos, qvel, action).detach(), final_obs)
            self.episode_return = torch.where(done, 0.0, self.episode_return)
            self.episode_length = torch.where(done, 0, self.episode_length)
        self.qpos, self.qvel, self.last_action = qpos, qvel, action
        return obs, reward, terminated, truncated, info

    def _replace(self, mask, qpos, qvel, action):
        """New episodes where mask says; torch.where keeps the other environments' graph."""
        fresh_qpos, fresh_qvel = torch.zeros_like(qpos), torch.zeros_like(qvel)
        index = mask.nonzero().squeeze(1)
        fresh_qpos[:, index], fresh_qvel[:, index] = self._fresh(len(index))
        return torch.where(mask, fresh_qpos, qpos), torch.where(mask, fresh_qvel, qvel), torch.where(mask, 0.0, action)

    def _report(self, nonfinite, **state):
        i = int(nonfinite.nonzero()[0])
        bad = [name for name, x in state.items() if not torch.isfinite(x[:, i]).all()]
        why = (
            f"{bad[0]} of environment {i} is not finite" if bad else f"a speed of environment {i} came to {EXPLODED:g}"
        )
        when = f"at step {int(self.episode_length[i])} of its episode"
        if not self._told:  # of the first; a run's column nonfinite_states counts them all
            warnings.warn(f"{int(nonfinite.sum())} environment(s) ended: {why} {when}", stacklevel=3)
        self._told = True

    # --- the graph and the state ----------------------------------------------------------------------------
    def detach(self) -> Tensor:
        """Cut the graph, as at the start of a window; returns the current observation without gradient."""
        self.qpos, self.qvel, self.last_action = self.qpos.detach(), self.qvel.detach(), self.last_action.detach()
        return self._observe(self.qpos, self.qvel, self.last_action)

    def check_gradient(self, steps: int):
        """Warn where the reward of the next `steps` steps has no gradient in the actions by way of the physics, or none
        that is finite. A cost of the actions themselves does not count. The state stays as it is.

        Raises ValueError, one line, for a method of the task that fails on tensors that carry a gradient, or
        where neither reward nor observation has one.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1")
        check_methods(self.task, self.model, differentiable=True)
        name = f"{type(self.task).__name__}.{reward_method(self.task)}"
        generator, shape = torch.Generator(device=self.device).manual_seed(0), (steps, self.model.nu, self.num_envs)
        actions = torch.rand(shape, generator=generator, device=self.device, dtype=self.dtype) - 0.5
        actions.requires_grad_()
        qpos, qvel = self.qpos.detach(), self.qvel.detach()
        for action in actions:
            before = qpos
            qpos, qvel = self.physics.step(qpos, qvel, self.ctrl(action))
            reward = self.task.transition_reward(before, qpos, qvel, action.detach())
            if reward.requires_grad:
                (gradient,) = torch.autograd.grad(reward.sum(), actions, retain_graph=True, allow_unused=True)
                if gradient is not None and gradient.any():
                    break
        else:
            live = self._observe(qpos, qvel, action), self.task.transition_reward(before, qpos, qvel, action)
            if not any(x.requires_grad for x in live):
                raise ValueError(f"neither {name} nor the observation has a gradient; ppo_baseline.py needs none")
            warnings.warn(
                f"no gradient of {name} reaches the actions through {steps} steps of physics: only the critic's does. "
                "A detach, a comparison, .item()? (ppo_baseline.py needs none)",
                stacklevel=2,
            )
            return
        if bad := int((~torch.isfinite(gradient)).any(0).any(0).sum()):
            warnings.warn(
                f"the gradient of {name} in the actions is not finite in {bad} of {self.num_envs} environments. "
                "A sqrt or norm at 0, an acos at 1, a division by 0?",
                stacklevel=2,
            )

    def numpy(self) -> gymnasium.vector.VectorEnv:
        """This environment on NumPy arrays, detached, for third-party code."""
        return NumpyVectorEnv(self)

    def diagnostics(self) -> dict[str, float]:
        """What the engine has to say of its last step, by TensorBoard tag: the mismatch of MuJoCo and diffsim."""
        if (mismatch := getattr(self.physics, "mismatch", None)) is None:
            return {}
        return {"physics/mismatch_joint": mismatch.joint_angle(), "physics/mismatch_base": mismatch.base_velocity()}

    def get_state(self) -> dict[str, Tensor]:
        """Everything that decides the future: physics, counters, random generator."""
        state = {n: getattr(self, n).detach().clone() for n in STATE}
        state |= dict(start_qpos=self._starts[0].clone(), start_qvel=self._starts[1].clone())
        return {**state, "generator": self._generator.get_state()}

    def set_state(self, state: dict[str, Tensor]):
        """Continue from a `get_state` of an environment with as many copies of the same robot.

        Raises ValueError, one line, for all else. Tensors may be of another precision or device.
        """
        before = self.get_state()
        if differ := before.keys() ^ (state.keys() if isinstance(state, dict) else set()):
            raise ValueError(f"state lacks or has further keys ({', '.join(sorted(differ))}): none of get_state")
        for name, own in before.items():
            if not isinstance(state[name], Tensor) or state[name].layout != own.layout:
                raise ValueError(f"state has {name} as {type(state[name]).__name__}, it must be a dense tensor")
            rows = slice(1 if name.startswith("start_") else None)  # there are as many starts as are left
            if name == "generator" and {own.numel(), state[name].numel()} == GENERATORS:
                continue
            if state[name].shape[rows] != own.shape[rows] or state[name].ndim != own.ndim:
                raise ValueError(f"state has {name} {tuple(state[name].shape)}, this environment {tuple(own.shape)}")
        if state["generator"].dtype != torch.uint8:
            raise ValueError(f"state has a generator of {state['generator'].dtype}, it must be torch.uint8")
        for name in STATE:
            setattr(self, name, state[name].to(before[name]).clone())
        self._starts = [state[n].to(self.qpos.detach()).clone() for n in ("start_qpos", "start_qvel")]
        generator = state["generator"].cpu()
        if len(generator) == len(before["generator"]):
            self._generator.set_state(generator)
        else:  # of a CPU, and this one a GPU's, or the other way: a stream of its own goes on
            self._generator.manual_seed(int.from_bytes(hashlib.sha256(generator.numpy()).digest()[:7], "big"))

    state_dict, load_state_dict = get_state, set_state
