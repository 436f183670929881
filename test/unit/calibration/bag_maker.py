# SPDX-License-Identifier: Apache-2.0
"""Bags for tests: a robot of two joints and two cameras that moves, written by rosbags."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from quantvla_ros.contract import parse_contract

STORE = get_typestore(Stores.ROS2_JAZZY)
NS = 10**9
START_NS = 1_700_000_000 * NS
WIDTH, HEIGHT = 16, 12

DATA = {
    'contract': 1, 'robot': 'r', 'policy': 'hold', 'instruction': {'default': 'stay'},
    'cameras': {
        name: {'topic': f'{name}/image', 'width': WIDTH, 'height': HEIGHT,
               'policy': {'width': 8, 'height': 8}}
        for name in ('front', 'wrist')
    },
    'joints': {'names': ['a', 'b'], 'topic': 'joint_states', 'units': 'rad'},
    'action': {'kind': 'absolute', 'joints': ['a'], 'horizon': 4, 'rate_hz': 10.0},
    'controller': {'kind': 'forward_command', 'topic': 'c', 'joints': ['a']},
}
CONTRACT = parse_contract(DATA)


@dataclass(frozen=True)
class Scene:
    """What is recorded. rate_hz: of pictures; joints come at three times the rate."""

    frames: int = 100
    rate_hz: float = 10.0
    still: bool = False
    size: tuple[int, int] = (WIDTH, HEIGHT)
    instructions: tuple[str, ...] = ('pick', 'place')
    space: str = ''
    without: tuple[str, ...] = ()


def make(kind, **values):
    return STORE.types[kind](**values)


def header(stamp_ns):
    time = make('builtin_interfaces/msg/Time', sec=stamp_ns // NS, nanosec=stamp_ns % NS)
    return make('std_msgs/msg/Header', stamp=time, frame_id='')


def picture(value, stamp_ns, size=(WIDTH, HEIGHT)):
    width, height = size
    rows = np.add.outer(np.arange(height) * 3, np.arange(3 * width)) + value
    return make('sensor_msgs/msg/Image', header=header(stamp_ns), width=width, height=height,
                encoding='rgb8', is_bigendian=0, step=3 * width,
                data=(rows % 251).astype(np.uint8).ravel())


def jpeg(value, stamp_ns, size=(WIDTH, HEIGHT)):
    import cv2

    pixels = picture(value, stamp_ns, size).data.reshape(size[1], size[0], 3)
    return make('sensor_msgs/msg/CompressedImage', header=header(stamp_ns), format='jpeg',
                data=cv2.imencode('.jpg', pixels)[1].ravel())


def joint_state(a, b, stamp_ns):
    empty = np.zeros(0)
    return make('sensor_msgs/msg/JointState', header=header(stamp_ns), name=['b', 'a'],
                position=np.array([b, a]), velocity=empty, effort=empty)


def text(words):
    return make('std_msgs/msg/String', data=words)


def script(scene=Scene()):  # noqa: B008 - frozen
    """Yield (topic, stamp of receipt, message) of a recording, in order of receipt."""
    step_ns = round(NS / scene.rate_hz)
    part = max(1, scene.frames // len(scene.instructions)) if scene.instructions else 0
    for i in range(scene.frames):
        stamp = START_NS + i * step_ns
        if part and i % part == 0 and i // part < len(scene.instructions):
            yield 'instruction', stamp, text(scene.instructions[i // part])
        phase = 0 if scene.still else i
        for k in range(3):
            at = stamp + k * step_ns // 3
            swing = np.sin((phase + k / 3) * 0.1) if not scene.still else 0.0
            yield 'joint_states', at + 1000, joint_state(swing, 0.5 * swing, at)
            if k == 0:
                yield 'front/image', at + 2000, picture(phase * 5, at, scene.size)
                yield 'wrist/image', at + 3000, picture(phase * 7 + 90, at, scene.size)


def write(path, messages, *, storage=StoragePlugin.MCAP, mode=CompressionMode.NONE, space='',
          announce=None, pad=0):
    """Write (topic, stamp, message) as a rosbag2 directory and return its path.

    announce: topic -> type, without a message. pad: bytes behind the pixels of each picture.
    """
    writer = Writer(path, version=9, storage_plugin=storage)
    if mode != CompressionMode.NONE:
        writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        made = {topic: writer.add_connection(f'{space}/{topic}', kind, typestore=STORE)
                for topic, kind in (announce or {}).items()}
        for topic, stamp, message in messages:
            kind = message.__msgtype__
            if pad and kind == 'sensor_msgs/msg/Image':
                noise = np.random.default_rng(stamp).integers(0, 256, pad, np.uint8)
                message.data = np.concatenate([message.data, noise])
            if topic not in made:
                made[topic] = writer.add_connection(f'{space}/{topic}', kind, typestore=STORE)
            writer.write(made[topic], stamp, STORE.serialize_cdr(message, kind))
    return path


def record(path, scene=Scene(), **options):  # noqa: B008 - frozen
    """Write a scene as a bag."""
    kept = (item for item in script(scene) if item[0] not in scene.without)
    return write(path, kept, space=scene.space, **options)


def storage_file(bag):
    """Return the only storage file of a bag."""
    (found,) = (p for p in Path(bag).iterdir() if p.name != 'metadata.yaml')
    return found


STILL = replace(Scene(), still=True)
