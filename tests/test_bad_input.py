"""What a user gets wrong: each line below is refused in one or two lines that name it, without a traceback."""

import os
import runpy
import shlex
import sys

import gymnasium
import numpy as np
import pytest
import torch

import diffsim
from diffsim import play as player
from tests import ROOT, TINY, run_script, the_run

# what is typed | what is said (a regular expression)
FLAGS = """
shac.py --num-envs 0 | --num-envs is 0; it must be between 1 and
shac.py --num-envs -3 | --num-envs is -3
shac.py --num-envs abc | --num-envs.*abc
shac.py --num-envs 1.5 | --num-envs.*1.5
shac.py --num-envs 15e-1 | --num-envs: '15e-1' is not a whole number, like
shac.py --num-envs nan | --num-envs.*nan
shac.py --num-envs | Missing value for argument '--num-envs'
shac.py --num-envs 1000000000000 | num_envs is 1000000000000: that takes .* at most
shac.py --horizon 0 | --horizon is 0
shac.py --horizon -1 | --horizon is -1
shac.py --horizon 2.5 | --horizon.*2.5
shac.py --total-timesteps 0 | --total-timesteps is 0
shac.py --total-timesteps -5 | --total-timesteps is -5
shac.py --stop-after abc | --stop-after takes INT, not 'abc'
rpo_diffsim.py --clip-coef .1 .2 .3 | --clip-coef takes FLOAT or FLOAT FLOAT, not '.1', '.2', '.3'
shac.py --total-timesteps 2M | --total-timesteps: '2M' is not a whole number, like 1000000 or 1e6
shac.py --total-timesteps 1e99 | it must be between 1 and
shac.py --gamma 1.5 | --gamma is 1.5; it must be between 0 and 1
shac.py --gamma -0.1 | --gamma is -0.1
shac.py --gamma nan | --gamma is nan
shac.py --gamma inf | --gamma is inf
shac.py --gamma high | --gamma.*high
shac.py --gae-lambda 2 | --gae-lambda is 2
shac.py --gae-lambda nan | --gae-lambda is nan
shac.py --target-alpha 1.01 | --target-alpha is 1.01
shac.py --target-alpha nan | --target-alpha is nan
shac.py --actor-learning-rate 0 | --actor-learning-rate is 0.*above 0
shac.py --actor-learning-rate -1 | --actor-learning-rate is -1
shac.py --actor-learning-rate inf | --actor-learning-rate is inf
shac.py --actor-learning-rate nan | --actor-learning-rate is nan
shac.py --actor-learning-rate 1e31 | --actor-learning-rate is 1e\\+31; it must be above 0 .* at most 1e30
shac.py --log-std-init 1e300 | --log-std-init is 1e\\+300; it must be between
shac.py --entropy-coef 1e39 | --entropy-coef is 1e\\+39; it must be between
shac.py --critic-learning-rate 0 | --critic-learning-rate is 0
shac.py --critic-learning-rate nan | --critic-learning-rate is nan
shac.py --min-learning-rate nan | --min-learning-rate is nan
shac.py --min-learning-rate inf | --min-learning-rate is inf
shac.py --min-learning-rate -1e-9 | --min-learning-rate is -1e-09
shac.py --learning-rate-decay cosine | --learning-rate-decay
rpo_diffsim.py --learning-rate-decay exponential --min-learning-rate 0 | exponential never comes to
shac.py --weight-decay nan | --weight-decay is nan
shac.py --weight-decay -1 | --weight-decay is -1
shac.py --weight-decay inf | --weight-decay is inf
shac.py --max-grad-norm 0 | --max-grad-norm is 0
shac.py --max-grad-norm nan | --max-grad-norm is nan
shac.py --critic-epochs 0 | --critic-epochs is 0
shac.py --critic-minibatches 0 | --critic-minibatches is 0
shac.py --critic-minibatches 100000 | --critic-minibatches is 100000, more than
shac.py --num-critics 0 | --num-critics is 0
shac.py --actor-hidden 0 | --actor-hidden is 0;
shac.py --actor-hidden | --actor-hidden is empty
shac.py --actor-hidden 64 -1 | --actor-hidden is 64 -1;
shac.py --actor-hidden wide | --actor-hidden.*wide
shac.py --critic-hidden 0 0 | --critic-hidden is
shac.py --activation relu | relu.*--activation
shac.py --log-std-init nan | --log-std-init is nan
shac.py --log-std-init inf | --log-std-init is inf
shac.py --entropy-coef -1 | --entropy-coef is -1
shac.py --entropy-coef nan | --entropy-coef is nan
shac.py --learn-entropy-coef | --learn-entropy-coef needs an --entropy-coef above 0
shac.py --entropy-learning-rate 0 | --entropy-learning-rate is 0
shac.py --eval-every -1 | --eval-every is -1
shac.py --eval-episodes 0 | --eval-episodes is 0
shac.py --seed -1 | --seed is -1
shac.py --seed 4294967296 | --seed is 4294967296
shac.py --seed one | --seed.*one
shac.py --num-threads 0 | --num-threads is 0
shac.py --num-threads 100000 | --num-threads is 100000
shac.py --save-every 0 | --save-every is 0
shac.py --stop-after 0 | --stop-after is 0
shac.py --stop-after -1 | --stop-after is -1
shac.py --stiffness 0 | --stiffness is 0
shac.py --stiffness nan | --stiffness is nan
shac.py --stiffness inf | --stiffness is inf
shac.py --smoothing 0 | --smoothing is 0
shac.py --smoothing -2 | --smoothing is -2
shac.py --physics bullet | bullet.*--physics
shac.py --derivative mujoco | derivative mujoco is of MuJoCo's step: use physics mujoco, not diffsim
shac.py --derivative newton | newton.*--derivative
shac.py --physics gymnasium | ant is no Gymnasium environment|has no gradient
shac.py --physics | --physics
shac.py --env Hopper-v5 --physics gymnasium | on physics gymnasium has no gradient: use physics mujoco
shac.py --env Pendulum-v1 | has no gradient: use ppo_baseline
shac.py --env Ant-v4 | Ant-v4 on physics gymnasium has no gradient: use Ant-v5, ppo_baseline
shac.py --env Ant-v4 --physics mujoco | Ant-v4 is Gymnasium's alone.*or Ant-v5
shac.py --env ant-v5 | unknown env 'ant-v5'; did you mean Ant-v5
shac.py --env Pendulum-v1 --physics diffsim | Pendulum-v1 is Gymnasium's alone
shac.py --device tpu | unknown device 'tpu'
shac.py --device cuda | finds no CUDA
shac.py --resume {run} --device cuda | finds no CUDA
shac.py --device | --device
shac.py --no-such-flag | --no-such-flag
shac.py --num-env 3 | --num-env
shac.py stray | stray
shac.py --clip-coef 0.2 | --clip-coef
shac.py --env | --env
shac.py --env antt | unknown env 'antt'; did you mean ant. There is cartpole
shac.py --env atn | did you mean ant
shac.py --env Walker2d | did you mean Walker2d-v5
diffsim/__main__.py ant | ant: python -m diffsim lists the environments, and takes no arguments
shac.py --env "" | unknown env ''
shac.py --env ANT | unknown env 'ANT'
shac.py --env nowhere.py:Task | no file nowhere.py
shac.py --env {folder}:Task | no file
shac.py --env {tasks} | is a file; name the class in it, {tasks}:MyTask
shac.py --env {tasks}: | no class
shac.py --env {tasks}:Nothing | has no class Nothing that derives from diffsim.Task
shac.py --env {tasks}:torch | has no class torch
shac.py --env {tasks}:NotATask | has no class NotATask
shac.py --env {syntax}:Task | does not import: SyntaxError
shac.py --env {raises}:Task | does not import: ZeroDivisionError
shac.py --env {binary}:Task | does not import
shac.py --env {exits}:Task | does not import: SystemExit
shac.py --env {number}:Task | is no .py file
shac.py --env CartPole-v1 | has no gradient|Discrete
shac.py --env Humanoid-v9 | Humanoid-v9
shac.py --resume nowhere | no checkpoint.pt there
shac.py --resume "" | --resume
shac.py --resume {folder} | no checkpoint.pt there
shac.py --resume {tasks} | not a readable checkpoint
shac.py --resume {binary} | not a readable checkpoint
shac.py --resume {empty} | not a readable checkpoint
shac.py --resume {number} | checkpoint
shac.py --resume {nothing} | checkpoint
shac.py --resume {run}/policy.pt2 | a policy; what goes on is the run folder
shac.py --resume {run} --seed 9 | --seed is 9, the run has 1
shac.py --resume {run} --horizon 9 | --horizon is 9, the run has 2
shac.py --resume {run} --env ant | --env is ant, the run has cartpole
shac.py --resume {run} --no-compile --gamma 0.5 | --gamma is 0.5, the run has
rpo_diffsim.py --resume {run} | a checkpoint of shac.py
ppo_baseline.py --resume {run} | a checkpoint of shac.py
rp_pgm_mb.py --resume {run} | a checkpoint of shac.py
shac.py --run-dir {tasks} | {tasks}
shac.py --run-dir /proc/here | /proc/here
shac.py --env cartpole --run-dir "" --num-envs 0 | --num-envs
rpo_diffsim.py --clip-coef -1 | --clip-coef is -1.0;
rpo_diffsim.py --clip-coef nan | --clip-coef is nan;
rpo_diffsim.py --clip-coef 0.2 0.3 0.4 | --clip-coef
rpo_diffsim.py --kl-coef inf | --kl-coef is inf
rpo_diffsim.py --kl-coef nan | --kl-coef is nan
rpo_diffsim.py --kl-coef -1 | --kl-coef is -1
rpo_diffsim.py --update-epochs 0 | --update-epochs is 0
rpo_diffsim.py --update-epochs -2 | --update-epochs is -2
rpo_diffsim.py --num-minibatches 2 | --num-minibatches
rpo_diffsim.py --action-gradient-lambda 0 | --action-gradient-lambda 0.0 vanishes over --horizon 12
rpo_diffsim.py --score-share -1 | --score-share is -1
rpo_diffsim.py --horizon 0 | --horizon is 0
rpo_diffsim.py --gamma 2 | --gamma is 2
rpo_diffsim.py --entropy-coef nan | --entropy-coef is nan
rpo_diffsim.py --log-std-init -inf | --log-std-init is -inf
rpo_diffsim.py --env walker --device cuda | finds no CUDA
rpo_diffsim.py --env Pendulum-v1 | has no gradient
rpo_diffsim.py --actor-learning-rate 0 | --actor-learning-rate is 0
rpo_diffsim.py --env nothing | unknown env 'nothing'
rpo_diffsim.py --capture-video yes | yes
rpo_diffsim.py --unroll 3 | --unroll
ppo_baseline.py --num-steps 0 | --num-steps is 0
ppo_baseline.py --num-minibatches 0 | --num-minibatches is 0
ppo_baseline.py --num-minibatches 1000000 | --num-minibatches
ppo_baseline.py --learning-rate inf | --learning-rate is inf
ppo_baseline.py --learning-rate 0 | --learning-rate is 0
ppo_baseline.py --learning-rate nan | --learning-rate is nan
ppo_baseline.py --clip-coef -0.1 | --clip-coef is -0.1
ppo_baseline.py --clip-coef nan | --clip-coef is nan
ppo_baseline.py --entropy-coef nan | --entropy-coef is nan
ppo_baseline.py --vf-coef nan | --vf-coef is nan
ppo_baseline.py --vf-coef -1 | --vf-coef is -1
ppo_baseline.py --desired-kl 0 | --desired-kl is 0
ppo_baseline.py --desired-kl nan | --desired-kl is nan
ppo_baseline.py --gamma 1.0001 | --gamma is 1.0001
ppo_baseline.py --env CartPole-v1 | Discrete
ppo_baseline.py --env nothing | unknown env 'nothing'
ppo_baseline.py --env ant --physics gymnasium | ant is no Gymnasium environment
ppo_baseline.py --env Pendulum-v1 --physics mujoco | Pendulum-v1 is Gymnasium's alone
ppo_baseline.py --env Pendulum-v1 --device cuda | CUDA|cpu
ppo_baseline.py --horizon 3 | --horizon
ppo_baseline.py --update-epochs 0 | --update-epochs is 0
rp_pgm_mb.py --unroll -1 | --unroll is -1
rp_pgm_mb.py --actor-learning-rate 1e38 | --actor-learning-rate is 1e\\+38
rp_pgm_mb.py --entropy-coef 1e-320 | --entropy-coef is 1e-320
rp_pgm_mb.py --batch-size 0 | --batch-size is 0
rp_pgm_mb.py --buffer-size 0 | --buffer-size is 0
rp_pgm_mb.py --update-ratio inf | --update-ratio is inf
rp_pgm_mb.py --update-ratio 0 | --update-ratio is 0
rp_pgm_mb.py --update-ratio nan | --update-ratio is nan
rp_pgm_mb.py --gradient pathwise | pathwise.*--gradient
rp_pgm_mb.py --tau 2 | --tau is 2
rp_pgm_mb.py --tau nan | --tau is nan
rp_pgm_mb.py --policy-frequency 0 | --policy-frequency is 0
rp_pgm_mb.py --model-updates 0 | --model-updates is 0
rp_pgm_mb.py --gamma nan | --gamma is nan
rp_pgm_mb.py --env CartPole-v1 | Discrete
rp_pgm_mb.py --env FrozenLake-v1 | Discrete
rp_pgm_mb.py --env nothing | unknown env 'nothing'
rp_pgm_mb.py --learning-starts -1 | --learning-starts
rp_pgm_mb.py --learning-starts 5000 --total-timesteps 4000 | 5000 must lie below --total-timesteps 4000
rp_pgm_mb.py --learning-starts 100 --buffer-size 10 --total-timesteps 40 | must lie below --total-timesteps 40
rp_pgm_mb.py --buffer-size 4 --unroll 5 | --buffer-size 4 must lie above --unroll x --num-envs
rp_pgm_mb.py --dr-recent 0 | --dr-recent is 0
rp_pgm_mb.py --log-every -1 | --log-every is -1
rp_pgm_mb.py --num-envs 0 | --num-envs is 0
"""

