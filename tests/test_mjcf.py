"""Whatever an MJCF says: diffsim moves as MuJoCo does, to 1e-9, or refuses it in a line that names it."""

import re
import warnings

import mujoco
import numpy as np
import pytest
import torch

import diffsim
from diffsim import mjcf
from diffsim.builder import SelfCollisionWarning, build_model, load_model
from diffsim.dynamics import contact_points

FLOOR = -50.0
ELEMENTS = dict(
    compiler=dict(angle="degree"),
    option=dict(timestep=".004"),
    flag={},
    floor=dict(name="floor", type="plane", size="1 1 1", pos=f"0 0 {FLOOR}", conaffinity="1"),
    body=dict(name="a", pos=".1 .2 .3", quat="1 .2 .3 .1"),
    free=dict(name="free", type="free"),
    torso=dict(name="torso", type="box", size=".1 .2 .15"),
    joint=dict(name="hinge", axis="1 2 3", pos=".1 0 .1", range="-170 170", damping=".3", stiffness="2", armature=".1"),
    geom=dict(name="arm", type="capsule", size=".05 .2", pos=".1 .1 0"),
    ball=dict(name="ball", type="ball", pos="0 0 .1", damping=".1"),
    slide=dict(name="slide", type="slide", axis="1 0 1", range="-9 9", stiffness="3", damping=".2", ref=".1"),
    motor=dict(name="motor", joint="hinge", gear="2", ctrlrange="-1 1"),
    more={},  # elements, as text
)
ROBOT = """<mujoco><compiler {compiler}/><option {option}><flag {flag}/></option>{more[top]}
<default><geom conaffinity="0"/><default class="heavy"><geom density="3000"/></default></default>
<worldbody><geom {floor}/>{more[world]}
<body {body}><joint {free}/><geom {torso}/><site name="s" pos=".1 .2 0"/>
  <body name="b" pos=".2 0 .1" euler="20 30 40"><joint {joint}/><geom {geom}/><site name="t"/>{more[b]}
    <body name="c" pos="0 .1 .2"><joint {ball}/><geom size=".1" pos=".1 .1 .1"/>
      <body name="d" pos=".1 0 0"><joint {slide}/><geom size=".1 .1 .1" type="box" pos=".1 .2 .3"/></body></body>
    <body name="e" pos=".1 .1 0"><geom size=".05"/></body></body></body></worldbody>
<actuator><motor {motor}/>{more[actuator]}</actuator>{more[end]}</mujoco>"""

