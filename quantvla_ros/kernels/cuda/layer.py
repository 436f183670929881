# SPDX-License-Identifier: Apache-2.0
"""A linear layer on the GPU behind the face that every kernel path has; see kernels/layer.py.

4-bit tokens run as 8-bit ones with a smaller range: Triton has no product of 4-bit integers, and
Hopper's matrix units have none either. A plan (policies/cuda_*.py) fuses more than this can.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantvla_ros.kernels.cuda.launch import (
    Epilogue,
    Take,
    Tokens,
    Workspace,
    language,
    make_tokens,
    run_product,
)
from quantvla_ros.kernels.cuda.pack import DeviceWeight, to_device
from quantvla_ros.kernels.layer import DTYPES, Layer, Options
from quantvla_ros.kernels.weights import Weight


class CudaLayer(Layer):
    """The layer as two launches: tokens, then the product with its epilogue."""

    def __init__(
        self, weight: Weight, bias: Tensor | None, options: Options,
        up: Weight | None, up_bias: Tensor | None, device: torch.device,
    ) -> None:
        language()
        self.n, self.k = weight.shape
        self.device = device
        self.weight = to_device(weight, device)
        self.up = None if up is None else to_device(up, device)
        self.options = options
        diagonal = None if options.diagonal is None else options.diagonal.float().to(device)
        self.take = Take(options.act_bits, self.weight.padded[1], options.hadamard == 64,
                         diagonal=diagonal)
        self._bias = None if bias is None else bias.float().to(device)
        self._up_bias = None if up_bias is None else up_bias.float().to(device)
        self.nbytes = self.weight.nbytes + (self.up.nbytes if self.up else 0)
        self._workspace = Workspace(device)
        self._check_pair(self.weight, self.up)

    @staticmethod
    def _check_pair(weight: DeviceWeight, up: DeviceWeight | None) -> None:
        if up is not None and (weight.bits, weight.group) != (up.bits, up.group):
            raise ValueError('on a GPU both halves of a gated pair need the same bits and group')

    def __call__(
        self,
        x: Tensor,
        *,
        act_scale: float | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See Layer."""
        self._refuse(x, residual, gate)
        if act_scale is not None and not 1e-30 < act_scale < 1e30:
            raise ValueError(f'act_scale is {act_scale}; expected a finite number above zero')
        rows = x.reshape(-1, self.k)
        y = torch.empty(len(rows), self.n, dtype=x.dtype, device=x.device)
        if len(rows):
            static = None if act_scale is None else torch.tensor([act_scale], device=x.device)
            take = replace(self.take, static=static)
            tokens = Tokens(
                torch.empty(len(rows), take.kp, dtype=torch.int8, device=x.device),
                torch.empty(len(rows), device=x.device))
            make_tokens(rows.contiguous(), self.k, take, tokens)
            around = None if residual is None else residual.reshape(len(rows), -1).contiguous()
            run_product(tokens, self.weight, y, self._workspace, Epilogue(
                self._bias, self.options.activation, self.up, self._up_bias, gate, around))
        return y.reshape(*x.shape[:-1], self.n)

    def _refuse(self, x: Tensor, residual: Tensor | None, gate: Tensor | None) -> None:
        if x.dtype not in DTYPES or x.device.type != self.device.type:
            raise ValueError(f'x is {x.dtype} on {x.device}; expected float32, bfloat16 or '
                             f'float16 on {self.device}')
        self._refuse_shapes(x, residual, gate)
