# SPDX-License-Identifier: Apache-2.0
"""The shipped network as recorded programs: one for the prefix, one for each denoising step.

What is left of the time once the products are integer ones is the interpreter between five hundred
small layers. Here an observation costs one call for vision and backbone and one for each step;
only the convolutional stem stays in torch. Owns no weight format and no denoising loop: `part_of`
says what each linear layer became, policies/flow.py integrates. Serves one observation at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.kernels import dispatch
from quantvla_ros.kernels.program import Norm, Program, Read
from quantvla_ros.kernels.weights import PackedWeight, Weight, keep, stack
from quantvla_ros.policies.flow import flow_times
from quantvla_ros.policies.libero_vla import HEAD_WIDTH, NORM_EPS, ActionBlock, Block, LiberoVlaNet
from quantvla_ros.quant.linear import KERNEL_HADAMARD, QuantizedLayer


@dataclass(frozen=True, eq=False)
class Part:
    """What one linear layer became: weight, bias, bits of every token, block of the Hadamard."""

    weight: Weight
    bias: Tensor | None = None
    act_bits: int = 8
    hadamard: int = 0

    def kind(self) -> tuple[int, int, int, int] | None:
        """Layers of one kind may share a call; None for rows of mixed width."""
        if not isinstance(self.weight, PackedWeight):
            return None
        return (self.weight.bits, self.weight.group, self.act_bits, self.hadamard)


PartOf = Callable[[nn.Module], Part]


def _part(layer: QuantizedLayer) -> Part:
    weight, bias = layer.folded()
    return Part(weight, bias, layer.scheme.act_bits, layer.transform.hadamards()[-1])


class Stored(nn.Module):
    """Stands for a linear layer in a network that is only recorded; holds what is recorded."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.part: Part | None = _part(layer)


def recordable(layers: Mapping[str, QuantizedLayer]) -> bool:
    """Whether programs can serve all layers: dynamic tokens, at most one fused Hadamard."""

    def one(layer: QuantizedLayer) -> bool:
        transform = layer.transform
        return (
            isinstance(layer.weight, PackedWeight)
            and layer.scheme.act_bits < 16
            and layer.act_scales is None
            and not transform.tensors()
            and transform.hadamards() in ([0], [KERNEL_HADAMARD])
        )

    def alike(name: str) -> bool:
        other = layers.get(name.replace('gate_proj', 'up_proj'))
        return other is not None and _part(layers[name]).kind() == _part(other).kind()

    return all(map(one, layers.values())) and all(
        alike(name) for name in layers if name.endswith('gate_proj')
    )


def stored_part(module: nn.Module) -> Part:
    """Take the part of a Stored layer, which lets go of it; a float linear is kept at 16 bits."""
    if isinstance(module, Stored):
        assert module.part is not None, 'recorded once'
        return module.part
    linear = cast(nn.Linear, module)
    return Part(keep(linear.weight.detach()), linear.bias)


class RecordedContext(NamedTuple):
    """What one observation leaves for the action head; a copy that outlives the next one."""

    keys_values: Tensor
    start: Tensor


