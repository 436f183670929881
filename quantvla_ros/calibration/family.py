# SPDX-License-Identifier: Apache-2.0
"""Quantize a published checkpoint from its own folder, one block in memory at a time.

The float weights stay on disk and are paged while calibration frames run; each finished layer goes
into the artifact at once. Owns the stages and what is printed; quant/stream.py owns the loop.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantvla_ros.calibration.frames_file import Frames, read_frames
from quantvla_ros.contract import load_contract
from quantvla_ros.exit_status import INTERRUPTED
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings, policy_class
from quantvla_ros.policies.checkpoints import hash_of
from quantvla_ros.policies.folders import Folder, identify
from quantvla_ros.policies.loading import install_paged
from quantvla_ros.policies.networks import served_network
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.artifact import ArtifactWriter, Provenance
from quantvla_ros.quant.convert import Progress
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.matching import Factors, fit_factors, fold
from quantvla_ros.quant.memory import GIB
from quantvla_ros.quant.recipes import Recipe
from quantvla_ros.quant.scheme import Scheme
from quantvla_ros.quant.stream import check_recipe, hold, quantize_streamed, round_streamed
from quantvla_ros.resources import peak_bytes

JUDGED_FRAMES = 8  # held-out frames that are run before and after; a paged chunk takes long
OTHER_NOISE = 1 << 20  # seeds that no calibration frame has


@dataclass(frozen=True)
class FamilyJob:
    """What is to be made: from which folder, how, with which frames, and where it goes."""

    model: Path
    recipe: Recipe
    precision: Scheme
    out: Path
    contract: str = ''
    frames: Path | None = None
    limit: int = 0
    seed: int = 0
    threads: int = 0
    version: str = ''
    progress: Progress | None = None


@dataclass(frozen=True)
class Made:
    """What was made: layers, bytes, hash; figures measured on held-out frames."""

    layers: int
    nbytes: int
    sha256: str
    measured: dict[str, float] = field(default_factory=dict)


def quantize_family(job: FamilyJob) -> Made:
    """Quantize a folder into an artifact. Raises ValueError with a sentence."""
    frames = read_frames(job.frames, job.limit) if job.frames is not None else None
    check_recipe(job.recipe, frames=frames is not None)
    if frames is not None and len(frames) < 2:
        raise ValueError('at least two frames are needed: one calibrates, one judges')
    if frames is not None and not job.contract:
        raise ValueError('frames are of a robot; name its contract with --contract')
    folder = identify(job.model)
    stored = served_network(folder)
    torch.manual_seed(job.seed)
    with ArtifactWriter(job.out) as writer:
        if frames is None:
            sites = policy_sites(stored.model)
            round_streamed(sites, job.recipe, job.precision, stored.read, writer.add,
                           job.progress)
            measured: dict[str, float] = {}
        else:
            measured = _Calibrated(job, folder, frames).run(writer)
        sha256 = writer.finish(Provenance(
            checkpoint=hash_of(stored.source.files),
            recipe=job.recipe.name,
            precision=job.precision.name,
            frames='' if frames is None else frames.sha256,
            seed=job.seed,
            version=job.version,
            settings={**asdict(job.recipe), 'streamed': True,
                      'frames': 0 if frames is None else len(frames.halves()[0])},
            measured=measured,
        ))
        return Made(writer.count, writer.nbytes, sha256, measured)


class _Calibrated:
    """A policy whose weights are on disk, quantized on frames of a robot."""

    def __init__(self, job: FamilyJob, folder: Folder, frames: Frames) -> None:
        self.job = job
        self.contract = load_contract(job.contract)
        self.fitted, held = frames.halves()
        self.held = held[:: max(1, len(held) // JUDGED_FRAMES)][:JUDGED_FRAMES]
        self.policy = self._paged(folder)
        self.sites = policy_sites(self.policy.model)
        self._late: dict[str, QuantizedLayer] = {}  # layers that matching may still change

    def _paged(self, folder: Folder) -> Any:
        settings = PolicySettings(model=str(folder.path), threads=self.job.threads)
        return policy_class(self.contract.policy)(self.contract, settings, install_paged)

    def run(self, writer: ArtifactWriter) -> dict[str, float]:
        """Judge in float, quantize block by block, match where the recipe does, judge again."""
        matching = self.job.recipe.matching
        attentions = {n for site in self.sites.attentions for n in (site.q, site.o)}
        reference = self._chunks(OTHER_NOISE)
        floor = self._chunks(2 * OTHER_NOISE)

        def take(name: str, layer: QuantizedLayer) -> None:
            if matching is not None and name in attentions:
                self._late[name] = layer
            else:
                writer.add(name, layer)

        quantize_streamed(
            self.policy.model, self.sites, self.job.recipe, self.job.precision, take,
            [partial(self._run, o, i) for i, o in enumerate(self.fitted)],
            progress=self.job.progress,
        )
        if matching is not None:
            self._late = self._matched()
        for name, layer in self._late.items():
            writer.add(name, layer)
        rows = self.contract.action.execute
        return {
            **_figures('action_error', self._chunks(OTHER_NOISE), reference, rows),
            **_figures('other_seed', floor, reference, rows),
            'judged_frames': len(self.held),
        }

    def _run(self, observation: Observation, index: int) -> None:
        self.policy.denoise(self.policy.prepare(observation), self.job.seed + index)

    def _chunks(self, seed: int) -> np.ndarray:
        prepare, denoise = self.policy.prepare, self.policy.denoise
        return np.stack([denoise(prepare(o), seed + i).positions
                         for i, o in enumerate(self.held)])

    def _matched(self) -> dict[str, QuantizedLayer]:
        """Fit alpha and beta against the float network, which is paged, and fold them."""
        assert self.job.recipe.matching is not None
        teacher = self._paged(identify(self.job.model)).model
        factors: dict[str, Factors] = fit_factors(
            teacher, self.policy.model, self.sites,
            [self._batch(o, i) for i, o in enumerate(self.fitted)], self.job.recipe.matching)
        changed = [site for site in self.sites.attentions
                   if site.name in factors and not factors[site.name].neutral]
        hold(self.policy.model, [n for site in changed for n in (site.q, site.o)])
        return fold(self.policy.model, self.sites, self._late, factors)

    def _batch(self, observation: Observation, index: int) -> Callable[[nn.Module], None]:
        def run(net: nn.Module) -> None:
            own = self.policy.model
            self.policy.model = net
            try:
                self._run(observation, index)
            finally:
                self.policy.model = own

        return run


def _figures(
    what: str, found: np.ndarray, reference: np.ndarray, rows: int
) -> dict[str, float]:
    """How far the executed steps lie apart, mrad (a joint that slides: mm)."""
    off = 1e3 * np.abs(found[:, :rows] - reference[:, :rows])
    figures = {'mrad': off.mean(), 'p95_mrad': np.quantile(off, 0.95),
               'worst_mrad': off.mean((1, 2)).max()}
    return {f'{what}_{name}': round(float(value), 6) for name, value in figures.items()}


def report(job: FamilyJob, made: Made, began: float) -> str:
    """Say what was made, what it costs the action, and what making it took."""
    lines = [f'{job.out}: {job.recipe.name} {job.precision.name}, {made.layers} layers, '
             f'{made.nbytes / 1e6:.2f} MB, sha256 {made.sha256[:16]}']
    if made.measured:
        lines.append(
            f'action error on held-out frames: {made.measured["action_error_mrad"]:.2f} mrad; '
            f'another noise seed: {made.measured["other_seed_mrad"]:.2f} mrad')
    lines.append(f'peak memory of the whole process {peak_bytes() / GIB:.2f} GiB; '
                 f'{time.monotonic() - began:.0f} s')
    return '\n'.join(lines)


def run(job: FamilyJob) -> int:
    """Serve `quantvla quantize` for a published checkpoint."""
    began = time.monotonic()
    try:
        made = quantize_family(job)
    except KeyboardInterrupt:
        print(f'\ninterrupted; {job.out} is as it was', file=sys.stderr)
        return INTERRUPTED
    print(report(job, made, began))
    return 0
