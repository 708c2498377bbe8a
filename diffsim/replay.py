"""What environments did, kept to be sampled, and roll-outs in a model of them."""

import torch


class ReplayBuffer:
    """The latest `capacity` steps of N environments, in order. Terminated and truncated are kept apart."""

    def __init__(self, capacity: int, num_envs: int, device: torch.device | str = "cpu"):
        self.capacity, self.num_envs, self.count, self.device = max(1, capacity // num_envs), num_envs, 0, device
        self.data: dict[str, torch.Tensor] = {}
        self.ended: list[int] = []  # terminated steps: number of the step * num_envs + environment

    def __len__(self):
        """Steps of each environment that are held."""
        return min(self.count, self.capacity)

    def add(self, **step):
        """One step of every environment, each (N, ...)."""
        for k, x in step.items():
            if k not in self.data:
                self.data[k] = x.new_zeros(self.capacity, *x.shape)
            self.data[k][self.count % self.capacity] = x
        self.ended += (self.count * self.num_envs + step["terminated"].nonzero().flatten()).tolist()
        self.count += 1
        while self.ended and self.ended[0] < (self.count - len(self)) * self.num_envs:
            self.ended.pop(0)

    def sample(self, size: int, length: int = 1, recent: int | None = None) -> dict[str, torch.Tensor]:
        """Segments of `length` successive steps, (length, size, ...), among the `recent` latest environment steps."""
        held = len(self) if recent is None else min(len(self), max(recent // self.num_envs, length))
        start = self.count - held + torch.randint(held - length + 1, (size,))
        index = ((start + torch.arange(length)[:, None]) % self.capacity).to(self.device)
        env = torch.randint(self.num_envs, (size,)).to(self.device).expand(length, size)
        return {k: x[index, env] for k, x in self.data.items()}

    def ends(self, size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A sample of the terminated steps, (size, ...), and their share of all that are held.

        While there are none it is a sample of all, of share 0.
        """
        share = torch.tensor(len(self.ended) / (len(self) * self.num_envs))
        if not self.ended:
            return {k: x[0] for k, x in self.sample(size).items()}, share
        chosen = torch.tensor([self.ended[i] for i in torch.randint(len(self.ended), (size,)).tolist()]).to(self.device)
        index = chosen // self.num_envs % self.capacity, chosen % self.num_envs
        return {k: x[index] for k, x in self.data.items()}, share

    def state_dict(self):
        return dict(count=self.count, data={k: x[: len(self)].clone() for k, x in self.data.items()})

    def load_state_dict(self, state):
        self.count = state["count"]
        for k, x in state["data"].items():
            self.data[k] = x.new_zeros(self.capacity, *x.shape[1:], device=self.device)
            self.data[k][: len(x)] = x
        if self.data:  # else nothing was stored yet
            order = self.count - len(self) + torch.arange(len(self))
            ended = self.data["terminated"][order % self.capacity].cpu()
            self.ended = (order[:, None] * self.num_envs + torch.arange(self.num_envs))[ended].tolist()


def is_quiet(begun: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    """Whether the episodes of N environments that began at these iterations, (N,), are among a share of all.

    By a hash of both (xor, shift and multiply, twice), so that nothing has to be kept for --resume. Multiples of an
    irrational number would be spread more evenly, and yet stay on one side for many episodes of equal length.
    """
    x = begun.long() * len(begun) + torch.arange(len(begun), device=begun.device)
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return ((x >> 16) ^ x) / 2**32 < share


class Rollouts:
    """Roll-outs in a learned model, `size` of them, each of which begins anew after `length` steps or at an end.

    Those that `step` advances are chosen at random: with `size` larger than a batch, successive batches differ.
    """

    def __init__(self, size: int, length: int, obs: torch.Tensor):
        """obs (N, obs_dim): like the states to come."""
        self.length, self.obs = length, obs.new_zeros(size, obs.shape[1])
        self.age = torch.full((size,), length, device=obs.device)

    def step(self, model, starts: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step of as many as there are starts (B, obs_dim), where those that are over begin: what `model`, a
        function of states (B, obs_dim), says of it, `final_obs` and the probability `goes_on` (B,) among it."""
        index = torch.randperm(len(self.age), device=starts.device)[: len(starts)]
        over = self.age[index] >= self.length
        step = model(torch.where(over[:, None], starts, self.obs[index]))
        ended = torch.rand_like(step["goes_on"]) > step["goes_on"]
        self.obs[index] = step["final_obs"]
        self.age[index] = torch.where(ended, self.length, torch.where(over, 0, self.age[index]) + 1)
        return step

    def state_dict(self):
        return dict(obs=self.obs, age=self.age)

    def load_state_dict(self, state):
        self.obs.copy_(state["obs"])
        self.age.copy_(state["age"])
