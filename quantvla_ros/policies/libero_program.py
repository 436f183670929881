# SPDX-License-Identifier: Apache-2.0
"""The shipped network as two recorded programs: one for the prefix, one for all denoising steps.

What is left of the time once the products are integer ones is the interpreter between five hundred
small layers. Here each observation costs one call for vision and backbone and one for the whole
denoising loop; only the convolutional stem stays in torch. Owns no weight format: `weight_of`
says what each linear layer became. Serves one observation at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.kernels import dispatch
from quantvla_ros.kernels.program import Norm, Program
from quantvla_ros.kernels.weights import PackedWeight, Weight, stack
from quantvla_ros.policies.libero_vla import HEAD_WIDTH, NORM_EPS, ActionBlock, Block, LiberoVlaNet

WeightOf = Callable[[str, nn.Linear], Weight]


def _stackable(weights: Sequence[Weight]) -> bool:
    kinds = {(w.bits, w.group) if isinstance(w, PackedWeight) else None for w in weights}
    return len(kinds) == 1 and None not in kinds


class ChunkProgram:
    """images, words, state -> denoised normalised chunk, as recorded programs.

    weight_of  (name, linear) -> the low-bit weight that replaces the linear's
    steps      number of Euler steps of the flow from noise (time 0) to the chunk (time 1)
    act_bits   8 or 4, of every token
    """

    def __init__(
        self, net: LiberoVlaNet, weight_of: WeightOf, steps: int = 10, act_bits: int = 8
    ) -> None:
        self.net, self.steps, self.act_bits = net, steps, act_bits
        self._weight_of = weight_of
        self._names = {module: name for name, module in net.named_modules()}
        self.nbytes = 0
        c = net.config
        self._layers: dict[tuple[nn.Linear, ...], list[dispatch.Layer]] = {}
        self.patches = torch.empty(c.views * c.patches, c.vision_width)
        self.tokens = torch.empty(c.tokens, c.width)
        pairs = 2 * c.action_kv_heads * HEAD_WIDTH * c.action_layers
        self.keys_values = torch.empty(c.tokens, pairs)
        self.start = torch.empty(c.chunk, c.action_width)
        self.chunk = torch.empty(c.chunk, c.action)
        with torch.no_grad():
            self._prefix = self._record_prefix()
            self._denoise = self._record_denoise()

    # -- recording -------------------------------------------------------------------------------

    def _layer(
        self, linears: Sequence[nn.Linear], activation: str = 'none', up: nn.Linear | None = None
    ) -> list[dispatch.Layer]:
        """One layer for linears that read the same input where they can be stacked, else several.

        Made once: the denoising loop uses the same layer in every step.
        """
        key = (*linears, *([up] if up is not None else []))
        if key not in self._layers:
            found = [self._weight_of(self._names[linear], linear) for linear in linears]
            biases: list[Tensor | None] = [linear.bias for linear in linears]
            if _stackable(found) and len(found) > 1:
                found = [stack(cast(list[PackedWeight], found))]
                whole = [bias for bias in biases if bias is not None]
                biases = [torch.cat(whole) if len(whole) == len(linears) else None]
            other = None if up is None else self._weight_of(self._names[up], up)
            made = [
                dispatch.prepare(weight, bias, act_bits=self.act_bits, activation=activation,
                                 up=other, up_bias=None if up is None else up.bias)
                for weight, bias in zip(found, biases, strict=True)
            ]
            self.nbytes += sum(layer.nbytes for layer in made)
            self._layers[key] = made
        return self._layers[key]

    def _put(
        self, program: Program, linears: Sequence[nn.Linear], x: Tensor, y: Tensor,
        norm: Norm | None = None, gate: Tensor | None = None, residual: Tensor | None = None,
    ) -> None:
        column = 0
        for layer in self._layer(linears):
            end = column + layer.n
            program.linear(layer, x, y[:, column:end], norm=norm, gate=gate, residual=residual)
            column = end

    def _gated(
        self, program: Program, mlp: nn.Module, x: Tensor, norm: Norm, gate: Tensor | None
    ) -> None:
        first, up = cast(nn.Linear, mlp.gate_proj), cast(nn.Linear, mlp.up_proj)
        hidden = torch.empty(len(x), first.out_features)
        layer = self._layer([first], 'silu', up)[0]
        program.linear(layer, x, hidden, norm=norm)
        self._put(program, [cast(nn.Linear, mlp.down_proj)], hidden, x, gate=gate, residual=x)

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
        fc1 = cast(nn.Linear, block.mlp.fc1)
        hidden = torch.empty(len(x), fc1.out_features)
        program.linear(self._layer([fc1], 'gelu_tanh')[0], x, hidden, norm=norm)
        self._put(program, [cast(nn.Linear, block.mlp.fc2)], hidden, x, residual=x)

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

    def _record_denoise(self) -> Program:
        net, program, c = self.net, Program(), self.net.config
        times = torch.arange(self.steps) / self.steps
        # (steps, blocks, 9, width)
        self.modulation = net.modulation(times)[:, :, :, 0].contiguous()
        step = torch.full((c.action,), 1.0 / self.steps)
        h = torch.empty(c.chunk, c.action_width)
        for i in range(self.steps):
            self._put(program, [net.action.enter], self.chunk, h, residual=self.start)
            for j, block in enumerate(net.action.blocks):
                self._action_block(program, cast(ActionBlock, block), h,
                                   list(self.modulation[i, j]), j)
            self._put(program, [net.action.leave], h, self.chunk, residual=self.chunk, gate=step,
                      norm=Norm(NORM_EPS, net.action.norm.weight.detach()))
        return program

    def _action_block(
        self, program: Program, block: ActionBlock, h: Tensor, m: list[Tensor], index: int
    ) -> None:
        attn, cross, eps = block.attn, block.cross, NORM_EPS
        width, pair = attn.heads * HEAD_WIDTH, attn.kv_heads * HEAD_WIDTH
        qkv, out = torch.empty(len(h), width + 2 * pair), torch.empty(len(h), width)
        q, k, v = qkv.split([width, pair, pair], 1)
        self._put(program, [attn.q_proj, attn.k_proj, attn.v_proj], h, qkv, Norm(eps, m[1], m[0]))
        program.attention(q, k, v, out, heads=attn.heads, kv_heads=attn.kv_heads,
                          rotary=_rotary(attn.table))
        self._put(program, [attn.o_proj], out, h, gate=m[2], residual=h)
        k, v = self.keys_values[:, 2 * pair * index : 2 * pair * (index + 1)].split(pair, 1)
        self._put(program, [cross.q_proj], h, q, Norm(eps, m[4], m[3]))
        program.attention(q, k, v, out, heads=cross.heads, kv_heads=cross.kv_heads)
        self._put(program, [cross.o_proj], out, h, gate=m[5], residual=h)
        self._gated(program, block.mlp, h, Norm(eps, m[7], m[6]), m[8])

    # -- running ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefix(self, images: Tensor, words: Tensor, state: Tensor) -> None:
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
        self._prefix.run()

    @torch.inference_mode()
    def denoise(self, noise: Tensor) -> Tensor:
        """Noise (1, A, action) -> normalised chunk (1, A, action) for the encoded observation."""
        self.chunk.copy_(noise[0])
        self._denoise.run()
        return self.chunk[None].clone()


def _rotary(table: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of half the head width, from the network's table."""
    if table is None:
        return None
    half = HEAD_WIDTH // 2
    return table[0, :, :half].contiguous(), table[1, :, half:].contiguous()
