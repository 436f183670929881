# SPDX-License-Identifier: Apache-2.0
"""Bag -> observations -> scales -> evidence. torch, never rclpy."""
