"""compressed-tensors, "pack-quantized" and "int-quantized": what vLLM and plain transformers (with that package) load.

Per Linear `name` with weight [out, in]:

    name.weight_packed  int32 [out, ceil(in * bits / 32)], a little-endian bit stream per row, as ours
    name.weight_scale   [out, groups], [out, 1] or [1]
    name.weight_shape   int64 [2] = (out, in)
    name.weight_zero_point  int32 [ceil(out * bits / 32), groups], packed along out; only when asymmetric

Codes are stored unsigned, shifted by 2**(bits-1), as ours. With activations at 8 bits (per token, or of one scale),
which vLLM reads beside 8-bit weights with a scale per channel or tensor, "int-quantized":

    name.weight         int8 [out, in], codes less 128
    name.weight_scale   [out, 1] or [1]
    name.input_scale    [1], only of one scale

Written: symmetric 3, 4 and 8 bits on nn.Linear,
since transformers loads no asymmetric one (compressed-tensors 0.20). Read: asymmetric too. Not read:
other quantized activations, float types, transforms, the removed activation ordering with a g_idx.

A KV cache in FP8 (`kvcache.fp8`) is `kv_cache_scheme` in the config, and per attention `k_scale` and `v_scale` [1].
Another one is not read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmslim.anatomy import Anatomy
from llmslim.checkpoint.formats import (
    Format,
    Get,
    Packed,
    as_bytes,
    as_words,
    exact_scale,
    expect,
    input_step,
    pack_linears,
    stored_dtype,
)
from llmslim.edit import Edit, replace_module
from llmslim.errors import UserError
from llmslim.kvcache.fp8 import SCHEME, ScaleCache
from llmslim.loaders.models import skeleton
from llmslim.quantization import packing
from llmslim.quantization.edits import PackLinear
from llmslim.quantization.grid import QuantizedWeight, Scheme

LAYOUT, INTEGERS, DENSE = "pack-quantized", "int-quantized", "dense"
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {**TOKEN, "strategy": "tensor", "dynamic": False}
INPUTS = {"token": TOKEN, "tensor": STATIC}  # by Scheme.activation_scale
BITS = (3, 4, 8)


class CompressedTensors(Format):
    name = "compressed-tensors"

    def refusal(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> str | None:
        edits = _without_scales(edits)
        schemes = pack_linears(edits)
        if schemes is None:
            other = next(edit for edit in edits if not isinstance(edit, PackLinear))
            return f"it holds packed Linears only, and the result has the edit {other.kind!r}"
        if len({scheme.activation_bits for scheme in schemes.values()}) > 1:
            return "it has one layout, and only some of the Linears have quantized activations"
        for name, scheme in schemes.items():
            if scheme.activation_bits and (scheme.bits != 8 or isinstance(scheme.group_size, int)):
                return "beside quantized activations it has 8-bit weights with a scale per channel or tensor"
            if not scheme.symmetric:
                return "asymmetric weights in it do not load in transformers"
            if scheme.bits not in BITS:
                return (
                    f"of its bit widths only {BITS} load everywhere, and a Linear has {scheme.bits}-bit codes"
                )
            if not isinstance(model.get_submodule(name), nn.Linear):
                return f"{name} is a {type(model.get_submodule(name)).__name__}, and it knows nn.Linear only"
            if dtype not in (torch.float32, getattr(torch, scheme.scale_dtype)):
                return f"its scales are loaded as {dtype}, which cannot hold {scheme.scale_dtype} ones"
        if _reaches_for_weights(model, schemes):
            return (
                f"transformers cannot load it into {type(model).__name__}, which looks for the dense weights"
            )
        return None

    def stored(self, name: str, module: Packed) -> dict[str, Tensor]:
        scheme, (rows, columns) = module.scheme, module.shape
        scale = module.weight_scale.detach()
        if scheme.activation_bits:
            codes = packing.unpack(module.weight_packed.detach(), 8, columns)
            one = scale.reshape(1) if scheme.group_size == "tensor" else scale
            step = {} if module.input_scale is None else {f"{name}.input_scale": module.input_scale.detach()}
            return {f"{name}.weight": (codes ^ 128).view(torch.int8), f"{name}.weight_scale": one, **step}
        tensors = {
            "weight_packed": as_words(module.weight_packed.detach()),
            "weight_scale": scale.reshape(1) if scheme.group_size == "tensor" else scale,
            "weight_shape": torch.tensor([rows, columns], device=scale.device),
        }
        if module.weight_zero_point is not None:
            packed = packing.pack(module.weight_zero_point.detach().T.contiguous(), scheme.bits)
            tensors["weight_zero_point"] = as_words(packed).T.contiguous()
        return {f"{name}.{part}": tensor for part, tensor in tensors.items()}

    def read(self, name: str, module: Packed, get: Get) -> QuantizedWeight:
        tensors = {full: expect(full, get(full), like) for full, like in self.stored(name, module).items()}
        scheme, (rows, columns) = module.scheme, module.shape
        if scheme.activation_bits:
            scale = exact_scale(name, tensors[f"{name}.weight_scale"], scheme)
            codes = tensors[f"{name}.weight"].view(torch.uint8) ^ 128
            step = input_step(name, tensors, scheme)
            return QuantizedWeight(scheme, codes, scale.reshape(module.weight_scale.shape), None, step)
        if tensors[f"{name}.weight_shape"].tolist() != [rows, columns]:
            raise UserError(
                f"The checkpoint's {name} is not of the shape {[rows, columns]} that the model has."
            )
        width = packing.packed_width(columns, scheme.bits)
        codes = packing.unpack(as_bytes(tensors[f"{name}.weight_packed"], width), scheme.bits, columns)
        scale = exact_scale(name, tensors[f"{name}.weight_scale"], scheme).reshape(module.weight_scale.shape)
        zero = tensors.get(f"{name}.weight_zero_point")
        if zero is not None:
            bytes_ = as_bytes(zero.T, packing.packed_width(rows, scheme.bits))
            zero = packing.unpack(bytes_, scheme.bits, rows).T.contiguous()
        return QuantizedWeight(scheme, codes, scale, zero)

    def config(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
        """The commonest scheme takes all Linears, others name theirs; Linears left dense are ignored."""
        packing_edits = _without_scales(edits)
        schemes = pack_linears(packing_edits)
        assert schemes is not None
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        ranked = [scheme for scheme, _ in Counter(schemes.values()).most_common()]
        groups = {}
        for number, scheme in enumerate(ranked):
            named = [name for name, other in schemes.items() if other == scheme]
            groups[f"group_{number}"] = {
                "targets": named if number else ["Linear"],
                "weights": _weight_arguments(scheme, dtype),
                "input_activations": dict(INPUTS[scheme.activation_scale])
                if scheme.activation_bits
                else None,
                "output_activations": None,
                "format": INTEGERS if scheme.activation_bits else LAYOUT,
            }
        return {
            "quant_method": self.name,
            "format": groups["group_0"]["format"] if groups else DENSE,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": dict(SCHEME) if len(packing_edits) < len(edits) else None,
            "ignore": [name for name in linears if name not in schemes],
            "config_groups": groups,
        }

    def edits(self, config: dict[str, Any], model: PreTrainedModel) -> list[Edit]:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise UserError("The checkpoint's compressed-tensors config has no readable config_groups.")
        cache = config.get("kv_cache_scheme")
        if cache and not _has(cache, SCHEME):
            raise UserError(
                f"The checkpoint has the kv_cache_scheme {cache!r}, and llmslim reads FP8 with a scale per tensor only."
            )
        for key in ("transform_config", "sparsity_config"):
            if config.get(key):
                raise UserError(
                    f"The checkpoint uses compressed-tensors' {key}, which llmslim does not read."
                )
        if config.get("quantization_status", "compressed") != "compressed":
            raise UserError(
                f"The checkpoint has quantization_status {config['quantization_status']!r}, not 'compressed'."
            )
        dtype = stored_dtype(model)
        targets: dict[str, Scheme] = {}
        for group in groups.values():
            scheme = _scheme(group, config.get("format"), dtype)
            targets.update(dict.fromkeys(_strings(group.get("targets")), scheme))
        ignore = _strings(config.get("ignore") or [])
        edits: list[Edit] = []
        if cache:
            edits += [ScaleCache(module=block.attention.name) for block in Anatomy(model).blocks]
        for name, module in model.named_modules():
            matched = _matches(name, module, targets) if isinstance(module, nn.Linear) else []
            if matched and not _matches(name, module, ignore):
                edits.append(PackLinear(module=name, scheme=targets[matched[0]]))
        return edits


def _without_scales(edits: Sequence[Edit]) -> list[Edit]:
    return [edit for edit in edits if not isinstance(edit, ScaleCache)]


def _reaches_for_weights(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether the model's `_init_weights`, which transformers calls while loading, uses weights of Linears
    through their parents (T5, ModernBERT): compressed-tensors has removed them by then. Tried out on meta.
    """
    trial = skeleton(model.config)
    for name in names:
        replace_module(trial, name, nn.Module())
    for parameter in trial.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # nothing to compute
    try:
        trial.initialize_weights()
    except AttributeError:
        return True
    return False


