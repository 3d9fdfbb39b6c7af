"""Codecs in another basis: there the numbers of a token are near to Gaussian, for which one table of levels is good."""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

from llmslim.kvcache.planes import Parts, half, pack, unpack

ROTATION_SEED = 2504_19874


class Rotated:
    """A random rotation, a size per token, and levels that fit a Gaussian (TurboQuant, arXiv 2504.19874).

    After the rotation the channels of a token are nearly independent and Gaussian whatever they were, so one
    fixed table of 2**bits levels (Lloyd's, for that Gaussian) is near the best there is: x ~ size * B level[code], B
    the `basis`. Beyond the paper, the mean of the block is taken off each token that it makes smaller, which is most of
    them: what is left has less to lose, and the tokens whose keys are like no others (those that gather attention,
    delimiters) do not suffer from it. `size` is fitted so that the error is smallest, not the norm that the paper
    keeps; its sign bit says that the mean stays out. Left out: the paper's second stage, one bit of a random
    projection of the error that makes inner products unbiased; bits of different sizes for outlying channels. Parts as
    keys: codes uint8 [..., n, D, T * bits / 8]; as values: codes [..., n, T, D * bits / 8]; size float16 [..., n, T];
    mean, in the basis, float16 [..., n, D].
    """

    def __init__(self, block: int, bits: int, head_dim: int, keys: bool, device: torch.device) -> None:
        self.block, self.bits, self.keys = block, bits, keys
        self.basis = rotation(head_dim).to(device)
        self.levels = gaussian_levels(bits).to(device)
        self.padded_levels = torch.nn.functional.pad(self.levels, (0, max(0, 16 - 2**bits)))  # for wide loads

    def encode(self, x: Tensor) -> Parts:
        rest, off, mean = centred((x.float() @ self.basis).unflatten(2, (-1, self.block)))
        norm = rest.square().mean(-1, keepdim=True).sqrt()
        codes = nearest(rest / norm.clamp(min=1e-30), self.levels)
        size = fitted_size(rest, self.levels[codes.int()])
        if self.keys:
            codes = codes.transpose(-1, -2).contiguous()
        return pack(codes, self.bits), torch.where(off, size, -size), mean

    def decode(self, parts: Parts) -> Tensor:
        codes, (size, mean) = unpack(parts[0], self.bits), parts[1:]
        if self.keys:
            codes = codes.transpose(-1, -2)
        return uncentred(self.levels[codes.int()], size, mean, self.basis)


