# SPDX-License-Identifier: Apache-2.0
"""The shipped network with an artifact's integer layers in the place of its linears.

Reads from the checkpoint only the weights that stay in float: no float copy of a quantized layer
is ever held. Refuses an artifact of another checkpoint and whatever read_artifact and
read_calibration refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from quantvla_ros.policies.libero_checkpoint import (
    Checkpoint,
    CheckpointError,
    read_settings,
    verified_weights,
    weight_problems,
)
from quantvla_ros.policies.libero_parts import RUN_AT_LOAD, Stored, recordable
from quantvla_ros.policies.libero_vla import Attention, LiberoVlaNet, rotary_table
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.artifact import JSON_NAME, Artifact, ArtifactError, read_artifact
from quantvla_ros.quant.calibrated import Calibration, load_calibration
from quantvla_ros.quant.linear import Make, QuantizedLayer, QuantLinear, replace_linears
from quantvla_ros.quant.simulate import simulate
from quantvla_ros.quant.sites import PolicySites
from quantvla_ros.quant.stream import PagedLinear, page
from quantvla_ros.quant.tensor_file import TensorFile


def find_artifact(model: Path, precision: str) -> Path:
    """Return the artifact folder that a precision names: beside the checkpoint, or a path.

    Raises ValueError that lists what stands beside the checkpoint.
    """
    for folder in (model / precision, Path(precision)):
        if (folder / JSON_NAME).is_file():
            return folder
    beside = sorted(path.parent.name for path in model.glob(f'*/{JSON_NAME}'))
    known = ', '.join(['float', 'bfloat16', *beside])
    raise ValueError(
        f'precision {precision!r} is unknown to this policy; known are {known}; make another '
        'with `quantvla quantize`, or give the path of an artifact folder'
    )


class Opened(NamedTuple):
    """An artifact of a checkpoint, both verified; no float weight is read yet."""

    checkpoint: Checkpoint
    weights: Path
    folder: Path
    artifact: Artifact
    sites: PolicySites


class Quantized(NamedTuple):
    """What was read. record: whether the network must be recorded before it runs.

    calibrated: name of the calibration in it, '' for none; calibration: what that says.
    """

    checkpoint: Checkpoint
    net: LiberoVlaNet
    record: bool
    calibrated: str
    calibration: Calibration | None


def open_artifact(model: Path, precision: str) -> Opened:
    """Read an artifact and what it must belong to.

    Raises FileNotFoundError, CheckpointError or ArtifactError.
    """
    folder = find_artifact(model, precision)
    checkpoint = read_settings(model)
    weights = verified_weights(model, checkpoint)
    with torch.device('meta'):
        sites = libero_vla_sites(LiberoVlaNet(checkpoint.config))
    artifact = read_artifact(folder, checkpoint.sha256, sites)
    return Opened(checkpoint, weights, folder, artifact, sites)


def build(opened: Opened, layers: Mapping[str, QuantizedLayer], make: Make) -> LiberoVlaNet:
    """Return the network with these layers made by `make`, and everything else in float32.

    Layers that run once, when the policy is loaded, are never only stored for a program. An
    artifact without the convolutions leaves them in float; one with some of them is refused.
    """
    with torch.device('meta'):
        net = LiberoVlaNet(opened.checkpoint.config)
    stem = {site.name for site in opened.sites.convolutions}
    if stem & layers.keys() and stem - layers.keys():
        raise ArtifactError(
            f'{opened.folder} holds {", ".join(sorted(stem & layers.keys()))} and lacks '
            f'{", ".join(sorted(stem - layers.keys()))}; quantize this model again'
        )
    at_load = {name: layers[name] for name in RUN_AT_LOAD if name in layers}
    others = {name: layer for name, layer in layers.items() if name not in at_load}
    try:
        replace_linears(net, others, make)
        replace_linears(net, at_load, QuantLinear if make is Stored else make)
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f'{opened.folder}: {error}') from error
    fill(net, opened.weights)
    return net.eval().requires_grad_(False)


def read_teacher(opened: Opened) -> LiberoVlaNet:
    """Return the float network whose blocks' linears are left on the disk."""
    with torch.device('meta'):
        net = LiberoVlaNet(opened.checkpoint.config)
    inside = [site.name for block in opened.sites.blocks for site in opened.sites.in_block(block)]
    page(net, inside, TensorFile(opened.weights).read)
    fill(net, opened.weights)
    return net.eval().requires_grad_(False)


def read_quantized(
    model: Path, precision: str, device: str = 'cpu', calibration: str = ''
) -> Quantized:
    """Return the network with integer layers, and a calibration folded into their scales.

    calibration: '' for none, 'newest', the name of one beside the artifact, or its path.
    Where programs can serve all layers of a chunk, the network holds them as Stored, for a
    ChunkProgram; it does not run by itself. Else each linear is a QuantLinear. On a device other
    than the CPU the layers are simulated: the same codes and scales, float sums
    (quant/simulate.py).
    Raises FileNotFoundError, CheckpointError or ArtifactError.
    """
    opened = open_artifact(model, precision)
    name, found = load_calibration(opened.folder, calibration, opened.artifact)
    layers = opened.artifact.layers
    if found is not None:
        layers = found.applied(layers, opened.sites)
    record = device == 'cpu' and recordable(layers)
    make: Make = simulate if device != 'cpu' else Stored if record else QuantLinear
    net = build(opened, layers, make)
    if found is not None:
        found.scale_float(net, layers, opened.sites)
    return Quantized(opened.checkpoint, net, record, name, found)


def fill(net: LiberoVlaNet, path: Path) -> None:
    """Give every parameter that is left in memory its float32 value; make the rotary tables."""
    paged = {name for name, module in net.named_modules() if isinstance(module, PagedLinear)}
    expected = {name: value.detach() for name, value in net.named_parameters()
                if name.rpartition('.')[0] not in paged}
    try:
        with safe_open(path, framework='pt') as file:
            here = set(file.keys())
            found = {name: file.get_tensor(name) for name in expected if name in here}
    except SafetensorError as error:
        raise CheckpointError(f'{path} is not a safetensors file: {error}') from error
    problems = weight_problems(expected, found)
    if problems:
        raise CheckpointError(f'{path} does not fit the architecture:\n  ' + '\n  '.join(problems))
    for name, value in found.items():
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child, nn.Parameter(value.float(), False))
    for module in net.modules():
        if isinstance(module, Attention) and module.table is not None:
            module.table = rotary_table(module.table.shape[1])
