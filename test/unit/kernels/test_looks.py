# SPDX-License-Identifier: Apache-2.0
"""Looks into the shipped network: the same chunk, and the figures that hooks find as well."""

import pytest
import torch
from test_libero_program import STEPS, chunk, eight_bits, inputs, plain
from test_libero_program import net as net  # a fixture

from quantvla_ros.policies.libero_looks import Seen, hooked, largest_spread
from quantvla_ros.policies.libero_parts import Part
from quantvla_ros.policies.libero_program import ChunkProgram

OUTSIDE = ('backbone.state', 'action.state', 'action.time_in', 'action.time_out')


@pytest.fixture(scope='module')
def looked(net):
    """A chunk, the same chunk looked into at every step, and what was seen; and the hooks'."""
    torch.manual_seed(3)
    program = ChunkProgram(net, lambda m: Part(eight_bits('', m), m.bias), STEPS)
    given = inputs()
    blind, seen, hooks = chunk(program, given), Seen(), Seen()
    for step in range(STEPS):
        program.see = (seen.add, step)
        shown = chunk(program, given)
        assert torch.equal(shown, blind), 'looking changes nothing'
    program.see = None
    with hooked(net, hooks):
        plain(net, *given)
    return seen, hooks


def test_every_recorded_linear_is_seen_by_its_name(looked):
    seen, hooks = looked
    assert set(seen.inputs) == set(hooks.inputs) - set(OUTSIDE)


def test_inputs_are_as_large_as_the_hooks_say(looked):
    seen, hooks = looked
    for name, value in seen.inputs.items():  # on integers, so not the same to the last bit
        assert value == pytest.approx(hooks.inputs[name], rel=0.1), name


def test_spreads_are_those_of_the_action_heads_logits(looked):
    seen, hooks = looked
    assert set(seen.spreads) == {name for name in hooks.spreads if name.startswith('action.')}
    for name, value in seen.spreads.items():
        assert value == pytest.approx(hooks.spreads[name], rel=0.1), name


def test_spread_is_the_largest_standard_deviation_of_a_head():
    q, k = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 7, 32)
    logits = [(q[0, h] @ k[0, h // 2].T / 32**0.5).flatten() for h in range(4)]
    expected = max(float(x.std(unbiased=False)) for x in logits)
    assert largest_spread(q, k) == pytest.approx(expected, rel=1e-5)
