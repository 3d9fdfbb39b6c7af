"""A quantized cache for a model, and how `generate` comes to use it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmslim.errors import UserError
from llmslim.kvcache.runtime.attention import NAME
from llmslim.kvcache.runtime.eviction import EVICTING
from llmslim.kvcache.runtime.layer import KVLayer
from llmslim.kvcache.settings import KVSettings, head_sizes


class KVCache(Cache):
    """Keys and values of past tokens in few bits, for `past_key_values`.

    Attention reads it packed where the model's implementation is "llmslim" (in `kv_cache(model)`, or after
    `model.set_attn_implementation("llmslim")`), and gets it written out, layer by layer, elsewhere. Layers that are
    no attention (of hybrid models) stay what they are in transformers.

    Args:
        config: of the model.
        bits, method, group_size, window, sink, layer_bits, evict, keep: see `KVSettings`; a list of bits is
            `layer_bits`.

    Raises:
        UserError: settings that do not fit the heads of the model.
    """

    def __init__(self, config: PreTrainedConfig, settings: KVSettings | None = None, **fields: Any) -> None:
        settings = KVSettings.of(**fields) if settings is None else settings
        text = config.get_text_config(decoder=True)
        check_heads(text, settings)
        limit = getattr(text, "max_position_embeddings", None)
        layers: list[Any] = DynamicCache(config=text).layers
        ours = [i for i, one in enumerate(layers) if type(one) in (DynamicLayer, DynamicSlidingWindowLayer)]
        if settings.layer_bits and len(settings.layer_bits) != len(ours):
            raise UserError(
                f"kv_cache: layer_bits are for {len(settings.layer_bits)} attention layers, and this model has "
                f"{len(ours)}: measure them for this model."
            )
        if settings.method == "pca":
            check_components(text, settings, len(ours))
        if settings.evict and all(layers[i].is_sliding for i in ours):
            raise UserError("kv_cache: evict has nothing to do, since every layer has a sliding window.")
        for number, index in enumerate(ours):
            own, window = settings.of_layer(number), getattr(layers[index], "sliding_window", None)
            kind = EVICTING[settings.evict] if settings.evict and window is None else KVLayer
            layers[index] = kind(own, lambda: text._attn_implementation == NAME, window, limit)
        super().__init__(layers=layers)
        self.settings = settings

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if layer_idx >= len(self.layers):
            raise UserError(
                f"This KV cache was made for a model of {len(self.layers)} layers, and layer {layer_idx + 1} asks "
                "for it: a cache belongs to one model; make one of this model's config."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of all that the attention layers hold, scales included."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, KVLayer))


def check_heads(config: PreTrainedConfig, settings: KVSettings) -> None:
    """Refuse bits and groups that do not fit the head size that the config tells."""
    for size in head_sizes(config):
        settings.check(size)


def check_components(config: PreTrainedConfig, settings: KVSettings, layers: int) -> None:
    """Refuse components of keys that are not there, or of another model."""
    if not settings.components:
        raise UserError(
            "kv_cache: method = pca stores keys in their principal components, which are measured on a text first: "
            "llmslim.fit_kv_components(model, tokens, bits=2) gives the settings."
        )
    found, sizes = {one.shape[-1] for one in settings.components}, head_sizes(config)
    if len(settings.components) != layers or (sizes and found != set(sizes)):
        raise UserError(
            f"kv_cache: components are of {len(settings.components)} layers with heads of {sorted(found)} channels, "
            f"and this model has {layers} with {sizes}: measure them for this model."
        )


def can_read_packed(model: PreTrainedModel) -> str:
    """Why the attention of this model cannot be given packed keys; empty when it can."""
    name = type(model).__name__
    if not model._supports_attention_backend:
        return f"the attention of {name} is written out in its own code"
    if getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        return f"layers of {name} hand their keys to other layers"
    return ""


class Attached:
    """A model whose forward and `generate` make quantized caches; `undo()` makes it what it was."""

    def __init__(self, model: PreTrainedModel, settings: KVSettings, packed: bool) -> None:
        if model.config.is_encoder_decoder or not model.can_generate():
            raise UserError(
                f"{type(model).__name__} has no cache to quantize: it takes a causal language model."
            )
        KVCache(model.config, settings)  # refuses settings that do not fit
        self.model, self.settings = model, settings
        self.before = model.config.get_text_config(decoder=True)._attn_implementation
        self.note = ""
        if packed:
            self.note = can_read_packed(model)
            if not self.note:
                model.set_attn_implementation(NAME)
        if settings.evict and (self.note or not packed):
            why = self.note or "packed = False leaves it to the model's own attention"
            raise UserError(
                f"kv_cache: evict needs to see the attention of the model, but {why}: leave out evict."
            )
        self.hook = model.register_forward_pre_hook(
            self._fill, with_kwargs=True, prepend=True
        )  # the latest wins
        self.prepared = vars(model).get("_prepare_cache_for_generation")
        prepare: Any = model._prepare_cache_for_generation

        def prepared(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            asked = (
                generation_config.use_cache is not False and generation_config.cache_implementation is None
            )
            if asked and model_kwargs.get("past_key_values") is None:
                model_kwargs["past_key_values"] = KVCache(model.config, settings)
            return prepare(generation_config, model_kwargs, *args, **kwargs)

        model._prepare_cache_for_generation = prepared  # type: ignore[assignment]

    def _fill(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        wanted = kwargs.get("use_cache", getattr(model.config, "use_cache", True))
        if wanted and kwargs.get("past_key_values") is None and not model.training:
            kwargs["past_key_values"] = KVCache(model.config, self.settings)
        return args, kwargs

    def undo(self) -> None:
        self.hook.remove()
        if self.prepared is None:
            del self.model._prepare_cache_for_generation
        else:
            self.model._prepare_cache_for_generation = self.prepared  # type: ignore[assignment]
        if not self.note and self.model.config.get_text_config(decoder=True)._attn_implementation == NAME:
            self.model.set_attn_implementation(self.before)


def attach(model: PreTrainedModel, settings: KVSettings, packed: bool = True) -> Attached:
    """Make the model's caches quantized from now on; warns where attention cannot read them packed."""
    attached = Attached(model, settings, packed)
    if attached.note:
        warnings.warn(f"The quantized KV cache is written out for attention: {attached.note}.", stacklevel=3)
    return attached


@contextmanager
def kv_cache(
    model: PreTrainedModel, *, packed: bool = True, settings: KVSettings | None = None, **fields: Any
) -> Iterator[Attached]:
    """Within it, `model.generate(...)` and `model(..., use_cache=True)` make quantized KV caches.

        with llmslim.kv_cache(model, bits=4):
            model.generate(...)

    Args:
        packed: attention reads the cache packed. False: it is written out for each layer's attention, which takes
            more memory and time and serves as the reference.
        settings: in place of what follows, such as those of `allocate_kv_bits`.
        bits, method, group_size, window, sink, layer_bits, evict, keep: see `KVSettings`; a list of bits is
            `layer_bits`.

    Raises:
        UserError: a model without a cache, or settings that do not fit its heads.
    """
    if settings is not None and fields:
        raise UserError(f"kv_cache: settings and {next(iter(fields))} both say how; give one.")
    attached = attach(model, settings or KVSettings.of(**fields), packed)
    try:
        yield attached
    finally:
        attached.undo()