class Components:
    """Keys in the basis of their principal components, with more bits for the larger ones.

    What is decorrelated needs bits as its size has: components of large variance get up to 4 bits, those of small
    none, `bits` in the mean (`spread`), as in KVTC (arXiv 2511.01815) and, for channels that outlie, in TurboQuant.
    Components and variances are those of each head, measured once (`kvcache.components`); a token has a size, a
    block a mean, and levels are Lloyd's, as in `Rotated`. Left out of KVTC: its entropy coding, one basis for all
    heads and layers, taking off the rotary embedding before. Parts: codes uint8 [..., n, D * T * bits / 8], component
    by component in rows of T * width / 8; size float16 [..., n, T]; mean, in the basis, float16 [..., n, D].

    Args:
        basis: float32 [heads, D, D]: its columns are the components, as long as their standard deviation, the longest
            first.
    """

    def __init__(self, block: int, bits: int, basis: Tensor) -> None:
        self.block, self.bits, self.basis = block, bits, basis
        self.inverse = torch.linalg.inv(basis.double()).float()
        self.variance = basis.square().sum(-2)
        self.widths = torch.stack([spread(one, bits) for one in self.variance]).to(basis.device)
        self.levels = {w: gaussian_levels(w).to(basis.device) for w in self.widths.unique().tolist() if w}
        rows = [gaussian_levels(w) if w else torch.zeros(1) for w in range(5)]  # of 16 each, for wide loads
        padded = [torch.nn.functional.pad(row, (0, 16 - len(row))) for row in rows]
        self.padded_levels = torch.cat([*padded, gaussian_levels(8)])
        self._places()

    def _places(self) -> None:
        """Where the bytes of each component lie, so that heads of different widths are packed in one go.

        `spans`: width -> the components that have it in any head, a range since the larger come first; `gathered`:
        places of a head's bytes in the planes of all spans laid end to end; `scattered`: the other way round.
        """
        heads, dim = self.widths.shape
        ends = (self.widths.long() * self.block // 8).cumsum(1)
        self.spans: dict[int, tuple[int, int]] = {}
        self.scattered: dict[int, Tensor] = {}
        self.gathered = torch.zeros(heads, dim * self.block * self.bits // 8, dtype=torch.int64)
        start = 0
        for width in sorted(self.levels, reverse=True):
            row = self.block * width // 8
            where = (self.widths == width).any(0).nonzero()[:, 0].tolist()
            first, last = where[0], where[-1] + 1
            within = (ends[:, first:last, None] - row + torch.arange(row)).clamp(min=0)
            chosen = (self.widths[:, first:last, None] == width).expand_as(within)
            planes = torch.arange(start, start + (last - first) * row).view(1, last - first, row)
            for head in range(heads):
                self.gathered[head, within[head][chosen[head]]] = planes[0][chosen[head]]
            self.spans[width] = (first, last)
            self.scattered[width] = torch.where(chosen, within, 0).flatten(1).to(self.basis.device)
            start += (last - first) * row
        self.gathered = self.gathered.to(self.basis.device)

    def encode(self, x: Tensor) -> Parts:
        turned = x.float() @ self.inverse.mT
        rest, off, mean = centred(turned.unflatten(2, (-1, self.block)))
        used = (self.widths > 0)[:, None, None]
        norm = ((rest.square() * used).sum(-1, keepdim=True) / used.sum(-1, keepdim=True)).sqrt()
        unit, near, planes = rest / norm.clamp(min=1e-30), torch.zeros_like(rest), []
        for width, (first, last) in self.spans.items():
            codes = nearest(unit[..., first:last], self.levels[width])
            chosen = (self.widths[:, None, None, first:last]) == width
            near[..., first:last] = torch.where(
                chosen, self.levels[width][codes.int()], near[..., first:last]
            )
            planes.append(pack(codes.transpose(-1, -2).contiguous(), width).flatten(-2))
        size = fitted_size(rest, near, self.variance[:, None, None])
        return _gather(torch.cat(planes, -1), self.gathered), torch.where(off, size, -size), mean

    def decode(self, parts: Parts) -> Tensor:
        packed, size, mean = parts
        near = torch.zeros(*size.shape, mean.shape[-1], device=size.device)
        for width, (first, last) in self.spans.items():
            rows = _gather(packed, self.scattered[width]).unflatten(-1, (last - first, -1))
            codes = unpack(rows, width).transpose(-1, -2)
            chosen = (self.widths[:, None, None, first:last]) == width
            near[..., first:last] = torch.where(
                chosen, self.levels[width][codes.int()], near[..., first:last]
            )
        return uncentred(near, size, mean, self.basis)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, heads, n, bytes] at places [heads, m] -> [batch, heads, n, m]."""
    return x.gather(-1, index[None, :, None].expand(x.shape[0], -1, x.shape[2], -1))


def spread(variance: Tensor, bits: int) -> Tensor:
    """Bits of each component, `bits` in the mean: each goes where it takes most off the error; uint8 [D].

    Args:
        variance: of the components, the largest first, [D].
    """
    if bits >= 4:
        return torch.full_like(variance, bits, dtype=torch.uint8)
    errors = [gaussian_error(width) for width in range(5)]
    gains = torch.tensor(
        [before - after for before, after in itertools.pairwise(errors)], dtype=torch.float64
    )
    # gains fall from bit to bit, so the best of them all are, of each component, its first ones
    order = (variance.double().cpu()[:, None] * gains).flatten().argsort(descending=True, stable=True)
    taken = torch.zeros(len(variance) * len(gains), dtype=torch.uint8)
    taken[order[: len(variance) * bits]] = 1
    return taken.view(len(variance), -1).sum(1, dtype=torch.uint8)


def centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks x [..., n, T, D] less their mean where that makes a token smaller: what is left, where, and the mean."""
    mean = half(x.mean(-2))
    rest = x - mean.float()[..., None, :]
    off = rest.square().sum(-1) < x.square().sum(-1)
    return torch.where(off[..., None], rest, x), off, mean


def uncentred(near: Tensor, size: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """The tokens [..., n * T, D] of levels [..., n, T, D], of their sizes, and of means where the sign is plus."""
    x = near * size.abs().float()[..., None]
    x += torch.where(torch.signbit(size)[..., None], 0, mean.float()[..., None, :])
    return x.flatten(2, 3) @ basis.mT


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The code of the level that is nearest, uint8."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def fitted_size(x: Tensor, near: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """The size of each token with the least weighted error of size * near; float16, never below 0."""
    error = (weight * near.square()).sum(-1)
    return half((weight * x * near).sum(-1) / error.clamp(min=1e-30)).abs()


@cache
def rotation(head_dim: int) -> Tensor:
    """A random rotation, float32 [D, D]: Hadamard with random signs, or of Gaussians when D is no power of two."""
    generator = torch.Generator().manual_seed(ROTATION_SEED + head_dim)
    if head_dim & (head_dim - 1):
        q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64))
        return (q * r.diagonal().sign()).float()
    hadamard = torch.ones(1, 1)
    while len(hadamard) < head_dim:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signs = torch.randint(2, (head_dim, 1), generator=generator) * 2.0 - 1
    return signs * hadamard / head_dim**0.5


@cache
def gaussian_levels(bits: int) -> Tensor:
    """Lloyd's levels for a standard Gaussian, float32 [2**bits], ascending: each the mean of what rounds to it."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    count = 2**bits
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(200 * bits):
        edges = torch.cat(
            [levels.new_tensor([-40.0]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([40.0])]
        )
        mass, density = normal.cdf(edges).diff(), normal.log_prob(edges).exp()
        levels = -density.diff() / mass
    return levels.float()


@cache
def gaussian_error(bits: int) -> float:
    """The mean squared error of those levels for a standard Gaussian: 1 less the variance of the levels; 1 of none."""
    if not bits:
        return 1.0
    levels = gaussian_levels(bits).double()
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    edges = (levels[1:] + levels[:-1]) / 2
    mass = normal.cdf(torch.cat([edges.new_tensor([-40.0]), edges, edges.new_tensor([40.0])])).diff()
    return 1.0 - float((mass * levels.square()).sum())
