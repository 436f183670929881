# SPDX-License-Identifier: Apache-2.0
"""How a linear layer becomes low-bit. torch, never rclpy."""
