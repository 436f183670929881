# SPDX-License-Identifier: Apache-2.0
"""Every published recipe as one frozen value, and the table from name to recipe.

A recipe says which groups it quantizes, how the input of a layer is transformed, how the weight
is rounded and how activations are scaled. Where a paper's form cannot run on integers, `differs`
says what is done instead; the literal form stays in quant/literal.py as a simulation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Union

from quantvla_ros.quant.layout import EVERYTHING, FULL_STACK, SELECTIVE
from quantvla_ros.quant.scheme import Granularity, PerGroup, PerRow, PerStep


@dataclass(frozen=True)
class Smooth:
    """SmoothQuant's diagonal with migration strength alpha."""

    alpha: float = 0.5


@dataclass(frozen=True)
class AwqScale:
    """AWQ's diagonal, mean|x|^a with a from a grid of `points` by the layer's output error."""

    points: int = 20


@dataclass(frozen=True)
class LearnedScale:
    """OmniQuant's learned diagonal and learned clipping, by gradient on the layer's output."""

    steps: int = 60
    rate: float = 1e-2


@dataclass(frozen=True)
class Snake:
    """Permutation that deals channels by magnitude over balanced blocks."""

    block: int = 64


@dataclass(frozen=True)
class TwoPointer:
    """The published zigzag permutation by weight energy, which does not balance."""


@dataclass(frozen=True)
class Hadamard:
    """Block Hadamard, fused with the quantization in the kernel when the block is 64."""

    block: int = 64


@dataclass(frozen=True)
class SvdHadamard:
    """Dense block rotation U_b H, equal energy in every column of a block."""

    block: int = 64


@dataclass(frozen=True)
class Svd:
    """Dense block rotation by the eigenvectors of W_b^T W_b."""

    block: int = 64


@dataclass(frozen=True)
class Greedy:
    """DuQuant's greedy rotation, one matrix shared by the blocks of a layer."""

    block: int = 64
    steps: int = 64


@dataclass(frozen=True)
class Search:
    """The one of several transforms that changes the layer's output least when all is rounded."""

    options: tuple[tuple[Step, ...], ...]


Step = Union[  # noqa: UP007 (3.10 at run time)
    Smooth, AwqScale, LearnedScale, Snake, TwoPointer, Hadamard, SvdHadamard, Svd, Greedy, Search
]


@dataclass(frozen=True)
class Nearest:
    """Round to nearest; search: clip each row where its squared error is least."""

    search: bool = False


@dataclass(frozen=True)
class Gptq:
    """GPTQ in the transformed frame; damp: share of the mean diagonal of H.

    search: clip each row where its squared error is least, instead of absmax. clips: instead,
    ratios of absmax of which each row keeps the one with the least output error after the
    rounding. noisy: H is that of rounded tokens, H + sigma^2 I with sigma^2 the mean of
    scale^2 / 12.
    """

    damp: float = 0.01
    act_order: bool = False
    search: bool = True
    clips: tuple[float, ...] = ()
    noisy: bool = False


@dataclass(frozen=True)
class QvlaBits:
    """Row-wise widths from `widths` by sensitivity, at most `mean_bits` for each weight."""

    widths: tuple[int, ...] = (0, 2, 4, 8, 16)
    mean_bits: float = 4.0


@dataclass(frozen=True)
class Spend:
    """Weights of single layers one or more widths up, by action error saved for each byte or ms.

    budget_mb: of all linear layers; 0 for what rounding every layer alike takes. Layers that read
    the same input share a width. Below the bytes of equal widths, layers may go to 2 bits.
    stored: groups that run once at load, whose weights alone go to 8 bits; that saves bytes.
    in_time: spend the time of a chunk instead, as measured (quant/times.py); budget_ms: of all
    quantized layers, 0 for that of equal widths. Bytes are not bounded then.
    """

    budget_mb: float = 0.0
    stored: tuple[str, ...] = ('modulation',)
    in_time: bool = False
    budget_ms: float = 0.0


@dataclass(frozen=True)
class Matching:
    """Which of alpha and beta are fitted, how, and whether held-out frames must confirm them.

    fit: 'ratio' of spreads as published, or 'least_squares'.
    """

    alpha: bool = True
    beta: bool = True
    fit: str = 'ratio'
    check: bool = False


Rounding = Union[Nearest, Gptq, QvlaBits]  # noqa: UP007


@dataclass(frozen=True)
class Recipe:
    """How a policy is quantized.

    groups: what is quantized. transform: applied to each layer's input in this order. rounding
    of weights; action_rounding overrides it in the action head. act: granularity of activations.
    group: weights that share a scale, 0 for a scale per row. raise_sensitive: inputs of o and
    down projections one width higher. shared: layers that read the same input get one transform,
    so that it is rounded once. spend: widths by action error, where gradients can be asked; equal
    widths elsewhere. matching: fit alpha and beta of the action head.
    takes, differs: what comes from the paper, and what is done otherwise and why.
    """

    name: str
    paper: str
    takes: str
    differs: str
    groups: tuple[str, ...] = EVERYTHING
    transform: tuple[Step, ...] = ()
    rounding: Rounding = field(default_factory=Nearest)
    action_rounding: Rounding | None = None
    act: Granularity = field(default_factory=PerRow)
    group: int = 0
    raise_sensitive: bool = False
    shared: bool = False
    spend: Spend | None = None
    matching: Matching | None = None

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration must know what the action feels."""
        return isinstance(self.rounding, QvlaBits)

    @property
    def needs_frames(self) -> bool:
        """Whether anything depends on what enters a layer; rounding to nearest does not."""
        nearest = isinstance(self.rounding, Nearest) and not self.rounding.search
        plain = not self.transform and self.action_rounding is None and self.matching is None
        return not (nearest and plain and isinstance(self.act, PerRow))

    @property
    def weight(self) -> Granularity:
        """Granularity of the weights' scales."""
        return PerGroup(self.group) if self.group else PerRow()