ALIKE = """
compiler angle radian, eulerseq zyx, inertiafromgeom true, balanceinertia true, boundmass 9,
    boundinertia 2, settotalmass 7, alignfree true, fusestatic true, discardvisual true, fitaabb true, usethread false
option timestep .001, gravity 1 2 -3, magnetic 1 1 1, impratio 9, tolerance 1e-3, cone elliptic, solver PGS,
    jacobian sparse, iterations 3, ls_iterations 3, noslip_iterations 3, integrator RK4, integrator implicitfast,
    actuatorgroupdisable 0, actuatorgroupdisable 1, actuatorgroupdisable 0 1 2, o_margin .1, o_solref .1 1,
    o_friction 2 2 1 1 1, o_solimp .1 .1 1, sleep_tolerance 9, ccd_iterations 9, ccd_tolerance .1, ls_tolerance .1,
    noslip_tolerance .1, sdf_iterations 2, sdf_initpoints 2
flag gravity disable, spring disable, damper disable, actuation disable, limit disable, contact disable,
    constraint disable, equality disable, frictionloss disable, refsafe disable, warmstart disable, sensor disable,
    midphase disable, autoreset disable, nativeccd disable, multiccd disable, island disable, energy enable,
    fwdinv enable, invdiscrete enable
floor group 3, priority 2, margin .1, friction 2 1 1, solref .01 2
body pos 1 2 3, euler 10 20 30, axisangle 1 2 3 40, xyaxes 1 1 0 0 1 1, zaxis 1 2 3, user 1 2, sleep never
free damping .3, armature .2, group 2
torso mass 9, density 300, size .3 .2 .1, pos .1 .2 .3, quat 1 2 3 4, euler 10 20 30, group 3, rgba 1 0 0 1,
    shellinertia true, friction 3, margin .2, priority 1, solmix 3, solref .01 1, solref -100 -10, solimp .9 .99 .01,
    solimp 0 .8 .01, condim 1, fluidshape ellipsoid, user 1, contype 0, class heavy
joint axis 0 1 -1, pos 1 1 1, ref 20, springref 30, springdamper .5 1, stiffness 7, damping 4, armature .5,
    range -150 160, limited false, limited true, margin .01, group 3, user 1, solreffriction .1 1,
    solimpfriction .1 .1 .1, solreflimit .01 2, solreflimit -100 -3, solimplimit 0 .8 .03, type slide,
    actuatorfrclimited false
geom fromto 0 0 0 .1 .2 .3, type sphere, mass 2, euler 10 20 30, axisangle 1 2 3 40, xyaxes 1 1 0 0 1 1, zaxis 1 2 3,
    castshadow false, fluidcoef 1 1 1 1 1, conaffinity 2
ball damping 2, armature .3, pos 1 0 1, stiffness 0
slide axis 0 0 1, ref -.3, springref .4, stiffness 9, range -8 8
motor gear -3 2 1, ctrlrange -2 .3, ctrllimited false, group 1, user 1 2, forcelimited false
"""
REFUSED = """
option density 2: fluid, viscosity 1: fluid, wind 1 0 0, timestep 0, timestep -1, gravity nan 0 0, timestep inf
flag clampctrl disable, filterparent disable, eulerdamp disable, override enable, sleep enable, diagexact enable,
    speculative enable
floor type box: fixed geom, euler 5 0 0: tilted, gap .1, condim 4, surfacevel 1 0 0 0 0 0,
    adhesion 1, solimp .1 .2, solref 0 1
body gravcomp 1
free stiffness 1, frictionloss 1, damping 1 2 3
torso type ellipsoid: ellipsoid, type cylinder: cylinder, gap .1, condim 4, condim 6, surfacevel 1 0 0 0 0 0,
    adhesion 1, solimp 0 .5 .01,
    solimp 0 .9 1, solref -100 1, solref 0 1, solref 1 0, pos nan 0 0
joint frictionloss .1, stiffness 1 2 3, stiffness 0 0 1, damping 1 2 3, damping 0 0 1, springyield .1,
    actuatorfrcrange -1 1, actuatorgravcomp true, solimplimit .1 .1: solimp, solreflimit 0 1: solref, damping inf,
    stiffness nan, armature inf
ball range 0 20, stiffness 1, frictionloss 1, damping 1 2 3
slide frictionloss 1, stiffness 1 2, damping 1 2
motor forcerange -1 1, armature .1, damping 1, damping 0 1 1
"""


def parse(table: str) -> list[tuple[str, str, str]]:
    """(element, "attribute value ...", word in the message) of a table: the attribute unless ": word" follows."""
    cases = []
    for element, _, rest in (line.partition(" ") for line in table.replace("\n    ", " ").strip().splitlines()):
        for attributes, _, word in (case.strip().partition(": ") for case in rest.split(",") if case.strip()):
            cases.append((element, attributes, word or attributes.split()[0]))
    return cases