# classes in a file: | what is said when they are an --env of shac.py
TASKS = {
    "NoXml(Task)": "xml",
    "NoReset(Arm): reset = Task.reset": "NoReset does not define reset",
    "NoObserve(Arm): observe = Task.observe": "NoObserve does not define observe",
    "NoReward(Arm): reward = Task.reward": "NoReward does not define reward",
    "XmlIsGone(Arm): xml = 'gone.xml'": "gone.xml",
    "XmlIsNumber(Arm): xml = 3": "xml",
    "XmlIsText(Arm): xml = 'hello'": "hello|xml",
    "XmlIsEmpty(Arm): xml = ''": "MJCF ''",
    "XmlIsBroken(Arm): xml = '<mujoco><worldbody>'": "XML",
    "XmlHasNoJoint(Arm): xml = '<mujoco/>'": "without joints|joint",
    "XmlHasNoActuator(Arm): xml = Arm.xml.replace('motor', 'nothing')": "nothing|actuator",
    "NoActuators(Arm): xml = Arm.xml.split('<actuator>')[0] + '</mujoco>'": "actuator",
    "NoTime(Arm): control_dt = 0": "control_dt",
    "BackInTime(Arm): control_dt = -0.01": "control_dt",
    "TimeIsNan(Arm): control_dt = nan": "control_dt",
    "TimeIsInf(Arm): control_dt = inf": "control_dt",
    "TimeIsText(Arm): control_dt = '0.01'": "control_dt",
    "NoSubsteps(Arm): substeps = 0": "substeps",
    "HalfSubstep(Arm): substeps = 1.5": "substeps",
    "LessSubsteps(Arm): substeps = -1": "substeps",
    "NoSteps(Arm): max_episode_steps = 0": "max_episode_steps",
    "LessSteps(Arm): max_episode_steps = -5": "max_episode_steps",
    "EndlessSteps(Arm): max_episode_steps = 10**30": "max_episode_steps",
    "TimeRaises(Arm): control_dt = property(lambda s: 1 / 0)": "TimeRaises.control_dt raised ZeroDivisionError",
    "PhysicsRaises(Arm): physics = property(lambda s: 1 / 0)": "PhysicsRaises.physics raised ZeroDivisionError",
    "RunsIsText(Arm): runs = 'no'": "RunsIsText.runs is 'no'; it must be True or False",
    "Exits(Arm): __init__ = lambda s: exit()": "Exits\\(\\) raised SystemExit",
    "ResetExits(Arm): reset = lambda s, m, n, g: exit()": "ResetExits.reset raised SystemExit",
    "HalfStep(Arm): max_episode_steps = 2.5": "max_episode_steps",
    "ResetOne(Arm): reset = lambda s, m, n, g: zeros(2, n)": "ResetOne.reset",
    "ResetNone(Arm): reset = lambda s, m, n, g: None": "ResetNone.reset",
    "ResetFlat(Arm): reset = lambda s, m, n, g: (zeros(2), zeros(2))": "ResetFlat.reset",
    "ResetLong(Arm): reset = lambda s, m, n, g: (zeros(3, n), zeros(2, n))": "ResetLong.reset",
    "ResetBatchFirst(Arm): reset = lambda s, m, n, g: (zeros(n, 3), zeros(n, 3))": "ResetBatchFirst.reset",
    "ResetSame(Arm): reset = lambda s, m, n, g: (zeros(2, 2), zeros(2, 2))": "ResetSame.reset",
    "ResetNan(Arm): reset = lambda s, m, n, g: (zeros(2, n) + nan, zeros(2, n))": "ResetNan.reset",
    "ResetArrays(Arm): reset = lambda s, m, n, g: (np.zeros((2, n)), np.zeros((2, n)))": "ResetArrays.reset",
    "ResetDouble(Arm): reset = lambda s, m, n, g: (zeros(2, n).double(), zeros(2, n).double())": "ResetDouble.reset",
    "ResetRaises(Arm): reset = lambda s, m, n, g: 1 / 0": "ResetRaises.reset.*ZeroDivisionError",
    "ResetArgs(Arm): reset = lambda s: None": "ResetArgs.reset",
    "ObserveNone(Arm): observe = lambda s, q, v, a: None": "ObserveNone.observe",
    "ObserveFlat(Arm): observe = lambda s, q, v, a: q[0]": "ObserveFlat.observe",
    "ObserveTurned(Arm): observe = lambda s, q, v, a: cat([q, v, v]).T": "ObserveTurned.observe",
    "ObserveNan(Arm): observe = lambda s, q, v, a: q / 0 * 0": "ObserveNan.observe",
    "ObserveDouble(Arm): observe = lambda s, q, v, a: q.double()": "ObserveDouble.observe",
    "ObserveInt(Arm): observe = lambda s, q, v, a: q.long()": "ObserveInt.observe",
    "ObserveNothing(Arm): observe = lambda s, q, v, a: q[:0]": "ObserveNothing.observe",
    "ObserveRaises(Arm): observe = lambda s, q, v, a: q[7]": "ObserveRaises.observe.*IndexError",
    "RewardNone(Arm): reward = lambda s, q, v, a: None": "RewardNone.reward",
    "RewardNumber(Arm): reward = lambda s, q, v, a: 1.0": "RewardNumber.reward",
    "RewardSum(Arm): reward = lambda s, q, v, a: q.sum()": "RewardSum.reward",
    "RewardPair(Arm): reward = lambda s, q, v, a: q": "RewardPair.reward",
    "RewardMixes(Arm): reward = lambda s, q, v, a: q[0] - a.square().sum()": "RewardMixes.reward of one environment",
    "ObserveMixes(Arm): observe = lambda s, q, v, a: q - q.mean()": "ObserveMixes.observe of one environment depends",
    "RewardNan(Arm): reward = lambda s, q, v, a: (q[0] - 99).sqrt()": "RewardNan.reward",
    "RewardInt(Arm): reward = lambda s, q, v, a: (q[0] > 0).long()": "RewardInt.reward",
    "RewardBool(Arm): reward = lambda s, q, v, a: q[0] > 0": "RewardBool.reward",
    "RewardRaises(Arm): reward = lambda s, q, v, a: q.nothing": "RewardRaises.reward.*AttributeError",
    "RewardArgs(Arm): reward = lambda s, q, v: q[0]": "RewardArgs.reward.*TypeError",
    "EndsFloat(Arm): terminated = lambda s, q, v: q[0]": "EndsFloat.terminated",
    "EndsOne(Arm): terminated = lambda s, q, v: (q[0] > 9).any()": "EndsOne.terminated",
    "EndsFalse(Arm): terminated = lambda s, q, v: False": "EndsFalse.terminated",
    "EndsRaises(Arm): terminated = lambda s, q, v: q + zeros(7)": "EndsRaises.terminated.*RuntimeError",
    "Needs(Arm): __init__ = lambda s, x: None": "Needs",
}

