# SPDX-License-Identifier: Apache-2.0
"""The gate: whether a precision has shown on held-out frames that it may move an arm.

An error is judged against the floor that another noise seed makes: a policy that denoises from
noise differs from itself by that much between two chunks, so a quantization below it cannot be
told from a fresh draw. Measures nothing and loads no weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from quantvla_ros.quant.artifact import TENSOR_NAME, read_provenance, sha256_of
from quantvla_ros.quant.calibrated import (
    NEWEST,
    evidence_in,
    find_calibration,
    newest_calibration,
)
from quantvla_ros.quant.evidence import Evidence, measured_evidence


@dataclass(frozen=True)
class GateLimits:
    """What a precision may differ from float, as multiples of the floor of another noise seed.

    mean_ratio: of the mean error. worst_ratio: of the worst frame's error. needs_evidence:
    whether an artifact that nobody judged is refused.
    """

    mean_ratio: float = 1.0
    worst_ratio: float = 1.5
    needs_evidence: bool = False


def refuse(evidence: Evidence | None, limits: GateLimits) -> str:
    """Return '' when the precision may be activated, else why not, as a sentence."""
    if evidence is None:
        if limits.needs_evidence:
            return ('nobody measured the action error of this precision; run `quantvla calibrate` '
                    'on a bag of this robot')
        return ''
    for what, found, floor, ratio in (
        ('mean', evidence.after.mean_rad, evidence.floor.mean_rad, limits.mean_ratio),
        ('worst-frame', evidence.after.worst_rad, evidence.floor.worst_rad, limits.worst_ratio),
    ):
        if not found <= ratio * floor:  # also when either is not a number
            return (
                f'its {what} action error is {1e3 * found:.2f} mrad on {evidence.frames} held-out '
                f'frames; allowed are {1e3 * ratio * floor:.2f} mrad, {ratio:g} times what '
                f'another noise seed makes; calibrate it on a bag of this robot, or take a wider '
                'precision'
            )
    return ''


def gate(artifact_folder: Path, name: str, limits: GateLimits) -> str:
    """Return '' when an artifact with the calibration of this name may be activated, else why not.

    Without a calibration (name '') counts what the newest calibration of the artifact measured
    before it changed anything, else what the artifact says of itself. Reads JSON alone: loading
    verifies the rest. Raises ArtifactError for what cannot be read.
    """
    path = artifact_folder / TENSOR_NAME
    own = sha256_of(path) if path.is_file() else ''
    wanted = '' if name == NEWEST else name
    folder = (find_calibration(artifact_folder, wanted) if wanted
              else newest_calibration(artifact_folder, own))
    if folder is None:
        return refuse(measured_evidence(read_provenance(artifact_folder).measured), limits)
    evidence = evidence_in(folder)
    return refuse(evidence if name else replace(evidence, after=evidence.before), limits)
