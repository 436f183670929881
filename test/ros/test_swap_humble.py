# SPDX-License-Identifier: Apache-2.0
"""A precision wished where rclpy has no callback before a set: the truth is told soon after it."""

import pytest
from precise_policy import PrecisePolicy
from rclpy.node import Node

from quantvla_ros.policies.base import POLICIES

pytestmark = pytest.mark.ros


def test_without_a_callback_before_a_set_the_truth_is_told_soon(
    robot, serve, tmp_path, monkeypatch
):
    POLICIES.setdefault('precise', 'precise_policy:PrecisePolicy')
    monkeypatch.delattr(Node, 'add_pre_set_parameters_callback')
    served = serve(policy='precise', model=str(tmp_path), precision='fine',
                   **{'inference.timeout_s': 20.0, 'freshness.camera_max_silence_s': 10.0})
    assert served.do(served.node.trigger_configure).name == 'SUCCESS'

    def value():
        return served.node.get_parameter('precision').value

    PrecisePolicy.gate.clear()
    assert robot.set_parameters(precision='coarse').successful
    robot.wait(lambda: robot.swap('stage') == 'loading' and value() == 'fine', 'truth')
    PrecisePolicy.gate.set()
    robot.wait(lambda: robot.status['precision'] == value() == 'coarse', 'the new truth')
