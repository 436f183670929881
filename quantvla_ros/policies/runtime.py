# SPDX-License-Identifier: Apache-2.0
"""A published flow-matching checkpoint as a Policy: folder and contract in, chunks out.

Reads the folder, drops what no action needs, keeps a table of the fixed denoising times, and runs
the shared flow loop. Deterministic: a chunk depends on observation, seed and prefix alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies import flow, rtc
from quantvla_ros.policies.agreement import read_agreement
from quantvla_ros.policies.base import PolicySettings, Prospect
from quantvla_ros.policies.door import Door
from quantvla_ros.policies.folders import Served, identify
from quantvla_ros.policies.loading import PLANNED, Install, dtype_of, fixed_times, install
from quantvla_ros.policies.prospect import folder_prospect
from quantvla_ros.policies.threads import take_threads
from quantvla_ros.quant.linear import denoising_step

# family -> 'module:function' that reads a folder of it
OPENERS = {
    'pi05': 'quantvla_ros.policies.pi_folder:open_pi',
    'pi0': 'quantvla_ros.policies.pi_folder:open_pi',
    'groot_n15': 'quantvla_ros.policies.groot_folder:open_groot',
    'smolvla': 'quantvla_ros.policies.smolvla_folder:open_smolvla',
}


@dataclass(frozen=True)
class Prepared:
    """One encoded observation: the network's context, and what the chunk starts from."""

    context: Any
    measured: np.ndarray  # (joints,) SI, in the contract's order
    stamp_ns: int


def opener(family: str) -> Callable[..., Served]:
    """Return the function that reads folders of a family."""
    module, _, name = OPENERS[family].partition(':')
    return getattr(importlib.import_module(module), name)


class FlowPolicy:
    """A policy from a folder that users have. Raises ValueError when anything does not fit.

    origin: where its layers came from, in words.
    """

    def __init__(
        self, contract: Contract, settings: PolicySettings, install: Install = install
    ) -> None:
        if not settings.model:
            raise ValueError('model is empty; name the folder of a checkpoint')
        if settings.threads:
            take_threads(settings.threads, settings.device)
        agreement = read_agreement(contract)
        folder = identify(Path(settings.model).expanduser())
        if folder.family not in OPENERS:
            raise ValueError(
                f'{folder.path} is {folder.family}, which does not denoise a chunk; '
                'set policy to the family of the folder'
            )
        served = opener(folder.family)(folder, agreement, settings)
        self.contract, self.served = contract, served
        self.door = Door(contract, agreement, served.slots, served.state, served.action)
        self.dtype = dtype_of(settings.precision, settings.device)
        self.device = torch.device(settings.device)
        self.steps = served.steps
        self.conditions, self.savings = fixed_times(
            served.stored, self.steps, self.dtype, settings.device
        )
        self.origin = install(served.stored, folder, settings.precision, settings.device)
        self.model = served.stored.model
        self.engine: Any = None
        if self.device.type == 'cuda' and folder.family in PLANNED:
            # imported here: Triton must not be loaded by a process that runs on the CPU
            from quantvla_ros.policies.cuda_engine import CudaEngine

            self.engine = CudaEngine(
                folder.family, self.model, self.conditions, device=self.device, dtype=self.dtype,
                words=int(folder.config.get('tokenizer_max_length', 0)))

    @classmethod
    def look_ahead(cls, contract: Contract, settings: PolicySettings) -> Prospect:
        """Tell what would be read: see policies.base.look_ahead."""
        del contract
        return folder_prospect(settings)

    @torch.inference_mode()
    def prepare(self, observation: Observation) -> Prepared:
        """Encode one observation. Raises ValueError where it does not fit the contract."""
        measured = self.door.measured(observation)
        state = self.door.state(measured)
        frames = self.door.images(observation, self.served.image)
        words = self.served.words(observation.instruction, state)
        padded = np.zeros(self.served.state_width, np.float32)
        padded[: len(state)] = state[: self.served.state_width]
        if self.engine is not None:
            scene = self.engine.prefix(frames, words, torch.from_numpy(padded))
            return Prepared(scene, measured, observation.stamp_ns)
        context = self.model.prefix(
            (frames.to(self.device).float() / 255.0 * 2.0 - 1.0).to(self.dtype),
            torch.tensor(words, device=self.device),
            torch.from_numpy(padded).to(self.device, self.dtype),
        )
        return Prepared(context, measured, observation.stamp_ns)

    @torch.inference_mode()
    def denoise(
        self, context: Prepared, seed: int, prefix: ActionChunk | None = None
    ) -> ActionChunk:
        """Return the chunk that starts at the observation's stamp."""
        start = torch.from_numpy(flow.noise(seed, (1, *self.served.chunk)))
        guidance = None if prefix is None else self._guidance(context, prefix)
        if self.engine is not None:
            chunk = self.engine.chunk(context.context, start, guidance)[0]
            return self.door.chunk(chunk.numpy(), context.measured, context.stamp_ns)
        sign = -1.0 if self.model.NOISE_TIME == 1.0 else 1.0

        def velocity(x: Tensor, step: int) -> Tensor:
            with denoising_step(step):
                v = self.model.velocity(context.context, x.to(self.dtype), self.conditions[step])
            return sign * v.float()

        chunk = flow.denoise(velocity, start.to(self.device), self.steps, guidance)[0]
        return self.door.chunk(chunk.cpu().numpy(), context.measured, context.stamp_ns)

    def reset(self) -> None:
        """Hold nothing of an episode, so forget nothing."""

    def _guidance(self, context: Prepared, prefix: ActionChunk) -> flow.PrefixGuidance | None:
        horizon, width = self.served.chunk

        def to_model(targets: np.ndarray) -> np.ndarray:
            padded = np.zeros((horizon, width), np.float32)
            own = self.door.normalise(targets, context.measured)
            padded[:, : own.shape[1]] = own
            return padded

        return rtc.prefix_guidance(
            prefix, context.stamp_ns, self.contract.action, horizon, to_model,
            device=str(self.device),
        )
