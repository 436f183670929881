# SPDX-License-Identifier: Apache-2.0
"""One network that recipes are tried on: its frames, its float actions, what it tells recipes.

Quantizes copies of it, in simulation (quant/simulate.py), and judges what they do on frames of
episodes that calibrated nothing. What is costly is measured at the first use and kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from quantvla_ros.bench.recipes_cells import Row, fingerprint
from quantvla_ros.calibration.frames_file import read_all
from quantvla_ros.calibration.pipeline import ask_policy, quantize_policy
from quantvla_ros.calibration.policy_runs import action_error, chunks, chunks_by_stride
from quantvla_ros.calibration.stress import channel_peaks, telling
from quantvla_ros.calibration.stress_twin import stress
from quantvla_ros.contract import Contract, load_contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_checkpoint import Checkpoint, read_checkpoint, read_settings
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.policies.libero_vla import LiberoVlaNet
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.convert import Known
from quantvla_ros.quant.layout import weight_bytes
from quantvla_ros.quant.literal import LITERALS, put_literal
from quantvla_ros.quant.observe import InputStatistics
from quantvla_ros.quant.recipes import Recipe
from quantvla_ros.quant.scheme import FLOAT, parse_scheme
from quantvla_ros.quant.simulate import simulate

FLOOR = 'another noise seed'
FEWER_STEPS = (5, 2, 1)
FEW = 2  # denoising steps of the second measure
HELD_SEED = 1 << 20


@dataclass(frozen=True)
class Setting:
    """What subjects are made from; small, so that it can be sent to other processes.

    limit: frames to use. threads: of the network, 0 for torch's own choice.
    """

    model: Path
    frames: tuple[Path, ...]
    limit: int
    device: str = 'cpu'
    threads: int = 0
    seed: int = 0


class Subject:
    """One network in float, with what it does on the frames and what it tells recipes."""

    def __init__(
        self,
        name: str,
        contract: Contract,
        settings: PolicySettings,
        checkpoint: Checkpoint,
        net: LiberoVlaNet,
        frames: tuple[Sequence[Observation], Sequence[Observation]],
        seed: int,
    ) -> None:
        self.name, self.contract, self.settings = name, contract, settings
        self.checkpoint, self.net, self.seed = checkpoint, net, seed
        self.fitted, self.held = frames
        self.sites = libero_vla_sites(net)

    def save(self, path: Path, *, known: bool) -> None:
        """Write the weights and what was measured; known: also what recipes need to know."""
        reference = {stride: torch.from_numpy(x) for stride, x in self.reference.items()}
        told = {'net': self.net.state_dict(), 'reference': reference}
        if known:
            told['seen'] = {name: vars(found) for name, found in self.known.seen.items()}
            told['errors'] = dict(self.known.errors)
        torch.save(told, path)

    def load(self, path: Path) -> None:
        """Take back what save() wrote, mapped into memory: processes share its pages."""
        told = torch.load(path, mmap=True, weights_only=True)
        self.net.load_state_dict(told['net'])
        self.reference = {stride: x.numpy() for stride, x in told['reference'].items()}
        if 'seen' in told:
            seen = {name: InputStatistics(found['k']) for name, found in told['seen'].items()}
            for name, found in seen.items():
                vars(found).update(told['seen'][name])
            self.known = Known(seen, told['errors'])

    def policy(self) -> LiberoVla:
        """Make a float policy of its own copy of the network."""
        settings = PolicySettings(device=self.settings.device, threads=self.settings.threads)
        net = copy.deepcopy(self.net)
        return LiberoVla.around(self.contract, settings, self.checkpoint, net)

    @cached_property
    def few_stride(self) -> int:
        """How many of the policy's denoising steps one of FEW takes the place of."""
        return max(1, self.policy().steps // FEW)

    @cached_property
    def reference(self) -> dict[int, np.ndarray]:
        """Chunks of the held-out frames in float, by stride."""
        policy = self.policy()
        strides = {policy.steps // n for n in FEWER_STEPS if policy.steps % n == 0}
        return chunks_by_stride(
            policy, self.held, HELD_SEED, sorted({1, self.few_stride} | strides))

    @cached_property
    def known(self) -> Known:
        """What one-pass recipes need."""
        return ask_policy(self.policy(), self.fitted, self.seed)

    def needed(self, recipe: Recipe) -> Known:
        """What one recipe needs to know; nothing of the frames where it does not look at them."""
        if recipe.needs_frames:
            return self.known
        return Known({s.name: InputStatistics(s.in_features) for s in self.sites.linears}, {})

    def row(
        self, recipe: str, precision: str, found: np.ndarray, few: np.ndarray | None,
        nbytes: int, began: float, made_by: str,
    ) -> Row:
        """Judge chunks of the held-out frames; few: those at FEW denoising steps."""
        execute = self.contract.action.execute
        error = action_error(found, self.reference[1], execute)
        fewer = self.reference[self.few_stride]
        few_mrad = 0.0 if few is None else action_error(few, fewer, execute).mean_mrad
        return Row(self.name, recipe, precision, error.mean_mrad, error.p95_mrad, few_mrad,
                   error.gripper, nbytes, time.monotonic() - began, made_by)

    def float_rows(self) -> Iterator[Row]:
        """Another noise seed, and fewer denoising steps."""
        nbytes, began = self.linear_bytes({}), time.monotonic()
        other = chunks(self.policy(), self.held, 2 * HELD_SEED)
        yield self.row(FLOOR, 'float', other, None, nbytes, began, FLOOR)
        steps = self.policy().steps
        for count in FEWER_STEPS:
            if count < steps and steps % count == 0:
                name = f'{count} denoising steps'
                found = self.reference[steps // count]
                yield self.row(name, 'float', found, None, nbytes, began, FLOOR)

    def linear_bytes(self, stored: dict[str, int]) -> int:
        """Bytes of all linears: those stored as they are, the others at two bytes a weight."""
        return sum(stored.get(s.name, weight_bytes(s, FLOAT)) for s in self.sites.linears)

    def measure(self, recipe: Recipe, precision: str, *, blockwise: bool) -> Row:
        """Quantize a copy by a recipe and judge it."""
        began, policy = time.monotonic(), self.policy()
        result = quantize_policy(
            policy, recipe, parse_scheme(precision), self.fitted, seed=self.seed,
            known=None if blockwise else self.needed(recipe), blockwise=blockwise, make=simulate,
        )
        nbytes = self.linear_bytes({name: x.nbytes for name, x in result.layers.items()})
        return self._judged(policy, recipe.name, precision, nbytes, began, fingerprint(recipe))

    def measure_literal(self, name: str, precision: str) -> Row:
        """Put a published form into a copy and judge it; it has no bytes of its own."""
        began, policy = time.monotonic(), self.policy()
        put_literal(policy.net, self.sites, LITERALS[name], parse_scheme(precision),
                    lambda: None, self.known.seen)
        return self._judged(policy, name, precision, 0, began, fingerprint(LITERALS[name]))

    def _judged(
        self, policy: LiberoVla, name: str, precision: str, nbytes: int, began: float,
        made_by: str,
    ) -> Row:
        found = chunks_by_stride(policy, self.held, HELD_SEED, (1, self.few_stride))
        return self.row(name, precision, found[1], found[self.few_stride], nbytes, began, made_by)


def make_subject(setting: Setting, name: str) -> Subject:
    """Make the policy, or its twin from it."""
    fitted, held = read_all(setting.frames, setting.limit).halves()
    if not held:
        raise ValueError('at least two frames are needed: one calibrates, one judges')
    contract = load_contract(read_settings(setting.model).contract)
    settings = PolicySettings(device=setting.device, threads=setting.threads)
    checkpoint, net = read_checkpoint(setting.model)
    if name == 'twin':
        whole = LiberoVla.around(contract, settings, checkpoint, net)
        peaks = channel_peaks(whole, telling(fitted))
        net = net.cpu()
        stress(net, peaks, setting.seed)
        for parameter in net.parameters():
            parameter.copy_(parameter.half().float())  # as a file would give it back
    return Subject(name, contract, settings, checkpoint, net, (fitted, held), setting.seed)


@torch.no_grad()
def prepare(setting: Setting, name: str, path: Path, *, known: bool, floats: bool) -> list[Row]:
    """Measure once what all cells of a subject need, into a file; floats: return its rows."""
    one = make_subject(setting, name)
    one.save(path, known=known)
    return list(one.float_rows()) if floats else []


@lru_cache(maxsize=2)  # a process meets the policy and its twin by turns
def prepared(setting: Setting, name: str, path: Path) -> Subject:
    """Make a subject of what prepare() wrote."""
    contract = load_contract(read_settings(setting.model).contract)
    settings = PolicySettings(device=setting.device, threads=setting.threads)
    checkpoint, net = read_checkpoint(setting.model)
    frames = read_all(setting.frames, setting.limit).halves()
    one = Subject(name, contract, settings, checkpoint, net, frames, setting.seed)
    with torch.no_grad():
        one.load(path)
    return one
