# SPDX-License-Identifier: Apache-2.0
"""openpi's JAX checkpoints (orbax) as the PyTorch folder that the readers here know.

Layers lie stacked along a first dimension there, kernels transposed, heads apart. Each stored
array is read once and its layers go to disk before the next is read; values keep their bits.
Needs the tensorstore package, on whatever machine converts; a robot needs it not.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantvla_ros.policies.checkpoints import SHOWN, CheckpointError
from quantvla_ros.quant.tensor_file import Spool, write_tensors

PALIGEMMA = 'paligemma_with_expert.paligemma.model'
TOWER = f'{PALIGEMMA}.vision_tower.vision_model'
LANGUAGE = f'{PALIGEMMA}.language_model'
EXPERT = 'paligemma_with_expert.gemma_expert.model'
PROJECTIONS = ('action_in_proj', 'action_out_proj', 'time_mlp_in', 'time_mlp_out', 'state_proj',
               'action_time_mlp_in', 'action_time_mlp_out')
MISSING = ('this is an openpi JAX checkpoint (orbax); converting it needs the tensorstore '
           'package: pip install tensorstore, then quantvla convert {folder} --out NEW_FOLDER')

Split = Callable[[np.ndarray], dict[str, np.ndarray]]  # one layer's array -> parts of a name


@dataclass(frozen=True)
class Rule:
    """One stored array: what its name becomes, and how (one layer of) it is turned.

    name: with {i} where the array holds a layer at each index of its first dimension.
    """

    name: str
    turn: Split


def _as(part: str, turn: Callable[[np.ndarray], np.ndarray]) -> Split:
    return lambda a: {part: turn(a)}


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _transposed(a: np.ndarray) -> np.ndarray:
    return a.T


def _heads_out(a: np.ndarray) -> np.ndarray:
    """(width, heads, D) -> (heads * D, width)."""
    return a.reshape(a.shape[0], -1).T


def _heads_in(a: np.ndarray) -> np.ndarray:
    """(heads, D, width) -> (width, heads * D)."""
    return a.reshape(-1, a.shape[-1]).T


def _queries(a: np.ndarray) -> np.ndarray:
    """(heads, width, D) -> (heads * D, width)."""
    return a.transpose(0, 2, 1).reshape(-1, a.shape[1])


def _keys_values(a: np.ndarray) -> dict[str, np.ndarray]:
    """(2, 1, width, D) -> keys and values (D, width)."""
    return {'k_proj.weight': a[0, 0].T, 'v_proj.weight': a[1, 0].T}


def _gating(a: np.ndarray) -> dict[str, np.ndarray]:
    """(2, width, hidden) -> gate and up (hidden, width)."""
    return {'gate_proj.weight': a[0].T, 'up_proj.weight': a[1].T}


def _vision() -> dict[str, Rule]:
    block, layer = 'PaliGemma/img/Transformer/encoderblock', f'{TOWER}.encoder.layers.{{i}}.'
    attention = f'{block}/MultiHeadDotProductAttention_0'
    rules = {
        'PaliGemma/img/embedding/kernel': Rule(
            f'{TOWER}.embeddings.patch_embedding.',
            _as('weight', lambda a: a.transpose(3, 2, 0, 1))),
        'PaliGemma/img/embedding/bias': Rule(
            f'{TOWER}.embeddings.patch_embedding.', _as('bias', _same)),
        'PaliGemma/img/pos_embedding': Rule(
            f'{TOWER}.embeddings.position_embedding.',
            _as('weight', lambda a: a.reshape(-1, a.shape[-1]))),
        'PaliGemma/img/Transformer/encoder_norm/scale': Rule(
            f'{TOWER}.post_layernorm.', _as('weight', _same)),
        'PaliGemma/img/Transformer/encoder_norm/bias': Rule(
            f'{TOWER}.post_layernorm.', _as('bias', _same)),
        'PaliGemma/img/head/kernel': Rule(
            f'{PALIGEMMA}.multi_modal_projector.linear.', _as('weight', _transposed)),
        'PaliGemma/img/head/bias': Rule(
            f'{PALIGEMMA}.multi_modal_projector.linear.', _as('bias', _same)),
        f'{attention}/out/kernel': Rule(f'{layer}self_attn.out_proj.', _as('weight', _heads_in)),
        f'{attention}/out/bias': Rule(f'{layer}self_attn.out_proj.', _as('bias', _same)),
    }
    for theirs, ours in (('LayerNorm_0', 'layer_norm1'), ('LayerNorm_1', 'layer_norm2')):
        rules[f'{block}/{theirs}/scale'] = Rule(f'{layer}{ours}.', _as('weight', _same))
        rules[f'{block}/{theirs}/bias'] = Rule(f'{layer}{ours}.', _as('bias', _same))
    for theirs, ours in (('Dense_0', 'fc1'), ('Dense_1', 'fc2')):
        dense = f'{block}/MlpBlock_0/{theirs}'
        rules[f'{dense}/kernel'] = Rule(f'{layer}mlp.{ours}.', _as('weight', _transposed))
        rules[f'{dense}/bias'] = Rule(f'{layer}mlp.{ours}.', _as('bias', _same))
    for theirs, ours in (('query', 'q_proj'), ('key', 'k_proj'), ('value', 'v_proj')):
        rules[f'{attention}/{theirs}/kernel'] = Rule(
            f'{layer}self_attn.{ours}.', _as('weight', _heads_out))
        rules[f'{attention}/{theirs}/bias'] = Rule(
            f'{layer}self_attn.{ours}.', _as('bias', lambda a: a.reshape(-1)))
    return rules


def _gemma(mark: str, ours: str) -> dict[str, Rule]:
    """One stack of Gemma layers; mark: what openpi puts behind the names of the second stack."""
    stored, layer = 'PaliGemma/llm/layers', f'{ours}.layers.{{i}}.'
    rules = {
        f'{stored}/attn/q_einsum{mark}/w': Rule(
            f'{layer}self_attn.', _as('q_proj.weight', _queries)),
        f'{stored}/attn/kv_einsum{mark}/w': Rule(f'{layer}self_attn.', _keys_values),
        f'{stored}/attn/attn_vec_einsum{mark}/w': Rule(
            f'{layer}self_attn.', _as('o_proj.weight', _heads_in)),
        f'{stored}/mlp{mark}/gating_einsum': Rule(f'{layer}mlp.', _gating),
        f'{stored}/mlp{mark}/linear': Rule(f'{layer}mlp.', _as('down_proj.weight', _transposed)),
    }
    for theirs, norm in ((f'{stored}/pre_attention_norm{mark}', f'{layer}input_layernorm.'),
                         (f'{stored}/pre_ffw_norm{mark}', f'{layer}post_attention_layernorm.'),
                         (f'PaliGemma/llm/final_norm{mark}', f'{ours}.norm.')):
        rules[f'{theirs}/scale'] = Rule(norm, _as('weight', _same))
        rules[f'{theirs}/Dense_0/kernel'] = Rule(norm, _as('dense.weight', _transposed))
        rules[f'{theirs}/Dense_0/bias'] = Rule(norm, _as('dense.bias', _same))
    return rules


def rules() -> dict[str, Rule]:
    """Every array that openpi stores of pi0 and pi0.5."""
    found = {
        **_vision(), **_gemma('', LANGUAGE), **_gemma('_1', EXPERT),
        'PaliGemma/llm/embedder/input_embedding': Rule(
            f'{LANGUAGE}.embed_tokens.', _as('weight', _same)),
    }
    for name in PROJECTIONS:
        found[f'{name}/kernel'] = Rule(f'{name}.', _as('weight', _transposed))
        found[f'{name}/bias'] = Rule(f'{name}.', _as('bias', _same))
    return found


def to_torch(array: np.ndarray) -> Tensor:
    """The same bits as a tensor; numpy has no bfloat16 of its own."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == 'bfloat16':
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class OrbaxStore:
    """Arrays of a `params` folder by their path, without the `value` that training adds."""

    def __init__(self, params: Path) -> None:
        if importlib.util.find_spec('tensorstore') is None:
            raise CheckpointError(MISSING.format(folder=params.parent))
        self._tensorstore: Any = importlib.import_module('tensorstore')
        base = params.resolve().as_uri() + '/'
        packed = (params / 'manifest.ocdbt').is_file()
        self._kvstore: Any = {'driver': 'ocdbt', 'base': base} if packed else base
        store = self._tensorstore.KvStore.open(self._kvstore).result()
        self._at: dict[str, tuple[str, str]] = {}
        for key in store.list().result():
            stored, _, leaf = key.decode().rpartition('/')
            driver = {'.zarray': 'zarr', 'zarr.json': 'zarr3'}.get(leaf)
            if driver and stored.startswith('params.'):
                path = stored.removeprefix('params.').removesuffix('.value').replace('.', '/')
                self._at[path] = (stored, driver)
        if not self._at:
            raise CheckpointError(f'{params} holds no arrays that orbax wrote')

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of all arrays."""
        return tuple(sorted(self._at))

    def read(self, name: str) -> np.ndarray:
        """Read one array."""
        stored, driver = self._at[name]
        where = self._kvstore
        kvstore = {**where, 'path': stored + '/'} if isinstance(where, dict) else where + stored
        spec = {'driver': driver, 'kvstore': kvstore}
        return self._tensorstore.open(spec, read=True, open=True).result().read().result()


def _parts(rule: Rule, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    layers = enumerate(array) if '{i}' in rule.name else [(0, array)]
    for i, layer in layers:
        for part, values in rule.turn(layer).items():
            yield rule.name.format(i=i) + part, values


def convert(folder: Path, out: Path, dtype: torch.dtype | None = None) -> int:
    """Write the PyTorch folder of a JAX checkpoint; returns how many tensors it holds.

    dtype: None keeps every value's bits. Raises CheckpointError with a sentence; out is then
    as it was.
    """
    if not (folder / 'params').is_dir():
        raise CheckpointError(f'{folder} has no params/, which openpi JAX checkpoints have')
    if out.exists():
        raise CheckpointError(f'{out} is there already; name a new folder')
    store, known = OrbaxStore(folder / 'params'), rules()
    strange = [name for name in store.names if name not in known]
    if strange:
        raise CheckpointError(
            f'{folder} holds {len(strange)} arrays that pi0 and pi0.5 have not: '
            + '; '.join(strange[:SHOWN]))
    scratch = out.with_name(f'.{out.name}.part')
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    spool = Spool(scratch)
    try:
        for name in store.names:
            for key, values in _parts(known[name], store.read(name)):
                tensor = to_torch(values)
                spool.add(key, tensor if dtype is None else tensor.to(dtype))
        write_tensors(scratch / 'model.safetensors', spool.described, spool.read,
                      {'format': 'pt'})
        (scratch / 'config.json').write_text(json.dumps({'converted_from': 'openpi JAX'}) + '\n')
        _assets(folder, scratch)
        scratch.rename(out)
    finally:
        spool.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return len(spool.described)


def _assets(folder: Path, out: Path) -> None:
    """Copy the statistics, from beside params/ or from one folder up."""
    for place in (folder / 'assets', folder.parent / 'assets'):
        if place.is_dir():
            shutil.copytree(place, out / 'assets')
            return
