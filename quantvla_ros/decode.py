# SPDX-License-Identifier: Apache-2.0
"""Message-like objects -> numpy: the one path that live topics and bags both take.

Reads attributes only (data, width, name, ...), so that rclpy messages and those of a bag reader
are the same thing here; data may be an array, bytes or an ndarray. Pixels are viewed, not copied.
Refuses, with a sentence, whatever differs from the contract; imports no message package.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from quantvla_ros.action import NS_PER_S
from quantvla_ros.contract import Camera, Joints, Vector
from quantvla_ros.sections import UNITS

CHANNELS = {'rgb8': 3, 'bgr8': 3, 'mono8': 1}
SIGNATURES = {'jpeg': b'\xff\xd8', 'png': b'\x89PNG'}


class DecodeError(ValueError):
    """A message that the contract does not allow; says which input, what was seen, what is due.

    kind: one word for the record: stamp, encoding, size, data, names, width or not_finite.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind

    @property
    def what(self) -> str:
        """The sentence without the name of the input that it starts with."""
        return str(self).partition(': ')[2]


def stamp_ns(header: Any, who: str) -> int:
    """Return the header stamp in ns. Raises DecodeError when it was never set."""
    found = int(header.stamp.sec) * NS_PER_S + int(header.stamp.nanosec)
    if found <= 0:
        raise DecodeError(
            'stamp',
            f'{who}: the header stamp is {found} ns; its driver must stamp each message, or its '
            'age cannot be told'
        )
    return found


def check_camera(message: Any, camera: Camera) -> None:
    """Raise DecodeError when a picture is not what the contract says; looks at no pixel.

    A compressed picture tells its size only when it is decoded, so that is checked there.
    """
    who = f'camera {camera.name!r}'
    if camera.encoding in SIGNATURES:
        _check_compressed(message, camera.encoding, who)
        return
    if message.encoding != camera.encoding:
        raise DecodeError('encoding', _wrong_encoding(message.encoding, camera))
    _check_size(message.width, message.height, camera)
    row = camera.width * CHANNELS[camera.encoding]
    if message.step < row:
        raise DecodeError('data', f'{who}: step is {message.step}; a row of it has {row} bytes')
    due = message.step * (camera.height - 1) + row
    if len(message.data) < due:
        raise DecodeError('data', f'{who}: data holds {len(message.data)} bytes; expected {due}')


def decode_camera(message: Any, camera: Camera) -> np.ndarray:
    """Return a picture as the policy reads it: (policy_height, policy_width, 3) uint8 RGB.

    Shares memory with the message when nothing has to be resized. Raises DecodeError.
    """
    check_camera(message, camera)
    if camera.encoding in SIGNATURES:
        pixels = _decompress(message, camera)
        _check_size(pixels.shape[1], pixels.shape[0], camera)
    else:
        pixels = image_pixels(message)
    return _to_rgb(fit(pixels, camera), camera.encoding)


def image_pixels(message: Any) -> np.ndarray:
    """Return (height, width, channels) of an Image as it came, by cv_bridge where there is one."""
    bridge = cv_bridge()
    if bridge is None:
        return view_pixels(message)
    found = bridge.imgmsg_to_cv2(message, 'passthrough')
    return found.reshape(message.height, message.width, -1)


def view_pixels(message: Any) -> np.ndarray:
    """Return a view (height, width, channels) of the bytes of an 8-bit Image; respects step."""
    channels = CHANNELS[message.encoding]
    shape = (message.height, message.width, channels)
    strides = (message.step, channels, 1)
    return np.ndarray(shape, np.uint8, buffer=message.data, strides=strides)


@functools.lru_cache(maxsize=1)
def cv_bridge() -> Any:
    """Return a CvBridge, or None where there is none that reads a known picture as we do.

    Builds for another numpy fail at import or, worse, later; hence the trial.
    """
    try:
        bridge = importlib.import_module('cv_bridge').CvBridge()
        trial = _TrialImage()
        found = bridge.imgmsg_to_cv2(trial, 'passthrough')
        return bridge if np.array_equal(found, view_pixels(trial)) else None
    except Exception:  # any failure of a foreign library means: do without it
        return None


def fit(pixels: np.ndarray, camera: Camera) -> np.ndarray:
    """Flip and resize (height, width, channels) to the size the policy wants.

    stretch ignores the aspect ratio, pad keeps it and fills with black around the centre, crop
    keeps it and cuts around the centre. Resampling is by area: cv2.INTER_AREA where cv2 is there,
    else the same average in numpy, which differs by at most 1 when shrinking.
    """
    if camera.flip in ('vertical', 'both'):
        pixels = pixels[::-1]
    if camera.flip in ('horizontal', 'both'):
        pixels = pixels[:, ::-1]
    height, width = pixels.shape[:2]
    goal_h, goal_w = camera.policy_height, camera.policy_width
    if (height, width) == (goal_h, goal_w):
        return pixels
    if camera.resize == 'stretch':
        return _resize(pixels, goal_h, goal_w)
    if camera.resize == 'crop':
        scale = min(height / goal_h, width / goal_w)
        part_h, part_w = max(1, round(goal_h * scale)), max(1, round(goal_w * scale))
        top, left = (height - part_h) // 2, (width - part_w) // 2
        return _resize(pixels[top : top + part_h, left : left + part_w], goal_h, goal_w)
    scale = max(height / goal_h, width / goal_w)
    part_h, part_w = max(1, round(height / scale)), max(1, round(width / scale))
    top, left = (goal_h - part_h) // 2, (goal_w - part_w) // 2
    padded = np.zeros((goal_h, goal_w, pixels.shape[2]), np.uint8)
    padded[top : top + part_h, left : left + part_w] = _resize(pixels, part_h, part_w)
    return padded


