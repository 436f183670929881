# SPDX-License-Identifier: Apache-2.0
"""The two scalars of QuantVLA: attention temperature (alpha) and output head balance (beta).

alpha_h multiplies the student's logits of head h, beta_l the student's output of layer l; both
are given as published (ratio of standard deviations, ratio of RMS) and by least squares, passed
through a neutral band and a clip in the log domain, and folded into stored scales: alpha_h into
the rows of q that make head h, beta_l into all rows of o, bias included. The base scales stay as
they are; a fold is a vector beside them, so it is removed by leaving it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

NEUTRAL = 0.03  # log domain: factors closer to 1 than this are 1
CLIP = 0.4  # log domain: factors lie in [0.670, 1.492]


def to_band(factor: Tensor, neutral: float = NEUTRAL, clip: float = CLIP) -> Tensor:
    """Clip log(factor) to +-clip and set it to 0 inside +-neutral; not finite becomes 1."""
    log = torch.nan_to_num(factor.double().log(), nan=0.0, posinf=clip, neginf=-clip)
    log = log.clamp(-clip, clip)
    return torch.where(log.abs() < neutral, torch.zeros_like(log), log).exp()


@dataclass
class PairStatistics:
    """Running sums over pairs (teacher, student) of one quantity, for `size` factors at once.

    Streams any number of batches in constant memory. `add` takes (size, n) values. Means of the
    teacher and the student are kept apart for each call, as the published ratio averages the
    standard deviation (or RMS) of calls, not of the pooled values.
    """

    size: int
    calls: int = 0
    teacher_spread: Tensor = field(init=False)
    student_spread: Tensor = field(init=False)
    cross: Tensor = field(init=False)
    square: Tensor = field(init=False)
    centred: bool = True

    def __post_init__(self) -> None:
        zeros = torch.zeros(self.size, dtype=torch.float64)
        self.teacher_spread, self.student_spread = zeros.clone(), zeros.clone()
        self.cross, self.square = zeros.clone(), zeros.clone()

    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Add one call: (size, n) values of both, the same entries masked out of both."""
        self.add_calls(teacher.double()[None], student.double()[None])

    def add_calls(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Add several calls at once, (calls, size, n) of both; return the student's spreads.

        Sums over n are taken in the dtype that is given, all others in float64.
        """
        t, s = teacher, student
        if self.centred:
            # softmax ignores a shift of a row, and so must the fit
            t, s = t - t.mean(-1, keepdim=True), s - s.mean(-1, keepdim=True)
        spread, square = (x.pow(2).mean(-1).double() for x in (t, s))
        self.calls += len(t)
        self.teacher_spread += spread.sqrt().sum(0)
        self.student_spread += square.sqrt().sum(0)
        self.cross += (t * s).mean(-1).double().sum(0)
        self.square += square.sum(0)
        return square.sqrt()

    def ratio(self) -> Tensor:
        """Published form: mean spread of the teacher over mean spread of the student."""
        return self.teacher_spread / self.student_spread.clamp_min(1e-12)

    def least_squares(self) -> Tensor:
        """argmin_a sum |t - a s|^2 = <t, s> / <s, s>: what shrinks the error, not the spread."""
        return self.cross / self.square.clamp_min(1e-24)


def temperature_statistics(heads: int) -> PairStatistics:
    """Statistics of logits, one factor for each head; (heads, queries * keys) values a call."""
    return PairStatistics(heads)


def output_statistics() -> PairStatistics:
    """Statistics of an attention's output after its projection; (1, values) a call."""
    return PairStatistics(1, centred=False)


@dataclass(frozen=True)
class Fold:
    """Factors beside the stored scales of one linear: (rows,) float64, all finite and positive."""

    rows: Tensor

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.rows).all() and (self.rows > 0).all()):
            raise ValueError('a fold must be finite and positive')

    def scale(self, base: Tensor) -> Tensor:
        """Fold into base scales (rows, groups) or (rows,); the base stays untouched."""
        factor = self.rows.to(base.dtype)
        return base * (factor if base.ndim == 1 else factor[:, None])


def alpha_fold(alpha: Tensor, head_dim: int) -> Fold:
    """Spread one factor for each head over the rows of q (and its bias); exact under RoPE."""
    return Fold(alpha.double().repeat_interleave(head_dim))


def beta_fold(beta: float, rows: int) -> Fold:
    """One factor for every row of o (and its bias)."""
    return Fold(torch.full((rows,), float(beta), dtype=torch.float64))


def keeps_helping(before: Tensor, after: Tensor, confidence: float = 1.64) -> bool:
    """Whether held-out errors fell with confidence: a paired one-sided test on frame errors.

    before, after: (frames,) errors of the same frames. A factor that does not pass is dropped.
    """
    gain = (before - after).double()
    if gain.numel() < 2:
        return False
    mean = float(gain.mean())
    spread = float(gain.std()) / math.sqrt(gain.numel())
    return mean > confidence * spread and mean > 0
