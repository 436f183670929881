# SPDX-License-Identifier: Apache-2.0
"""A linear layer made ready for one kernel path: checked at load, cheap to call.

Owns the conditions under which a layer and an input are served. The native layer holds the only
copy of its weight, in the machine's order; ReferenceLayer computes the same in plain torch.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.compiler import is_compiling

from quantvla_ros.kernels import native, ops, reference
from quantvla_ros.kernels.weights import MixedWeight, PackedWeight, Weight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION_CODES = {'none': 0, 'silu': 1, 'gelu_tanh': 2}


@dataclass(frozen=True)
class Options:
    """What a layer does besides the product; see reference.linear."""

    act_bits: int = 8
    hadamard: int = 0
    activation: str = 'none'
    diagonal: Tensor | None = None  # (K,) float32 multipliers of x, before the Hadamard


@dataclass(frozen=True)
class Seen:
    """What the tokens of a watched layer looked like when they were quantized, since last asked.

    The largest magnitude of a token is that behind norm, diagonal and Hadamard.
    """

    tokens: int = 0  # finite ones
    mean: float = 0.0  # of their largest magnitudes
    largest: float = 0.0  # of these
    broken: int = 0  # tokens with a NaN or an infinity
    clipped: int = 0  # tokens beyond the reach of a static scale; 0 where scales are dynamic


def check_layer(
    weight: Weight,
    bias: Tensor | None,
    options: Options,
    up: Weight | None,
    up_bias: Tensor | None,
) -> None:
    """Raise ValueError with a sentence for a layer that no kernel serves."""
    rows, columns = weight.shape
    if options.act_bits not in reference.TOP:
        raise ValueError(f'act_bits is {options.act_bits}; expected one of 8, 4, 3')
    if options.hadamard not in (0, 64) or (options.hadamard and columns % options.hadamard):
        raise ValueError(f'hadamard is {options.hadamard} for K = {columns}; expected 0, or 64 '
                         'where K is a multiple of 64')
    diagonal = options.diagonal
    if diagonal is not None and (tuple(diagonal.shape) != (columns,)
                                 or not bool(torch.isfinite(diagonal).all())):
        raise ValueError(f'diagonal has shape {tuple(diagonal.shape)}; expected {(columns,)}, all '
                         'of them finite')
    if options.activation not in ACTIVATION_CODES:
        known = ', '.join(ACTIVATION_CODES)
        raise ValueError(f'activation is {options.activation!r}; expected one of {known}')
    if up is not None and up.shape != weight.shape:
        raise ValueError(f'up has shape {up.shape}; expected that of weight, {weight.shape}')
    if up is None and up_bias is not None:
        raise ValueError('up_bias was given without up')
    for name, vector in (('bias', bias), ('up_bias', up_bias)):
        if vector is not None and tuple(vector.shape) != (rows,):
            raise ValueError(f'{name} has shape {tuple(vector.shape)}; expected ({rows},)')


class Layer(ABC):
    """Common face of all paths, on the CPU and on a GPU: call it with x (..., K) -> (..., N).

    n, k    rows and columns of W
    nbytes  bytes of the weight and its scales as this path holds them
    """

    n: int
    k: int
    nbytes: int

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        *,
        act_scale: float | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return residual + gate * (activation(x W^T + bias) [* (x up^T + up_bias)]).

        x          (..., K) float32, bfloat16 or float16 on the CPU; made contiguous if it is not
        act_scale  one static scale for all tokens; None: one dynamic scale per token
        gate       float32 (N,); residual (..., N) in the dtype of x
        A token with a NaN or an infinity gives NaN in all its outputs. No tokens give no tokens.
        """

    def _refuse(self, x: Tensor, residual: Tensor | None, gate: Tensor | None) -> None:
        """Raise the sentence that tells what is wrong with a call."""
        if x.dtype not in DTYPES or x.device.type != 'cpu':
            raise ValueError(f'x is {x.dtype} on {x.device}; expected float32, bfloat16 or '
                             'float16 on the CPU')
        self._refuse_shapes(x, residual, gate)

    def _refuse_shapes(self, x: Tensor, residual: Tensor | None, gate: Tensor | None) -> None:
        if x.ndim < 1 or x.shape[-1] != self.k:
            raise ValueError(f'x has shape {tuple(x.shape)}; expected (..., {self.k})')
        shape = (*x.shape[:-1], self.n)
        if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
            raise ValueError(f'residual is {residual.dtype} {tuple(residual.shape)}; expected '
                             f'{x.dtype} {shape}')
        if gate is not None and (gate.shape != (self.n,) or gate.dtype != torch.float32):
            raise ValueError(f'gate is {gate.dtype} {tuple(gate.shape)}; expected '
                             f'torch.float32 ({self.n},)')


