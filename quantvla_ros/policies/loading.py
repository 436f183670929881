# SPDX-License-Identifier: Apache-2.0
"""Bring a network that is still without weights to a precision, a layer at a time.

A precision is `float`, `bfloat16`, an artifact beside the checkpoint (or its path), or a scheme
such as w4a8, which is then rounded to nearest while it is read. No float weight of a quantized
layer stays; the table of words stays on disk. Refuses an artifact of other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantvla_ros.policies import savings
from quantvla_ros.policies.checkpoints import Stored, hash_of
from quantvla_ros.policies.embedding import DiskEmbedding
from quantvla_ros.policies.folders import Folder
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.artifact import JSON_NAME, ArtifactError, ArtifactReader
from quantvla_ros.quant.linear import Make, QuantizedLayer, QuantLinear, replace_linears
from quantvla_ros.quant.recipes import find_recipe
from quantvla_ros.quant.scheme import Scheme, parse_scheme
from quantvla_ros.quant.stream import page, round_streamed
from quantvla_ros.resources import return_free_memory

DTYPES = {'float': torch.float32, 'bfloat16': torch.bfloat16}
ROUNDED = 'rounded to nearest while it was read'
TIMED = ('time_in.', 'time_out.', 'last_modulation.', 'action_time_in.')

# families whose network is planned for the GPU as a whole (policies/cuda_engine.py)
PLANNED = ('pi05', 'pi0', 'groot_n15')

# (network, folder, precision, device) -> where its layers came from, in words
Install = Callable[[Stored, Folder, str, str], str]


def find_artifact(model: Path, precision: str) -> Path | None:
    """Return the artifact folder that a precision names, or None."""
    for folder in (model / precision, Path(precision).expanduser()):
        if (folder / JSON_NAME).is_file():
            return folder
    return None


def artifacts_beside(model: Path) -> list[str]:
    """Names of the artifacts in a model folder."""
    return sorted(path.parent.name for path in model.glob(f'*/{JSON_NAME}'))


def scheme_of(model: Path, precision: str) -> Scheme:
    """Read a precision that is no artifact. Raises ValueError that lists what there is."""
    try:
        scheme = parse_scheme(precision)
    except ValueError as error:
        known = ', '.join([*DTYPES, *artifacts_beside(model)])
        raise ValueError(
            f'precision {precision!r} is not one of {known}, nor a scheme that could be rounded '
            f'to: {error}'
        ) from error
    if scheme.is_float:
        raise ValueError(f'precision {precision!r} leaves the weights in float; take float')
    return scheme


def install(stored: Stored, folder: Folder, precision: str, device: str) -> str:
    """Give a network its layers at a precision. Raises ValueError or ArtifactError."""
    origin = precision
    if precision not in DTYPES:
        make = _make(folder.family, device)
        found = find_artifact(folder.path, precision)
        if found is not None:
            _from_artifact(stored, found, make)
            origin = f'artifact {found.name}'
        else:
            _rounded(stored, scheme_of(folder.path, precision), make)
            origin = ROUNDED
    _finish(stored, dtype_of(precision, device), device)
    return origin


def dtype_of(precision: str, device: str) -> torch.dtype:
    """Type of what is not quantized: what a CPU multiplies best, and what a GPU does."""
    rest = torch.float32 if device == 'cpu' else torch.bfloat16
    return DTYPES.get(precision, rest)


class HeldLayer(nn.Module):
    """Keeps a quantized layer in its place until a plan for the GPU takes it. Runs nothing."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer: QuantizedLayer | None = layer

    def give(self) -> QuantizedLayer:
        """Hand the layer over; it is not held twice."""
        layer, self.layer = self.layer, None
        if layer is None:
            raise RuntimeError('a plan has taken this layer already')
        return layer


def _make(family: str, device: str) -> Make:
    """What stands in the place of a quantized linear."""
    if device == 'cpu':
        return QuantLinear
    if family in PLANNED:
        return HeldLayer
    return partial(QuantLinear, device=device)


def install_paged(stored: Stored, folder: Folder, precision: str, device: str) -> str:
    """Leave every linear on disk, in float32: for quantizing what does not fit the memory."""
    del folder, precision
    page(stored.model, [s.name for s in policy_sites(stored.model).linears], stored.read)
    _finish(stored, torch.float32, device)
    return 'paged from disk'


def _finish(stored: Stored, dtype: torch.dtype, device: str) -> None:
    """The table of words on disk, everything else that is left in memory."""
    stored.model.embedding = DiskEmbedding(partial(stored.rows, 'embedding.weight'), dtype)
    stored.fill(dtype=dtype, device=device)


def _from_artifact(stored: Stored, folder: Path, make: Make) -> None:
    checkpoint = hash_of(stored.source.files)
    reader = ArtifactReader(folder, checkpoint, policy_sites(stored.model))
    for name in reader.names:
        try:
            replace_linears(stored.model, {name: reader.layer(name)}, make)
        except ArtifactError:
            raise
        except (ValueError, AttributeError) as error:
            raise ArtifactError(f'{folder}: {error}') from error
        return_free_memory()


def _rounded(stored: Stored, scheme: Scheme, make: Make) -> None:
    def take(name: str, layer: QuantizedLayer) -> None:
        replace_linears(stored.model, {name: layer}, make)
        return_free_memory()

    round_streamed(policy_sites(stored.model), find_recipe('rtn'), scheme, stored.read, take)


def fixed_times(
    stored: Stored, steps: int, dtype: torch.dtype, device: str
) -> tuple[list[Any], list[savings.Saving]]:
    """Compute what the denoising times decide, then drop its layers and whatever else is unused.

    Of the modulations one at a time is in memory; nothing that is dropped is read again.
    """
    model = stored.model
    dense = [name for name, module in model.named_modules()
             if name.endswith('.dense') and isinstance(module, nn.Linear)]
    page(model, dense, stored.read, dtype)
    stored.fill(dtype=dtype, device=device, only=TIMED)
    conditions: list[Tensor] = savings.condition_table(model, steps)
    dropped = savings.drop_unused(model, steps)
    return_free_memory()
    return conditions, dropped
