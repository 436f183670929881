# SPDX-License-Identifier: Apache-2.0
"""What may be concluded from counts: Wilson's interval, McNemar's exact test, paired differences.

Reads no episode and knows no policy.
"""

from __future__ import annotations

from math import comb, sqrt
from statistics import NormalDist


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a success rate; (0, 1) without trials.

    (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    if not 0 <= successes <= trials:
        raise ValueError(f'{successes} successes of {trials} trials')
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + 0.5 * confidence)
    n, p = trials, successes / trials
    centre = p + z * z / (2 * n)
    reach = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    only_first, only_second: pairs in which only that side succeeded. Under the null hypothesis
    each such pair falls to either side like a fair coin.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f'counts cannot be negative, got {only_first} and {only_second}')
    n = only_first + only_second
    tail = sum(comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2.0 * tail / 2.0**n)


def paired_difference(
    only_first: int, only_second: int, pairs: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return an interval of the second side's success rate less the first's, on the same pairs.

    Agresti and Min 2005: the interval of Wald after half a pair was added to each of the four
    outcomes, which holds its confidence where few pairs disagree. (-1, 1) without pairs.
    """
    if not 0 <= only_first + only_second <= pairs:
        raise ValueError(f'{only_first} and {only_second} of {pairs} pairs disagree')
    if pairs == 0:
        return -1.0, 1.0
    n, b, c = pairs + 2, only_first + 0.5, only_second + 0.5
    z = NormalDist().inv_cdf(0.5 + 0.5 * confidence)
    centre = (c - b) / n
    reach = z * sqrt(b + c - (c - b) ** 2 / n) / n
    return max(-1.0, centre - reach), min(1.0, centre + reach)
