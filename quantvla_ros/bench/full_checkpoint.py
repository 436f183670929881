# SPDX-License-Identifier: Apache-2.0
"""A full-size checkpoint with random weights, in its published format, written a tensor at a time.

For measuring what the real one would take where none is at hand: every tensor has its published
name, shape and bfloat16; values are random, of a size that keeps activations finite. Statistics
and a tokenizer of single bytes stand beside them, so that the folder can be served as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantvla_ros.policies import groot_keys, keys
from quantvla_ros.policies.bpe import byte_letters
from quantvla_ros.policies.checkpoints import shapes_of
from quantvla_ros.policies.full_size import full_size
from quantvla_ros.quant.tensor_file import size_of, write_tensors

Shapes = dict[str, tuple[int, ...]]
POOL = 1 << 22  # random numbers that all tensors are cut from
SHARD_BYTES = 5_000_000_000
SPARE = 1.6  # disk that is asked for, over the size of the checkpoint: artifacts come beside it
CONTRACTS = {'pi05': 'pi05_libero', 'groot_n15': 'groot_n15_libero'}
STATE, ACTION = 9, 8  # of those contracts
GROOT_SLOTS = 32


def _renamed(rules: keys.Rules, model: Any, prefix: str) -> Shapes:
    """Published names and shapes of a network's tensors."""
    back = keys.key_map([(ours, theirs) for theirs, ours in rules])
    found = {}
    for name, shape in shapes_of(model).items():
        place = back(name)
        if place is not None:
            found[prefix + place.name] = shape
    return found


def _pi05() -> Shapes:
    model = full_size('pi05')
    heads = {
        f'model.{keys.PI_LM_HEAD}': (model.config.vocabulary, model.config.backbone.width),
        'model.paligemma_with_expert.gemma_expert.lm_head.weight': (
            model.config.vocabulary, model.config.expert.width),
    }
    return _renamed(keys.PI05, model, 'model.') | heads


def _groot() -> Shapes:
    model = full_size('groot_n15')
    own = shapes_of(model)
    stacked: Shapes = {}
    for theirs, ours in groot_keys.STACKED.items():
        rows, columns = own[f'{ours}.weight']
        stacked[f'{theirs}.W'] = (GROOT_SLOTS, columns, rows)
        stacked[f'{theirs}.b'] = (GROOT_SLOTS, rows)
    return _renamed(groot_keys.RULES, model, '') | stacked


SHAPES: Mapping[str, Callable[[], Shapes]] = {'pi05': _pi05, 'groot_n15': _groot}


class Drawn:
    """Tensors by name: gains around one, matrices by their fan-in, cut from one random pool."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self._pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
        self._pool = self._pool.to(torch.bfloat16)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        shape = self.shapes[name]
        count = size_of(torch.int8, shape)
        scale = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        values = (self._pool[: min(count, POOL)] * scale).repeat(-(-count // POOL))[:count]
        return values.reshape(shape)


def checkpoint_bytes(family: str) -> int:
    """Bytes of the tensors of a checkpoint in bfloat16."""
    return sum(size_of(torch.bfloat16, shape) for shape in _shapes(family).values())


def _shapes(family: str) -> Shapes:
    if family not in SHAPES:
        raise ValueError(f'{family!r} cannot be measured; {" and ".join(SHAPES)} can')
    return SHAPES[family]()


def write_checkpoint(family: str, folder: Path) -> None:
    """Write the folder. Raises ValueError when the disk is too small for it."""
    shapes = _shapes(family)
    need = checkpoint_bytes(family) * SPARE
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(f'{folder} has {free / 1e9:.1f} GB free; {need / 1e9:.1f} GB are needed; '
                         'name another folder with --scratch')
    drawn = Drawn(shapes)
    if family == 'pi05':
        described = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        write_tensors(folder / 'model.safetensors', described, drawn.read)
        _lerobot_files(folder)
    else:
        _shards(folder, drawn)
        _isaac_files(folder)
    _tokenizer(folder)


def _shards(folder: Path, drawn: Drawn) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in drawn.shapes.items():
        size += size_of(torch.bfloat16, shape)
        if size > SHARD_BYTES:
            shards.append([])
            size = size_of(torch.bfloat16, shape)
        shards[-1].append(name)
    place = {}
    for number, names in enumerate(shards, 1):
        file = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        described = {name: (torch.bfloat16, drawn.shapes[name]) for name in names}
        write_tensors(folder / file, described, drawn.read)
        place.update(dict.fromkeys(names, file))
    _json(folder / 'model.safetensors.index.json', {'weight_map': place})


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _range(size: int) -> dict[str, list[float]]:
    low, high = [-1.5] * size, [1.5] * size
    return {'min': low, 'max': high, 'q01': low, 'q99': high, 'mean': [0.0] * size,
            'std': [0.7] * size}


def _lerobot_files(folder: Path) -> None:
    cameras = ('base_0_rgb', 'left_wrist_0_rgb', 'right_wrist_0_rgb')
    _json(folder / 'config.json', {
        'type': 'pi05', 'chunk_size': 50, 'num_inference_steps': 10, 'tokenizer_max_length': 200,
        'input_features': {f'observation.images.{name}': {'type': 'VISUAL'} for name in cameras},
        'normalization_mapping': {'STATE': 'QUANTILES', 'ACTION': 'QUANTILES'},
    })
    for pipeline, step, feature, size in (
        ('policy_preprocessor', 'normalizer_processor', 'observation.state', STATE),
        ('policy_postprocessor', 'unnormalizer_processor', 'action', ACTION),
    ):
        _json(folder / f'{pipeline}.json', {'steps': [
            {'registry_name': step, 'state_file': f'{pipeline}.safetensors'}]})
        values = {f'{feature}.{k}': torch.tensor(v) for k, v in _range(size).items()}
        write_tensors(folder / f'{pipeline}.safetensors',
                      {name: (t.dtype, tuple(t.shape)) for name, t in values.items()},
                      values.__getitem__)


def _isaac_files(folder: Path) -> None:
    _json(folder / 'config.json', {
        'model_type': 'gr00t_n1_5', 'action_horizon': 16,
        'action_head_cfg': {'action_horizon': 16, 'num_inference_timesteps': 4},
    })
    _json(folder / 'experiment_cfg' / 'metadata.json', {'new_embodiment': {'statistics': {
        'state': {'arm': _range(7), 'gripper': _range(STATE - 7)},
        'action': {'arm': _range(7), 'gripper': _range(ACTION - 7)},
    }}})


def _tokenizer(folder: Path) -> None:
    """One token for each byte: as many tokens as a prompt has letters, the longest there are."""
    marks = ['<bos>', '<|im_start|>', '<|im_end|>', '<img>', '</img>', '<IMG_CONTEXT>']
    letters = {letter: byte for byte, letter in byte_letters().items()}
    _json(folder / 'tokenizer.json', {
        'model': {'type': 'BPE', 'vocab': letters, 'merges': []},
        'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True},
        'added_tokens': [{'content': mark, 'id': 256 + i} for i, mark in enumerate(marks)],
    })
