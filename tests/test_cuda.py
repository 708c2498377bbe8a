"""What a GPU computes, beside what a CPU does; skipped where there is none."""

import pytest
import torch

import diffsim
from diffsim import physics
from tests import SCRIPTS, WINDOWS, play, rows, run_script, the_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
SMALL = "--num-envs 4 --horizon 2 --critic-epochs 1 --eval-every 0 --eval-episodes 2".split()


def small(script, folder, *flags, env="cartpole"):
    if script == "rp_pgm_mb.py":
        sizes = "--num-envs 1 --learning-starts 8 --batch-size 8 --total-timesteps 16 --eval-every 0 --eval-episodes 2"
        return ["--env", env, "--run-dir", folder, *sizes.split(), *flags]
    sizes = SMALL if script in WINDOWS else "--num-envs 4 --num-steps 2 --eval-every 0 --eval-episodes 2".split()
    return ["--env", env, "--run-dir", folder, *sizes, "--total-timesteps", "32", *flags]


def window(env, state, actions):
    """Of four steps: the last state, the sum of the rewards, its gradient in the actions."""
    env.reset()
    env.set_state(state)
    actions = actions.to(env.device).requires_grad_()
    total = sum(env.step(action)[1].sum() for action in actions)
    total.backward()
    return [x.detach().cpu() for x in (env.qpos, env.qvel, total, actions.grad)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("task", ["cartpole", "hopper", "ant", "hand"])
def test_a_window_and_its_gradient_are_the_cpus(task, compiled):
    """In double precision, where the two differ by rounding alone."""
    make = dict(num_envs=70, dtype=torch.float64)
    cpu = diffsim.make(task, **make)
    cpu.reset()
    state, actions = cpu.get_state(), torch.rand(4, 70, cpu.model.nu, dtype=torch.float64) - 0.5
    gpu = diffsim.make(task, device="cuda", compile=compiled, **make)
    assert isinstance(gpu.physics.engine, physics.Compiled) == compiled
    for x, y in zip(window(gpu, state, actions), window(cpu, state, actions)):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


def test_mujocos_physics_with_the_gpus_gradient():
    make = dict(num_envs=6, dtype=torch.float64, physics="mujoco")
    cpu, gpu = (diffsim.make("hopper", device=device, **make) for device in ("cpu", "cuda"))
    cpu.reset()
    state, actions = cpu.get_state(), torch.rand(4, 6, 3, dtype=torch.float64) - 0.5
    for x, y in zip(window(gpu, state, actions), window(cpu, state, actions)):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_trains_resumes_and_its_policy_plays_on_the_cpu(script, tmp_path):
    run_script(script, *small(script, tmp_path / "whole", "--device", "cuda"))
    stop = 2 if script != "rp_pgm_mb.py" else 12
    run_script(script, *small(script, tmp_path / "half", "--device", "cuda", "--stop-after", stop))
    half = the_run(tmp_path / "half")
    run_script(script, "--resume", half)
    a, b = (rows(tmp_path / x) for x in ("whole", "half"))
    for key in a[-1]:
        assert float(a[-1][key] or 0) == pytest.approx(float(b[-1][key] or 0), rel=1e-3, abs=1e-3), key
    obs = torch.zeros(2, 5)
    assert torch.export.load(half / "policy.pt2").module()(obs).device == obs.device
    assert "2 episodes" in play(half, "--episodes", 2).stdout


@pytest.mark.parametrize("first, then", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_the_other_device(first, then, tmp_path):
    run_script("shac.py", *small("shac.py", tmp_path, "--stop-after", 2, "--device", first))
    run_script("shac.py", "--resume", the_run(tmp_path), "--device", then)
    assert len(rows(tmp_path)) == 4


def test_more_environments_than_fit_are_refused():
    with pytest.raises(ValueError, match="GiB of memory"):
        diffsim.make("ant", 10**9, device="cuda")
