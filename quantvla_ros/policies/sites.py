# SPDX-License-Identifier: Apache-2.0
"""What each policy exposes to quantization, read off its modules: linears, attentions, blocks.

Works on any of the networks here, with weights or on the meta device, whole or with savings
applied; a layer that was dropped is not listed. Holds the one table from module names to groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from quantvla_ros.policies.blocks import Attention
from quantvla_ros.policies.libero_vla import Attention as LiberoAttention
from quantvla_ros.policies.libero_vla import LiberoVlaNet
from quantvla_ros.quant.sites import AttentionSite, LinearSite, PolicySites

Rules = Sequence[tuple[str, str]]

# first match wins; what matches nothing is a head. `projector` is all that joins vision and
# backbone to what follows them, GR00T's four context layers among it.
GROUP_RULES: Rules = (
    (r'.*\.dense', 'modulation'),
    (r'vision.*', 'vision'),
    (r'projector.*|context_layers\..*', 'projector'),
    (r'backbone\.layers\.\d+\.attn\..*', 'backbone_attention'),
    (r'backbone\.layers\.\d+\.mlp\..*', 'backbone_mlp'),
    (r'(expert\.layers|blocks)\.\d+\.attn\..*', 'action_attention'),
    (r'(expert\.layers|blocks)\.\d+\.mlp\..*', 'action_mlp'),
)
LIBERO_RULES: Rules = (
    (r'vision\.blocks\..*', 'vision'),
    (r'vision\.project', 'projector'),
    (r'backbone\.blocks\.\d+\.attn\..*', 'backbone_attention'),
    (r'backbone\.blocks\.\d+\.mlp\..*', 'backbone_mlp'),
    (r'action\.blocks\.\d+\.(attn|cross)\..*', 'action_attention'),
    (r'action\.blocks\.\d+\.mlp\..*', 'action_mlp'),
    (r'action\.time_out', 'modulation'),
)
BLOCKS = r'(vision[a-z_]*\.layers|backbone\.layers|context_layers|expert\.layers|blocks)\.\d+'
LIBERO_BLOCKS = r'(vision|backbone|action)\.blocks\.\d+'
FLOW = ('vision', 'backbone', 'context', 'expert', 'blocks', 'action')
HEAD_NORM = 'each head is normed after q_proj, so a factor on its rows is divided out again'


def _linears(model: nn.Module, rules: Rules) -> list[LinearSite]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            group = next((group for rule, group in rules if re.fullmatch(rule, name)), 'head')
            found.append(LinearSite(name, group, module.in_features, module.out_features,
                                    module.bias is not None))
    return found


def _blocks(model: nn.Module, pattern: str) -> tuple[str, ...]:
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    stage = {name: next(i for i, part in enumerate(FLOW) if name.startswith(part))
             for name in names}
    return tuple(sorted(names, key=lambda name: stage[name]))


def policy_sites(model: nn.Module) -> PolicySites:
    """Sites of any published network: pi0, pi0.5, GR00T N1.5, SmolVLA, OpenVLA.

    alpha scales rows of q_proj alone: keys are shared with the prefix and with other heads, and
    rotary positions commute with a factor. Attentions that make no action are left out, but for
    those whose heads are normed, which are listed with the reason why nothing can be folded.
    """
    linears = _linears(model, GROUP_RULES)
    groups = {linear.name: linear.group for linear in linears}
    attentions = []
    for name, module in model.named_modules():
        if not isinstance(module, Attention) or f'{name}.q_proj' not in groups:
            continue
        layer = model.get_submodule(name.rpartition('.')[0])
        normed = bool(getattr(layer, 'head_norm', False))
        if groups[f'{name}.q_proj'] == 'action_attention' or normed:
            attentions.append(AttentionSite(
                name=name,
                q=f'{name}.q_proj',
                o=f'{name}.o_proj',
                heads=module.heads.count,
                head_dim=module.heads.width,
                alpha_foldable=not normed,
                beta_foldable=not normed,
                reason=HEAD_NORM if normed else '',
            ))
    return PolicySites(tuple(linears), tuple(attentions), _blocks(model, BLOCKS))


def libero_vla_sites(net: LiberoVlaNet) -> PolicySites:
    """Sites of the policy that ships."""
    attentions = tuple(
        AttentionSite(name, f'{name}.q_proj', f'{name}.o_proj', module.heads,
                      module.q_proj.out_features // module.heads, True, True)
        for name, module in net.named_modules()
        if isinstance(module, LiberoAttention) and name.startswith('action.')
    )
    stem = tuple(
        LinearSite(name, 'vision', module.weight[0].numel(), module.out_channels,
                   module.bias is not None)
        for name, module in net.vision.named_modules(prefix='vision')
        if isinstance(module, nn.Conv2d)
    )
    return PolicySites(
        tuple(_linears(net, LIBERO_RULES)), attentions, _blocks(net, LIBERO_BLOCKS), stem
    )
