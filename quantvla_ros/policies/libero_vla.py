# SPDX-License-Identifier: Apache-2.0
"""The small VLA that ships with the package, in one file: eyes, backbone, action head.

    images -> VisionEncoder --+
    words  -> embedding ------+-> Backbone -> context -> ActionHead: noise -> velocity -> chunk
    state  -> linear ---------+

Owns the network and nothing else: no files, no units, no denoising loop (policies/flow.py), no
loss (training/). Every linear layer is a plain nn.Linear under a stable name, so that
quantization can replace it; each attention runs through a parameter-free `core` module whose
inputs are queries, keys and values by head, so that a forward hook can observe them.

B batch, V views, T tokens, H heads, G key-value heads, D head width, A steps of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64
PATCH = 16  # pixels of one vision token: three strided convolutions and a 2x2 projection
TIME_FEATURES = 256
NORM_EPS = 1e-6
PARTS = 9  # shift, scale and gate for self-attention, cross-attention and MLP


@dataclass(frozen=True)
class VlaConfig:
    """Every size of the network, as in policy.json. Raises ValueError that lists what is off."""

    image: int = 128
    views: int = 2
    words: int = 20
    vocabulary: int = 64
    state: int = 9
    action: int = 8
    chunk: int = 16
    vision_width: int = 384
    vision_layers: int = 4
    vision_mlp: int = 1024
    width: int = 512
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    mlp: int = 896
    action_width: int = 384
    action_layers: int = 6
    action_heads: int = 6
    action_kv_heads: int = 2
    action_mlp: int = 768

    def __post_init__(self) -> None:
        problems = [
            f'{item.name} is {getattr(self, item.name)!r}; expected a whole number above zero'
            for item in fields(self)
            if not isinstance(getattr(self, item.name), int) or getattr(self, item.name) < 1
        ]
        if problems:
            raise ValueError('architecture: ' + '; '.join(problems))
        for name in ('vision_width', 'vision_mlp', 'width', 'mlp', 'action_width', 'action_mlp'):
            if getattr(self, name) % 64:
                problems.append(f'{name} is {getattr(self, name)}; expected a multiple of 64')
        if self.image % PATCH:
            problems.append(f'image is {self.image}; expected a multiple of {PATCH}')
        for width, heads, groups in (
            ('width', 'heads', 'kv_heads'),
            ('action_width', 'action_heads', 'action_kv_heads'),
        ):
            if getattr(self, heads) * HEAD_WIDTH != getattr(self, width):
                problems.append(f'{heads} must be {width} / {HEAD_WIDTH}')
            elif getattr(self, heads) % getattr(self, groups):
                problems.append(f'{groups} must divide {heads}')
        if problems:
            raise ValueError('architecture: ' + '; '.join(problems))

    @property
    def patches(self) -> int:
        """Vision tokens of one view."""
        return (self.image // PATCH) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of the backbone: patches of all views, words, one state token."""
        return self.views * self.patches + self.words + 1


class Context(NamedTuple):
    """What one observation leaves for the action head; serves any number of velocity calls.

    keys_values: for each action block, keys and values (B, G, T, D) of the cross-attention.
    start: (B, A, action_width), state and step positions, added to the noisy chunk.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    start: Tensor

    def repeat(self, times: int) -> Context:
        """Repeat each observation, for several noise draws that share one prefix."""
        pairs = [
            (k.repeat_interleave(times, 0), v.repeat_interleave(times, 0))
            for k, v in self.keys_values
        ]
        return Context(pairs, self.start.repeat_interleave(times, 0))


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32 or wider, times a learned weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


def rms_normalize(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without a weight."""
    return F.rms_norm(x, x.shape[-1:], None, NORM_EPS)


def rotary_table(tokens: int, base: float = 10000.0) -> Tensor:
    """(2, tokens, HEAD_WIDTH): cosines and signed sines, for rotate()."""
    frequency = base ** (-torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH)
    angle = torch.arange(tokens).float()[:, None] * frequency
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of (B, heads, T, D) by its angle at each position."""
    return x * table[0] + x.roll(HEAD_WIDTH // 2, -1) * table[1]


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(D)) v without a mask; heads g*r..g*r+r-1 share key-value head g."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D).

        Heads that share keys follow each other as further queries, so no key is copied.
        """
        batch, heads, tokens, width = q.shape
        grouped = q.reshape(batch, k.shape[1], -1, width)
        return F.scaled_dot_product_attention(grouped, k, v).reshape(batch, heads, tokens, width)


