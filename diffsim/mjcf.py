"""What of MJCF diffsim simulates: everything else that would move the robot raises one line that names it.

`check` goes through every array of the compiled model and every option. What is in none of the lists below must be as
in a plain model, so what a later MuJoCo adds is refused as well, until it is listed.
"""

import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mujoco
import numpy as np


def _names(enum, prefix: str) -> dict[int, str]:
    return {int(v): k.removeprefix(prefix).lower() for k, v in enum.__members__.items() if k.startswith(prefix)}


JOINT = {0: "free", 1: "ball", 2: "slide", 3: "hinge"}  # mujoco.mjtJoint
GEOM = _names(mujoco.mjtGeom, "mjGEOM_")
TRANSMISSION = _names(mujoco.mjtTrn, "mjTRN_")
BIAS = _names(mujoco.mjtBias, "mjBIAS_")

# By the first part of an array's name: what is simulated or has a check of its own; what follows from other arrays;
# and what only measures or is drawn.
KNOWN = {
    "qpos0": "", "qpos": "spring",
    "body": "pos quat ipos iquat mass inertia invweight0 parentid rootid weldid jntnum jntadr dofnum dofadr treeid "
            "geomnum geomadr simple sameframe subtreemass margin user contype conaffinity bvhadr bvhnum",
    "jnt": "type qposadr dofadr bodyid limited solref solimp pos axis stiffness range margin actfrcrange actuatorid "
           "plasticadr group user",
    "dof": "armature damping invweight0 bodyid jntid parentid treeid Madr simplenum solref solimp M0 length",
    "geom": "type contype conaffinity condim bodyid priority solmix solref solimp size pos quat friction margin gap "
            "surfacevel adhesion fluid dataid matid group sameframe castshadow aabb rbound user rgba",
    "tendon": "type adr num matid actuatorid group treenum treeid width solref_lim solimp_lim solref_fri solimp_fri "
              "range actfrcrange margin plasticadr lengthspring length0 invweight0 user rgba",
    "actuator": "trntype trnid gainprm biastype biasprm ctrlrange ctrllimited gear group forcerange dynprm ctrlspec "
                "actadr actnum actrange ctrladr outadr cranklength acc0 length0 lengthrange user",
    "exclude": "signature",
}  # fmt: skip
HARMLESS = (
    "name_", "names", "paths", "cam_", "light_", "mat_", "tex_", "mesh_", "skin_", "hfield_", "site_", "sensor_",
    "key_", "text_", "_", "tuple_", "numeric_", "bvh_", "oct_", "tree_", "wrap_", "ten_J_", "B_", "M_", "D_", "map",
)  # fmt: skip
# Options: the solver's have no effect, those of the override and of sleep none without their flags.
OPTIONS = (
    "timestep gravity disableflags enableflags disableactuator integrator cone impratio jacobian solver iterations "
    "tolerance ls_iterations ls_tolerance noslip_iterations noslip_tolerance ccd_iterations ccd_tolerance "
    "sdf_initpoints sdf_iterations sleep_tolerance magnetic o_margin o_solref o_solimp o_friction"
).split()
FLAGS = (  # what they switch is simulated, refused in any case, or moves nothing
    "constraint equality frictionloss limit contact spring damper gravity actuation refsafe "
    "warmstart sensor midphase autoreset nativeccd multiccd island energy fwdinv invdiscrete"
).split()
# Where an array is not called as in MJCF, or something else would work: (what, instead).
LEAVE = "leave it out"
SERVO = "use <motor>, <position> or <velocity>"
WORDS = {
    "body_mocapid": ("mocap", LEAVE),
    "jnt_actfrclimited": ("actuatorfrcrange", "limit ctrlrange"),
    "jnt_actgravcomp": ("actuatorgravcomp", LEAVE),
    "jnt_stiffnesspoly": ("stiffnesspoly", "give stiffness one number"),
    "dof_dampingpoly": ("dampingpoly", "give damping one number"),
    "dof_frictionloss": ("frictionloss", "use damping"),
    "tendon_actfrclimited": ("actuatorfrcrange", LEAVE),
    "actuator_armature": ("armature", "give it to the joint"),
    "actuator_damping": ("damping", "give it to the joint"),
    "actuator_dyntype": ("activation dynamics (dyntype)", SERVO),
    "actuator_gaintype": ("gaintype", SERVO),
    "actuator_forcelimited": ("forcerange", "limit ctrlrange"),
    "actuator_history": ("delay, nsample, interp", LEAVE),
}
PLAIN = """<mujoco><worldbody><body><joint name="j"/><geom size="1"/></body></worldbody>
<tendon><fixed><joint joint="j" coef="1"/></fixed></tendon><actuator><motor joint="j"/></actuator></mujoco>"""
IMPEDANCE = 0.6  # at d MuJoCo is 1/(1 - d) times as stiff as solref says, diffsim 2.4 times: below, MuJoCo is softer