# where in ROBOT, the elements
ALIKE_ELEMENTS = [
    ("actuator", '<position joint="hinge" kp="5" kv=".4"/>'),
    ("actuator", '<position joint="slide" kp="5" dampratio="1" ctrlrange="-1 1"/>'),
    ("actuator", '<position joint="hinge" inheritrange=".8" gear="3"/>'),
    ("actuator", '<velocity joint="slide" kv="4" gear="-2"/>'),
    ("actuator", '<general joint="hinge" gainprm="3 1" biastype="affine" biasprm="1 2 -3" gear="2"/>'),
    ("actuator", '<general joint="slide" gainprm="3" biastype="none" biasprm="1 2 3"/>'),
    ("actuator", '<general joint="hinge" ffrange="-.1 .1" velrange="-.1 .1" lengthrange="-1 1"/>'),
    ("actuator", '<motor jointinparent="hinge" gear="3"/>'),
    ("actuator", '<motor joint="ball" gear="1 2 3"/>'),
    ("actuator", '<motor joint="free" gear="1 2 3 4 5 6"/>'),
    ("actuator", '<motor joint="hinge" gear="0"/>'),
    ("b", '<inertial pos=".1 .2 .3" mass="2" diaginertia=".1 .2 .15"/>'),
    ("b", '<inertial pos=".1 .2 .3" mass="2" fullinertia=".1 .2 .15 .01 .02 .03"/>'),
    ("b", '<inertial pos=".1 .2 .3" mass="2" quat="1 2 3 4" diaginertia=".1 .2 .15"/>'),
    ("b", '<frame pos="1 2 3" euler="10 20 30"><body><joint axis="0 1 0"/><geom size=".1"/></body></frame>'),
    ("b", '<body childclass="heavy"><joint/><joint type="slide" axis="0 1 0"/><geom size=".1" pos="1 0 0"/></body>'),
    ("b", '<body><joint type="ball"/><geom size=".1 .2" type="cylinder" contype="0" mass="1"/></body>'),
    ("b", '<body><geom size=".1 .2 .3" type="ellipsoid" contype="0"/></body><light/><camera/>'),
    ("b", '<geom type="mesh" mesh="m" contype="0"/>'),
    ("b", '<replicate count="3" euler="0 0 40"><body pos=".1 0 0"><joint/><geom size=".1"/></body></replicate>'),
    ("world", '<body><joint type="slide"/><geom size=".1" pos="0 0 9"/></body>'),
    ("world", '<body pos="0 0 -60" euler="0 0 9"><geom type="plane" size="1 1 1" conaffinity="1"/></body>'),
    ("top", '<size nkey="2" nuserdata="9" memory="1M"/>'),
    ("top", '<statistic extent="9" meansize="3" meaninertia="4"/><visual><map force="3"/></visual>'),
    ("top", '<asset><hfield name="h" nrow="2" ncol="2" size="1 1 1 1"/><texture type="2d" builtin="flat" width="4" '
            'height="4" name="x"/><material name="y" texture="x"/></asset>'),
    ("end", '<sensor><gyro site="s"/><framepos objtype="site" objname="s"/><jointpos joint="hinge"/></sensor>'),
    ("end", '<sensor><jointpos joint="hinge" nsample="4" delay=".004"/></sensor>'),
    ("end", '<tendon><fixed><joint joint="hinge" coef="2"/></fixed></tendon>'),
    ("end", '<tendon><spatial width=".1" rgba="1 0 0 1" group="2"><site site="s"/><site site="t"/></spatial></tendon>'),
    ("end", '<keyframe><key name="k" ctrl="1"/></keyframe><custom><numeric name="n" data="1 2"/></custom>'),
    ("end", '<contact><exclude body1="a" body2="b"/></contact>'),
]  # fmt: skip
REFUSED_ELEMENTS = [
    ("actuator", '<motor joint="hinge" forcerange="-1 1"/>', "forcerange"),
    ("actuator", '<position joint="hinge" timeconst=".1"/>', "activation"),
    ("actuator", '<position joint="ball"/>', "servo"),
    ("actuator", '<velocity joint="free"/>', "servo"),
    ("actuator", '<motor jointinparent="ball" gear="1 2 3"/>', "jointinparent"),
    ("actuator", '<motor jointinparent="free"/>', "jointinparent"),
    ("actuator", '<motor site="s"/>', "transmission"),
    ("actuator", '<motor site="s" refsite="t"/>', "transmission"),
    ("actuator", '<adhesion body="b" ctrlrange="0 1"/>', "transmission"),
    ("actuator", '<motor cranksite="s" slidersite="t" cranklength="1"/>', "transmission"),
    ("actuator", '<damper joint="hinge" kv="1" ctrlrange="0 1"/>', "gaintype"),
    ("actuator", '<cylinder joint="hinge"/>', "activation"),
    ("actuator", '<muscle joint="hinge"/>', "activation"),
    ("actuator", '<intvelocity joint="hinge" actrange="-1 1"/>', "activation"),
    ("actuator", '<pid joint="hinge" kp="2"/>', "gaintype"),
    ("actuator", '<dcmotor joint="hinge" motorconst="1" resistance="2"/>', "gaintype|dyntype"),
    ("actuator", '<orientation joint="ball"/>', "gaintype"),
    ("actuator", '<general joint="hinge" dyntype="integrator"/>', "activation"),
    ("actuator", '<general joint="hinge" dyntype="filter" dynprm=".1"/>', "activation"),
    ("actuator", '<general joint="hinge" gaintype="affine" gainprm="1 1 1"/>', "gaintype"),
    ("actuator", '<general joint="hinge" gaintype="user"/>', "gaintype"),
    ("actuator", '<general joint="hinge" biastype="user"/>', "biastype"),
    ("actuator", '<position joint="hinge" kp="1" delay=".01" nsample="4"/>', "delay"),
    ("world", '<body mocap="true"><geom size=".1" contype="0"/></body>', "mocap"),
    ("world", '<geom size="1" pos="0 0 -9" conaffinity="1"/>', "fixed geom"),
    ("world", '<body euler="9 0 0"><body><geom type="plane" size="1 1 1" conaffinity="1"/></body></body>', "tilted"),
    ("world", '<geom type="hfield" hfield="h" conaffinity="1"/>', "fixed geom"),
    ("world", '<flexcomp name="f" type="grid" count="3 3 1" spacing=".1 .1 .1" dim="2" mass="1"/>', "flex"),
    ("b", '<geom type="mesh" mesh="m"/>', "mesh"),
    ("b", '<body gravcomp=".5"><geom size=".1"/></body>', "gravcomp"),
    ("end", '<equality><joint joint1="hinge"/></equality>', "equality"),
    ("end", '<equality><connect body1="d" anchor="0 0 0"/></equality>', "equality"),
    ("end", '<equality><weld body1="d" active="false"/></equality>', "equality"),
    ("end", '<contact><pair geom1="torso" geom2="floor"/></contact>', "pair"),
    *(("end", f'<tendon><fixed {a}><joint joint="hinge" coef="1"/></fixed></tendon>', word) for a, word in (
        ('stiffness="1"', "stiffness"), ('stiffness="0 1 1"', "stiffness"), ('damping="1"', "damping"),
        ('damping="0 1 1"', "damping"), ('range="-1 1"', "limited"), ('frictionloss="1"', "frictionloss"),
        ('armature="1"', "armature"), ('springyield="1" stiffness="1"', "springyield|stiffness"),
        ('actuatorfrcrange="-1 1" actuatorfrclimited="true"', "actuatorfrcrange"),
    )),
    ("end", '<tendon><fixed name="n"><joint joint="hinge" coef="1"/></fixed></tendon><actuator><motor tendon="n"/>'
            '</actuator>', "transmission"),
    ("end", '<extension><plugin plugin="mujoco.pid"/></extension><actuator><plugin plugin="mujoco.pid" joint="hinge">'
            '<config key="kp" value="1"/></plugin></actuator>', "plugin"),
    ("end", '<option integrator="discrete" solver="CG"><flag ipc="enable"/></option>', "flag ipc"),
]  # fmt: skip


