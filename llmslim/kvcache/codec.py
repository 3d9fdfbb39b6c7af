"""How blocks of keys or values become bytes: one small class per kind, each with its inverse.

A block is T tokens of a head, float [T, D]. Every codec maps x [batch, heads, n * T, D] to a tuple of tensors that
all begin with [batch, heads, n], so that a cache can join, cut and reorder them without knowing what they are.
Keys are stored channel by channel (a row of T codes each) and values token by token (a row of D codes each): so
attention adds whole rows, of scores for keys and of outputs for values.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from llmslim.kvcache.planes import pack, unpack
from llmslim.kvcache.settings import KVSettings

Parts = tuple[Tensor, ...]

SHRINK = (0.9, 0.8, 0.7, 0.6)
"""Shares of a group's range that are tried at 2 and 3 bits, where clipping the ends costs less than it saves."""
SEARCHED = (2, 3)
ROTATION_SEED = 2504_19874


class Codec(Protocol):
    """One way to store blocks of T tokens, in so many bits a number."""

    bits: int

    def encode(self, x: Tensor) -> Parts:
        """float [batch, heads, n * T, D] -> tensors [batch, heads, n, ...]."""

    def decode(self, parts: Parts) -> Tensor:
        """The inverse up to rounding, in float32 (raw blocks in their own type)."""


def codecs(settings: KVSettings, key_dim: int, value_dim: int, device: torch.device) -> tuple[Codec, Codec]:
    """The codecs of keys and values for heads of so many channels.

    Raises:
        UserError: the bits or the groups do not fit.
    """
    makers = {
        "kivi": (_per_channel, _per_token),
        "token": (_per_token, _per_token),
        "rotated": (_rotated, _rotated),
    }
    sides = ((True, settings.bits, key_dim), (False, settings.of_values, value_dim))
    keys, values = (
        Raw(settings.block) if bits == 16 else make(settings, bits, dim, is_keys, device)
        for make, (is_keys, bits, dim) in zip(makers[settings.method], sides, strict=True)
    )
    return keys, values


def _per_channel(settings: KVSettings, bits: int, dim: int, keys: bool, device: torch.device) -> Codec:
    return PerChannel(settings.block, bits)


def _per_token(settings: KVSettings, bits: int, dim: int, keys: bool, device: torch.device) -> Codec:
    return PerToken(settings.block, bits, settings.channels(dim), keys)


def _rotated(settings: KVSettings, bits: int, dim: int, keys: bool, device: torch.device) -> Codec:
    return Rotated(settings.block, bits, dim, keys, device)


class Raw:
    """The numbers themselves: x [..., n, T, D]."""

    bits = 16

    def __init__(self, block: int) -> None:
        self.block = block

    def encode(self, x: Tensor) -> Parts:
        return (x.unflatten(2, (-1, self.block)).contiguous(),)

    def decode(self, parts: Parts) -> Tensor:
        return parts[0].flatten(2, 3)


class PerChannel:
    """A scale and a minimum for each channel of a block of tokens (KIVI's keys, arXiv 2402.02750).

    The channels of keys differ in size by orders of magnitude, the tokens of a channel do not. Parts: codes uint8
    [..., n, D, T * bits / 8]; scale, minimum float16 [..., n, D].
    """

    def __init__(self, block: int, bits: int) -> None:
        self.block, self.bits = block, bits

    def encode(self, x: Tensor) -> Parts:
        rows = x.unflatten(2, (-1, self.block)).transpose(-1, -2)
        codes, scale, low = quantize(rows, self.bits)
        return pack(codes, self.bits), scale, low

    def decode(self, parts: Parts) -> Tensor:
        codes, scale, low = parts
        rows = torch.addcmul(
            low.float()[..., None], unpack(codes, self.bits).float(), scale.float()[..., None]
        )
        return rows.transpose(-1, -2).flatten(2, 3)


class PerToken:
    """A scale and a minimum for each group of G channels of each token (KIVI's values).

    Parts as keys: codes [..., n, D, T * bits / 8]; scale, minimum float16 [..., n, D / G, T]. As values: codes
    [..., n, T, D * bits / 8]; scale, minimum [..., n, T, D / G].
    """

    def __init__(self, block: int, bits: int, group: int, keys: bool) -> None:
        self.block, self.bits, self.group, self.keys = block, bits, group, keys

    def encode(self, x: Tensor) -> Parts:
        groups = x.unflatten(-1, (-1, self.group)).unflatten(2, (-1, self.block))  # [..., n, T, D/G, G]
        codes, scale, low = quantize(groups, self.bits)
        codes = codes.flatten(-2)
        if self.keys:
            codes, scale, low = (part.transpose(-1, -2).contiguous() for part in (codes, scale, low))
        return pack(codes, self.bits), scale, low

    def decode(self, parts: Parts) -> Tensor:
        codes, scale, low = unpack(parts[0], self.bits), parts[1], parts[2]
        if self.keys:
            codes, scale, low = (part.transpose(-1, -2) for part in (codes, scale, low))
        groups = codes.unflatten(-1, (-1, self.group)).float()
        x = torch.addcmul(low.float()[..., None], groups, scale.float()[..., None])
        return x.flatten(-2).flatten(2, 3)


