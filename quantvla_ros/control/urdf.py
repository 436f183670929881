# SPDX-License-Identifier: Apache-2.0
"""Read joint limits from a robot description. Knows no YAML and applies no limit.

The text comes from a topic, so it is not trusted: document types and entities are refused before
anything is parsed, nothing outside the text is opened, and its size is bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.etree import ElementTree

MAX_CHARACTERS = 16_000_000
MOVING = ('revolute', 'continuous', 'prismatic')


@dataclass(frozen=True)
class Limit:
    """What one joint may do, in SI; infinite where the robot gives no figure.

    prismatic: the joint slides, so lengths are in m and not in rad.
    """

    lower: float = -math.inf
    upper: float = math.inf
    velocity: float = math.inf
    acceleration: float = math.inf
    prismatic: bool = False


def _number(joint: str, element: ElementTree.Element, key: str, missing: float) -> float:
    text = element.get(key)
    if text is None:
        return missing
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f'joint {joint!r}: {element.tag} {key} is {text!r}; expected a number')
    return value


def _limit(joint: str, kind: str, element: ElementTree.Element) -> Limit:
    limit, soft = element.find('limit'), element.find('safety_controller')
    lower, upper, velocity = -math.inf, math.inf, math.inf
    if limit is not None:
        if kind != 'continuous':
            # the format's default for one missing end is 0; with both missing there is no limit
            both_missing = limit.get('lower') is None and limit.get('upper') is None
            lower = _number(joint, limit, 'lower', -math.inf if both_missing else 0.0)
            upper = _number(joint, limit, 'upper', math.inf if both_missing else 0.0)
        velocity = _number(joint, limit, 'velocity', math.inf)
    if soft is not None and kind != 'continuous':
        lower = max(lower, _number(joint, soft, 'soft_lower_limit', -math.inf))
        upper = min(upper, _number(joint, soft, 'soft_upper_limit', math.inf))
    if lower >= upper:
        raise ValueError(
            f'joint {joint!r} may move from {lower:g} to {upper:g}; '
            'expected a lower limit below the upper one'
        )
    if velocity < 0:
        raise ValueError(f'joint {joint!r}: limit velocity is {velocity:g}; expected above 0')
    # a velocity of 0 is how exporters write "not known": it must not pass for a limit
    return Limit(lower, upper, velocity or math.inf, math.inf, kind == 'prismatic')


def read_urdf_limits(description: str) -> dict[str, Limit]:
    """Return the limits of every joint that can be commanded; fixed and mimic joints are left out.

    Soft limits of a <safety_controller> tighten the hard ones. Raises ValueError with a sentence
    when the text is not a URDF, holds a document type, or names impossible limits.
    """
    if len(description) > MAX_CHARACTERS:
        raise ValueError(
            f'robot description has {len(description)} characters; at most {MAX_CHARACTERS}'
        )
    if '<!' in description.replace('<!--', ''):
        raise ValueError('robot description holds a document type or CDATA; expected plain URDF')
    try:
        robot = ElementTree.fromstring(description)
    except ElementTree.ParseError as error:
        raise ValueError(f'robot description is not XML: {error}') from error
    if robot.tag != 'robot':
        raise ValueError(f'robot description starts with <{robot.tag}>; expected <robot>')
    limits: dict[str, Limit] = {}
    for element in robot.findall('joint'):
        name, kind = element.get('name', ''), element.get('type', '')
        if kind not in MOVING or element.find('mimic') is not None:
            continue
        if name in limits:
            raise ValueError(f'joint {name!r} appears twice in the robot description')
        limits[name] = _limit(name, kind, element)
    return limits