def robot(element="", attributes="") -> str:
    """ROBOT with attributes ("name value ...") of one element set, or with elements inserted at a place."""
    parts = {name: dict(values) for name, values in ELEMENTS.items()}
    more = dict.fromkeys(("top", "world", "b", "actuator", "end"), "")
    if element in more:
        more[element] = attributes
        if 'mesh="m"' in attributes:
            more["top"] = '<asset><mesh name="m" vertex="0 0 0 1 0 0 0 1 0 0 0 1"/></asset>'
        if 'hfield="h"' in attributes:
            more["top"] = '<asset><hfield name="h" nrow="2" ncol="2" size="1 1 1 1"/></asset>'
    elif element:
        name, _, value = attributes.partition(" ")
        for old in ("quat", "pos") if name == "fromto" else ("quat",) if name in ORIENTATION else ():
            parts[element].pop(old, None)
        parts[element][name] = value
        if name == "class":
            parts[element] = {"class": value, **parts[element]}
    text = {k: " ".join(f'{a}="{b}"' for a, b in v.items()) for k, v in parts.items() if k != "more"}
    return ROBOT.format(**text, more=more)


ORIENTATION = ("euler", "axisangle", "xyaxes", "zaxis")


def load(xml, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SelfCollisionWarning)
        return load_model(xml, dtype=torch.float64, **kwargs)


