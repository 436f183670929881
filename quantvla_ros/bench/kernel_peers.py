# SPDX-License-Identifier: Apache-2.0
"""What a user could install instead: the same product by torch, oneDNN, fbgemm, onnxruntime.

Each peer is a callable on one input, made ready beforehand as its library wants it. A peer that is
not installed is named with the reason and left out of the ratios. Measured by bench/kernels.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[], object]


def torch_peers(x: Tensor, w: Tensor) -> dict[str, Run]:
    """Float products, and torch's integer product without any quantization around it."""
    x16, w16 = x.bfloat16(), w.bfloat16()
    xq = torch.randint(-127, 128, x.shape, dtype=torch.int8)
    wq = torch.randint(-127, 128, w.shape, dtype=torch.int8).t()
    return {
        'torch float32': lambda: F.linear(x, w),
        'torch bfloat16': lambda: F.linear(x16, w16),
        'torch._int_mm': lambda: torch._int_mm(xq, wq),
    }


def onednn_product(w: Tensor) -> Callable[[Tensor, float], Tensor]:
    """oneDNN through torch: uint8 tokens and their zero point, weights per row, float out."""
    q = torch.randint(-127, 128, w.shape, dtype=torch.int8)
    scales, zeros = torch.rand(len(w)), torch.zeros(len(w), dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(q, None)
    return lambda xq, scale: torch.ops.onednn.qlinear_pointwise(
        xq, scale, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, 'none', [], '')


def onednn_bare(x: Tensor, w: Tensor) -> Run:
    """The product alone: the tokens are quantized already, with one scale for all."""
    product = onednn_product(w)
    xq = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    return lambda: product(xq, 0.1)


def onednn_per_token(x: Tensor, w: Tensor) -> Run:
    """What our W8A8 layer does, with oneDNN's product: a scale per token, floats to floats."""
    product = onednn_product(w)

    def run() -> Tensor:
        scales = x.abs().amax(1, keepdim=True) / 127
        xq = torch.round(x / scales).add_(128.0).to(torch.uint8)
        return product(xq, 1.0).mul_(scales)

    return run


def fbgemm_peer(x: Tensor, w: Tensor) -> Run:
    """fbgemm through torch: dynamic quantization per tensor included."""
    torch.backends.quantized.engine = 'fbgemm'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        zeros = torch.zeros(len(w), dtype=torch.int64)
        scales = w.abs().amax(1).double() / 127
        q = torch.quantize_per_channel(w, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(q, None)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed)


def _session(nodes: list, initializers: list, rows: int, columns: int, threads: int) -> Any:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes, 'layer',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, [None, rows])], initializers)
    model = helper.make_model(graph, opset_imports=[
        helper.make_opsetid('', 17), helper.make_opsetid('com.microsoft', 1)], ir_version=8)
    onnx.checker.check_model(model, skip_opset_compatibility_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def onnxruntime_four_bits(x: Tensor, w: Tensor, threads: int) -> Run:
    """MatMulNBits: 4 bits, blocks of 128, accuracy level 4 (int8 tokens, quantized inside)."""
    import numpy as np
    from onnx import helper, numpy_helper

    rows, columns = w.shape
    blocks = columns // 128
    data = np.random.randint(0, 256, (rows, blocks, 64), dtype=np.uint8)
    scales = np.random.rand(rows * blocks).astype(np.float32)
    node = helper.make_node('MatMulNBits', ['x', 'w', 's'], ['y'], domain='com.microsoft',
                            K=columns, N=rows, bits=4, block_size=128, accuracy_level=4)
    session = _session([node], [numpy_helper.from_array(data, 'w'),
                                numpy_helper.from_array(scales, 's')], rows, columns, threads)
    feed = {'x': x.numpy()}
    return lambda: session.run(None, feed)


def onnxruntime_eight_bits(x: Tensor, w: Tensor, threads: int) -> Run:
    """DynamicQuantizeLinear, MatMulInteger, scales: quantization per tensor included."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = w.shape
    data = np.random.randint(-127, 128, (columns, rows)).astype(np.int8)
    nodes = [
        helper.make_node('DynamicQuantizeLinear', ['x'], ['q', 'xs', 'xz']),
        helper.make_node('MatMulInteger', ['q', 'w', 'xz'], ['i']),
        helper.make_node('Cast', ['i'], ['f'], to=TensorProto.FLOAT),
        helper.make_node('Mul', ['xs', 'ws'], ['s']),
        helper.make_node('Mul', ['f', 's'], ['y']),
    ]
    session = _session(nodes, [numpy_helper.from_array(data, 'w'), numpy_helper.from_array(
        np.random.rand(rows).astype(np.float32), 'ws')], rows, columns, threads)
    feed = {'x': x.numpy()}
    return lambda: session.run(None, feed)


def peers(x: Tensor, w: Tensor, threads: int) -> tuple[dict[str, Run], dict[str, str]]:
    """(name -> callable, name -> why it is missing) for x (M, K) and w (N, K)."""
    found = torch_peers(x, w)
    missing = {}
    makers: dict[str, Callable[[], Run]] = {
        'onednn bare': lambda: onednn_bare(x, w),
        'onednn per token': lambda: onednn_per_token(x, w),
        'fbgemm dynamic': lambda: fbgemm_peer(x, w),
        'onnxruntime 4 bits': lambda: onnxruntime_four_bits(x, w, threads),
        'onnxruntime 8 bits': lambda: onnxruntime_eight_bits(x, w, threads),
    }
    for name, make in makers.items():
        try:
            found[name] = make()
            found[name]()
        except (ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
            found.pop(name, None)
            missing[name] = str(error).splitlines()[0]
    return found, missing
