# SPDX-License-Identifier: Apache-2.0
"""The one table of executables: what `ros2 run quantvla_ros NAME` starts.

Imports nothing, because setup.py reads it before the package or its dependencies are installed.
"""

EXECUTABLES = {
    'policy_node': 'quantvla_ros.nodes.policy_node',
    'record_node': 'quantvla_ros.nodes.record_node',
    'sim_node': 'quantvla_ros.sim.sim_node',
}
