# SPDX-License-Identifier: Apache-2.0
"""A calibration on disk: what an artifact learned from a robot's own frames, beside the artifact.

Owns the format and how it is applied: alpha of each head and beta of each attention multiply
stored row scales (bias included) when a policy is loaded, refitted layers stand in for stored
ones. The artifact itself is never touched, so leaving a calibration out removes it without loss.
Refuses, with a sentence, what is truncated, edited, of another artifact, unknown or not finite.

    <artifact>/calibrations/<name>/calibration.json         what it is, provenance, evidence
    <artifact>/calibrations/<name>/calibration.safetensors  alpha, beta, ranges
    <artifact>/calibrations/<name>/layers/                  refitted layers, an artifact; optional
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantvla_ros.kernels.weights import PackedWeight
from quantvla_ros.quant.artifact import (
    Artifact,
    ArtifactError,
    Provenance,
    read_artifact,
    sha256_of,
    whole_folder,
    write_artifact,
)
from quantvla_ros.quant.evidence import Evidence, read_evidence
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.sites import AttentionSite, PolicySites

FORMAT = 1
FOLDER, LAYERS = 'calibrations', 'layers'
DOCUMENT, TENSORS = 'calibration.json', 'calibration.safetensors'
NEWEST = 'newest'
ALPHA, BETA, ACTIVATION, LOGIT = 'alpha/', 'beta/', 'activation/', 'logit/'
KEYS = {'format', 'sha256', 'seal', 'artifact', 'checkpoint', 'precision', 'layers',
        'provenance', 'evidence'}
LARGEST_JSON = 16 << 20


@dataclass(frozen=True)
class Calibration:
    """What was learned from a robot's frames for one artifact.

    artifact, checkpoint: sha256 of the artifact's tensors and of the float weights it belongs to.
    alpha: attention -> (heads,), beta: attention -> (1,), both float32; a missing name means 1.
    activations: linear -> (3,) smallest, median and largest over the frames of the largest
    |input| of a frame. logits: attention -> (3,), the same of the standard deviation of a frame's
    logits, over heads. layers: refitted layers that stand in for the artifact's.
    provenance: bag, frames, seed, versions, settings; JSON-ready. sha256: of the tensors on disk.
    """

    artifact: str
    checkpoint: str
    precision: str
    evidence: Evidence
    alpha: Mapping[str, Tensor] = field(default_factory=dict)
    beta: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    logits: Mapping[str, Tensor] = field(default_factory=dict)
    layers: Mapping[str, QuantizedLayer] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ''

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing of the artifact (its ranges and evidence still serve)."""
        return not self.alpha and not self.beta and not self.layers

    def rows(self, sites: PolicySites) -> dict[str, Tensor]:
        """Return linear -> (rows,) float32 factors of its scales; raises ArtifactError."""
        return factor_rows(self.alpha, self.beta, sites)

    def applied(
        self, layers: Mapping[str, QuantizedLayer], sites: PolicySites
    ) -> dict[str, QuantizedLayer]:
        """Return the layers of an artifact with this calibration in them; raises ArtifactError.

        Factors of linears that the artifact left in float are for `scale_float`.
        """
        done = {**layers, **self.layers}
        for name, factors in self.rows(sites).items():
            if name not in done:
                continue
            layer = done[name]
            if not isinstance(layer.weight, PackedWeight):
                raise ArtifactError(f'layer {name!r} has rows of mixed width, which take no '
                                    'factor; calibrate this artifact again')
            old = layer.fold
            done[name] = replace(layer, fold=factors if old is None else old * factors)
        return done

    def scale_float(
        self, net: nn.Module, layers: Mapping[str, QuantizedLayer], sites: PolicySites
    ) -> None:
        """Multiply rows of linears that stayed in float, in place, once they have weights."""
        for name, factors in self.rows(sites).items():
            if name not in layers:
                linear = net.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                with torch.no_grad():
                    linear.weight.mul_(factors.to(linear.weight)[:, None])
                    if linear.bias is not None:
                        linear.bias.mul_(factors.to(linear.bias))


def factor_rows(
    alpha: Mapping[str, Tensor], beta: Mapping[str, Tensor], sites: PolicySites
) -> dict[str, Tensor]:
    """Spread alpha over the rows of q and beta over those of o: linear -> (rows,) float32.

    Raises ArtifactError for an attention that the policy lacks or that takes no factor.
    """
    known = {site.name: site for site in sites.attentions}
    found: dict[str, Tensor] = {}
    for name in (*alpha, *beta):
        if name not in known:
            raise ArtifactError(f'the calibration names attention {name!r}, which the policy does '
                                'not have; calibrate this model again')
    for name, factors in alpha.items():
        site = known[name]
        if not site.alpha_foldable or tuple(factors.shape) != (site.heads,):
            raise ArtifactError(_misfit(site, 'alpha', factors))
        found[site.q] = factors.float().repeat_interleave(site.head_dim)
    for name, factor in beta.items():
        site = known[name]
        if not site.beta_foldable or tuple(factor.shape) != (1,):
            raise ArtifactError(_misfit(site, 'beta', factor))
        found[site.o] = factor.float().expand(sites.linear(site.o).out_features).clone()
    return found