class ChunkProgram:
    """images, words, state -> context; context, noisy chunk, step -> velocity.

    part_of  module of a linear -> the Part that replaces it
    steps    number of Euler steps of the flow from noise (time 0) to the chunk (time 1)
    """

    def __init__(self, net: LiberoVlaNet, part_of: PartOf = stored_part, steps: int = 10) -> None:
        self.net, self.steps = net, steps
        self._part_of = part_of
        self.nbytes = 0
        c = net.config
        self._names = {module: name for name, module in net.named_modules()}
        self.see: tuple[Callable[[Read], None], int] | None = None  # and the step that is seen
        self._layers: dict[tuple[nn.Module, ...], list[dispatch.Layer]] = {}
        self.patches = torch.empty(c.views * c.patches, c.vision_width)
        self.tokens = torch.empty(c.tokens, c.width)
        pairs = 2 * c.action_kv_heads * HEAD_WIDTH * c.action_layers
        self.keys_values = torch.empty(c.tokens, pairs)
        self.start = torch.empty(c.chunk, c.action_width)
        self.chunk = torch.empty(c.chunk, c.action)
        self.speed = torch.empty(c.chunk, c.action)
        self._loaded: RecordedContext | None = None  # whose keys and values lie in the buffers
        with torch.no_grad():
            self._prefix = self._record_prefix()
            self._steps = self._record_steps()
        for module in net.modules():  # the kernels hold the weights now, in their own order
            if isinstance(module, Stored):
                module.part = None

    # -- recording -------------------------------------------------------------------------------

    def _layer(
        self, linears: Sequence[nn.Module], activation: str = 'none', up: nn.Module | None = None
    ) -> list[dispatch.Layer]:
        """One layer for linears that read the same input where they can be stacked, else several.

        Made once: the denoising loop uses the same layer in every step.
        """
        key = (*linears, *([up] if up is not None else []))
        if key not in self._layers:
            other = None if up is None else self._part_of(up)
            made = [
                dispatch.prepare(
                    part.weight, part.bias, act_bits=part.act_bits, hadamard=part.hadamard,
                    activation=activation, up=None if other is None else other.weight,
                    up_bias=None if other is None else other.bias,
                )
                for part in _stacked([self._part_of(linear) for linear in linears])
            ]
            self.nbytes += sum(layer.nbytes for layer in made)
            self._layers[key] = made
        return self._layers[key]

    def _put(
        self, program: Program, linears: Sequence[nn.Module], x: Tensor, y: Tensor,
        norm: Norm | None = None, gate: Tensor | None = None, residual: Tensor | None = None,
    ) -> None:
        column = 0
        for layer in self._layer(linears):
            end = column + layer.n
            program.linear(layer, x, y[:, column:end], norm=norm, gate=gate, residual=residual,
                           name=self._name(*linears))
            column = end

    def _name(self, *modules: nn.Module) -> str:
        """Name what a call reads for: see Program.look."""
        return '|'.join(self._names[module] for module in modules)

    def _gated(
        self, program: Program, mlp: nn.Module, x: Tensor, norm: Norm, gate: Tensor | None
    ) -> None:
        first, up = cast(nn.Module, mlp.gate_proj), cast(nn.Module, mlp.up_proj)
        hidden = torch.empty(len(x), cast(int, first.out_features))
        layer = self._layer([first], 'silu', up)[0]
        program.linear(layer, x, hidden, norm=norm, name=self._name(first, up))
        self._put(program, [cast(nn.Module, mlp.down_proj)], hidden, x, gate=gate, residual=x)

    def _block(self, program: Program, block: Block, x: Tensor, batch: int) -> None:
        """A vision or backbone block on x in place."""
        attn = block.attn
        width, pair = attn.heads * HEAD_WIDTH, attn.kv_heads * HEAD_WIDTH
        qkv, out = torch.empty(len(x), width + 2 * pair), torch.empty(len(x), width)
        self._put(program, [attn.q_proj, attn.k_proj, attn.v_proj], x, qkv,
                  Norm(NORM_EPS, block.attn_norm.weight.detach()))
        q, k, v = qkv.split([width, pair, pair], 1)
        program.attention(q, k, v, out, heads=attn.heads, kv_heads=attn.kv_heads, batch=batch,
                          rotary=_rotary(attn.table))
        self._put(program, [attn.o_proj], out, x, residual=x)
        norm = Norm(NORM_EPS, block.mlp_norm.weight.detach())
        if hasattr(block.mlp, 'gate_proj'):
            self._gated(program, block.mlp, x, norm, None)
            return
        fc1 = cast(nn.Module, block.mlp.fc1)
        hidden = torch.empty(len(x), cast(int, fc1.out_features))
        program.linear(self._layer([fc1], 'gelu_tanh')[0], x, hidden, norm=norm,
                       name=self._name(fc1))
        self._put(program, [cast(nn.Module, block.mlp.fc2)], hidden, x, residual=x)

    def _record_prefix(self) -> Program:
        net, program = self.net, Program()
        for block in net.vision.blocks:
            self._block(program, cast(Block, block), self.patches, net.config.views)
        self._put(program, [net.vision.project], self.patches,
                  self.tokens[: len(self.patches)],
                  Norm(NORM_EPS, net.vision.norm.weight.detach()))
        for block in net.backbone.blocks:
            self._block(program, cast(Block, block), self.tokens, 1)
        pairs = [linear for block in net.action.blocks
                 for linear in (cast(ActionBlock, block).cross.k_proj,
                                cast(ActionBlock, block).cross.v_proj)]
        self._put(program, pairs, self.tokens, self.keys_values,
                  Norm(NORM_EPS, net.backbone.norm.weight.detach()))
        return program

    def _record_steps(self) -> list[Program]:
        net, c = self.net, self.net.config
        # (steps, blocks, 9, width)
        self.modulation = net.modulation(torch.tensor(flow_times(self.steps)))[:, :, :, 0]
        self.modulation = self.modulation.contiguous()
        h = torch.empty(c.chunk, c.action_width)
        programs = []
        for i in range(self.steps):
            program = Program()
            self._put(program, [net.action.enter], self.chunk, h, residual=self.start)
            for j, block in enumerate(net.action.blocks):
                self._action_block(program, cast(ActionBlock, block), h,
                                   list(self.modulation[i, j]), j)
            self._put(program, [net.action.leave], h, self.speed,
                      norm=Norm(NORM_EPS, net.action.norm.weight.detach()))
            programs.append(program)
        return programs

    def _action_block(
        self, program: Program, block: ActionBlock, h: Tensor, m: list[Tensor], index: int
    ) -> None:
        attn, cross, eps = block.attn, block.cross, NORM_EPS
        width, pair = attn.heads * HEAD_WIDTH, attn.kv_heads * HEAD_WIDTH
        qkv, out = torch.empty(len(h), width + 2 * pair), torch.empty(len(h), width)
        q, k, v = qkv.split([width, pair, pair], 1)
        self._put(program, [attn.q_proj, attn.k_proj, attn.v_proj], h, qkv, Norm(eps, m[1], m[0]))
        program.attention(q, k, v, out, heads=attn.heads, kv_heads=attn.kv_heads,
                          rotary=_rotary(attn.table), name=self._name(attn))
        self._put(program, [attn.o_proj], out, h, gate=m[2], residual=h)
        k, v = self.keys_values[:, 2 * pair * index : 2 * pair * (index + 1)].split(pair, 1)
        self._put(program, [cross.q_proj], h, q, Norm(eps, m[4], m[3]))
        program.attention(q, k, v, out, heads=cross.heads, kv_heads=cross.kv_heads,
                          name=self._name(cross))
        self._put(program, [cross.o_proj], out, h, gate=m[5], residual=h)
        self._gated(program, block.mlp, h, Norm(eps, m[7], m[6]), m[8])

    # -- running ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefix(self, images: Tensor, words: Tensor, state: Tensor) -> RecordedContext:
        """Encode images (1, V, 3, H, W) in [-1, 1], words (1, W) and state (1, S)."""
        vision, backbone, action = self.net.vision, self.net.backbone, self.net.action
        x = images.flatten(0, 1)
        for conv, norm in zip(vision.convs, vision.conv_norms, strict=True):
            x = F.silu(norm(conv(x)), inplace=True)
        x = vision.patch(x).flatten(2).transpose(1, 2)
        torch.add(x, vision.position + vision.view,
                  out=self.patches.view(x.shape))
        count = len(self.patches)
        self.tokens[count:-1] = backbone.word(words[0])
        self.tokens[-1] = backbone.state(state)[0]
        torch.add(action.state(state), action.position[0], out=self.start)
        if self.see is None:
            self._prefix.run()
        else:
            self._prefix.look(self.see[0])
        self._loaded = RecordedContext(self.keys_values.clone(), self.start.clone())
        return self._loaded

    @torch.inference_mode()
    def velocity(self, context: RecordedContext, x: Tensor, step: int) -> Tensor:
        """Velocity (1, A, action) of a noisy normalised chunk x at one of the steps' times."""
        if self._loaded is not context:
            self.keys_values.copy_(context.keys_values)
            self.start.copy_(context.start)
            self._loaded = context
        self.chunk.copy_(x[0])
        if self.see is not None and step == self.see[1] % self.steps:
            self._steps[step].look(self.see[0])
        else:
            self._steps[step].run()
        return self.speed[None].clone()


def _stacked(parts: list[Part]) -> list[Part]:
    """Join parts of one kind into one whose rows follow each other; else return them as they are.

    The biases must be all there or all missing.
    """
    kinds = {part.kind() for part in parts}
    biases = [part.bias for part in parts if part.bias is not None]
    if len(parts) == 1 or len(kinds) > 1 or None in kinds or len(biases) not in (0, len(parts)):
        return parts
    weight = stack([cast(PackedWeight, part.weight) for part in parts])
    return [Part(weight, torch.cat(biases) if biases else None, parts[0].act_bits,
                 parts[0].hadamard)]


def _rotary(table: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of half the head width, from the network's table."""
    if table is None:
        return None
    half = HEAD_WIDTH // 2
    return table[0, :, :half].contiguous(), table[1, :, half:].contiguous()