class UnsupportedError(ValueError):
    """The MJCF uses something that diffsim does not simulate; the message names it."""


@contextmanager
def quiet_mujoco():
    """MuJoCo's warnings go nowhere, instead of to stderr and into a file MUJOCO_LOG.TXT."""
    warn = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(warn)


def read(xml) -> tuple[mujoco.MjModel, str]:
    """The compiled model of an MJCF file or string, and its name. Raises ValueError, one line."""
    if not isinstance(xml, (str, Path)):
        raise ValueError(f"cannot read MJCF from a {type(xml).__name__}: give its path or its text")
    text = isinstance(xml, str) and "<" in xml
    name = "<string>" if text else " ".join(str(xml)[:200].split())
    try:
        found = text or Path(xml).is_file()
    except (OSError, TypeError, ValueError):  # no name that a file could have
        found = False
    if not found:
        raise ValueError(f"cannot read MJCF {name or repr(xml)}: no such file")
    try:
        with quiet_mujoco(), warnings.catch_warnings():  # MuJoCo's deprecations are the file's business
            warnings.simplefilter("ignore")
            m = (mujoco.MjSpec.from_string(xml) if text else mujoco.MjSpec.from_file(str(xml))).compile()
        m.names.decode()
    except UnicodeDecodeError:
        raise ValueError(f"cannot read MJCF {name}: its names are not UTF-8") from None
    except (ValueError, mujoco.FatalError) as e:
        raise ValueError(f"cannot read MJCF {name}: {' '.join(str(e).split())}") from None
    return m, name


def label(m, kind, i) -> str:
    return f"{kind} '{getattr(m, kind)(i).name or i}'"


def check(m: mujoco.MjModel, name: str, collisions: bool = False):
    """Raise on everything that would move the robot differently and that diffsim does not simulate."""

    def no(what, instead=LEAVE):
        raise UnsupportedError(f"{name}: {what} is not supported by diffsim; {instead}")

    for count, what in (
        (m.neq, "an equality constraint"), (m.nflex, "a flex"), (m.nplugin, "a plugin"),
        (m.npair, "an explicit contact pair"),
    ):  # fmt: skip
        if count:
            no(what)
    if m.nv == 0:
        no("a model without joints", "give a body a joint")
    _check_options(m, no)
    for field in sorted(dir(m), key=lambda f: (f not in WORDS, f.lower())):  # the clearer messages first
        value, plain = getattr(m, field), getattr(_plain(), field)
        prefix, _, rest = field.partition("_")
        if not isinstance(value, np.ndarray) or field.startswith(HARMLESS):
            continue
        is_known = rest in KNOWN.get(prefix, "").split() or field in KNOWN
        for i, row in enumerate(value):
            what, instead = WORDS.get(field, (rest or field, LEAVE))
            if not is_known and not (len(plain) and np.array_equal(row, plain[0])):
                no(f"{what} of {_owner(m, prefix, i)}", instead)
            if value.dtype.kind == "f" and not np.isfinite(row).all():
                no(f"{what} = {row} of {_owner(m, prefix, i)}", "give a finite number")
    _check_joints(m, no)
    _check_mass(m, no)
    _check_contacts(m, no, collisions)


@cache
def _plain() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(PLAIN)


