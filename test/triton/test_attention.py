# SPDX-License-Identifier: Apache-2.0
"""Attention of the GPU kernels, its splits, positions and cache, against plain torch."""

import pytest
import torch
from cases import error, poisoned

from quantvla_ros.kernels import reference
from quantvla_ros.kernels.cuda.launch import Take, Tokens
from quantvla_ros.kernels.cuda.launch_attention import (
    Keys,
    Parts,
    Split,
    Turn,
    run_attend,
    run_join,
    run_turn,
)
from quantvla_ros.policies.blocks import RmsNorm, rotary, rotate


def attended(q, k, v, heads, groups, width, causal=False):
    """Plain softmax in float64: q (T, heads * width), k and v (S, groups * width)."""
    q, k, v = (t.double().unflatten(1, (-1, width)).transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(heads // groups, 0) for t in (k, v))
    logits = q @ k.transpose(1, 2) / width**0.5
    if causal:
        keep = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        logits = logits.masked_fill(~keep, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)


def inputs(tokens, keys, heads, groups, width):
    return (torch.randn(tokens, heads * width), torch.randn(keys, groups * width),
            torch.randn(keys, groups * width))


@pytest.mark.parametrize(('heads', 'groups', 'width'), [(8, 1, 64), (4, 4, 48), (4, 2, 32)])
def test_attention_in_one_piece(heads, groups, width, device):
    q, k, v = inputs(5, 70, heads, groups, width)
    out = poisoned(5, heads * width, device=device)
    run_attend(q.to(device), Keys(k.to(device), v.to(device), groups, width, 70), heads, out,
               Split(16, 32, 1, 4, 2))
    assert error(out, attended(q, k, v, heads, groups, width)) < 1e-6


@pytest.mark.parametrize(('known', 'heads', 'width'), [(3, 8, 64), (40, 3, 48), (90, 3, 64)])
def test_split_attention_reads_only_the_keys_there_are(known, heads, width, device):
    groups = 1
    q, k, v = inputs(6, 100, heads, groups, width)
    k[known + 6:], v[known + 6:] = float('nan'), float('nan')  # never to be looked at
    length = torch.tensor([known], dtype=torch.int32, device=device)
    parts = Parts.make(4, 6, heads, width, device)
    for tensor in (parts.values, parts.sums, parts.largest):
        tensor.fill_(float('nan'))
    keys = Keys(k.to(device), v.to(device), groups, width, 6, length)
    run_attend(q.to(device), keys, heads, parts, Split(16, 16, 4, 4, 2))
    out = Tokens(poisoned(6, heads * width, device=device))
    run_join(parts, 4, width, Take(16, heads * width), out, torch.float32)
    n = known + 6
    assert error(out.data, attended(q, k[:n], v[:n], heads, groups, width)) < 1e-6


def test_parts_of_a_narrow_model_are_kept_in_its_type(half, device):
    q, k, v = (t.to(half) for t in inputs(3, 64, 4, 1, 32))
    parts = Parts.make(2, 3, 4, 32, device, half)
    run_attend(q.to(device), Keys(k.to(device), v.to(device), 1, 32, 64), 4, parts,
               Split(16, 32, 2, 4, 2))
    out = Tokens(poisoned(3, 128, device=device))
    run_join(parts, 2, 32, Take(16, 128), out, half)
    assert parts.values.dtype is half
    assert error(out.data, attended(q, k, v, 4, 1, 32)) < 8e-3


def test_joined_tokens_are_quantized_like_any_other(device):
    q, k, v = inputs(3, 64, 4, 2, 32)
    parts = Parts.make(2, 3, 4, 32, device)
    run_attend(q.to(device), Keys(k.to(device), v.to(device), 2, 32, 64), 4, parts,
               Split(16, 32, 2, 4, 2))
    out = Tokens(poisoned(3, 128, dtype=torch.int8, device=device), poisoned(3, device=device))
    run_join(parts, 2, 32, Take(8, 128, rotate=True), out, torch.float32)
    wanted = reference.block_hadamard(attended(q, k, v, 4, 2, 32).float(), 64)
    codes, scale = reference.quantize_activations(wanted)
    assert int((out.data.cpu().int() - codes.int()).abs().max()) <= 1
    assert torch.allclose(out.scale.cpu(), scale.flatten(), rtol=1e-5)


def test_causal_attention_of_a_batch(device):
    tokens, heads, groups, width = 20, 4, 2, 32
    cases = [inputs(tokens, tokens, heads, groups, width) for _ in range(2)]
    q = torch.cat([case[0] for case in cases]).to(device)
    k = torch.stack([case[1] for case in cases]).to(device)
    v = torch.stack([case[2] for case in cases]).to(device)
    out = poisoned(2 * tokens, heads * width, device=device)
    run_attend(q, Keys(k, v, groups, width, tokens), heads, out, Split(16, 16, 1, 4, 2), batch=2,
               causal=True)
    wanted = torch.cat([attended(*case, heads, groups, width, causal=True) for case in cases])
    assert error(out, wanted) < 1e-6


def test_narrow_attention_stays_within_its_rounding(half, device):
    q, k, v = (t.to(half) for t in inputs(4, 50, 8, 1, 64))
    out = poisoned(4, 512, dtype=half, device=device)
    run_attend(q.to(device), Keys(k.to(device), v.to(device), 1, 64, 50), 8, out,
               Split(32, 32, 1, 4, 2))
    assert error(out, attended(q, k, v, 8, 1, 64)) < 2 * torch.finfo(half).eps


@pytest.mark.parametrize('normed', [False, True])
@pytest.mark.parametrize('behind', [None, 9])
def test_turned_queries_and_keys_equal_the_modules(normed, behind, device):
    tokens, heads, groups, width = 5, 4, 2, 24
    qkv = torch.randn(tokens, (heads + 2 * groups) * width)
    norms = [RmsNorm(width, 1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_()
    first = behind or 0
    table = rotary(torch.arange(32), width)
    q, k, v = qkv.split([heads * width, groups * width, groups * width], 1)
    q, k = (t.unflatten(1, (-1, width)).transpose(0, 1)[None] for t in (q, k))
    if normed:
        q, k = norms[0](q), norms[1](k)
    q, k = (rotate(t, table[:, first:first + tokens])[0].transpose(0, 1).flatten(1)
            for t in (q, k))
    gains = [norm.weight.data.to(device) if normed else None for norm in norms]
    turn = Turn(heads, groups, width, table[0, :, :12].contiguous().to(device),
                table[1, :, 12:].contiguous().to(device), *gains, 1e-6)
    q_out = poisoned(tokens, heads * width, device=device)
    cache = poisoned(2, 32, groups * width, device=device)
    length = None if behind is None else torch.tensor([behind], dtype=torch.int32, device=device)
    run_turn(qkv.to(device), turn, q_out, cache[0], cache[1], length)
    assert error(q_out, q) < 1e-6
    assert error(cache[0, first:first + tokens], k) < 1e-6
    assert torch.equal(cache[1, first:first + tokens].cpu(), v)
    assert int(torch.isnan(cache).sum()) == 2 * (32 - tokens) * groups * width
