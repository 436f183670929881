# SPDX-License-Identifier: Apache-2.0
"""Textures that were scaled down look to MuJoCo like the originals."""

import re

import numpy as np
import pytest

from quantvla_ros.sim.packing import shrink_png
from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.scenes import MAX_TEXTURE, load_scene

pytestmark = pytest.mark.sim


def as_mujoco_reads(content):
    """Return (mean of each colour, colour space) of a picture."""
    xml = '<mujoco><asset><texture type="2d" file="t.png"/></asset></mujoco>'
    model = mujoco.MjModel.from_xml_string(xml, {'t.png': content})
    return model.tex_data.reshape(-1, 3).mean(0), int(model.tex_colorspace[0])


def large_textures():
    """Every texture of two scenes that is larger than the edge they are scaled to, by name."""
    found = {}
    for suite, task in (('libero_object', 2), ('libero_goal', 0)):
        scene = load_scene(suite, task, 0)
        for tag in re.findall(r'<texture[^>]*>', (scene.folder / 'scene.xml').read_text()):
            name, file = re.search(r' name="([^"]+)"', tag), re.search(r'file="([^"]+\.png)"', tag)
            if name and file:
                found[name[1]] = (scene.folder / file[1]).resolve()
    return found


def test_scaled_textures_keep_mean_brightness_and_colour_space():
    changed = 0
    for name, path in large_textures().items():
        small = shrink_png(path, MAX_TEXTURE)
        changed += small != path.read_bytes()
        mean, space = as_mujoco_reads(path.read_bytes())
        small_mean, small_space = as_mujoco_reads(small)
        assert small_space == space, name
        assert np.abs(small_mean - mean).max() < 1.0, name  # of 255; sharpening clips a little
    assert changed >= 10
