# SPDX-License-Identifier: Apache-2.0
"""The action error of every precision beside a checkpoint, on one set of held-out frames.

So that a report says not only what a calibration changed but also what the other precisions would
cost. Loads one at a time, as it would be served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from quantvla_ros.calibration import evidence as ev
from quantvla_ros.calibration.frames import FrameSet
from quantvla_ros.calibration.passes import encode, play
from quantvla_ros.calibration.run import HELD_SEED, Outcome, standing
from quantvla_ros.contract import Contract
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.quant.artifact import JSON_NAME, ArtifactError, read_provenance
from quantvla_ros.quant.evidence import ErrorFigures


def beside(model: Path, checkpoint: str, but: Path) -> Iterator[str]:
    """Yield the names of the artifacts of this checkpoint beside it, but one."""
    for path in sorted(model.glob(f'*/{JSON_NAME}')):
        try:
            own = read_provenance(path.parent).checkpoint == checkpoint
        except (ArtifactError, TypeError):
            continue
        if own and path.parent.resolve() != but.resolve():
            yield path.parent.name


def judge_others(
    model: Path, but: Path, contract: Contract, frames: FrameSet, outcome: Outcome, threads: int
) -> Mapping[str, ErrorFigures]:
    """Return the error of each other precision, uncalibrated, on the held-out frames."""
    found = {}
    stood = standing(frames.held_out, contract)
    for name in beside(model, outcome.calibration.checkpoint, but):
        policy = LiberoVla(contract, PolicySettings(str(model), name, threads=threads))
        played = play(policy, encode(policy, frames.held_out, HELD_SEED))
        found[name] = ev.figures(played, outcome.reference, stood, contract.action.execute)
    return found
