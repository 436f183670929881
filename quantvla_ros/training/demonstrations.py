# SPDX-License-Identifier: Apache-2.0
"""Demonstrations by the scripted expert: disturbed on purpose, labelled cleanly, kept if solved.

An episode may begin with a prelude that is not recorded (an arm elsewhere, a missed grasp, a
dropped, misplaced, nudged or overturned object), so that recoveries are in the data. While it is
recorded, correlated noise is added to what the arm is told, and never to the label (DART). Draws
its starts from the task files' regions only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantvla_ros.sim.expert import Expert
from quantvla_ros.sim.kinematics import top_down
from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.skills import Hold, Move, Segment
from quantvla_ros.sim.starts import Start, StartSampler
from quantvla_ros.sim.world import CLOSE, OPEN, World

CAPS = {'libero_object': 320, 'libero_spatial': 320, 'libero_goal': 380, 'libero_10': 640}
FRAME_EVERY = 3  # steps between two frames that are kept for training
PRELUDES = ('none', 'elsewhere', 'missed', 'dropped', 'misplaced', 'nudged', 'toppled')
PRELUDE_SHARES = (0.4, 0.19, 0.12, 0.12, 0.07, 0.05, 0.05)
NOISE_RAD = (0.0, 0.01, 0.02, 0.035)
NOISE_SHARES = (0.25, 0.25, 0.3, 0.2)
NOISE_MEMORY = 0.85  # of the correlated noise, from step to step
NUDGE_SPIN, TOPPLE_SPIN = (-2.0, 2.0), (7.0, 12.0)  # rad/s
ROLL_STEPS = 14  # until what was pushed lies still
NEAR_THINGS = 0.35  # share of the noise that is left while the hand is slow or closing


@dataclass(frozen=True)
class Demonstration:
    """One solved episode. Rows of states and commands are control steps, frames every third.

    qpos: (frames, nq). states: (steps, 9). commands: (steps, 8), joint targets and gripper -1, 1.
    """

    task: str
    kind: str
    fixtures: dict[str, tuple[np.ndarray, np.ndarray]]
    qpos: np.ndarray
    states: np.ndarray
    commands: np.ndarray


class Recorder:
    """Collects what an expert is asked and answers, step by step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.qpos: list[np.ndarray] = []
        self.states: list[np.ndarray] = []
        self.commands: list[np.ndarray] = []

    def add(self, target: np.ndarray, gripper: float) -> None:
        """Keep the present state with the expert's command for it."""
        if len(self.states) % FRAME_EVERY == 0:
            self.qpos.append(self.world.data.qpos.copy())
        self.states.append(self.world.joint_state())
        self.commands.append(np.append(target, gripper))

    def demonstration(self, kind: str, start: Start) -> Demonstration:
        """Return what was collected."""
        return Demonstration(
            self.world.scene.name, kind, start.fixtures,
            np.array(self.qpos), np.array(self.states), np.array(self.commands))


def solve(
    world: World,
    expert: Expert,
    recorder: Recorder | None,
    cap: int,
    rng: np.random.Generator | None = None,
    noise_rad: float = 0.0,
) -> bool:
    """Let the expert act until the goal holds; return whether it does within the cap.

    The world is told the command plus noise; the recorder keeps the command.
    """
    noise = np.zeros(7)
    fresh = np.sqrt(1 - NOISE_MEMORY**2)
    for _ in range(cap):
        if world.success():
            return True
        target, gripper = expert.command()
        if recorder is not None:
            recorder.add(target, gripper)
        if noise_rad and rng is not None:
            noise = NOISE_MEMORY * noise + fresh * noise_rad * rng.standard_normal(7)
        world.step(target + _share(expert) * noise, gripper)
    return world.success()


def _share(expert: Expert) -> float:
    """How much of the noise is let through: little where fingers meet things."""
    segment = expert.queue[0] if expert.queue else None
    if isinstance(segment, Hold):
        return 0.15
    slow = isinstance(segment, Move) and segment.speed < 0.25
    return NEAR_THINGS if slow else 1.0


def demonstrate(world: World, sampler: StartSampler, rng: np.random.Generator) -> (
    Demonstration | None
):
    """Draw a start, perhaps disturb it, and record the expert; None when it fails."""
    start = sampler.draw(rng)
    start.put(world)
    cap = CAPS.get(world.scene.suite, 500)
    kind = str(rng.choice(PRELUDES, p=PRELUDE_SHARES))
    if not prelude(kind, world, rng, cap) or world.success():
        return None
    expert, recorder = Expert(world), Recorder(world)
    noise_rad = float(rng.choice(NOISE_RAD, p=NOISE_SHARES))
    if not solve(world, expert, recorder, cap, rng, noise_rad):
        return None
    return recorder.demonstration(kind, start)


