"""What a quantized KV cache is asked to be, checked against the model that it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from llmslim.errors import UserError
from llmslim.step import checked

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Bits = Literal[2, 3, 4, 8, 16]

WIDTH = 8
"""What a group and a head size must be multiples of: so many codes always fill whole bytes."""
USUAL_GROUP = 64
USUAL_BLOCK = {"kivi": USUAL_GROUP, "token": USUAL_GROUP, "rotated": 128, "pca": 128}
"""Tokens that are quantized together when no group size is given; rotated ones share no more than their mean."""


class KVSettings(BaseModel):
    """How the keys and values of past tokens are stored.

    Attributes:
        bits: per stored number, of 2, 3, 4, 8; 16 stores them as they are (to test the plumbing with).
        value_bits: those of values, where `bits` is for keys alone: keys lose more by few.
        method: `kivi`: keys per channel in groups of tokens, values per token in groups of channels; `token`: both
            per token; `rotated`: a random rotation of each head, then fixed levels for a Gaussian; `pca`: the same
            with keys in their principal components, of which the larger get more bits.
        group_size: numbers that share a scale, and tokens that are quantized at a time. None: 64, of channels the
            largest divisor of the head size up to 64; rotated, which have a scale per token, 128 tokens at a time.
        window: the most recent tokens, which stay as they are; up to group_size - 1 older ones do too, until
            their group is whole.
        sink: the first tokens, which stay as they are in layers of full attention.
        layer_bits: the bits of each attention layer, first to last, in place of `bits`; a pair is for keys and values.
        evict: which tokens older than the window layers of full attention drop for good (`kvcache.runtime.eviction`):
            `streaming`: the oldest; `knorm`: keys of large norm; `snapkv`: those that recent queries attend to
            least.
        components: of `pca`, of each attention layer the basis of its keys, float32 [KV heads, head_dim, head_dim],
            as `kvcache.components.fit_kv_components` measures it. No part of what is written as JSON.
        keep: the share of them that stays, above 0 and below 1; goes with `evict`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits = 4
    value_bits: Bits | None = None
    method: Literal["kivi", "token", "rotated", "pca"] = "kivi"
    group_size: int | None = Field(default=None, ge=1)
    window: int = Field(default=128, ge=0)
    sink: int = Field(default=4, ge=0)
    layer_bits: tuple[Bits | tuple[Bits, Bits], ...] = ()
    evict: Literal["streaming", "knorm", "snapkv"] | None = None
    keep: float | None = Field(default=None, gt=0, lt=1)
    components: tuple[Any, ...] = Field(default=(), exclude=True, repr=False)

    @field_validator("components")
    @classmethod
    def _are_tensors(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not all(isinstance(one, Tensor) for one in value):
            raise ValueError("components are tensors, not part of a file of settings")
        return value

    @model_validator(mode="after")
    def _together(self) -> KVSettings:
        if self.layer_bits and self.model_fields_set & {"bits", "value_bits"}:
            raise ValueError("layer_bits say how many bits, and so do bits or value_bits; give one")
        if (self.evict is None) != (self.keep is None):
            raise ValueError("evict and keep go together, such as evict = snapkv and keep = 0.5")
        for number, basis in enumerate(self.components):
            if not _inverts(basis):
                raise ValueError(
                    f"the components of layer {number} are no bases [KV heads, head_dim, head_dim] that can be "
                    "inverted; measure them again"
                )
        return self

    @classmethod
    def of(cls, **fields: object) -> KVSettings:
        """The settings, with what is wrong told in one sentence; `bits` may be a list, which is `layer_bits`.

        Raises:
            UserError: for a value or a name that there is not.
        """
        if isinstance(fields.get("bits"), (list, tuple)):
            fields["layer_bits"] = fields.pop("bits")
        return checked(cls, "kv_cache", fields)

    def of_layer(self, index: int) -> KVSettings:
        """Those of one attention layer: no `layer_bits`, and no `components` but its own."""
        own: dict[str, Any] = {"components": self.components[index : index + 1]}
        if self.layer_bits:
            bits = self.layer_bits[index]
            keys, values = bits if isinstance(bits, tuple) else (bits, bits)
            own |= {"bits": keys, "value_bits": values, "layer_bits": ()}
        return self.model_copy(update=own)

    @property
    def of_values(self) -> int:
        """The bits of values."""
        return self.value_bits or self.bits

    def check(self, head_dim: int) -> None:
        """Refuse bits and groups that do not fit heads of so many channels, in any layer.

        Raises:
            UserError: they do not.
        """
        for index in range(max(1, len(self.layer_bits))):
            self.of_layer(index).channels(head_dim)

    @property
    def block(self) -> int:
        """Tokens that are quantized together."""
        return self.group_size or USUAL_BLOCK[self.method]

    def channels(self, head_dim: int) -> int:
        """Channels that share a scale where scales are per token.

        Raises:
            UserError: the bits or the groups do not fit the head size.
        """
        packs = min(self.bits, self.of_values) < 16
        if head_dim % WIDTH and packs:
            raise UserError(f"Heads of {head_dim} channels cannot be packed: it takes a multiple of {WIDTH}.")
        if self.block % WIDTH and packs:
            raise UserError(
                f"kv_cache: group_size = {self.block} is no multiple of {WIDTH}: give 32, 64 or 128."
            )
        fitting = [n for n in range(1, head_dim + 1) if head_dim % n == 0 and n % WIDTH == 0]
        if self.group_size is None:
            return max((n for n in fitting if n <= USUAL_GROUP), default=head_dim)
        if self.method in ("rotated", "pca") or not packs or self.group_size in fitting:
            return self.group_size
        raise UserError(
            f"kv_cache: groups of {self.group_size} do not divide the {head_dim} channels of a head; "
            f"there fit {', '.join(map(str, fitting))}."
        )


def _inverts(basis: Tensor) -> bool:
    """Whether each matrix of [heads, D, D] has an inverse in float32."""
    if basis.dim() != 3 or basis.shape[1] != basis.shape[2] or not basis.is_floating_point():
        return False
    inverse, failed = torch.linalg.inv_ex(basis.double())
    return not bool(failed.any()) and bool(inverse.float().isfinite().all())


def head_sizes(config: PreTrainedConfig) -> list[int]:
    """Channels of a head, as far as the config of the model tells."""
    text = config.get_text_config(decoder=True)
    size, heads = getattr(text, "head_dim", None), getattr(text, "num_attention_heads", None)
    if size is None and isinstance(heads, int) and heads:
        size = text.hidden_size // heads
    return [size] if isinstance(size, int) else []
