# SPDX-License-Identifier: Apache-2.0
"""A network of two residual blocks with an outlier channel, its sites, and frames to run."""

import torch
from torch import nn

from quantvla_ros.quant.sites import LinearSite, PolicySites

WIDTH, HIDDEN = 64, 128


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down_proj(torch.nn.functional.gelu(self.up(x)))


class ToyNet(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        self.leave = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            for block in self.blocks:  # one hidden channel is 30 times the others
                block.up.weight[5] *= 30
                block.down_proj.weight[:, 5] /= 30
        self.eval().requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def toy_sites(net):
    groups = {'blocks.0': 'backbone_mlp', 'blocks.1': 'action_mlp', 'leave': 'head'}
    linears = tuple(
        LinearSite(name, groups['.'.join(name.split('.')[:2])], module.in_features,
                   module.out_features, module.bias is not None)
        for name, module in net.named_modules() if isinstance(module, nn.Linear)
    )
    return PolicySites(linears, (), ('blocks.0', 'blocks.1'))


def frames(count=6, tokens=40, seed=1):
    return torch.randn(count, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def runner(net, x=None):
    x = frames() if x is None else x

    def run():
        for frame in x:
            net(frame)

    return run


def directions(net, x=None, seed=2):
    """Random directions of the output, one for each frame."""
    x = frames() if x is None else x
    drawn = torch.Generator().manual_seed(seed)

    def loss(frame, r):
        return lambda: (net(frame) * r).sum()

    return [loss(f, torch.randn(len(f), 3, generator=drawn)) for f in x]