def _misfit(site: AttentionSite, what: str, value: Tensor) -> str:
    why = site.reason or f'it has {site.heads} heads'
    return f'{what} of attention {site.name!r} has shape {tuple(value.shape)} and cannot be ' \
           f'folded there: {why}'


# -- writing -------------------------------------------------------------------------------------


def write_calibration(
    folder: Path, calibration: Calibration, beside: Mapping[str, str] | None = None
) -> str:
    """Write a calibration and return the hash of its tensors.

    beside: name -> text of further files for its folder, such as a report.
    The same calibration gives the same bytes; an interruption leaves nothing half-written, and
    one of the same name is replaced at once. Raises OSError where the disk does not take it.
    """
    tensors = _tensors(calibration)
    problems = _tensor_problems(tensors)
    if problems:
        raise ArtifactError('nothing was written: ' + '; '.join(problems))
    with whole_folder(folder) as scratch:
        save_file(tensors, scratch / TENSORS)
        sha256 = sha256_of(scratch / TENSORS)
        layers = ''
        if calibration.layers:
            source = Provenance(calibration.checkpoint, 'calibration', calibration.precision)
            layers = write_artifact(scratch / LAYERS, calibration.layers, source)
        document = {
            'format': FORMAT,
            'sha256': sha256,
            'artifact': calibration.artifact,
            'checkpoint': calibration.checkpoint,
            'precision': calibration.precision,
            'layers': layers,
            'provenance': dict(calibration.provenance),
            'evidence': calibration.evidence.document(),
        }
        document['seal'] = _seal(document)
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
        (scratch / DOCUMENT).write_text(text + '\n')
        for name, other in (beside or {}).items():
            (scratch / name).write_text(other)
    return sha256


def _tensors(calibration: Calibration) -> dict[str, Tensor]:
    parts = ((ALPHA, calibration.alpha), (BETA, calibration.beta),
             (ACTIVATION, calibration.activations), (LOGIT, calibration.logits))
    return {f'{prefix}{name}': tensors[name].float().contiguous()
            for prefix, tensors in parts for name in sorted(tensors)}


