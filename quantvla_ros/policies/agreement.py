# SPDX-License-Identifier: Apache-2.0
"""What the contract's `model` section says: the facts that a checkpoint leaves to Python code.

Camera slots, order and units of state and action, gripper values, horizon, prompt, dataset. Each
is checked when the policy is made, all problems at once. Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantvla_ros.contract import Contract, ContractError
from quantvla_ros.sections import UNITS, Section

PROMPTS = ('', 'state', 'plain')
KINDS = ('absolute', 'delta', 'velocity')
NORMALIZATIONS = ('', 'quantiles', 'mean_std', 'min_max', 'identity')


@dataclass(frozen=True)
class Agreement:
    """One contract's `model` section, with defaults filled in from the rest of the contract.

    cameras: (slot of the checkpoint, camera of the contract), in the checkpoint's order.
    state, action: joints in the checkpoint's order, and what one SI unit is in its units.
    kind: what an action is: a target, a difference to the measured position, or a rate per s.
    state_parts, action_parts: names and order of the parts in GR00T's metadata.json.
    gripper: the checkpoint's values for open and closed, or None where it speaks the joint's own.
    """

    cameras: tuple[tuple[str, str], ...]
    state: tuple[str, ...]
    state_units: np.ndarray
    action: tuple[str, ...]
    action_units: np.ndarray
    state_parts: tuple[str, ...]
    action_parts: tuple[str, ...]
    kind: str
    gripper: tuple[float, float] | None
    horizon: int
    prompt: str
    statistics: str
    normalization: str
    tokenizer: str


@dataclass(frozen=True)
class _Side:
    """State or action: joints in the checkpoint's order, factors from SI, parts."""

    joints: tuple[str, ...]
    factors: np.ndarray
    parts: tuple[str, ...]
    kind: str


def _side(section: Section, key: str, joints: tuple[str, ...], kinds: Sequence[str]) -> _Side:
    part = section.section(key, required=False)
    names = part.names('joints', joints)
    side = _Side(
        names,
        np.array([1.0 / UNITS[unit] for unit in part.units(len(names))]),
        part.names('parts') if 'parts' in part.data else (),
        part.choice('kind', kinds, kinds[0]) if kinds else '',
    )
    part.done()
    return side


def _gripper(section: Section) -> tuple[float, float] | None:
    part = section.section('gripper', required=False)
    if not part.data:
        return None
    values = part.number('open'), part.number('closed')
    if values[0] == values[1]:
        part.say('open', values[0], 'another value than closed')
    part.done()
    return values


def _cameras(section: Section, contract: Contract) -> tuple[tuple[str, str], ...]:
    part = section.section('cameras', required=False)
    found = tuple((slot, part.text(slot)) for slot in part.data)
    for slot, camera in found:
        if camera not in contract.camera_names:
            part.say(slot, camera, 'one of ' + ', '.join(contract.camera_names))
    return found or tuple((name, name) for name in contract.camera_names)


def read_agreement(contract: Contract) -> Agreement:
    """Check the section. Raises ContractError that lists every problem."""
    problems: list[str] = []
    section = Section('model', dict(contract.model), problems)
    state = _side(section, 'state', contract.joints.names, ())
    kinds = (contract.action.kind, *(kind for kind in KINDS if kind != contract.action.kind))
    action = _side(section, 'action', contract.action.joints, kinds)
    agreement = Agreement(
        cameras=_cameras(section, contract),
        state=state.joints,
        state_units=state.factors,
        action=action.joints,
        action_units=action.factors,
        state_parts=state.parts,
        action_parts=action.parts,
        kind=action.kind,
        gripper=_gripper(section),
        horizon=section.positive('horizon', int, contract.action.horizon),
        prompt=section.choice('prompt', PROMPTS, ''),
        statistics=section.text('statistics', ''),
        normalization=section.choice('normalization', NORMALIZATIONS, ''),
        tokenizer=section.text('tokenizer', ''),
    )
    section.done()
    _check_names(agreement, contract, section)
    if problems:
        raise ContractError(
            f'the contract has {len(problems)} problem(s):\n  ' + '\n  '.join(problems)
        )
    return agreement


def _check_names(agreement: Agreement, contract: Contract, section: Section) -> None:
    unmeasured = sorted(set(agreement.state) - set(contract.joints.names))
    if unmeasured:
        section.say('state.joints', unmeasured, f'joints of {list(contract.joints.names)}')
    if sorted(agreement.action) != sorted(contract.action.joints):
        section.say('action.joints', list(agreement.action),
                    f'the joints of action.joints, {list(contract.action.joints)}, in any order')
    if agreement.horizon < contract.action.horizon:
        section.say('horizon', agreement.horizon,
                    f'at least action.horizon, {contract.action.horizon}')
    if agreement.gripper and contract.gripper.joint not in agreement.action:
        section.say('gripper', agreement.gripper, 'a contract whose gripper.joint is commanded')
