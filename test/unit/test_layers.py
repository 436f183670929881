# SPDX-License-Identifier: Apache-2.0
"""The direction of imports: a room knows the rooms below it and none above."""

import ast
from pathlib import Path

import pytest

import quantvla_ros

ROOT = Path(quantvla_ros.__file__).parent
WORDS = {'observation', 'action', 'contract', 'decode', 'builder', 'sections', 'resources',
         'priority', 'exit_status'}
BELOW = {
    'words': WORDS,
    'control': WORDS,
    'kernels': set(),
    'quant': {'kernels', 'resources'},
    'policies': WORDS | {'kernels', 'quant'},
    'calibration': WORDS | {'kernels', 'quant', 'policies'},
}
ROS = {'rclpy', 'cv_bridge', 'rosbag2_py', 'control_msgs', 'sensor_msgs', 'std_msgs', 'launch',
       'launch_ros'}
MAY_IMPORT_RCLPY = {'nodes', 'bench'}


def modules():
    return sorted(path for path in ROOT.rglob('*.py'))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if len(parts) > 1:
        return parts[0]
    return 'words' if path.stem in WORDS else 'top'


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: write imports in full'
            module = node.module or ''
            yield from (f'{module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_module_imports_only_rooms_below_its_own(path):
    room = room_of(path)
    for name in imports_of(path):
        parts = name.split('.')
        if parts[0] == 'quantvla_ros' and room in BELOW and len(parts) > 1:
            assert parts[1] in BELOW[room] | {room} | (WORDS if room == 'words' else set()), (
                f'{room} must not import {name}'
            )
        if parts[0] in ROS:
            allowed = room in MAY_IMPORT_RCLPY or path.stem in ('sim_node', 'launching')
            assert allowed, f'{path.name} must not import {name}: only nodes speak ROS'
        if parts[0] == 'torch':
            assert room not in ('control', 'words', 'nodes'), f'{room} must not import torch'
