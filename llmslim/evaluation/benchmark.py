"""Speed, memory and size: what a smaller model is for, measured and not assumed."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from llmslim.errors import UserError
from llmslim.evaluation.samples import continuations
from llmslim.loaders.heads import positions
from llmslim.loaders.texts import sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_len: int = 512,
    new_tokens: int = 64,
    repeats: int = 3,
) -> dict[str, Any]:
    """Tokens per second at batch 1: prefill of a real prompt, then greedy decoding, one token at a time.

    Each is given as the median of `repeats` runs with the smallest and largest beside it, after one untimed
    run. Decoding starts behind the prompt, with transformers' default cache. An encoder, which only reads,
    has `decode` None; an encoder-decoder is refused.
    """
    if model.config.is_encoder_decoder:
        raise UserError(f"{type(model).__name__} is an encoder-decoder: its speed is not measured yet")
    prompt = sample("builtin:test", tokenizer, 1, prompt_len).tokens.to(model.device)
    generates = model.can_generate()
    run = (
        (lambda n: generate_once(model, prompt, n))
        if generates
        else (lambda n: (read_once(model, prompt), 0.0))
    )
    # the type of the output is the one computed in; `model.dtype` of a packed model is the scales'
    computed: list[torch.dtype] = []
    watch = model.register_forward_hook(lambda module, args, output: computed.append(output[0].dtype))
    run(1)
    watch.remove()
    seconds = [run(new_tokens) for _ in range(repeats)]
    return {
        "prefill": _rates(prompt_len, [prefill for prefill, _ in seconds]),
        "decode": _rates(new_tokens, [decode for _, decode in seconds]) if generates else None,
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dtype": str(computed[0]).removeprefix("torch."),
    }


def generate_once(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of `new_tokens` decoding steps after it."""

    def prefill() -> Any:
        return model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        out = first
        for _ in range(new_tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)

    prefill_seconds, first = _timed(model.device, prefill)
    decode_seconds, _ = _timed(model.device, decode)
    return prefill_seconds, decode_seconds


def read_once(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Seconds of one forward."""
    return _timed(model.device, lambda: model(input_ids=prompt))[0]


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run behind Python's back
    return time.perf_counter() - start, result


def _rates(tokens: int, seconds: list[float]) -> dict[str, float]:
    rates = [tokens / s for s in seconds]
    return {"tokens_per_second": median(rates), "min": min(rates), "max": max(rates)}


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes).

    With CUDA in use, the largest memory that torch held on the current device is added to it. It never goes
    down: to measure one job, give it a process of its own.
    """
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would begin with the peak of the process that started this one
        host = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    else:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return (host + device) / 1e6


def disk_bytes(folder: str | Path) -> int:
    """Bytes of all files in the folder and below."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def benchmark_folder(folder: str, device: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Load a checkpoint and measure it, for a process that does nothing else: its peak memory is the model's.

    Args:
        device, dtype: as for `load`.

    Returns:
        `benchmark`'s record with `load_seconds` and `peak_memory_mb`, or {"skipped": reason}.
    """
    from llmslim.checkpoint.load import load
    from llmslim.quantization import native

    start = time.perf_counter()
    model, tokenizer = load(folder, device=device, dtype=dtype)
    load_seconds = time.perf_counter() - start
    new_tokens = 48
    limit = positions(model) or 1024
    prompt_len = min(512, limit - new_tokens if model.can_generate() else limit)
    try:
        figures = benchmark(model, tokenizer, prompt_len, new_tokens, repeats=3)
    except UserError as error:
        return {"skipped": str(error)}
    compiled = native.library() is not None
    memory = peak_memory_mb()
    figures |= {"load_seconds": load_seconds, "peak_memory_mb": memory, "compiled_kernel": compiled}
    return {**figures, "samples": continuations(model, tokenizer) if model.can_generate() else []}


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(benchmark_folder(*sys.argv[1:])))
