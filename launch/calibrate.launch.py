# SPDX-License-Identifier: Apache-2.0
"""Start the calibration node alone, as quantvla_ros/graph.py describes it."""

from launch import LaunchDescription

from quantvla_ros.launching import describe


def generate_launch_description() -> LaunchDescription:
    return describe('calibrate')