def _seal(document: Mapping[str, Any]) -> str:
    """Hash everything the document says, so that a changed figure is noticed."""
    rest = {key: value for key, value in document.items() if key != 'seal'}
    text = json.dumps(rest, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()


# -- reading -------------------------------------------------------------------------------------


def calibration_names(artifact: Path) -> list[str]:
    """Names of the calibrations beside an artifact, newest first; unread and unverified."""
    found = [path.parent for path in (artifact / FOLDER).glob(f'*/{DOCUMENT}')
             if not path.parent.name.startswith('.')]
    return [path.name for path in
            sorted(found, key=lambda p: (p / DOCUMENT).stat().st_mtime_ns, reverse=True)]


def find_calibration(artifact: Path, name: str) -> Path:
    """Return the folder that a name or a path leads to. Raises ArtifactError listing the known."""
    for folder in (artifact / FOLDER / name, Path(name)):
        if (folder / DOCUMENT).is_file():
            return folder
    known = ', '.join(calibration_names(artifact)) or 'none'
    raise ArtifactError(
        f'calibration {name!r} is not beside {artifact}; there are: {known}; make one with '
        f'`quantvla calibrate`, or give {NEWEST!r} or the path of a folder'
    )


def load_calibration(artifact_folder: Path, name: str, artifact: Artifact) -> tuple[
    str, Calibration | None
]:
    """Return (name, calibration) for the value of the parameter `calibration`.

    '' is none. 'newest' is the newest that was made for this artifact, or none where there is
    none; it is read with proof like any other. Raises ArtifactError.
    """
    if not name:
        return '', None
    if name != NEWEST:
        return name, read_calibration(find_calibration(artifact_folder, name), artifact)
    folder = newest_calibration(artifact_folder, artifact.sha256)
    return ('', None) if folder is None else (folder.name, read_calibration(folder, artifact))


def newest_calibration(artifact_folder: Path, sha256: str) -> Path | None:
    """Return the newest calibration of the artifact with these tensors; None where there is none.

    Damaged ones and those of an earlier artifact are passed over.
    """
    for name in calibration_names(artifact_folder):
        with suppress(ArtifactError):
            if read_document(artifact_folder / FOLDER / name)['artifact'] == sha256:
                return artifact_folder / FOLDER / name
    return None


def evidence_in(folder: Path) -> Evidence:
    """Return the evidence of a calibration without reading its tensors; raises ArtifactError."""
    try:
        return read_evidence(read_document(folder)['evidence'])
    except ArtifactError:
        raise
    except ValueError as error:
        raise ArtifactError(f'{folder / DOCUMENT}: {error}') from error


def read_calibration(folder: Path, artifact: Artifact) -> Calibration:
    """Read and verify a calibration of an artifact. Raises ArtifactError with a sentence."""
    document = read_document(folder)
    for what, seen, expected in (
        ('checkpoint', document['checkpoint'], artifact.provenance.checkpoint),
        ('artifact', document['artifact'], artifact.sha256),
    ):
        if seen != expected:
            raise ArtifactError(f'{folder} was made for {what} {seen[:12]}, this is '
                                f'{expected[:12]}; calibrate this one')
    tensors = _read_tensors(folder, document['sha256'])
    layers: Mapping[str, QuantizedLayer] = {}
    if document['layers']:
        found = read_artifact(folder / LAYERS, document['checkpoint'])
        if found.sha256 != document['layers']:
            raise ArtifactError(f'{folder / LAYERS} is not what {DOCUMENT} describes; copy the '
                                'calibration again')
        layers = found.layers
    strangers = sorted(set(layers) - set(artifact.layers))
    if strangers:
        raise ArtifactError(f'{folder} refits {strangers[0]!r}, which the artifact has not')
    parts: dict[str, dict[str, Tensor]] = {p: {} for p in (ALPHA, BETA, ACTIVATION, LOGIT)}
    for key, tensor in tensors.items():
        kind, _, name = key.partition('/')
        parts[kind + '/'][name] = tensor
    return Calibration(
        artifact=document['artifact'],
        checkpoint=document['checkpoint'],
        precision=document['precision'],
        evidence=evidence_in(folder),
        alpha=parts[ALPHA],
        beta=parts[BETA],
        activations=parts[ACTIVATION],
        logits=parts[LOGIT],
        layers=layers,
        provenance=document['provenance'],
        sha256=document['sha256'],
    )


def read_document(folder: Path) -> dict[str, Any]:
    """Return calibration.json with its seal checked and no tensor read; raises ArtifactError."""
    path = folder / DOCUMENT
    if not path.is_file():
        raise ArtifactError(f'{folder} holds no {DOCUMENT}: it is not a calibration')
    if path.stat().st_size > LARGEST_JSON:
        raise ArtifactError(f'{path} is larger than a calibration can be')
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ArtifactError(f'{path} is damaged: {error}; copy the calibration again') from error
    if not isinstance(document, dict) or document.get('format') != FORMAT:
        seen = document.get('format') if isinstance(document, dict) else document
        raise ArtifactError(f'{path} has format {seen!r}; this version reads {FORMAT}')
    if set(document) != KEYS:
        raise ArtifactError(f'{path}: missing {sorted(KEYS - set(document))}, unknown '
                            f'{sorted(set(document) - KEYS)}')
    if document['seal'] != _seal(document):
        raise ArtifactError(f'{path} was changed after it was written; calibrate again')
    return document


def _read_tensors(folder: Path, expected: str) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        raise ArtifactError(f'{folder} lacks {TENSORS}; copy the calibration again')
    sha256 = sha256_of(path)
    if sha256 != expected:
        raise ArtifactError(f'{path} has hash {sha256[:12]}, expected {expected[:12]}: it is '
                            'truncated or was changed; copy the calibration again')
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f'{path} is damaged: {error}') from error
    problems = _tensor_problems(tensors)
    if problems:
        raise ArtifactError(f'{path}: ' + '; '.join(problems))
    return tensors


def _tensor_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for key, tensor in tensors.items():
        kind = key.partition('/')[0] + '/'
        if kind not in (ALPHA, BETA, ACTIVATION, LOGIT):
            problems.append(f'unknown tensor {key!r}')
        elif tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            problems.append(f'{key} holds values that are not finite float32')
        elif kind in (ALPHA, BETA) and not bool((tensor > 0).all()):
            problems.append(f'{key} holds a factor that is not positive')
        elif kind in (ACTIVATION, LOGIT) and tuple(tensor.shape) != (3,):
            problems.append(f'{key} has shape {tuple(tensor.shape)}; expected (3,)')
    return problems
