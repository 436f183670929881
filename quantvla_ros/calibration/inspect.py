# SPDX-License-Identifier: Apache-2.0
"""`quantvla inspect`: what an artifact costs, layer by layer, as text and one HTML page.

Runs the frames once in float for what enters every layer (inspect_reports.py), prints the
costliest groups and layers, and writes one HTML page that loads nothing (inspect_page.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from quantvla_ros.calibration.frames_file import read_frames
from quantvla_ros.calibration.inspect_page import as_html
from quantvla_ros.calibration.inspect_reports import (
    GroupReport,
    LayerReport,
    examine,
    factors_by_head,
    facts,
    group_reports,
)
from quantvla_ros.calibration.policy_runs import chunks
from quantvla_ros.contract import load_contract
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_checkpoint import read_checkpoint, read_settings
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.artifact import Artifact, read_artifact
from quantvla_ros.quant.observe import observe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla inspect`."""
    add = parser.add_argument
    add('artifact', type=Path, help='artifact folder, as MODEL/w4a8')
    add('--model', default='', help='its checkpoint; default: the folder above the artifact')
    add('--frames', type=Path, required=True, help='frames file made by `quantvla frames`')
    add('--limit', type=int, default=16, help='use at most so many frames')
    add('--html', type=Path, default=None, help='page to write; default: ARTIFACT/inspect.html')
    add('--top', type=int, default=15, help='layers to print, costliest first')


def as_text(
    reports: Sequence[LayerReport], artifact: Artifact,
    factors: Sequence[tuple[str, list[float], float]], top: int,
    groups: Sequence[GroupReport],
) -> str:
    """Groups of layers and single layers, the costliest first."""
    provenance = artifact.provenance
    lines = [
        f'{provenance.recipe} {provenance.precision}',
        *(f'  {name}: {text}' for name, text in facts(artifact)),
        '',
        f'{"rounded alone":44s} {"layers":>9s} {"kB":>7s} {"mrad":>8s}',
        *(f'{g.group:44s} {g.layers:9d} {g.nbytes / 1e3:7.0f} {g.alone_mrad:8.3f}'
          for g in groups),
        '',
        f'{"layer":44s} {"scheme":9s} {"kB":>7s} {"error":>8s} {"dB":>6s} '
        f'{"max/median":>11s} {"after":>7s}',
    ]
    for one in sorted(reports, key=lambda r: -r.error)[:top]:
        lines.append(
            f'{one.name:44s} {one.scheme:9s} {one.nbytes / 1e3:7.0f} {one.error:8.1e} '
            f'{one.decibel:6.1f} {one.peaks:11.1f} {one.peaks_after:7.1f}'
        )
    lines.append('')
    for name, alpha, beta in factors:
        shown = ' '.join(f'{a:.3f}' for a in alpha)
        lines.append(f'{name}: alpha {shown}  beta {beta:.3f}')
    if not factors:
        lines.append('no alpha or beta is folded')
    return '\n'.join(lines)


def run(args: argparse.Namespace) -> int:
    """Examine, print, write the page."""
    model = Path(args.model) if args.model else args.artifact.resolve().parent
    settings = read_settings(model)
    checkpoint, net = read_checkpoint(model)
    sites = libero_vla_sites(net)
    artifact = read_artifact(args.artifact, checkpoint.sha256, sites)
    policy = LiberoVla.around(
        load_contract(settings.contract), PolicySettings(), checkpoint, net
    )
    observations = read_frames(args.frames, args.limit).observations
    names = [site.name for site in sites.linears if site.name in artifact.layers]

    def run_frames() -> None:
        policy.tabulate(net)  # layers that run once at load are seen here
        chunks(policy, observations)

    seen = observe(net, names, run_frames)
    reports = []
    with torch.no_grad():
        for name in names:
            linear = net.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layer = artifact.layers[name]
            reports.append(examine(name, layer, linear.weight, linear.bias, seen.pop(name)))
        groups = group_reports(policy, observations, artifact, sites)
    factors = factors_by_head(reports, sites)
    print(as_text(reports, artifact, factors, args.top, groups))
    page = args.html or args.artifact / 'inspect.html'
    page.write_text(as_html(reports, artifact, factors, groups))
    print(f'{page} written')
    return 0

