# SPDX-License-Identifier: Apache-2.0
"""Everything between a chunk and the wire. numpy only: neither torch nor rclpy."""
