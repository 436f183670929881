# SPDX-License-Identifier: Apache-2.0
"""Names of the policy node on the graph and the QoS that goes with each kind of topic.

Topics of cameras, joint states, vectors, instruction and commands come from the contract. All
names are relative or private, so that a namespace or a remap moves them.
"""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

POLICY_NODE = 'policy_node'
ROBOT_DESCRIPTION = 'robot_description'  # std_msgs/msg/String, latched, subscribed
CHUNK = '~/chunk'  # trajectory_msgs/msg/JointTrajectory, the planned chunk
SHADOW = '~/shadow'  # trajectory_msgs/msg/JointTrajectory, a shadow's chunk minus the real one
CHUNK_ORIGIN = '~/chunk_origin'  # std_msgs/msg/String, JSON: what that chunk was made from
STATUS = '~/status'  # std_msgs/msg/String, JSON, latched
IS_ACTIVE = '~/is_active'  # std_msgs/msg/Bool, latched: true only while commands flow
DIAGNOSTICS = '/diagnostics'  # diagnostic_msgs/msg/DiagnosticArray
ENABLE = '~/enable'  # std_srvs/srv/SetBool: start or stop moving
ESTOP = '~/estop'  # std_srvs/srv/Trigger: latched stop
RESET = '~/reset'  # std_srvs/srv/Trigger: clear a stop; moves nothing

# Cameras and joint states: the newest only, and a publisher of either reliability is heard.
SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
# Commands are never latched: a restarted controller must not receive an old order.
COMMAND = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