# calls | what their one-line ValueError says
CALLS = """
make("antt") | unknown env 'antt'
make("ant", 0) | num_envs is 0
make("ant", -1) | num_envs is -1
make("ant", 1.5) | num_envs is 1.5
make("ant", "3") | num_envs
make("ant", None) | num_envs
make("ant", True) | num_envs
make("ant", 10**13, compile=False) | num_envs
make("ant", physics="bullet") | unknown physics 'bullet'
make("ant", derivative="mujoco") | use physics mujoco, not diffsim
make("ant", physics="mujoco", derivative=None) | unknown derivative
make("ant", physics=3) | unknown physics
make("ant", physics="gymnasium") | ant is no Gymnasium environment
make("ant", device="tpu") | unknown device 'tpu'
make("ant", device="cuda") | finds no CUDA
make("ant", device=None) | device
make("ant", seed=-1) | seed is -1
make("ant", seed="one") | seed
make("ant", stiffness=0) | stiffness
make("ant", stiffness=-1.0) | stiffness
make("ant", stiffness=nan) | stiffness
make("ant", smoothing=0) | smoothing
make("ant", smoothing=inf) | smoothing
make("ant", dtype=torch.int32) | dtype
make("ant", dtype=float) | dtype
make("ant", compile="no") | compile
make(3) | task|env
make(None) | task|env
make(diffsim.Task) | xml|Task
make(object()) | task|env
make("Pendulum-v1", physics="mujoco") | Gymnasium's alone
make("CartPole-v1") | Discrete
make("Pendulum-v1", 0) | num_envs is 0
make("Pendulum-v1", device="cuda") | CUDA|cpu
env.step(torch.zeros(3, 1)) | action has shape \\(3, 1\\), expected \\(2, 1\\)
env.step(torch.zeros(2)) | action has shape
env.step(torch.zeros(1, 2)) | action has shape
env.step(None) | action
env.step("left") | action
pendulum.step(torch.zeros(3, 1)) | action has shape \\(3, 1\\), expected \\(2, 1\\)
pendulum.step(None) | action is a NoneType
env.numpy().step("left") | action is a str
diffsim.NumpyEnv(make("cartpole", compile=False)).step("left") | action is a str
env.set_state({}) | state
env.set_state([]) | none of get_state
env.set_state({**env.get_state(), "generator": env.get_state()["generator"].float()}) | it must be torch.uint8
env.set_state(dict(env.get_state(), task=torch.zeros(1))) | keys \\(task\\)
env.set_state(dict(env.get_state(), qvel=torch.zeros(3, 2))) | state has qvel \\(3, 2\\)
env.set_state(dict(env.get_state(), episode_length=torch.zeros(5))) | state has episode_length
env.set_state(dict(env.get_state(), qpos=[[0, 0], [0, 0]])) | state has qpos as list
env.set_state(other.get_state()) | state has qpos
env.set_state({**env.get_state(), "qvel": torch.zeros(7, 2)}) | state has qvel \\(7, 2\\), this environment \\(2, 2\\)
env.set_state({**env.get_state(), "qvel": torch.zeros(2, 2).to_sparse()}) | state has qvel as Tensor
env.set_state({**env.get_state(), "start_qpos": torch.zeros(7, 9)}) | state has start_qpos
env.reset(seed=-1) | seed is -1
env.reset(seed="x") | seed
env.reset(seed=True) | seed
env.reset(options=dict(staggr=True)) | options
env.reset(options=["stagger"]) | options
load_model("nowhere.xml") | nowhere.xml
load_model("<mujoco>") | XML
load_model("") | MJCF ''
load_model(3) | MJCF from a int
load_model(ARM, timestep="0.01") | timestep is '0.01'
load_model(ARM, timestep=True) | timestep is True
load_model(ARM, dtype=torch.float16) | dtype is torch.float16
load_model(ARM, softness=2.4) | softness is 2.4
load_model(ARM, device="meta") | device 'meta'
diffsim.step(load_model(ARM), *(torch.zeros(1, 2).double(),) * 3) | qpos is torch.float64, the model is torch.float32
diffsim.mass_matrix(load_model(ARM), [[0.0]]) | qpos is a list
diffsim.DiffEnv("cartpole") | task is 'cartpole'
diffsim.DiffEnv(diffsim.TASKS["cartpole"](), physics="gymnasium") | physics is 'gymnasium'
diffsim.DiffEnv(diffsim.TASKS["cartpole"](), physics="mujoco", derivative="none") | derivative is 'none'
env.check_gradient(0) | steps is 0
load_model("<mujoco/>") | joint
load_model(ARM, timestep=0) | timestep
load_model(ARM, timestep=nan) | timestep
load_model(ARM, device="tpu") | device
Softness(stiffness=0) | stiffness
Softness(stiffness=nan) | stiffness
Softness(stiffness=True) | stiffness
Softness(limit_stiffness=-1) | limit_stiffness
Softness(release_depth=nan) | release_depth
Softness().widened(0) | contact_width
load_policy("nowhere") | no policy at nowhere
load_policy(FOLDER) | no policy at
load_policy(BINARY) | not a readable policy
playback_env("antt", 1) | unknown env
gymnasium.make("diffsim/cartpole", physics="bullet") | unknown physics
find_task("a" * 5000 + ".py:B") | no file
find_task("a.py:B") | no file a.py
default_physics("antt") | unknown env
settings_of("antt") | unknown env
"""

