# SPDX-License-Identifier: Apache-2.0
"""Integer linear layers: int4/int8 in, float out. torch, never rclpy."""
