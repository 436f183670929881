# SPDX-License-Identifier: Apache-2.0
"""What a model folder is, whether it is complete, what it takes, what the contract still lacks.

`describe_model(folder, contract)` returns findings for `quantvla doctor MODEL`. Reads headers,
small files, and whole weights only to hash them where an artifact must belong to them. What
refuses to load is described by the sentence of the refusal.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from quantvla_ros.contract import Contract
from quantvla_ros.kernels import dispatch
from quantvla_ros.policies.agreement import Agreement, read_agreement
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.checkpoints import CheckpointError, Stored, hash_of
from quantvla_ros.policies.door import Door
from quantvla_ros.policies.folders import Folder, identify
from quantvla_ros.policies.full_size import extras, parameters
from quantvla_ros.policies.loading import artifacts_beside
from quantvla_ros.policies.networks import network, served_network
from quantvla_ros.policies.openvla_folder import is_oft
from quantvla_ros.policies.runtime import OPENERS, opener
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.policies.tokenizers import load_tokenizer
from quantvla_ros.quant.artifact import ArtifactReader
from quantvla_ros.quant.memory import GIB, PLANS, held

OK, NOTE, BAD = 'ok', 'note', 'BAD'
SHOWN_PLANS = ('float', 'w8a8', 'w4a8', 'w4a4')
Line = tuple[str, str]  # level, sentence


def describe_model(folder: str | Path, contract: Contract | None = None) -> list[Line]:
    """Describe a model folder in lines for people; never raises for what a user can mend."""
    try:
        found = identify(Path(folder).expanduser())
    except (CheckpointError, FileNotFoundError) as error:
        return [(BAD, f'not a model that can be served: {error}')]
    family = 'openvla_oft' if found.family == 'openvla' and is_oft(found.path) else found.family
    lines = [(OK, f'{found.path} is {family} in the {found.format} format, '
                  f'{len(found.weights.shapes)} tensors')]
    try:
        stored = network(found)
    except CheckpointError as error:
        return [*lines, (BAD, f'incomplete: {error}')]
    lines += _sizes(stored)
    lines += _memory(found)
    lines += _tokenizer(found, family, contract)
    lines += _artifacts(found)
    lines += _kernels()
    return [*lines, *_contract(found, family, contract)]


def _sizes(stored: Stored) -> Iterator[Line]:
    """Say that every tensor is there, and how large the network is."""
    yield OK, 'complete: every tensor is there, in its shape'
    sites = policy_sites(stored.model)
    stacks: dict[str, int] = {}
    for block in sites.blocks:
        stack = block.rpartition('.')[0]
        stacks[stack] = stacks.get(stack, 0) + 1
    words, width = stored.model.embedding.weight.shape
    yield OK, (f'sizes: {parameters(stored.model) / 1e6:.1f} M parameters, {words} words of '
               f'{width}, ' + ', '.join(f'{count} {name}' for name, count in stacks.items()))


def _memory(found: Folder) -> Iterator[Line]:
    """Count what a served model would hold at each precision."""
    model: Any = served_network(found).model
    sites = policy_sites(model)
    rest = extras(found.family, model, sites)
    sizes = ', '.join(
        f'{name} {sum(held(sites, rest, PLANS[name]).values()) / GIB:.3f} GiB'
        for name in SHOWN_PLANS
    )
    yield OK, f'would hold {sizes}, and about 0.3 GiB of interpreter and torch besides'


def _artifacts(found: Folder) -> Iterator[Line]:
    """Say which artifacts stand beside the weights, and whether they were made of them."""
    names = artifacts_beside(found.path)
    if not names:
        yield OK, ('artifacts: none; a scheme such as w4a8 is rounded to nearest while it is '
                   'read, `quantvla quantize` makes better ones')
        return
    stored = served_network(found)
    checkpoint = hash_of(stored.source.files)
    for name in names:
        try:
            reader = ArtifactReader(found.path / name, checkpoint, policy_sites(stored.model))
        except ValueError as error:
            yield BAD, f'artifact {name}: {error}'
            continue
        made = reader.provenance
        frames = f'frames {made.frames[:12]}' if made.frames else 'no frames'
        yield OK, (f'artifact {name}: {made.recipe} {made.precision}, {len(reader.names)} layers, '
                   f'{frames}; belongs to these weights')


def _tokenizer(found: Folder, family: str, contract: Contract | None) -> Iterator[Line]:
    try:
        named = read_agreement(contract).tokenizer if contract else ''
        load_tokenizer(found.path, named, family)
    except ValueError as error:
        yield BAD, f'tokenizer: {error}'
        return
    yield OK, 'tokenizer: found'


def _kernels() -> Iterator[Line]:
    path = dispatch.path_name()
    yield (NOTE if path == 'reference' else OK), (
        f'kernels that would serve its integer layers on the CPU: {path}')
    accelerator = torch.cuda.is_available()
    triton = importlib.util.find_spec('triton') is not None
    yield OK, ('on the GPU: Triton' if accelerator and triton else
               'on the GPU: none, ' + ('Triton is missing' if accelerator else 'no CUDA device'))


def _contract(found: Folder, family: str, contract: Contract | None) -> Iterator[Line]:
    """Say what the contract lacks for this model, as far as can be told without a robot."""
    if contract is None:
        yield NOTE, 'contract: none given; name one to see what it still lacks for this model'
        return
    lines = 0
    if contract.policy != family:
        lines += 1
        yield NOTE, f'contract: policy is {contract.policy!r}; this folder wants {family!r}'
    if not contract.model:
        lines += 1
        yield NOTE, ('contract: has no `model` section; camera slots, order and units of state '
                     'and action are taken from the rest of it')
    for check in (_agrees, _fits):
        try:
            check(found, contract)
        except ValueError as error:
            yield BAD, f'contract: {error}'
            return
    if not lines:
        yield OK, 'contract: says all that this model needs'


def _agrees(found: Folder, contract: Contract) -> None:
    del found
    read_agreement(contract)


def _fits(found: Folder, contract: Contract) -> None:
    """Open the folder with the contract, statistics and all, as serving would; reads no weight."""
    if found.family not in OPENERS:
        return
    agreement: Agreement = read_agreement(contract)
    open_it: Callable[..., Any] = opener(found.family)
    served = open_it(found, agreement, PolicySettings(model=str(found.path)))
    Door(contract, agreement, served.slots, served.state, served.action)
