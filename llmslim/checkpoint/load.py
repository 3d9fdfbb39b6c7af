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
    quantization,
    read_edits,
    refuse_missing,
    require_finite,
)
from llmslim.errors import UserError, first_line
from llmslim.kvcache.store import read_setting
from llmslim.loaders.models import ModelFiles, find, find_device, model_class, resolve_dtype, skeleton


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

    dtype = resolve_dtype(dtype, files, device)
    stored = quantization(files) or {}
    method = stored.get("quant_method")
    config = copy.deepcopy(files.config)
    if method in ("llmslim", "compressed-tensors", "gptq"):
        config.quantization_config = _ours(files, dtype)
    if method == "bitsandbytes":  # computes in its own type, else
        config.quantization_config = {
            **stored,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        }
    files.weights  # noqa: B018  refuses folders without safetensors
    if method is None or method in formats():
        reader = CheckpointReader(files)  # refuses files that lack tensors, or hold others
        reader.check_bnb()
    else:
        skeleton(plain_config(files))  # refuses configs that describe no model
    setting = read_setting(files.folder)
    model, missing = _by_transformers(files, config, dtype, device, method)
    # of what only transformers reads
    refuse_missing(files, [name for name in missing if not may_lack(model, name)])
    settle(model)
    if method == "bitsandbytes":  # of which transformers leaves what is dense in the stored type
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    for name, parameter in model.named_parameters():
        require_finite(files, name, parameter.detach())
    if setting is not None and model.can_generate():
        from llmslim.kvcache.runtime.cache import attach

        attach(model, setting)
    return model.eval()


def _by_transformers(
    files: ModelFiles, config: Any, dtype: torch.dtype, device: torch.device, method: str | None
) -> tuple[PreTrainedModel, list[str]]:
    """The model as transformers loads it, and what the files lack of it."""
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
        raise UserError(f"{files.spec} is quantized with {method!r}: {first_line(error)}.") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"{files.spec}: some tensors have other shapes than config.json says, as told above; the folder is damaged."
        ) from error
    return model, told["missing_keys"]


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
