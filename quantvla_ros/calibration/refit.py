# SPDX-License-Identifier: Apache-2.0
"""Fit layers anew to a robot's frames: rounding, smoothing, static activation scales.

`rounding` quantizes every layer again by a recipe, `smoothing` only those whose input transform
was fitted to activations, `activations` takes new static scales alone. Returns layers that may
stand in for stored ones; whether they do is for held-out frames to say. Rounding anew needs the
float network in memory, which alpha and beta do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from quantvla_ros.calibration.pipeline import quantize_policy
from quantvla_ros.calibration.policy_runs import chunks
from quantvla_ros.calibration.settings import CalibrationSettings
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_checkpoint import read_checkpoint
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.policies.libero_quantized import Opened, build
from quantvla_ros.quant.fit import static_scales
from quantvla_ros.quant.linear import Make, QuantizedLayer
from quantvla_ros.quant.observe import observe
from quantvla_ros.quant.recipes import find_recipe
from quantvla_ros.quant.scheme import parse_scheme

Note = Callable[[int], None]


def refit(
    what: str,
    opened: Opened,
    contract: Contract,
    layers: Mapping[str, QuantizedLayer],
    observations: Sequence[Observation],
    settings: CalibrationSettings,
    make: Make,
    note: Note,
) -> dict[str, QuantizedLayer]:
    """Return the layers that a refit would change; {} where there is nothing of its kind."""
    if what == 'activations':
        return _static(opened, contract, layers, observations, settings, make, note)
    fitted = {name for name, layer in layers.items() if 'diagonal' in layer.transform.tensors()}
    if what == 'smoothing' and not fitted and not settings.recipe:
        return {}
    found = _rounded(opened, contract, observations, settings, make, note)
    if what == 'rounding':
        return found
    return {name: layer for name, layer in found.items()
            if name in fitted or 'diagonal' in layer.transform.tensors()}


def _static(
    opened: Opened, contract: Contract, layers: Mapping[str, QuantizedLayer],
    observations: Sequence[Observation], settings: CalibrationSettings, make: Make, note: Note,
) -> dict[str, QuantizedLayer]:
    names = [name for name, layer in layers.items() if layer.act_scales is not None]
    if not names:
        return {}
    student = LiberoVla.around(contract, PolicySettings(threads=settings.threads),
                               opened.checkpoint, build(opened, layers, make))
    seen = observe(student.net, names, lambda: _run(student, observations, settings.seed))
    note(len(observations))
    return {
        name: replace(layers[name], act_scales=static_scales(
            seen[name], layers[name].transform, layers[name].scheme.act,
            layers[name].scheme.act_bits))
        for name in names if name in seen and seen[name].steps
    }


def _rounded(
    opened: Opened, contract: Contract, observations: Sequence[Observation],
    settings: CalibrationSettings, make: Make, note: Note,
) -> dict[str, QuantizedLayer]:
    provenance = opened.artifact.provenance
    recipe = find_recipe(settings.recipe or provenance.recipe)
    if not recipe.needs_frames:
        raise ValueError(
            f'recipe {recipe.name!r} rounds without looking at frames, so there is nothing to '
            'refit; name another recipe, such as onboard'
        )
    checkpoint, net = read_checkpoint(settings.model)
    policy = LiberoVla.around(
        contract, PolicySettings(threads=settings.threads), checkpoint, net)
    del net
    told = 0

    def progress(_: str, done: int, total: int) -> None:
        nonlocal told
        frames = len(observations) * done // total
        note(frames - told)
        told = frames

    result = quantize_policy(
        policy, replace(recipe, matching=None), parse_scheme(provenance.precision), observations,
        seed=settings.seed, make=make, progress=progress)
    return {name: layer for name, layer in result.layers.items() if name in opened.artifact.layers}


def _run(policy: LiberoVla, observations: Sequence[Observation], seed: int) -> None:
    chunks(policy, observations, seed)