def _owner(m, prefix, i) -> str:
    if prefix == "dof":
        prefix, i = "jnt", m.dof_jntid[i]
    kind = {"jnt": "joint"}.get(prefix, prefix)
    return label(m, kind, i) if prefix in ("body", "jnt", "geom", "tendon", "actuator") else f"{kind} {i}"


def _check_options(m, no):
    opt, plain = m.opt, _plain().opt
    if opt.density > 0 or opt.viscosity > 0:
        no("a fluid (option density, viscosity)")
    for field in (f for f in dir(opt) if not f.startswith("_")):
        value = getattr(opt, field)
        if callable(value):
            continue
        if field not in OPTIONS and not np.array_equal(value, getattr(plain, field)):
            no(f"option {field}")
        if not np.isfinite(value).all():
            no(f"option {field} = {value}", "give a finite number")
    if opt.timestep <= 0:
        no(f"option timestep = {opt.timestep}", "give seconds > 0")
    for bits, flags, state in (
        (opt.disableflags, _names(mujoco.mjtDisableBit, "mjDSBL_"), "disable"),
        (opt.enableflags, _names(mujoco.mjtEnableBit, "mjENBL_"), "enable"),
    ):
        for bit in (1 << i for i in range(32) if bits >> i & 1):
            if flags.get(bit) not in FLAGS:
                no(f"option flag {flags.get(bit, bit)}={state}")


def _check_joints(m, no):
    for i in range(m.njnt):
        kind = JOINT.get(m.jnt_type[i])
        if kind is None:
            no(f"the type of {label(m, 'joint', i)}", f"use {', '.join(JOINT.values())}")
        if kind in ("free", "ball") and m.jnt_stiffness[i]:
            no(f"stiffness of {kind} {label(m, 'joint', i)}")
        if kind == "ball" and m.jnt_limited[i]:
            no(f"the range of ball {label(m, 'joint', i)}", "use three hinges")
        if m.jnt_limited[i]:
            _check_softness(m.jnt_solref[i], m.jnt_solimp[i], 0.03, f"limit of {label(m, 'joint', i)}", no)
    for i in range(len(m.actuator_trntype)):
        actuator = label(m, "actuator", i)
        transmission, bias = TRANSMISSION.get(m.actuator_trntype[i]), BIAS.get(m.actuator_biastype[i])
        if transmission not in ("joint", "jointinparent"):
            no(f"the {transmission} transmission of {actuator}", "drive a joint")
        if bias not in ("none", "affine"):
            no(f"biastype of {actuator}", SERVO)
        kind = JOINT[m.jnt_type[m.actuator_trnid[i, 0]]]
        if kind in ("free", "ball"):
            if transmission == "jointinparent":
                no(f"jointinparent of {actuator} on a {kind} joint", "use joint")
            if bias != "none":
                no(f"{actuator}, a servo on a {kind} joint", "use <motor>")


def _check_mass(m, no):
    """Joints that move a body alike share its motion in a way that nothing says."""
    data, mass = mujoco.MjData(m), np.zeros((m.nv, m.nv))
    with quiet_mujoco():
        mujoco.mj_fwdPosition(m, data)
    for row, unit in zip(mass, np.eye(m.nv)):
        mujoco.mj_mulM(m, data, row, unit)
    scale = np.sqrt(mass.diagonal())
    least, motions = np.linalg.eigh(mass / np.outer(scale, scale))
    if least[0] < 1e-13:
        joint = label(m, "joint", m.dof_jntid[abs(motions[:, 0]).argmax()])
        no(f"{joint}, which moves no mass of its own at qpos0,", "if another moves the body alike, give it armature")


def _check_softness(solref, solimp, depth, of, no):
    """The law of contacts and limits is diffsim's own (Softness). It takes solref, and is softer than MuJoCo's."""
    if not ((solref > 0).all() or (solref[0] < 0 and solref[1] <= 0)):
        no(f"solref {solref} of the {of}", "give two positive numbers, or two negative ones")
    least, most, width = solimp[:3]
    if most < IMPEDANCE or (least < IMPEDANCE and width > depth):
        no(f"the soft solimp of the {of}", f"let the impedance reach {IMPEDANCE} within {depth}")