def skip_if_unknown(error):
    """An attribute that a MuJoCo before 4 does not have."""
    if "Schema violation" in str(error) and int(mujoco.__version__.split(".")[0]) < 4:
        pytest.skip(str(error))


def difference(model, m, height=0.0, spread=0.5):
    """Of diffsim's and MuJoCo's state after a step with Euler's integrator from random ones, relative."""
    m = m.__copy__()
    m.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    rng, before, after = np.random.default_rng(0), [], []
    for _ in range(2):
        d = mujoco.MjData(m)
        d.qpos[:] = m.qpos0
        mujoco.mj_integratePos(m, d.qpos, rng.normal(size=m.nv), spread)
        d.qpos[2] += height
        d.qvel[:], d.ctrl[:] = rng.normal(size=m.nv), rng.uniform(-1.5, 1.5, m.nu)
        before.append([x.copy() for x in (d.qpos, d.qvel, d.ctrl)])
        mujoco.mj_step(m, d)
        assert d.nefc == 0 and np.isfinite(d.qvel).all() and d.time > 0
        after.append([d.qpos.copy(), d.qvel.copy()])
    found = diffsim.step(model, *(torch.tensor(np.stack(x, 1)) for x in zip(*before)))
    expected = [np.stack(x, 1) for x in zip(*after)]
    return max(abs(ours.numpy() - theirs).max() / abs(theirs).max() for ours, theirs in zip(found, expected))


@pytest.mark.parametrize("element, attributes", [*(case[:2] for case in parse(ALIKE)), *ALIKE_ELEMENTS])
def test_it_moves_as_in_mujoco(element, attributes):
    try:
        model = load(robot(element, attributes))
    except ValueError as e:
        skip_if_unknown(e)
        raise
    off = attributes.split()[0] if element == "flag" and attributes.endswith("disable") else ""
    height = 2 * FLOOR if off in ("contact", "constraint") else 0.0
    spread = 5.0 if off in ("limit", "constraint") else 0.5
    assert difference(model, model.mj_model, height, spread) < 1e-9


@pytest.mark.parametrize("element, attributes, word", [*parse(REFUSED), *REFUSED_ELEMENTS])
def test_it_is_refused_by_name(element, attributes, word):
    with pytest.raises(ValueError) as error:
        load(robot(element, attributes))
    skip_if_unknown(error.value)
    assert error.type is diffsim.UnsupportedError, error.value
    assert re.search(word, str(error.value)) and "\n" not in str(error.value), error.value


def test_joints_that_move_a_body_alike_are_refused():
    """Without armature: how they share its motion, nothing says."""
    text = """<mujoco><worldbody><body><joint name="a" axis="0 0 2"{}/><joint axis="0 0 1"/><geom size=".1"/></body>
    </worldbody></mujoco>"""
    with pytest.raises(diffsim.UnsupportedError, match="joint .*, which moves no mass of its own .* armature"):
        load_model(text.format(""))
    load_model(text.format(' armature=".01"'))


TENDON = '<tendon><fixed><joint joint="hinge" coef="1"/></fixed></tendon>'
NUMBERS = sorted(
    field for field in dir(mjcf._plain()) if not field.startswith(mjcf.HARMLESS)
    and isinstance(array := getattr(mjcf._plain(), field), np.ndarray) and array.dtype.kind in "fb"
)  # fmt: skip


@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_of_the_compiled_model_counts_as_in_mujoco(field):
    """Whatever writes them into the model: MJCF that is not in the tables above, or that a later MuJoCo reads."""
    m = load(robot("end", TENDON)).mj_model
    for shortcut in (m.body_simple, m.body_sameframe, m.geom_sameframe, m.dof_simplenum):
        shortcut[:] = 0  # MuJoCo's, taken where a number had a certain value
    array = getattr(m, field)
    array[:] = ~array if array.dtype.kind == "b" else 1.3 * array + 0.1
    if field.endswith(("quat", "axis")):
        array /= np.linalg.norm(array, axis=1, keepdims=True)
    try:
        mjcf.check(m, "robot")
    except diffsim.UnsupportedError as e:
        word = {"jnt_limited": "range of ball", "geom_quat": "tilted"}.get(field)
        assert (word or mjcf.WORDS.get(field, (field.partition("_")[2],))[0]) in str(e)
    else:
        assert difference(build_model(m, diffsim.Softness(), "cpu", torch.float64), m) < 1e-9