PLAY = """
nowhere | no policy at nowhere
{folder} | no policy at
{binary} | not a readable policy
{tasks} | not a readable policy
{empty} | not a readable policy
{run}/checkpoint.pt | not a readable policy
{run}/metrics.csv | not a readable policy
{run} --episodes 0 | --episodes is 0
{run} --episodes -1 | --episodes is -1
{run} --episodes many | --episodes.*many
{run} --episodes 1.5 | --episodes.*1.5
{run} --seed -1 | --seed is -1
{run} --seed 99999999999999999999999 | --seed
{run} --physics bullet | bullet
{run} --physics gymnasium | cartpole is no Gymnasium environment
{run} --video x.gif | must be an .mp4
{run} --video /proc/x.mp4 | /proc
{run} --video "" | must be an .mp4
{run} --env ant | the policy wants
{run} --env antt | unknown env 'antt'
{run} --env {tasks}:Nothing | has no class Nothing
{run} --nothing | --nothing
{run} {run} | Unrecognized
 | STR|POLICY|policy
"""


def lines(table: str) -> list:
    """(what is typed, what is said) of each line, named by what is typed."""
    pairs = [line.partition(" | ")[::2] for line in table.strip("\n").splitlines()]
    return [pytest.param(typed, said, id=typed) for typed, said in pairs]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """Files that are no good, by what is wrong with them; a good run; tasks."""
    folder = tmp_path_factory.mktemp("files")
    paths = {name: folder / f"{name}.py" for name in ("tasks", "syntax", "raises", "exits", "binary", "empty")}
    code = (ROOT / "README.md").read_text().split("```python\n# my_task.py\n")[1].split("```")[0]
    code += "\n\nfrom math import inf, nan\n\nimport numpy as np\nfrom diffsim import Task\n"
    code += "from torch import cat, zeros\n"
    code += "\n\nclass NotATask: pass\n\n\nclass Arm(Reach): substeps = 1\n"
    code += "".join(f"\n\nclass {head}{'' if ':' in head else ': pass'}\n" for head in TASKS)
    paths["tasks"].write_text(code)
    paths["syntax"].write_text("def Task(:\n")
    paths["raises"].write_text("1 / 0\n")
    paths["exits"].write_text("raise SystemExit\n")
    paths["binary"].write_bytes(bytes(range(256)))
    paths["empty"].write_text("")
    for name, x in (("number", 3), ("nothing", {})):
        paths[name] = folder / f"{name}.pt"
        torch.save(x, paths[name])
    run_script("shac.py", *TINY, "--env", "cartpole", "--stop-after", 1, "--run-dir", folder / "runs")
    (folder / "folder").mkdir()
    paths |= dict(run=the_run(folder / "runs"), folder=folder / "folder")
    return {k: str(v) for k, v in paths.items()}


