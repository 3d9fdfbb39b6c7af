"""What all weight quantizers share: the scheme, which modules it applies to, and how the result is put in place."""

from __future__ import annotations

import math
from typing import Any, Literal, NoReturn, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.anatomy.parts import is_linear, is_packed
from llmslim.calibration.statistics import InputStats, output_error
from llmslim.calibration.stream import BlockStream
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.linear_step import LinearStep
from llmslim.quantization.edits import PackEmbedding, PackLinear
from llmslim.quantization.grid import GroupSize, QuantizedWeight, Scheme, covering_grid, round_to_grid
from llmslim.quantization.packed import PackedEmbedding, PackedLinear
from llmslim.quantization.packing import packed_width
from llmslim.step import StepRecord, build_step, matches, require_matches

TABLE_ROWS = 4096
"""Rows of a table that are rounded at a time."""


class Quantizer(LinearStep):
    """A step that puts weights on a grid and packs them. Subclasses define `quantize`."""

    verb = "quantize"

    bits: int = Field(4, ge=2, le=8, description="bits per weight, 2 to 8")
    group_size: GroupSize = Field(64, description='inputs that share a scale; or "channel", or "tensor"')
    symmetric: bool = Field(True, description="zero in the middle of the grid; off: a zero point per group")
    embeddings_bits: int | None = Field(
        None, ge=2, le=8, description="also quantize embeddings and head to so many bits (rounded to nearest)"
    )
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        title="PATTERN:KEY=VALUE,...",
        examples=["*.down_proj:bits=8"],
        description="other bits, group_size or symmetric for modules that match a pattern",
    )
    activation_bits: int | None = Field(
        None,
        ge=8,
        le=8,
        description="also put the inputs of these Linears on a grid of so many bits, per token: 8",
    )
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="type of the scales; auto: the checkpoint's 16-bit type"
    )

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: GroupSize) -> GroupSize:
        if isinstance(value, int) and value < 8:
            raise ValueError(
                'a group has at least 8 inputs (32, 64 and 128 are usual), or is "channel" or "tensor"'
            )
        return value

    @field_validator("overrides")
    @classmethod
    def _schemes(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for pattern, fields in value.items():
            unknown = set(fields) - {"bits", "group_size", "symmetric"}
            if unknown:
                raise ValueError(
                    f"the override for {pattern!r} has {unknown.pop()!r}; it takes bits, group_size, symmetric"
                )
            build_step(cls.kind, fields)  # takes what the step takes of them for all
        return value

    def scheme(self, *names: str) -> Scheme:
        """The scheme of the Linear of that name, or of those names where several share a weight."""
        fields: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activation_bits": self.activation_bits,
        }
        for pattern, override in self.overrides.items():
            if any(matches(name, (pattern,)) for name in names):
                fields.update(override)
        scale_dtype = "bfloat16" if self.scale_dtype == "auto" else self.scale_dtype
        return Scheme(**fields, scale_dtype=scale_dtype)

    def embedding_scheme(self, *names: str) -> Scheme:
        """That of an embedding, or a head, or both that are tied: `embeddings_bits`, unless an override says how many.

        Args:
            names: of it.
        """
        table = self.model_copy(update={"bits": self.embeddings_bits, "activation_bits": None})
        return table.scheme(*names)

    def check(self, anatomy: Anatomy) -> None:
        chosen = {name: shape for block in anatomy.blocks for name, shape in self.targets(block).items()}
        for name, (_, width) in chosen.items():
            _check_group(name, width, self.scheme(name).group_size)
        if self.embeddings_bits is not None and anatomy.tied and anatomy.head is not None:
            both = (anatomy.embeddings[0][0], anatomy.head[0])
            if len({matches(name, self.exclude) for name in both}) == 2:
                raise UserError(
                    f"{both[0]} and {both[1]} are one weight, which embeddings_bits packs: --exclude both or none."
                )
        for table in self._tables(anatomy):
            module = anatomy.model.get_submodule(table)
            if not (isinstance(module, nn.Embedding) or is_linear(module)):
                raise UserError(
                    f"embeddings_bits {self.embeddings_bits}: {table} is factored, and its tables stay as they are; "
                    "leave embeddings_bits out, or --exclude it."
                )
            _check_group(table, cast(Tensor, module.weight).shape[1], self.embedding_scheme(table).group_size)
        if not chosen:
            refuse_nothing(self, anatomy)
        super().check(anatomy)
        packed = [*chosen, *self._tables(anatomy)]
        require_matches("overrides", self.overrides, packed, "weight among those quantized")

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        edits: list[Edit] = [*self._outer_edits(anatomy)]
        for block in anatomy.blocks:
            edits += self.unfusing(block)
            edits += [PackLinear(module=name, scheme=self.scheme(name)) for name in self.targets(block)]
        return edits

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        shapes = {shape for block in anatomy.blocks for shape in self.targets(block).values()}
        return max((self._workspace(*shape) for shape in shapes), default=0)

    def outer_bytes(self, anatomy: Anatomy) -> int:
        """Of tables: all that are packed already, and one as codes, and packed twice, with what a slice takes."""
        packed = most = 0
        for edit in self._outer_edits(anatomy):
            rows, width = cast(Tensor, anatomy.model.get_submodule(edit.module).weight).shape
            scales = math.prod(edit.scheme.scale_shape(rows, width))
            own = packed_width(width, edit.scheme.bits) * rows + 4 * scales
            most = max(most, packed + 2 * own + rows * width + 4 * scales + 20 * TABLE_ROWS * width)
            packed += own
        return most

    def _workspace(self, rows: int, width: int) -> int:
        """Bytes that deciding on one weight [rows, width] takes."""
        return 4 * 4 * rows * width

    def _tables(self, anatomy: Anatomy) -> list[str]:
        """The big outer matrices that `embeddings_bits` asks for: the token embedding and the head."""
        if self.embeddings_bits is None:
            return []
        tables = [anatomy.embeddings[0][0]]
        if anatomy.head is not None:
            tables.append(anatomy.head[0])
        packed = (PackedEmbedding, PackedLinear)  # by an earlier step
        dense = [name for name in tables if not isinstance(anatomy.model.get_submodule(name), packed)]
        return [name for name in dense if not matches(name, self.exclude)]

    def _outer_edits(self, anatomy: Anatomy) -> list[PackEmbedding | PackLinear]:
        """The edits outside the blocks; a tied head is packed with its embedding."""
        tables = self._tables(anatomy)
        head = anatomy.head[0] if anatomy.head is not None else None
        tied = head if anatomy.tied and head in tables else None
        edits: list[PackEmbedding | PackLinear] = []
        for name in tables:
            scheme = self.embedding_scheme(*(tables if tied else (name,)))
            if isinstance(anatomy.model.get_submodule(name), nn.Embedding):
                edits.append(PackEmbedding(module=name, scheme=scheme, tied_head=tied))
            elif name != tied:
                edits.append(PackLinear(module=name, scheme=scheme))
        return edits

    def compress_outer(self, stream: BlockStream, record: StepRecord) -> None:
        from llmslim.loaders.models import tie  # brings transformers, which help must not wait for

        model = stream.model
        for edit in self._outer_edits(stream.anatomy):
            weight = cast(Tensor, model.get_submodule(edit.module).weight)
            quantized = round_table(weight, edit.scheme)
            record.linears.append(self._row(edit.module, edit.scheme, weight, quantized, None))
            edit.apply(model)
            packed = model.get_submodule(edit.module)
            assert isinstance(packed, PackedEmbedding | PackedLinear)  # as the edit made it
            fill_packed(packed, quantized)
            if isinstance(edit, PackEmbedding):
                tie(model)
            record.edits.append(edit)

    def compress_linear(
        self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord
    ) -> tuple[Edit, nn.Module]:
        scheme = self.scheme(name)
        weight = weight.float()
        quantized = self.quantize(name, weight, scheme, stats, record)
        record.linears.append(self._row(name, scheme, weight, quantized, stats))
        return PackLinear(module=name, scheme=scheme), PackedLinear.from_quantized(quantized, bias=None)

    def quantize(
        self, name: str, weight: Tensor, scheme: Scheme, stats: InputStats | None, record: StepRecord
    ) -> QuantizedWeight:
        """Put a float32 weight [out, in] on a grid of `scheme`."""
        raise TypeError(f"{type(self).__name__} does not define quantize()")

    def _row(
        self, name: str, scheme: Scheme, weight: Tensor, quantized: QuantizedWeight, stats: InputStats | None
    ) -> dict[str, Any]:
        """What the report says of one weight; errors are relative to the weight's (output's) own power."""
        row = {"name": name, "bits": scheme.bits, "shape": list(weight.shape)}
        if stats is not None:
            row["output_error"] = output_error(weight, quantized.dequantize(), stats.hessian)
            row["tokens"] = stats.tokens
        return row


