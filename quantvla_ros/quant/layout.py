# SPDX-License-Identifier: Apache-2.0
"""Which linear gets which scheme: by group, by place in the block, or by hand. Moves no weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantvla_ros.quant.scheme import FLOAT, Scheme
from quantvla_ros.quant.sites import ACTION, BACKBONE, LinearSite, PolicySites

Layout = dict[str, Scheme]  # linear name -> scheme; every linear of the policy has an entry

SELECTIVE = (*BACKBONE, 'action_mlp')  # QuantVLA: action attention stays in float
FULL_STACK = (*BACKBONE, *ACTION)  # Omega-QVLA: the whole language and action stack
EVERYTHING = ('vision', 'projector', *FULL_STACK)  # ours: the vision tower as well


def lay_out(sites: PolicySites, groups: Iterable[str], scheme: Scheme) -> Layout:
    """Give every linear of some groups one scheme and leave the others in float."""
    chosen = {site.name for site in sites.in_groups(groups)}
    return {site.name: scheme if site.name in chosen else FLOAT for site in sites.linears}


def raise_inputs(layout: Layout, names: Iterable[str], steps: int = 1) -> Layout:
    """Give some linears activations one or more widths up (3 -> 4 -> 8); floats stay floats.

    The inputs of o and down projections carry the outliers of large models; keeping them one
    width higher is the cheapest single repair.
    """
    widths = [3, 4, 8]
    raised = dict(layout)
    for name in names:
        scheme = layout[name]
        if not scheme.is_float and scheme.act_bits in widths:
            place = min(widths.index(scheme.act_bits) + steps, len(widths) - 1)
            raised[name] = scheme.with_bits(act_bits=widths[place])
    return raised


def sensitive_sites(sites: PolicySites) -> tuple[str, ...]:
    """Names of the linears that close a residual branch: attention outputs and MLP downs.

    An attention output is known from its attention site or its name; a down projection is the
    linear of an MLP group whose input is wider than its output.
    """
    outputs = {site.o for site in sites.attentions}
    outputs |= {site.name for site in sites.linears if site.name.endswith('.o_proj')}
    downs = {
        site.name
        for site in sites.linears
        if site.group in ('backbone_mlp', 'action_mlp', 'vision')
        and site.in_features > site.out_features
    }
    return tuple(site.name for site in sites.linears if site.name in outputs | downs)


def override(layout: Layout, schemes: Mapping[str, Scheme]) -> Layout:
    """Replace the scheme of single linears. Raises ValueError on an unknown name."""
    unknown = sorted(set(schemes) - set(layout))
    if unknown:
        raise ValueError(f'the policy has no linear named {", ".join(unknown)}')
    return {**layout, **schemes}


def weight_bytes(site: LinearSite, scheme: Scheme, float_bytes: int = 2) -> int:
    """Bytes that one linear holds: codes, float32 scales and bias; float_bytes when in float.

    3-bit codes live in 4-bit containers, so they take the bytes of 4 bits.
    """
    weights = site.out_features * site.in_features
    bias = site.out_features * (4 if not scheme.is_float else float_bytes) * site.bias
    if scheme.is_float:
        return weights * float_bytes + bias
    container = 4 if scheme.weight_bits == 3 else scheme.weight_bits
    groups = site.in_features // getattr(scheme.weight, 'size', site.in_features)
    return weights * container // 8 + site.out_features * groups * 4 + bias


def layout_bytes(sites: PolicySites, layout: Layout, float_bytes: int = 2) -> int:
    """Bytes of all linears of a policy under a layout."""
    return sum(weight_bytes(site, layout[site.name], float_bytes) for site in sites.linears)
