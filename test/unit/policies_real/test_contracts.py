# SPDX-License-Identifier: Apache-2.0
"""Contracts for published families are whole, and their model section is checked as a whole."""

from dataclasses import replace

import pytest

from quantvla_ros.contract import ContractError, load_contract
from quantvla_ros.policies.agreement import read_agreement
from quantvla_ros.policies.base import POLICIES


@pytest.mark.parametrize('name', ['pi05_libero', 'pi05_droid', 'groot_n15_libero'])
def test_a_shipped_contract_agrees_with_itself(name):
    contract = load_contract(name)
    agreement = read_agreement(contract)
    assert contract.policy in POLICIES
    assert {camera for _, camera in agreement.cameras} == set(contract.camera_names)
    assert agreement.horizon >= contract.action.horizon


def test_every_problem_of_the_model_section_is_listed_at_once():
    contract = replace(load_contract('pi05_libero'), model={
        'cameras': {'base_0_rgb': 'ceiling'}, 'prompt': 'poem', 'horizon': 2,
        'state': {'joints': ['elbow']}, 'gripper': {'open': 1.0, 'closed': 1.0}, 'magic': 1})
    with pytest.raises(ContractError) as error:
        read_agreement(contract)
    for part in ('ceiling', 'poem', 'horizon is 2', 'elbow', 'magic', 'gripper.open'):
        assert part in str(error.value)


def test_without_a_model_section_the_contract_itself_is_taken():
    agreement = read_agreement(load_contract('libero_panda'))
    assert agreement.cameras == (('agentview', 'agentview'), ('wrist', 'wrist'))
    assert len(agreement.state) == 9
    assert agreement.kind == 'absolute'
