# SPDX-License-Identifier: Apache-2.0
"""Renders the robot's cameras from snapshots of its state, beside the physics or in step with it.

The physics never waits for a picture: it leaves its newest state in a Snapshot, the loop takes
it. Owns the GL contexts, which belong to the thread that calls render.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from quantvla_ros.action import NS_PER_S
from quantvla_ros.sim.lighting import DAY, Lighting
from quantvla_ros.sim.rendering import SceneRenderer, mujoco
from quantvla_ros.sim.world import CAMERAS, World

IDLE_S = 0.02  # how often a loop without subscribers or states looks again


@dataclass(frozen=True)
class View:
    """One camera of the robot: its name in the contract and the size of its pictures."""

    name: str
    width: int
    height: int


@dataclass(frozen=True)
class Snapshot:
    """The state at one instant: what a picture is made of."""

    model: mujoco.MjModel
    qpos: np.ndarray
    stamp_ns: int
    lighting: Lighting = DAY


Deliver = Callable[[str, np.ndarray, int], None]


def check_views(views: Iterable[View], world: World) -> None:
    """Raise ValueError when the scene has no camera of a view's name."""
    model = world.model
    known = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_CAMERA, i) for i in range(model.ncam)]
    for view in views:
        if CAMERAS.get(view.name, view.name) not in known:
            raise ValueError(
                f'camera {view.name!r} of the contract is not in the scene; known are '
                f'{", ".join([*CAMERAS, *known])}')


class CameraRig:
    """Renders any of the views from a snapshot; remakes its GL contexts when the scene changes."""

    def __init__(self, views: Iterable[View]) -> None:
        self.views: Mapping[str, View] = {view.name: view for view in views}
        self._model: mujoco.MjModel | None = None
        self._data: mujoco.MjData | None = None
        self._renderers: dict[tuple[int, int], SceneRenderer] = {}

    def render(self, snapshot: Snapshot, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return name -> (height, width, 3) uint8 RGB."""
        if snapshot.model is not self._model:
            self.close()
            self._model, self._data = snapshot.model, mujoco.MjData(snapshot.model)
        assert self._data is not None
        self._data.qpos[:] = snapshot.qpos
        self._data.time = snapshot.stamp_ns / NS_PER_S
        mujoco.mj_kinematics(snapshot.model, self._data)
        mujoco.mj_comPos(snapshot.model, self._data)
        mujoco.mj_camlight(snapshot.model, self._data)
        return {name: snapshot.lighting.sense(self._render(name), name, self._data)
                for name in names}

    def _render(self, name: str) -> np.ndarray:
        view = self.views[name]
        size = view.width, view.height
        if size not in self._renderers:
            self._renderers[size] = SceneRenderer(self._model, *size)
        return self._renderers[size].render(self._data, CAMERAS.get(name, name))

    def close(self) -> None:
        """Free the GL contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._model = None


class CameraLoop:
    """A thread that renders what is wanted at most rate_hz times a second, always the newest.

    newest, wanted and rate_hz are read by this thread; deliver is called on it.
    """

    def __init__(
        self,
        rig: CameraRig,
        newest: Callable[[], Snapshot | None],
        wanted: Callable[[], list[str]],
        rate_hz: Callable[[], float],
        deliver: Deliver,
        failed: Callable[[], None],
    ) -> None:
        self._rig, self._newest, self._wanted = rig, newest, wanted
        self._rate_hz, self._deliver, self._failed = rate_hz, deliver, failed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name='cameras', daemon=True)
        self.pictures = 0
        self._shown: dict[str, Snapshot] = {}  # camera -> what its newest picture shows

    def start(self) -> None:
        """Start rendering."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait until the GL contexts are freed."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def wait_for(self, model: mujoco.MjModel, since_ns: int, timeout_s: float) -> bool:
        """Wait for a picture of this scene, since then, of every camera that somebody listens to.

        A new scene's GL context holds the interpreter for a second and more, in which the robot is
        silent, and a picture from before a reset shows an arm that is no longer there: who starts
        an episode waits here, so that both are over when it begins.
        """
        end = time.monotonic() + timeout_s
        while self._thread.is_alive() and not all(
                self._shows(name, model, since_ns) for name in self._wanted()):
            if time.monotonic() > end:
                return False
            time.sleep(IDLE_S)
        return True

    def _shows(self, name: str, model: mujoco.MjModel, since_ns: int) -> bool:
        shown = self._shown.get(name)
        return shown is not None and shown.model is model and shown.stamp_ns >= since_ns

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                begin = time.monotonic()
                names = self._wanted()
                for name in names:
                    self._picture(name)
                pause = 1.0 / self._rate_hz() if names else IDLE_S
                self._stop.wait(max(0.0, pause - (time.monotonic() - begin)))
        except Exception:  # the border of a thread: the node says it and ends
            self._failed()
        finally:
            self._rig.close()

    def _picture(self, name: str) -> None:
        """Render one camera from the newest state and deliver it at once.

        Each camera sees its own instant, as real ones do: waiting for the other would make every
        picture older by a rendering.
        """
        snapshot = self._newest()
        if snapshot is None or self._stop.is_set():
            return
        picture = self._rig.render(snapshot, [name])[name]
        self._deliver(name, picture, snapshot.stamp_ns)
        self._shown[name] = snapshot
        self.pictures += 1
