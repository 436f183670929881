# SPDX-License-Identifier: Apache-2.0
"""A fixed sequence of layers and attentions on fixed buffers, run by one call.

Between fast layers the interpreter is what is left: a transformer block is eight calls, a
denoising loop hundreds. A Program records them once and runs them in C++ with one wake-up of the
threads. Generic: it knows linear layers (with a norm before and a gate and a residual after) and
attention, no policy. Without a kernel library the same sequence runs on the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantvla_ros.kernels import dispatch, native, reference
from quantvla_ros.kernels.layer import ACTIVATION_CODES, Layer, NativeLayer
from quantvla_ros.kernels.windows import Window


@dataclass(frozen=True)
class Norm:
    """RMS norm of a layer's input, times `multiply`, plus `add` (float32 (K,) or None)."""

    eps: float = 1e-6
    multiply: Tensor | None = None
    add: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Read:
    """What a recorded call reads: of a linear its input x, of an attention queries x and keys.

    name: as the recorder gave it. Contents are those of the moment before the call runs.
    """

    name: str
    x: Tensor
    norm: Norm | None = None
    keys: Tensor | None = None
    heads: int = 0
    kv_heads: int = 0
    batch: int = 1
    rotary: tuple[Tensor, Tensor] | None = None


def _matrix(name: str, x: Tensor, columns: int) -> None:
    if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != columns or x.stride(1) != 1:
        raise ValueError(f'{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()}; '
                         f'expected float32 (rows, {columns}) with columns side by side')


