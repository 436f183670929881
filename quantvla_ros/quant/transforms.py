# SPDX-License-Identifier: Apache-2.0
"""Input transforms that leave a linear layer's function as it is and make it easier to round.

y = x W^T = (x T)(W T^-T)^T. T is a chain of a positive diagonal (smoothing), a permutation and a
block-orthogonal rotation, in this order; every factor is exactly invertible. Pure functions
first, then `InputTransform`, the value that an artifact stores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMOOTH_FLOOR = 1e-3  # of the largest factor: keeps dead channels from exploding the weight


def smoothing_diagonal(act_absmax: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant: s_k = max|x_k|^alpha / max|W_:k|^(1 - alpha); x / s and W * s.

    act_absmax (k,), weight (rows, k) -> (k,). Channels never seen keep a factor near the floor.
    """
    weight_absmax = weight.abs().amax(0).clamp_min(1e-8)
    s = act_absmax.clamp_min(1e-8) ** alpha / weight_absmax ** (1 - alpha)
    return s.clamp_min(SMOOTH_FLOOR * s.max())


def snake_permutation(energy: Tensor, block: int) -> Tensor:
    """Deal channels, largest first, over the blocks forth and back: 1..n, n..1, 1..n, ...

    Every block gets one channel of each tier, so the energies of the blocks are balanced
    (DuQuant's zigzag). Returns perm with x' = x[:, perm].
    """
    k = energy.numel()
    if k % block:
        raise ValueError(f'{k} channels cannot be dealt into blocks of {block}')
    order = torch.argsort(energy, descending=True, stable=True).reshape(block, k // block)
    order[1::2] = order[1::2].flip(-1)
    return order.T.reshape(-1)


def two_pointer_permutation(energy: Tensor) -> Tensor:
    """Take largest, smallest, second largest, second smallest, ...: the published zigzag.

    Kept for comparison only: it puts the largest and the smallest channels into the first block,
    so the blocks are not balanced.
    """
    order = torch.argsort(energy, descending=True, stable=True)
    ends = torch.stack([order, order.flip(0)], 1).reshape(-1)
    return ends[: energy.numel()]


def block_size(k: int, largest: int = 64) -> int:
    """Largest power of two that divides k, at most `largest`."""
    return math.gcd(k, largest)


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normalised Sylvester Hadamard matrix: orthogonal and symmetric. n is a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f'a Sylvester Hadamard matrix has a power of two as size, not {n}')
    h = torch.ones(1, 1, dtype=dtype)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(n)


def fast_hadamard(x: Tensor, block: int) -> Tensor:
    """Multiply each run of `block` values of the last axis by the Hadamard matrix.

    log2(block) passes of sums and differences instead of a matrix product.
    """
    if x.shape[-1] % block:
        raise ValueError(f'{x.shape[-1]} values cannot be cut into blocks of {block}')
    y = x.reshape(-1, block)
    width = 1
    while width < block:
        pair = y.reshape(-1, block // (2 * width), 2, width)
        y = torch.stack([pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]], 2)
        y = y.reshape(-1, block)
        width *= 2
    return (y / math.sqrt(block)).reshape(x.shape)


def svd_rotation(weight: Tensor, block: int) -> Tensor:
    """R_b = eigenvectors of W_b^T W_b for each block of inputs; (k / block, block, block).

    Columns of W_b R_b are orthogonal with the singular values as norms: energy concentrates.
    """
    blocks = weight.double().reshape(weight.shape[0], -1, block).transpose(0, 1)
    _, vectors = torch.linalg.eigh(blocks.transpose(1, 2) @ blocks)
    return vectors.flip(-1)


def svd_hadamard_rotation(weight: Tensor, block: int) -> Tensor:
    """R_b = U_b H: every column of W_b R_b has the same squared norm, (1/B) sum sigma_j^2."""
    return svd_rotation(weight, block) @ hadamard_matrix(block)


def duquant_rotation(activations: Tensor, block: int, steps: int = 64) -> Tensor:
    """DuQuant's greedy rotation, one (block, block) matrix shared by all blocks of the layer.

    Each step finds the channel with the largest magnitude over all tokens and blocks and spreads
    it evenly by a fixed orthogonal matrix whose first row is 1/sqrt(block); the prefix of steps
    with the smallest peak is kept.
    """
    x = activations.double().reshape(-1, block)
    spread = _spreading_matrix(block)
    rotation = torch.eye(block, dtype=torch.float64)
    best, best_peak = rotation, x.abs().max()
    for _ in range(steps):
        channel = int(x.abs().amax(0).argmax())
        swap = torch.arange(block)
        swap[0], swap[channel] = channel, 0
        step = spread[swap]  # exchange rows 0 and channel: that channel meets the uniform row
        x, rotation = x @ step, rotation @ step
        peak = x.abs().max()
        if peak < best_peak:
            best, best_peak = rotation, peak
    return best