def refuse_nothing(step: LinearStep, anatomy: Anatomy) -> NoReturn:
    """Say why a step has no Linear to quantize."""
    if any(is_packed(module) for module in anatomy.model.modules()):
        raise UserError("This model is quantized already: quantize the original one instead.")
    raise UserError(
        f"Nothing to quantize: include={list(step.include)} and exclude={list(step.exclude)} leave no Linear."
    )


def round_table(weight: Tensor, scheme: Scheme, rows: int = TABLE_ROWS) -> QuantizedWeight:
    """Round a big table to nearest in slices of rows, so that its float32 copy is never whole."""
    slices, grids = weight.split(rows), []
    if scheme.group_size == "tensor":  # the extremes of the slices have those of all
        ends = torch.stack([torch.stack(torch.aminmax(part)) for part in slices])
        grids = [covering_grid(ends.float(), scheme)]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for room, part in zip(codes.split(rows), slices, strict=True):
        values = part.float()
        if scheme.group_size != "tensor":
            grids.append(covering_grid(values, scheme))
        room.copy_(round_to_grid(values, *grids[-1], scheme).codes)
    scale, zero = (torch.cat(parts) for parts in zip(*grids, strict=True))
    return QuantizedWeight(scheme, codes, scale, None if scheme.symmetric else zero.to(torch.uint8))


def fill_packed(module: PackedLinear | PackedEmbedding, quantized: QuantizedWeight) -> None:
    """Put a quantized weight into an empty packed module."""
    for name, parameter in PackedLinear.from_quantized(quantized, bias=None).named_parameters():
        setattr(module, name, parameter)


def _check_group(name: str, width: int, group_size: GroupSize) -> None:
    if isinstance(group_size, int) and width % group_size:
        fitting = [size for size in range(8, width + 1, 8) if width % size == 0]
        near = sorted(fitting, key=lambda size: abs(size - group_size))[:3]
        do = (
            f"{', '.join(map(str, sorted(near)))} do (nearest: {near[0]}), or 'channel'"
            if near
            else "use 'channel'"
        )
        raise UserError(f"group_size {group_size} does not divide the {width} inputs of {name}; {do}.")