@pytest.fixture
def refusal(monkeypatch, capfd, tmp_path):
    """What is printed by a command, which must exit with 2 in one or two lines."""
    monkeypatch.chdir(tmp_path)

    def run(main, argv) -> str:
        monkeypatch.setattr(sys, "argv", argv)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, said = capfd.readouterr()
        assert stopped.value.code == 2 and 1 <= len(said.strip().splitlines()) <= 2 and not out, out + said
        assert "Traceback" not in said and max(map(len, said.splitlines())) < 400, said
        assert not os.listdir(tmp_path), "a refused run leaves nothing"
        return said

    return run


def script(argv):
    return lambda: runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def matches(said: str, pattern: str, files: dict):
    import re

    for name, path in files.items():
        pattern = pattern.replace("{" + name + "}", re.escape(path))
    assert re.search(pattern, " ".join(said.split())), f"{pattern!r} is not in {said!r}"


def typed(text: str, files: dict) -> list[str]:
    return shlex.split(text.format(**files))


@pytest.mark.parametrize("text, said", lines(FLAGS))
def test_a_command_is_refused(text, said, files, refusal):
    argv = typed(text, files)
    matches(refusal(script(argv), argv), said, files)


@pytest.mark.parametrize("head", TASKS)
def test_a_task_is_refused(head, files, refusal):
    name = head.partition("(")[0]
    argv = ["shac.py", "--env", f"{files['tasks']}:{name}", "--no-compile", "--num-envs", "2"]
    matches(refusal(script(argv), argv), TASKS[head], files)