def _spreading_matrix(n: int) -> Tensor:
    """Orthogonal matrix whose first row is uniform: a Householder reflection of e_1."""
    v = torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64)
    v[0] -= 1
    length = v.norm()
    if length < 1e-12:
        return torch.eye(n, dtype=torch.float64)
    v = v / length
    return torch.eye(n, dtype=torch.float64) - 2 * torch.outer(v, v)


@dataclass(frozen=True, eq=False)
class InputTransform:
    """x -> ((x / diagonal)[permutation]) rotated block by block, then perhaps a second such link.

    diagonal: (k,) float or None. permutation: (k,) int64 or None. hadamard: block of a fast
    Hadamard transform, 0 for none. blocks: dense rotation, (k / b, b, b), or (1, b, b) shared by
    all blocks, or None. At most one of hadamard and blocks is set. then: the next link.
    """

    diagonal: Tensor | None = None
    permutation: Tensor | None = None
    hadamard: int = 0
    blocks: Tensor | None = None
    then: InputTransform | None = None

    def __post_init__(self) -> None:
        if self.hadamard and self.blocks is not None:
            raise ValueError('a transform has a Hadamard or a dense rotation, not both')

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the chain by name; those of the second link start with 'then.'."""
        own = {'diagonal': self.diagonal, 'permutation': self.permutation, 'blocks': self.blocks}
        found = {name: tensor for name, tensor in own.items() if tensor is not None}
        if self.then is not None:
            found.update({f'then.{name}': t for name, t in self.then.tensors().items()})
        return found

    def hadamards(self) -> list[int]:
        """Hadamard block of each link of the chain."""
        return [self.hadamard, *(self.then.hadamards() if self.then is not None else [])]

    @property
    def is_identity(self) -> bool:
        """Whether x passes unchanged."""
        return not self.tensors() and not any(self.hadamards())

    def activations(self, x: Tensor) -> Tensor:
        """Transform what enters the layer; (..., k)."""
        if self.diagonal is not None:
            x = x / self.diagonal.to(x.dtype)
        x = self._rotate(x)
        return x if self.then is None else self.then.activations(x)

    def weight(self, weight: Tensor) -> Tensor:
        """Transform W (rows, k) so that activations(x) @ weight(W)^T = x @ W^T."""
        if self.diagonal is not None:
            weight = weight * self.diagonal.to(weight.dtype)
        weight = self._rotate(weight)  # R is orthogonal: R^-T = R
        return weight if self.then is None else self.then.weight(weight)

    def gram(self, gram: Tensor) -> Tensor:
        """Transform H = X^T X (k, k) of plain inputs into that of transformed ones."""
        return self.activations(self.activations(gram).T)

    def followed_by(self, link: InputTransform) -> InputTransform:
        """Append a link to the chain."""
        then = link if self.then is None else self.then.followed_by(link)
        return replace(self, then=then)

    def _rotate(self, x: Tensor) -> Tensor:
        if self.permutation is not None:
            x = x[..., self.permutation]
        if self.hadamard:
            return fast_hadamard(x, self.hadamard)
        if self.blocks is not None:
            return rotate_blocks(x, self.blocks)
        return x


def rotate_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply run i of the last axis by blocks[i]; (n, b, b), or (1, b, b) for all runs."""
    parts = x.unflatten(-1, (-1, blocks.shape[-1]))
    return torch.einsum(
        '...nb,nbc->...nc', parts, blocks.to(x.dtype).expand(parts.shape[-2], -1, -1)
    ).flatten(-2)


def from_tensors(tensors: Mapping[str, Tensor], hadamards: Sequence[int]) -> InputTransform:
    """Rebuild a chain from `tensors()` and `hadamards()`."""
    own = {name: t for name, t in tensors.items() if not name.startswith('then.')}
    rest = {name[5:]: t for name, t in tensors.items() if name.startswith('then.')}
    unknown = sorted(set(own) - {'diagonal', 'permutation', 'blocks'})
    if unknown or not hadamards or (rest and len(hadamards) < 2):
        raise ValueError(f'no transform has the parts {sorted(tensors)} and {list(hadamards)}')
    then = from_tensors(rest, hadamards[1:]) if len(hadamards) > 1 else None
    return InputTransform(
        own.get('diagonal'), own.get('permutation'), hadamards[0], own.get('blocks'), then
    )


def own_copy(transform: InputTransform) -> InputTransform:
    """The same chain with tensors of its own: files do not store one tensor for two layers."""
    tensors = {name: tensor.clone() for name, tensor in transform.tensors().items()}
    return from_tensors(tensors, transform.hadamards())
