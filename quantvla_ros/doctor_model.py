# SPDX-License-Identifier: Apache-2.0
"""What a model folder is, whether it is complete, what it takes, what the contract still lacks.

`describe_model(folder, contract)` returns lines for `quantvla doctor MODEL`. Reads headers and
small files only; a folder that refuses to load is described by the sentence of the refusal.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from quantvla_ros.contract import Contract
from quantvla_ros.policies.agreement import read_agreement
from quantvla_ros.policies.checkpoints import CheckpointError
from quantvla_ros.policies.folders import Folder, identify
from quantvla_ros.policies.full_size import extras
from quantvla_ros.policies.networks import network
from quantvla_ros.policies.openvla_folder import is_oft
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.policies.tokenizers import load_tokenizer
from quantvla_ros.quant.memory import GIB, PLANS, held

SHOWN_PLANS = ('float', 'w8a8', 'w4a8', 'w4a4')

def describe_model(folder: str | Path, contract: Contract | None = None) -> list[str]:
    """Describe a model folder in lines for people; never raises for what a user can mend."""
    try:
        found = identify(Path(folder).expanduser())
    except (CheckpointError, FileNotFoundError) as error:
        return [f'not a model that can be served: {error}']
    family = 'openvla_oft' if found.family == 'openvla' and is_oft(found.path) else found.family
    lines = [f'{found.path} is {family} in the {found.format} format, '
             f'{len(found.weights.shapes)} tensors']
    lines += _complete(found)
    lines += _tokenizer(found, family, contract)
    lines += _kernels()
    return lines + _contract(family, contract)


def _complete(found: Folder) -> list[str]:
    """Check every key and shape, and count memory, without reading a tensor."""
    try:
        model = network(found).model
    except CheckpointError as error:
        return [f'incomplete: {error}']
    sites = policy_sites(model)
    rest = extras(found.family, model, sites)
    sizes = ', '.join(
        f'{name} {sum(held(sites, rest, PLANS[name]).values()) / GIB:.2f} GiB'
        for name in SHOWN_PLANS
    )
    return ['complete: every tensor is there, in its shape', f'would take {sizes}']


def _tokenizer(found: Folder, family: str, contract: Contract | None) -> list[str]:
    try:
        named = read_agreement(contract).tokenizer if contract else ''
        load_tokenizer(found.path, named, family)
    except ValueError as error:
        return [f'tokenizer: {error}']
    return ['tokenizer: found']


def _kernels() -> list[str]:
    accelerator = torch.cuda.is_available()
    triton = importlib.util.find_spec('triton') is not None
    served = 'cuda (Triton)' if accelerator and triton else 'cpu'
    why = '' if accelerator else '; no CUDA device here'
    return [f'kernels that would serve it: {served}{why}']


def _contract(family: str, contract: Contract | None) -> list[str]:
    if contract is None:
        return ['contract: none given; name one to see what it still lacks for this model']
    lines = []
    if contract.policy != family:
        lines.append(f'contract: policy is {contract.policy!r}; this folder wants {family!r}')
    if not contract.model:
        lines.append('contract: has no `model` section; camera slots, order and units of state '
                     'and action are taken from the rest of it')
    try:
        read_agreement(contract)
    except ValueError as error:
        lines.append(f'contract: {error}')
    return lines or ['contract: says all that this model needs']
