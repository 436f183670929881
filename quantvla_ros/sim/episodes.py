# SPDX-License-Identifier: Apache-2.0
"""One closed-loop episode: official start state in, success or failure out.

Owns the lockstep loop, the noise seeds (a function of settings, task, start and chunk number, so
that every variant of a policy meets the same noise) and the disturbances. Knows no process, no
file and no statistics.
"""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.vocabulary import UnknownWords
from quantvla_ros.sim.scenes import MAX_TEXTURE

CAPS = {'libero_spatial': 220, 'libero_object': 280, 'libero_goal': 300, 'libero_10': 520}
OTHER_CAP = 400  # libero_90
WORLD_RATE_HZ = 20.0
OPEN, CLOSE = -1.0, 1.0
SLIP_AFTER_STEPS = 14  # the object has just left the table
SLIP_STEPS = 8

Act = Callable[['Episode', Observation, int], ActionChunk]
Watch = Callable[['PlayableWorld'], None]


class PlayableWorld(Protocol):
    """What an episode needs of a simulated task; quantvla_ros.sim.world.World has it."""

    def reset_official(self, start: int) -> None:
        """Start from an official state."""

    def step(self, target: np.ndarray, gripper: float) -> None:
        """Advance 50 ms towards (7,) joint targets; -1 opens, +1 closes."""

    def success(self) -> bool:
        """Whether the goal holds."""

    def joint_state(self) -> np.ndarray:
        """Return (9,) measured joints."""

    def render(self, camera: str, size: int | tuple[int, int] = 128) -> np.ndarray:
        """Return (height, width, 3) uint8 RGB."""


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared on the same episodes.

    steps 0: the policy's own. calibration '': none, as in PolicySettings.
    """

    precision: str = 'float'
    steps: int = 0
    calibration: str = ''

    @property
    def name(self) -> str:
        """Short and unique, as in 'float', 'w4a8 + monday' or 'w4a8, 2 steps'."""
        served = f'{self.precision} + {self.calibration}' if self.calibration else self.precision
        return f'{served}, {self.steps} steps' if self.steps else served


@dataclass(frozen=True)
class Episode:
    """Which episode: variant, task, official start and the most control steps it may take."""

    variant: Variant
    suite: str
    task: int
    start: int
    cap: int

    @property
    def task_name(self) -> str:
        """As in libero_object_3."""
        return f'{self.suite}_{self.task}'

    @property
    def name(self) -> str:
        """As in libero_object/3/17, without the variant."""
        return f'{self.suite}/{self.task}/{self.start}'


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of an episode besides the episode itself.

    execute 0: the contract's. noise_rad: standard deviation of the command noise. slip: force the
    gripper open once, shortly after it has closed. real: robosuite and LIBERO themselves.
    lighting: as parse_lighting reads it.
    through_ros: sim_node and policy_node over DDS.
    """

    policy: str = 'libero_panda'
    model: str = ''
    contract: str = 'libero_panda'
    device: str = 'cpu'
    batch: int = 1
    execute: int = 0
    seed: int = 0
    max_texture: int = MAX_TEXTURE
    noise_rad: float = 0.0
    slip: bool = False
    real: bool = False
    lighting: str = 'day'
    through_ros: bool = False


@dataclass
class Outcome:
    """What became of an episode.

    status: success, failure, refused (the policy does not know the instruction's words), or
    crashed, which says nothing about the policy. error: the text of the last two.
    compared, different: chunks through ROS that were computed again here, and those that differ.
    """

    episode: Episode
    status: str
    steps: int = 0
    chunks: int = 0
    seconds: float = 0.0
    policy_seconds: float = 0.0
    error: str = ''
    compared: int = 0
    different: int = 0
    frame: np.ndarray | None = field(default=None, repr=False)

    def line(self) -> dict[str, Any]:
        """What a log keeps: everything but the picture."""
        kept = {k: v for k, v in self.__dict__.items() if k not in ('episode', 'frame')}
        return {**asdict(self.episode), **kept}


def cap_of(suite: str) -> int:
    """Most control steps of an episode, as the papers use; a perturbed suite has its parent's."""
    for name, cap in CAPS.items():
        if suite == name or suite.startswith(name + '_'):
            return cap
    return OTHER_CAP


def seed_of(*parts: object) -> int:
    """64 bits that depend on the parts alone, the same on every machine."""
    text = '/'.join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'little')


