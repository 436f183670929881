# SPDX-License-Identifier: Apache-2.0
"""What the robot description says, and that the contract may only tighten it."""

import math

import pytest

from quantvla_ros.contract import JointLimits
from quantvla_ros.control.limits import JointLimiter, merge_limits
from quantvla_ros.control.urdf import MAX_CHARACTERS, Limit, read_urdf_limits

ROBOT = """<?xml version="1.0" encoding="utf-8"?>
<robot name="arm">
  <!-- a comment is welcome -->
  <joint name="base" type="fixed"/>
  <joint name="elbow" type="revolute">
    <limit lower="-1.5" upper="2.0" velocity="2.0" effort="80"/>
    <safety_controller soft_lower_limit="-1.2" soft_upper_limit="2.5" k_velocity="10"/>
  </joint>
  <joint name="wheel" type="continuous"><limit velocity="5" effort="1"/></joint>
  <joint name="finger" type="prismatic">
    <limit lower="0" upper="0.04" velocity="0.2" effort="20"/>
  </joint>
  <joint name="finger2" type="prismatic">
    <limit lower="0" upper="0.04" velocity="0.2" effort="20"/><mimic joint="finger"/>
  </joint>
</robot>"""


def joint(inner, kind='revolute'):
    return f'<robot><joint name="a" type="{kind}">{inner}</joint></robot>'


def test_soft_limits_tighten_hard_ones_and_never_loosen_them():
    elbow = read_urdf_limits(ROBOT)['elbow']
    assert (elbow.lower, elbow.upper, elbow.velocity) == (-1.2, 2.0, 2.0)


def test_fixed_and_mimic_joints_are_left_out():
    assert set(read_urdf_limits(ROBOT)) == {'elbow', 'wheel', 'finger'}


def test_continuous_joint_has_no_position_limit():
    wheel = read_urdf_limits(ROBOT)['wheel']
    assert (wheel.lower, wheel.upper, wheel.velocity) == (-math.inf, math.inf, 5.0)


def test_prismatic_joint_is_known_to_slide():
    limits = read_urdf_limits(ROBOT)
    assert limits['finger'].prismatic and not limits['elbow'].prismatic


def test_velocity_zero_counts_as_not_known():
    text = joint('<limit lower="-1" upper="1" velocity="0" effort="1"/>')
    assert read_urdf_limits(text)['a'].velocity == math.inf


def test_one_missing_end_is_zero_as_the_format_says():
    limit = read_urdf_limits(joint('<limit upper="1" velocity="1" effort="1"/>'))['a']
    assert (limit.lower, limit.upper) == (0.0, 1.0)


def test_joint_without_limit_element_has_no_limits():
    limit = read_urdf_limits(joint(''))['a']
    assert (limit.lower, limit.upper, limit.velocity) == (-math.inf, math.inf, math.inf)


@pytest.mark.parametrize(
    ('text', 'word'),
    [
        ('not xml', 'not XML'),
        ('<model/>', 'expected <robot>'),
        (joint('<limit lower="2" upper="1" velocity="1"/>'), 'below the upper'),
        (joint('<limit lower="x" upper="1" velocity="1"/>'), "lower is 'x'"),
        (joint('<limit lower="nan" upper="1" velocity="1"/>'), "lower is 'nan'"),
        (joint('<limit lower="-inf" upper="1" velocity="1"/>'), "lower is '-inf'"),
        (joint('<limit lower="0" upper="1" velocity="-1"/>'), 'expected above 0'),
        (f'<robot>{joint("")[7:-8] * 2}</robot>', 'twice'),
        (' ' * (MAX_CHARACTERS + 1), 'at most'),
    ],
)
def test_impossible_description_is_refused_with_a_sentence(text, word):
    with pytest.raises(ValueError, match=word.replace('(', r'\(')):
        read_urdf_limits(text)