def _vector(name: str, x: Tensor | None, length: int) -> None:
    if x is not None and (x.dtype != torch.float32 or tuple(x.shape) != (length,)
                          or not x.is_contiguous()):
        raise ValueError(f'{name} is {x.dtype} {tuple(x.shape)}; expected float32 ({length},)')


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Program:
    """Record with linear() and attention(), then run() as often as wanted.

    All tensors are float32 on the CPU and are kept alive; their contents may change between runs,
    their place may not. One thread at a time may run a program.
    """

    def __init__(self) -> None:
        self._library = dispatch.library()
        self._calls: list[native.Call] = []
        self._steps: list[Callable[[], None]] = []
        self._kept: list[object] = []
        self._reads: dict[int, Read] = {}  # by the number of the step
        self._array: object = None

    def __len__(self) -> int:
        return len(self._steps)

    def linear(
        self,
        layer: Layer,
        x: Tensor,
        y: Tensor,
        *,
        norm: Norm | None = None,
        factor: Tensor | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        act_scale: float | None = None,
        window: Window | None = None,
        name: str = '',
    ) -> None:
        """Record y = residual + gate * factor * layer(norm(x)), or of the windows of a map x.

        x (rows, K); y, factor and residual (rows, N); gate (N,). Factor and residual may be y
        itself, or must have its strides. Rows may lie apart (a slice of the columns of a larger
        matrix). Layers that follow each other and quantize the same x in the same way share that.
        """
        _matrix('x', x, layer.k if window is None else layer.k // window.size**2)
        _matrix('y', y, layer.n)
        _vector('gate', gate, layer.n)
        norm_is = norm or Norm(0.0)
        _vector('norm.multiply', norm_is.multiply, layer.k)
        _vector('norm.add', norm_is.add, layer.k)
        for what, other in (('residual', residual), ('factor', factor)):
            if other is None:
                continue
            _matrix(what, other, layer.n)
            if other.stride(0) != y.stride(0) and len(y) > 1:
                raise ValueError(f'{what} must have the row distance of y')
            if len(other) != len(y):
                raise ValueError(f'{what} has {len(other)} rows and y {len(y)}; expected the same')
        tokens = len(x) if window is None else window.tokens
        if tokens != len(y):
            raise ValueError(f'x has {tokens} rows and y {len(y)}; expected the same number')
        if window is not None and (
                len(x) != window.batch * window.height * window.width
                or layer.k % window.size**2):
            raise ValueError(
                f'a map of {len(x)} pixels and {layer.k} columns does not fit {window}')
        self._kept += [layer, x, y, norm, factor, gate, residual]
        if window is None:
            self._reads[len(self._steps)] = Read(name, x, norm)
        # No reference to self: a program that is dropped must be freed at once, not by a
        # collection of cycles, which would hold up every thread of the interpreter.
        reference_step = Program._reference
        self._steps.append(
            lambda: reference_step(layer, x if window is None else window.of(x), y, norm, factor,
                                   gate, residual, act_scale))
        if isinstance(layer, NativeLayer):
            call = native.Call(
                kind=0, dtype=0, layer=layer.handle, rows=len(y), x=x.data_ptr(),
                ldx=x.stride(0), y=y.data_ptr(), ldy=y.stride(0), factor=_at(factor),
                residual=_at(residual), gate=_at(gate), norm_multiply=_at(norm_is.multiply),
                norm_add=_at(norm_is.add), norm_eps=norm_is.eps, act_scale=act_scale or 0.0)
            if window is not None:
                call.window, call.stride, call.pad = window.size, window.stride, window.pad
                call.height, call.width, call.batch = window.height, window.width, window.batch
            self._calls.append(call)

    @staticmethod
    def _reference(
        layer: Layer, x: Tensor, y: Tensor, norm: Norm | None, factor: Tensor | None,
        gate: Tensor | None, residual: Tensor | None, act_scale: float | None,
    ) -> None:
        if norm is not None:
            x = reference.normalize(x, norm.eps, norm.multiply, norm.add)
        if factor is None:
            y.copy_(layer(x, gate=gate, residual=residual, act_scale=act_scale))
            return
        product = layer(x, act_scale=act_scale) * factor
        product = product if gate is None else product * gate
        y.copy_(product if residual is None else product + residual)

    def group_norm(
        self, x: Tensor, y: Tensor, multiply: Tensor, add: Tensor, *, batch: int, groups: int,
        eps: float, activation: str = 'none',
    ) -> None:
        """Record y = activation(group norm of a map), each batch entry by itself; y may be x.

        x, y (batch * pixels, channels), channels a multiple of 16; multiply, add (channels).
        """
        channels = len(multiply)
        _matrix('x', x, channels)
        _matrix('y', y, channels)
        _vector('add', add, channels)
        if channels % 16 or channels % groups or len(x) != len(y) or len(x) % batch:
            raise ValueError(f'a map of {len(x)} rows and {channels} channels does not fit '
                             f'{groups} groups and a batch of {batch}')
        if activation not in ('none', 'silu'):
            raise ValueError(f"activation is {activation!r}; expected 'none' or 'silu'")
        self._kept += [x, y, multiply, add]

        def step() -> None:
            y.copy_(reference.group_norm(x, batch, groups, multiply, add, eps, activation))

        self._steps.append(step)
        self._calls.append(native.Call(
            kind=3, dtype=0, rows=len(x), x=x.data_ptr(), ldx=x.stride(0), y=y.data_ptr(),
            ldy=y.stride(0), norm_multiply=multiply.data_ptr(), norm_add=add.data_ptr(),
            norm_eps=eps, batch=batch, channels=channels, groups=groups,
            activation=ACTIVATION_CODES[activation]))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        *,
        heads: int,
        kv_heads: int,
        batch: int = 1,
        rotary: tuple[Tensor, Tensor] | None = None,
        cells: Tensor | None = None,
        name: str = '',
    ) -> None:
        """Record y = softmax(q k^T / sqrt(dim)) v with grouped heads.

        q, y      (batch * queries, heads * dim); dim a multiple of 32
        k, v      (batch * keys, kv_heads * dim)
        rotary    (cos, sin), each (positions, dim / 2): rotate queries and keys by their position
        cells     what gather() made of k and v, for keys that several attentions read
        """
        dim = q.shape[1] // heads
        _matrix('q', q, heads * dim)
        _matrix('y', y, heads * dim)
        _matrix('k', k, kv_heads * dim)
        _matrix('v', v, kv_heads * dim)
        if dim % 32 or heads % kv_heads or len(q) % batch or len(k) % batch or len(v) != len(k):
            raise ValueError(f'attention of {heads} heads on {kv_heads}, dim {dim}, {len(q)} '
                             f'queries, {len(k)} keys, batch {batch}: expected dim a multiple of '
                             '32 and even divisions')
        if len(y) != len(q):
            raise ValueError(f'y has {len(y)} rows; expected those of q, {len(q)}')
        cos, sin = rotary or (None, None)
        for what, table in (('cos', cos), ('sin', sin)):
            if table is not None:
                _matrix(what, table, dim // 2)
                if len(table) < max(len(q), len(k)) // batch or not table.is_contiguous():
                    raise ValueError(f'{what} has {len(table)} positions; expected one for each '
                                     'query and key, contiguous')

        def step() -> None:
            out = reference.attention(
                q.reshape(batch, -1, heads, dim), k.reshape(batch, -1, kv_heads, dim),
                v.reshape(batch, -1, kv_heads, dim), cos, sin)
            y.copy_(out.reshape(len(q), -1))

        self._reads[len(self._steps)] = Read(name, q, None, k, heads, kv_heads, batch, rotary)
        self._steps.append(step)
        self._kept += [q, k, v, y, rotary, cells]
        self._calls.append(native.Call(
            kind=1, dtype=0, rows=len(q) // batch, x=q.data_ptr(), ldx=q.stride(0),
            y=y.data_ptr(), ldy=y.stride(0), k=k.data_ptr(), v=v.data_ptr(), ldk=k.stride(0),
            ldv=v.stride(0), keys=len(k) // batch, cos=_at(cos), sin=_at(sin), batch=batch,
            heads=heads, kv_heads=kv_heads, head_dim=dim, scale=dim**-0.5, cells=_at(cells)))

    @staticmethod
    def cells(keys: int, kv_heads: int, dim: int, batch: int = 1) -> Tensor:
        """Make room for gathered keys and values; nothing where the reference serves."""
        library = dispatch.library()
        count = 0 if library is None else library.qv_cells(keys, batch, kv_heads, dim)
        whole = torch.zeros(count + 16)
        first = -whole.data_ptr() // 4 % 16  # aligned to 64 bytes
        return whole[first : first + count]

    def gather(
        self, k: Tensor, v: Tensor, cells: Tensor, *, kv_heads: int, batch: int = 1
    ) -> None:
        """Record what an attention does with k and v before it looks at a query, without rotation.

        Keys of a context that every denoising step reads are brought in order once.
        """
        dim = k.shape[1] // kv_heads
        _matrix('k', k, kv_heads * dim)
        _matrix('v', v, kv_heads * dim)
        self._steps.append(lambda: None)  # the reference reads k and v themselves
        self._kept += [k, v, cells]
        self._calls.append(native.Call(
            kind=2, dtype=0, rows=0, k=k.data_ptr(), v=v.data_ptr(), ldk=k.stride(0),
            ldv=v.stride(0), keys=len(k) // batch, batch=batch, kv_heads=kv_heads, head_dim=dim,
            cells=cells.data_ptr()))

    def run(self) -> None:
        """Run everything that was recorded, in order."""
        if self._library is None or len(self._calls) != len(self._steps):
            for step in self._steps:
                step()
            return
        if self._array is None:
            self._array = (native.Call * len(self._calls))(*self._calls)
        native.check(self._library.qv_run(self._array, len(self._calls)))

    def look(self, see: Callable[[Read], None]) -> None:
        """Run call by call and show what each reads just before it runs: slower, same result."""
        for index, step in enumerate(self._steps):
            if index in self._reads:
                see(self._reads[index])
            if self._library is None or len(self._calls) != len(self._steps):
                step()
            else:
                native.check(self._library.qv_run(
                    (native.Call * 1)(self._calls[index]), 1))
