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

    with ros.Node(precision, 0.0, START_S + SECONDS, 'random_pi05', 'cuda') as node:
        state = node.state_at_the_end()
        commands = ros.answer(node.robot)['commands']
        notes = node.notes()
    found = ros.seen_to_told(notes, commands, state, f'{precision}: ')
    chunk = ros.percentiles([(n['end_ns'] - n['start_ns']) / 1e6 for n in notes])
    ros.say(f'{precision}: chunk in the node', chunk, 'ms')
    return {**found, 'chunk_ms': chunk, 'inference_ms': state['inference']}
