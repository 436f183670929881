# SPDX-License-Identifier: Apache-2.0
"""Bytes of a bag -> message-like objects: by rosbags, or by rclpy where only that is there.

The five message types of a contract are the same in every ROS 2 distribution, so that the
definitions in a bag are not needed and not trusted.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

Decode = Callable[[bytes, str], Any]


@functools.lru_cache(maxsize=1)
def reader_of() -> Decode:
    """Return decode(data, type) -> message. It raises ValueError for bytes that are no message."""
    try:
        typesys = importlib.import_module('rosbags.typesys')
    except ImportError:
        return _by_rclpy
    store = typesys.get_typestore(typesys.Stores.ROS2_JAZZY)

    def decode(data: bytes, kind: str) -> Any:
        try:
            return store.deserialize_cdr(data, kind)
        except Exception as error:  # of a foreign library: the bytes are no message of this type
            raise ValueError(f'no {kind}: {error}') from error

    return decode


def _by_rclpy(data: bytes, kind: str) -> Any:
    package, _, name = kind.partition('/msg/')
    module = importlib.import_module(f'{package}.msg')
    serialization = importlib.import_module('rclpy.serialization')
    try:
        return serialization.deserialize_message(data, getattr(module, name))
    except Exception as error:  # of a foreign library: the bytes are no message of this type
        raise ValueError(f'no {kind}: {error}') from error
