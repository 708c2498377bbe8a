"""python -m diffsim: the environments."""

import sys

import diffsim
from diffsim.flags import fail
from diffsim.program import start

if __name__ == "__main__":
    start()
    if sys.argv[1:]:
        fail(f"{sys.argv[1]}: python -m diffsim lists the environments, and takes no arguments")
    print(f"{'env':14s} {'obs':>4s} {'act':>4s} {'control step':>13s} {'substeps':>9s} {'episode':>8s}  physics   task")
    for name, task in diffsim.TASKS.items():
        env = diffsim.make(name, compile=False)
        obs, act = env.single_observation_space.shape[0], env.single_action_space.shape[0]
        step = f"1/{1 / env.control_dt:.0f} s"
        numbers = f"{obs:4d} {act:4d} {step:>13s} {env.substeps:9d} {env.max_episode_steps:8d}"
        print(f"{name:14s} {numbers}  {task.physics:9s} {task.__doc__ or ''}")
