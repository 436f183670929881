# SPDX-License-Identifier: Apache-2.0
"""A whole chunk of the shipped policy's shape: prefix and ten denoising steps, float and integer.

Random weights (speed does not depend on them). Float forms are eager and compiled torch in float32
and bfloat16, with the modulation computed beforehand for all of them, as in the integer form.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantvla_ros.kernels import dispatch, weights
from quantvla_ros.policies import flow
from quantvla_ros.policies.libero_parts import Part, PartOf, Stored, stored_part
from quantvla_ros.policies.libero_program import ChunkProgram
from quantvla_ros.policies.libero_vla import LiberoVlaNet, VlaConfig
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.convolutions import round_convolutions

STEPS = 10
SMALL = 16  # linears with fewer rows or columns stay at 16 bits: action in and out


def rounded(bits: int, act_bits: int, group: int = 0) -> PartOf:
    """Round to nearest: enough for a measurement of time."""
    def part_of(module: nn.Module) -> Part:
        if isinstance(module, Stored):
            return stored_part(module)
        linear = cast(nn.Linear, module)
        w = linear.weight.detach().float()
        if min(w.shape) < SMALL:
            return Part(weights.keep(w), linear.bias)
        grouped = w.unflatten(1, (-1, group or w.shape[1]))
        scales = grouped.abs().amax(-1).clamp_min(1e-9) / weights.RANGES[bits][1]
        q = torch.round(grouped / scales[..., None]).flatten(1).to(torch.int8)
        return Part(weights.pack(q, scales, bits, group), linear.bias, act_bits)
    return part_of


def float_form(net: LiberoVlaNet, inputs: tuple[Tensor, ...], compiled: bool) -> Callable[[], Any]:
    """Prefix and denoising loop in torch, eager or compiled."""
    images, words, state, noise = inputs
    times = torch.arange(STEPS, dtype=noise.dtype) / STEPS
    with torch.inference_mode():
        modulation = net.modulation(times)
    prefix, velocity = net.prefix, net.velocity
    if compiled:
        prefix, velocity = torch.compile(prefix), torch.compile(velocity)

    def run() -> Tensor:
        with torch.inference_mode():
            context, x = prefix(images, words, state), noise
            for i in range(STEPS):
                x = x + velocity(context, x, modulation[i : i + 1]) / STEPS
            return x

    return run


def integer_form(net: LiberoVlaNet, inputs: tuple[Tensor, ...], bits: int, act_bits: int
                 ) -> tuple[Callable[[], Any], int]:
    """Return the same as recorded programs, the stem at 8 bits, and the bytes of its weights."""
    net = copy.deepcopy(net)
    round_convolutions(net, libero_vla_sites(net), Stored)
    program = ChunkProgram(net, rounded(bits, act_bits), STEPS)

    def run() -> Tensor:
        context = program.prefix(*inputs[:3])
        return flow.denoise(
            lambda x, step: program.velocity(context, x, step), inputs[3], STEPS
        )

    return run, program.nbytes


def measure(seconds: float) -> dict[str, Any]:
    """Time every form in turns, on the threads that the kernels use; print and return."""
    threads = dispatch.threads() if dispatch.library() is None else _use_all_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = LiberoVlaNet(VlaConfig()).eval()
    nn.init.normal_(net.action.leave.weight, std=0.05)  # a velocity of zero would hide an error
    c = net.config
    inputs = (torch.rand(1, c.views, 3, c.image, c.image) * 2 - 1,
              torch.randint(0, c.vocabulary, (1, c.words)), torch.randn(1, c.state),
              torch.randn(1, c.chunk, c.action))
    half = LiberoVlaNet(c).eval().bfloat16()
    halves = tuple(t.bfloat16() if t.is_floating_point() else t for t in inputs)
    runs: dict[str, Callable[[], Any]] = {}
    failed = {}
    for name, model, given, compiled in (
        ('torch float32', net, inputs, False), ('torch bfloat16', half, halves, False),
        ('torch float32 compiled', net, inputs, True),
        ('torch bfloat16 compiled', half, halves, True),
    ):
        made = float_form(model, given, compiled)
        try:
            made()
            runs[name] = made
        except RuntimeError as error:  # torch.compile without a working compiler
            failed[name] = str(error).splitlines()[0]
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    skipped = {net.action.time_in, net.action.time_out}  # folded into the modulation
    float_bytes = 4 * sum(m.weight.numel() for m in linears if m not in skipped)
    shares, errors = {}, {}
    truth = runs['torch float32']()
    for scheme, bits, act_bits in (('w8a8', 8, 8), ('w4a8', 4, 8), ('w4a4', 4, 4)):
        runs[scheme], nbytes = integer_form(net, inputs, bits, act_bits)
        shares[scheme] = nbytes / float_bytes
        errors[scheme] = float((runs[scheme]() - truth).norm() / truth.norm())
    best = shortest(runs, seconds)
    alone = {}
    if threads > 1:
        torch.set_num_threads(1)
        dispatch.set_threads(1)
        alone = shortest({name: run for name, run in runs.items() if name in shares}, seconds)
        torch.set_num_threads(threads)
        dispatch.set_threads(threads)
    print(f'\nwhole chunk, {net.parameter_count / 1e6:.1f} million parameters, prefix and {STEPS} '
          f'steps, {threads} threads, kernels {dispatch.path_name()}, minimum')
    for name, took in best.items():
        extra = (f'   weights {shares[name]:.3f}x of float32, chunk differs by '
                 f'{100 * errors[name]:.1f} %' if name in shares else '')
        if name in alone:
            extra += f'; one thread {1e3 * alone[name]:.2f} ms, {alone[name] / took:.2f}x'
        print(f'  {name:<26}{1e3 * took:9.2f} ms{extra}')
    for name, reason in failed.items():
        print(f'  {name:<26}not measured: {reason}')
    return {'ms': {name: 1e3 * t for name, t in best.items()}, 'weight_share': shares,
            'one_thread_ms': {name: 1e3 * t for name, t in alone.items()},
            'relative_error': errors, 'threads': threads, 'failed': failed}


def shortest(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Run all in turns for `seconds` each; the shortest time of each.

    Each runs once before it is timed: threads of torch that the form before it woke spin for some
    milliseconds more.
    """
    best = dict.fromkeys(runs, float('inf'))
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end:
        for name, run in runs.items():
            run()
            for _ in range(3):
                begin = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def _use_all_cores() -> int:
    import os

    count = min(len(os.sched_getaffinity(0)), 16)
    dispatch.set_threads(count)
    return count