class Attention(nn.Module):
    """Grouped-query attention over x itself, or over a context of another width."""

    table: Tensor | None

    def __init__(
        self, width: int, kv_heads: int, context_width: int | None = None, rotary: int = 0
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = width // HEAD_WIDTH, kv_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(context_width or width, kv_heads * HEAD_WIDTH, bias=False)
        self.v_proj = nn.Linear(context_width or width, kv_heads * HEAD_WIDTH, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.core = AttentionCore()
        table = rotary_table(rotary) if rotary else None
        self.register_buffer('table', table, persistent=False)

    def _split(self, x: Tensor, heads: int, turned: bool) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D), rotated where this attention has positions."""
        x = x.view(x.shape[0], x.shape[1], heads, HEAD_WIDTH).transpose(1, 2)
        return rotate(x, self.table[:, : x.shape[2]]) if turned and self.table is not None else x

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, T, D) of a context (B, T, width)."""
        keys = self._split(self.k_proj(context), self.kv_heads, turned=True)
        return keys, self._split(self.v_proj(context), self.kv_heads, turned=False)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend from x (B, T, width) to itself, or to keys and values made before."""
        q = self._split(self.q_proj(x), self.heads, turned=True)
        k, v = self.keys_values(x) if keys_values is None else keys_values
        return self.o_proj(self.core(q, k, v).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        return self.fc2(F.gelu(self.fc1(x), approximate='tanh'))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): vision and backbone."""

    def __init__(self, width: int, attention: Attention, mlp: nn.Module) -> None:
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(width), attention
        self.mlp_norm, self.mlp = RMSNorm(width), mlp

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionEncoder(nn.Module):
    """Convolutional stem and a ViT over each view; one weight set for all views."""

    def __init__(self, c: VlaConfig) -> None:
        super().__init__()
        channels = (3, 64, 128, 192)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(channels))
        self.conv_norms = nn.ModuleList(nn.GroupNorm(16, b) for b in channels[1:])
        self.patch = nn.Conv2d(channels[-1], c.vision_width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, c.patches, c.vision_width) * 0.02)
        self.view = nn.Parameter(torch.randn(c.views, 1, c.vision_width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(
                c.vision_width,
                Attention(c.vision_width, c.vision_width // HEAD_WIDTH),
                VisionMLP(c.vision_width, c.vision_mlp),
            )
            for _ in range(c.vision_layers)
        )
        self.norm = RMSNorm(c.vision_width)
        self.project = nn.Linear(c.vision_width, c.width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, V, 3, image, image) in [-1, 1] -> (B, V * patches, width)."""
        batch, views = images.shape[:2]
        x = images.flatten(0, 1)
        for conv, norm in zip(self.convs, self.conv_norms, strict=True):
            x = F.silu(norm(conv(x)))
        # contiguous: a transposed x would send every linear below through batched products
        x = self.patch(x).flatten(2).transpose(1, 2).contiguous()  # (B * V, patches, width)
        x = x + (self.position + self.view).repeat(batch, 1, 1)
        for block in self.blocks:
            x = block(x)
        return self.project(self.norm(x)).view(batch, views * x.shape[1], -1)


class Backbone(nn.Module):
    """Decoder-style transformer over image, word and state tokens; every token sees all."""

    def __init__(self, c: VlaConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(c.vocabulary, c.width)
        self.state = nn.Linear(c.state, c.width)
        self.blocks = nn.ModuleList(
            Block(
                c.width,
                Attention(c.width, c.kv_heads, rotary=c.tokens),
                GatedMLP(c.width, c.mlp),
            )
            for _ in range(c.layers)
        )
        self.norm = RMSNorm(c.width)

    def forward(self, patches: Tensor, words: Tensor, state: Tensor) -> Tensor:
        """Patches (B, P, width), words (B, W) int64, state (B, state) -> (B, tokens, width)."""
        x = torch.cat([patches, self.word(words), self.state(state)[:, None]], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ActionBlock(nn.Module):
    """Self-attention, cross-attention and MLP; each normed, modulated and gated by the time."""

    def __init__(self, c: VlaConfig) -> None:
        super().__init__()
        self.attn = Attention(c.action_width, c.action_kv_heads, rotary=c.chunk)
        self.cross = Attention(c.action_width, c.action_kv_heads, context_width=c.width)
        self.mlp = GatedMLP(c.action_width, c.action_mlp)
        self.modulation = nn.Parameter(torch.randn(PARTS, c.action_width) * 0.02)

    def forward(self, x: Tensor, modulation: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, A, width); modulation (B or 1, PARTS, 1, width) with the 1 of 1 + scale inside."""
        m = modulation.unbind(1)
        x = x + m[2] * self.attn(torch.addcmul(m[0], rms_normalize(x), m[1]))
        x = x + m[5] * self.cross(torch.addcmul(m[3], rms_normalize(x), m[4]), keys_values)
        return x + m[8] * self.mlp(torch.addcmul(m[6], rms_normalize(x), m[7]))


class ActionHead(nn.Module):
    """Velocity of the flow from noise to a chunk, given time and context."""

    def __init__(self, c: VlaConfig) -> None:
        super().__init__()
        self.enter = nn.Linear(c.action, c.action_width)
        self.state = nn.Linear(c.state, c.action_width)
        self.position = nn.Parameter(torch.randn(1, c.chunk, c.action_width) * 0.02)
        self.time_in = nn.Linear(TIME_FEATURES, c.action_width)
        self.time_out = nn.Linear(c.action_width, PARTS * c.action_width)
        self.blocks = nn.ModuleList(ActionBlock(c) for _ in range(c.action_layers))
        self.norm = RMSNorm(c.action_width)
        self.leave = nn.Linear(c.action_width, c.action)

    def modulation(self, time: Tensor) -> Tensor:
        """(B,) in [0, 1] -> (B, blocks, PARTS, 1, width). Depends on nothing but the time."""
        half = TIME_FEATURES // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=time.device) / half)
        angle = 1000.0 * time[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], -1).to(self.time_in.weight.dtype)
        shared = self.time_out(F.silu(self.time_in(features))).view(len(time), 1, PARTS, 1, -1)
        own = torch.stack([cast(ActionBlock, block).modulation for block in self.blocks])
        one = torch.zeros(PARTS, 1, 1, device=own.device, dtype=own.dtype)
        one[1::3] = 1.0
        return shared + own[None, :, :, None] + one

    def context(self, tokens: Tensor, state: Tensor) -> Context:
        """Keys and values of the backbone's tokens for every block, and where a chunk starts."""
        pairs = [cast(ActionBlock, block).cross.keys_values(tokens) for block in self.blocks]
        return Context(pairs, self.state(state)[:, None] + self.position)

    def forward(self, context: Context, x: Tensor, modulation: Tensor) -> Tensor:
        """Noisy chunk (B, A, action), modulation of its time -> velocity (B, A, action)."""
        h = self.enter(x) + context.start
        for i, block in enumerate(self.blocks):
            h = block(h, modulation[:, i], context.keys_values[i])
        return self.leave(self.norm(h))


class LiberoVlaNet(nn.Module):
    """The whole network on normalised tensors; the policy around it owns units and words."""

    def __init__(self, config: VlaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config)
        self.backbone = Backbone(config)
        self.action = ActionHead(config)
        initialize(self)

    def prefix(self, images: Tensor, words: Tensor, state: Tensor) -> Context:
        """Encode once per chunk.

        images (B, V, 3, image, image) in [-1, 1]; words (B, W) int64; state (B, state) normalised.
        """
        tokens = self.backbone(self.vision(images), words, state)
        return self.action.context(tokens, state)

    def modulation(self, time: Tensor) -> Tensor:
        """Modulation of the action head for flow times (B,); fixed times need it only once."""
        return self.action.modulation(time)

    def velocity(self, context: Context, x: Tensor, modulation: Tensor) -> Tensor:
        """Velocity (B, A, action) of a noisy normalised chunk x at the modulation's time."""
        return self.action(context, x, modulation)

    @property
    def parameter_count(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.no_grad()
def initialize(net: LiberoVlaNet) -> None:
    """Start values for training: unit-variance layers, small residual ends, zero velocity."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(net.backbone.word.weight, std=0.5)
    nn.init.normal_(net.action.time_out.weight, std=0.002)
    nn.init.zeros_(net.action.leave.weight)
    for blocks in (net.vision.blocks, net.backbone.blocks, net.action.blocks):
        ends = ('o_proj.weight', 'down_proj.weight', 'fc2.weight')
        for name, weight in blocks.named_parameters():
            if name.endswith(ends):
                weight.mul_((2 * len(blocks)) ** -0.5)
    for block in net.action.blocks:
        cast(ActionBlock, block).modulation[2::3] += 1.0  # gates start open
