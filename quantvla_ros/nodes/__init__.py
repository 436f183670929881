# SPDX-License-Identifier: Apache-2.0
"""rclpy: wires only."""