def test_what_is_not_listed_is_refused(monkeypatch):
    monkeypatch.setitem(mjcf.KNOWN, "jnt", mjcf.KNOWN["jnt"].replace("axis", ""))
    with pytest.raises(diffsim.UnsupportedError, match="axis of joint 'hinge' is not supported"):
        load(robot())
    monkeypatch.undo()
    monkeypatch.setattr(mjcf, "OPTIONS", [f for f in mjcf.OPTIONS if f != "gravity"])
    with pytest.raises(diffsim.UnsupportedError, match="option gravity is not supported"):
        load(robot("option", "gravity 0 0 1"))
    m = load(robot()).mj_model
    m.opt.enableflags |= 1 << 30
    with pytest.raises(diffsim.UnsupportedError, match=f"option flag {1 << 30}=enable is not supported"):
        mjcf.check(m, "robot")


def test_contact_is_where_mujoco_sees_it():
    assert set(load(robot()).contact_names) == {"torso"} | {"arm"} | {f"geom {i}" for i in (3, 4, 5)}
    assert "torso" not in load(robot("end", '<contact><exclude body1="world" body2="a"/></contact>')).contact_names
    ball = """<mujoco><worldbody><body pos="0 0 -3"><body pos="0 0 1" euler="0 0 30">
    <geom name="floor" type="plane" size="1 1 1"/></body></body><body><freejoint/><geom name="ball" size=".2"/></body>
    </worldbody></mujoco>"""
    model = load(ball)
    gap, _ = contact_points(model, torch.tensor(model.mj_model.qpos0)[:, None], torch.zeros(6, 1).double())
    assert gap.tolist() == [[pytest.approx(1.8)]]


