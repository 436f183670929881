# SPDX-License-Identifier: Apache-2.0
"""The policy that ships: Observation in, ActionChunk out, around a LiberoVlaNet.

Owns the one door between SI and the network's normalised units (Door), and the policy that loads
a model folder, prepares and denoises (LiberoVla). Refuses a contract, an observation or an
instruction that does not fit the checkpoint. Touches no topic and no clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies import flow
from quantvla_ros.policies.base import PolicySettings, Prospect
from quantvla_ros.policies.libero_checkpoint import WEIGHTS, Checkpoint, read_checkpoint
from quantvla_ros.policies.libero_graph import RecordedChunks
from quantvla_ros.policies.libero_looks import HEAD, Seen, hooked
from quantvla_ros.policies.libero_program import ChunkProgram, RecordedContext
from quantvla_ros.policies.libero_quantized import find_artifact, read_quantized
from quantvla_ros.policies.libero_vla import Context, LiberoVlaNet
from quantvla_ros.policies.threads import one_thread_of_torch, take_threads
from quantvla_ros.quant.calibrated import NEWEST, Calibration, find_calibration
from quantvla_ros.quant.linear import denoising_step
from quantvla_ros.resources import share_path

DTYPES = {'float': torch.float32, 'bfloat16': torch.bfloat16}
# What loading takes at its peak, as multiples of the bytes on disk: float16 is read and becomes
# float32; integer layers are read and brought into the order of the kernels.
FLOAT_LOAD, INTEGER_LOAD = 3, 2


class Door:
    """Observation -> tensors and tensors -> ActionChunk: the only place where units change.

    The last action joint is the gripper: the network's value above zero means close, and becomes
    the contract's closed position, else the open one. The other joints leave the network as
    differences to the measured position and leave the door as absolute targets.
    """

    def __init__(self, checkpoint: Checkpoint, contract: Contract) -> None:
        problems = _contract_problems(checkpoint, contract)
        if problems:
            raise ValueError(
                'the contract does not fit the checkpoint:\n  ' + '\n  '.join(problems)
            )
        self.contract = contract
        self.vocabulary = checkpoint.vocabulary
        self.statistics = checkpoint.statistics
        self.image = checkpoint.config.image
        names = contract.joints.names
        self._arm = [names.index(name) for name in contract.action.joints[:-1]]

    def images(self, observation: Observation) -> np.ndarray:
        """Return the frames of all cameras, (views, image, image, 3) uint8."""
        missing = [name for name in self.contract.camera_names if name not in observation.images]
        if missing:
            raise ValueError(f'the observation lacks camera {", ".join(missing)}')
        frames = [observation.images[name] for name in self.contract.camera_names]
        for name, frame in zip(self.contract.camera_names, frames, strict=True):
            if frame.shape[:2] != (self.image, self.image):
                raise ValueError(
                    f'camera {name!r} is {frame.shape[1]}x{frame.shape[0]}; the policy reads '
                    f'{self.image}x{self.image}; set policy.width and policy.height in the '
                    'contract'
                )
        return np.stack(frames)

    def state(self, observation: Observation) -> np.ndarray:
        """Return the measured joints in the contract's order, SI."""
        missing = [n for n in self.contract.joints.names if n not in observation.joint_names]
        if missing:
            raise ValueError(f'the observation lacks joint {", ".join(missing)}')
        order = [observation.joint_names.index(name) for name in self.contract.joints.names]
        return observation.joint_positions[order]

    def normalize_state(self, state: np.ndarray) -> np.ndarray:
        """SI -> the network's units, (..., state) float32."""
        mean, std = self.statistics.state_mean, self.statistics.state_std
        return ((state - mean) / std).astype(np.float32)

    def normalize_action(self, positions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Absolute targets (chunk, joints) in SI -> the network's units, float32."""
        gripper = self.contract.gripper
        middle = 0.5 * (gripper.open_position + gripper.closed_position)
        toward_closed = np.sign(gripper.closed_position - gripper.open_position)
        action = np.array(positions, dtype=np.float64)
        action[:, :-1] -= state[self._arm]
        action[:, -1] = np.where((positions[:, -1] - middle) * toward_closed > 0, 1.0, -1.0)
        rows = slice(0, len(action))
        mean, std = self.statistics.action_mean[rows], self.statistics.action_std[rows]
        return ((action - mean) / std).astype(np.float32)

    def chunk(self, action: np.ndarray, state: np.ndarray, stamp_ns: int) -> ActionChunk:
        """The network's units (chunk, action) -> absolute targets in SI."""
        gripper = self.contract.gripper
        action = action.astype(np.float64) * self.statistics.action_std
        positions = action + self.statistics.action_mean
        closed = positions[:, -1] > 0
        positions[:, :-1] += state[self._arm]
        positions[:, -1] = np.where(closed, gripper.closed_position, gripper.open_position)
        names, step_dt_s = self.contract.action.joints, self.contract.action.step_dt_s
        return ActionChunk(names, positions, stamp_ns, step_dt_s)


def _contract_problems(checkpoint: Checkpoint, contract: Contract) -> list[str]:
    """List what the contract promises and the checkpoint cannot serve."""
    config, action = checkpoint.config, contract.action
    expected = {
        'policy': (contract.policy, checkpoint.contract),
        'number of cameras': (len(contract.cameras), config.views),
        'number of joints.names': (len(contract.joints.names), config.state),
        'number of action.joints': (len(action.joints), config.action),
        'action.horizon': (action.horizon, config.chunk),
        'action.kind': (action.kind, 'absolute'),
        'gripper.kind': (contract.gripper.kind, 'joint'),
        'gripper.joint': (contract.gripper.joint, action.joints[-1]),
    }
    return [
        f'{what} is {seen!r}; the checkpoint needs {needed!r}'
        for what, (seen, needed) in expected.items()
        if seen != needed
    ]


@dataclass(frozen=True)
class Prepared:
    """Some encoded observations: the network's context, and what the chunks start from."""

    context: Context | list[RecordedContext]
    states: np.ndarray  # (batch, joints) SI
    stamps_ns: tuple[int, ...]


class LiberoVla:
    """The shipped policy. Deterministic: a chunk depends on observation, seed and prefix alone.

    calibrated: name of the calibration in it, '' for none; calibration: what that says.
    """

    calibration: Calibration | None = None
    calibrated: str = ''

    def __init__(self, contract: Contract, settings: PolicySettings) -> None:
        folder = Path(settings.model) if settings.model else share_path('models/libero_panda')
        if settings.precision in DTYPES:
            if settings.calibration:
                raise ValueError(
                    f'precision {settings.precision!r} has nothing to calibrate, and calibration '
                    f'is {settings.calibration!r}; set it to empty'
                )
            self._start(contract, settings, *read_checkpoint(folder))
            return
        found = read_quantized(
            folder, settings.precision, settings.device, settings.calibration
        )
        self._start(contract, settings, found.checkpoint, found.net, record=found.record)
        self.calibration, self.calibrated = found.calibration, found.calibrated

    @classmethod
    def look_ahead(cls, contract: Contract, settings: PolicySettings) -> Prospect:
        """Tell what would be read: see policies.base.look_ahead."""
        folder = Path(settings.model) if settings.model else share_path('models/libero_panda')
        if settings.precision in DTYPES:
            return Prospect(FLOAT_LOAD * (folder / WEIGHTS).stat().st_size)
        artifact = find_artifact(folder, settings.precision)
        if settings.calibration not in ('', NEWEST):
            find_calibration(artifact, settings.calibration)
        stored = sum(path.stat().st_size for path in artifact.glob('*.safetensors'))
        return Prospect(INTEGER_LOAD * stored, artifact)

    @classmethod
    def around(
        cls,
        contract: Contract,
        settings: PolicySettings,
        checkpoint: Checkpoint,
        net: LiberoVlaNet,
    ) -> LiberoVla:
        """Make a policy of a network that is in memory already."""
        policy = cls.__new__(cls)
        policy._start(contract, settings, checkpoint, net)
        return policy

    def _start(
        self,
        contract: Contract,
        settings: PolicySettings,
        checkpoint: Checkpoint,
        net: LiberoVlaNet,
        *,
        record: bool = False,
    ) -> None:
        if settings.threads:
            take_threads(settings.threads, settings.device)
        if settings.device != 'cpu':
            torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as on the CPU
        self.contract = contract
        self.config = checkpoint.config
        self.door = Door(checkpoint, contract)
        self.device = torch.device(settings.device)
        self.precision = settings.precision
        self.dtype = DTYPES.get(settings.precision, torch.float32)
        self._recorded: dict[int, RecordedChunks] = {}
        self.steps = settings.steps or checkpoint.steps
        self.program = ChunkProgram(net, steps=self.steps) if record else None
        self.tabulate(net)
        self.net = net if record else net.to(self.device, self.dtype)

    def tabulate(self, net: LiberoVlaNet) -> None:
        """Compute what depends on the time alone, once for all chunks: the modulation.

        (steps, blocks, PARTS, 1, width); again when the layers that make it have changed.
        """
        times = torch.tensor(flow.flow_times(self.steps))
        with torch.inference_mode(), one_thread_of_torch():
            table = net.modulation(times.to(net.action.time_in.weight.device))
        self.modulation = table.to(self.device, self.dtype)

    def prepare(self, observation: Observation) -> Prepared:
        """Encode one observation. Raises ValueError on unknown words or another camera size."""
        return self.prepare_batch([observation])

    def denoise(
        self, context: Prepared, seed: int, prefix: ActionChunk | None = None
    ) -> ActionChunk:
        """Return the chunk that starts at the observation's stamp."""
        guidance = None if prefix is None else self._guidance(context, prefix)
        return self.denoise_batch(context, [seed], guidance)[0]

    def reset(self) -> None:
        """Hold nothing of an episode, so forget nothing."""

    @contextmanager
    def watching(self, turn: int) -> Iterator[Seen]:
        """Look at the chunk that is made inside, of a recorded network at one denoising step."""
        seen = Seen()
        if self.program is None:
            with hooked(self.net, seen):
                yield seen
            return
        self.program.see = (seen.add, turn)
        try:
            yield seen
        finally:
            self.program.see = None
            names = (*seen.inputs, *seen.spreads)
            seen.partial = frozenset(name for name in names if name.startswith(HEAD))

    def encode(self, observations: Sequence[Observation]) -> tuple[Context, np.ndarray]:
        """Return the network's context and the measured states, (batch, joints) SI.

        Keeps gradients where they are asked for, so that calibration can ask what the action
        feels; prepare_batch runs it without.
        """
        tensors, states = self._inputs(observations)
        return self.net.prefix(*tensors), states

    def _inputs(
        self, observations: Sequence[Observation]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], np.ndarray]:
        """Return images, words and state as the network reads them, and the states in SI."""
        states = np.stack([self.door.state(observation) for observation in observations])
        frames = np.stack([self.door.images(o) for o in observations])
        words = np.stack([self.door.vocabulary.encode(o.instruction) for o in observations])
        if self.device.type == 'cpu':
            # numpy: the same numbers, and no thread of torch that spins on a core of the kernels
            scaled = torch.from_numpy(
                frames.astype(np.float32) / np.float32(127.5) - np.float32(1.0))
        else:
            scaled = torch.from_numpy(frames).to(self.device).float() / 127.5 - 1.0
        images = scaled.permute(0, 1, 4, 2, 3)
        normalized = torch.from_numpy(self.door.normalize_state(states))
        return (
            images.to(self.dtype),
            torch.from_numpy(words).to(self.device),
            normalized.to(self.device, self.dtype),
        ), states

    @torch.inference_mode()
    def prepare_batch(self, observations: Sequence[Observation]) -> Prepared:
        """Encode several observations at once."""
        stamps_ns = tuple(o.stamp_ns for o in observations)
        if self.program is None:
            context, states = self.encode(observations)
            return Prepared(context, states, stamps_ns)
        inputs = [self._inputs([observation]) for observation in observations]
        recorded = [self.program.prefix(*tensors) for tensors, _ in inputs]
        return Prepared(recorded, np.concatenate([states for _, states in inputs]), stamps_ns)

    @torch.inference_mode()
    def velocity(self, prepared: Prepared, x: Tensor, step: int) -> Tensor:
        """Velocity (batch, steps, action) of noisy normalised chunks at one denoising step."""
        context = prepared.context
        if isinstance(context, list):
            assert self.program is not None
            each = zip(context, x.split(1), strict=True)
            return torch.cat([self.program.velocity(c, part, step) for c, part in each])
        modulation = self.modulation[step : step + 1]
        with denoising_step(step):
            return self.net.velocity(context, x.to(self.dtype), modulation).float()

    @torch.inference_mode()
    def denoise_batch(
        self,
        prepared: Prepared,
        seeds: Sequence[int],
        guidance: flow.PrefixGuidance | None = None,
    ) -> list[ActionChunk]:
        """Return one chunk for each prepared observation, each from the noise of its own seed."""
        shape = (self.config.chunk, self.config.action)
        start = torch.from_numpy(np.stack([flow.noise(seed, shape) for seed in seeds]))

        def velocity(x: Tensor, step: int) -> Tensor:
            return self.velocity(prepared, x, step)

        chunks = flow.denoise(velocity, start.to(self.device), self.steps, guidance)
        return self._leave(chunks, prepared.states, prepared.stamps_ns)

    @torch.inference_mode()
    def chunks(
        self, observations: Sequence[Observation], seeds: Sequence[int]
    ) -> list[ActionChunk]:
        """Return one chunk for each observation; on a GPU by a recorded graph for this many."""
        if self.device.type != 'cuda' or self.precision not in DTYPES:
            return self.denoise_batch(self.prepare_batch(observations), seeds)
        shape = (self.config.chunk, self.config.action)
        start = torch.from_numpy(np.stack([flow.noise(seed, shape) for seed in seeds]))
        tensors, states = self._inputs(observations)
        inputs = (*tensors, start.to(self.device))
        if len(seeds) not in self._recorded:
            self._recorded[len(seeds)] = RecordedChunks(self._chunk_of, inputs)
        chunks = self._recorded[len(seeds)](*inputs)
        return self._leave(chunks, states, [o.stamp_ns for o in observations])

    def _chunk_of(self, images: Tensor, words: Tensor, state: Tensor, start: Tensor) -> Tensor:
        """Normalised observations and noise -> normalised chunks, by device work alone."""
        prepared = Prepared(self.net.prefix(images, words, state), np.empty(0), ())
        return flow.denoise(lambda x, step: self.velocity(prepared, x, step), start, self.steps)

    def _leave(
        self, chunks: Tensor, states: np.ndarray, stamps_ns: Sequence[int]
    ) -> list[ActionChunk]:
        return [
            self.door.chunk(action, state, stamp_ns)
            for action, state, stamp_ns in zip(
                chunks.cpu().numpy(), states, stamps_ns, strict=True
            )
        ]

    def _guidance(self, context: Prepared, prefix: ActionChunk) -> flow.PrefixGuidance | None:
        """Resample a prefix at this chunk's steps; None where it covers none of them.

        The first half of the covered steps counts as executed by the time this chunk arrives.
        """
        state, stamp_ns = context.states[0], context.stamps_ns[0]
        action = self.contract.action
        if prefix.joint_names != action.joints:
            raise ValueError(
                f'the prefix moves {", ".join(prefix.joint_names)}; '
                f'expected {", ".join(action.joints)}'
            )
        at_s = np.arange(action.horizon) * action.step_dt_s
        offset_s = (prefix.stamp_ns - stamp_ns) / NS_PER_S
        known_s = offset_s + np.arange(prefix.horizon) * prefix.step_dt_s
        overlap = int(np.sum(at_s <= known_s[-1] + 1e-9))
        if overlap == 0:
            return None
        target = np.stack([np.interp(at_s, known_s, column) for column in prefix.positions.T], 1)
        weights = flow.prefix_weights((overlap + 1) // 2, overlap, action.horizon)
        return flow.PrefixGuidance(
            torch.from_numpy(self.door.normalize_action(target, state))[None].to(self.device),
            torch.from_numpy(weights.astype(np.float32)).to(self.device),
        )
