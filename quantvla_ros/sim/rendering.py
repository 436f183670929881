# SPDX-License-Identifier: Apache-2.0
"""Offscreen pictures of a scene: chooses the GL backend before mujoco is imported, then renders.

Every other module takes mujoco from here, so that the choice is made once and in time. Knows no
robot, no topic and no task.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
import weakref

import numpy as np

GL_LIBRARIES = {'egl': ('EGL', 'libEGL.so.1'), 'osmesa': ('OSMesa', 'libOSMesa.so.8')}
NO_GL = (
    'no offscreen renderer was found (neither EGL nor OSMesa opens on this machine), so cameras '
    'cannot be rendered; install one library: sudo apt-get install libosmesa6'
)
EGL_PLATFORM_DEVICE = 0x313F
MAX_EGL_DEVICES = 16


def _open_library(backend: str) -> ctypes.CDLL | None:
    short, usual = GL_LIBRARIES[backend]
    for name in (ctypes.util.find_library(short), usual):
        if name:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
    return None


def _egl_works() -> bool:
    """Initialise one EGL device, as mujoco will: a library without a driver is of no use."""
    egl = _open_library('egl')
    if egl is None:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    query = egl.eglGetProcAddress(b'eglQueryDevicesEXT')
    display_of = egl.eglGetProcAddress(b'eglGetPlatformDisplayEXT')
    if not query or not display_of:
        return False
    devices = (ctypes.c_void_p * MAX_EGL_DEVICES)()
    count = ctypes.c_int(0)
    query_type = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
    display_type = ctypes.CFUNCTYPE(
        ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)
    if not query_type(query)(MAX_EGL_DEVICES, devices, ctypes.byref(count)):
        return False
    for device in devices[: count.value]:
        display = display_type(display_of)(EGL_PLATFORM_DEVICE, device, None)
        if display and egl.eglInitialize(display, None, None):
            return True
    return False


def choose_gl() -> str:
    """Set MUJOCO_GL to a backend that works here and return it; 'disable' when none does.

    A value the user has set is kept. Call it before mujoco is imported: mujoco reads it once.
    """
    chosen = os.environ.get('MUJOCO_GL', '').strip().lower()
    if chosen or 'mujoco' in sys.modules:
        return chosen
    if _egl_works():
        chosen = 'egl'
    elif _open_library('osmesa') is not None:
        chosen = 'osmesa'
    else:
        chosen = 'disable'
    os.environ['MUJOCO_GL'] = chosen
    return chosen


choose_gl()
import mujoco  # noqa: E402


class SceneRenderer:
    """Renders cameras of one model at one size.

    The settings are those the shipped policy was made with: multisampling and shadows are off
    and only visual geometry (robosuite's geom group 1) is drawn. Belongs to the thread that made
    it, as GL contexts do.
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int) -> None:
        """Make a GL context. Raises ValueError with a sentence when there is no backend."""
        self.width, self.height = width, height
        if os.environ.get('MUJOCO_GL') in ('disable', 'disabled', 'off', 'false', '0'):
            raise ValueError(NO_GL)
        set_render_quality(model, width, height)
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except (RuntimeError, ImportError, AttributeError) as error:
            backend = os.environ.get('MUJOCO_GL')
            raise ValueError(f'MUJOCO_GL={backend}: {error}; {NO_GL}') from error
        # closes at exit too, while the GL library can still be called
        self._finalizer = weakref.finalize(self, self._renderer.close)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = 0
        self._option.geomgroup[1] = 1
        self._option.sitegroup[:] = 0

    def render(
        self, data: mujoco.MjData, camera: str, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (height, width, 3) uint8 RGB, first row on top."""
        self._renderer.update_scene(data, camera, scene_option=self._option)
        return self._renderer.render(out=out)

    def close(self) -> None:
        """Free the GL context."""
        self._finalizer()


def set_render_quality(model: mujoco.MjModel, width: int = 128, height: int = 128) -> None:
    """Turn multisampling and shadows off and make the offscreen buffer large enough.

    Halves the time of a frame on a CPU (36 against 55 ms for 128 px) and fixes the pixels.
    """
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    buffer = model.vis.global_
    buffer.offwidth = max(int(buffer.offwidth), width)
    buffer.offheight = max(int(buffer.offheight), height)
