# SPDX-License-Identifier: Apache-2.0
"""From a recorded bag to a film of the cameras and a plot of commanded against measured joints.

Reads the bag with the contract and the same decode as the policy node. Opens no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.action import NS_PER_S
from quantvla_ros.contract import Contract
from quantvla_ros.decode import DecodeError, decode_camera, decode_joints

SCALE = 2
FRAMES = 140  # of a whole film, so that it stays a few MB


@dataclass(frozen=True)
class Span:
    """One episode: when it ran, by the stamps of the bag, and what to write above it."""

    title: str
    start_ns: int
    end_ns: int
    success: bool


@dataclass
class Footage:
    """What a bag holds of an episode. Pictures are (height, width, 3) uint8 RGB."""

    pictures: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    measured: list[tuple[int, np.ndarray]] = field(default_factory=list)
    commanded: list[tuple[int, np.ndarray]] = field(default_factory=list)


def read_footage(bag: Path, contract: Contract, span: Span, namespace: str = '') -> Footage:
    """Read pictures, measured and commanded joints of one span, each with its bag stamp."""
    from rosbags.rosbag2 import Reader
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    prefix = f'/{namespace.strip("/")}'.rstrip('/')
    cameras = {f'{prefix}/{camera.topic}': camera for camera in contract.cameras}
    joints, commands = f'{prefix}/{contract.joints.topic}', f'{prefix}/{contract.controller.topic}'
    found = Footage({camera.name: [] for camera in contract.cameras})
    with Reader(bag) as reader:
        wanted = [c for c in reader.connections if c.topic in (*cameras, joints, commands)]
        for connection, stamp, data in reader.messages(wanted, span.start_ns, span.end_ns):
            message: Any = store.deserialize_cdr(data, connection.msgtype)
            if connection.topic in cameras:
                camera = cameras[connection.topic]
                try:
                    found.pictures[camera.name].append((stamp, decode_camera(message, camera)))
                except DecodeError:
                    continue  # a broken picture is no part of a film
            elif connection.topic == joints:
                found.measured.append((stamp, decode_joints(message, contract.joints)))
            else:
                found.commanded.append((stamp, _targets(message)))
    return found


def _targets(message: Any) -> np.ndarray:
    """Return the last commanded positions of either controller's message."""
    points = getattr(message, 'points', None)
    return np.asarray(message.data if points is None else points[0].positions, dtype=np.float64)


def film(bag: Path, contract: Contract, spans: Sequence[Span], out: Path) -> int:
    """Write an animated GIF of both cameras side by side; return its number of frames."""
    from PIL import Image

    frames, seconds = [], sum(span.end_ns - span.start_ns for span in spans) / NS_PER_S
    step_ns = max(NS_PER_S // 10, round(seconds / FRAMES * NS_PER_S))
    for span in spans:
        footage = read_footage(bag, contract, span)
        for at in range(span.start_ns, span.end_ns, step_ns):
            newest = [_newest(footage.pictures[name], at) for name in contract.camera_names]
            if all(picture is not None for picture in newest):
                last = at + step_ns >= span.end_ns
                frames.append(_annotated(newest, contract.camera_names, span, at, last))
    if frames:
        images = [Image.fromarray(frame).quantize(128) for frame in frames]
        images[0].save(out, save_all=True, append_images=images[1:], loop=0,
                       duration=100)
    return len(frames)


def _newest(pictures: Sequence[tuple[int, np.ndarray]], at: int) -> Any:
    older = [picture for stamp, picture in pictures if stamp <= at]
    return older[-1] if older else None


def _annotated(
    pictures: Sequence[np.ndarray], names: Sequence[str], span: Span, at: int, last: bool
) -> np.ndarray:
    """Put pictures side by side, enlarged, below two lines of text."""
    from PIL import Image, ImageDraw

    height = max(picture.shape[0] for picture in pictures)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 4), (0, 0))) for p in pictures]
    large = [picture.repeat(SCALE, 0).repeat(SCALE, 1) for picture in padded]
    body = np.concatenate(large, axis=1)
    head = np.full((34, body.shape[1], 3), 24, np.uint8)
    image = Image.fromarray(np.concatenate([head, body]))
    draw = ImageDraw.Draw(image)
    draw.text((4, 3), span.title, fill='white')
    clock = f'{(at - span.start_ns) / NS_PER_S:5.1f} s'
    fate = ('success' if span.success else 'not done') if last else ''
    draw.text((4, 18), f'{clock}   {"  |  ".join(names)}   {fate}',
              fill='lime' if last and span.success else 'white')
    return np.asarray(image)


def plot(bag: Path, contract: Contract, span: Span, out: Path) -> float:
    """Draw commanded against measured joints; return their largest distance in rad or m."""
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot

    footage = read_footage(bag, contract, span)
    if not footage.measured or not footage.commanded:
        raise ValueError(f'{bag} holds no commands or no joint states of {span.title!r}')
    seconds = [np.array([(stamp - span.start_ns) / NS_PER_S for stamp, _ in series])
               for series in (footage.measured, footage.commanded)]
    measured = np.array([values for _, values in footage.measured])
    commanded = np.array([values for _, values in footage.commanded])
    names = contract.controller.joints
    rows = (len(names) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 2.1 * rows), sharex=True)
    worst = 0.0
    for index, (name, axis) in enumerate(zip(names, axes.flat, strict=False)):
        column = measured[:, contract.joints.names.index(name)]
        axis.plot(seconds[0], column, label='measured', linewidth=1.5)
        axis.plot(seconds[1], commanded[:, index], label='commanded', linewidth=0.9)
        axis.set_ylabel(name.replace('panda_', ''), fontsize=8)
        axis.grid(alpha=0.3)
        if name != contract.gripper.joint:
            gap = np.abs(np.interp(seconds[1], seconds[0], column) - commanded[:, index])
            worst = max(worst, float(gap.max()))
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f'{span.title}   (rad, m, over seconds)', fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return worst
