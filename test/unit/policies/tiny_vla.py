# SPDX-License-Identifier: Apache-2.0
"""A tiny network with random weights in every corner, and observations that fit it."""

import numpy as np
import torch

from quantvla_ros.observation import Observation
from quantvla_ros.policies.libero_checkpoint import Checkpoint, Statistics
from quantvla_ros.policies.libero_vla import LiberoVlaNet, VlaConfig
from quantvla_ros.policies.vocabulary import Vocabulary

TINY = VlaConfig(
    image=32, words=6, vocabulary=8, vision_width=64, vision_layers=2, vision_mlp=64, width=256,
    layers=2, heads=4, kv_heads=2, mlp=64, action_width=128, action_layers=2, action_heads=2,
    action_kv_heads=1, action_mlp=64,
)


def random_net(config: VlaConfig = TINY, seed: int = 0) -> LiberoVlaNet:
    torch.manual_seed(seed)
    net = LiberoVlaNet(config)
    with torch.no_grad():
        for parameter in net.parameters():  # no weight stays at a start value such as zero or one
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net.eval().requires_grad_(False)


def tiny_checkpoint() -> Checkpoint:
    random = np.random.default_rng(3)
    statistics = Statistics(
        random.normal(size=9),
        random.uniform(0.5, 1.5, 9),
        random.normal(size=(16, 8)) * 0.1,
        random.uniform(0.05, 0.2, (16, 8)),
    )
    words = Vocabulary.of(['put the red cup on the plate'], TINY.words)
    return Checkpoint(TINY, 'libero_panda', words, statistics, steps=4)


def observe(contract, image=TINY.image, instruction='put the cup on the plate', seed=0):
    random = np.random.default_rng(seed)
    images = {
        name: random.integers(0, 256, (image, image, 3), dtype=np.uint8)
        for name in contract.camera_names
    }
    names = contract.joints.names
    stamps = dict.fromkeys(images, 10)
    return Observation(images, stamps, names, random.normal(size=len(names)), 10, instruction)
