# SPDX-License-Identifier: Apache-2.0
"""Norm, modulation, rotation and quantization of tokens against the reference, code by code."""

import pytest
import torch
import torch.nn.functional as F
from cases import error, poisoned

from quantvla_ros.kernels import reference
from quantvla_ros.kernels.cuda.launch import (
    Branch,
    Norm,
    Take,
    Tokens,
    make_tokens,
    run_euler,
)
from quantvla_ros.policies.flow import PrefixGuidance, denoise


def places(rows, take, device):
    if take.top == 0:
        return Tokens(poisoned(rows, take.kp, device=device))
    return Tokens(poisoned(rows, take.kp, dtype=torch.int8, device=device),
                  poisoned(rows, device=device))


def make(x, columns, take, device, **options):
    out = places(len(x), take, device)
    make_tokens(x, columns, take, out, **options)
    return out


@pytest.mark.parametrize('bits', [8, 4, 3])
@pytest.mark.parametrize('rotate', [False, True])
def test_codes_and_scales_equal_the_reference(bits, rotate, device):
    x = torch.randn(4, 192) * torch.tensor([1.0, 1e-3, 40.0, 7.0])[:, None]
    out = make(x.to(device), 192, Take(bits, 256, rotate), device)
    turned = reference.block_hadamard(x, 64) if rotate else x
    q, scale = reference.quantize_activations(turned, bits)
    different = (out.data[:, :192].cpu().int() - q.int()).abs()
    if rotate:  # sums of 64 numbers in another order: a code may fall on the other side
        assert int(different.max()) <= 1 and float(different.float().mean()) < 0.01
        assert torch.allclose(out.scale.cpu(), scale.flatten(), rtol=1e-5)
    else:
        assert int(different.max()) == 0
        assert torch.equal(out.scale.cpu(), scale.flatten())
    assert int(out.data[:, 192:].abs().max()) == 0  # padding adds nothing to a product


def test_halves_are_rounded_to_even(device):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -2.5]])
    out = make(x.to(device), 8, Take(8, 128), device)
    assert out.data[0, :8].tolist() == [127, 0, 2, 2, 0, -2, 126, -2]


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_wild_token_poisons_itself_alone(bad, device):
    x = torch.randn(3, 100)
    x[1, 17] = bad
    out = make(x.to(device), 100, Take(8, 128), device)
    q, scale = reference.quantize_activations(x)
    assert torch.isnan(out.scale[1]) and int(out.data[1].abs().max()) == 0
    assert torch.equal(out.data[[0, 2], :100].cpu(), q[[0, 2]])
    assert torch.equal(out.scale[[0, 2]].cpu(), scale.flatten()[[0, 2]])


def test_token_of_zeros_has_scale_one(device):
    x = torch.zeros(2, 64)
    x[1] = 1e-31
    out = make(x.to(device), 64, Take(8, 128), device)
    assert out.scale.tolist() == [1.0, 1.0] and int(out.data.abs().max()) == 0


def test_static_scale_clips(device):
    x = torch.randn(2, 64) * 5
    static = torch.tensor([0.02], device=device)
    out = make(x.to(device), 64, Take(8, 128, static=static), device)
    q, _ = reference.quantize_activations(x, 8, float(static))
    assert torch.equal(out.data[:, :64].cpu(), q) and int(q.abs().max()) == 127
    assert torch.allclose(out.scale.cpu(), torch.tensor(0.02))


def test_diagonal_multiplies_before_the_rotation(device):
    x, diagonal = torch.randn(2, 128), torch.rand(128) + 0.5
    out = make(x.to(device), 128, Take(8, 128, True, diagonal=diagonal.to(device)), device)
    q, scale = reference.quantize_activations(reference.block_hadamard(x * diagonal, 64))
    assert int((out.data.cpu().int() - q.int()).abs().max()) <= 1
    assert torch.allclose(out.scale.cpu(), scale.flatten(), rtol=1e-5)


@pytest.mark.parametrize('kind', ['rms', 'layer'])
def test_branch_joins_before_the_modulated_norm(kind, device):
    x, y = torch.randn(3, 200) + 0.5, torch.randn(3, 200)
    bias, gate, multiply, add = (torch.randn(200) for _ in range(4))
    stream = x.clone().to(device)
    out = make(stream, 200, Take(16, 200), device,
               norm=Norm(kind, 1e-6, multiply.to(device), add.to(device)),
               branch=Branch(y.to(device), bias.to(device), gate.to(device)))
    total = x.double() + gate.double() * (y.double() + bias.double())
    normed = (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6)
              if kind == 'rms' else F.layer_norm(total, (200,), eps=1e-6))
    assert error(stream, total) < 1e-6
    assert error(out.data, normed * multiply.double() + add.double()) < 1e-6


def test_narrow_stream_keeps_the_rounded_sum(half, device):
    x, y = torch.randn(2, 64).to(half), torch.randn(2, 64).to(half)
    stream = x.clone().to(device)
    out = Tokens(poisoned(2, 64, dtype=half, device=device))
    make_tokens(stream, 64, Take(16, 64), out, norm=Norm('rms', 1e-6),
                branch=Branch(y.to(device)))
    assert torch.equal(stream.cpu(), (x.float() + y.float()).to(half))
    rounded = stream.cpu().double()
    wanted = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + 1e-6)
    assert error(out.data, wanted) < 2 * torch.finfo(half).eps


def test_narrow_tokens_are_rotated_without_further_rounding(half, device):
    x = torch.randn(3, 128).to(half)
    out = make(x.to(device), 128, Take(8, 128, rotate=True), device)
    q, scale = reference.quantize_activations(reference.block_hadamard(x, 64))
    different = (out.data.cpu().int() - q.int()).abs()
    assert int(different.max()) <= 1 and float(different.float().mean()) < 0.01
    assert torch.allclose(out.scale.cpu(), scale.flatten(), rtol=1e-5)


@pytest.mark.parametrize('act', ['silu', 'gelu_tanh'])
def test_gated_pair_is_activated_and_multiplied(act, device):
    x = torch.randn(2, 256)
    out = make(x.to(device), 128, Take(16, 128), device, act=act, pair=True)
    gate, up = x.double().chunk(2, 1)
    assert error(out.data, reference.ACTIVATIONS[act](gate) * up) < 1e-6


@pytest.mark.parametrize('steps', [4])
def test_euler_steps_equal_the_flow_loop(steps, device):
    start, target = torch.randn(1, 6, 5), torch.randn(1, 6, 5)
    weights = torch.tensor([1.0, 1.0, 0.7, 0.3, 0.0, 0.0])
    guidance = PrefixGuidance(target, weights)
    from quantvla_ros.policies.flow import guidance_weight

    wanted = denoise(lambda x, step: torch.sin(x) * (step + 1), start, steps, guidance)
    x = start[0].to(device).clone()
    narrow = poisoned(6, 5, device=device)
    for step in range(steps):
        run_euler(x, torch.sin(x) * (step + 1), target[0].to(device), weights.to(device), narrow,
                  time_left=1.0 - step / steps, step=1.0 / steps,
                  pull=guidance_weight(step / steps, steps, guidance.strongest))
    assert error(x, wanted[0]) < 1e-6
    assert torch.equal(narrow, x)
