# SPDX-License-Identifier: Apache-2.0
"""The parameters of the simulated robot: feeds its declaration, config/sim_node.yaml, the README.

Checks, besides each value, what only several can get wrong. Knows no topic.
"""

from __future__ import annotations

from typing import Any

from quantvla_ros.nodes.parameters import LIVE, START, Parameter, check
from quantvla_ros.sim.lighting import parse_lighting
from quantvla_ros.sim.scenes import MAX_TEXTURE, SUITES, check_task

SIM_NODE: tuple[Parameter, ...] = (
    Parameter('contract', 'libero_panda', '', START,
              'Contract whose topics, cameras, joints and controller the robot has.'),
    Parameter('suite', 'libero_object', '', LIVE,
              'LIBERO suite; takes effect at ~/reset.', allowed=tuple(sorted(SUITES))),
    Parameter('task', 0, '', LIVE,
              'Number of the task in its suite; takes effect at ~/reset.', 0, 89),
    Parameter('init', 0, '', LIVE,
              'Official start state, or -1 for a random one; takes effect at ~/reset.', -1, 49),
    Parameter('seed', 0, '', LIVE,
              'Seed of a random start; takes effect at ~/reset.', 0, 2**31 - 1),
    Parameter('lighting', 'day', '', LIVE,
              'day, overcast, lamp, night, or numbers such as light=0.5,warmth=0.8,noise=6; takes '
              'effect at ~/reset.'),
    Parameter('mode', 'realtime', '', START,
              'realtime follows the wall clock; lockstep stands still until a command arrives '
              'and moves on by one control period for each.', allowed=('realtime', 'lockstep')),
    Parameter('clock', False, '', START,
              'Publish /clock and stamp with simulated time; lockstep always does.'),
    Parameter('pace', 1.0, '', START,
              'realtime: simulated seconds per second; below 1 is slow motion on /clock, for a '
              'machine that cannot keep up.', 0.01, 1.0),
    Parameter('controller', 'contract', '', START,
              "Which controller is emulated; contract takes the contract's.",
              allowed=('contract', 'forward_command', 'joint_trajectory')),
    Parameter('interpolate_from_desired_state', False, '', START,
              'joint_trajectory: a new trajectory starts at the last command, not at the measured '
              'state.'),
    Parameter('allow_partial_joints', False, '', START,
              'joint_trajectory: accept messages that name only some joints.'),
    Parameter('publish_instruction', True, '', START,
              "Publish the task's instruction, latched, on the contract's instruction topic."),
    Parameter('max_texture', MAX_TEXTURE, 'px', START,
              'Scale textures down to this edge; 0 keeps the originals.', 0, 8192),
    Parameter('camera.rate_hz', 20.0, 'Hz', LIVE,
              'Most pictures per second and camera; rendering may allow fewer.', 0.1, 60.0),
    Parameter('camera.width', 0, 'px', START,
              "Width of the pictures; 0 takes the contract's.", 0, 4096),
    Parameter('camera.height', 0, 'px', START,
              "Height of the pictures; 0 takes the contract's.", 0, 4096),
    Parameter('camera.jpeg_quality', 90, '', LIVE,
              'Quality of the compressed pictures.', 1, 100),
)


def problems(values: dict[str, Any]) -> list[str]:
    """Return everything wrong with a set of values, each as a sentence."""
    found = check(values, SIM_NODE)
    if not found and 'lighting' in values:
        try:
            parse_lighting(values['lighting'])
        except ValueError as error:
            found.append(str(error))
    if not found and 'suite' in values and 'task' in values:
        try:
            check_task(values['suite'], values['task'])
        except ValueError as error:
            found.append(str(error))
    return found
