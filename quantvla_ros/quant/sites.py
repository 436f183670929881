# SPDX-License-Identifier: Apache-2.0
"""What a policy exposes to quantization: its linear layers by group and its attention sites.

Values only. A policy builds them from its own architecture; layouts, recipes, calibration and the
memory report read them. Nothing here knows a policy, a tensor or a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Every linear of every policy belongs to one of these groups; layouts choose by them.
GROUPS = (
    'vision',
    'projector',
    'backbone_attention',
    'backbone_mlp',
    'action_attention',
    'action_mlp',
    'modulation',
    'head',
)
BACKBONE = ('backbone_attention', 'backbone_mlp')
ACTION = ('action_attention', 'action_mlp')


@dataclass(frozen=True)
class LinearSite:
    """One linear layer, y = x W^T (+ b): module path, group and shape of W (out, in)."""

    name: str
    group: str
    in_features: int
    out_features: int
    bias: bool

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(
                f'{self.name}: group {self.group!r} is unknown; known are {", ".join(GROUPS)}'
            )

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return self.out_features * (self.in_features + int(self.bias))


@dataclass(frozen=True)
class AttentionSite:
    """One attention: where a factor per head (alpha) and per layer (beta) may be folded.

    q, o: names of the linears that alpha and beta multiply. alpha of head h scales the rows
    [h * head_dim, (h + 1) * head_dim) of q's weight and bias; beta scales all of o's weight and
    bias. Folding is exact where it is marked so, and `reason` says why it is not elsewhere.
    """

    name: str
    q: str
    o: str
    heads: int
    head_dim: int
    alpha_foldable: bool
    beta_foldable: bool
    reason: str = ''

    def __post_init__(self) -> None:
        if not (self.alpha_foldable and self.beta_foldable) and not self.reason:
            raise ValueError(f'{self.name}: say why alpha or beta cannot be folded')


@dataclass(frozen=True)
class PolicySites:
    """Everything of one policy that quantization may touch.

    blocks: module paths of the blocks that are loaded and quantized one at a time, in the order
    in which activations flow. convolutions: those that may run on integers as products of their
    windows, at 8 bits whatever the recipe; in_features are the values of a window. Raises
    ValueError on a name that appears twice or leads nowhere.
    """

    linears: tuple[LinearSite, ...]
    attentions: tuple[AttentionSite, ...]
    blocks: tuple[str, ...]
    convolutions: tuple[LinearSite, ...] = ()

    def __post_init__(self) -> None:
        names = [site.name for site in (*self.linears, *self.convolutions)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f'linears named twice: {", ".join(twice)}')
        known = set(names)
        for site in self.attentions:
            for name in (site.q, site.o):
                if name not in known:
                    raise ValueError(f'{site.name}: {name!r} is not one of the linears')

    def linear(self, name: str) -> LinearSite:
        """Return a linear, or a convolution, by its module path."""
        for site in (*self.linears, *self.convolutions):
            if site.name == name:
                return site
        raise ValueError(f'{name!r} is not a linear of this policy')

    def in_groups(self, groups: Iterable[str]) -> tuple[LinearSite, ...]:
        """Return the linears of some groups, in order."""
        wanted = set(groups)
        unknown = sorted(wanted - set(GROUPS))
        if unknown:
            raise ValueError(
                f'unknown group(s) {", ".join(unknown)}; known are {", ".join(GROUPS)}'
            )
        return tuple(site for site in self.linears if site.group in wanted)

    def in_block(self, block: str) -> tuple[LinearSite, ...]:
        """Return the linears inside one block."""
        return tuple(site for site in self.linears if site.name.startswith(block + '.'))
