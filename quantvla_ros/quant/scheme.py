# SPDX-License-Identifier: Apache-2.0
"""How many bits and at which granularity: values, not chains of booleans. Knows no layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Union

FLOAT_BITS = 16  # 16 means: kept in floating point


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: (rows, k) -> (1, 1)."""


@dataclass(frozen=True)
class PerRow:
    """One scale for each row: (rows, k) -> (rows, 1). For activations a row is a token."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` inputs of a row: (rows, k) -> (rows, k / size)."""

    size: int = 128


@dataclass(frozen=True)
class PerStep:
    """One static scale for each denoising step, taken from a table: (steps,)."""


Granularity = Union[PerTensor, PerRow, PerGroup, PerStep]  # noqa: UP007 (3.10 at run time)

NAME = re.compile(r'w(2|3|4|8|16)a(3|4|8|16)(?:g(\d+))?')


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is represented.

    weight_bits: 2, 3 (stored in 4-bit containers), 4, 8 or 16 (float). act_bits: 3, 4, 8 or 16.
    Symmetric throughout: integers lie in [-qmax, qmax] with qmax = 2^(bits-1) - 1, so that no
    zero point enters the sum. PerRow activations are dynamic, one scale for each token.
    """

    weight_bits: int = 16
    act_bits: int = 16
    weight: Granularity = PerRow()
    act: Granularity = PerRow()

    def __post_init__(self) -> None:
        if self.weight_bits not in (2, 3, 4, 8, 16):
            raise ValueError(f'weight_bits is {self.weight_bits}; expected 2, 3, 4, 8 or 16')
        if self.act_bits not in (3, 4, 8, 16):
            raise ValueError(f'act_bits is {self.act_bits}; expected 3, 4, 8 or 16')
        if isinstance(self.act, PerGroup):
            raise ValueError('activations have no scale per group: it could not leave the sum')
        if isinstance(self.weight, PerStep):
            raise ValueError('weights do not change from step to step')

    @property
    def is_float(self) -> bool:
        """Whether the layer stays as it is."""
        return self.weight_bits == FLOAT_BITS

    @property
    def name(self) -> str:
        """The short name, as w4a8 or w4a8g128."""
        if self.is_float and self.act_bits == FLOAT_BITS:
            return 'float'
        group = f'g{self.weight.size}' if isinstance(self.weight, PerGroup) else ''
        return f'w{self.weight_bits}a{self.act_bits}{group}'

    def with_bits(self, weight_bits: int | None = None, act_bits: int | None = None) -> Scheme:
        """Return the same scheme at other widths."""
        return replace(
            self,
            weight_bits=self.weight_bits if weight_bits is None else weight_bits,
            act_bits=self.act_bits if act_bits is None else act_bits,
        )


FLOAT = Scheme()


def parse_scheme(name: str) -> Scheme:
    """Read a short name such as float, w8a8, w4a8, w4a8g128, w4a4, w4a16 or w3a4.

    Raises ValueError that says what is allowed.
    """
    if name == 'float':
        return FLOAT
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f'scheme {name!r} is unknown; expected float, or wXaY with X of 2, 3, 4, 8, 16 and '
            'Y of 3, 4, 8, 16, and optionally gN for a scale per N weights (w4a8g128)'
        )
    group = PerGroup(int(match[3])) if match[3] else PerRow()
    return Scheme(int(match[1]), int(match[2]), group)


def qmax(bits: int) -> int:
    """Largest integer of a symmetric signed code of this width: 7 for 4 bits, 127 for 8."""
    return 2 ** (bits - 1) - 1
