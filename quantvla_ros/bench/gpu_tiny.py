# SPDX-License-Identifier: Apache-2.0
"""Published architectures at tiny sizes, with random weights, and their chunk by the modules.

For checks of plans against modules: in tests, and on a card before anything is timed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantvla_ros.bench.random_weights import randomize
from quantvla_ros.kernels.weights import pack
from quantvla_ros.policies import savings
from quantvla_ros.policies.decoder import DecoderConfig
from quantvla_ros.policies.gemma import GemmaConfig
from quantvla_ros.policies.groot_n15 import IMAGE, GrootConfig, GrootN15
from quantvla_ros.policies.pi0 import Pi0, Pi0Config
from quantvla_ros.policies.pi05 import Pi05, Pi05Config
from quantvla_ros.policies.siglip import VisionConfig
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.layout import EVERYTHING
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.scheme import parse_scheme, qmax
from quantvla_ros.quant.transforms import InputTransform

VISION = VisionConfig(width=32, depth=1, hidden=72, heads=4, patch=14, image=14)
BIG, SMALL = GemmaConfig(128, 2, 192, 4, 1, 16), GemmaConfig(64, 2, 128, 4, 1, 16)
STEPS = 2
HORIZON = 2


def pi05() -> Any:
    """pi0.5."""
    return Pi05(Pi05Config(VISION, BIG, SMALL, 50, 8, HORIZON))


def pi0() -> Any:
    """pi0."""
    return Pi0(Pi0Config(VISION, BIG, SMALL, 50, 8, 8, HORIZON))


def groot() -> Any:
    """GR00T N1.5."""
    backbone = DecoderConfig(64, 1, 128, 4, 2, 16)
    return GrootN15(GrootConfig(VISION, backbone, 50, 1, 128, 4, 96, 2, 128, 4, 64, 8, 16, 8, 1,
                                16, HORIZON))


MODELS = {'pi05': pi05, 'pi0': pi0, 'groot_n15': groot}


def made(name: str) -> Any:
    """A model by name, its weights drawn from their names."""
    model = MODELS[name]()
    randomize(model, 0)
    return model.eval().requires_grad_(False)


def inputs(model: Any, words: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images uint8, words, state and noise of two cameras."""
    size = model.config.vision.image
    generator = np.random.Generator(np.random.Philox(key=3))
    images = torch.from_numpy(generator.integers(0, 256, (2, 3, size, size), dtype=np.uint8))
    said = torch.arange(5, 5 + words)
    if isinstance(model, GrootN15):
        patches = torch.full((2 * model.config.vision.tokens,), IMAGE)
        said = torch.cat([said[:2], patches, said[2:]])
    state = torch.from_numpy(generator.standard_normal(8, dtype=np.float32))
    noise = torch.from_numpy(generator.standard_normal((1, HORIZON, 8), dtype=np.float32))
    return images, said, state, noise


def chunk(model: Any, images: Tensor, words: Tensor, state: Tensor, noise: Tensor,
          steps: int = STEPS) -> Tensor:
    """The chunk by the modules, in their type."""
    sign = -1.0 if model.NOISE_TIME == 1.0 else 1.0
    conditions = savings.condition_table(model, steps)
    with torch.inference_mode():
        context = model.prefix(images.float() / 255 * 2 - 1, words, state)
        x = noise
        for step in range(steps):
            x = x + sign * model.velocity(context, x, conditions[step]) / steps
    return x


def engine(family: str, model: Any, device: torch.device, words: int = 5,
           dtype: torch.dtype = torch.float32) -> Any:
    """Serve a model by its plan; it keeps nothing that a served one drops."""
    from quantvla_ros.policies.cuda_engine import CudaEngine

    conditions = savings.condition_table(model, STEPS)
    savings.drop_unused(model, STEPS)
    return CudaEngine(family, model, conditions, device=device, dtype=dtype, words=words)


def quantized(
    model: Any, scheme_name: str, *, rotate: bool = False, smooth: bool = False
) -> dict[str, QuantizedLayer]:
    """Round every linear of the stacks to nearest: name -> stored layer."""
    scheme = parse_scheme(scheme_name)
    layers = {}
    for site in policy_sites(model).in_groups(EVERYTHING):
        linear = model.get_submodule(site.name)
        turned = rotate and site.in_features % 64 == 0
        diagonal = torch.rand(site.in_features) + 0.5 if smooth else None
        transform = InputTransform(diagonal, hadamard=64 if turned else 0)
        weight = transform.weight(linear.weight.data)
        scale = weight.abs().amax(1, keepdim=True) / qmax(scheme.weight_bits)
        packed = pack(torch.round(weight / scale).to(torch.int8), scale, scheme.weight_bits)
        bias = None if linear.bias is None else linear.bias.data
        layers[site.name] = QuantizedLayer(scheme, packed, bias, transform)
    return layers
