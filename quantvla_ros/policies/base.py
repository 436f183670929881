# SPDX-License-Identifier: Apache-2.0
"""What every policy looks like from outside, and the table from name to policy.

A policy never touches a topic, a clock or a limit. Nothing here imports torch, so a robot can run
`hold` without it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation


class DeviceError(RuntimeError):
    """The accelerator failed; no later call on it can succeed in this process."""


class PolicyFailedError(RuntimeError):
    """A bug of a policy in another process, which logged its traceback, or the end of that one."""


@dataclass(frozen=True)
class PolicySettings:
    """What a policy is made with; a policy ignores what does not concern it.

    model: folder of the checkpoint. precision: name of the artifact beside it, or 'float'.
    calibration: one beside the artifact by name or path, 'newest', or '' for none.
    steps: denoising steps, 0 for the policy's own. threads: of the kernels, 0 for its own choice.
    """

    model: str = ''
    precision: str = 'float'
    device: str = 'cpu'
    steps: int = 0
    threads: int = 0
    calibration: str = ''


class Policy(Protocol):
    """Observation -> ActionChunk, in two halves so that the first is paid once per chunk."""

    contract: Contract

    def prepare(self, observation: Observation) -> Any:
        """Encode one observation; the result serves any number of denoise calls.

        Raises ValueError with a sentence for what the user can mend (unknown words, a camera of
        another size).
        """

    def denoise(self, context: Any, seed: int, prefix: ActionChunk | None = None) -> ActionChunk:
        """Return the chunk that starts at the observation's stamp.

        The same context, seed and prefix give the same chunk. prefix: what is still to be
        executed, for real-time chunking; a policy that cannot use it ignores it.
        """

    def reset(self) -> None:
        """Forget the episode (a new instruction, a new start); most policies hold nothing."""


class HoldPolicy:
    """Keep every joint where it is: exercises a robot without moving it."""

    def __init__(self, contract: Contract, settings: PolicySettings) -> None:
        self.contract = contract
        del settings

    def prepare(self, observation: Observation) -> Observation:
        """Pass the observation on."""
        return observation

    def denoise(
        self, context: Observation, seed: int, prefix: ActionChunk | None = None
    ) -> ActionChunk:
        """Repeat the measured position over the horizon."""
        del seed, prefix
        action = self.contract.action
        order = [context.joint_names.index(name) for name in action.joints]
        positions = np.tile(context.joint_positions[order], (action.horizon, 1))
        return ActionChunk(action.joints, positions, context.stamp_ns, action.step_dt_s)

    def reset(self) -> None:
        """Hold nothing, forget nothing."""


# name -> 'module:class', imported when asked for and made with (contract, settings)
POLICIES: dict[str, str] = {
    'hold': 'quantvla_ros.policies.base:HoldPolicy',
    'expert': 'quantvla_ros.sim.expert_policy:ExpertPolicy',
    'constant_time': 'quantvla_ros.bench.ros_policy:ConstantTime',  # for `quantvla bench ros`
    'random_pi05': 'quantvla_ros.bench.gpu_policy:RandomPi05',  # for `quantvla bench gpu`
    'pi05': 'quantvla_ros.policies.runtime:FlowPolicy',
    'pi0': 'quantvla_ros.policies.runtime:FlowPolicy',
    'groot_n15': 'quantvla_ros.policies.runtime:FlowPolicy',
    'smolvla': 'quantvla_ros.policies.runtime:FlowPolicy',
    'openvla': 'quantvla_ros.policies.openvla_policy:OpenVlaPolicy',
    'openvla_oft': 'quantvla_ros.policies.openvla_policy:OpenVlaPolicy',
    'libero_panda': 'quantvla_ros.policies.libero_panda:LiberoVla',
}


CALIBRATED = ('libero_panda',)  # policies that take PolicySettings.calibration


@dataclass(frozen=True)
class Prospect:
    """What can be said of a policy before it is loaded.

    nbytes: about what loading it takes, 0 where nobody knows. artifact: folder of its quantized
    layers, which the gate judges; None for float.
    """

    nbytes: int = 0
    artifact: Path | None = None


def look_ahead(name: str, contract: Contract, settings: PolicySettings) -> Prospect:
    """Look at what make_policy would read, without reading a weight.

    A maker tells it by its own look_ahead(contract, settings). Raises ValueError or
    FileNotFoundError with a sentence for what can be seen to be missing.
    """
    look = getattr(_maker(name, settings), 'look_ahead', None)
    return Prospect() if look is None else look(contract, settings)


def make_policy(name: str, contract: Contract, settings: PolicySettings) -> Policy:
    """Make a policy by name. Raises ValueError that lists the known names."""
    return _maker(name, settings)(contract, settings)


def policy_class(name: str) -> Any:
    """Return the maker of a policy by name. Raises ValueError that lists the known names."""
    if name not in POLICIES:
        raise ValueError(f'policy {name!r} is unknown; known are {", ".join(sorted(POLICIES))}')
    module, _, maker = POLICIES[name].partition(':')
    return getattr(importlib.import_module(module), maker)


def _maker(name: str, settings: PolicySettings) -> Any:
    maker = policy_class(name)
    if settings.calibration and name not in CALIBRATED:
        raise ValueError(
            f'policy {name!r} takes no calibration, and calibration is {settings.calibration!r}; '
            'set it to empty'
        )
    return maker
