# SPDX-License-Identifier: Apache-2.0
"""The parts that a network on the GPU is planned from: projections, scratch, a residual stream.

A plan is a network as a fixed list of launches over planned memory, for one prefix capacity. It
computes what the modules of the family compute, with norms, positions, activations, residuals,
rotations and quantization fused into the kernels around the products. Imports without Triton.

Float and integer projections stand side by side in one plan: each says how it takes its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantvla_ros.kernels.cuda import launch, launch_fused, tiles
from quantvla_ros.kernels.cuda import launch_attention as attention
from quantvla_ros.kernels.cuda.launch import (
    NO_EPILOGUE,
    PLAIN,
    Branch,
    Epilogue,
    Norm,
    Take,
    Tokens,
    Turned,
    Workspace,
)
from quantvla_ros.kernels.cuda.pack import (
    EIGHT,
    DeviceWeight,
    pair_order,
    paired,
    stack_rows,
    to_device,
)
from quantvla_ros.kernels.cuda.tiles import Early
from quantvla_ros.policies.cuda_source import Source
from quantvla_ros.quant.linear import KERNEL_HADAMARD, QuantizedLayer, kernel_transform
from quantvla_ros.quant.transforms import InputTransform, from_tensors


class Machine:
    """Device, type, scratch and workspace of one plan. Freezes before a graph is captured."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.pdl = False  # whether the launches that are listed now begin early
        self.chip = launch.chip_of(device)
        self.ways = tiles.ways(self.chip)
        self.workspace = Workspace(device)
        self._scratch: dict[tuple[Any, ...], Tensor] = {}
        self._frozen = False

    def scratch(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a named buffer, the same at every call; its values last until its next use."""
        key = (name, shape, dtype)
        if key not in self._scratch:
            if self._frozen:
                raise RuntimeError(f'scratch {key} was not planned')
            kept = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
            self._scratch[key] = kept
        return self._scratch[key]

    def tokens(self, rows: int, take: Take) -> Tokens:
        """Room for the tokens of the next product."""
        if take.top == 0:
            return Tokens(self.scratch('floats', rows, take.kp))
        return Tokens(self.scratch('codes', rows, take.kp, dtype=torch.int8),
                      self.scratch('scales', rows, dtype=torch.float32))

    def parts(self, splits: int, rows: int, heads: int, width: int) -> attention.Parts:
        """Room for the splits of an attention."""
        floats = torch.float32
        return attention.Parts(
            self.scratch('part values', splits, rows, heads * width),
            self.scratch('part sums', splits, rows, heads, dtype=floats),
            self.scratch('part largest', splits, rows, heads, dtype=floats))

    def freeze(self) -> None:
        """Plan no more memory."""
        self._frozen = True
        self.workspace.freeze()

    @property
    def nbytes(self) -> int:
        """Bytes of scratch and workspace."""
        held = (*self._scratch.values(), self.workspace.partial, self.workspace.count)
        return sum(t.numel() * t.element_size() for t in held)


class FloatProjection:
    """y = x W^T + bias in the model's type, by the vendor's library."""

    integer = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.n, self.k = weight.shape
        self.nbytes = weight.numel() * weight.element_size()

    def take(self, step: int = 0) -> Take:
        """Floats, in every step."""
        del step
        return Take(16, self.k)

    def product(self, tokens: Tokens, out: Tensor, *, bias: bool = True) -> None:
        """Write x W^T, with the bias unless who calls adds it."""
        if bias and self.bias is not None:
            torch.addmm(self.bias, tokens.data, self.weight.T, out=out)
        else:
            torch.mm(tokens.data, self.weight.T, out=out)


class IntegerProjection:
    """A quantized linear on the integer kernels.

    A diagonal and then a Hadamard of 64 are fused with the quantization; any other transform of
    the input runs in torch before it, which is exact and slow.
    """

    integer = True

    def __init__(
        self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype,
        machine: Machine,
    ) -> None:
        weight, bias = layer.folded()
        self.weight = to_device(weight, device)
        self.bias = None if bias is None else bias.float().to(device)
        self.n, self.k = self.weight.shape
        self.act_bits = layer.scheme.act_bits
        self.static = None if layer.act_scales is None else layer.act_scales.float().to(device)
        fused = kernel_transform(layer.transform)
        self.before: InputTransform | None = None
        self.rotate, self.diagonal = False, None
        if fused is None:
            moved = {name: t.to(device) for name, t in layer.transform.tensors().items()}
            self.before = from_tensors(moved, layer.transform.hadamards())
        else:
            self.rotate = fused[1] == KERNEL_HADAMARD
            self.diagonal = None if fused[0] is None else fused[0].to(device)
        self.machine, self.dtype = machine, dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.weight.nbytes

    def take(self, step: int = 0) -> Take:
        """How the kernel wants tokens in a denoising step."""
        return Take(16, self.k) if self.before is not None else self._take(step)

    def _take(self, step: int) -> Take:
        static = self.static
        if static is not None:
            static = static[step:step + 1] if static.numel() > 1 else static
        return Take(self.act_bits, self.weight.padded[1], self.rotate, static, self.diagonal)

    def tokens(self, tokens: Tokens, step: int = 0) -> Tokens:
        """Quantize floats that need a transform of their own first; pass others on."""
        if self.before is None:
            return tokens
        take = self._take(step)
        made = self.machine.tokens(tokens.data.shape[0], take)
        turned = self.before.activations(tokens.data).to(self.dtype).contiguous()
        launch.make_tokens(turned, self.k, take, made, pdl=self.machine.pdl)
        return made

    def product(
        self, tokens: Tokens, out: Tensor, epilogue: Epilogue = NO_EPILOGUE, step: int = 0
    ) -> None:
        """Write the product with its epilogue; the bias is the layer's own."""
        whole = Epilogue(self.bias, epilogue.act, epilogue.up, epilogue.up_bias, epilogue.gate,
                         epilogue.residual)
        launch.run_product(self.tokens(tokens, step), self.weight, out, self.machine.workspace,
                           whole, pdl=self.machine.pdl)

    def sums(self, tokens: Tokens, gate: Tensor | None, step: int) -> Branch | None:
        """Leave a split product's raw sums to the next norm, for few tokens; None for others."""
        rows, m = tokens.data.shape[0], self.machine
        if rows > tiles.FEW or 'raw' not in m.ways:
            return None
        tile = tiles.choose(launch.problem_of(self.weight, rows, 'raw'), m.chip)
        if tile.split == 1:
            return None
        made = self.tokens(tokens, step)
        kind = torch.float32 if self.weight.group else torch.int32
        raw = m.scratch('raw', tile.split, rows, self.n, dtype=kind)
        launch_fused.run_raw(made, self.weight, raw, tile, pdl=m.pdl)
        return Branch(raw, self.bias, gate, made.scale,
                      None if self.weight.group else self.weight.scales[0])


Projection = FloatProjection | IntegerProjection


def project(source: Source, machine: Machine, name: str) -> Projection:
    """One linear of the model as a projection."""
    linear = source.linear(name)
    bias: Tensor | None
    if isinstance(linear, nn.Linear):
        bias = None if linear.bias is None else linear.bias.detach()
        return FloatProjection(linear.weight.detach(), bias)
    if linear.scheme.act_bits == 16:  # weights alone are narrow: back to floats, once
        weight = linear.float_weight().to(source.device, source.dtype)
        bias = None if linear.bias is None else linear.bias.detach()
        return FloatProjection(
            weight, None if bias is None else bias.to(source.device, source.dtype))
    return IntegerProjection(linear, source.device, source.dtype, machine)


def small(source: Source, name: str) -> FloatProjection:
    """A small layer that stays in floats, whatever it is stored as."""
    linear = source.linear(name)
    bias: Tensor | None
    if isinstance(linear, nn.Linear):
        weight, bias = linear.weight.detach(), linear.bias
    else:
        weight, bias = linear.float_weight(), linear.folded()[1]
    kept = None if bias is None else bias.detach().to(source.device, source.dtype)
    return FloatProjection(weight.to(source.device, source.dtype), kept)


def same_take(a: Projection, b: Projection) -> bool:
    """Whether two projections read the very same tokens."""
    if a.integer != b.integer:
        return False
    if isinstance(a, FloatProjection) or isinstance(b, FloatProjection):
        return True
    if a.before is not None or b.before is not None or a.rotate != b.rotate:
        return False
    return (_equal(a.static, b.static) and _equal(a.diagonal, b.diagonal)
            and a.act_bits == b.act_bits and a.weight.padded[1] == b.weight.padded[1])


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _stackable(parts: Sequence[Projection]) -> bool:
    if not all(same_take(parts[0], part) for part in parts):
        return False
    weights = [part.weight for part in parts]
    if all(isinstance(weight, Tensor) for weight in weights):
        return True
    packed = [weight for weight in weights if isinstance(weight, DeviceWeight)]
    kinds = {(w.bits, w.group, w.pack, w.padded[1]) for w in packed}
    return len(kinds) == 1 and all(w.shape[0] == w.padded[0] for w in packed[:-1])


def _joined(vectors: Sequence[Tensor | None]) -> Tensor | None:
    found = [vector for vector in vectors if vector is not None]
    return torch.cat(found) if len(found) == len(vectors) else None


class Group:
    """Projections that read one token and write side by side: one product where that can be."""

    def __init__(
        self, source: Source, machine: Machine, names: Sequence[str],
        made: Sequence[Projection] = (),
    ) -> None:
        parts = list(made) or [project(source, machine, name) for name in names]
        biases = {part.bias is None for part in parts}
        if len(parts) > 1 and len(biases) == 1 and _stackable(parts):
            parts = [self._stack(source, names, parts)]
        self.machine = machine
        self.parts = parts
        # found once: comparing what lies on the device waits for it, which a capture refuses
        self.again = [i > 0 and same_take(parts[i - 1], part) for i, part in enumerate(parts)]
        self.n = sum(part.n for part in parts)
        self.nbytes = sum(part.nbytes for part in parts)

    @staticmethod
    def _stack(
        source: Source, names: Sequence[str], parts: Sequence[Projection]
    ) -> Projection:
        bias = _joined([part.bias for part in parts])
        floats = [part for part in parts if isinstance(part, FloatProjection)]
        if floats:
            weight = torch.cat([part.weight for part in floats])
            start = 0
            for name, part in zip(names, floats, strict=True):
                # the model's own copy becomes a view, so that nothing is held twice
                linear = source.linear(name)
                if isinstance(linear, nn.Linear):
                    linear.weight = nn.Parameter(weight[start:start + part.n],
                                                 requires_grad=False)
                start += part.n
            return FloatProjection(weight, bias)
        first = parts[0]
        assert isinstance(first, IntegerProjection)
        first.weight = stack_rows([p.weight for p in parts if isinstance(p, IntegerProjection)])
        first.bias, first.n = bias, first.weight.shape[0]
        return first

    def pair(self, width: int) -> bool:
        """Put rows of heads in pairs, for positions in the epilogue; whether that is wanted."""
        part = self.parts[0]
        if ('turn' not in self.machine.ways or len(self.parts) > 1
                or not isinstance(part, IntegerProjection) or width % (2 * EIGHT)):
            return False
        part.weight = paired(part.weight, width)
        if part.bias is not None:
            part.bias = part.bias[pair_order(part.n, part.n, width).to(part.bias.device)]
        return True

    def run_turned(
        self, stream: Stream, norm: Norm, q: Tensor, turn: Turned, *, step: int = 0
    ) -> None:
        """Queries into q (rows, heads * width), keys and values into the cache; after `pair`."""
        part = self.parts[0]
        assert isinstance(part, IntegerProjection)
        tokens = part.tokens(stream.tokens(part.take(step), norm), step)
        launch_fused.run_turned(tokens, part.weight, q, turn, part.bias, pdl=self.machine.pdl)

    def run(
        self, stream: Stream, norm: Norm, out: Tensor, *, rows: int = 0, step: int = 0
    ) -> None:
        """out (rows, n) = the projections of the normed stream."""
        tokens, start = None, 0
        for part, again in zip(self.parts, self.again, strict=True):
            if tokens is None or not again:
                tokens = stream.tokens(part.take(step), norm)
            target = out[:, start:start + part.n]
            if isinstance(part, IntegerProjection):
                part.product(tokens, target, step=step)
            else:
                part.product(tokens, target)
            start += part.n


class Stream:
    """The residual stream x (rows, width): what is added to it waits until the next norm."""

    def __init__(self, machine: Machine, x: Tensor) -> None:
        self.machine, self.x = machine, x
        self.waiting: Branch | None = None

    def tokens(self, take: Take, norm: Norm = PLAIN) -> Tokens:
        """Take in what waits, norm, and turn into tokens."""
        if take.top == 0 and norm is PLAIN and self.waiting is None:
            return Tokens(self.x)
        out = self.machine.tokens(self.x.shape[0], take)
        launch.make_tokens(self.x, self.x.shape[1], take, out, norm=norm, branch=self.waiting,
                           pdl=self.machine.pdl)
        self.waiting = None
        return out

    def add(
        self, projection: Projection, tokens: Tokens, gate: Tensor | None = None, step: int = 0
    ) -> None:
        """x += gate * projection(tokens): in the epilogue, or with the next norm."""
        if isinstance(projection, IntegerProjection):
            self.waiting = projection.sums(tokens, gate, step)
            if self.waiting is None:
                projection.product(tokens, self.x, Epilogue(gate=gate, residual=self.x), step)
            return
        y = self.machine.scratch('branch', *self.x.shape)
        projection.product(tokens, y, bias=False)
        self.waiting = Branch(y, projection.bias, gate)


def gains(source: Source, name: str) -> Tensor:
    """A norm's weight as the kernels take it: float32."""
    return source.value(name).float().contiguous()


def early_for(source_kind: str, device: torch.device, family: str) -> Early:
    """Where launches overlap, by what was measured on the chip."""
    if device.type != 'cuda':
        return Early()
    return tiles.early(source_kind, launch.chip_of(device), family)

