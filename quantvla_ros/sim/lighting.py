# SPDX-License-Identifier: Apache-2.0
"""Another light and a worse camera: what makes a calibration of yesterday wrong today.

Scales the scene's own lights and their colour, so that surfaces shade and saturate as they do
under the scene's light, and adds noise to the picture that only seed, camera, state and time
decide. The default changes not a single bit. Knows no robot and no task.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

WARMTH_GAIN = 0.4  # of red, and the loss of blue, at warmth 1
DARK_SHARE = 0.3  # of the noise that black pixels have: the rest grows with the root of light


@dataclass(frozen=True)
class Lighting:
    """How a scene is lit and seen.

    light: factor of all lights, 0 to 3. warmth: -1 bluish to 1 reddish. noise: standard deviation
    in grey values (0 to 255) at white. seed: of the noise.
    """

    light: float = 1.0
    warmth: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.light <= 3 and -1 <= self.warmth <= 1 and 0 <= self.noise <= 100):
            raise ValueError(
                f'light is {self.light:g}, warmth {self.warmth:g}, noise {self.noise:g}; expected '
                '0 to 3, -1 to 1 and 0 to 100'
            )

    @property
    def colour(self) -> np.ndarray:
        """Return (3,) factors of red, green and blue light."""
        return self.light * np.array(
            [1 + WARMTH_GAIN * self.warmth, 1.0, 1 - WARMTH_GAIN * self.warmth])

    def sense(self, picture: np.ndarray, camera: str, data: Any) -> np.ndarray:
        """Return what a noisy sensor makes of a (height, width, 3) uint8 picture of MjData."""
        if not self.noise:
            return picture
        key = hashlib.sha256(f'{self.seed} {camera} {data.time!r}'.encode() + data.qpos.tobytes())
        words = np.frombuffer(key.digest()[:16], '<u8')
        random = np.random.Generator(np.random.Philox(key=words))
        bright = picture.astype(np.float32)
        spread = self.noise * np.sqrt(DARK_SHARE**2 + (1 - DARK_SHARE**2) * bright / 255.0)
        noise = random.standard_normal(picture.shape, np.float32)
        return np.rint(bright + spread * noise).clip(0, 255).astype(np.uint8)


DAY = Lighting()
LIGHTINGS = {
    'day': DAY,
    'overcast': Lighting(light=0.75, warmth=-0.4, noise=3.0),
    'lamp': Lighting(light=0.6, warmth=0.8, noise=6.0),
    'night': Lighting(light=0.3, warmth=0.3, noise=12.0),
}


def parse_lighting(text: str) -> Lighting:
    """Read a name, numbers such as 'light=0.5,noise=4', or both: 'night,noise=2'.

    Raises ValueError that says what is allowed.
    """
    known = [item.name for item in fields(Lighting)]
    values: dict[str, float] = {}
    for part in filter(None, (word.strip() for word in text.split(','))):
        name, equals, number = part.partition('=')
        if not equals and name in LIGHTINGS:
            values.update({item: getattr(LIGHTINGS[name], item) for item in known})
            continue
        try:
            if name not in known:
                raise ValueError(name)
            values[name] = float(number)
        except ValueError:
            raise ValueError(
                f'lighting {text!r}: {part!r} is neither {", ".join(LIGHTINGS)} nor a number for '
                f'{", ".join(known)}, as in light=0.5,noise=4'
            ) from None
    seed = int(values.pop('seed', 0))
    return Lighting(seed=seed, **values)


class SceneLights:
    """The lights of one MuJoCo model: remembers them as they were and sets them anew."""

    NAMES = ('light_ambient', 'light_diffuse', 'light_specular')
    HEAD = ('ambient', 'diffuse', 'specular')

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lights = {name: getattr(model, name).copy() for name in self.NAMES}
        self._head = {name: getattr(model.vis.headlight, name).copy() for name in self.HEAD}

    def set(self, lighting: Lighting) -> None:
        """Light the scene; what it was lit by before does not matter."""
        for name, values in self._lights.items():
            getattr(self._model, name)[:] = values * lighting.colour
        for name, values in self._head.items():
            getattr(self._model.vis.headlight, name)[:] = values * lighting.colour