def decode_joints(message: Any, joints: Joints) -> np.ndarray:
    """Return (joints,) float64 positions in SI, in the order of the contract.

    The order in the message does not matter and further joints are ignored. Raises DecodeError on
    a missing or repeated name, on widths that differ and on values that are not finite.
    """
    names = tuple(message.name)
    positions = np.asarray(message.position, dtype=np.float64)
    if positions.shape != (len(names),):
        raise DecodeError(
            'width',
            f'joint states: {len(names)} names but {positions.size} positions; expected as many'
        )
    found = positions[_order(names, joints.names)] * _si_factors(joints.units)
    if not np.isfinite(found).all():
        bad = [n for n, value in zip(joints.names, found, strict=True) if not np.isfinite(value)]
        sentence = f'joint states: the position of {", ".join(bad)} is not finite'
        raise DecodeError('not_finite', sentence)
    return found


def decode_vector(message: Any, vector: Vector) -> np.ndarray:
    """Return (size,) float64 of a Float64MultiArray. Raises DecodeError."""
    values = np.array(message.data, dtype=np.float64)
    if values.shape != (vector.size,):
        raise DecodeError(
            'width',
            f'vector {vector.name!r}: {values.size} values; the contract says {vector.size}'
        )
    if not np.isfinite(values).all():
        sentence = f'vector {vector.name!r}: value {values.tolist()} is not finite'
        raise DecodeError('not_finite', sentence)
    return values


class _TrialImage:
    """A padded picture of 2 by 2 pixels with every byte different."""

    height, width, step, encoding, is_bigendian = 2, 2, 8, 'rgb8', 0
    data = bytes(range(16))


@functools.lru_cache(maxsize=32)
def _order(names: tuple[str, ...], wanted: tuple[str, ...]) -> np.ndarray:
    """Return where each wanted joint is in a message; cached, for names rarely change."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DecodeError('names', f'joint states: {", ".join(repeated)} is named more than once')
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DecodeError(
            'names',
            f'joint states: {", ".join(missing)} is missing; the message names {", ".join(names)}'
        )
    return np.array([names.index(name) for name in wanted], dtype=np.intp)


@functools.lru_cache(maxsize=32)
def _si_factors(units: tuple[str, ...]) -> np.ndarray:
    return np.array([UNITS[unit] for unit in units])


def _wrong_encoding(seen: str, camera: Camera) -> str:
    reason = ''
    if seen not in CHANNELS:
        reason = (
            ', and only 8-bit rgb8, bgr8 and mono8 can be read: depth or raw sensor values are no '
            'colours, and scaling them to 8 bit would guess a range'
        )
    return (
        f'camera {camera.name!r}: encoding is {seen!r}; the contract says '
        f'{camera.encoding!r}{reason}'
    )


def _check_size(width: int, height: int, camera: Camera) -> None:
    if (width, height) != (camera.width, camera.height):
        raise DecodeError(
            'size',
            f'camera {camera.name!r}: size is {width}x{height}; the contract says '
            f'{camera.width}x{camera.height}'
        )


def _check_compressed(message: Any, encoding: str, who: str) -> None:
    words = message.format.lower().replace('jpg', 'jpeg')
    if encoding not in words:
        sentence = f'{who}: format is {message.format!r}; the contract says {encoding!r}'
        raise DecodeError('encoding', sentence)
    start = bytes(message.data[:4])
    if not start.startswith(SIGNATURES[encoding]):
        raise DecodeError('encoding', f'{who}: data starts with {start!r}, which is no {encoding}')


def _decompress(message: Any, camera: Camera) -> np.ndarray:
    """Return (height, width, 3) BGR."""
    cv2 = _cv2()
    if cv2 is None:
        raise DecodeError(
            'encoding',
            f'camera {camera.name!r}: {camera.encoding} needs cv2, which is not installed; '
            'install opencv-python, or use a raw topic in the contract'
        )
    # A rotation that a camera writes beside the picture is not what a robot was trained on.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(message.data, np.uint8), flags)
    if pixels is None:
        sentence = f'camera {camera.name!r}: this {camera.encoding} cannot be decoded'
        raise DecodeError('data', sentence)
    return pixels


def _to_rgb(pixels: np.ndarray, encoding: str) -> np.ndarray:
    if encoding == 'rgb8':
        return pixels
    if encoding == 'mono8':
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return pixels[:, :, ::-1]


@functools.lru_cache(maxsize=1)
def _cv2() -> Any:
    try:
        return importlib.import_module('cv2')
    except ImportError:
        return None


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample (rows, columns, channels) by area to (height, width, channels)."""
    cv2 = _cv2()
    if cv2 is None:
        return area_resize(pixels, height, width)
    found = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA)
    return found.reshape(height, width, pixels.shape[2])


def area_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample by area in numpy: each new pixel is the mean of the old ones that it covers."""
    rows, columns = _cover(pixels.shape[0], height), _cover(pixels.shape[1], width)
    found = np.einsum('yr,rcd,xc->yxd', rows, pixels.astype(np.float32), columns, optimize=True)
    return np.rint(found).astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _cover(old: int, new: int) -> np.ndarray:
    """Return (new, old) shares of each old pixel in each new one; rows sum to 1."""
    edges = np.arange(new + 1) * (old / new)
    left = np.maximum(edges[:-1, None], np.arange(old)[None])
    right = np.minimum(edges[1:, None], np.arange(1, old + 1)[None])
    return (np.clip(right - left, 0, None) / (old / new)).astype(np.float32)
