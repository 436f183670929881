# SPDX-License-Identifier: Apache-2.0
"""A quantized model on disk: safetensors and JSON, written whole or not at all, read with proof.

Owns the format. Refuses, each with a sentence: a truncated file, a wrong hash, unknown or missing
layers and tensors, wrong shapes and dtypes, scales that are not finite, and an artifact that was
made for another checkpoint. Holds no float weight of a layer that it quantizes.

    <folder>/artifact.json        what it is, where it came from, scheme and tensors of each layer
    <folder>/layers.safetensors   '<layer>/<part>' -> tensor

ArtifactWriter and ArtifactReader hold one layer at a time.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantvla_ros.kernels.weights import LAYOUT, MixedWeight, PackedWeight
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.scheme import PerGroup, PerRow, PerStep, PerTensor, Scheme
from quantvla_ros.quant.sites import PolicySites
from quantvla_ros.quant.tensor_file import Spool, TensorFile, TensorFileError, write_tensors
from quantvla_ros.quant.transforms import from_tensors

FORMAT = 1
JSON_NAME, TENSOR_NAME = 'artifact.json', 'layers.safetensors'
TRANSFORM = 'transform.'
GRANULARITIES = {kind.__name__: kind for kind in (PerTensor, PerRow, PerGroup, PerStep)}


class ArtifactError(ValueError):
    """An artifact that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Provenance:
    """Where an artifact came from.

    checkpoint: sha256 of the float weights. frames: hash of the calibration frames, '' for none.
    settings: the recipe's fields. measured: figures seen while making it (peak bytes, seconds).
    """

    checkpoint: str
    recipe: str
    precision: str
    frames: str = ''
    seed: int = 0
    version: str = ''
    settings: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """What was read: layers by name and where they came from."""

    layers: Mapping[str, QuantizedLayer]
    provenance: Provenance
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized layers."""
        return sum(layer.nbytes for layer in self.layers.values())


def sha256_of(path: Path) -> str:
    """Hash a file without holding it in memory."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _granularity(value: Any) -> dict[str, Any]:
    return {'kind': type(value).__name__, **asdict(value)}


def _parts(weight: PackedWeight, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f'{prefix}data': weight.data, f'{prefix}scales': weight.scales}
    return tensors, {'bits': weight.bits, 'shape': list(weight.shape), 'group': weight.group}


def _describe(layer: QuantizedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a layer into tensors and the JSON that tells how to read them."""
    scheme, transform = layer.scheme, layer.transform
    tensors: dict[str, Tensor] = {}
    if isinstance(layer.weight, MixedWeight):
        parts = []
        for index, part in enumerate(layer.weight.parts):
            found, about = _parts(part, f'part{index}.')
            tensors.update(found)
            parts.append(about)
        tensors['order'] = layer.weight.order
    else:
        found, about = _parts(layer.weight, 'part0.')
        tensors.update(found)
        parts = [about]
    optional = {'bias': layer.bias, 'act_scales': layer.act_scales, 'fold': layer.fold}
    tensors.update({TRANSFORM + name: t for name, t in transform.tensors().items()})
    tensors.update({name: tensor for name, tensor in optional.items() if tensor is not None})
    about_layer = {
        'weight_bits': scheme.weight_bits,
        'act_bits': scheme.act_bits,
        'weight': _granularity(scheme.weight),
        'act': _granularity(scheme.act),
        'hadamards': transform.hadamards(),
        'parts': parts,
        'tensors': sorted(tensors),
    }
    return tensors, about_layer


class ArtifactWriter:
    """An artifact that is written layer by layer; it appears when it is finished, or never.

    Use as a context. Until then its layers lie in a file without a name, which goes with the
    process. The same layers and provenance give the same bytes, in whatever order they came.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._spool = Spool(folder.parent)
        self._about: dict[str, Any] = {}
        self.nbytes = 0

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, name: str, layer: QuantizedLayer) -> None:
        """Write one layer; nothing of it is held afterwards."""
        parts, self._about[name] = _describe(layer)
        for part, tensor in parts.items():
            self._spool.add(f'{name}/{part}', tensor)
        self.nbytes += layer.nbytes

    @property
    def count(self) -> int:
        """Layers so far."""
        return len(self._about)

    def finish(self, provenance: Provenance) -> str:
        """Put the artifact in its place, at once, and return its hash."""
        with whole_folder(self.folder) as scratch:
            write_tensors(scratch / TENSOR_NAME, self._spool.described, self._spool.read)
            sha256 = sha256_of(scratch / TENSOR_NAME)
            document = {
                'format': FORMAT,
                'layout': LAYOUT,
                'sha256': sha256,
                'provenance': asdict(provenance),
                'layers': self._about,
            }
            text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
            (scratch / JSON_NAME).write_text(text + '\n')
        return sha256


