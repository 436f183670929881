# SPDX-License-Identifier: Apache-2.0
"""A linear layer on integers: what is stored of it, and the module that runs it.

Owns the path of an activation: diagonal, permutation, rotation, then one kernel call that
quantizes, multiplies and rescales. Chooses no bits and fits no scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.kernels import dispatch
from quantvla_ros.kernels.weights import PackedWeight, Weight, dequantize
from quantvla_ros.kernels.windows import WindowLinear
from quantvla_ros.quant.scheme import PerRow, Scheme
from quantvla_ros.quant.transforms import InputTransform, from_tensors

KERNEL_HADAMARD = 64  # the block that the kernels fuse with the quantization

# Which denoising step runs in this thread; layers with one scale for each step read it.
DENOISING_STEP: ContextVar[int | None] = ContextVar('denoising_step', default=None)


@contextmanager
def denoising_step(step: int) -> Iterator[None]:
    """Tell the layers below which denoising step is being computed."""
    token = DENOISING_STEP.set(step)
    try:
        yield
    finally:
        DENOISING_STEP.reset(token)


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """All that is stored of one quantized linear, y = (x T) W_q^T * fold + bias * fold.

    weight: codes and base scales of W in the frame of the transform, (out, in).
    bias: (out,) float32 or None. transform: T, applied to the input.
    act_scales: static activation scales, (1,) or (steps,) float32; None for one per token.
    fold: (out,) float32 factors of a calibration beside the base scales; None for none.
    Raises ValueError with a sentence when a part does not fit the others.
    """

    scheme: Scheme
    weight: Weight
    bias: Tensor | None = None
    transform: InputTransform = field(default_factory=InputTransform)
    act_scales: Tensor | None = None
    fold: Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        for name, vector in (('bias', self.bias), ('fold', self.fold)):
            if vector is not None and tuple(vector.shape) != (rows,):
                raise ValueError(f'{name} has shape {tuple(vector.shape)}; expected ({rows},)')
        if (self.act_scales is None) != isinstance(self.scheme.act, PerRow):
            raise ValueError(
                f'activations are quantized {self.scheme.act}, '
                f'but static scales are {"missing" if self.act_scales is None else "given"}'
            )
        if self.fold is not None and not isinstance(self.weight, PackedWeight):
            raise ValueError('rows of mixed width take no fold; fold before sorting the rows')

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        others = (self.bias, self.act_scales, self.fold, *self.transform.tensors().values())
        return self.weight.nbytes + sum(
            t.numel() * t.element_size() for t in others if t is not None
        )

    def folded(self) -> tuple[Weight, Tensor | None]:
        """Weight and bias with the fold in the scales: no operation is added at run time."""
        if self.fold is None:
            return self.weight, self.bias
        assert isinstance(self.weight, PackedWeight)
        if self.weight.bits == 16:  # not scaled: the rows themselves take the factor
            rows = self.weight.data.float() * self.fold[:, None]
            weight = replace(self.weight, data=rows.to(self.weight.data.dtype))
        else:
            weight = replace(self.weight, scales=self.weight.scales * self.fold[:, None])
        return weight, None if self.bias is None else self.bias * self.fold

    def float_weight(self) -> Tensor:
        """The float weight that this layer stands for, back in the frame of the plain input."""
        weight = dequantize(self.folded()[0])
        identity = torch.eye(weight.shape[1])
        return weight @ self.transform.activations(identity).T


def kernel_transform(transform: InputTransform) -> tuple[Tensor | None, int] | None:
    """What the kernels do on their own of a transform: (multipliers (in,) or None, Hadamard).

    None where something is left that they cannot: a permutation, a dense rotation, another block.
    A chain counts where its diagonals come before its only Hadamard.
    """
    multipliers: Tensor | None = None
    link: InputTransform | None = transform
    block = 0
    while link is not None:
        late = block and (link.diagonal is not None or link.hadamard)
        other = link.permutation is not None or link.blocks is not None
        if other or late or link.hadamard not in (0, KERNEL_HADAMARD):
            return None
        if link.diagonal is not None:
            inverse = 1.0 / link.diagonal.float()
            multipliers = inverse if multipliers is None else multipliers * inverse
        block = block or link.hadamard
        link = link.then
    return multipliers, block


def static_scale(act_scales: Tensor | None) -> float | None:
    """The static activation scale of the step that runs; None where each token has its own."""
    if act_scales is None:
        return None
    if act_scales.numel() == 1:
        return float(act_scales)
    step = DENOISING_STEP.get()
    if step is None or step >= act_scales.numel():
        raise RuntimeError(
            f'this layer has scales for {act_scales.numel()} denoising steps, and step '
            f'{step} runs; quantize for the number of steps that is used'
        )
    return float(act_scales[step])


class QuantLinear(nn.Module):
    """Runs a QuantizedLayer in the place of an nn.Linear: (..., in) -> (..., out).

    Buffers: act_scales (1,) or (steps,) float32 or None, and the transform's tensors under the
    names of InputTransform.tensors (diagonal (in,), permutation (in,) int64, blocks (n, b, b)),
    unless the kernel takes the whole transform, which it fuses with the quantization; a last
    Hadamard of 64 it takes in any case. The weight lies with the kernel, in its own order; the
    canonical one is let go.
    """

    act_scales: Tensor | None

    def __init__(self, layer: QuantizedLayer, device: str = 'cpu') -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.scheme = layer.scheme
        self.register_buffer('act_scales', layer.act_scales, persistent=False)
        integer = layer.scheme.act_bits < 16
        fused = kernel_transform(layer.transform) if integer else None
        kept = layer.transform if fused is None else InputTransform()
        self._names = tuple(kept.tensors())
        for name, tensor in kept.tensors().items():
            stored = tensor.float() if tensor.is_floating_point() else tensor
            self.register_buffer(name.replace('.', '_'), stored, persistent=False)
        *before, last = kept.hadamards()
        if fused is None:
            fused = (None, last if integer and last == KERNEL_HADAMARD else 0)
            last = 0 if fused[1] else last
        self._hadamards = (*before, last)
        weight, bias = layer.folded()
        if integer:
            self._layer = dispatch.prepare(
                weight, bias, act_bits=layer.scheme.act_bits, diagonal=fused[0],
                hadamard=fused[1], device=device)
        else:  # weight-only: no integer product; the float weight is made for each call
            self._weight, self._bias = weight, bias
        self._plain = not self._names and not any(self._hadamards)
        self.to(device)  # the transform; the weight lies where its kernel wants it

    def _transform(self) -> InputTransform:
        tensors = {name: self.get_buffer(name.replace('.', '_')) for name in self._names}
        return from_tensors(tensors, self._hadamards)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) float -> (..., out) in the dtype of x."""
        if not self._plain:
            x = self._transform().activations(x)
        if self.scheme.act_bits < 16:
            return self._layer(x, act_scale=static_scale(self.act_scales))
        bias = None if self._bias is None else self._bias.to(x.dtype)
        return F.linear(x, dequantize(self._weight).to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Show shape and scheme when the model is printed."""
        return f'in={self.in_features}, out={self.out_features}, {self.scheme.name}'


Make = Callable[[QuantizedLayer], nn.Module]


def replace_linears(
    net: nn.Module, layers: Mapping[str, QuantizedLayer], make: Make = QuantLinear
) -> None:
    """Put a QuantLinear in the place of each named linear; the float weights are let go.

    A convolution becomes such a layer on its windows. make: another module for a stored layer,
    such as quant.simulate's.

    Raises ValueError when a name leads to neither or the shapes differ.
    """
    for name, layer in layers.items():
        old = net.get_submodule(name)
        if not isinstance(old, (nn.Linear, nn.Conv2d)):
            raise ValueError(f'{name!r} is a {type(old).__name__}, not a linear layer')
        shape = (old.weight.shape[0], old.weight[0].numel())
        if shape != tuple(layer.weight.shape):
            raise ValueError(
                f'{name!r} has shape {shape}, the quantized layer {tuple(layer.weight.shape)}'
            )
        new = make(layer)
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child,
                WindowLinear(old, new) if isinstance(old, nn.Conv2d) else new)
