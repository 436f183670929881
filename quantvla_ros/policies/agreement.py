# SPDX-License-Identifier: Apache-2.0
"""What the contract's `model` section says: the facts that a checkpoint leaves to Python code.

Camera slots, order and units of state and action, gripper values, horizon, prompt, dataset. Each
is checked when the policy is made, all problems at once. Knows no tensor.
"""

from __future__ import annotations

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
    gripper: the checkpoint's values for open and closed, or None where it speaks the joint's own.
    """

    cameras: tuple[tuple[str, str], ...]
    state: tuple[str, ...]
    state_units: np.ndarray
    action: tuple[str, ...]
    action_units: np.ndarray
    kind: str
    gripper: tuple[float, float] | None
    horizon: int
    prompt: str
    statistics: str
    normalization: str
    tokenizer: str


def _joints(section: Section, key: str, default: tuple[str, ...]) -> tuple[tuple[str, ...], list]:
    part = section.section(key, required=False)
    names = part.names('joints', default)
    factors = [1.0 / UNITS[unit] for unit in part.units(len(names))]
    return names, factors


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
    state, state_units = _joints(section, 'state', contract.joints.names)
    action, action_units = _joints(section, 'action', contract.action.joints)
    part = section.section('action', required=False)
    part.known |= {'joints', 'units'}
    agreement = Agreement(
        cameras=_cameras(section, contract),
        state=state,
        state_units=np.array(state_units),
        action=action,
        action_units=np.array(action_units),
        kind=part.choice('kind', KINDS, contract.action.kind),
        gripper=_gripper(section),
        horizon=section.positive('horizon', int, contract.action.horizon),
        prompt=section.choice('prompt', PROMPTS, ''),
        statistics=section.text('statistics', ''),
        normalization=section.choice('normalization', NORMALIZATIONS, ''),
        tokenizer=section.text('tokenizer', ''),
    )
    part.done()
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
