"""What of MJCF diffsim simulates: everything else that would move the robot raises one line that names it."""

import mujoco
import numpy as np

JOINT = {0: "free", 1: "ball", 2: "slide", 3: "hinge"}  # mujoco.mjtJoint
GEOM = mujoco.mjtGeom


class UnsupportedError(ValueError):
    """The MJCF uses something that diffsim does not simulate; the message names it."""


def label(m, kind, i) -> str:
    return f"{kind} '{getattr(m, kind)(i).name or i}'"


def check(m: mujoco.MjModel, name: str):
    """Raise on everything that would move the robot differently and that diffsim does not simulate."""

    def no(what, instead=""):
        raise UnsupportedError(f"{name}: {what} is not supported by diffsim" + (f"; {instead}" if instead else ""))

    for count, what in (
        (m.neq, "an equality constraint"), (m.nflex, "a flex"), (m.nplugin, "a plugin"),
        (m.nmocap, "a mocap body"), (m.npair, "an explicit contact pair"), (m.ngravcomp, "gravcomp"),
    ):  # fmt: skip
        if count:
            no(what)
    for i in range(m.ntendon):  # one that only measures does not matter
        acts = (m.tendon_limited, m.tendon_stiffness, m.tendon_damping, m.tendon_frictionloss, m.tendon_armature)
        if any(np.any(a[i]) for a in acts):
            no(f"the {label(m, 'tendon', i)}")
    if m.opt.density > 0 or m.opt.viscosity > 0:
        no("a fluid (option density, viscosity)")
    if m.opt.wind.any():
        no("wind")
    if m.nv == 0:
        no("a model without joints")
    for i in range(m.njnt):
        frictionless = m.dof_frictionloss[m.jnt_dofadr[i]] == 0
        if not frictionless:
            no(f"frictionloss of {label(m, 'joint', i)}", "use damping")
        if m.jnt_limited[i] and JOINT[m.jnt_type[i]] == "ball":
            no(f"the range of ball {label(m, 'joint', i)}", "use three hinges")
    for i in range(m.nu):
        if int(m.actuator_trntype[i]) not in (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT):
            no(f"the transmission of {label(m, 'actuator', i)}", "drive a joint")
        if int(m.actuator_dyntype[i]) != mujoco.mjtDyn.mjDYN_NONE:
            no(f"the activation dynamics of {label(m, 'actuator', i)}", "use <motor> or <position>")
        if int(m.actuator_gaintype[i]) != mujoco.mjtGain.mjGAIN_FIXED:
            no(f"the gain type of {label(m, 'actuator', i)}", "use <motor> or <position>")
        if int(m.actuator_biastype[i]) not in (mujoco.mjtBias.mjBIAS_NONE, mujoco.mjtBias.mjBIAS_AFFINE):
            no(f"the bias type of {label(m, 'actuator', i)}", "use <motor> or <position>")
        joint = m.actuator_trnid[i, 0]
        if JOINT[m.jnt_type[joint]] in ("free", "ball") and int(m.actuator_biastype[i]) != mujoco.mjtBias.mjBIAS_NONE:
            no(f"{label(m, 'actuator', i)}, a servo on a {JOINT[m.jnt_type[joint]]} joint", "use <motor>")
        if m.actuator_forcelimited[i]:
            no(f"the forcerange of {label(m, 'actuator', i)}", "limit ctrlrange")
    for i in range(m.njnt):
        if m.jnt_actfrclimited[i]:
            no(f"the actuatorfrcrange of {label(m, 'joint', i)}", "limit ctrlrange")
    for moving in (g for g in range(m.ngeom) if m.body_weldid[m.geom_bodyid[g]]):
        for fixed in (g for g in range(m.ngeom) if not m.body_weldid[m.geom_bodyid[g]]):
            if not collide(m, moving, fixed):
                continue
            if int(m.geom_type[fixed]) != GEOM.mjGEOM_PLANE:
                no(f"contact with the fixed {label(m, 'geom', fixed)}", "only planes; or set contype=conaffinity=0")
            if abs(m.geom_quat[fixed][1:3]).max() > 1e-9 or abs(m.body_quat[m.geom_bodyid[fixed]][1:3]).max() > 1e-9:
                no(f"the tilted plane {label(m, 'geom', fixed)}", "keep it level and tilt gravity")
            if int(m.geom_type[moving]) not in (GEOM.mjGEOM_SPHERE, GEOM.mjGEOM_CAPSULE, GEOM.mjGEOM_BOX):
                kind = GEOM(m.geom_type[moving]).name.removeprefix("mjGEOM_").lower()
                no(f"contact of {label(m, 'geom', moving)} ({kind})", "use sphere, capsule or box")


def collide(m, a, b) -> bool:
    return bool((m.geom_contype[a] & m.geom_conaffinity[b]) | (m.geom_contype[b] & m.geom_conaffinity[a]))
