# SPDX-License-Identifier: Apache-2.0
"""OpenVLA and OpenVLA-OFT: two vision transformers side by side, and Llama 2.

    images -> DINOv2 and SigLIP patches, joined by channel -> projector --+
    words ----------------------------------------------------------------+-> Llama -> actions

OpenVLA writes one action as words, one number after the other. OpenVLA-OFT lets every token see
all, reads a whole chunk off empty places at the end, and maps it by a small network. Both vision
transformers stop one block early, as published, so their last block and head are never built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.policies.blocks import AttentionCore, KeysValues, Mlp
from quantvla_ros.policies.decoder import Decoder, DecoderConfig

STOP = 2  # Llama's word for the end
EPS = 1e-6
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class VitConfig:
    """Sizes of one vision transformer; depth counts the blocks that are used."""

    width: int
    depth: int
    hidden: int
    heads: int = 16
    patch: int = 14
    image: int = 224
    registers: int = 0
    scaled: bool = False


DINO = VitConfig(1024, 23, 4096, registers=5, scaled=True)
SIGLIP = VitConfig(1152, 26, 4304)
LLAMA_7B = DecoderConfig(4096, 32, 11008, 32, 32, 128, 10000.0, 1e-6, False)


@dataclass(frozen=True)
class OpenVlaConfig:
    """Sizes of the network. proprio and chunk are 0 for OpenVLA, positive for OFT."""

    first: VitConfig = DINO
    second: VitConfig = SIGLIP
    language: DecoderConfig = LLAMA_7B
    vocabulary: int = 32064
    words: int = 32000  # words before padding: action bins are counted back from here
    action: int = 7
    chunk: int = 0
    proprio: int = 0


class VitBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled by channel in DINOv2."""

    def __init__(self, c: VitConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.attn_norm = nn.LayerNorm(c.width, eps=EPS)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.core = AttentionCore()
        self.out = nn.Linear(c.width, c.width)
        self.mlp_norm = nn.LayerNorm(c.width, eps=EPS)
        self.mlp = Mlp(c.width, c.hidden, F.gelu)
        self.scaled = c.scaled
        if c.scaled:
            self.attn_scale = nn.Parameter(torch.ones(c.width))
            self.mlp_scale = nn.Parameter(torch.ones(c.width))

    def forward(self, x: Tensor) -> Tensor:
        """(V, T, width) -> (V, T, width)."""
        views, tokens, width = x.shape
        qkv = self.qkv(self.attn_norm(x)).view(views, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = self.out(self.core(q, k, v).transpose(1, 2).reshape(views, tokens, width))
        x = x + (seen * self.attn_scale if self.scaled else seen)
        thought = self.mlp(self.mlp_norm(x))
        return x + (thought * self.mlp_scale if self.scaled else thought)


class Vit(nn.Module):
    """Patches of images, behind a few learned tokens that are dropped again at the end."""

    def __init__(self, c: VitConfig) -> None:
        super().__init__()
        self.config = c
        self.patch = nn.Conv2d(3, c.width, c.patch, c.patch)
        self.position = nn.Parameter(torch.zeros((c.image // c.patch) ** 2, c.width))
        if c.registers:
            self.class_token = nn.Parameter(torch.zeros(1, c.width))
            self.registers = nn.Parameter(torch.zeros(c.registers - 1, c.width))
        self.layers = nn.ModuleList(VitBlock(c) for _ in range(c.depth))

    def forward(self, images: Tensor) -> Tensor:
        """(V, 3, S, S) normalised as this transformer wants it -> (V, patches, width)."""
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        if self.config.registers:
            front = torch.cat([self.class_token, self.registers]).expand(len(x), -1, -1)
            x = torch.cat([front, x], 1)
        for layer in self.layers:
            x = layer(x)
        return x[:, self.config.registers :]


class Projector(nn.Module):
    """Three linears with GELU between them."""

    def __init__(self, seen: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(seen, 4 * seen)
        self.fc2 = nn.Linear(4 * seen, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(V, patches, seen) -> (V, patches, width)."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class ResidualBlock(nn.Module):
    """x + relu(linear(norm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        return x + F.relu(self.linear(self.norm(x)))


class RegressionHead(nn.Module):
    """Hidden states of one step's numbers, side by side -> the step's action."""

    def __init__(self, width: int, action: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width * action)
        self.fc1 = nn.Linear(width * action, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(2))
        self.norm_out = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, action)

    def forward(self, x: Tensor) -> Tensor:
        """(steps, width * action) -> (steps, action) normalised."""
        x = F.relu(self.fc1(self.norm_in(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc2(self.norm_out(x))


class OpenVlaContext(NamedTuple):
    """What one observation leaves: keys and values, and the last hidden state (1, width)."""

    keys_values: list[KeysValues]
    last: Tensor


class OpenVla(nn.Module):
    """The whole network on normalised tensors."""

    def __init__(self, config: OpenVlaConfig) -> None:
        super().__init__()
        c = self.config = config
        width = c.language.width
        self.vision_first = Vit(c.first)
        self.vision_second = Vit(c.second)
        self.projector = Projector(c.first.width + c.second.width, width)
        self.embedding = nn.Embedding(c.vocabulary, width)
        self.backbone = Decoder(c.language)
        if c.chunk:
            self.head = RegressionHead(width, c.action)
        else:
            self.lm_head = nn.Linear(width, c.vocabulary, bias=False)
        if c.proprio:
            self.proprio = Mlp(c.proprio, width, F.gelu, width)

    def see(self, images: Tensor) -> Tensor:
        """Images (V, 3, S, S) in [-1, 1] -> (V * patches, width)."""
        mean, spread = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in IMAGENET)
        usual = ((images.float() * 0.5 + 0.5 - mean) / spread).to(images.dtype)
        patches = torch.cat([self.vision_first(usual), self.vision_second(images)], -1)
        return self.projector(patches).flatten(0, 1)

    def prefix(self, images: Tensor, words: Tensor) -> OpenVlaContext:
        """Read images and words (T,), of which the first is the begin mark: OpenVLA."""
        read = self.embedding(words)
        x = torch.cat([read[:1], self.see(images).to(read.dtype), read[1:]])[None]
        hidden, kept = self.backbone(x)
        return OpenVlaContext(kept, hidden[0, -1:])

    def tokens(self, context: OpenVlaContext) -> list[int]:
        """Write the action's words one after the other, the likeliest each time."""
        kept, hidden, written = context.keys_values, context.last, []
        for i in range(self.config.action):
            written.append(int(self.lm_head(hidden).argmax()))
            if i + 1 < self.config.action:
                word = torch.tensor([written[-1]], device=hidden.device)
                out, kept = self.backbone(self.embedding(word)[None], kept)
                hidden = out[0]
        return written

    def regress(self, images: Tensor, words: Tensor, state: Tensor | None) -> Tensor:
        """Read a whole chunk (chunk, action) off empty places, every token seeing all: OFT."""
        c = self.config
        read = self.embedding(words)
        seen = [self.see(images).to(read.dtype)]
        if state is not None:
            seen.append(self.proprio(state[None]))
        places = c.chunk * c.action
        stop = self.embedding(torch.tensor([STOP], device=words.device))
        x = torch.cat([read[:1], *seen, read[1:], read.new_zeros(places, read.shape[1]), stop])
        everything = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device)
        hidden = self.backbone(x[None], mask=everything)[0][0]
        first = len(x) - places - 2  # a place's hidden state is read one token before it
        return self.head(hidden[first : first + places].reshape(c.chunk, -1))
