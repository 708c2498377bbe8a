"""An algorithm that knows nothing of diffsim on one of its environments: Stable-Baselines3's PPO on the array view.

    pip install stable-baselines3 && python benchmarks/third_party.py

Prints the mean return of 20 episodes before and after training.
"""

import sys
from pathlib import Path

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

sys.path.insert(0, str(Path(__file__).parents[1]))
import diffsim  # noqa: E402, F401  (registers the environments)

if __name__ == "__main__":
    torch.set_num_threads(1)
    env = Monitor(gymnasium.make("diffsim/hopper", compile=True))
    model = PPO("MlpPolicy", env, n_steps=1024, batch_size=128, seed=1, device="cpu")
    print(f"before: {evaluate_policy(model, env, 20)[0]:.0f}", flush=True)
    model.learn(50_000)
    print(f"after 50,000 steps: {evaluate_policy(model, env, 20)[0]:.0f}")
