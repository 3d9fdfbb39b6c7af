"""Read a checkpoint part by part: whatever its format, blocks come out ready to compute with."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from llmslim.anatomy import Anatomy
from llmslim.calibration.statistics import is_finite
from llmslim.checkpoint.formats import Compact, Format, Packed, expect, expect_stored, formats
from llmslim.checkpoint.inventory import dense_tensors, part_of, stored_tensors
from llmslim.edit import Edit, replay
from llmslim.errors import UserError
from llmslim.loaders.models import ModelFiles, place, release, skeleton, tie
from llmslim.loaders.safetensors_io import DTYPES
from llmslim.quantization.bnb_linear import BnbLinear
from llmslim.quantization.grid import QuantizedWeight
from llmslim.quantization.packed import PackedLinear
from llmslim.sparse import SparseLinear, SparseWeight
from llmslim.ties import counterpart, shared_modules


class CheckpointReader:
    """The weights of a model folder, dense or compressed, for skeletons that are filled a part at a time.

    Attributes:
        edits: what the checkpoint's structure differs from its config by.
        form: the format of its packed weights; None when it has none.
        streams: whether parts are read from the files when asked for. False when the files need transformers'
            own conversion (experts stored one by one): then the first `fill` loads the whole model.
        made_up: names of what the files may lack, do lack, and transformers fills with random numbers.

    Args:
        fresh_head: the files may lack the head, which will be made anew.

    Raises:
        UserError: the files lack tensors, or hold others than the config announces.
    """

    def __init__(self, files: ModelFiles, fresh_head: bool = False) -> None:
        self.files, self.fresh_head = files, fresh_head
        self.form, self.edits = read_edits(files)
        self.weights = files.weights
        self.made_up: list[str] = []
        self._binding = self._bind()
        self._refuse_untied()
        self.streams = self._binding is not None
        self._whole: dict[str, Tensor] | None = None

    def model_skeleton(self) -> PreTrainedModel:
        """The model on meta, edits replayed, without a KV cache."""
        return edited_skeleton(self.files, self.edits)

    def fill(
        self,
        models: Sequence[nn.Module],
        prefix: str | None,
        dtype: torch.dtype,
        round_to: torch.dtype | None = None,
        forget: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Put the tensors below `prefix` (None: those outside the blocks) into skeletons of this checkpoint.

        Args:
            models: each gets parameters of its own on the same memory.
            dtype: what dense floats are cast to, but for tables of embeddings that are not tied to a head,
                which keep the type they are stored in. Packed weights are never cast.
            round_to: what dense floats are rounded to first.
            forget: when the model had to be loaded whole, drop what has been placed.
        """
        device = device or torch.device("cpu")
        shared = shared_modules(models[0])
        with self._open() as read:
            for name, module in part_of(models[0], prefix):
                get = _following(read, name, counterpart(name, shared))
                # T5 has embeddings inside blocks, too, which are computed with there
                table = prefix is None and isinstance(module, nn.Embedding)
                tensors = self._dense(name, module, models[0], get, dtype, round_to, table)
                if isinstance(module, Compact) and not self._is_tied(models[0], f"{name}.weight_packed"):
                    tensors |= self._compact(name, module, get, dtype, round_to)
                for full, tensor in tensors.items():
                    require_finite(self.files, full, tensor)
                    for model in models:
                        place(model, full, tensor.to(device))
                if isinstance(module, Packed):
                    for model in models:
                        model.get_submodule(name).int4pack = None  # type: ignore[assignment]
        if prefix is None:
            for model in models:
                tie(model)
        if forget and self._whole is not None:
            for full in stored_tensors(self._reference, self._storage, prefix):
                self._whole.pop(full, None)

    def _dense(
        self,
        name: str,
        module: nn.Module,
        model: nn.Module,
        get: Callable[[str], Tensor],
        dtype: torch.dtype,
        round_to: torch.dtype | None,
        table: bool,
    ) -> dict[str, Tensor]:
        ties = getattr(model, "all_tied_weights_keys", None) or {}
        placed = {}
        for full in dense_tensors(name, module):
            if full in ties:
                continue
            tensor = stored = get(full)
            expect(full, tensor, model.get_parameter_or_buffer(full))  # type: ignore[operator]
            if tensor.is_floating_point():
                tensor = tensor.to(round_to or tensor.dtype)
                if not table or full in ties.values():
                    tensor = tensor.to(dtype)
            # the file's map is closed after
            placed[full] = tensor.clone() if tensor.data_ptr() == stored.data_ptr() else tensor
        return placed

    def _compact(
        self,
        name: str,
        module: Compact,
        get: Callable[[str], Tensor],
        dtype: torch.dtype,
        round_to: torch.dtype | None,
    ) -> dict[str, Tensor]:
        """A compact module's own parameters and buffers without its bias, by full name."""
        if isinstance(module, SparseLinear):
            sparse = self._storage.read(name, module, get)
            assert isinstance(sparse, SparseWeight)  # as for every SparseLinear
            dense = module.dense(sparse, round_to or sparse.values.dtype).to(dtype)
            return {f"{name}.weight": dense, f"{name}.weight_bitmap": sparse.bitmap.clone()}
        if isinstance(module, BnbLinear):
            parts = self._storage.read(name, module, get)
            assert isinstance(parts, dict)  # as for every BnbLinear
            return {f"{name}.{leaf}": tensor.clone() for leaf, tensor in parts.items()}
        if self._storage.name == "llmslim":  # they are what is stored
            like = self._storage.stored(name, module)
            return {
                full: expect(full, get(full), tensor).to(tensor.dtype).clone()
                for full, tensor in like.items()
            }
        quantized = self._storage.read(name, module, get)
        assert isinstance(quantized, QuantizedWeight)
        filled = PackedLinear.from_quantized(quantized)
        return {f"{name}.{leaf}": tensor.detach() for leaf, tensor in filled.named_parameters()}

    @property
    def _storage(self) -> Format:
        """How packed weights lie where tensors come from: in the files, or in a model loaded whole."""
        return self.form if self.form is not None and self.streams else formats()["llmslim"]

    def _bind(self) -> dict[str, str] | None:
        """Expected name -> name in the files; None: some are there, or are made, only by transformers' own ways."""
        self._reference = self.model_skeleton()
        form = self.form or formats()["llmslim"]
        announced = stored_tensors(self._reference, form)
        binding = {name: self._found(name) for name in announced}
        self._expect(form, announced, binding)
        if open_ := [name for name, found in binding.items() if found is None]:
            lost = [name for name in self._lost(open_) if not (self.fresh_head and self._is_head(name))]
            refuse_missing(self.files, [name for name in lost if not may_lack(self._reference, name)])
            self.made_up = lost
            return None
        return cast(dict[str, str], binding)

    def _expect(
        self, form: Format, announced: dict[str, tuple[Tensor, bool]], binding: dict[str, str | None]
    ) -> None:
        """Refuse tensors that, by the headers, are not what the config announces."""
        steps = get_model_conversion_mapping(self._reference)
        converts = any(isinstance(step, WeightConverter) for step in steps)
        for name, found in binding.items():
            like, is_dense = announced[name]
            # what transformers converts while it loads may have another shape in the files; heads are made anew
            if found is None or (is_dense and converts) or (self.fresh_head and self._is_head(name)):
                continue
            if form.is_sized(name):
                entry = self.weights.entries[found]
                expect_stored(found, DTYPES[entry["dtype"]], entry["shape"], like)

    def check_bnb(self) -> None:
        """Refuse values in bitsandbytes' weights that its own loading would stumble over."""
        form, shared = self.form or formats()["llmslim"], shared_modules(self._reference)
        with self.weights.open() as get:
            for name, module in self._reference.named_modules():
                if isinstance(module, BnbLinear) and not counterpart(name, shared):
                    parts = form.read(name, module, lambda full: get(self._found(full)))
                    assert isinstance(parts, dict)  # as for every BnbLinear
                    for leaf, tensor in parts.items():
                        require_finite(self.files, f"{name}.{leaf}", tensor)

    def _found(self, name: str) -> str | None:
        """What a tensor is called in the files, which may lack the base model's prefix or have it in excess."""
        prefix = f"{self._reference.base_model_prefix}."
        options = (name, prefix + name, name.removeprefix(prefix))
        return next((o for o in options if o in self.weights.entries), None) or self._renamed.get(name)

    def _lost(self, names: Sequence[str]) -> list[str]:
        """What the files lack of the names, called as the family's files call it."""
        model = self._reference
        own, ties = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
        there = {source for target, source in ties.items() if self._found(target)}  # saved by the other name
        computed = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        lost = []
        for name in names:
            if name in there or any(pattern.search(name) for pattern in computed):
                continue
            saved = revert_weight_conversion(model, {name: own[name]}) if name in own else {name: None}
            lost += [part for part in saved if self._found(part) is None]
        return lost

    def _refuse_untied(self) -> None:
        """Refuse two different tensors where the config has one: transformers would compute with both, untied."""
        ties = getattr(self._reference, "all_tied_weights_keys", None) or {}
        for names in ties.items():
            target, source = map(self._found, names)
            if target and source and target != source and not self.weights.same(target, source):
                raise UserError(
                    f"{self.files.spec}: config.json ties {target} to {source}, and the files have two different "
                    'tensors: write "tie_word_embeddings": false into config.json, or leave the one out that is not '
                    "meant."
                )

    def _is_head(self, name: str) -> bool:
        """Whether a tensor is what classifiers have beside blocks and embeddings."""
        model = self._reference
        inside = model.base_model is model or name.startswith(f"{model.base_model_prefix}.")
        return not inside or "pooler" in name

    @property
    def unread_blocks(self) -> list[str]:
        """Blocks in the files beyond those of the config, by name; none that transformers knows to leave out."""
        model = self._reference
        skipped = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        found: dict[str, None] = {}
        for stack in Anatomy(model).stacks:
            short = stack.name.removeprefix(f"{model.base_model_prefix}.")
            block = re.compile(rf"(?:.+\.)?{re.escape(short)}\.(\d+)\.")
            for name in self.weights.entries:
                match = block.match(name)
                if match and int(match[1]) >= len(stack.blocks) and not any(p.search(name) for p in skipped):
                    found[f"{stack.name}.{match[1]}"] = None
        return sorted(found, key=lambda name: (name.rpartition(".")[0], int(name.rpartition(".")[2])))

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Names that transformers gives to tensors stored under an older one -> that older name."""
        model = self._reference
        known = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
        state, prefix = model.state_dict(), model.base_model_prefix
        return {rename_source_key(name, known, [], prefix, state)[0]: name for name in self.weights.entries}

    @contextmanager
    def _open(self) -> Iterator[Callable[[str], Tensor]]:
        if self._binding is not None:
            with self.weights.open() as get:
                yield lambda name: get(self._binding[name])  # type: ignore[index]
            return
        if self._whole is None:
            from llmslim.checkpoint.load import load_model

            loaded = load_model(self.files, dtype="auto", device=torch.device("cpu"))
            own = formats()["llmslim"]
            found = {name: tensor for name, (tensor, _) in stored_tensors(loaded, own).items()}
            release(loaded, "")
            # copied one by one: some are views of the files' map, all of which would stay in memory for them
            self._whole = {name: found.pop(name).clone() for name in list(found)}
        yield self._whole.__getitem__

    @staticmethod
    def _is_tied(model: nn.Module, name: str) -> bool:
        return name in (getattr(model, "all_tied_weights_keys", None) or {})


def may_lack(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is of the pooler of an encoder without a head, whose hidden states do without it.

    Many are saved without one, from models with a head that has none.
    """
    return model.base_model is model and "pooler" in name.split(".")


