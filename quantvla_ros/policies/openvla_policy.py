# SPDX-License-Identifier: Apache-2.0
"""OpenVLA and OpenVLA-OFT as a Policy: folder and contract in, chunks out.

OpenVLA gives a chunk of one step, OpenVLA-OFT as many as the contract's model.horizon says (8 for
LIBERO, 25 for ALOHA, 5 for Bridge as published). Nothing is random, so the seed changes nothing,
and there is no flow to guide, so a prefix changes nothing either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.agreement import read_agreement
from quantvla_ros.policies.base import PolicySettings, Prospect
from quantvla_ros.policies.door import Door
from quantvla_ros.policies.folders import identify
from quantvla_ros.policies.loading import DTYPES, Install, install
from quantvla_ros.policies.openvla_folder import (
    bin_centres,
    bounded,
    is_oft,
    openvla_network,
    read_statistics,
)
from quantvla_ros.policies.prospect import folder_prospect
from quantvla_ros.policies.threads import take_threads
from quantvla_ros.policies.tokenizers import load_tokenizer, openvla_prompt

EMPTY = '\u2581'  # the empty word that stands before every action


@dataclass(frozen=True)
class Read:
    """One observation, read: context of the words (OpenVLA) or the chunk itself (OFT)."""

    context: Any
    measured: np.ndarray
    stamp_ns: int


class OpenVlaPolicy:
    """A policy from an OpenVLA folder. Raises ValueError when anything does not fit."""

    def __init__(
        self, contract: Contract, settings: PolicySettings, install: Install = install
    ) -> None:
        if settings.threads:
            take_threads(settings.threads, settings.device)
        self.contract = contract
        agreement = read_agreement(contract)
        folder = identify(Path(settings.model).expanduser())
        if folder.family != 'openvla':
            raise ValueError(f'{folder.path} is {folder.family}; set policy to that')
        self.oft = is_oft(folder.path)
        if not self.oft and contract.action.horizon != 1:
            raise ValueError(
                f'action.horizon is {contract.action.horizon}; OpenVLA gives chunks of 1 step'
            )
        stats = read_statistics(folder, agreement.statistics)
        action = bounded(stats['action'], 1e-8 if self.oft else 0.0)
        stored = openvla_network(folder, agreement.horizon, action.size)
        self.model = stored.model
        self.dtype = DTYPES.get(settings.precision, torch.float32)
        self.device = torch.device(settings.device)
        proprio = self.model.config.proprio
        state = bounded(stats['proprio'], 1e-8) if proprio else None
        self.door = Door(contract, agreement, (), state, action)
        self.tokenizer = load_tokenizer(folder.path, agreement.tokenizer, 'openvla')
        self.origin = install(stored, folder, settings.precision, settings.device)

    @classmethod
    def look_ahead(cls, contract: Contract, settings: PolicySettings) -> Prospect:
        """Tell what would be read: see policies.base.look_ahead."""
        del contract
        return folder_prospect(settings)

    def words(self, instruction: str) -> list[int]:
        """Begin mark, question, and the empty word before the answer."""
        asked = self.tokenizer.encode(openvla_prompt(instruction))
        empty = self.tokenizer.token(EMPTY)
        tail = [] if asked[-1:] == [empty] else [empty]
        return [self.tokenizer.token('<s>'), *asked, *tail]

    @torch.inference_mode()
    def prepare(self, observation: Observation) -> Read:
        """Read one observation. Raises ValueError where it does not fit the contract."""
        measured = self.door.measured(observation)
        frames = self.door.images(observation, self.model.config.first.image)
        images = (frames.to(self.device).float() / 255.0 * 2.0 - 1.0).to(self.dtype)
        words = torch.tensor(self.words(observation.instruction), device=self.device)
        if not self.oft:
            return Read(self.model.prefix(images, words), measured, observation.stamp_ns)
        state = None
        if self.model.config.proprio:
            state = torch.from_numpy(self.door.state(measured)).to(self.device, self.dtype)
        chunk = self.model.regress(images, words, state).float().cpu().numpy()
        return Read(chunk, measured, observation.stamp_ns)

    @torch.inference_mode()
    def denoise(self, context: Read, seed: int, prefix: ActionChunk | None = None) -> ActionChunk:
        """Return the chunk that starts at the observation's stamp."""
        del seed, prefix
        action = context.context
        if not self.oft:
            centres = bin_centres()
            bins = self.model.config.words - np.array(self.model.tokens(action))
            action = centres[np.clip(bins - 1, 0, len(centres) - 1)][None]
        return self.door.chunk(action, context.measured, context.stamp_ns)

    def reset(self) -> None:
        """Hold nothing of an episode, so forget nothing."""
