# SPDX-License-Identifier: Apache-2.0
"""`quantvla convert`: an openpi JAX checkpoint into the PyTorch folder that policies read."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from quantvla_ros.policies.folders import identify
from quantvla_ros.policies.networks import network
from quantvla_ros.policies.openpi_jax import convert
from quantvla_ros.resources import peak_bytes

DTYPES = {'stored': None, 'bfloat16': torch.bfloat16, 'float32': torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument('folder', type=Path, help='the checkpoint: the folder that holds params/')
    parser.add_argument('--out', type=Path, required=True, help='folder to be made')
    parser.add_argument('--dtype', choices=sorted(DTYPES), default='stored',
                        help='stored (default) keeps every bit')


def run(args: argparse.Namespace) -> int:
    """Convert, and check that the result is a whole checkpoint."""
    count = convert(args.folder.expanduser(), args.out.expanduser(), DTYPES[args.dtype])
    made = identify(args.out.expanduser())
    network(made)  # raises where a tensor is missing or misshapen
    print(f'{args.out}: {made.family}, {count} tensors, whole; peak memory '
          f'{peak_bytes() / 2**30:.2f} GiB')
    return 0