@pytest.mark.parametrize("text, said", lines(PLAY))
def test_play_refuses(text, said, files, refusal):
    matches(refusal(player.main, ["play", *typed(text, files)]), said, files)


@pytest.mark.parametrize("call, said", lines(CALLS))
def test_a_call_is_refused(call, said, files):
    from math import inf, nan  # noqa: F401

    env, pendulum = diffsim.make("cartpole", 2, compile=False), diffsim.make("Pendulum-v1", 2)
    ARM = open(files["tasks"]).read().split('"""')[3]
    names = dict(
        diffsim=diffsim, torch=torch, np=np, gymnasium=gymnasium, make=diffsim.make, env=env, nan=nan, inf=inf,
        pendulum=pendulum,
        other=diffsim.make("hopper", 2, compile=False), load_model=diffsim.load_model, Softness=diffsim.Softness,
        load_policy=player.load_policy, playback_env=player.playback_env, FOLDER=files["folder"],
        BINARY=files["binary"], find_task=diffsim.find_task, default_physics=diffsim.default_physics,
        settings_of=diffsim.settings_of, ARM=ARM,
    )  # fmt: skip
    with pytest.raises(ValueError) as refused:
        eval(call, names)
    assert len(str(refused.value).splitlines()) == 1
    matches(str(refused.value), said, files)


def test_there_are_enough():
    assert sum(map(len, (lines(FLAGS), TASKS, lines(PLAY), lines(CALLS)))) >= 250