def refuse_missing(files: ModelFiles, names: Collection[str]) -> None:
    """Refuse a folder that lacks tensors, which would be filled with random numbers."""
    if names:
        some = ", ".join(sorted(names)[:3])
        raise UserError(
            f"{files.spec} lacks {len(names)} tensors, such as {some}, that its config.json announces: it is damaged "
            "or another model's; download or save it again."
        )


def require_finite(files: ModelFiles, name: str, tensor: Tensor) -> None:
    """Refuse a tensor from which nothing can be computed; packed integers are always finite."""
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not is_finite(tensor):
        raise UserError(
            f"{files.spec}: the tensor {name} has NaN or infinite values, or larger ones than the type of the run can "
            "hold, from which nothing can be computed; mend the model."
        )


def _following(read: Callable[[str], Tensor], name: str, source: str | None) -> Callable[[str], Tensor]:
    """`read`, with what the module `name` shares taken from `source`; its bias is its own."""
    if source is None:
        return read
    return lambda full: read(full if full == f"{name}.bias" else source + full.removeprefix(name))


def model_on_meta(files: ModelFiles) -> PreTrainedModel:
    """The model of a folder, as `CheckpointReader.model_skeleton` makes it, without a look at its weights."""
    return edited_skeleton(files, read_edits(files)[1])


