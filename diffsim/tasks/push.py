"""An arm of two links pushes a ball over the ground to a goal: the smallest task in which two moving bodies touch.

A trial of RPO came to a return of -23 after a million steps (benchmarks/trials.md)."""

import torch

from diffsim.tasks.base import Task, uniform

XML = """<mujoco model="push">
  <default>
    <joint damping=".5" armature=".01"/>
    <geom friction=".5"/><motor ctrlrange="-1 1"/>
    <default class="link"><geom type="capsule" size=".03" fromto="0 0 0 .3 0 0" mass=".5" contype="2" conaffinity="0"/>
    </default>
  </default>
  <worldbody>
    <light pos="0 0 3"/><camera pos=".15 -.95 1.4" xyaxes="1 0 0 0 .81 .58"/>
    <geom type="plane" size="2 2 .1" rgba=".8 .8 .8 1"/>
    <body pos="0 0 .05">
      <joint name="shoulder" axis="0 0 1"/><geom class="link"/>
      <body pos=".3 0 0"><joint name="elbow" axis="0 0 1" range="-150 150"/><geom class="link"/></body>
    </body>
    <body name="ball" pos=".4 0 .05"><joint type="free" damping=".02" armature="0"/>
      <geom name="ball" size=".05" mass=".2" conaffinity="3" rgba=".8 .35 .2 1"/></body>
    <body name="goal"><joint type="slide" axis="1 0 0" armature="1"/><joint type="slide" axis="0 1 0" armature="1"/>
      <geom type="cylinder" size=".06 .001" mass="1e-9" contype="0" conaffinity="0" rgba=".2 .7 .3 .6"/></body>
  </worldbody>
  <actuator><motor joint="shoulder" gear="3"/><motor joint="elbow" gear="2"/></actuator>
</mujoco>"""


class Push(Task):
    """An arm pushes a ball to a goal."""

    xml = XML
    max_episode_steps = 180
    collisions = True

    def reset(self, model, count, generator):
        arm = torch.tensor([-1.8, 0.8]).to(model.gear)[:, None] + uniform(model, 2, count, 0.2, generator)
        (angle,), (far, ahead, wide) = (uniform(model, n, count, w, generator) for n, w in ((1, 0.4), (3, 0.08)))
        ball, turn = self.polar(0.4 + far, angle), torch.tensor([0.05, 1, 0, 0, 0]).to(model.gear)[:, None]
        goal = self.polar(0.45 + wide, angle + 0.7 + 5 * ahead)
        qpos = torch.cat([arm, ball, turn.expand(-1, count), goal])
        return qpos, qpos.new_zeros(model.nv, count)

    @staticmethod
    def polar(radius, angle):
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)])

    def tip(self, qpos):
        """Of the arm, (2, B)."""
        return self.polar(0.3, qpos[0]) + self.polar(0.3, qpos[0] + qpos[1])

    def observe(self, qpos, qvel, action):
        ball, goal, arm = qpos[2:4], qpos[9:11], torch.cat([torch.sin(qpos[:2]), torch.cos(qpos[:2])])
        return torch.cat([arm, 0.2 * qvel[:2], ball, qvel[2:4], goal, goal - ball, self.tip(qpos) - ball])

    def reward(self, qpos, qvel, action):
        far, near = qpos[9:11] - qpos[2:4], self.tip(qpos) - qpos[2:4]
        lengths = [torch.sqrt(x.square().sum(0) + 1e-6) for x in (far, near)]
        return -lengths[0] - 0.3 * lengths[1] - 0.01 * action.square().sum(0)
