"""Does a saved checkpoint give what was made? Checked in a fresh process, within a block's memory.

    python -m llmslim.checkpoint.verify FOLDER PROBE_FOLDER      prints one line of JSON

PROBE_FOLDER is what the run kept: tokens.safetensors {"tokens"}, block-<name>.safetensors {"hidden"} behind
each block, logits.safetensors {"logits"}, and probe.json {"dtype": what was computed in, "device": where (the CPU
when not told), "source": the folder of the base model (optional)}.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmslim.calibration.stream import BlockStream, Lane
from llmslim.checkpoint.formats import formats
from llmslim.checkpoint.inventory import stored_tensors
from llmslim.checkpoint.reader import CheckpointReader, edited_skeleton, read_edits
from llmslim.checkpoint.walk import walk_blocks
from llmslim.errors import UserError
from llmslim.loaders.models import ModelFiles, find, read_tokenizer
from llmslim.memory import available_memory
from llmslim.process import ProcessFailed, run_module

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference allowed, in units of the root mean square of what is compared. The code is the same on
both sides, so 0 is expected; a few roundings are forgiven, as another process may place memory otherwise."""
OTHER_KERNELS = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.06}
"""The same, where the device of the run cannot be had (a GPU that takes one process alone) and the CPU stands in. Other
kernels sum in another order and round elsewhere: over 12 blocks in bfloat16, those of sdpa and eager attention differed
by 0.04 to 0.24. float16 has an eighth of its roundings. Weights in the wrong place differ by more than 1, the less does
this find of small damage, which is for the exact check of the tensors."""
WHOLE_SLACK = 10
"""Loaded whole, the model takes transformers' own way (masks, dtype of the embedding): so many times more."""
MEMORY_SHARE = 0.4

Check = dict[str, Any]


def verify_in_fresh_process(folder: Path | str, probe_folder: Path | str) -> dict[str, Any]:
    """`verify` in a process of its own."""
    torch.cuda.empty_cache()  # room for the other process; without a GPU nothing
    try:
        found = run_module("llmslim.checkpoint.verify", str(folder), str(probe_folder))
    except ProcessFailed as error:
        failed = {"check": "process", "ok": False, "detail": f"verification died: {error}"}
        return {"ok": False, "checks": [failed], "max_error": None}
    return json.loads(found)


def verify(folder: Path | str, probe_folder: Path | str) -> dict[str, Any]:
    """Check a saved checkpoint against what its run kept.

    Returns:
        {"ok", "checks": [{"check", "ok", "detail"}, ...], "max_error": of the streamed probe, or None}.
    """
    probe = Path(probe_folder)
    settings = json.loads((probe / "probe.json").read_text())
    files = find(str(folder))
    place = _Place(settings.get("device", "cpu"), getattr(torch, settings["dtype"]))
    checks = [_guarded("tensors", lambda: _tensors(files))]
    max_error = None
    if checks[0]["ok"]:
        streamed = _guarded("streamed", lambda: _streamed(files, probe, place))
        max_error = streamed.pop("max_error", None)
        checks += [streamed, _guarded("whole", lambda: _whole(files, probe, place))]
    checks.append(_guarded("tokenizer", lambda: _companions(files, settings.get("source"))))
    return {"ok": all(check["ok"] for check in checks), "checks": checks, "max_error": max_error}


