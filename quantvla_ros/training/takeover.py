# SPDX-License-Identifier: Apache-2.0
"""Let the policy act, and let the expert take over where it failed (DAgger by take-over).

Starts are drawn from the task files' regions, as for demonstrations. Where the policy does not
reach the goal in time, the expert goes on from the end and from a moment before it; what it then
commands is recorded as a demonstration. Some successes are interrupted too. In some attempts the
hand is forced open once while it carries, or the commands are noisy. Without the expert, the same
attempts undisturbed say how good a policy is, on starts that are not the official ones.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.contract import load_contract
from quantvla_ros.sim.episodes import (
    Disturbance,
    Episode,
    Settings,
    Variant,
    cap_of,
    observe,
    seed_of,
)
from quantvla_ros.sim.expert import Expert
from quantvla_ros.sim.gpus import renders_on
from quantvla_ros.sim.players import PATIENCE_S, BatchedInference
from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.starts import StartSampler
from quantvla_ros.sim.world import CLOSE, OPEN, World
from quantvla_ros.training.demonstrations import (
    CAPS,
    NOISE_RAD,
    Demonstration,
    Recorder,
    prelude,
    solve,
)
from quantvla_ros.training.generate import Task, Worlds, rng_of
from quantvla_ros.training.processes import Say
from quantvla_ros.training.store import write_episodes

EXECUTE = 8
SNAPSHOT_EVERY = 8  # steps
INTERRUPT = 0.3  # share of successes the expert takes over in the middle of
DISTURBED = 0.25  # share of attempts that begin with a prelude
SLIPS, NOISY, NOISY_RAD = 0.15, 0.15, 0.02
PHYSICS = mujoco.mjtState.mjSTATE_FULLPHYSICS


@dataclass(frozen=True)
class Snapshot:
    """A state of the world to return to."""

    physics: np.ndarray
    gripper: np.ndarray


def take_snapshot(world: World) -> Snapshot:
    """Return the present state of the world."""
    state = np.empty(mujoco.mj_stateSize(world.model, PHYSICS))
    mujoco.mj_getState(world.model, world.data, state, PHYSICS)
    return Snapshot(state, world.gripper_action.copy())


def restore(world: World, snapshot: Snapshot) -> None:
    """Return to a state."""
    mujoco.mj_setState(world.model, world.data, snapshot.physics, PHYSICS)
    mujoco.mj_forward(world.model, world.data)
    world.gripper_action = snapshot.gripper.copy()


def roll_out(
    world: World, task: Task, number: int, disturb: Disturbance, connection: Connection
) -> tuple[bool, list[Snapshot]]:
    """Let the policy act until success or the cap; return which, and snapshots on the way."""
    contract = load_contract('libero_panda')
    snapshots: list[Snapshot] = []
    steps, cap = 0, cap_of(task[0])
    while steps < cap:
        snapshots.append(take_snapshot(world))
        observation = observe(world, contract, world.scene.instruction, steps)
        connection.send(('ask', observation, seed_of('takeover', *task, number, steps)))
        positions = connection.recv()
        middle = 0.5 * (contract.gripper.open_position + contract.gripper.closed_position)
        for row in positions[:EXECUTE]:
            world.step(*disturb(row[:-1], CLOSE if row[-1] < middle else OPEN))
            steps += 1
            if world.success():
                return True, snapshots
    return False, [*snapshots, take_snapshot(world)]


def disturbance(task: Task, number: int, settings: Settings) -> Disturbance:
    """Return what an attempt suffers from; the same for every policy."""
    return Disturbance(settings, Episode(Variant(), *task, number, cap_of(task[0])))


def play_alone(
    world: World, task: Task, number: int, sampler: StartSampler, seed: int,
    connection: Connection,
) -> tuple[bool, list[Demonstration]]:
    """Play one undisturbed attempt of the policy from a drawn start; show nothing."""
    sampler.draw(rng_of(task, number, seed)).put(world)
    disturb = disturbance(task, number, Settings(seed=seed))
    return roll_out(world, task, number, disturb, connection)[0], []


def take_over(
    world: World, task: Task, number: int, sampler: StartSampler, seed: int,
    connection: Connection,
) -> tuple[bool, list[Demonstration]]:
    """Play one attempt of the policy; return whether it succeeded and what the expert showed."""
    rng = rng_of(task, number, seed)
    start = sampler.draw(rng)
    start.put(world)
    if rng.random() < DISTURBED:
        kind = str(rng.choice(['elsewhere', 'missed', 'nudged', 'toppled']))
        prelude(kind, world, rng, CAPS[task[0]])
    luck = rng.random()
    slips, noisy = luck < SLIPS, SLIPS <= luck < SLIPS + NOISY
    disturb = disturbance(task, number, Settings(
        seed=seed, slip=slips, noise_rad=NOISY_RAD if noisy else 0.0))
    success, snapshots = roll_out(world, task, number, disturb, connection)
    if success:
        chosen = [int(rng.integers(len(snapshots)))] if rng.random() < INTERRUPT else []
    else:
        chosen = [len(snapshots) - 1, int(rng.integers(len(snapshots) // 4, len(snapshots)))]
    shown = []
    for index in chosen:
        restore(world, snapshots[index])
        recorder = Recorder(world)
        noise = float(rng.choice(NOISE_RAD[:3]))
        if solve(world, Expert(world), recorder, CAPS[task[0]], rng, noise) and recorder.states:
            shown.append(recorder.demonstration('success' if success else 'failure', start))
    return success, shown


def _work(
    connection: Connection, share: Sequence[tuple[Task, int]], folder: str, seed: int,
    textures: Sequence[int], until: float, alone: bool,
) -> None:
    worlds = Worlds(textures)
    samplers: dict[Task, StartSampler] = {}
    attempt = play_alone if alone else take_over
    for task, number in share:
        if time.time() > until:
            break
        world = worlds.world(task, number)
        sampler = samplers.setdefault(task, StartSampler(world))
        sampler.world = world
        try:
            success, shown = attempt(world, task, number, sampler, seed, connection)
        except (ValueError, np.linalg.LinAlgError, OverflowError) as error:
            connection.send(('bad', f'{world.scene.name}/{number}: {error}'))
            continue
        if shown:
            name = f'{world.scene.name}_{seed}_{number:05d}.npz'
            write_episodes(Path(folder) / name, world.scene.name, shown)
        connection.send(('played', world.scene.name, success, len(shown)))
    connection.send(('end',))


def gather(
    shares: Sequence[Sequence[tuple[Task, int]]], model: str, folder: Path, seed: int,
    device: str, textures: Sequence[int], limit_s: float, say: Say, *, alone: bool = False,
) -> dict[str, list[int]]:
    """Play all shares, one process each, computing chunks here; return per task what came of it.

    alone: without disturbance and expert. The lists are attempts, successes of the policy and
    demonstrations by the expert.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context, until = mp.get_context('spawn'), time.time() + limit_s
    settings = Settings(model=model, device=device, batch=min(64, max(2, len(shares))))
    inference = BatchedInference(settings)
    team, live = [], []
    for index, share in enumerate(shares):
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_work,
            args=(theirs, share, str(folder), seed, tuple(textures), until, alone), daemon=True)
        with renders_on(index):
            process.start()
        theirs.close()
        team.append(process)
        live.append(mine)
    found: dict[str, list[int]] = {}
    asked: list[tuple[Connection, Any, int]] = []
    while live and time.time() < until + 60:
        silent = [c for c in live if c not in [a[0] for a in asked]]
        ready = wait(silent, timeout=PATIENCE_S if asked else 1.0) if silent else []
        for connection in ready:
            assert isinstance(connection, Connection)
            _hear(connection, live, asked, found, say)
        if asked and not ready:
            chunks = inference.chunks(Variant(), [(o, s) for _, o, s in asked])
            for (connection, _, _), chunk in zip(asked, chunks, strict=True):
                connection.send(chunk.positions)
            asked = []
    for process in team:
        process.terminate()
        process.join()
    total = np.array(list(found.values())).sum(0) if found else np.zeros(3, int)
    say(f'take-over: {total[0]} attempts, policy solved {total[1]}, expert showed {total[2]}; '
        + ', '.join(f'{name} {row[1]}/{row[0]}' for name, row in sorted(found.items())))
    return found


def _hear(
    connection: Connection, live: list[Connection], asked: list[tuple[Connection, Any, int]],
    found: dict[str, list[int]], say: Say,
) -> None:
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError):
        say('take-over: a process died')
        live.remove(connection)
        return
    if message[0] == 'ask':
        asked.append((connection, message[1], message[2]))
    elif message[0] == 'played':
        row = found.setdefault(message[1], [0, 0, 0])
        for column, value in enumerate((1, int(message[2]), message[3])):
            row[column] += value
    elif message[0] == 'bad':
        say(f'take-over: {message[1]}')
    else:
        live.remove(connection)