_ALL = (
    Recipe(
        'rtn', 'round to nearest',
        takes='Symmetric rounding to nearest, absmax of each row, dynamic scale of each token.',
        differs='Nothing.',
    ),
    Recipe(
        'smoothquant', 'SmoothQuant (2211.10438)',
        takes='The diagonal max|x|^0.5 / max|W|^0.5 folded into the weight before rounding.',
        differs='The inverse diagonal is one multiplication of the input where no norm precedes '
        'the layer.',
        transform=(Smooth(0.5),),
    ),
    Recipe(
        'gptq', 'GPTQ (2210.17323)',
        takes='Column by column with the exact down-dated inverse, damping 0.01.',
        differs='Symmetric codes and one scale per row, so that the kernels need no zero point.',
        rounding=Gptq(),
    ),
    Recipe(
        'awq', 'AWQ (2306.00978)',
        takes='The diagonal mean|x|^a, a from a grid of 20 by output error, then a clipping '
        'search.',
        differs='Symmetric codes; activations are quantized too when the scheme says so, where '
        'the paper keeps them in 16 bits.',
        transform=(AwqScale(),),
        rounding=Nearest(search=True),
    ),
    Recipe(
        'omniquant', 'OmniQuant (2308.13137)',
        takes='Learned clipping and a learned diagonal by gradient descent on calibration '
        'tokens.',
        differs='Symmetric codes, so there is no learned shift; the loss is that of one layer '
        'rather than of one block.',
        transform=(LearnedScale(),),
        rounding=Nearest(search=True),
    ),
    Recipe(
        'duquant', 'DuQuant (2406.01721)',
        takes='Smoothing, greedy rotation, snake permutation, second greedy rotation; dynamic '
        'scale of each token.',
        differs='Symmetric codes instead of zero points, blocks of 64 instead of 128, which '
        'divide every width of the shipped policy.',
        transform=(Smooth(0.5), Greedy(), Snake(), Greedy()),
        rounding=Nearest(search=True),
    ),
    Recipe(
        'quantvla', 'QuantVLA (2602.20309)',
        takes='The selective layout (action attention in float), the block SVD rotation, row '
        'scales by squared error, alpha and beta.',
        differs='Activations get one scale for each token: the published static scale of each '
        'input channel cannot leave an integer sum. The output rotation is left out: it '
        'changes no rounding error that one scale per row does not already see.',
        groups=SELECTIVE,
        transform=(TwoPointer(), Svd()),
        rounding=Nearest(search=True),
        matching=Matching(),
    ),
    Recipe(
        'qvla', 'QVLA (2602.03782)',
        takes='A width for each output row from {0, 2, 4, 8, 16}, greedy demotion under a budget '
        'of mean bits.',
        differs='The sensitivity is the error that reaches the action, through the Jacobian, '
        'where the released code takes a Hessian proxy of the layer; rows are sorted by width '
        'so that a layer is a few uniform integer products.',
        rounding=QvlaBits(),
    ),
    Recipe(
        'omega_qvla', 'Omega-QVLA (2605.28803)',
        takes='SVD x Hadamard rotation of blocks of 64, the two-pointer permutation, group-128 '
        'weight scales, GPTQ in the backbone and nearest in the action head, static activation '
        'scales of each denoising step.',
        differs='One scale for each step instead of one for each step and channel, which could '
        'not leave an integer sum; the correct GPTQ inverse.',
        groups=FULL_STACK,
        transform=(TwoPointer(), SvdHadamard()),
        rounding=Gptq(damp=0.05),
        action_rounding=Nearest(search=True),
        act=PerStep(),
        group=128,
    ),
    Recipe(
        'onboard', 'this package',
        takes='Smoothing, one Hadamard of 64 fused with the quantization of each token, GPTQ '
        'with the Hessian of the transformed frame.',
        differs='Everything is quantized, action attention and vision included. Layers that read '
        'the same input take one transform, the one with the least expected output error. The '
        'Hessian holds the noise that rounding adds to tokens; rows are never clipped. Inputs of '
        'o and down projections stay one width higher. Layers that run once at load are stored '
        'at 8 bits, and what that saves widens the weights that the action feels most. Nothing '
        'that cannot leave the integer sum.',
        transform=(
            Search((
                (Hadamard(64),),
                (Smooth(0.35), Hadamard(64)),
                (Smooth(0.5), Hadamard(64)),
                (Smooth(0.65), Hadamard(64)),
                (Smooth(0.5),),
            )),
        ),
        rounding=Gptq(search=False, noisy=True),
        raise_sensitive=True,
        shared=True,
        spend=Spend(),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name. Raises ValueError that lists the known names."""
    if name not in RECIPES:
        raise ValueError(f'recipe {name!r} is unknown; known are {", ".join(sorted(RECIPES))}')
    return RECIPES[name]


def variant(recipe: Recipe, suffix: str, **changes: object) -> Recipe:
    """Return a recipe with some fields changed, under a name that tells so (for ablations)."""
    return replace(recipe, name=f'{recipe.name}:{suffix}', **changes)  # type: ignore[arg-type]