def write_artifact(
    folder: Path, layers: Mapping[str, QuantizedLayer], provenance: Provenance
) -> str:
    """Write an artifact and return its hash; an interruption leaves nothing half-written.

    The same layers and provenance give the same bytes. An existing artifact is replaced at once.
    """
    with ArtifactWriter(folder) as writer:
        for name in sorted(layers):
            writer.add(name, layers[name])
        return writer.finish(provenance)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a scratch folder that takes the place of `folder` at the end of the block, or never.

    What a killed process left behind is cleared away first, and put back where it was the only
    copy; an exception leaves `folder` alone.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    scratch = folder.with_name(f'.{folder.name}.{os.getpid()}')
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        _swap(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove scratch folders of processes that are gone; one killed inside _swap is undone."""
    for kind in ('.old', ''):
        prefix = f'.{folder.name}{kind}.'
        for path in folder.parent.glob(glob.escape(prefix) + '*'):
            pid = path.name.removeprefix(prefix)
            if not pid.isdigit() or Path(f'/proc/{pid}').exists():
                continue
            if kind and not folder.exists():
                path.rename(folder)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _swap(scratch: Path, folder: Path) -> None:
    """Put scratch in the place of folder; what stood there goes away after the new one stands."""
    old = folder.with_name(f'.{folder.name}.old.{os.getpid()}')
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _scheme(about: Mapping[str, Any]) -> Scheme:
    def granularity(value: Mapping[str, Any]) -> Any:
        fields = {key: item for key, item in value.items() if key != 'kind'}
        return GRANULARITIES[value['kind']](**fields)

    return Scheme(
        about['weight_bits'],
        about['act_bits'],
        granularity(about['weight']),
        granularity(about['act']),
    )


def _layer(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedLayer:
    """Rebuild one layer; raises ArtifactError that names it."""
    expected, seen = set(about['tensors']), set(tensors)
    if expected != seen:
        raise ArtifactError(
            f'layer {name!r}: missing {sorted(expected - seen)}, unknown {sorted(seen - expected)}'
        )
    for part, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f'layer {name!r}: {part} holds values that are not finite')
    try:
        parts = tuple(
            PackedWeight(
                part['bits'],
                (part['shape'][0], part['shape'][1]),
                part['group'],
                tensors[f'part{index}.data'],
                tensors[f'part{index}.scales'],
            )
            for index, part in enumerate(about['parts'])
        )
        order = tensors.get('order')
        return QuantizedLayer(
            scheme=_scheme(about),
            weight=parts[0] if order is None else MixedWeight(parts, order),
            bias=tensors.get('bias'),
            transform=from_tensors(
                {
                    part.removeprefix(TRANSFORM): tensor
                    for part, tensor in tensors.items()
                    if part.startswith(TRANSFORM)
                },
                about['hadamards'],
            ),
            act_scales=tensors.get('act_scales'),
            fold=tensors.get('fold'),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f'layer {name!r}: {error}') from error


def _document(folder: Path) -> dict[str, Any]:
    path = folder / JSON_NAME
    if not path.is_file():
        raise ArtifactError(f'{folder} holds no {JSON_NAME}: it is not an artifact')
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ArtifactError(f'{path} is damaged: {error}') from error
    if not isinstance(document, dict) or document.get('format') != FORMAT:
        seen = document.get('format') if isinstance(document, dict) else document
        raise ArtifactError(f'{path} has format {seen!r}; this version reads {FORMAT}')
    return document


def read_provenance(folder: Path) -> Provenance:
    """Read where an artifact came from without reading its tensors."""
    return Provenance(**_document(folder)['provenance'])


class ArtifactReader:
    """A verified artifact whose layers are read one at a time.

    checkpoint: sha256 of the float weights it must belong to. sites: the linears it may name.
    Raises ArtifactError with a sentence.
    """

    def __init__(
        self, folder: Path, checkpoint: str | None = None, sites: PolicySites | None = None
    ) -> None:
        document = _document(folder)
        self.folder, self._sites = folder, sites
        self.provenance = Provenance(**document['provenance'])
        if checkpoint is not None and self.provenance.checkpoint != checkpoint:
            raise ArtifactError(
                f'{folder} was made for checkpoint {self.provenance.checkpoint[:12]}, the model '
                f'is {checkpoint[:12]}; quantize this model again'
            )
        path, self.sha256 = folder / TENSOR_NAME, _verified(folder, document)
        try:
            self._file = TensorFile(path)
        except TensorFileError as error:
            raise ArtifactError(f'{path} is damaged: {error}') from error
        self._about: Mapping[str, Any] = document['layers']
        self._parts: dict[str, list[str]] = {name: [] for name in self._about}
        for key in self._file.entries:
            name, _, part = key.rpartition('/')
            if name not in self._parts:
                raise ArtifactError(f'tensor {key!r} belongs to no layer of the artifact')
            self._parts[name].append(part)

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in order."""
        return tuple(sorted(self._about))

    def layer(self, name: str) -> QuantizedLayer:
        """Read one layer and check it. Raises ArtifactError that names it."""
        tensors = {part: self._file.read(f'{name}/{part}') for part in self._parts[name]}
        layer = _layer(name, self._about[name], tensors)
        if self._sites is not None:
            site = self._sites.linear(name)
            shape = (site.out_features, site.in_features)
            if layer.weight.shape != shape:
                raise ArtifactError(
                    f'layer {name!r} has shape {layer.weight.shape}, the policy {shape}'
                )
        return layer


def read_artifact(
    folder: Path, checkpoint: str | None = None, sites: PolicySites | None = None
) -> Artifact:
    """Read and verify a whole artifact; see ArtifactReader, which holds one layer at a time."""
    reader = ArtifactReader(folder, checkpoint, sites)
    layers = {name: reader.layer(name) for name in reader.names}
    return Artifact(layers, reader.provenance, reader.sha256)


def verify_artifact(folder: Path) -> None:
    """Hash the tensors again, after a policy was made of them; raises ArtifactError.

    What is read shares memory with the file until it is packed, so a file that somebody writes to
    meanwhile is only noticed afterwards.
    """
    _verified(folder, _document(folder))


def _verified(folder: Path, document: Mapping[str, Any]) -> str:
    """Return the hash of the tensors, which is what the document says."""
    path = folder / TENSOR_NAME
    if not path.is_file():
        raise ArtifactError(f'{folder} lacks {TENSOR_NAME}; copy the artifact again')
    sha256 = sha256_of(path)
    if sha256 != document['sha256']:
        raise ArtifactError(
            f'{path} has hash {sha256[:12]}, expected {document["sha256"][:12]}: it is truncated '
            'or was changed; copy the artifact again'
        )
    return sha256
