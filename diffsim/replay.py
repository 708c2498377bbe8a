"""What environments did, kept to be sampled."""

import torch


class ReplayBuffer:
    """The latest `capacity` steps of N environments, in order. Terminated and truncated are kept apart."""

    def __init__(self, capacity: int, num_envs: int):
        self.capacity, self.num_envs, self.count = max(1, capacity // num_envs), num_envs, 0
        self.data: dict[str, torch.Tensor] = {}

    def __len__(self):
        """Steps of each environment that are held."""
        return min(self.count, self.capacity)

    def add(self, **step):
        """One step of every environment, each (N, ...)."""
        for k, x in step.items():
            if k not in self.data:
                self.data[k] = x.new_zeros(self.capacity, *x.shape)
            self.data[k][self.count % self.capacity] = x
        self.count += 1

    def sample(self, size: int, length: int = 1, recent: int | None = None) -> dict[str, torch.Tensor]:
        """Segments of `length` successive steps, (length, size, ...), among the `recent` latest environment steps."""
        held = len(self) if recent is None else min(len(self), max(recent // self.num_envs, length))
        start = self.count - held + torch.randint(held - length + 1, (size,))
        index = (start + torch.arange(length)[:, None]) % self.capacity
        env = torch.randint(self.num_envs, (size,)).expand(length, size)
        return {k: x[index, env] for k, x in self.data.items()}

    def state_dict(self):
        return dict(count=self.count, data={k: x[: len(self)].clone() for k, x in self.data.items()})

    def load_state_dict(self, state):
        self.count = state["count"]
        for k, x in state["data"].items():
            self.data[k] = x.new_zeros(self.capacity, *x.shape[1:])
            self.data[k][: len(x)] = x
