# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench bags`: what it costs to read a bag, in seconds and in memory.

Writes a bag of frame pairs for each kind, reads it in a process of its own, and prints beside
every time the time that rosbags alone needs to deserialize the same messages, and beside every
peak of memory the one for a quarter of the bag: constant memory shows as two equal figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.calibration.bags import observations
from quantvla_ros.calibration.frames import FrameSettings, frames_of
from quantvla_ros.contract import Contract, parse_contract

NS_PER_PAIR = 50_000_000  # 20 Hz
JOINTS_PER_PAIR = 5  # 100 Hz
KINDS = ('mcap', 'mcap-jpeg', 'mcap-zstd', 'mcap-unindexed', 'sqlite3')
GOAL_S = 10.0
GOAL_GROWTH_MB = 32.0
POLICY_SIZE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench bags`."""
    add = parser.add_argument
    add('--pairs', type=int, default=1000, help='frame pairs of two cameras')
    add('--size', default='640x480', help='of the pictures, as they are recorded')
    add('--kinds', default=','.join(KINDS), help=f'default: {",".join(KINDS)}')
    add('--folder', type=Path, default=None, help='where bags are written and removed again')
    add('--json', type=Path, default=None, help='write every figure to this file')


@dataclass(frozen=True)
class Row:
    """One kind of bag. Peaks are of resident memory above that of the idle process."""

    kind: str
    pairs: int
    megabytes: float
    rosbags_s: float
    observations_s: float
    frames_s: float
    quarter_peak_mb: float
    peak_mb: float
    frames_peak_mb: float


def bench_contract(width: int, height: int, jpeg: bool) -> Contract:
    """Return a contract of two cameras and nine joints."""
    camera = {'width': width, 'height': height,
              'policy': {'width': POLICY_SIZE, 'height': POLICY_SIZE}}
    if jpeg:
        camera.update(type='sensor_msgs/msg/CompressedImage', encoding='jpeg')
    names = [f'joint{i}' for i in range(9)]
    return parse_contract({
        'contract': 1, 'robot': 'bench', 'policy': 'hold', 'instruction': {'default': 'go'},
        'cameras': {name: {**camera, 'topic': f'{name}/image'} for name in ('front', 'wrist')},
        'joints': {'names': names, 'units': 'rad'},
        'action': {'kind': 'absolute', 'joints': names, 'horizon': 16, 'rate_hz': 20.0},
        'controller': {'kind': 'forward_command', 'topic': 'commands', 'joints': names},
    })


def write_bag(path: Path, kind: str, pairs: int, contract: Contract) -> int:
    """Write a bag of moving pictures and joints and return its bytes."""
    from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    plugin = StoragePlugin.SQLITE3 if kind == 'sqlite3' else StoragePlugin.MCAP
    writer = Writer(path, version=9, storage_plugin=plugin)
    if kind == 'mcap-zstd':
        writer.set_compression(CompressionMode.FILE, CompressionFormat.ZSTD)
    with writer:
        made = {topic: writer.add_connection(f'/{topic}', type_, typestore=store)
                for topic, type_ in contract.topics().items()}
        for topic, stamp_ns, message in _messages(store, pairs, contract):
            data = store.serialize_cdr(message, contract.topics()[topic])
            writer.write(made[topic], stamp_ns, data)
    if kind == 'mcap-unindexed':
        _drop_end(next(path.glob('*.mcap')))
    return sum(file.stat().st_size for file in path.iterdir())


def _drop_end(file: Path) -> None:
    """Leave a file as our recorder leaves it when even the index did not fit: it is scanned."""
    from quantvla_ros.nodes.recording import FOOTER

    with file.open('r+b') as out:
        out.seek(-28, os.SEEK_END)
        (summary,) = np.frombuffer(out.read(8), '<u8')
        out.truncate(int(summary) - 13)  # before the end of the data
        out.seek(0, os.SEEK_END)
        out.write(FOOTER)


def _messages(store: Any, pairs: int, contract: Contract) -> Iterator[tuple[str, int, Any]]:
    types = store.types
    time_of, header_of = types['builtin_interfaces/msg/Time'], types['std_msgs/msg/Header']
    empty = np.zeros(0)
    yield 'instruction', 1, types['std_msgs/msg/String'](data='go')
    for i in range(pairs):
        for k in range(JOINTS_PER_PAIR):
            stamp_ns = 10**18 + i * NS_PER_PAIR + k * NS_PER_PAIR // JOINTS_PER_PAIR
            header = header_of(stamp=time_of(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9),
                               frame_id='')
            position = np.sin(0.02 * i + np.arange(9))
            yield contract.joints.topic, stamp_ns, types['sensor_msgs/msg/JointState'](
                header=header, name=list(contract.joints.names), position=position,
                velocity=empty, effort=empty)
            if k == 0:
                for n, camera in enumerate(contract.cameras):
                    yield camera.topic, stamp_ns, _picture(types, header, camera, 3 * i + n)


def _picture(types: Any, header: Any, camera: Any, phase: int) -> Any:
    rows, columns = np.arange(camera.height), np.arange(3 * camera.width)
    pixels = ((rows[:, None] // 4 + columns // 12 + phase) % 256).astype(np.uint8)
    if camera.encoding == 'jpeg':
        import cv2

        _, packed = cv2.imencode('.jpg', pixels.reshape(camera.height, camera.width, 3))
        return types['sensor_msgs/msg/CompressedImage'](
            header=header, format='jpeg', data=packed.ravel())
    return types['sensor_msgs/msg/Image'](
        header=header, height=camera.height, width=camera.width, encoding=camera.encoding,
        is_bigendian=0, step=3 * camera.width, data=pixels.ravel())


# -- in a process of its own ----------------------------------------------------------------------


def _status_mb(key: str) -> float:
    for row in Path('/proc/self/status').read_text().splitlines():
        if row.startswith(key + ':'):
            return float(row.split()[1]) * 1024 / 1e6
    raise RuntimeError(f'/proc/self/status has no {key}')


def _measure(work: str, path: Path, contract: Contract) -> tuple[float, float]:
    """Return seconds, and the peak of resident memory above where it began, in MB."""
    for _ in zip(range(8), observations(path, contract), strict=False):
        pass  # libraries are loaded and buffers are warm before anything is counted
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM begins anew
    idle_mb, began = _status_mb('VmRSS'), time.perf_counter()
    if work == 'rosbags':
        _deserialize_all(path)
    elif work == 'frames':
        frames_of(path, contract, FrameSettings())
    else:
        for _ in observations(path, contract):
            pass
    return time.perf_counter() - began, max(0.0, _status_mb('VmHWM') - idle_mb)


def _deserialize_all(path: Path) -> None:
    """Do what any reader must: take every message out of the bag."""
    from rosbags.rosbag2 import Reader
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    with Reader(path) as reader:
        for connection, _, data in reader.messages():
            store.deserialize_cdr(data, connection.msgtype)


def measure_kind(kind: str, pairs: int, width: int, height: int, folder: Path) -> Row:
    """Write a bag and a quarter of it, and read both, each time in a fresh process."""
    contract = bench_contract(width, height, jpeg=kind == 'mcap-jpeg')
    with tempfile.TemporaryDirectory(dir=folder, prefix='quantvla_bench_') as scratch:
        spawn = multiprocessing.get_context('spawn')
        figures = {}
        for name, count in (('quarter', pairs // 4), ('whole', pairs)):
            path = Path(scratch, name)
            size = write_bag(path, kind, count, contract)
            works = ('observations',) if name == 'quarter' else (
                'rosbags', 'observations', 'frames')
            for work in works:
                with spawn.Pool(1) as pool:
                    figures[name, work] = pool.apply(_measure, (work, path, contract))
    return Row(kind, pairs, size / 1e6, figures['whole', 'rosbags'][0],
               figures['whole', 'observations'][0], figures['whole', 'frames'][0],
               figures['quarter', 'observations'][1], figures['whole', 'observations'][1],
               figures['whole', 'frames'][1])


def _missed(kinds: list[str]) -> str:
    return f'missed by {", ".join(kinds)}' if kinds else 'met'


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 when a goal was missed."""
    width, _, height = args.size.partition('x')
    kinds = args.kinds.split(',')
    if not (width.isdecimal() and height.isdecimal()) or args.pairs < 400:
        raise ValueError('--size is WIDTHxHEIGHT and --pairs at least 400')
    if set(kinds) - set(KINDS):
        raise ValueError(f'--kinds {args.kinds!r}: known are {", ".join(KINDS)}')
    print(f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python '
          f'{platform.python_version()}; {args.pairs} pairs of {args.size}, made '
          f'{POLICY_SIZE}x{POLICY_SIZE}, with {JOINTS_PER_PAIR * args.pairs} joint states')
    print(f'{"bag":<15}{"MB":>7}{"rosbags":>10}{"all seen":>10}{"128+32":>10}{"peak, 1/4":>12}'
          f'{"peak":>9}{"peak 128+32":>13}')
    rows = []
    for kind in kinds:
        row = measure_kind(kind, args.pairs, int(width), int(height), args.folder)
        rows.append(row)
        print(f'{kind:<15}{row.megabytes:>7.0f}{row.rosbags_s:>8.2f} s{row.observations_s:>8.2f} s'
              f'{row.frames_s:>8.2f} s{row.quarter_peak_mb:>9.0f} MB{row.peak_mb:>6.0f} MB'
              f'{row.frames_peak_mb:>10.0f} MB', flush=True)
    slow = [row.kind for row in rows if row.frames_s > GOAL_S]
    grown = [row.kind for row in rows if row.peak_mb - row.quarter_peak_mb > GOAL_GROWTH_MB]
    print(f'goal, frames chosen within {GOAL_S:g} s: {_missed(slow)}')
    print(f'goal, peak within {GOAL_GROWTH_MB:g} MB of that of a quarter: {_missed(grown)}')
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + '\n')
    return 1 if slow or grown else 0
