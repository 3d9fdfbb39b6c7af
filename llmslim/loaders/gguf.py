"""Turn a GGUF file into a folder of safetensors, once, one tensor at a time.

transformers reads GGUF by dequantizing the whole file into memory. This does the same conversion with its own
name map and its own per-architecture permutations, but writes each tensor to disk before the next is read, so
that a GGUF model streams like any other. It runs in a child process: what parsing costs in memory is gone after.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llmslim.errors import UserError
from llmslim.loaders.safetensors_io import write_in_order
from llmslim.process import ProcessFailed, run_module

# Weights of a GGUF with fewer parameters than this are kept in float32, exactly as dequantized; above it the
# bfloat16 rounding (0.4%) is far below the file's own quantization error and halves the disk space.
EXACT_BELOW = 1_000_000_000
_ABANDONED = 3600.0  # seconds without a write
_EVERY = 10.0  # seconds between two lines on how far it is

T = TypeVar("T")


def cache_root() -> Path:
    """Where converted models are kept: $LLMSLIM_CACHE, or llmslim/ in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("LLMSLIM_CACHE"):
        return Path(os.environ["LLMSLIM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmslim"


def converted(gguf_file: Path) -> Path:
    """The folder of safetensors for a GGUF file, converting it first if it is not in the cache."""
    stat = gguf_file.stat()
    key = f"{gguf_file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    folder = cache_root() / "gguf" / f"{gguf_file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not folder.exists():
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"The GGUF file {gguf_file} needs gguf: pip install 'llmslim[gguf]'.")
        print(f"converting {gguf_file.name} to safetensors, once", file=sys.stderr, flush=True)
        try:  # what it tells of its progress goes to this process's stderr
            run_module("llmslim.loaders.gguf", str(gguf_file), str(folder), told=2)
        except ProcessFailed as error:
            raise UserError(f"The GGUF file {gguf_file} cannot be converted: {error}") from error
    return folder


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config, tokenizer and dequantized weights of `gguf_file` to `folder` (made whole, then renamed)."""
    import torch
    from accelerate import init_empty_weights
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as hf_gguf

    source: dict[str, Any] = {"gguf_file": gguf_file.name, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(gguf_file.parent, **source)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    reader = GGUFReader(gguf_file)
    architecture = hf_gguf.read_field(reader, "general.architecture")[0]
    processor = hf_gguf.TENSOR_PROCESSORS.get(architecture, hf_gguf.TensorProcessor)(config=config.to_dict())
    names = hf_gguf.get_gguf_hf_weights_map(model, processor)
    exact = sum(p.numel() for p in model.parameters()) < EXACT_BELOW
    dtype = torch.float32 if exact else torch.bfloat16

    _clear(folder)
    temporary = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    temporary.mkdir(parents=True)

    def tensors():
        for tensor in telling(f"converting {gguf_file.name}", reader.tensors):
            values = dequantize(tensor.data, tensor.tensor_type)
            result = processor.process(
                weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
            )
            if result.name in names:
                yield names[result.name], torch.from_numpy(result.weights.copy()).to(dtype)

    write_in_order(temporary / "model.safetensors", tensors())
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16  # what a compressed copy stores; the weights here keep what they have
    config.__dict__.pop("_model_name_or_path", None)  # a name out of the GGUF's metadata, not a path
    licensed = hf_gguf.read_field(reader, "general.license")
    if licensed:
        config.license = licensed[0]  # for the model card
    config.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(gguf_file.parent, **source).save_pretrained(temporary)
    generation = {k: getattr(config, k, None) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (temporary / "generation_config.json").write_text(json.dumps(generation, indent=2))
    move(temporary, folder)


def telling(what: str, items: Sequence[T], clock: Callable[[], float] = time.monotonic) -> Iterator[T]:
    """The items, with a line on stdout at most every `_EVERY` seconds on how far it is."""
    last = clock()
    for done, item in enumerate(items):
        if clock() - last >= _EVERY:
            last = clock()
            print(f"{what}: {done}/{len(items)}", flush=True)
        yield item


def _clear(folder: Path) -> None:
    """Remove what conversions that were killed have left."""
    for partial in folder.parent.glob(f"{folder.name}.partial-*"):
        process = int(partial.suffix.rpartition("-")[2])
        try:
            os.kill(process, 0)  # asks whether it lives
            alive = process != os.getpid()
        except ProcessLookupError:
            alive = False
        except PermissionError:
            alive = True
        written = max((path.stat().st_mtime for path in (partial, *partial.glob("*"))), default=0.0)
        if (
            not alive and time.time() - written > _ABANDONED
        ):  # or at work on another machine that shares the cache
            shutil.rmtree(partial, ignore_errors=True)


def move(made: Path, folder: Path) -> None:
    """Give a folder that is complete its name, unless another process that began at the same time was first."""
    try:
        os.replace(made, folder)
    except OSError:
        shutil.rmtree(made)
        if not folder.is_dir():
            raise


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
