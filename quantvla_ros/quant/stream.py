# SPDX-License-Identifier: Apache-2.0
"""Quantize a network that does not fit the memory: its float weights stay on disk.

In memory are the packed layers so far, one float block, and that block's statistics. Linears that
wait for their turn are PagedLinear: each is read when it runs and let go behind it. Knows no file
format and no policy: `read(name)` returns a stored tensor, `take(name, layer)` keeps a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.kernels.weights import stack
from quantvla_ros.quant.convert import (
    Progress,
    block_order,
    layer_scheme,
    quantize_linear,
    recipe_layout,
)
from quantvla_ros.quant.linear import Make, QuantizedLayer, QuantLinear, replace_linears
from quantvla_ros.quant.observe import InputStatistics, observe
from quantvla_ros.quant.pack import packed
from quantvla_ros.quant.recipes import Recipe
from quantvla_ros.quant.rounding import round_nearest
from quantvla_ros.quant.scheme import Scheme
from quantvla_ros.quant.sites import ACTION, PolicySites

Read = Callable[[str], Tensor]
Take = Callable[[str, QuantizedLayer], None]
NUMBERS = 1 << 23  # of a weight in float32 at once while it is rounded: 32 MiB
LOOPED = (*ACTION, 'modulation', 'head')  # groups that run again and again within one chunk


class PagedLinear(nn.Linear):
    """A linear whose weight is read for each call and let go after it: exact, and slow."""

    def __init__(self, name: str, old: nn.Linear, read: Read, dtype: torch.dtype) -> None:
        super().__init__(old.in_features, old.out_features, old.bias is not None, device='meta')
        self._name, self._read, self._dtype = name, read, dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PagedLinear:
        """Nothing of it is in memory, so that a network's .to() leaves it alone."""
        return self

    def fetch(self, device: torch.device | str = 'cpu') -> tuple[Tensor, Tensor | None]:
        """Read weight and bias."""
        weight = self._read(f'{self._name}.weight').to(device, self._dtype).contiguous()
        if self.bias is None:
            return weight, None
        return weight, self._read(f'{self._name}.bias').to(device, self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, *self.fetch(x.device))


def page(
    net: nn.Module, names: Iterable[str], read: Read, dtype: torch.dtype = torch.float32
) -> None:
    """Leave the weights of some linears on disk."""
    for name in names:
        old = net.get_submodule(name)
        assert isinstance(old, nn.Linear)
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child, PagedLinear(name, old, read, dtype))


def hold(net: nn.Module, names: Iterable[str]) -> None:
    """Bring some paged linears into memory, as plain ones."""
    for name in names:
        paged = net.get_submodule(name)
        if isinstance(paged, PagedLinear):
            parent, _, child = name.rpartition('.')
            setattr(net.get_submodule(parent), child, _plain(paged))


