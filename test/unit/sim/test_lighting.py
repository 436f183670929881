# SPDX-License-Identifier: Apache-2.0
"""lighting.py without a renderer: words, numbers, noise."""

from types import SimpleNamespace

import numpy as np
import pytest

from quantvla_ros.sim.lighting import DAY, LIGHTINGS, Lighting, parse_lighting
from quantvla_ros.sim.parameters import SIM_NODE, problems


def state(time=1.0, place=0.5):
    return SimpleNamespace(time=time, qpos=np.full(3, place))


def grey(value):
    return np.full((64, 64, 3), value, np.uint8)


def test_names_and_numbers_are_read_and_the_later_word_wins():
    assert parse_lighting('') == parse_lighting('day') == DAY
    assert parse_lighting('night') == LIGHTINGS['night']
    assert parse_lighting('light=0.5, noise=4,seed=3') == Lighting(0.5, 0.0, 4.0, 3)
    assert parse_lighting('night,noise=2') == Lighting(0.3, 0.3, 2.0)


@pytest.mark.parametrize('words', ['noon', 'light', 'light=bright', 'flash=1'])
def test_unknown_words_are_refused_with_those_there_are(words):
    with pytest.raises(ValueError, match='neither day, overcast, lamp, night nor a number for '
                                         'light, warmth, noise, seed'):
        parse_lighting(words)


@pytest.mark.parametrize('words', ['light=4', 'light=nan', 'warmth=-2', 'noise=-1'])
def test_numbers_out_of_range_are_refused(words):
    with pytest.raises(ValueError, match='expected 0 to 3, -1 to 1 and 0 to 100'):
        parse_lighting(words)


def test_the_node_refuses_a_lighting_it_does_not_know():
    values = {item.name: item.default for item in SIM_NODE}
    assert 'noon' in problems({**values, 'lighting': 'noon'})[0]


def test_without_noise_the_picture_is_the_same_array():
    picture = grey(100)
    assert Lighting(light=0.5).sense(picture, 'wrist', state()) is picture


def test_noise_has_the_spread_it_says_and_less_in_the_dark():
    noisy = Lighting(noise=10.0)
    assert noisy.sense(grey(200), 'a', state()).std() == pytest.approx(9.0, abs=0.3)
    assert noisy.sense(grey(20), 'a', state()).std() == pytest.approx(4.0, abs=0.3)


def test_noise_follows_from_seed_camera_state_and_time_alone():
    noisy, picture = Lighting(noise=5.0), grey(128)
    first = noisy.sense(picture, 'a', state())
    assert np.array_equal(first, noisy.sense(picture, 'a', state()))
    others = [noisy.sense(picture, 'b', state()), noisy.sense(picture, 'a', state(time=2.0)),
              noisy.sense(picture, 'a', state(place=0.6)),
              Lighting(noise=5.0, seed=1).sense(picture, 'a', state())]
    assert not any(np.array_equal(first, other) for other in others)


def test_warm_light_has_more_red_and_less_blue():
    red, green, blue = Lighting(light=0.5, warmth=1.0).colour
    assert red > green > blue
    assert green == 0.5
