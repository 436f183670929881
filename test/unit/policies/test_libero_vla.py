# SPDX-License-Identifier: Apache-2.0
"""The network against its plain form, and what quantization and training rely on."""

import copy

import plain_vla
import pytest
import torch
from tiny_vla import TINY, random_net

from quantvla_ros.policies import flow
from quantvla_ros.policies.libero_vla import HEAD_WIDTH, AttentionCore, LiberoVlaNet, VlaConfig


def inputs(batch=2, config=TINY, dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    size = (batch, config.views, 3, config.image, config.image)
    images = torch.rand(size, generator=g, dtype=dtype) * 2 - 1
    words = torch.randint(0, config.vocabulary, (batch, config.words), generator=g)
    state = torch.randn(batch, config.state, generator=g, dtype=dtype)
    noise = torch.randn(batch, config.chunk, config.action, generator=g, dtype=dtype)
    return images, words, state, noise


def fast_chunk(net, images, words, state, noise, steps):
    context = net.prefix(images, words, state)
    table = net.modulation(torch.tensor(flow.flow_times(steps)))
    return flow.denoise(lambda x, i: net.velocity(context, x, table[i : i + 1]), noise, steps)


def test_savings_equal_the_plain_form_in_float64():
    net = random_net().double()
    for attention in (m for m in net.modules() if getattr(m, 'table', None) is not None):
        tokens = attention.table.shape[1]  # float32 tables would hide an error of 1e-8
        angle = torch.arange(tokens).double()[:, None] * 10000.0 ** (
            -torch.arange(0, HEAD_WIDTH, 2).double() / HEAD_WIDTH
        )
        exact = torch.stack([
            torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)
        ])
        assert torch.allclose(attention.table, exact, atol=1e-5)
        attention.table = exact
    images, words, state, noise = inputs()
    fast = fast_chunk(net, images, words, state, noise, steps=3)
    plain = plain_vla.chunk(net, images, words, state, noise, steps=3)
    assert (plain - noise).abs().max() > 0.1, 'the network must move the noise to prove anything'
    assert (fast - plain).abs().max() < 1e-6  # time features are float32 in both


def test_one_row_of_a_batch_equals_the_row_alone():
    net = random_net().double()
    images, words, state, noise = inputs(batch=3)
    together = fast_chunk(net, images, words, state, noise, steps=2)
    alone = fast_chunk(net, images[1:2], words[1:2], state[1:2], noise[1:2], steps=2)
    assert (together[1:2] - alone).abs().max() < 1e-12


def test_repeated_context_serves_several_noise_draws():
    net = random_net().double()
    images, words, state, _ = inputs()
    noise = torch.randn(6, TINY.chunk, TINY.action, dtype=torch.float64)
    time = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 0.9])
    shared = net.velocity(
        net.prefix(images, words, state).repeat(3), noise, net.modulation(time)
    )
    context = net.prefix(images[1:], words[1:], state[1:])
    one = net.velocity(context, noise[4:5], net.modulation(time[4:5]))
    assert (shared[4:5] - one).abs().max() < 1e-12


def test_training_gradients_reach_every_weight():
    net = random_net().requires_grad_(True)
    images, words, state, noise = inputs(dtype=torch.float32)
    context = net.prefix(images, words, state)
    time = torch.tensor([0.3, 0.7])
    net.velocity(context, noise, net.modulation(time)).square().sum().backward()
    without = [name for name, weight in net.named_parameters() if weight.grad is None]
    assert without == []


def test_start_values_give_zero_velocity():
    net = LiberoVlaNet(TINY)
    images, words, state, noise = inputs(dtype=torch.float32)
    v = net.velocity(net.prefix(images, words, state), noise, net.modulation(torch.zeros(2)))
    assert torch.count_nonzero(v) == 0


def test_any_linear_can_be_replaced_by_name():
    net = random_net()
    images, words, state, noise = inputs(dtype=torch.float32)
    before = fast_chunk(net, images, words, state, noise, steps=2)
    linears = [n for n, m in net.named_modules() if type(m) is torch.nn.Linear]
    for name in linears:
        changed = copy.deepcopy(net)
        parent, _, child = name.rpartition('.')
        new = copy.deepcopy(changed.get_submodule(name))
        new.weight.mul_(0.5)
        setattr(changed.get_submodule(parent), child, new)
        after = fast_chunk(changed, images, words, state, noise, steps=2)
        assert not torch.equal(before, after), f'{name} is not used through its module'


def test_scaling_query_rows_scales_that_heads_logits():
    """What folding an attention temperature into q_proj relies on."""
    net = random_net().double()
    seen = {}
    block = net.action.blocks[0].cross
    block.core.register_forward_hook(lambda m, args, out: seen.update(q=args[0]))
    images, words, state, noise = inputs()

    def queries():
        fast_chunk(net, images, words, state, noise, steps=1)
        return seen['q'].clone()

    before = queries()
    block.q_proj.weight[HEAD_WIDTH : 2 * HEAD_WIDTH] *= 1.25
    after = queries()
    assert torch.allclose(after[:, 1], before[:, 1] * 1.25)
    assert torch.equal(after[:, 0], before[:, 0])


def test_attention_core_shares_keys_as_repeating_them_would():
    q, k, v = torch.randn(2, 6, 5, 64), torch.randn(2, 2, 7, 64), torch.randn(2, 2, 7, 64)
    shared = AttentionCore()(q, k, v)
    repeated = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    )
    assert torch.allclose(shared, repeated, atol=1e-6)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'width': 500}, 'width is 500; expected a multiple of 64'),
        ({'layers': 0}, 'layers is 0; expected a whole number above zero'),
        ({'image': 100}, 'image is 100; expected a multiple of 16'),
        ({'heads': 4}, 'heads must be width / 64'),
        ({'kv_heads': 3}, 'kv_heads must divide heads'),
    ],
)
def test_bad_architecture_is_refused_with_the_value(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        VlaConfig(**change)