def test_moving_geoms_that_could_touch_are_named_in_a_warning():
    two = """<mujoco>{}<worldbody><body name="a"><freejoint/><geom name="left" size=".1"/></body>
    <body name="b"><freejoint/><geom name="right" size=".1"/></body></worldbody>{}</mujoco>"""
    with pytest.warns(SelfCollisionWarning, match="1 pairs, geom 'left' and geom 'right'"):
        load_model(two.format("", ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(two.format("", '<contact><exclude body1="b" body2="a"/></contact>'))
        load_model(two.format('<option><flag contact="disable"/></option>', ""))


def test_solref_is_read_as_in_mujoco():
    """By its two forms, with MuJoCo's rules for a pair of geoms and for times below two timesteps."""
    sphere = """<mujoco><option timestep=".004"><flag {}/></option><worldbody><geom type="plane" size="1 1 1" {}/>
    <body><freejoint/><geom size=".1" {}/></body></worldbody></mujoco>"""

    def law(floor, geom, flag=""):
        (group,) = load(sphere.format(flag, floor, geom)).groups
        return [round(float(x), 6) for x in (group.contacts.k, group.contacts.damping)]

    def both(solref, flag=""):
        return law(f'solref="{solref}"', f'solref="{solref}"', flag)

    assert both(".1 .5") == both(f"{-1 / (0.1 * 0.5) ** 2} {-2 / 0.1}") != both(".1 1")
    assert law("", 'solref="-100 -10"') == law('solref="-90 -5"', 'solref="-100 -10"') == both("-100 -10")
    assert law('solref=".1 1"', 'solref=".2 3"') == both(".15 2")
    assert law('solref=".1 1"', 'solref=".2 3" priority="1"') == both(".2 3")
    assert law('solref=".1 1" solmix="3"', 'solref=".2 3"') == both(".125 1.5")
    assert both(".001 1") == both(".008 1") != both(".001 1", 'refsafe="disable"')


# --- what MuJoCo cannot read ------------------------------------------------------------------------------------
ONE = '<body name="a"><joint/><geom size=".1"/></body>'
UNREADABLE = {
    "empty": b"", "text": b"hello", "binary": bytes(range(256)) * 4, "html": b"<html></html>",
    "unclosed": b"<mujoco><worldbody>", "unknown": b"<mujoco><nonsense/></mujoco>",
    "attribute": b'<mujoco><option speed="1"/></mujoco>', "number": b'<mujoco><option density="x"/></mujoco>',
    "include": b'<mujoco><include file="no.xml"/></mujoco>',
    "cycle": b'<mujoco><include file="cycle.xml"/></mujoco>',
    "mesh": b'<mujoco><asset><mesh name="m" file="no.stl"/></asset></mujoco>',
    "twice": f"<mujoco><worldbody>{ONE}{ONE}</worldbody></mujoco>".encode(),
    "massless": b"<mujoco><worldbody><body><joint/></body></worldbody></mujoco>",
    "deep": b"<mujoco><worldbody>" + b"<body><joint/>" * 3000 + b"</body>" * 3000 + b"</worldbody></mujoco>",
    "memory": f'<mujoco><size memory="1"/><worldbody>{ONE}</worldbody></mujoco>'.encode(),
    "latin1": f"<mujoco><worldbody>{ONE}</worldbody></mujoco>".replace('"a"', '"\xe9"').encode("latin1"),
    "utf16": f"<mujoco><worldbody>{ONE}</worldbody></mujoco>".encode("utf16"),
    "nan": f'<mujoco><option gravity="nan 0 0"/><worldbody>{ONE}</worldbody></mujoco>'.encode(),
    "still": b"<mujoco/>",
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_mjcf_is_one_line(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"{name}.xml"
    file.write_bytes(UNREADABLE[name])
    with pytest.raises(ValueError, match=name) as error:
        diffsim.make(type("Mine", (diffsim.Task,), dict(xml=file)))
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")
    assert [f.name for f in tmp_path.iterdir()] == [file.name]  # no MUJOCO_LOG.TXT


@pytest.mark.parametrize(
    "xml", ["", "no_such_file.xml", ".", "x" * 5000, "<html>\n</html>", "<mujoco\n", "\0", "a\nb", None]
)
def test_what_is_no_mjcf_is_one_line(xml, capfd):
    with pytest.raises(ValueError, match="cannot read MJCF") as error:
        load_model(xml)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "spring, servo, said",
    [
        (5, 0, []),
        (50, 0, ["the spring of joint 'j' is"]),
        (20, 20, ["the spring and servo of joint 'j' are"]),
        (0, 50, ["the servo of joint 'j' is"]),
    ],
)
def test_a_spring_that_will_explode_is_warned_of(spring, servo, said):
    xml = f"""<mujoco><worldbody><body><joint name="j" axis="0 1 0" stiffness="{spring}"/>
    <geom size=".02" pos="0 0 .05" mass=".04"/></body></worldbody>
    <actuator><position joint="j" kp="{servo}"/></actuator></mujoco>"""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        diffsim.load_model(xml, timestep=1 / 240)
    assert [str(w.message).split(" too")[0] for w in found] == said


@pytest.mark.parametrize("kv, warns", [(0.5, False), (3, True)])
def test_a_servo_that_will_explode_is_warned_of(kv, warns):
    """A substep of 2 ms, 1.4 g m^2 about the joint: stable below kv of 1."""
    xml = f"""<mujoco><option timestep=".002" gravity="0 0 0"/><worldbody><body><joint name="elbow" axis="0 1 0"/>
    <geom size=".05" pos="0 0 .1" mass=".1"/></body></worldbody><actuator><position joint="elbow" kp="50" kv="{kv}"
    ctrlrange="-1 1"/></actuator></mujoco>"""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = diffsim.load_model(xml, dtype=torch.float64)
    assert [str(w.message).split(" is too")[0] for w in said] == ["the servo of joint 'elbow'"] * warns
    qpos, qvel = torch.tensor([[0.3]]).double(), torch.zeros(1, 1).double()
    for _ in range(200):
        qpos, qvel = diffsim.step(model, qpos, qvel, torch.zeros(1, 1).double())
    assert bool((qpos.abs() < 1).all()) != warns  # NaN is not
