"""How blocks of keys or values become bytes: one small class per kind, each with its inverse.

A block is T tokens of a head, float [T, D]. Every codec maps x [batch, heads, n * T, D] to a tuple of tensors that
all begin with [batch, heads, n], so that a cache can join, cut and reorder them without knowing what they are.
Keys are stored channel by channel (a row of T codes each) and values token by token (a row of D codes each): so
attention adds whole rows, of scores for keys and of outputs for values.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmslim.kvcache.basis import Components, Rotated
from llmslim.kvcache.planes import Parts, half, pack, unpack
from llmslim.kvcache.settings import KVSettings

SHRINK = (0.9, 0.8, 0.7, 0.6)
"""Shares of a group's range that are tried at 2 and 3 bits, where clipping the ends costs less than it saves."""
SEARCHED = (2, 3)


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
        "pca": (_components, _rotated),
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


def _components(settings: KVSettings, bits: int, dim: int, keys: bool, device: torch.device) -> Codec:
    (basis,) = settings.components
    return Components(settings.block, bits, basis.to(device))


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
