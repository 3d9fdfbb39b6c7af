"""A format: how packed weights and the edits that made them lie in a folder.

Formats differ in the names, packing and types of a packed weight's tensors and in what config.json says of
them. Everything else (dense tensors, shards, tokenizer) is the same in all. A new one is a subclass in a file
of this room that `formats` lists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmslim.checkpoint.plain import absorb
from llmslim.edit import Edit
from llmslim.errors import UserError, nearest
from llmslim.loaders.models import skeleton
from llmslim.quantization.bnb_linear import BnbLinear
from llmslim.quantization.edits import PackLinear
from llmslim.quantization.grid import QuantizedWeight, Scheme
from llmslim.quantization.packed import PackedEmbedding, PackedLinear
from llmslim.sparse import SparseLinear, SparseWeight

Packed = PackedLinear | PackedEmbedding
Compact = Packed | SparseLinear | BnbLinear
"""Modules whose weight lies in a file in other tensors than a dense one's."""
Get = Callable[[str], Tensor]


class Format(ABC):
    """One way to store packed weights. Formats have no state."""

    name: ClassVar[str]

    @abstractmethod
    def refusal(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> str | None:
        """Why a model with these edits cannot be stored so, as a clause for a UserError; None when it can.

        Args:
            model: a skeleton in front of the edits.
            dtype: what dense tensors are stored in, and plain transformers loads the model in.
        """

    @abstractmethod
    def stored(self, name: str, module: Any) -> dict[str, Tensor]:
        """The tensors on disk, by full name, of the compact weight of the module `name`; without its bias.

        Only llmslim's own format has to do with a `SparseLinear`, and only that and bitsandbytes' with a
        `BnbLinear`: others refuse their edits.

        Works on meta as well, for names, shapes and types.
        """

    def is_sized(self, full: str) -> bool:
        """Whether the size of the stored tensor of a full name follows from the config."""
        return True

    @abstractmethod
    def read(self, name: str, module: Any, get: Get) -> QuantizedWeight | SparseWeight | dict[str, Tensor]:
        """The inverse of `stored`: what the module's `store` takes; of a `BnbLinear`, its tensors by name.

        Args:
            module: a skeleton, for shape and scheme; not changed.
            get: the tensor of a full name.

        Raises:
            UserError: the tensors hold something that the config did not announce.
        """

    @abstractmethod
    def config(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
        """`quantization_config` for config.json, plain JSON; `model` before or after the edits."""

    @abstractmethod
    def edits(self, config: dict[str, Any], model: PreTrainedModel) -> list[Edit]:
        """The edits back from a `quantization_config`, which is untrusted; `model` before the edits.

        Raises:
            UserError: it is damaged, or announces what llmslim cannot read.
        """


def formats() -> dict[str, Format]:
    """Every format by its name, which is also the `quant_method` in config.json."""
    from llmslim.checkpoint.bitsandbytes import BitsAndBytesLayout
    from llmslim.checkpoint.compressed_tensors import CompressedTensors
    from llmslim.checkpoint.gptq import GPTQLayout
    from llmslim.checkpoint.own import Own

    return {form.name: form for form in (Own(), CompressedTensors(), GPTQLayout(), BitsAndBytesLayout())}


def choose(
    name: str, edits: Sequence[Edit], model: PreTrainedModel | None, dtype: torch.dtype | None = None
) -> Format:
    """The format of that name, or for "auto" compressed-tensors (of method bnb: bitsandbytes) if it can, else llmslim.

    Where a plain config says all that was done, the result is plain.

    Args:
        model: a skeleton of the plain config, in front of the edits; None when there are no edits. Edits that a
            plain config can express do not count.
        dtype: what dense tensors will be stored in; the config's when None.

    Raises:
        UserError: there is no such format, or it cannot hold the result.
    """
    known = formats()
    if name != "auto" and name not in known:
        raise UserError(f"Unknown format {name!r}{nearest(name, known)}; there are auto, {', '.join(known)}.")
    if model is not None and edits:
        config, edits = absorb(model.config, edits, model)
        if barred := next((edit for edit in edits if edit.only_plain), None):
            raise UserError(f"A {config.model_type} config cannot state {barred.only_plain}.")
        model = model if config is model.config else skeleton(config)
    if model is not None and not edits and name in ("auto", "llmslim"):
        from llmslim.checkpoint.own import Plain

        return Plain()
    if model is None or not edits:
        return known["llmslim" if name == "auto" else name]
    stored = dtype or stored_dtype(model)
    reasons = {form: known[form].refusal(edits, model, stored) for form in known}
    bound = next((edit for edit in edits if edit.only_format), None)
    if bound and (name not in ("auto", bound.only_format) or reasons[bound.only_format]):
        why = reasons[bound.only_format] or f"not into {name!r}"
        raise UserError(f"The edit {bound.kind!r} goes into the format {bound.only_format!r} only: {why}.")
    if bound:
        return known[bound.only_format]
    if name == "auto":
        standard = ("compressed-tensors", "bitsandbytes")
        return known[next((form for form in standard if not reasons[form]), "llmslim")]
    if reasons[name]:
        able = [form for form, reason in reasons.items() if not reason]
        raise UserError(f"Format {name!r} cannot hold this result: {reasons[name]}; {' or '.join(able)} can.")
    return known[name]


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """What the config says that dense tensors are stored in."""
    dtype = model.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def compact_modules(model: nn.Module) -> dict[str, Compact]:
    """The compact modules by their full name, a tied one under each of its names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Compact)}


def pack_linears(edits: Sequence[Edit]) -> dict[str, Scheme] | None:
    """name -> scheme, if packing Linears is all that the edits do; else None."""
    schemes = {edit.module: edit.scheme for edit in edits if isinstance(edit, PackLinear)}
    return schemes if len(schemes) == len(edits) else None


def as_words(packed: Tensor) -> Tensor:
    """uint8 [rows, bytes] -> int32 [rows, ceil(bytes / 4)], little end first, padded with zeros."""
    missing = -packed.shape[1] % 4
    if missing:
        packed = torch.cat([packed, packed.new_zeros(packed.shape[0], missing)], dim=1)
    # flat, since a single row may have strides that a view as another type refuses
    return packed.reshape(-1).view(torch.int32).reshape(packed.shape[0], -1)


def as_bytes(words: Tensor, width: int) -> Tensor:
    """The inverse of `as_words`: the first `width` bytes of each row."""
    return words.reshape(-1).view(torch.uint8).reshape(words.shape[0], -1)[:, :width]


def expect(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, or a UserError when its shape or kind of type is not that of `like`."""
    expect_stored(name, tensor.dtype, tensor.shape, like)
    return tensor


def expect_stored(name: str, dtype: torch.dtype, shape: Sequence[int], like: Tensor) -> None:
    """The same of a tensor that is not read yet, by what the header of its file says."""
    floats = dtype.is_floating_point and like.is_floating_point()
    if list(shape) != list(like.shape) or not (floats or dtype == like.dtype):
        raise UserError(
            f"The checkpoint's tensor {name} is {dtype} {list(shape)}, its config announces "
            f"{like.dtype} {list(like.shape)}; it is damaged, or of a layout that llmslim cannot read."
        )


def input_step(name: str, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor | None:
    """The stored step of a Linear's inputs as float32 [1]; None where there is none."""
    step = tensors.get(f"{name}.input_scale")
    if step is None:
        return None
    values = exact_scale(name, step, scheme)
    if not (values.isfinite() & (values > 0)).all():
        raise UserError(f"The checkpoint's {name}.input_scale is {values.tolist()}: it is damaged.")
    return values


def exact_scale(name: str, scale: Tensor, scheme: Scheme) -> Tensor:
    """Scales as float32, or a UserError when the scheme's type cannot hold them."""
    values = scale.float()
    if scale.dtype != getattr(torch, scheme.scale_dtype):
        rounded = values.to(getattr(torch, scheme.scale_dtype)).float()
        if not torch.equal(rounded, values):
            raise UserError(
                f"The scales {name} are {scale.dtype}, and {scheme.scale_dtype} cannot hold them exactly."
            )
    return values
