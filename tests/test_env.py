"""The gradient contract: gradients of whole windows, resets, bad states, MuJoCo's engine behind the same task."""

import ctypes
import math
import subprocess
import warnings

import gymnasium
import numpy as np
import pytest
import torch

import diffsim
from diffsim import codegen, physics
from diffsim.dynamics import Eager, contact_points
from diffsim.tasks.base import uniform

KW = dict(compile=False)


def window_return(env, state, actions):
    env.set_state(state)
    total = 0.0
    for action in actions:
        _, reward, *_ = env.step(action)
        total = total + reward
    return total  # (B,)


@pytest.fixture(scope="module")
def standing():
    """An ant that has come down on its feet: its state, actions (32, 1, 8), and the gradient of their return."""
    env = diffsim.make("ant", 1, seed=3, dtype=torch.float64, **KW)
    env.reset()
    with torch.no_grad():
        for _ in range(30):
            env.step(torch.zeros(1, 8, dtype=torch.float64))
    state = env.get_state()
    generator = torch.Generator().manual_seed(0)
    actions = (torch.rand(32, 1, 8, dtype=torch.float64, generator=generator) - 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(window_return(env, state, actions).sum(), actions)
    assert env.episode_length[0] == 62  # no reset on the way
    force = diffsim.contact_force(env.model, env.qpos.detach(), env.qvel.detach())
    assert float(force[2].sum()) > 0.1
    return state, actions.detach(), gradient


def test_return_of_32_control_steps_against_central_differences(standing):
    state, actions, gradient = standing
    directions = torch.randn(3, *actions.shape, dtype=torch.float64)
    eps = 1e-6
    moved = torch.cat([actions + s * eps * d for s in (1, -1) for d in directions], 1)  # six ants at once
    env = diffsim.make("ant", 6, dtype=torch.float64, **KW)
    six = {k: v if k == "generator" else v.repeat_interleave(6, -1) for k, v in state.items()}
    with torch.no_grad():
        up, down = window_return(env, six, moved).view(2, 3)
    numeric = (up - down) / (2 * eps)
    torch.testing.assert_close((gradient * directions).sum((1, 2, 3)), numeric, rtol=1e-5, atol=0)


def test_float32_gradient_points_where_float64_does(standing):
    state, actions, gradient = standing
    env = diffsim.make("ant", 1, **KW)
    cast = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    a = actions.float().requires_grad_()
    (ours,) = torch.autograd.grad(window_return(env, cast, a).sum(), a)
    assert float(torch.cosine_similarity(ours.double().flatten(), gradient.flatten(), dim=0)) > 0.999


def test_reset_cuts_the_gradient_and_final_obs_carries_it():
    env = diffsim.make("ant", 2, **KW)
    env.reset()
    env.qpos[2, 0], env.qvel[2, 0] = 0.26, -1.0  # falls at once
    env.qpos[3:7, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # on its back: no feet in the ground push it up
    action = torch.zeros(2, 8, requires_grad=True)
    obs, reward, terminated, truncated, info = env.step(action)
    assert terminated.tolist() == [True, False] and truncated.tolist() == [False, False]
    assert info["_episode"].tolist() == [True, False] and env.episode_length.tolist() == [0, 1]
    assert float(obs[0, 0].detach()) > 0.5 > float(info["final_obs"][0, 0].detach())
    assert torch.autograd.grad(obs[0].sum(), action, retain_graph=True)[0].abs().sum() == 0
    assert torch.autograd.grad(info["final_obs"][0].sum(), action, retain_graph=True)[0][0].abs().sum() > 0
    assert torch.autograd.grad(obs[1].sum(), action)[0][1].abs().sum() > 0


def test_time_limit_truncates_and_does_not_terminate():
    env = diffsim.make("ant", 2, **KW)
    env.reset()
    env.episode_length[0] = env.max_episode_steps - 1
    _, _, terminated, truncated, _ = env.step(torch.zeros(2, 8))
    assert truncated.tolist() == [True, False] and not terminated.any()


@pytest.mark.parametrize("name", ["qpos", "qvel"])
def test_a_nonfinite_state_ends_its_own_episode_only(name):
    gradients = []
    for planted in (False, True):
        env = diffsim.make("ant", 3, seed=5, **KW)
        env.reset()
        action = torch.full((3, 8), 0.3, requires_grad=True)
        env.step(action)
        env.detach()
        if planted:
            getattr(env, name)[8 if name == "qpos" else 7, 1] = float("nan")
            with pytest.warns(UserWarning, match=r"environment 1 is not finite"):
                obs, reward, terminated, _, info = env.step(action)
            assert terminated.tolist() == [False, True, False] == info["nonfinite"].tolist()
            assert reward[1] == 0 and torch.isfinite(obs).all()
        else:
            obs, reward, *_ = env.step(action)
        rest = env.step(action)[1]
        gradients.append(torch.autograd.grad((reward + rest)[[0, 2]].sum(), action)[0])
        assert torch.isfinite(gradients[-1]).all()
    assert torch.equal(gradients[0][[0, 2]], gradients[1][[0, 2]])


@pytest.mark.parametrize("physics", ["diffsim", "mujoco"])
def test_an_action_that_is_nan_ends_its_own_episode_only(physics, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    env = diffsim.make("cartpole", 2, physics=physics, compile=False)
    env.reset()
    action = torch.tensor([[torch.nan], [0.5]], requires_grad=True)
    with pytest.warns(UserWarning, match="1 environment.* ended: action of environment 0"):
        obs, reward, terminated, _, info = env.step(action)
    assert terminated.tolist() == info["nonfinite"].tolist() == [True, False] and reward[0] == 0
    reward.sum().backward()
    assert torch.isfinite(obs).all() and action.grad[0] == 0 and action.grad[1] != 0
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())  # MuJoCo would print and log


def test_actions_seeds_and_states_of_other_kinds():
    """Lists, NumPy's integers, float64: as the same numbers in tensors."""
    env = diffsim.make("cartpole", np.int64(2), seed=np.uint8(3), compile=False)
    env.reset(seed=np.uint64(3))
    state = env.get_state()
    double = {k: x.double() if x.is_floating_point() else x for k, x in state.items()}
    seen = []
    for action in ([[0.5], [0]], np.array([[0.5], [0.0]]), torch.tensor([[0.5], [0.0]], dtype=torch.float64)):
        env.set_state(double)
        seen.append(env.step(action)[0])
        assert env.qpos.dtype == torch.float32 and torch.equal(seen[0], seen[-1])
    pendulum = diffsim.make("Pendulum-v1", np.int64(2), seed=np.int64(3))
    pendulum.reset()
    pendulum.step([[0.5], [0]])
    pendulum.close()


def test_actions_outside_the_box_get_no_gradient():
    env = diffsim.make("ant", 1, **KW)
    env.reset()
    action = torch.full((1, 8), 2.0, requires_grad=True)
    assert torch.autograd.grad(env.step(action)[1].sum(), action)[0].abs().sum() == 0


def test_same_seed_same_bits_and_state_round_trip():
    def run(seed, state=None):
        env = diffsim.make("ant", 4, seed=seed, **KW)
        obs, _ = env.reset()
        if state:
            env.set_state(state)
        for _ in range(5):
            obs, *_ = env.step(torch.full((4, 8), 0.5))
        return obs, env.get_state()

    (a, state), (b, _), (c, _) = run(1), run(1), run(2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    (d, _), (e, _) = run(1, state), run(9, state)
    assert torch.equal(d, e)


def test_a_gpus_state_goes_on_on_a_cpu():
    env = diffsim.make("cartpole", 2, compile=False)
    env.reset()
    of_gpu = {**env.get_state(), "generator": torch.arange(16, dtype=torch.uint8)}  # seed and offset
    seen = []
    for change in (0, 0, 1):
        env.set_state({**of_gpu, "generator": of_gpu["generator"] + change})
        seen.append(env.reset()[0])
    assert seen[0].equal(seen[1]) and not seen[0].equal(seen[2])


def test_staggered_starts_are_drawn_from_the_environments_generator():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(7)
        env = diffsim.make("cartpole", 64, seed=seed, **KW)
        env.reset(options=dict(stagger=True))
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(7))  # torch's own is left alone
        drawn.append(env.episode_length.clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert 0 <= drawn[0].min() < 6 and 15 < drawn[0].max() < env.max_episode_steps
    env.reset()
    assert not env.episode_length.any()
    again = []
    for _ in range(2):  # a seed decides them, too
        env.reset(seed=5, options=dict(stagger=True))
        again.append(env.episode_length.clone())
    assert torch.equal(*again)


def test_mujoco_physics_is_mujocos_step_and_the_same_task():
    import mujoco

    env = diffsim.make("ant", 3, seed=2, physics="mujoco")
    env.reset()
    before = env.get_state()
    action = torch.rand(3, 8) * 2 - 1
    obs, reward, *_ = env.step(action)
    m = env.physics.mj_model
    for b in range(3):
        d = mujoco.MjData(m)
        d.qpos[:], d.qvel[:], d.ctrl[:] = before["qpos"][:, b], before["qvel"][:, b], action[b]
        mujoco.mj_step(m, d, nstep=env.substeps)
        np.testing.assert_allclose(env.qpos[:, b], d.qpos, atol=1e-5)
        np.testing.assert_allclose(env.qvel[:, b], d.qvel, atol=1e-4)
    soft = diffsim.make("ant", 3, **KW)
    soft.set_state(env.get_state())
    torch.testing.assert_close(soft.detach(), obs)
    assert env.substeps == soft.substeps and env.model.timestep == soft.model.timestep


def test_copies_that_are_not_seeded_differ():
    env = gymnasium.make_vec("diffsim/hopper", num_envs=2, vectorization_mode="sync")
    assert not np.array_equal(*env.reset()[0])


def test_gymnasium_make_vec():
    env = gymnasium.make_vec("diffsim/ant", num_envs=2, compile=False)
    obs, _ = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape == (2, 37) and env.action_space.shape == (2, 8)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(task="anT"), "unknown env 'anT'; did you mean ant. There is cartpole"),
        (dict(task="ant", num_envs=0), "num_envs is 0"),
        (dict(task="ant", physics="bullet"), "unknown physics 'bullet'; there is diffsim, mujoco, gymnasium"),
        (dict(task="ant", physics="gymnasium"), "ant is no Gymnasium environment"),
        (dict(task="Pendulum-v1", physics="mujoco"), "Pendulum-v1 is Gymnasium's alone"),
        (dict(task="Pendulum-v1", device="meta"), "run on the cpu, not on meta"),
        (dict(task="ant", device="tpu9"), "unknown device"),
        *[(dict(task="ant", num_envs=n), "num_envs is .*; it must be an integer") for n in (-1, 1.5, "3", True, 2**60)],
        *[(dict(task="ant", seed=n), "seed is .*; it must be an integer") for n in (-1, 0.5, None, 2**32)],
        *[
            (dict(task="ant", stiffness=x), "stiffness is .*; it must be a number")
            for x in (math.nan, 0, -1, "a", True)
        ],
        *[(dict(task="ant", smoothing=x), "smoothing is .*; it must be a number") for x in (math.inf, -1)],
        *[
            (dict(task="ant", dtype=x), "dtype is .*; it must be torch.float32")
            for x in (int, torch.float16, "float32")
        ],
        *[(dict(task="ant", device=x), "device '.*'; use cpu or cuda") for x in ("meta", "mps", None, 1.5, "")],
        (dict(task="ant", compile="yes"), "compile is 'yes'; it must be True or False"),
    ],
)
def test_bad_arguments_are_one_line(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        diffsim.make(**KW | kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("physics", ["diffsim", "mujoco"])
@pytest.mark.parametrize(
    "reward, warning",
    [
        (lambda s, q, v, a: q[0].detach() - v[0].square().detach(), "no gradient"),
        (lambda s, q, v, a: (q[0] > 0).float() - 0.1 * a.square().sum(0), "no gradient"),  # of the cost only
        (lambda s, q, v, a: torch.tensor([x.item() for x in q[0]]), "no gradient"),
        (lambda s, q, v, a: torch.zeros(q.shape[1], requires_grad=True), "no gradient"),
        (lambda s, q, v, a: (0 * v[0]).sqrt(), "is not finite in 3 of 3 environments"),
        (lambda s, q, v, a: q[0], None),
        (lambda s, q, v, a: v[1], None),
    ],
)
def test_a_reward_without_gradient_is_warned_of(physics, reward, warning):
    task = type("Mine", (diffsim.TASKS["cartpole"],), dict(reward=reward))
    env = diffsim.make(task, 3, physics=physics, **KW)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env.check_gradient(2)
    said = [str(w.message) for w in caught]
    assert len(said) == (warning is not None) and all("Mine.reward" in s and warning in s for s in said)


def test_a_task_without_any_gradient_is_refused():
    observe, reward = lambda s, q, v, a: q.detach(), lambda s, q, v, a: q[0].detach()  # noqa: E731
    task = type("Mine", (diffsim.TASKS["cartpole"],), dict(observe=observe, reward=reward))
    with pytest.raises(ValueError, match="^neither Mine.reward nor the observation has a gradient"):
        diffsim.make(task, 3, **KW).check_gradient(2)


@pytest.mark.parametrize("name", diffsim.TASKS)
def test_rewards_of_all_tasks_have_a_gradient_and_looking_for_it_changes_nothing(name):
    env = diffsim.make(name, 2, **KW)
    before, rng = env.get_state(), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.check_gradient(12)
    assert all(torch.equal(x, y) for x, y in zip(before.values(), env.get_state().values()))
    assert torch.equal(rng, torch.get_rng_state())


def test_a_reward_that_fails_on_tensors_with_a_gradient_is_one_line():
    reward = lambda s, q, v, a: torch.from_numpy(-(q.numpy()[0] ** 2))  # noqa: E731
    env = diffsim.make(type("Mine", (diffsim.TASKS["cartpole"],), dict(reward=reward)), 3, **KW)
    with pytest.raises(ValueError, match=r"Mine.reward raised RuntimeError: Can't call numpy.*test_env.py:\d+\)$"):
        env.check_gradient(2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSIM_CACHE", str(tmp_path))
    return tmp_path


class Zoo(diffsim.Task):
    """All that has a compiled form: every joint and geom, springs, stops, two like children of a link, a body that the
    others touch, an actuator without a range."""

    collisions = True
    xml = """<mujoco><default><geom contype="1" conaffinity="2"/></default>
      <worldbody><geom type="plane" size="5 5 .1" contype="3" conaffinity="3"/>
      <body pos="0 0 .3"><freejoint/><geom type="box" size=".1 .1 .05" contype="2" conaffinity="1"/></body>
      <body pos="0 0 .55"><joint type="slide" axis="0 0 1"/><geom type="sphere" size=".1"/>
        <body><joint name="a" axis="0 1 0" limited="true" range="-9 9" damping=".1"/>
          <geom type="capsule" fromto=".1 0 0 .4 0 0" size=".05"/>
          <body pos=".4 0 0"><joint type="ball"/><geom type="sphere" size=".05" pos=".1 0 0"/></body></body>
        <body><joint axis="0 1 0" stiffness="2"/><geom type="capsule" fromto="-.1 0 0 -.4 0 0" size=".05"/></body>
      </body></worldbody>
      <actuator><motor joint="a"/></actuator></mujoco>"""

    def reset(self, model, count, generator):
        qpos = torch.as_tensor(model.mj_model.qpos0, dtype=model.dtype)[:, None].repeat(1, count)
        qpos[[0, 1, 2, 7, 8]] += uniform(model, 5, count, 0.05, generator)
        return qpos, uniform(model, model.nv, count, 0.1, generator)

    def observe(self, qpos, qvel, action):
        return torch.cat([qpos, qvel])

    def reward(self, qpos, qvel, action):
        return qpos.square().sum(0) + qvel.sum(0)


@pytest.mark.filterwarnings("error:compiling the physics failed")
def test_compiled_physics_equals_eager(cache, capfd):
    if physics.compiler_error():
        pytest.skip("no C++ compiler")
    gradients, observations = [], []
    for compiled in (False, True, True):
        env = diffsim.make(Zoo(), 9, seed=0, dtype=torch.float64, compile=compiled)  # a vector, and one
        env.reset()
        action = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None].requires_grad_()
        total = sum(env.step(action)[1].sum() for _ in range(20))
        gap, _ = contact_points(env.model, env.qpos.detach(), env.qvel.detach())
        assert all(float(gap[list(i)].min()) < 0.01 for i in touching(env.model))
        assert float(env.qpos[8].detach().abs().max()) > 0.15  # at the stop, too
        gradients.append(torch.autograd.grad(total, action)[0])
        observations.append(env.detach())
    assert capfd.readouterr().err.count("compiling the physics") == 1  # the second time it is on disk
    for x in (gradients, observations):
        torch.testing.assert_close(x[0], x[1], rtol=1e-10, atol=1e-10)
        assert torch.equal(x[1], x[2])


def test_what_would_be_written_wrong_is_refused():
    e = codegen.Expressions()
    known, (x, rows, mask) = codegen.operations(e), (e.inputs(2), np.array([0, 1]), np.array([True, False]))
    for name, args in {
        "pow": (x, 0.5), "index": (x, [rows, rows]), "index_put": (x, [rows], x, False), "mask": (x, [mask]),
    }.items():  # fmt: skip
        with pytest.raises(NotImplementedError):
            known["index" if name == "mask" else name](*args)
    env = diffsim.make("cartpole", 3, compile=False)
    with pytest.raises(ValueError, match="the numbers of environments differ: qpos 3, qvel 2, ctrl 3"):
        env.physics.step(env.qpos, env.qvel[:, :2], torch.zeros(1, 3))


CUDA = """#include <cmath>
#include <cstring>
#define __CUDACC__
#define __device__
#define __noinline__ __attribute__((noinline))
#define __global__
struct Index { int x; } blockIdx, blockDim{64}, threadIdx;
using std::exp, std::log1p, std::sin, std::cos, std::sqrt;
%s
template <class F, class... A> void launch(F kernel, int n, A... a) {
  for (int i = 0; i < (n + 63) / 64 * 64; i++) blockIdx.x = i / 64, threadIdx.x = i %% 64, kernel(a..., n);
}
extern "C" void run_forward(T** a, int substeps, int n) {
  launch(forward, n, a[0], a[1], a[2], a[3], a[4], a[5], substeps);
}
extern "C" void run_backward(T** a, int substeps, int n) {
  launch(backward, n, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], substeps);
}
"""


def test_the_text_for_cuda_is_right_as_cpp(tmp_path):
    """No GPU here: its kernels run thread by thread."""
    if physics.compiler_error():
        pytest.skip("no C++ compiler")
    env, batch, substeps = diffsim.make("cartpole", 70, compile=False, dtype=torch.float64), 70, 2
    m = env.model
    (tmp_path / "step.cpp").write_text(CUDA % codegen.generate(m, cuda=True)[0])
    command = [physics._compiler(), "-std=c++17", "-shared", "-fPIC", tmp_path / "step.cpp", "-o", tmp_path / "step.so"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(tmp_path / "step.so"))

    def run(name, inputs, rows):
        outputs = [torch.zeros(*shape, batch, dtype=torch.float64) for shape in rows]
        pointers = (ctypes.c_void_p * 8)(*(x.data_ptr() for x in (*inputs, *outputs)))
        getattr(library, name)(pointers, substeps, batch)
        return outputs

    eager = Eager(m)
    inputs = [torch.randn(rows, batch, dtype=torch.float64) for rows in (m.nq, m.nv, m.nu)]
    states, qpos, qvel = eager.forward(*inputs, substeps)
    for x, y in zip(run("run_forward", inputs, [states.shape[:2], [m.nq], [m.nv]]), (states, qpos, qvel)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    gradients = [torch.randn_like(x) for x in (qpos, qvel)]
    for x in gradients:
        x[:, 3] = 0
    states[:, :, 3] = torch.inf  # where nothing comes in nothing goes out
    inputs = [states, qvel, inputs[2], *gradients]
    for x, y in zip(run("run_backward", inputs, [[m.nq], [m.nv], [m.nu]]), eager.backward(*inputs)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
        assert not x[:, 3].any()


def touching(model) -> list[list[int]]:
    """Contacts with the ground and contacts between bodies."""
    pairs = [" on " in name for name in model.contact_names]
    return [[i for i, pair in enumerate(pairs) if pair == kind] for kind in (False, True)]


def test_without_a_compiler_physics_runs_and_says_so(cache, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        env = diffsim.make("cartpole", 2)
    env.reset()
    assert torch.isfinite(env.step(torch.zeros(2, 1))[0]).all()
