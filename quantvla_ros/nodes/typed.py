# SPDX-License-Identifier: Apache-2.0
"""Find a message class by the name of its type. Knows no topic."""

from __future__ import annotations

import importlib
from typing import Any


def message_class(name: str) -> Any:
    """Return the class of a type such as 'sensor_msgs/msg/Image'."""
    package, kind, message = name.split('/')
    return getattr(importlib.import_module(f'{package}.{kind}'), message)
