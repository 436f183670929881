# SPDX-License-Identifier: Apache-2.0
"""Inputs for the kernels, and outputs that show what was never written."""

import torch

from quantvla_ros.kernels import weights


def random_weight(bits, rows, columns, group=0):
    low, high = weights.RANGES[bits]
    q = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    scales = torch.rand(rows, columns // group if group else 1) + 0.5
    return weights.pack(q, scales / columns**0.5, bits, group)


def poisoned(*shape, dtype=torch.float32, device='cpu'):
    """Full of a value that no test computes: NaN, or -128."""
    value = float('nan') if dtype.is_floating_point else -128
    return torch.full(shape, value, dtype=dtype, device=device)


@torch.no_grad()
def error(seen, wanted):
    """Largest difference, as a share of the largest wanted value; infinite where unwritten."""
    difference = (seen.double().cpu() - wanted.double().cpu()).abs().max()
    return float(difference / wanted.double().abs().max()) if difference == difference else 1e30
