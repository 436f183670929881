# SPDX-License-Identifier: Apache-2.0
"""The network once more in its plainest form: nothing cached or fused, one loop per head."""

import math

import torch

from quantvla_ros.policies.libero_vla import HEAD_WIDTH


def rms(x, weight=None):
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    return y if weight is None else y * weight


def turn(x):
    """Rotary positions as complex numbers: pair (x_i, x_{i + D/2}) times exp(i angle)."""
    half = HEAD_WIDTH // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / HEAD_WIDTH)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def attend(a, x, context, positions):
    group, out = a.heads // a.kv_heads, []
    q, k, v = a.q_proj(x), a.k_proj(context), a.v_proj(context)
    for head in range(a.heads):
        one = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        shared = slice(head // group * HEAD_WIDTH, (head // group + 1) * HEAD_WIDTH)
        qh, kh = q[..., one], k[..., shared]
        if positions:
            qh, kh = turn(qh), turn(kh)
        scores = torch.softmax(qh @ kh.transpose(1, 2) / math.sqrt(HEAD_WIDTH), -1)
        out.append(scores @ v[..., shared])
    return a.o_proj(torch.cat(out, -1))


def gated(mlp, x):
    gate = mlp.gate_proj(x)
    return mlp.down_proj(gate * torch.sigmoid(gate) * mlp.up_proj(x))


def encode(net, images, words, state):
    views = []
    for view in range(net.config.views):
        x = images[:, view]
        for conv, norm in zip(net.vision.convs, net.vision.conv_norms, strict=True):
            x = norm(conv(x))
            x = x * torch.sigmoid(x)
        x = net.vision.patch(x).flatten(2).transpose(1, 2)
        x = x + net.vision.position + net.vision.view[view]
        for block in net.vision.blocks:
            y = rms(x, block.attn_norm.weight)
            x = x + attend(block.attn, y, y, positions=False)
            y = block.mlp.fc1(rms(x, block.mlp_norm.weight))
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + block.mlp.fc2(y)
        views.append(net.vision.project(rms(x, net.vision.norm.weight)))
    x = torch.cat([*views, net.backbone.word(words), net.backbone.state(state)[:, None]], 1)
    for block in net.backbone.blocks:
        y = rms(x, block.attn_norm.weight)
        x = x + attend(block.attn, y, y, positions=True)
        x = x + gated(block.mlp, rms(x, block.mlp_norm.weight))
    return rms(x, net.backbone.norm.weight)


def velocity(net, tokens, state, x, time):
    head = net.action
    frequency = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128)
    angle = (1000.0 * torch.tensor(time, dtype=torch.float32) * frequency).double()
    features = head.time_in(torch.cat([torch.cos(angle), torch.sin(angle)]))
    shared = head.time_out(features * torch.sigmoid(features)).view(9, -1)
    h = head.enter(x) + head.state(state)[:, None] + head.position
    for block in head.blocks:
        m = shared + block.modulation
        y = rms(h) * (1 + m[1]) + m[0]
        h = h + m[2] * attend(block.attn, y, y, positions=True)
        h = h + m[5] * attend(block.cross, rms(h) * (1 + m[4]) + m[3], tokens, positions=False)
        h = h + m[8] * gated(block.mlp, rms(h) * (1 + m[7]) + m[6])
    return head.leave(rms(h, head.norm.weight))


def chunk(net, images, words, state, noise, steps):
    """Denoise, encoding everything anew at every step."""
    x = noise
    for step in range(steps):
        tokens = encode(net, images, words, state)
        x = x + velocity(net, tokens, state, x, step / steps) / steps
    return x
