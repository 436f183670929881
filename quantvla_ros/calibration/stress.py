# SPDX-License-Identifier: Apache-2.0
"""`quantvla stress`: write a twin of a checkpoint with the same function and large outliers.

Measures the channel peaks of the given frames before and after, and how far the actions moved
(float16 storage aside, by nothing). The mathematics is in stress_twin.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quantvla_ros.calibration.frames_file import read_frames
from quantvla_ros.calibration.policy_runs import action_error, chunks
from quantvla_ros.calibration.stress_twin import Peaks, outlier_ratio, stress
from quantvla_ros.contract import load_contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_checkpoint import (
    read_checkpoint,
    read_settings,
    write_checkpoint,
)
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.resources import share_path

FRAMES = 16  # enough to know the size of a channel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla stress`."""
    add = parser.add_argument
    add('model', nargs='?', default='', help='checkpoint folder; default: the shipped one')
    add('--out', type=Path, required=True, help='folder of the twin')
    add('--frames', type=Path, required=True, help='frames file made by `quantvla frames`')
    add('--limit', type=int, default=128, help='read at most so many frames, as the other '
        f'commands do; {FRAMES} of those that calibrate are used')
    add('--seed', type=int, default=0, help='of channels and rotations')


def telling(observations: Sequence[Observation], limit: int = FRAMES) -> Sequence[Observation]:
    """Choose, evenly spread, the frames that tell which channels shall stand out."""
    return observations[:: max(1, len(observations) // limit)][:limit]


def channel_peaks(policy: LiberoVla, observations: Sequence[Observation]) -> dict[str, Tensor]:
    """Largest magnitude of each input channel of every linear, on some frames."""
    peaks: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().float().flatten(0, -2).abs().amax(0).cpu()
            peaks[name] = torch.maximum(peaks[name], seen) if name in peaks else seen

        handles.append(module.register_forward_pre_hook(hook))

    try:
        for name, module in policy.net.named_modules():
            if isinstance(module, nn.Linear):
                watch(name, module)
        chunks(policy, observations)
    finally:
        for handle in handles:
            handle.remove()
    return peaks


def summary(peaks: Peaks) -> str:
    """Range of max / median at closing inputs and elsewhere, one line."""
    closing = [outlier_ratio(p) for n, p in peaks.items() if n.endswith(('o_proj', 'down_proj'))]
    others = [
        outlier_ratio(p) for n, p in peaks.items()
        if n.endswith(('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj', 'fc1'))
    ]
    return (
        f'o and down inputs {min(closing):.1f} to {max(closing):.1f}, '
        f'elsewhere {min(others):.1f} to {max(others):.1f}'
    )


def run(args: argparse.Namespace) -> int:
    """Write the twin and tell what changed."""
    model = Path(args.model) if args.model else share_path('models/libero_panda')
    if args.out.resolve() == model.resolve():
        raise ValueError('--out is the model itself; give another folder')
    contract = load_contract(read_settings(model).contract)
    observations = telling(read_frames(args.frames, args.limit).halves()[0])
    checkpoint, net = read_checkpoint(model)
    policy = LiberoVla.around(contract, PolicySettings(), checkpoint, net)
    reference, before = chunks(policy, observations), channel_peaks(policy, observations)
    stress(net, before, args.seed)
    digest = write_checkpoint(args.out, net, checkpoint)
    twin = LiberoVla(contract, PolicySettings(model=str(args.out)))
    error = action_error(chunks(twin, observations), reference, contract.action.execute)
    print(f'channel peaks, max / median: {summary(before)}')
    print(f'in the twin:                 {summary(channel_peaks(twin, observations))}')
    print(f'actions differ by {error.mean_mrad:.4f} mrad on average on {len(observations)} frames')
    print(f'{args.out} written, sha256 {digest[:16]}')
    return 0
