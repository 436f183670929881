# SPDX-License-Identifier: Apache-2.0
"""What training minimises, and how frames are disturbed on the device before they are seen.

Flow matching: x_t = (1 - t) noise + t chunk, and the network's velocity shall be chunk - noise.
Several (noise, t) draws share one prefix, which costs most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantvla_ros.policies.libero_vla import LiberoVlaNet

LATEST = 0.999  # t never reaches 1
TIME_SKEW = 1.5  # more weight on the noisy end
SHIFT_PIXELS = (3, 5)  # agentview, wrist
CONTRAST, BRIGHTNESS, TINT = 0.25, 0.2, 0.06


def flow_loss(
    net: LiberoVlaNet, images: Tensor, words: Tensor, state: Tensor, action: Tensor, draws: int
) -> Tensor:
    """Mean squared error of the velocity; images (B, V, 3, H, W), state and action normalised."""
    context = net.prefix(images, words, state).repeat(draws)
    chunk = action.repeat_interleave(draws, 0)
    noise = torch.randn_like(chunk)
    uniform = torch.rand(len(chunk), device=chunk.device)
    time = LATEST * (1 - uniform ** (1 / TIME_SKEW))
    x = (1 - time[:, None, None]) * noise + time[:, None, None] * chunk
    velocity = net.velocity(context, x, net.modulation(time))
    return (velocity.float() - (chunk - noise)).square().mean()


def to_network(images: Tensor) -> Tensor:
    """(B, V, H, W, 3) uint8 -> (B, V, 3, H, W) in [-1, 1]."""
    return images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0


def augment(images: Tensor) -> Tensor:
    """Shift each frame by whole pixels and change contrast, brightness and tint; as to_network."""
    batch, views, height, width = images.shape[:4]
    device = images.device
    most = torch.tensor(SHIFT_PIXELS, device=device)[:views]
    spread = 2 * torch.rand(batch, views, 2, device=device) - 1
    shift = (spread * (most[None, :, None] + 0.499)).round().long()
    rows = (torch.arange(height, device=device) + shift[..., :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + shift[..., 1:]).clamp(0, width - 1)
    b = torch.arange(batch, device=device)[:, None, None, None]
    v = torch.arange(views, device=device)[None, :, None, None]
    moved = images[b, v, rows[..., None], columns[:, :, None, :]]
    x = moved.permute(0, 1, 4, 2, 3).float() / 255

    def around_one(amount: float, *shape: int) -> Tensor:
        return 1 + (2 * torch.rand(batch, views, *shape, device=device) - 1) * amount

    mean = x.mean((2, 3, 4), keepdim=True)
    x = (x - mean) * around_one(CONTRAST, 1, 1, 1) + mean * around_one(BRIGHTNESS, 1, 1, 1)
    return (x * around_one(TINT, 3, 1, 1)).clamp(0, 1) * 2 - 1
