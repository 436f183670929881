# SPDX-License-Identifier: Apache-2.0
"""Whole networks as plans against their modules: float, integer, any prompt, with guidance."""

import dataclasses

import pytest
import tiny
import torch
from cases import error

from quantvla_ros.policies import flow, savings
from quantvla_ros.policies.cuda_engine import CudaEngine
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.linear import QuantLinear, replace_linears

FAMILIES = list(tiny.MODELS)


def engine(family, model, device, layers=None, words=6):
    conditions = savings.condition_table(model, tiny.STEPS)
    savings.drop_unused(model, tiny.STEPS)
    return CudaEngine(family, model, layers or {}, conditions, device=device,
                      dtype=torch.float32, words=words)


def served(made, images, words, state, noise, guidance=None):
    scene = made.prefix(images, words.tolist(), state)
    return made.chunk(scene, noise, guidance)


@pytest.mark.parametrize('family', FAMILIES)
def test_float_plan_computes_what_the_modules_compute(family, device):
    model = tiny.made(family)
    inputs = tiny.inputs(model)
    wanted = tiny.chunk(model, *inputs)
    assert error(served(engine(family, model, device), *inputs), wanted) < 2e-5
