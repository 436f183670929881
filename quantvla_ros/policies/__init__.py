# SPDX-License-Identifier: Apache-2.0
"""Observation -> ActionChunk. torch, never rclpy."""
