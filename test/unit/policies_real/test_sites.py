# SPDX-License-Identifier: Apache-2.0
"""The values through which policies tell quantization what they are made of."""

import pytest

from quantvla_ros.quant.sites import AttentionSite, LinearSite, PolicySites

Q = LinearSite('block.0.q', 'action_attention', 8, 8, False)
O = LinearSite('block.0.o', 'action_attention', 8, 8, True)  # noqa: E741


def attention(**changes):
    values = {'name': 'block.0', 'q': 'block.0.q', 'o': 'block.0.o', 'heads': 2, 'head_dim': 4,
              'alpha_foldable': True, 'beta_foldable': True, **changes}
    return AttentionSite(**values)


def test_a_linear_counts_its_bias():
    assert Q.parameters == 64
    assert O.parameters == 72


def test_an_unknown_group_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match='known are vision'):
        LinearSite('x', 'attention', 8, 8, False)


def test_a_site_that_cannot_be_folded_says_why():
    with pytest.raises(ValueError, match='say why'):
        attention(alpha_foldable=False)


def test_a_name_that_appears_twice_is_refused():
    with pytest.raises(ValueError, match='twice'):
        PolicySites((Q, Q), (), ())


def test_an_attention_site_must_lead_to_linears():
    with pytest.raises(ValueError, match='not one of the linears'):
        PolicySites((Q,), (attention(),), ())


def test_sites_are_chosen_by_group_and_by_block():
    sites = PolicySites((Q, O), (attention(),), ('block.0',))
    assert sites.in_groups(['action_attention']) == (Q, O)
    assert sites.in_block('block.0') == (Q, O)
    assert sites.in_block('block') == (Q, O)
    assert sites.in_groups(['vision']) == ()
    with pytest.raises(ValueError, match='unknown group'):
        sites.in_groups(['dit'])