class Rotated:
    """A random rotation, a size per token, and levels that fit a Gaussian (TurboQuant, arXiv 2504.19874).

    After the rotation the channels of a token are nearly independent and Gaussian whatever they were, so one
    fixed table of 2**bits levels (Lloyd's, for that Gaussian) is near the best there is: x ~ size * R^T level[code].
    Beyond the paper, the mean of the block is taken off each token that it makes smaller, which is most of them: what
    is left has less to lose, and the tokens whose keys are like no others (those that gather attention, delimiters) do
    not suffer from it. `size` is fitted so that the error is smallest, not the norm that the paper keeps; its sign bit
    says that the mean stays out. Left out: the paper's second stage, one bit of a random projection of the error that
    makes inner products unbiased; bits of different sizes for outlying channels. Parts as keys: codes uint8
    [..., n, D, T * bits / 8]; as values: codes [..., n, T, D * bits / 8]; size float16 [..., n, T]; mean, rotated,
    float16 [..., n, D].
    """

    def __init__(self, block: int, bits: int, head_dim: int, keys: bool, device: torch.device) -> None:
        self.block, self.bits, self.keys = block, bits, keys
        self.rotation = rotation(head_dim).to(device)
        self.levels = gaussian_levels(bits).to(device)
        self.padded_levels = torch.nn.functional.pad(self.levels, (0, max(0, 16 - 2**bits)))  # for wide loads

    def encode(self, x: Tensor) -> Parts:
        turned = (x.float() @ self.rotation).unflatten(2, (-1, self.block))  # [..., n, T, D]
        mean = half(turned.mean(-2))
        rest = turned - mean.float()[..., None, :]
        off = rest.square().sum(-1) < turned.square().sum(-1)
        rest = torch.where(off[..., None], rest, turned)
        norm = rest.square().mean(-1, keepdim=True).sqrt()
        between = (self.levels[1:] + self.levels[:-1]) / 2
        codes = torch.bucketize(rest / norm.clamp(min=1e-30), between)
        near = self.levels[codes]
        size = half(
            (rest * near).sum(-1) / near.square().sum(-1)
        )  # not negative: levels have the signs of the rest
        codes = codes.to(torch.uint8)
        if self.keys:
            codes = codes.transpose(-1, -2).contiguous()
        return pack(codes, self.bits), torch.where(off, size.abs(), -size.abs()), mean

    def decode(self, parts: Parts) -> Tensor:
        codes, (size, mean) = unpack(parts[0], self.bits), parts[1:]
        if self.keys:
            codes = codes.transpose(-1, -2)
        turned = self.levels[codes.int()] * size.abs().float()[..., None]
        turned += torch.where(torch.signbit(size)[..., None], 0, mean.float()[..., None, :])
        return (turned @ self.rotation.T).flatten(2, 3)


def quantize(x: Tensor, bits: int) -> Parts:
    """x ~ low + scale * code over the last dimension: codes uint8, scale and low float16 without that dimension.

    The range is that of the group; of 2 and 3 bits the share of it (`SHRINK`) with the least squared error.
    """
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    best = _quantize(x, low, high, bits)
    if bits not in SEARCHED:
        return best
    least = _error(x, best)
    for share in SHRINK:
        cut = (high - low) * (1 - share) / 2
        tried = _quantize(x, low + cut, high - cut, bits)
        error = _error(x, tried)
        better = error < least
        least = torch.minimum(error, least)
        best = (
            torch.where(better[..., None], tried[0], best[0]),
            torch.where(better, tried[1], best[1]),
            torch.where(better, tried[2], best[2]),
        )
    return best


def _quantize(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    top = 2**bits - 1
    scale, low = half((high - low) / top), half(low)
    step = scale.float()[..., None]
    codes = ((x - low.float()[..., None]) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, top)
    return codes.to(torch.uint8), scale, low


def _error(x: Tensor, parts: Parts) -> Tensor:
    codes, scale, low = parts
    return (low.float()[..., None] + scale.float()[..., None] * codes - x).square().sum(-1)


def half(x: Tensor) -> Tensor:
    """In float16, with what is too large for it as the largest."""
    return x.clamp(-65504, 65504).to(torch.float16)


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
