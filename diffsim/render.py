"""Frames of a robot as a video, without a display, through mujoco.Renderer.

MuJoCo chooses its OpenGL when it is imported, so the drawing is done by a child process: EGL, or else OSMesa.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mujoco
import numpy as np

WIDTH, HEIGHT = 640, 480
FPS = 30
STRIP_START, STRIP_EVERY, STRIP_FRAMES = 60, 2, 8  # frames of the video
STRIP = slice(125, 385), slice(165, 475)  # their rows and columns


def check_path(path: str | Path):
    """Makes the folder of a video. Raises ValueError, one line, for one that is not .mp4 or cannot be written."""
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"cannot write {path}: the video must be an .mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.exists():
            open(path, "ab").close()
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror}") from None


def render(mj_model: mujoco.MjModel, qpos: np.ndarray, control_dt: float, path: str):
    """Write frames qpos (T, nq) as a video (.mp4) at real speed, and eight of them side by side as .png beside it.
    They are there whole, or not at all.

    Raises ValueError, one line, where there is no headless OpenGL.
    """
    check_path(path)
    backends = [os.environ["MUJOCO_GL"]] if "MUJOCO_GL" in os.environ else ["egl", "osmesa"]
    with tempfile.TemporaryDirectory() as folder:
        binary, frames, video = (os.path.join(folder, name) for name in ("model.mjb", "qpos.npy", "video.mp4"))
        mujoco.mj_saveModel(mj_model, binary)
        np.save(frames, qpos)
        for backend in backends if sys.platform.startswith("linux") else [""]:
            environment = {**os.environ, "MUJOCO_GL": backend} if backend else dict(os.environ)
            command = [sys.executable, __file__, binary, frames, str(control_dt), video]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode == 0:
                return move(Path(video), Path(path))
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise ValueError(
        f"cannot draw ({reason}); without OpenGL, on Debian or Ubuntu: apt-get install libegl1 libgl1 (or libosmesa6)"
    )


def move(video: Path, path: Path):
    try:
        for suffix in (".mp4", ".png"):
            shutil.move(video.with_suffix(suffix), path.with_suffix(suffix))
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror}") from None


def _draw(binary: str, frames: str, control_dt: str, path: str):
    import imageio_ffmpeg
    import matplotlib.image

    m, qpos = mujoco.MjModel.from_binary_path(binary), np.load(frames)
    m.vis.headlight.ambient[:], m.vis.headlight.diffuse[:] = 0.35, 0.55
    ground = (m.geom_type == mujoco.mjtGeom.mjGEOM_PLANE) & ((m.geom_contype | m.geom_conaffinity) > 0)
    for plane in np.flatnonzero(ground):  # drawn without an end, as contacts have it: robots run far
        size, material = m.geom_size[plane, :2], m.geom_matid[plane]
        if material >= 0 and not m.mat_texuniform[material]:
            m.mat_texrepeat[material] /= np.where(size > 0, size, 1)
        size[:] = 0
    data, camera = mujoco.MjData(m), mujoco.MjvCamera()
    camera.distance, camera.elevation, camera.azimuth = 3.9, -15, 90
    still = m.ncam > 0 and m.cam_mode[0] == mujoco.mjtCamLight.mjCAMLIGHT_FIXED  # the file says where to look from
    renderer = mujoco.Renderer(m, HEIGHT, WIDTH)
    steps = np.arange(0, len(qpos) * float(control_dt), 1 / FPS) / float(control_dt)  # at real speed
    qpos = qpos[steps.astype(int).clip(max=len(qpos) - 1)]
    writer = imageio_ffmpeg.write_frames(path, (WIDTH, HEIGHT), fps=FPS)
    writer.send(None)
    strip = []
    start = STRIP_START if len(qpos) > STRIP_START + STRIP_EVERY * STRIP_FRAMES and not still else 0
    every = max(1, len(qpos) // STRIP_FRAMES) if still else STRIP_EVERY
    for t, q in enumerate(qpos):
        data.qpos[:] = q
        mujoco.mj_kinematics(m, data)
        mujoco.mj_camlight(m, data)
        camera.lookat[:] = data.xpos[1] * (1, 1, 0.7)  # between the root and the ground
        renderer.update_scene(data, 0 if still else camera)
        frame = renderer.render()
        writer.send(np.ascontiguousarray(frame))
        if t >= start and (t - start) % every == 0 and len(strip) < STRIP_FRAMES:
            strip.append(frame[STRIP].copy())
    writer.close()
    matplotlib.image.imsave(Path(path).with_suffix(".png"), np.concatenate(strip, 1))


if __name__ == "__main__":
    _draw(*sys.argv[1:])