def _plain(paged: PagedLinear) -> nn.Linear:
    with torch.device('meta'):
        linear = nn.Linear(paged.in_features, paged.out_features, paged.bias is not None)
    weight, bias = paged.fetch()
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def nearest_layer(
    recipe: Recipe, weight: Tensor, bias: Tensor | None, scheme: Scheme
) -> QuantizedLayer:
    """Round a stored weight to nearest, a few rows in float at a time.

    The same layer as quantize_linear makes of a recipe that needs no frames.
    """
    with torch.device('meta'):
        unseen = InputStatistics(weight.shape[1])
    scheme = layer_scheme(recipe, scheme, unseen)
    bits, granularity = scheme.weight_bits, scheme.weight
    parts = []
    for rows in weight.split(max(1, NUMBERS // weight.shape[1])):
        rounded = round_nearest(rows.float(), bits, granularity)
        parts.append(packed(rounded.codes, rounded.scale, bits, granularity))
    return QuantizedLayer(scheme, stack(parts), None if bias is None else bias.float())


def check_recipe(recipe: Recipe, *, frames: bool) -> None:
    """Raise ValueError with a sentence for a recipe that cannot be streamed."""
    if recipe.needs_gradients:
        raise ValueError(
            f'recipe {recipe.name!r} asks what the action feels of every weight, which needs the '
            'whole float network in memory; take one that works block by block, such as onboard'
        )
    if recipe.needs_frames and not frames:
        raise ValueError(f'recipe {recipe.name!r} needs calibration frames; give --frames')


def round_streamed(
    sites: PolicySites,
    recipe: Recipe,
    precision: Scheme,
    read: Read,
    take: Take,
    progress: Progress | None = None,
) -> None:
    """Quantize by a recipe that needs no frames: one layer is in memory at a time."""
    check_recipe(recipe, frames=False)
    layout = recipe_layout(recipe, sites, precision)
    names = [site.name for site in sites.linears if not layout[site.name].is_float]
    for done, name in enumerate(names, 1):
        bias = read(f'{name}.bias') if sites.linear(name).bias else None
        take(name, nearest_layer(recipe, read(f'{name}.weight'), bias, layout[name]))
        if progress is not None:
            progress(name, done, len(names))


class _Enough(Exception):  # noqa: N818  (not an error: the rest of the run is not needed)
    """Every layer of the block has run."""


@contextmanager
def _stop_behind(net: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Leave the run as soon as each named linear has run once; catch it with `enough`."""
    left: set[str] = set(names)
    handles = []

    def watch(name: str) -> None:
        def hook(*_: Any) -> None:
            left.discard(name)
            if not left:
                left.update(names)
                raise _Enough

        handles.append(net.get_submodule(name).register_forward_hook(hook))

    try:
        for name in names:
            watch(name)
        yield
    finally:
        for handle in handles:
            handle.remove()


Frame = Callable[[], None]  # run the network on one calibration frame


def _run_frames(net: nn.Module, names: Sequence[str], frames: Sequence[Frame], *,
                looped: bool) -> None:
    if looped:
        for frame in frames:
            frame()
        return
    with _stop_behind(net, names):
        for frame in frames:
            try:
                frame()
            except _Enough:
                continue


def quantize_streamed(
    net: nn.Module,
    sites: PolicySites,
    recipe: Recipe,
    precision: Scheme,
    take: Take,
    frames: Sequence[Frame],
    *,
    make: Make = QuantLinear,
    progress: Progress | None = None,
) -> None:
    """Quantize a paged network in place, one block in float at a time; the layers go to `take`.

    Each block is fitted to what the quantized blocks before it give, as in convert.quantize_net
    with blockwise. A block outside the denoising loop is run no further than needed. Raises
    ValueError when a layer never ran or the recipe cannot be streamed.
    """
    check_recipe(recipe, frames=bool(frames))
    layout = recipe_layout(recipe, sites, precision)
    order = list(block_order(sites, layout))
    total = sum(len(names) for _, names in order)
    done = 0
    for block, names in order:
        hold(net, names)
        looped = not block or any(sites.linear(name).group in LOOPED for name in names)
        seen = observe(net, names,
                       lambda names=names, looped=looped: _run_frames(  # type: ignore[misc]
                           net, names, frames, looped=looped))
        silent = sorted(set(names) - set(seen))
        if silent:
            raise ValueError(
                f'the calibration frames never reached {", ".join(silent)}; '
                'calibrate with frames that use every part of the policy'
            )
        for name in names:
            layer = _quantized(net, sites, recipe, name, seen.pop(name), layout[name])
            take(name, layer)
            replace_linears(net, {name: layer}, make)
            done += 1
            if progress is not None:
                progress(name, done, total)


def _quantized(
    net: nn.Module, sites: PolicySites, recipe: Recipe, name: str, seen: InputStatistics,
    scheme: Scheme,
) -> QuantizedLayer:
    linear = net.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return quantize_linear(
        recipe, linear.weight, linear.bias, seen.to('cpu'), scheme,
        in_action_head=sites.linear(name).group in ACTION,
    )
