# SPDX-License-Identifier: Apache-2.0
"""Start the policy node beside a robot's own drivers, as quantvla_ros/graph.py describes it."""

from launch import LaunchDescription

from quantvla_ros.launching import describe


def generate_launch_description() -> LaunchDescription:
    return describe('robot')
