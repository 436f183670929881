# SPDX-License-Identifier: Apache-2.0
"""The policy node serving the full-size network from the card, over DDS, beside a robot."""

from __future__ import annotations

import importlib.util
from typing import Any

from quantvla_ros.bench import gpu_chunk
from quantvla_ros.bench.gpu_chunk import Setting
from quantvla_ros.bench.gpu_time import Bench

START_S = 25.0  # from a process to a captured network, kernels compiled before
SECONDS = 20.0
PRECISIONS = ('w4a8', 'w8a8', 'float')


def serve(bench: Bench) -> dict[str, Any]:
    """Latency of a chunk in the node, and the time from a picture's stamp to its command."""
    if bench.dry:
        print('  left out: an interpreted chunk takes longer than a node may wait')
        return {'missing': 'needs a card'}
    if importlib.util.find_spec('rclpy') is None:
        print('  not run: rclpy is not installed here')
        return {'missing': 'rclpy is not installed'}
    # what the node is about to serve: the bench's contract asks for 16 actions
    gpu_chunk.warm_caches((Setting('pi05', 16, 10),), bench)
    found: dict[str, Any] = {}
    for precision in PRECISIONS[:1] if bench.quick else PRECISIONS:
        if bench.deadline.left_s() < START_S + SECONDS + 10.0:
            print(f'  {precision}: not run, the time is up')
            continue
        found[precision] = _one(precision)
    return found


def _one(precision: str) -> dict[str, Any]:
    from quantvla_ros.bench import ros
    from quantvla_ros.bench.ros_policy import first_commands

    with ros.Node(precision, 0.0, START_S + SECONDS, 'random_pi05', 'cuda') as node:
        state = node.state_at_the_end()
        commands = ros.answer(node.robot)['commands']
        notes = node.notes()
    if not commands or not notes:
        raise ValueError(f'the policy node sent no command; its status was {state}')
    chunk = ros.percentiles([(n['end_ns'] - n['start_ns']) / 1e6 for n in notes])
    wire = ros.percentiles([(when - note['start_ns']) / 1e6 + note['picture_age_ms']
                            for note, when in first_commands(notes, commands)])
    age = ros.percentiles([n['picture_age_ms'] for n in notes])
    ros.say(f'{precision}: age of a picture that begins one', age, 'ms')
    ros.say(f'{precision}: chunk in the node', chunk, 'ms')
    ros.say(f'{precision}: picture to command', wire, 'ms')
    return {'picture_age_ms': age, 'chunk_ms': chunk, 'picture_to_command_ms': wire,
            'inference_ms': state['inference']}
