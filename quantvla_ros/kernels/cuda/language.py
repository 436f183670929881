# SPDX-License-Identifier: Apache-2.0
"""Triton where it is installed; without it the kernels' modules still import, and nothing runs.

A process that draws with Mesa's software renderer must not load Triton: their two LLVMs crash
together. So this is imported by what runs on a GPU, and by nothing else.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = 'TRITON_INTERPRET'

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
    constant: Any = tl.constexpr
    MISSING = ''
except ImportError as error:
    triton = tl = None

    def jit(function: Any = None, **options: Any) -> Any:
        """Leave the kernel as it is: it can be read, not run."""
        del options
        return function or jit

    def constant(value: Any) -> Any:
        """Leave a constant that kernels read as it is."""
        return value

    MISSING = f'Triton cannot be imported ({error}); install it: pip install triton'

# the interpreter knows no machine code; what is written in it stands there in words besides
MACHINE = constant(os.environ.get(VARIABLE) != '1')

__all__ = ['MACHINE', 'MISSING', 'VARIABLE', 'constant', 'jit', 'tl', 'triton']
