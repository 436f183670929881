# SPDX-License-Identifier: Apache-2.0
"""The shipped network with an artifact's integer layers in the place of its linears.

Reads from the checkpoint only the weights that stay in float: no float copy of a quantized layer
is ever held. Refuses an artifact of another checkpoint and whatever read_artifact refuses.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from quantvla_ros.policies.libero_checkpoint import (
    SETTINGS,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    hash_file,
    read_settings,
    weight_problems,
)
from quantvla_ros.policies.libero_program import Stored, recordable
from quantvla_ros.policies.libero_vla import Attention, LiberoVlaNet, rotary_table
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.artifact import JSON_NAME, ArtifactError, read_artifact
from quantvla_ros.quant.linear import Make, QuantLinear, replace_linears
from quantvla_ros.quant.simulate import simulate


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


def read_quantized(
    model: Path, precision: str, device: str = 'cpu'
) -> tuple[Checkpoint, LiberoVlaNet, bool]:
    """Return the settings, the network with integer layers, and whether it must be recorded.

    Where programs can serve all layers, the network holds them as Stored, for a ChunkProgram; it
    does not run by itself. Else each linear is a QuantLinear. On a device other than the CPU the
    layers are simulated: the same codes and scales, float sums (quant/simulate.py).
    Raises FileNotFoundError, CheckpointError or ArtifactError.
    """
    folder = find_artifact(model, precision)
    checkpoint = read_settings(model)
    path = model / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; the artifact {folder} needs what stays float')
    digest = hash_file(path)
    if digest != checkpoint.sha256:
        raise CheckpointError(
            f'{path} is not the file that {SETTINGS} describes: its sha256 is {digest}, expected '
            f'{checkpoint.sha256}. Restore both files from the same place.'
        )
    with torch.device('meta'):
        net = LiberoVlaNet(checkpoint.config)
    sites = libero_vla_sites(net)
    artifact = read_artifact(folder, checkpoint.sha256, sites)
    once = {site.name for site in sites.in_groups(['modulation'])}  # run at load, recorded never
    running = {name: layer for name, layer in artifact.layers.items() if name not in once}
    at_load = {name: layer for name, layer in artifact.layers.items() if name in once}
    record = device == 'cpu' and recordable(running)
    make: Make = simulate if device != 'cpu' else Stored if record else QuantLinear
    try:
        replace_linears(net, running, make)
        replace_linears(net, at_load, simulate if device != 'cpu' else QuantLinear)
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f'{folder}: {error}') from error
    _fill(net, path)
    return checkpoint, net.eval().requires_grad_(False), record


def _fill(net: LiberoVlaNet, path: Path) -> None:
    """Give every parameter that is left its float32 value, and make the rotary tables."""
    expected = {name: value.detach() for name, value in net.named_parameters()}
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
