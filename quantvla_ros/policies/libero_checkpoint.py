# SPDX-License-Identifier: Apache-2.0
"""The folder of a trained LiberoVlaNet: policy.json beside model.safetensors.

policy.json holds the architecture, the contract's name, the vocabulary, the statistics and the
hash of the weights, so that a folder is either whole or refused: a missing, unexpected or
misshapen weight, another hash or another format raises one ValueError that lists all of it.
Executes nothing from the folder and downloads nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from quantvla_ros.policies.libero_vla import LiberoVlaNet, VlaConfig
from quantvla_ros.policies.vocabulary import Vocabulary

FORMAT = 1
WEIGHTS = 'model.safetensors'
SETTINGS = 'policy.json'
STORED = torch.float16


class CheckpointError(ValueError):
    """A model folder that cannot be trusted; the message lists every reason."""


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of what the network reads and writes, in SI.

    state: (state,) joint positions. action: (chunk, action), joint targets minus the measured
    position, and the gripper as +1 closed, -1 open.
    """

    state_mean: np.ndarray
    state_std: np.ndarray
    action_mean: np.ndarray
    action_std: np.ndarray

    def problems(self, config: VlaConfig) -> list[str]:
        """List what does not fit the architecture, one sentence each."""
        found = []
        for item in fields(self):
            value = getattr(self, item.name)
            part = item.name.partition('_')[0]
            shape = (config.state,) if part == 'state' else (config.chunk, config.action)
            if value.shape != shape:
                found.append(f'statistics.{item.name} has shape {value.shape}; expected {shape}')
            elif not np.isfinite(value).all():
                found.append(f'statistics.{item.name} holds a value that is not finite')
            elif item.name.endswith('std') and not (value > 0).all():
                found.append(f'statistics.{item.name} holds a value that is not positive')
        return found


@dataclass(frozen=True)
class Checkpoint:
    """What policy.json says, checked."""

    config: VlaConfig
    contract: str
    vocabulary: Vocabulary
    statistics: Statistics
    steps: int
    sha256: str = ''


def write_checkpoint(folder: Path, net: LiberoVlaNet, checkpoint: Checkpoint) -> str:
    """Write both files, weights in float16. Returns the sha256 of the weights.

    Raises CheckpointError when a weight is not finite in float16 or the statistics do not fit.
    """
    weights = {name: value.detach().cpu().to(STORED) for name, value in net.state_dict().items()}
    problems = checkpoint.statistics.problems(net.config) + [
        f'weight {name} is not finite in float16'
        for name, value in weights.items()
        if not bool(value.isfinite().all())
    ]
    if problems:
        raise CheckpointError('nothing was written:\n  ' + '\n  '.join(problems))
    data = save({name: value.contiguous() for name, value in weights.items()})
    digest = hashlib.sha256(data).hexdigest()
    document = {
        'format': FORMAT,
        'contract': checkpoint.contract,
        'steps': checkpoint.steps,
        'weights': {'file': WEIGHTS, 'sha256': digest, 'parameters': net.parameter_count},
        'architecture': asdict(net.config),
        'vocabulary': list(checkpoint.vocabulary.words),
        'statistics': {
            item.name: getattr(checkpoint.statistics, item.name).tolist()
            for item in fields(Statistics)
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(data)
    (folder / SETTINGS).write_text(json.dumps(document, indent=1) + '\n')
    return digest


def read_settings(folder: Path) -> Checkpoint:
    """Read and check policy.json alone. Raises FileNotFoundError or CheckpointError."""
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is missing; a model folder holds {SETTINGS} and {WEIGHTS}'
        )
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f'{path} is not JSON: {error}') from error
    if document.get('format') != FORMAT:
        raise CheckpointError(
            f'{path}: format is {document.get("format")!r}; this package reads {FORMAT}'
        )
    try:
        config = VlaConfig(**document['architecture'])
        checkpoint = Checkpoint(
            config=config,
            contract=str(document['contract']),
            vocabulary=Vocabulary(document['vocabulary'], config.words),
            statistics=Statistics(
                **{k: np.asarray(v, np.float64) for k, v in document['statistics'].items()}
            ),
            steps=int(document['steps']),
            sha256=str(document['weights']['sha256']),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path}: {type(error).__name__}: {error}') from error
    problems = checkpoint.statistics.problems(config)
    if len(checkpoint.vocabulary.words) > config.vocabulary:
        problems.append(
            f'vocabulary has {len(checkpoint.vocabulary.words)} words; the architecture '
            f'embeds {config.vocabulary}'
        )
    if problems:
        raise CheckpointError(f'{path}:\n  ' + '\n  '.join(problems))
    return checkpoint


def read_checkpoint(folder: Path) -> tuple[Checkpoint, LiberoVlaNet]:
    """Return the settings and the network, in float32 and ready to run.

    Raises FileNotFoundError or CheckpointError; nothing is loaded unless everything fits.
    """
    checkpoint = read_settings(folder)
    path = verified_weights(folder, checkpoint)
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f'{path} is not a safetensors file: {error}') from error
    with torch.device('meta'):
        expected = LiberoVlaNet(checkpoint.config).state_dict()
    problems = weight_problems(expected, weights)
    if problems:
        raise CheckpointError(f'{path} does not fit the architecture:\n  ' + '\n  '.join(problems))
    net = LiberoVlaNet(checkpoint.config)
    net.load_state_dict(weights)  # copies each weight into its float32 place
    return checkpoint, net.eval().requires_grad_(False)


def verified_weights(folder: Path, checkpoint: Checkpoint) -> Path:
    """Return the file of the weights, once its hash is the one that policy.json states.

    Raises FileNotFoundError or CheckpointError.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is missing. The weights belong to the package; restore the file, or train '
            'them with `quantvla train`.'
        )
    digest = hash_file(path)
    if digest != checkpoint.sha256:
        raise CheckpointError(
            f'{path} is not the file that {SETTINGS} describes: its sha256 is {digest}, expected '
            f'{checkpoint.sha256}. Restore both files from the same place.'
        )
    return path


def hash_file(path: Path) -> str:
    """Return the sha256 of a file without holding it in memory."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weight_problems(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> list[str]:
    """List missing, unexpected, misshapen, mistyped and non-finite weights, one sentence each."""
    problems = [f'{name} is missing' for name in expected if name not in found]
    for name, value in found.items():
        if name not in expected:
            problems.append(f'{name} is not part of the architecture')
        elif value.shape != expected[name].shape:
            problems.append(
                f'{name} has shape {tuple(value.shape)}; expected {tuple(expected[name].shape)}'
            )
        elif value.dtype != STORED:
            problems.append(f'{name} is {value.dtype}; expected {STORED}')
        elif not bool(value.isfinite().all()):
            problems.append(f'{name} holds a value that is not finite')
    return problems