def _check_contacts(m, no, collisions):
    data = mujoco.MjData(m)
    mujoco.mj_kinematics(m, data)
    touching = fixed_pairs(m)
    for moving, fixed in touching:
        if GEOM[m.geom_type[fixed]] != "plane":
            if not collisions:
                what = f"contact with the fixed {label(m, 'geom', fixed)}"
                no(what, "only planes; use collisions=True, or set contype=conaffinity=0")
            if not can_touch(m, moving, fixed):
                what = " and ".join(f"{label(m, 'geom', i)} ({GEOM[m.geom_type[i]]})" for i in (moving, fixed))
                no(f"contact of {what}", "use sphere, capsule or box")
            continue
        if data.geom_xmat[fixed, 8] < 1 - 1e-12:  # its normal's height
            instead = "keep it level and tilt gravity; a wall is a fixed box, with collisions=True"
            no(f"the tilted plane {label(m, 'geom', fixed)}", instead)
        if GEOM[m.geom_type[moving]] not in ("sphere", "capsule", "box"):
            no(f"contact of {label(m, 'geom', moving)} ({GEOM[m.geom_type[moving]]})", "use sphere, capsule or box")
    if collisions:
        touching = touching + [pair for pair in moving_pairs(m) if can_touch(m, *pair)]
    for geom in dict.fromkeys(g for pair in touching for g in pair):
        for field in ("gap", "surfacevel", "adhesion"):
            if hasattr(m, f"geom_{field}") and getattr(m, f"geom_{field}")[geom].any():
                no(f"{field} of {label(m, 'geom', geom)}")
        if m.geom_condim[geom] > 3:
            no(f"condim {m.geom_condim[geom]} of {label(m, 'geom', geom)}", "use 3, sliding friction, or 1, none")
        _check_softness(m.geom_solref[geom], m.geom_solimp[geom], 0.01, f"contact of {label(m, 'geom', geom)}", no)


# --- what the builder asks, too ---------------------------------------------------------------------------------
def disabled(m, *flags: str) -> bool:
    return any(m.opt.disableflags & getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}") for flag in flags)


def collide(m, a, b) -> bool:
    low, high = sorted(int(m.geom_bodyid[g]) for g in (a, b))
    if disabled(m, "CONTACT", "CONSTRAINT") or (low << 16) + high in m.exclude_signature:
        return False
    return bool((m.geom_contype[a] & m.geom_conaffinity[b]) | (m.geom_contype[b] & m.geom_conaffinity[a]))


def fixed_pairs(m) -> list[tuple[int, int]]:
    """Geoms of the links, and fixed ones that they may touch."""
    moves = m.body_weldid[m.geom_bodyid] > 0
    return [(a, b) for a in np.flatnonzero(moves) for b in np.flatnonzero(~moves) if collide(m, a, b)]


def moving_pairs(m) -> list[tuple[int, int]]:
    """Geoms of two links that MuJoCo lets touch: not those of a link and its parent."""
    weld = m.body_weldid[m.geom_bodyid]
    above, moving = m.body_weldid[m.body_parentid[weld]], np.flatnonzero(weld)
    return [
        (a, b) for i, a in enumerate(moving) for b in moving[i + 1 :]
        if collide(m, a, b) and weld[a] != weld[b] and above[a] != weld[b] and above[b] != weld[a]
    ]  # fmt: skip


def moves_freely(m, geom) -> bool:
    """Whether it is on a body with a free joint, and no link hangs on that."""
    root = m.body_rootid[m.geom_bodyid[geom]]
    joints = np.flatnonzero(m.body_rootid[m.jnt_bodyid] == root)
    return len(joints) == 1 and JOINT[m.jnt_type[joints[0]]] == "free"


def can_touch(m, a, b) -> bool:
    """Whether diffsim simulates the contact of two geoms with collisions: pairs.py."""
    return {GEOM[m.geom_type[geom]] for geom in (a, b)} <= {"sphere", "capsule", "box"}
