"""Load any model, dense or compressed, into memory: packed weights stay packed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from llmslim.checkpoint.bitsandbytes import settle
from llmslim.checkpoint.formats import formats
from llmslim.checkpoint.names import relative
from llmslim.checkpoint.reader import (
    CheckpointReader,
    may_lack,
    plain_config,
    read_edits,
    refuse_missing,
    require_finite,
)
from llmslim.errors import UserError
from llmslim.kvcache.store import read_setting
from llmslim.loaders.models import ModelFiles, compute_dtype, find, find_device, model_class, skeleton


def load(
    spec: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A model in eval mode and its tokenizer.

    Args:
        spec: a Hub id, a folder, a .gguf file, or "demo". Checkpoints of llmslim, compressed-tensors
            (pack-quantized) and GPTQ come with fast packed Linears, bitsandbytes with its own. A checkpoint made
            with the step `kv_cache` generates with a quantized KV cache.
        revision: of a Hub model.
        dtype: to compute in; by default bfloat16 where the machine is fast at it, else float32.
            "auto": as stored.
        device: the GPU if there is one when None.

    Raises:
        UserError: there is no such model, its files lack tensors, or it is quantized in a way that llmslim does not
            read.
    """
    where = find_device(device)
    files = find(spec, revision)
    return load_model(files, dtype, where), files.tokenizer()


def load_model(files: ModelFiles, dtype: torch.dtype | str | None, device: torch.device) -> PreTrainedModel:
    """The model of files at hand, on `device`."""
    from llmslim.checkpoint import plugin  # noqa: F401  registers with transformers

    dtype = _resolve(dtype, files, device)
    method = _method(files)
    config = copy.deepcopy(files.config)
    if method in ("llmslim", "compressed-tensors", "gptq"):
        config.quantization_config = _ours(files, dtype)
    if method == "bitsandbytes":  # computes in its own type, else
        config.quantization_config = {
            **_stored(files),
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        }
    files.weights  # noqa: B018  refuses folders without safetensors
    if method is None or method in formats():
        CheckpointReader(files)  # refuses files that lack tensors
    try:
        cls: Any = model_class(config)
        model, told = cls.from_pretrained(
            files.folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
    except ImportError as error:  # AWQ, bitsandbytes and so on, whose packages are not installed
        raise UserError(
            f"{files.spec} is quantized with {method!r}: {str(error).strip().splitlines()[0]}"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"{files.spec}: some tensors have other shapes than config.json says, as told above; the folder is damaged."
        ) from error
    # of what only transformers reads
    refuse_missing(files, [name for name in told["missing_keys"] if not may_lack(model, name)])
    settle(model)
    if method == "bitsandbytes":  # of which transformers leaves what is dense in the stored type
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    for name, parameter in model.named_parameters():
        require_finite(files, name, parameter.detach())
    setting = read_setting(files.folder)
    if setting is not None and model.can_generate():
        from llmslim.kvcache.runtime.cache import attach

        attach(model, setting)
    return model.eval()


def _resolve(dtype: torch.dtype | str | None, files: ModelFiles, device: torch.device) -> torch.dtype:
    if dtype is None:
        return compute_dtype(device, files.dtype)
    named = (
        files.dtype if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    )
    if not isinstance(named, torch.dtype):
        raise UserError(f"Unknown dtype {dtype!r}; use float32, bfloat16, float16 or auto.")
    return named


def _method(files: ModelFiles) -> str | None:
    return _stored(files).get("quant_method")


def _stored(files: ModelFiles) -> dict[str, Any]:
    """The quantization_config of the files; empty when there is none."""
    stored = getattr(files.config, "quantization_config", None) or {}
    return stored if isinstance(stored, dict) else stored.to_dict()


def _ours(files: ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    """The quantization_config with which our quantizer reads the files, whatever their format."""
    form, edits = read_edits(files)
    assert form is not None
    model = skeleton(plain_config(files))
    records = [edit.to_json() for edit in relative(edits, model)]
    ours: dict[str, Any] = {"quant_method": "llmslim", "format_version": 1, "edits": records}
    if form.name != "llmslim":
        ours |= {"storage": form.name, "stored_config": form.config(edits, model, dtype)}
    return ours