def edited_skeleton(files: ModelFiles, edits: Sequence[Edit]) -> PreTrainedModel:
    """The model of a folder on meta, its edits replayed, without a KV cache; from its config alone."""
    config = plain_config(files)
    config.get_text_config(decoder=True).use_cache = False
    config.use_cache = False
    model = skeleton(config)
    replay(model, edits)
    return model


def plain_config(files: ModelFiles) -> Any:
    """A copy of the config as if nothing were quantized."""
    config = copy.deepcopy(files.config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    return config


def quantization(files: ModelFiles) -> dict[str, Any] | None:
    """The quantization_config of the files; None when there is none.

    Raises:
        UserError: its quant_method is no name.
    """
    stored = getattr(files.config, "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    if method is not None and not isinstance(method, str):
        raise UserError(
            f"{files.spec} is quantized with {method!r}, which is no name of a method; llmslim reads "
            f"{', '.join(formats())} and models that are not quantized."
        )
    return stored


def read_edits(files: ModelFiles) -> tuple[Format | None, list[Edit]]:
    """The format and the edits of a folder, from its config.json alone.

    Raises:
        UserError: it is quantized in a way that llmslim does not read.
    """
    stored, known = quantization(files), formats()
    if stored is None:
        return None, []
    method = stored.get("quant_method")
    if method not in known:
        raise UserError(
            f"{files.spec} is quantized with {method!r}; llmslim reads {', '.join(known)} and models that "
            "are not quantized."
        )
    model = skeleton(plain_config(files))
    return known[method], known[method].edits(stored, model)
