# SPDX-License-Identifier: Apache-2.0
"""`quantvla say`: another instruction while the policy moves the arm."""

import pytest
from served import make_contract

from quantvla_ros import cli

pytestmark = pytest.mark.ros


def test_an_instruction_changes_while_the_arm_moves(moving, tmp_path, capsys):
    robot, served = moving
    contract = make_contract(tmp_path, 'forward_command')
    words = ['say', 'sweep the other way', '--namespace', '/robot', '--contract', str(contract)]
    assert cli.main([*words, '--dds', 'none']) == 0, capsys.readouterr().err
    robot.wait(lambda: robot.status['instruction'] == 'sweep the other way', 'the instruction')
    assert robot.status['state'] == 'running'
    chunks = len(robot.chunks)
    robot.wait(lambda: len(robot.chunks) > chunks, 'a chunk after it')
