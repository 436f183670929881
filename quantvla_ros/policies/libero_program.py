# SPDX-License-Identifier: Apache-2.0
"""The shipped network as recorded programs: one for the prefix, one for each denoising step.

What is left of the time once the products are integer ones is the interpreter between five hundred
small layers. Here an observation costs one call for vision and backbone and one for each step; a
convolutional stem that an artifact left in float stays in torch. Owns no weight format and no
denoising loop: `part_of` says what each linear layer became (policies/libero_parts.py),
policies/flow.py integrates. Serves one observation at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.kernels import dispatch
from quantvla_ros.kernels.program import Norm, Program, Read
from quantvla_ros.kernels.windows import WindowLinear
from quantvla_ros.policies.flow import flow_times
from quantvla_ros.policies.libero_parts import Part, PartOf, Stored, stacked, stored_part
from quantvla_ros.policies.libero_vla import HEAD_WIDTH, NORM_EPS, ActionBlock, Block, LiberoVlaNet
from quantvla_ros.policies.threads import one_thread_of_torch


class RecordedContext:
    """What one observation leaves for the action head; it outlives the next observation.

    It lies in the buffers of its program, and is copied when another one needs them: a policy that
    makes one chunk after the other copies nothing.
    """

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None  # keys and values, start


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
        self._layers: dict[tuple[nn.Module, ...], list[tuple[Part, dispatch.Layer]]] = {}
        integer_stem = isinstance(net.vision.patch, WindowLinear)
        self.pixels = torch.empty(c.views * c.image**2, 3) if integer_stem else None
        self.patches = torch.empty(c.views * c.patches, c.vision_width)
        self.tokens = torch.empty(c.tokens, c.width)
        pairs = 2 * c.action_kv_heads * HEAD_WIDTH * c.action_layers
        self.keys_values = torch.empty(c.tokens, pairs)
        one = Program.cells(c.tokens, c.action_kv_heads, HEAD_WIDTH).numel()
        self.cells = Program.cells(c.tokens, c.action_kv_heads * c.action_layers, HEAD_WIDTH)
        self._cells = self.cells.split(one) if one else [self.cells] * c.action_layers
        self.start = torch.empty(c.chunk, c.action_width)
        self.chunk = torch.empty(c.chunk, c.action)
        self.speed = torch.empty(c.chunk, c.action)
        # what a context keeps: the keys in the kernels' order, or for the reference as they are
        self._kept = self.cells if self.cells.numel() else self.keys_values
        self._step: int | None = None  # the denoising step that is being recorded
        self._rooms: dict[str, Tensor] = {}
        # whose keys and values lie in the buffers
        self._owner: Callable[[], RecordedContext | None] = lambda: None
        with torch.no_grad():
            self._prefix = self._record_prefix()
            self._steps = self._record_steps()
        for module in net.modules():  # the kernels hold the weights now, in their own order
            if isinstance(module, Stored):
                module.part = None

    # -- recording -------------------------------------------------------------------------------

    def _layer(
        self, linears: Sequence[nn.Module], activation: str = 'none', up: nn.Module | None = None
    ) -> list[tuple[Part, dispatch.Layer]]:
        """One layer for linears that read the same input where they can be stacked, else several.

        Made once: the denoising loop uses the same layer in every step.
        """
        key = (*linears, *([up] if up is not None else []))
        if key not in self._layers:
            other = None if up is None else self._part_of(up)
            made = [
                (part, dispatch.prepare(
                    part.weight, part.bias, act_bits=part.act_bits, hadamard=part.hadamard,
                    diagonal=part.diagonal, activation=activation,
                    up=None if other is None else other.weight,
                    up_bias=None if other is None else other.bias,
                ))
                for part in stacked([self._part_of(linear) for linear in linears])
            ]
            self.nbytes += sum(layer.nbytes for _, layer in made)
            self._layers[key] = made
        return self._layers[key]

    def _put(
        self, program: Program, linears: Sequence[nn.Module], x: Tensor, y: Tensor,
        norm: Norm | None = None, *, activation: str = 'none', factor: Tensor | None = None,
        gate: Tensor | None = None, residual: Tensor | None = None, up: nn.Module | None = None,
    ) -> None:
        column, name = 0, self._name(*linears, *([up] if up is not None else []))
        for part, layer in self._layer(linears, activation, up):
            end = column + layer.n
            program.linear(layer, x, y[:, column:end], norm=norm, factor=factor, gate=gate,
                           residual=residual, act_scale=part.act_scale(self._step), name=name)
            column = end

    def _room(self, which: str, rows: int, columns: int) -> Tensor:
        """Memory for what is read soon after it was written, the same for all blocks and steps.

        Each with memory of its own would write to what no cache holds. Narrow and wide are
        different memory; of either only one is in use at a time.
        """
        size, room = rows * columns, self._rooms.get(which)
        if room is None or room.numel() < size:
            room = self._rooms[which] = torch.empty(size)
        return room[:size].view(rows, columns)

    def _name(self, *modules: nn.Module) -> str:
        """Name what a call reads for: see Program.look."""
        return '|'.join(self._names[module] for module in modules)

    def _gated(
        self, program: Program, mlp: nn.Module, x: Tensor, norm: Norm, gate: Tensor | None
    ) -> None:
        first, up = cast(nn.Module, mlp.gate_proj), cast(nn.Module, mlp.up_proj)
        hidden = self._room('wide', len(x), cast(int, first.out_features))
        if self._part_of(first).joins(self._part_of(up)):
            self._put(program, [first], x, hidden, norm, activation='silu', up=up)
        else:
            self._put(program, [first], x, hidden, norm, activation='silu')
            self._put(program, [up], x, hidden, norm, factor=hidden)
        self._put(program, [cast(nn.Module, mlp.down_proj)], hidden, x, gate=gate, residual=x)

    def _block(self, program: Program, block: Block, x: Tensor, batch: int) -> None:
        """A vision or backbone block on x in place."""
        attn = block.attn
        width, pair = attn.heads * HEAD_WIDTH, attn.kv_heads * HEAD_WIDTH
        qkv = self._room('wide', len(x), width + 2 * pair)
        out = self._room('narrow', len(x), width)
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
        hidden = self._room('wide', len(x), cast(int, fc1.out_features))
        self._put(program, [fc1], x, hidden, norm, activation='gelu_tanh')
        self._put(program, [cast(nn.Module, block.mlp.fc2)], hidden, x, residual=x)

    def _stem(self, program: Program) -> None:
        """Pixels to patches, where the convolutions are integer layers."""
        vision, c = self.net.vision, self.net.config
        assert self.pixels is not None
        x, side = self.pixels, c.image
        for conv, norm in zip(vision.convs, vision.conv_norms, strict=True):
            x, side = self._windows(program, cast(WindowLinear, conv), x, side)
            assert isinstance(norm, nn.GroupNorm)
            program.group_norm(x, x, norm.weight.detach(), norm.bias.detach(), batch=c.views,
                               groups=norm.num_groups, eps=norm.eps, activation='silu')
        places = (vision.position + vision.view).detach().reshape(self.patches.shape)
        self._windows(program, cast(WindowLinear, vision.patch), x, side, self.patches,
                      residual=places.contiguous())

    def _windows(
        self, program: Program, conv: WindowLinear, x: Tensor, side: int, y: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Record a convolution of square maps; return its maps and their side."""
        window = conv.window(side, side, self.net.config.views)
        [(part, layer)] = self._layer([conv.linear])
        y = torch.empty(window.tokens, layer.n) if y is None else y
        program.linear(layer, x, y, window=window, residual=residual,
                       act_scale=part.act_scale(None))
        return y, window.out_width

    def _record_prefix(self) -> Program:
        net, program = self.net, Program()
        if self.pixels is not None:
            self._stem(program)
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
        for index, cells in enumerate(self._cells):
            program.gather(*self._pair(index), cells, kv_heads=net.config.action_kv_heads)
        return program

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block's cross-attention, (tokens, kv_heads * HEAD_WIDTH) each."""
        width = self.net.config.action_kv_heads * HEAD_WIDTH
        keys, values = self.keys_values[:, 2 * width * index :][:, : 2 * width].split(width, 1)
        return keys, values

    def _record_steps(self) -> list[Program]:
        net, c = self.net, self.net.config
        with one_thread_of_torch():  # (steps, blocks, 9, width)
            self.modulation = net.modulation(torch.tensor(flow_times(self.steps)))[:, :, :, 0]
        self.modulation = self.modulation.contiguous()
        h = torch.empty(c.chunk, c.action_width)
        programs = []
        for i in range(self.steps):
            self._step = i
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
        qkv = self._room('wide', len(h), width + 2 * pair)
        out = self._room('narrow', len(h), width)
        q, k, v = qkv.split([width, pair, pair], 1)
        self._put(program, [attn.q_proj, attn.k_proj, attn.v_proj], h, qkv, Norm(eps, m[1], m[0]))
        program.attention(q, k, v, out, heads=attn.heads, kv_heads=attn.kv_heads,
                          rotary=_rotary(attn.table), name=self._name(attn))
        self._put(program, [attn.o_proj], out, h, gate=m[2], residual=h)
        self._put(program, [cross.q_proj], h, q, Norm(eps, m[4], m[3]))
        program.attention(q, *self._pair(index), out, heads=cross.heads, kv_heads=cross.kv_heads,
                          cells=self._cells[index], name=self._name(cross))
        self._put(program, [cross.o_proj], out, h, gate=m[5], residual=h)
        self._gated(program, block.mlp, h, Norm(eps, m[7], m[6]), m[8])

    # -- running ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefix(self, images: Tensor, words: Tensor, state: Tensor) -> RecordedContext:
        """Encode images (1, V, 3, H, W) in [-1, 1], words (1, W) and state (1, S)."""
        backbone, action = self.net.backbone, self.net.action
        self._make_room()
        if self.pixels is None:
            self._float_stem(images)
        else:
            # numpy: torch would wake a thread, which then spins on a core that the kernels want
            maps = self.pixels.numpy().reshape(images.shape[1], *images.shape[3:], 3)
            np.copyto(maps, images[0].permute(0, 2, 3, 1).numpy())
        count = len(self.patches)
        self.tokens[count:-1] = backbone.word(words[0])
        self.tokens[-1] = backbone.state(state)[0]
        torch.add(action.state(state), action.position[0], out=self.start)
        if self.see is None:
            self._prefix.run()
        else:
            self._prefix.look(self.see[0])
        context = RecordedContext()
        self._owner = weakref.ref(context)
        return context

    def _float_stem(self, images: Tensor) -> None:
        vision, x = self.net.vision, images.flatten(0, 1)
        for conv, norm in zip(vision.convs, vision.conv_norms, strict=True):
            x = F.silu(norm(conv(x)), inplace=True)
        x = vision.patch(x).flatten(2).transpose(1, 2)
        torch.add(x, vision.position + vision.view, out=self.patches.view(x.shape))

    def _make_room(self) -> None:
        """Let the context that lies in the buffers keep itself, if anybody still has it."""
        owner = self._owner()
        if owner is not None and owner.kept is None:
            owner.kept = (self._kept.clone(), self.start.clone())

    @torch.inference_mode()
    def velocity(self, context: RecordedContext, x: Tensor, step: int) -> Tensor:
        """Velocity (1, A, action) of a noisy normalised chunk x at one of the steps' times."""
        if self._owner() is not context:
            assert context.kept is not None, 'made by another program'
            self._make_room()
            self._kept.copy_(context.kept[0])
            self.start.copy_(context.kept[1])
            self._owner = weakref.ref(context)
        self.chunk.copy_(x[0])
        if self.see is not None and step == self.see[1] % self.steps:
            self._steps[step].look(self.see[0])
        else:
            self._steps[step].run()
        return self.speed[None].clone()


def _rotary(table: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of half the head width, from the network's table."""
    if table is None:
        return None
    half = HEAD_WIDTH // 2
    return table[0, :, :half].contiguous(), table[1, :, half:].contiguous()
