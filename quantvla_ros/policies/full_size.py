# SPDX-License-Identifier: Apache-2.0
"""Published networks at full size without storage, for counting: parameters, bytes, operations.

Builds on the meta device only. `whole` is as published (less heads that no action uses), `served`
after the exact savings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quantvla_ros.policies import savings
from quantvla_ros.policies.groot_n15 import GrootConfig, GrootN15
from quantvla_ros.policies.pi0 import Pi0, Pi0Config
from quantvla_ros.policies.pi05 import Pi05, Pi05Config
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.policies.smolvla import SmolVla, SmolVlaConfig
from quantvla_ros.quant.memory import Extras
from quantvla_ros.quant.sites import PolicySites

STEPS = {'pi05': 10, 'pi0': 10, 'groot_n15': 4, 'smolvla': 10}
# a long prefix: patches of two or three cameras, words
TOKENS = {'pi05': 968, 'pi0': 968, 'groot_n15': 560, 'smolvla': 241}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    'pi05': lambda: Pi05(Pi05Config()),
    'pi0': lambda: Pi0(Pi0Config()),
    'groot_n15': lambda: GrootN15(GrootConfig()),
    'smolvla': lambda: SmolVla(SmolVlaConfig()),
}
# what a checkpoint stores and no network here builds: name -> parameters
NEVER_BUILT: dict[str, dict[str, int]] = {
    'pi05': {'heads over words, unused': 257152 * (2048 + 1024)},
    'pi0': {'heads over words, unused': 257152 * (2048 + 1024)},
    'smolvla': {'head over words, unused': 49280 * 960},
    'groot_n15': {
        'pooling head of the vision tower, unused': 15238352,
        'embodiments that are not this robot, 31 of 32': 31 * 9855008,
    },
}


def full_size(family: str) -> Any:
    """Return a published network at full size, without storage."""
    if family not in MAKERS:
        raise ValueError(f'{family!r} is unknown; known are {", ".join(MAKERS)}')
    with torch.device('meta'):
        return MAKERS[family]()


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def cache_numbers(family: str, model: Any) -> int:
    """Keys and values that one prefix leaves."""
    tokens = TOKENS.get(family, 0)
    if family == 'groot_n15':
        return tokens * 2 * model.config.width * model.config.depth // 2
    if family in ('pi05', 'pi0', 'smolvla'):
        c = model.config.backbone
        return tokens * 2 * c.depth * c.kv_heads * c.head_width
    return 0


def extras(family: str, model: Any, sites: PolicySites, tables: int = 0) -> Extras:
    """Everything beside the linears."""
    rows, width = model.embedding.weight.shape
    others = parameters(model) - sum(s.parameters for s in sites.linears) - rows * width
    return Extras((rows, width), others, tables, cache_numbers(family, model))


def served(family: str) -> tuple[PolicySites, Extras, list[savings.Saving]]:
    """Sites, the rest, and savings of a model as it is served."""
    model = full_size(family)
    before = policy_sites(model)
    steps = STEPS[family]
    tables = steps * sum(s.out_features for s in before.in_groups(['modulation']))
    found = savings.drop_unused(model, steps, TOKENS.get(family, 0))
    sites = policy_sites(model)
    return sites, extras(family, model, sites, tables), found