# -- preludes ----------------------------------------------------------------------------------


def prelude(kind: str, world: World, rng: np.random.Generator, cap: int) -> bool:
    """Bring the world into a state worth recovering from; return whether it worked."""
    if kind == 'elsewhere':
        position, _ = Expert(world).arm.pose()
        spot = position + rng.uniform([-0.08, -0.18, -0.15], [0.15, 0.18, 0.08])
        _run(world, [_hover(spot, rng, CLOSE if rng.random() < 0.25 else OPEN)])
    elif kind == 'missed':
        _miss(world, rng)
    elif kind in ('dropped', 'misplaced'):
        return _lose(kind, world, rng, cap)
    elif kind == 'nudged':
        _push(world, rng, rng.uniform(0.2, 0.7), NUDGE_SPIN)
    elif kind == 'toppled':
        _push(world, rng, 0.0, TOPPLE_SPIN)
    return bool(np.isfinite(world.data.qpos).all())


def _hover(spot: np.ndarray, rng: np.random.Generator, gripper: float) -> Move:
    return Move(spot, top_down(float(rng.uniform(-0.4, 0.4))), gripper, speed=0.6, settle=4)


def _run(world: World, segments: list[Segment]) -> None:
    """Play segments that no planner chose."""
    expert = Expert(world)
    expert.queue = list(segments)
    while expert.queue:
        world.step(*expert.command())


def _wanted(world: World) -> list[str]:
    """Things the goal moves."""
    return [c[1] for c in world.scene.goal
            if c[1] in world.scene.things and world.thing_qpos(c[1]) is not None]


def _miss(world: World, rng: np.random.Generator) -> None:
    """A closed, empty hand close to something that is to be taken."""
    things = _wanted(world) or [n for n in world.scene.things if world.thing_qpos(n) is not None]
    around = Expert(world).around
    points = around.points(str(rng.choice(things)))
    spot = points.mean(0)
    spot[:2] += rng.uniform(-0.05, 0.05, 2)
    spot[2] = points[:, 2].max() + rng.uniform(0.03, 0.14)
    _run(world, [_hover(spot, rng, CLOSE)])


def _lose(kind: str, world: World, rng: np.random.Generator, cap: int) -> bool:
    """Let the expert carry something, then open the hand on the way or beside the goal."""
    if not _wanted(world):
        return False
    expert = Expert(world)
    wait = int(rng.integers(2, 30)) if kind == 'dropped' else cap
    for _ in range(cap):
        if world.success():
            return False
        held = expert.carried is not None and expert.gripper > 0
        if held:
            wait -= 1
            releasing = any(isinstance(s, Hold) for s in expert.queue[:1])
            if wait <= 0 or (kind == 'misplaced' and releasing):
                break
        target, gripper = expert.command()
        if kind == 'misplaced' and held and isinstance(expert.queue[0] if expert.queue else None,
                                                      Move):
            _shift_once(expert, rng)
        world.step(target, gripper)
    else:
        return False
    for _ in range(int(rng.integers(5, 12))):
        world.step(expert.target, OPEN)
    return True


def _shift_once(expert: Expert, rng: np.random.Generator) -> None:
    """Move the end of the present plan sideways, by more than a goal forgives."""
    if getattr(expert, 'shifted', None) is expert.carried:
        return
    expert.shifted = expert.carried  # type: ignore[attr-defined]
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.035, 0.10)
    shift = far * np.array([np.cos(angle), np.sin(angle), 0.0])
    expert.queue = [
        Move(s.position + shift, s.rotation, s.gripper, s.speed, s.settle)
        if isinstance(s, Move) else s for s in expert.queue
    ]


def _push(
    world: World, rng: np.random.Generator, speed: float, spin: tuple[float, float]
) -> None:
    """Push what is to be taken, as a clumsy hand would: along the table, or over.

    speed: m/s along the table. spin: range in rad/s about an axis in the plane.
    """
    wanted = _wanted(world)
    if not wanted:
        return
    joint = world.model.body_jntadr[world.thing_body(str(rng.choice(wanted)))]
    dof = world.model.jnt_dofadr[joint]
    angle = rng.uniform(0, 2 * np.pi)
    along = np.array([np.cos(angle), np.sin(angle), 0.0])
    world.data.qvel[dof : dof + 3] = speed * along
    over = rng.uniform(*spin) * np.array([-along[1], along[0], 0.0])
    matrix = world.data.xmat[world.model.jnt_bodyid[joint]].reshape(3, 3)
    world.data.qvel[dof + 3 : dof + 6] = matrix.T @ over  # of a free joint, in the body's frame
    mujoco.mj_forward(world.model, world.data)
    hold = world.arm_positions().copy()
    for _ in range(ROLL_STEPS):
        world.step(hold, OPEN)
