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
    MISSING = ''
    # the interpreter knows no machine code; what is written in it stands there in words besides
    MACHINE = tl.constexpr(os.environ.get(VARIABLE) != '1')
except ImportError as error:
    triton = tl = MACHINE = None

    def jit(function: Any = None, **options: Any) -> Any:
        """Leave the kernel as it is: it can be read, not run."""
        del options
        return function or jit

    MISSING = f'Triton cannot be imported ({error}); install it: pip install triton'

__all__ = ['MACHINE', 'MISSING', 'VARIABLE', 'jit', 'tl', 'triton']