class Disturbance:
    """Changes commands on their way to the robot: noise, and one forced slip."""

    def __init__(self, settings: Settings, episode: Episode) -> None:
        self.noise_rad, self.slip = settings.noise_rad, settings.slip
        key = seed_of('disturbance', settings.seed, episode.name)
        self._random = np.random.Generator(np.random.Philox(key=key))
        self._closed = 0

    def __call__(self, target: np.ndarray, gripper: float) -> tuple[np.ndarray, float]:
        """Return the disturbed command."""
        if self.noise_rad:
            target = target + self.noise_rad * self._random.standard_normal(len(target))
        if self.slip:
            counting = self._closed < SLIP_AFTER_STEPS and gripper == OPEN
            self._closed = 0 if counting else self._closed + 1
            if SLIP_AFTER_STEPS < self._closed <= SLIP_AFTER_STEPS + SLIP_STEPS:
                gripper = OPEN
        return target, gripper


def observe(
    world: PlayableWorld, contract: Contract, instruction: str, stamp_ns: int
) -> Observation:
    """Return what the robot's own node would see of this instant."""
    images = {
        camera.name: world.render(camera.name, (camera.policy_width, camera.policy_height)).copy()
        for camera in contract.cameras
    }
    return Observation(
        images=images,
        image_stamps_ns=dict.fromkeys(images, stamp_ns),
        joint_names=contract.joints.names,
        joint_positions=world.joint_state(),
        joint_stamp_ns=stamp_ns,
        instruction=instruction,
    )


def play(
    world: PlayableWorld,
    episode: Episode,
    settings: Settings,
    contract: Contract,
    instruction: str,
    act: Act,
    watch: Watch | None = None,
) -> Outcome:
    """Play one episode in lockstep: the world waits for the policy, as in the papers.

    watch is called with the world after every control step. An exception ends the episode as
    crashed, with its traceback: it says nothing about the policy.
    """
    outcome = Outcome(episode, 'failure')
    began = time.perf_counter()
    try:
        world.reset_official(episode.start)
        _loop(world, outcome, settings, contract, instruction, act, watch)
        if outcome.status == 'failure':
            views = [world.render(name, 128).copy() for name in contract.camera_names]
            outcome.frame = np.concatenate(views, axis=1)
    except UnknownWords as error:
        outcome.status, outcome.error = 'refused', str(error)
    except Exception:  # the border of an episode: nothing above may end with it
        outcome.status, outcome.error = 'crashed', traceback.format_exc()
    outcome.seconds = time.perf_counter() - began
    return outcome


def _loop(
    world: PlayableWorld,
    outcome: Outcome,
    settings: Settings,
    contract: Contract,
    instruction: str,
    act: Act,
    watch: Watch | None,
) -> None:
    episode, gripper = outcome.episode, contract.gripper
    execute = settings.execute or contract.action.execute
    middle = 0.5 * (gripper.open_position + gripper.closed_position)
    toward_closed = np.sign(gripper.closed_position - gripper.open_position)
    disturb = Disturbance(settings, episode)
    while outcome.steps < episode.cap:
        stamp_ns = round(outcome.steps / WORLD_RATE_HZ * NS_PER_S)
        observation = observe(world, contract, instruction, stamp_ns)
        seed = seed_of('flow', settings.seed, episode.name, outcome.chunks)
        asked = time.perf_counter()
        positions = act(episode, observation, seed).positions
        outcome.policy_seconds += time.perf_counter() - asked
        outcome.chunks += 1
        for row in positions[: min(execute, episode.cap - outcome.steps)]:
            closing = (row[-1] - middle) * toward_closed > 0
            world.step(*disturb(row[:-1], CLOSE if closing else OPEN))
            outcome.steps += 1
            if watch is not None:
                watch(world)
            if world.success():
                outcome.status = 'success'
                return


def check_contract(contract: Contract, settings: Settings) -> None:
    """Raise ValueError where the contract's chunks cannot be played in this world."""
    if contract.action.rate_hz != WORLD_RATE_HZ:
        raise ValueError(
            f'action.rate_hz is {contract.action.rate_hz}; the world steps at {WORLD_RATE_HZ}'
        )
    if not 0 <= settings.execute <= contract.action.horizon:
        raise ValueError(
            f'execute is {settings.execute}; a chunk has {contract.action.horizon} steps'
        )