@pytest.mark.parametrize(
    'head',
    [
        '<!DOCTYPE robot [<!ENTITY a SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE robot [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>',
        '<!-- hides --><!DOCTYPE robot>',
    ],
)
def test_document_types_and_entities_are_refused_before_parsing(head):
    with pytest.raises(ValueError, match='document type'):
        read_urdf_limits(head + '<robot name="&a;"/>')


def test_contract_may_tighten():
    tighter = {'elbow': JointLimits(lower=-1.0, velocity=1.0, acceleration=3.0)}
    limit = merge_limits(['elbow'], read_urdf_limits(ROBOT), tighter)['elbow']
    assert (limit.lower, limit.upper, limit.velocity, limit.acceleration) == (-1.0, 2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ('looser', 'word'),
    [
        (JointLimits(lower=-1.3), 'lower is -1.3, looser than the -1.2'),
        (JointLimits(upper=2.1), 'upper is 2.1, looser than the 2'),
        (JointLimits(velocity=2.1), 'velocity is 2.1, looser'),
        (JointLimits(upper=-1.2), 'no room'),
    ],
)
def test_contract_may_not_loosen(looser, word):
    with pytest.raises(ValueError, match=word):
        merge_limits(['elbow'], read_urdf_limits(ROBOT), {'elbow': looser})


def test_default_acceleration_depends_on_turning_or_sliding():
    merged = merge_limits(['elbow', 'finger'], read_urdf_limits(ROBOT), {})
    assert (merged['elbow'].acceleration, merged['finger'].acceleration) == (10.0, 2.0)


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError) as error:
        merge_limits(
            ['elbow', 'knee'], read_urdf_limits(ROBOT),
            {'elbow': JointLimits(velocity=9.0), 'nose': JointLimits()},
        )
    for word in ('knee', 'nose', 'velocity is 9'):
        assert word in str(error.value)


def test_limiter_refuses_a_joint_without_position_limit():
    with pytest.raises(ValueError, match="'wheel' has no lower position and no upper position"):
        JointLimiter.from_description(['wheel'], ROBOT)


def test_limiter_refuses_a_joint_without_velocity_limit():
    with pytest.raises(ValueError, match="'a' has no velocity limit"):
        JointLimiter({'a': Limit(-1, 1, acceleration=1)})


def test_unlimited_joint_passes_only_by_name():
    limiter = JointLimiter.from_description(['wheel'], ROBOT, allow_unlimited=True)
    assert limiter.upper[0] == math.inf


def test_contract_can_give_the_limits_that_the_description_lacks():
    own = {'wheel': JointLimits(lower=-3.0, upper=3.0)}
    limiter = JointLimiter.from_description(['wheel'], ROBOT, own)
    assert (limiter.lower[0], limiter.upper[0], limiter.velocity[0]) == (-3.0, 3.0, 5.0)


@pytest.mark.parametrize(
    'limits',
    [{}, {'a': Limit(1, 1, 1, 1)}, {'a': Limit(-1, 1, 0, 1)}, {'a': Limit(-1, 1, 1)},
     {'a': Limit(math.nan, 1, 1, 1)}, {'a': Limit(-1, 1, math.nan, 1)}],
)
def test_limiter_refuses_impossible_limits_even_when_unlimited_is_allowed(limits):
    with pytest.raises(ValueError, match='joint'):
        JointLimiter(limits, allow_unlimited=True)


@pytest.mark.parametrize('scale', [-0.1, 1.1, math.nan])
def test_speed_scale_outside_0_to_1_is_refused(scale):
    limiter = JointLimiter({'a': Limit(-1, 1, 1, 1)})
    with pytest.raises(ValueError, match='expected 0 to 1'):
        limiter.speed_scale = scale


def test_snap_joint_must_be_commanded_and_lead_must_be_positive():
    with pytest.raises(ValueError, match="snap_joints names \\['b'\\]"):
        JointLimiter({'a': Limit(-1, 1, 1, 1)}, snap_joints=('b',))
    with pytest.raises(ValueError, match='lead is'):
        JointLimiter({'a': Limit(-1, 1, 1, 1)}, lead_rad=0.0)
