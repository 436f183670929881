# SPDX-License-Identifier: Apache-2.0
"""Run the kernels on the CPU, slowly and exactly, under Triton's interpreter.

TRITON_INTERPRET=1 must stand in the environment before Triton is imported; `enter` says so.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from quantvla_ros.kernels.cuda.language import MISSING, VARIABLE


def active() -> bool:
    """Whether this process interprets kernels."""
    return os.environ.get(VARIABLE) == '1'


def enter() -> None:
    """Make the interpreter ready. Raises ValueError with a sentence when it cannot run."""
    if MISSING:
        raise ValueError(MISSING)
    if not active():
        raise ValueError(f'set {VARIABLE}=1 before Python starts')
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, 'seen'):
        return
    patch_tensor, patch = interpreter._patch_lang_tensor, interpreter._patch_lang

    def tensors(tensor: Any, *rest: Any) -> None:
        """The bounds of a loop are arrays of one element, which numpy 2.4 turns into no int."""
        patch_tensor(tensor, *rest)
        rest[0].set_attr(tensor, '__index__', lambda self: int(self.handle.data.item()))

    class Kept:
        """Leaves the language as it is; changing it at every launch takes most of the time."""

        def restore(self) -> None:
            """Do nothing."""

    def once(function: Any) -> Kept:
        """Change what a function sees of the language at its first launch."""
        seen = frozenset(value.__name__ for value in function.__globals__.values()
                         if isinstance(value, ModuleType))
        if seen not in once.seen:  # type: ignore[attr-defined]
            patch(function)
            once.seen.add(seen)  # type: ignore[attr-defined]
        return Kept()

    once.seen = set()  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor, interpreter._patch_lang = tensors, once