class _Place:
    """Where the probe is computed again: on the run's device, or on the CPU if that cannot be had."""

    def __init__(self, asked: str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.told = torch.device(asked), dtype, ""
        self.tolerance, self.whole_tolerance = TOLERANCE[dtype], WHOLE_SLACK * TOLERANCE[dtype]
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError):  # as torch refuses a device that it is not built for
            self.device, self.told = torch.device("cpu"), f" on a CPU, {asked} being out of reach"
            self.tolerance = OTHER_KERNELS[dtype]
            self.whole_tolerance = max(self.tolerance, self.whole_tolerance)

    def available_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return available_memory()


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that raises has failed, with the exception as its detail."""
    try:
        return {"check": name, **check()}
    except Exception as error:
        return {"check": name, "ok": False, "detail": f"{type(error).__name__}: {error}"}


def _tensors(files: ModelFiles) -> Check:
    """The files hold exactly the tensors, shapes and types that config and edits announce; ties once."""
    form, edits = read_edits(files)
    model = edited_skeleton(files, edits)
    found = {name: (entry["dtype"], list(entry["shape"])) for name, entry in files.weights.entries.items()}
    expected = {
        name: (
            _code(files.dtype if dense and tensor.is_floating_point() else tensor.dtype),
            list(tensor.shape),
        )
        for name, (tensor, dense) in stored_tensors(model, form or formats()["llmslim"]).items()
    }
    for what, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has unannounced", found.keys() - expected.keys()),
    ):
        if names:
            return {
                "ok": False,
                "detail": f"the checkpoint {what} {len(names)} tensors, such as {min(names)}",
            }
    for name, (dtype, shape) in expected.items():
        if found[name] != (dtype, shape):
            return {
                "ok": False,
                "detail": f"{name} is {found[name]}, and config and edits make it {(dtype, shape)}",
            }
    ties = len(getattr(model, "all_tied_weights_keys", None) or {})
    return {"ok": True, "detail": f"{len(found)} tensors as announced, {ties} tied to others and stored once"}


def _code(dtype: torch.dtype) -> str:
    from llmslim.loaders.safetensors_io import CODES

    return CODES[dtype]


@torch.no_grad()
def _streamed(files: ModelFiles, probe: Path, place: _Place) -> Check:
    """Pass the probe through the saved blocks, one in memory at a time."""
    reader = CheckpointReader(files)
    model = reader.model_skeleton()
    stream = BlockStream(model, place.device, place.dtype)
    lane = Lane.of_tokens("probe", _kept(probe, "tokens"), bool(model.config.is_encoder_decoder))
    stream.add(lane)
    errors: dict[str, float] = {}
    for block in walk_blocks(reader, stream):
        stream.forward(block, lane)
        errors[block.name] = _error(torch.cat(lane.hidden), _kept(probe, f"block-{block.name}", "hidden"))
    _, output = next(stream.outputs(lane))
    errors["logits"] = _error(output[0], _kept(probe, "logits"))
    worst, tolerance = max(errors.values()), place.tolerance
    begins = next((name for name, error in errors.items() if not error <= tolerance), None)
    where = f", beginning at {begins}" if begins else ""
    over = f"{len(errors) - 1} blocks and the logits (allowed {tolerance:g}{place.told})"
    detail = f"largest difference {worst:.2g} over {over}{where}"
    return {"ok": begins is None, "detail": detail, "max_error": worst}


@torch.no_grad()
def _whole(files: ModelFiles, probe: Path, place: _Place) -> Check:
    """Load the folder as a user does, where memory allows, and compare the logits."""
    need = 2 * files.weights.stored_bytes * (2 if files.dtype != place.dtype else 1)
    if need > MEMORY_SHARE * place.available_memory():
        return {
            "ok": True,
            "detail": f"not loaded whole: that takes about {need / 1e9:.1f} GB of memory; streamed instead",
        }
    from llmslim.checkpoint.load import load_model

    gc.collect()
    model = load_model(files, place.dtype, place.device)
    inputs = Lane.of_tokens("probe", _kept(probe, "tokens"), bool(model.config.is_encoder_decoder)).inputs[0]
    logits = model(**{name: tensor.to(place.device) for name, tensor in inputs.items()})[0]
    error, tolerance = _error(logits, _kept(probe, "logits")), place.whole_tolerance
    detail = f"loaded whole, the logits differ by {error:.2g} (allowed {tolerance:g}{place.told})"
    return {"ok": error <= tolerance, "detail": detail}


def _companions(files: ModelFiles, source: str | None) -> Check:
    """Tokenizer, chat template and generation config are there where the source had them."""
    origin = Path(source) if source else None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if origin and (origin / name).exists() and not (files.folder / name).exists():
            return {"ok": False, "detail": f"the source has {name}, and the checkpoint does not"}
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
    if not any((files.folder / name).exists() for name in names):
        return {"ok": True, "detail": "the model has no tokenizer"}
    tokenizer = files.tokenizer()
    text = "A checkpoint that loads."
    ids = tokenizer(text)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if not ids or not back.strip():
        raise UserError(f"the tokenizer turns {text!r} into {ids} and {back!r}")
    if origin and (origin / "tokenizer_config.json").exists():
        other = read_tokenizer(origin, str(origin))
        if other(text)["input_ids"] != ids or other.chat_template != tokenizer.chat_template:
            return {"ok": False, "detail": "the tokenizer or its chat template differs from the source's"}
    with_template = "with" if tokenizer.chat_template else "without"
    return {"ok": True, "detail": f"the tokenizer encodes and decodes; {with_template} chat template"}


def _kept(probe: Path, name: str, key: str | None = None) -> Tensor:
    return load_file(probe / f"{name}.safetensors")[key or name]


def _error(now: Tensor, kept: Tensor) -> float:
    """Largest difference, in root mean squares of what was kept; infinite for NaN or other shapes."""
    now, kept = now.float().cpu(), kept.float()
    if now.shape != kept.shape:
        return float("inf")
    error = float((now - kept).abs().max() / kept.square().mean().sqrt().clamp_min(1e-30))
    return error if error == error else float("inf")


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(verify(sys.argv[1], sys.argv[2])))
