# SPDX-License-Identifier: Apache-2.0
"""Memory arithmetic: the papers' way of counting, and what a served model really holds.

The papers count the linears of backbone layers and action layers alone; QuantVLA adds float32
rotations to its quantized ones, Omega-QVLA float16 rotations and tables. `held` counts every
tensor instead. Pure arithmetic on sites: nothing is allocated, no policy is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantvla_ros.quant.sites import ACTION, BACKBONE, LinearSite, PolicySites

GIB = 2**30
MIB = 2**20
TARGETS = (*BACKBONE, *ACTION)
FLOAT_BYTES = 2
SCALE_BYTES = 4  # our kernels keep float32 scales


@dataclass(frozen=True)
class Count:
    """One row of a published table: what is quantized, our result and the paper's, in bytes."""

    name: str
    counted: float
    published: float | None

    @property
    def residual(self) -> float | None:
        """Ours less the paper's, GiB."""
        return None if self.published is None else (self.counted - self.published) / GIB


def float_bytes(site: LinearSite) -> int:
    """Two bytes for each weight and bias."""
    return FLOAT_BYTES * site.parameters


def rotated_bytes(site: LinearSite, block: int, *, permuted: bool) -> int:
    """QuantVLA's counting of one 4-bit linear.

    Weights o i / 2, a float16 scale per row, float32 rotations of `block` at input and output,
    an int32 permutation, the bias in float16.
    """
    o, i = site.out_features, site.in_features
    rotations = 4 * block * block * (-(-i // block) + -(-o // block))
    return (o * i // 2 + 2 * o + rotations
            + (4 * i if permuted else 0) + (2 * o if site.bias else 0))


def omega_bytes(site: LinearSite, steps: int) -> int:
    """Omega-QVLA's counting of one 4-bit linear, as its published totals imply.

    Weights o i / 2, float16 scales per group of 128, float16 input rotations of 64, an int32
    permutation, float16 scales of each input (for each step in action layers), the bias.
    """
    o, i = site.out_features, site.in_features
    tables = steps if site.group in ACTION else 1
    return (o * i // 2 + 2 * o * -(-i // 128) + 2 * 64 * 64 * -(-i // 64)
            + 4 * i + 2 * i * tables + (2 * o if site.bias else 0))


def _sum(sites: PolicySites, groups: Iterable[str], block: int, *, permuted: bool) -> int:
    chosen = set(groups)
    return sum(
        rotated_bytes(s, block, permuted=permuted) if s.group in chosen else float_bytes(s)
        for s in sites.in_groups(TARGETS)
    )


# family -> (rotation block, permutation on, published GiB by what is quantized)
QUANTVLA: Mapping[str, tuple[int, bool, Mapping[str, float]]] = {
    'pi05': (16, True, {'nothing (FP16)': 4.27, 'LLM': 1.58, 'DiT': 3.85, 'LLM + DiT': 1.17,
                        'LLM + DiT MLP': 1.28}),
    'groot_n15': (64, False, {'nothing (FP16)': 2.02, 'LLM + DiT MLP': 0.91, 'LLM + DiT': 0.74}),
}
OMEGA: Mapping[str, tuple[int, float]] = {
    'pi05': (10, 1.20 * GIB), 'groot_n15': (8, 586 * MIB),
}
CHOICES: Mapping[str, tuple[str, ...]] = {
    'nothing (FP16)': (),
    'LLM': BACKBONE,
    'DiT': ACTION,
    'LLM + DiT': TARGETS,
    'LLM + DiT MLP': (*BACKBONE, 'action_mlp'),
}
RESIDUALS = {
    'pi05': 'DiT alone: 0.013 GiB above the paper, unexplained (3.850 without output rotations).',
    'groot_n15': 'FP16: 0.027 GiB below 2.02, which a table with v_proj 2048x2048 and cross k, v '
    'of 1536 inputs gives; the true shapes give 1.99, as Omega-QVLA reports. The quantized rows '
    'stay 0.012 and 0.022 GiB below the paper, unexplained.',
}


def published_counts(family: str, sites: PolicySites) -> list[Count]:
    """The tables of QuantVLA and Omega-QVLA, counted from the layers themselves."""
    if family not in QUANTVLA:
        return []
    block, permuted, table = QUANTVLA[family]
    counts = [
        Count(f'QuantVLA, {name}', _sum(sites, CHOICES[name], block, permuted=permuted),
              value * GIB)
        for name, value in table.items()
    ]
    steps, value = OMEGA[family]
    total = sum(omega_bytes(site, steps) for site in sites.in_groups(TARGETS))
    return [*counts, Count('Omega-QVLA, LLM + DiT', total, value)]


@dataclass(frozen=True)
class Plan:
    """Weight bits by group; 16 is bfloat16. columns: inputs that share a scale, 0 for a row.

    words_on_disk: whether the table of words is read row by row, as our policies do.
    """

    name: str
    bits: Mapping[str, int]
    columns: int = 0
    words_on_disk: bool = True


def plan(name: str, weights: int) -> Plan:
    """One width for everything that can be quantized: vision to action; heads stay float."""
    groups = ('vision', 'projector', *TARGETS)
    return Plan(name, dict.fromkeys(groups, weights))


PUBLISHED = Plan('as published', {}, words_on_disk=False)
PLANS: Mapping[str, Plan] = {
    'float': Plan('float', {}),
    'w8a8': plan('w8a8', 8),
    'w4a8': plan('w4a8', 4),
    'w4a4': plan('w4a4', 4),
    'quantvla': Plan('quantvla', dict.fromkeys((*BACKBONE, 'action_mlp'), 4)),
    'omega': Plan('omega', dict.fromkeys(TARGETS, 4), 128),
    'w4a8-vision8': Plan(
        'w4a8-vision8', {**dict.fromkeys(TARGETS, 4), 'vision': 8, 'projector': 8}, 128
    ),
}


def layer_bytes(site: LinearSite, bits: int, columns: int) -> int:
    """What our kernels store of one linear: codes, float32 scales, bias in bfloat16."""
    o, i = site.out_features, site.in_features
    bias = FLOAT_BYTES * o if site.bias else 0
    if bits == 16:
        return FLOAT_BYTES * o * i + bias
    groups = i // columns if columns and i % columns == 0 else 1
    return o * -(-i * bits // 8) + SCALE_BYTES * o * groups + bias


@dataclass(frozen=True)
class Extras:
    """What a model holds beside its linears, in numbers: words, norms and the like, one chunk.

    embedding: (rows, width) of the table of words. others: further parameters, bfloat16.
    tables: float numbers of fixed-time tables. cache: keys, values and states of one chunk.
    """

    embedding: tuple[int, int]
    others: int
    tables: int = 0
    cache: int = 0


def held(sites: PolicySites, extras: Extras, plan_: Plan) -> dict[str, int]:
    """Bytes by part that a served model holds: every linear, table, norm and cache."""
    parts: dict[str, int] = {}
    for site in sites.linears:
        size = layer_bytes(site, plan_.bits.get(site.group, 16), plan_.columns)
        parts[site.group] = parts.get(site.group, 0) + size
    return {**parts, **others_bytes(extras, words_on_disk=plan_.words_on_disk)}


def others_bytes(extras: Extras, *, words_on_disk: bool = True) -> dict[str, int]:
    """Bytes by part of everything beside the linears."""
    rows, width = extras.embedding
    parts = {
        'table of words': 0 if words_on_disk else FLOAT_BYTES * rows * width,
        'norms, patches, positions': FLOAT_BYTES * extras.others,
        'tables of fixed times': FLOAT_BYTES * extras.tables,
        'keys and values of a chunk': FLOAT_BYTES * extras.cache,
    }
    return {name: size for name, size in parts.items() if size}


def find_plan(name: str) -> Plan:
    """Return a plan by name. Raises ValueError that lists the known names."""
    if name not in PLANS:
        raise ValueError(f'recipe {name!r} is unknown; known are {", ".join(PLANS)}')
    return PLANS[name]
