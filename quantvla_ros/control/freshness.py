# SPDX-License-Identifier: Apache-2.0
"""Age, silence and sanity of every input, and of the header clock itself.

Owns when an input is too bad to act on. Sees no pixels (the caller passes a digest) and stops
nothing (the Guard does). Ages are header stamps against Clock.now_ns; silence, frozen content and
clock jumps are measured on the steady clock; the two are never mixed in one sum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from quantvla_ros.action import NS_PER_S
from quantvla_ros.control.clock import Clock
from quantvla_ros.control.types import Fault

FUTURE_S = 0.02  # a stamp farther ahead of the header clock than this is a fault
# A fault of a message stands until a good message comes, and so long at least: a check() that
# runs more slowly than the messages must not miss it.
FAULT_HOLD_S = 0.1


@dataclass(frozen=True)
class InputBounds:
    """Bounds of one input in s; max_frozen_s 0 means that its content may stay the same."""

    max_age_s: float = 0.2
    max_silence_s: float = 0.2
    max_frozen_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.max_age_s > 0 and self.max_silence_s > 0 and self.max_frozen_s >= 0):
            raise ValueError(
                f'max_age_s {self.max_age_s}, max_silence_s {self.max_silence_s}, max_frozen_s '
                f'{self.max_frozen_s}; expected above 0, above 0 and 0 or more'
            )


def frame_digest(image: np.ndarray) -> int:
    """Return a number that a change of any byte changes, well under 0.1 ms for 640x480 RGB.

    The sum of all 8-byte words mod 2^64, which any single change alters, joined with a checksum
    of a few rows, which tells shifted content apart. No defence against somebody who forges it.
    """
    flat = np.ascontiguousarray(image).reshape(-1).view(np.uint8)
    whole = flat.size - flat.size % 8
    total = int(flat[:whole].view(np.uint64).sum(dtype=np.uint64))
    rows = flat[: 16 * 1024].tobytes() + flat[whole:].tobytes()
    return (total << 32) | zlib.crc32(rows)


@dataclass(frozen=True)
class _Seen:
    """What is known of one input; replaced whole by its writer, read by check()."""

    stamp_ns: int
    steady_ns: int
    digest: int | None
    same_since_ns: int  # steady, since when the content has been the same
    good: bool  # the last message was without fault
    fault: Fault | None = None  # of a single message
    fault_ns: int = 0  # steady


class Freshness:
    """Watches named inputs.

    arrived() and broken() are called by the one thread that takes messages; check() by the
    control timer. They share, per input, a reference to an immutable _Seen that only the former
    swaps.
    clock_jump_s: how far the header clock may run off the steady clock between two checks; 0
    switches that off, for simulated time that does not run at the rate of real time.
    """

    def __init__(
        self, inputs: Mapping[str, InputBounds], clock: Clock, *, clock_jump_s: float = 0.1
    ) -> None:
        if not clock_jump_s >= 0:
            raise ValueError(f'clock_jump_s is {clock_jump_s}; expected 0 or more')
        self._bounds = dict(inputs)
        self._clock = clock
        self._seen: dict[str, _Seen | None] = dict.fromkeys(self._bounds)
        self._started_ns = clock.steady_ns()
        self._clock_jump_s = clock_jump_s
        # of the control timer alone
        self._last = (clock.now_ns(), clock.steady_ns())
        self._moving_since_ns: int | None = None
        self._jump: tuple[Fault, int] | None = None

    def arrived(self, name: str, stamp_ns: int, digest: int | None = None) -> None:
        """Note a message that was decoded without complaint.

        digest: of its content (frame_digest for images), None for what may repeat itself.
        """
        steady_ns, last = self._clock.steady_ns(), self._seen[name]
        same = last is not None and digest is not None and digest == last.digest
        seen = _Seen(
            stamp_ns,
            steady_ns,
            digest,
            last.same_since_ns if last is not None and same else steady_ns,
            True,
            last.fault if last is not None else None,
            last.fault_ns if last is not None else 0,
        )
        fault = self._stamp_fault(name, stamp_ns, last)
        if fault is not None:
            seen = replace(seen, fault=fault, fault_ns=steady_ns, good=False)
        self._seen[name] = seen

    def broken(self, name: str, kind: str, sentence: str) -> None:
        """Note a message that could not be used: wrong size, wrong encoding, renamed joints."""
        steady_ns, last = self._clock.steady_ns(), self._seen[name]
        fault = Fault(name, kind, f'{name}: {sentence}')
        if last is None:  # never a good message: the fault stands beside the silence
            last = _Seen(0, self._started_ns, None, self._started_ns, False)
        self._seen[name] = replace(last, fault=fault, fault_ns=steady_ns, good=False)

    def _stamp_fault(self, name: str, stamp_ns: int, last: _Seen | None) -> Fault | None:
        if stamp_ns <= 0:
            return Fault(name, 'zero_stamp', f'{name}: stamp is {stamp_ns}; expected a time')
        if last is not None and stamp_ns < last.stamp_ns:
            back_s = (last.stamp_ns - stamp_ns) / NS_PER_S
            return Fault(name, 'backwards', f'{name}: stamp went back by {back_s:.3f} s')
        ahead_s = (stamp_ns - self._clock.now_ns()) / NS_PER_S
        if ahead_s > FUTURE_S:
            return Fault(
                name, 'future',
                f'{name}: stamp is {ahead_s:.3f} s ahead of this clock, at most {FUTURE_S:g} s; '
                'are the clocks of the machines in step?'
            )
        return None

    def check(self, *, moving: bool = True) -> list[Fault]:
        """Return what is wrong now, the clock first, then by input; empty when all is well.

        moving: whether the arm moves. Content that stays the same counts as frozen only while it
        does: a simulated camera before a still arm repeats itself rightly.
        """
        now_ns, steady_ns = self._clock.now_ns(), self._clock.steady_ns()
        if not moving:
            self._moving_since_ns = None
        elif self._moving_since_ns is None:
            self._moving_since_ns = steady_ns
        faults = self._clock_faults(now_ns, steady_ns)
        for name, bounds in self._bounds.items():
            faults.extend(self._input_faults(name, bounds, now_ns, steady_ns))
        return faults

    def _clock_faults(self, now_ns: int, steady_ns: int) -> list[Fault]:
        jump_s = ((now_ns - self._last[0]) - (steady_ns - self._last[1])) / NS_PER_S
        self._last = (now_ns, steady_ns)
        if self._clock_jump_s and abs(jump_s) > self._clock_jump_s:
            sentence = (
                f'header clock jumped by {jump_s:+.3f} s against steady time; '
                f'at most {self._clock_jump_s:g} s'
            )
            self._jump = (Fault('clock', 'clock_jump', sentence), steady_ns)
        if self._jump is None or steady_ns - self._jump[1] > FAULT_HOLD_S * NS_PER_S:
            self._jump = None
            return []
        return [self._jump[0]]

    def _input_faults(
        self, name: str, bounds: InputBounds, now_ns: int, steady_ns: int
    ) -> list[Fault]:
        seen = self._seen[name]
        faults = []
        if seen is not None and seen.fault is not None:
            held_s = (steady_ns - seen.fault_ns) / NS_PER_S
            if not seen.good or held_s <= FAULT_HOLD_S:
                faults.append(seen.fault)
        heard_ns = self._started_ns if seen is None else seen.steady_ns
        silent_s = (steady_ns - heard_ns) / NS_PER_S
        if seen is None or seen.stamp_ns == 0:
            faults.append(Fault(name, 'silent', f'{name}: no usable message yet'))
            return faults
        if silent_s > bounds.max_silence_s:
            faults.append(Fault(
                name, 'silent',
                f'{name}: silent for {silent_s:.3f} s, at most {bounds.max_silence_s:g} s'
            ))
        age_s = (now_ns - seen.stamp_ns) / NS_PER_S
        if age_s > bounds.max_age_s:
            faults.append(Fault(
                name, 'stale',
                f'{name}: stamped {age_s:.3f} s ago, at most {bounds.max_age_s:g} s; it came '
                f'{silent_s:.3f} s ago'
            ))
        if bounds.max_frozen_s and self._moving_since_ns is not None:
            since_ns = max(seen.same_since_ns, self._moving_since_ns)
            # until the last message: after it the input is silent, which is another fault
            frozen_s = (seen.steady_ns - since_ns) / NS_PER_S
            if frozen_s > bounds.max_frozen_s:
                faults.append(Fault(
                    name, 'frozen',
                    f'{name}: the same content for {frozen_s:.3f} s while the arm moves, at most '
                    f'{bounds.max_frozen_s:g} s'
                ))
        return faults

    def ages_s(self) -> dict[str, float]:
        """Age of each input by header stamp, for diagnostics; inf before the first message."""
        now_ns = self._clock.now_ns()
        return {
            name: math.inf if seen is None else (now_ns - seen.stamp_ns) / NS_PER_S
            for name, seen in self._seen.items()
        }