def _weight_arguments(scheme: Scheme, dtype: torch.dtype) -> dict[str, Any]:
    strategy = scheme.group_size if isinstance(scheme.group_size, str) else "group"
    arguments = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group_size if strategy == "group" else None,
        "dynamic": False,
    }
    if getattr(torch, scheme.scale_dtype) != dtype:
        arguments["scale_dtype"] = f"torch.{scheme.scale_dtype}"  # else the checkpoint's type is meant
    return arguments


def _scheme(group: dict[str, Any], layout: Any, dtype: torch.dtype) -> Scheme:
    """The scheme of one config group, or a UserError that names what we cannot read."""
    weights = group.get("weights")
    layout = group.get("format") or layout
    inputs, outputs = group.get("input_activations"), group.get("output_activations")
    known = [kind for kind, fields in INPUTS.items() if _has(inputs, fields)]
    foreign = outputs or (inputs and not known)
    if layout != (INTEGERS if known else LAYOUT) or foreign or not isinstance(weights, dict):
        what = f"quantized activations {outputs or inputs}" if foreign else f"the layout {layout!r}"
        raise UserError(
            f"The checkpoint is compressed-tensors with {what}; llmslim reads weight-only {LAYOUT!r}, and {INTEGERS!r} "
            "with activations at 8 bits, symmetric, per token or of one scale."
        )
    if (
        weights.get("type", "int") != "int"
        or weights.get("dynamic")
        or weights.get("actorder") in ("group", "dynamic")
    ):
        raise UserError(
            f"The checkpoint is compressed-tensors with weights {weights}, which llmslim does not read."
        )
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    scale = str(weights.get("scale_dtype") or dtype).removeprefix("torch.")
    try:
        return Scheme(
            bits=weights.get("num_bits", 8),
            group_size=size if strategy == "group" else strategy,  # type: ignore[arg-type]
            symmetric=weights.get("symmetric", True),
            scale_dtype=scale,  # type: ignore[arg-type]
            activation_bits=8 if known else None,
            activation_scale=known[0] if known else "token",  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise UserError(
            f"The checkpoint is compressed-tensors with weights {weights}, which llmslim does not read."
        ) from error


def _has(given: Any, fields: dict[str, Any]) -> bool:
    return isinstance(given, dict) and all(given.get(key) == value for key, value in fields.items())


def _strings(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(
            "The checkpoint's compressed-tensors config has targets or ignore that are no lists of names."
        )
    return value


def _matches(name: str, module: nn.Module, targets: Sequence[str] | dict[str, Scheme]) -> list[str]:
    """The targets that fit a module, best first: its name, a regular expression ("re:..."), its class."""
    exact = [target for target in targets if target == name]
    try:
        patterns = sorted(t for t in targets if t.startswith("re:") and re.match(t[3:], name))
    except re.error as error:
        raise UserError(
            f"The checkpoint's compressed-tensors config has targets or ignore with {error.pattern!r}, which is no "
            f"regular expression: {error.msg}."
        ) from error
    classes = {cls.__name__ for cls in type(module).__mro__}
    return [*exact, *patterns, *[target for target in targets if target in classes]]
