# SPDX-License-Identifier: Apache-2.0
"""What can be said of a published checkpoint before it is served: artifact and memory.

Reads names, shapes and sizes; no weight and no hash. For the gate and for the check of room.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from quantvla_ros.policies.base import PolicySettings, Prospect
from quantvla_ros.policies.folders import identify
from quantvla_ros.policies.loading import dtype_of, find_artifact, scheme_of
from quantvla_ros.policies.networks import served_network
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.artifact import JSON_NAME


class Counted(NamedTuple):
    """Numbers of a network: of each linear layer, and of the rest but for the words on disk.

    rows: of all linear layers together, each of which has a scale.
    """

    linears: Mapping[str, int]
    rows: int
    rest: int


def folder_prospect(settings: PolicySettings) -> Prospect:
    """Return about what loading a folder takes: all layers, and one of them once more in float.

    Raises ValueError with a sentence for a folder or a precision that there is not.
    """
    folder = Path(settings.model).expanduser()
    newest = max((path.stat().st_mtime_ns for path in folder.glob('*')), default=0)
    linears, rows, rest = _counted(folder, newest)
    item = dtype_of(settings.precision, settings.device).itemsize
    largest = 4 * max(linears.values())
    everything = sum(linears.values())
    if settings.precision in ('float', 'bfloat16'):
        return Prospect(item * (everything + rest) + largest)
    artifact = find_artifact(folder, settings.precision)
    if artifact is None:
        bits = scheme_of(folder, settings.precision).weight_bits
        return Prospect(everything * bits // 8 + 4 * rows + item * rest + largest)
    layers = json.loads((artifact / JSON_NAME).read_text())['layers']
    kept = sum(count for name, count in linears.items() if name not in layers)
    stored = sum(path.stat().st_size for path in artifact.glob('*.safetensors'))
    return Prospect(stored + item * (kept + rest) + largest, artifact)


@lru_cache(maxsize=4)
def _counted(folder: Path, newest: int) -> Counted:
    """Count a network without storage. newest: of the folder's files, so that a change is seen."""
    del newest
    model = served_network(identify(folder)).model
    sites = policy_sites(model).linears
    linears = {site.name: site.out_features * site.in_features for site in sites}
    inside = {f'{name}.weight' for name in linears} | {'embedding.weight'}
    rest = sum(value.numel() for name, value in model.state_dict().items() if name not in inside)
    return Counted(linears, sum(site.out_features for site in sites), rest)