class CountingLayer(Layer):
    """What a layer on the CPU can do besides: say what its tokens look like."""

    @abstractmethod
    def watch(self) -> None:
        """Count from now on what the tokens look like; costs a few additions per token."""

    @abstractmethod
    def seen(self) -> Seen:
        """Return what was counted and begin anew. Waits for a call that is running."""


class ReferenceLayer(CountingLayer):
    """The layer in plain torch: exact and slow."""

    def __init__(
        self, weight: Weight, bias: Tensor | None, options: Options,
        up: Weight | None, up_bias: Tensor | None,
    ) -> None:
        self.n, self.k = weight.shape
        self.nbytes = weight.nbytes + (up.nbytes if up else 0)
        self.weight, self.bias, self.options = weight, bias, options
        self.up, self.up_bias = up, up_bias
        self._watched = False
        self._amax: list[Tensor] = []
        self._clipped = 0

    def watch(self) -> None:
        """See CountingLayer."""
        self._watched = True

    def seen(self) -> Seen:
        """See CountingLayer."""
        amax = torch.cat([torch.empty(0), *self._amax])
        finite = amax[torch.isfinite(amax)]
        seen = Seen(finite.numel(), float(finite.double().mean()) if finite.numel() else 0.0,
                    float(finite.max()) if finite.numel() else 0.0,
                    amax.numel() - finite.numel(), self._clipped)
        self._amax, self._clipped = [], 0
        return seen

    def _observe(self, x: Tensor, act_scale: float | None) -> None:
        o = self.options
        amax = reference.transform_tokens(x, o.diagonal, o.hadamard).abs().amax(-1)
        self._amax.append(amax)
        if act_scale is not None:
            reach = act_scale * reference.TOP[o.act_bits]
            self._clipped += int((torch.isfinite(amax) & (amax > reach)).sum())

    def __call__(
        self,
        x: Tensor,
        *,
        act_scale: float | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See Layer."""
        self._refuse(x, residual, gate)
        _refuse_scale(act_scale)
        o = self.options
        if self._watched:
            self._observe(x, act_scale)
        return reference.linear(
            x, self.weight, self.bias, act_bits=o.act_bits, act_scale=act_scale,
            hadamard=o.hadamard, diagonal=o.diagonal, activation=o.activation, up=self.up,
            up_bias=self.up_bias, gate=gate, residual=residual)


def _refuse_scale(act_scale: float | None) -> None:
    if act_scale is not None and not 1e-30 < act_scale < 1e30:
        raise ValueError(f'act_scale is {act_scale}; expected a finite number above zero')


class NativeLayer(CountingLayer):
    """The layer in one of the C++ libraries."""

    def __init__(
        self, library: ctypes.CDLL, weight: Weight, bias: Tensor | None, options: Options,
        up: Weight | None, up_bias: Tensor | None,
    ) -> None:
        self.n, self.k = weight.shape
        self._library = library
        self._linear = library.qv_linear
        self.handle = library.qv_layer_new(self.n, self.k, options.act_bits, options.hadamard,
                                           ACTIVATION_CODES[options.activation])
        if not self.handle:
            raise ValueError(f'no kernel serves a layer of shape {weight.shape}')
        self._add(0, weight, bias)
        if up is not None:
            self._add(1, up, up_bias)
        if options.diagonal is not None:
            multipliers = options.diagonal.float().contiguous()
            native.check(library.qv_layer_diagonal(self.handle, multipliers.data_ptr()))
        self.nbytes = int(library.qv_layer_bytes(self.handle))
        self.number = ops.register(self)

    def _add(self, which: int, weight: Weight, bias: Tensor | None) -> None:
        library = self._library
        mixed = isinstance(weight, MixedWeight)
        parts = weight.parts if isinstance(weight, MixedWeight) else (weight,)
        for part in parts:
            data, scales = part.data.contiguous(), part.scales.contiguous()
            native.check(library.qv_layer_part(
                self.handle, which, part.bits, part.shape[0], part.group, data.data_ptr(),
                scales.data_ptr()))
        pruned = self.n - sum(part.shape[0] for part in parts)
        if pruned:
            native.check(library.qv_layer_part(self.handle, which, 0, pruned, 0, None, None))
        order = weight.order.contiguous().data_ptr() if mixed else None  # type: ignore[union-attr]
        values = None if bias is None else bias.float().contiguous()
        native.check(library.qv_layer_finish(
            self.handle, which, order, None if values is None else values.data_ptr()))

    def __call__(
        self,
        x: Tensor,
        *,
        act_scale: float | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See Layer."""
        if is_compiling():
            return torch.ops.quantvla.linear(x, self.number, self.n, act_scale or 0.0, gate,
                                             residual)
        shape = x.shape
        dtype = 0 if x.dtype is torch.float32 else DTYPES.get(x.dtype, -1)
        if dtype < 0 or not x.is_cpu or not shape or shape[-1] != self.k:
            self._refuse(x, residual, gate)
        if not x.is_contiguous():
            x = x.contiguous()
        if len(shape) == 2:  # the usual case: no slice of the shape, no product
            rows = shape[0]
            y = x.new_empty((rows, self.n))
        else:
            rows = x.numel() // self.k
            y = x.new_empty((*shape[:-1], self.n))
        residual_at = gate_at = None
        if residual is not None or gate is not None:
            self._refuse(x, residual, gate)
            residual = None if residual is None else residual.contiguous()
            gate = None if gate is None else gate.contiguous()
            residual_at = None if residual is None else residual.data_ptr()
            gate_at = None if gate is None else gate.data_ptr()
        if act_scale is not None:
            _refuse_scale(act_scale)
        status = self._linear(self.handle, rows, x.data_ptr(), y.data_ptr(), dtype,
                              act_scale or 0.0, gate_at, residual_at)
        if status:
            native.check(status)
        return y

    def watch(self) -> None:
        """See CountingLayer."""
        self._library.qv_layer_watch(self.handle)

    def seen(self) -> Seen:
        """See CountingLayer."""
        five = (ctypes.c_double * 5)()
        self._library.qv_layer_seen(self.handle, five)
        tokens, total, largest, broken, clipped = five
        return Seen(int(tokens), total / max(tokens, 1.0), largest, int(broken), int(clipped))

    def __del__(self) -> None:
        handle = getattr(self, 'handle', None)
        if handle:
            self._library.qv_layer_free(handle)


class GatedPair(CountingLayer):
    """A gated MLP whose halves are mixed-bit: two products, then their elementwise one."""

    def __init__(self, first: CountingLayer, second: CountingLayer) -> None:
        self.first, self.second = first, second
        self.n, self.k = first.n, first.k
        self.nbytes = first.nbytes + second.nbytes

    def watch(self) -> None:
        """See CountingLayer; both halves read the same tokens."""
        self.first.watch()

    def seen(self) -> Seen:
        """See CountingLayer."""
        return self.first.seen()

    def __call__(
        self,
        x: Tensor,
        *,
        act_scale: float | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See Layer."""
        self._refuse(x, residual, gate)
        product = self.first(x, act_scale=act_scale) * self.second(x, act_scale=act_scale)
        product = product if gate is None else (product * gate).to(x.dtype)
        return product if residual is None else product + residual


def make_native(
    library: ctypes.CDLL, weight: Weight, bias: Tensor | None, options: Options,
    up: Weight | None, up_bias: Tensor | None,
) -> Layer:
    """Make a NativeLayer, or two of them where a gated pair cannot share its tiles."""
    def uniform(w: Weight) -> bool:
        return isinstance(w, PackedWeight)

    def grouping(w: Weight) -> tuple[int, bool]:
        return (w.group, w.bits == 16) if isinstance(w, PackedWeight) else (-1, False)

    if up is None or (uniform(weight) and uniform(up) and grouping(weight) == grouping(up)):
        return NativeLayer(library, weight, bias, options, up, up_bias)
    plain = replace(options, activation='none')
    return GatedPair(NativeLayer(library, weight, bias, options, None, None),
                     NativeLayer(library, up, up_bias, plain, None, None))
