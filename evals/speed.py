"""Speed of packed and of pruned models against the dense one, transformers eager, on one core.

    python evals/speed.py [--rounds 5] [--variants 4-bit-e8 bf16 fp32]
    python evals/speed.py --variants pruned-channels pruned-mix pruned-layers bf16 \\
        --output evals/results/speed_pruned.json

Decoding (64 tokens, batch 1) after prompts of 32 and of 512 tokens, and prefill of 512 tokens. Every variant
is loaded in a process of its own, and rounds take them in turn, so that what else the machine does falls on
all alike: a figure is the median over rounds with the smallest and largest beside it, and a ratio is the
median of the ratios within each round. `4-bit-e8` has its embeddings and head in 8 bits, `4-bit-e4` in 4;
they compute in the type that the machine is fast at. Of `pruned-*` about 30% of the blocks' parameters are gone, and
they compute in bfloat16. Checkpoints are made without calibration when they are not there: weights of any method
run at one speed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import Namespace
from statistics import median
from typing import Any

import record
import tables_cost

BASE = {"bf16": "bfloat16", "fp32": "float32"}
PACKED = {"4-bit-e4": "4", "4-bit-e8": "8"}
_BY_SIZE = {"criterion": "magnitude", "refit": False}
PRUNED: dict[str, list[dict[str, Any]]] = {
    "pruned-channels": [{"mlp": {"ratio": 0.4, "multiple_of": 8, **_BY_SIZE}}],
    "pruned-mix": [
        {"heads": {"unit": "group", "ratio": 0.3333, **_BY_SIZE}},
        {"mlp": {"ratio": 0.29, **_BY_SIZE}},
    ],
    "pruned-layers": [{"layers": {"ratio": 0.3, "criterion": "random", "refit": False}}],
}
FIGURES = {"decode_32": ("32", "decode"), "decode_512": ("512", "decode"), "prefill_512": ("512", "prefill")}


def worker(model: str, dtype: str, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Load a model and time it; the only part that imports torch."""
    import torch

    import llmslim
    from llmslim.evaluation.benchmark import benchmark, peak_memory_mb
    from llmslim.quantization import native

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    loaded, tokenizer = llmslim.load(model, dtype=None if dtype == "fast" else dtype)
    by_prompt = {str(n): benchmark(loaded, tokenizer, n, new_tokens, repeats) for n in (32, 512)}
    with torch.inference_mode():
        logits = loaded(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits
    rates = {name: by_prompt[n][what]["tokens_per_second"] for name, (n, what) in FIGURES.items()}
    return {
        **rates,
        "dtype": str(logits.dtype).removeprefix("torch."),  # model.dtype would be that of some packed scales
        "peak_memory_mb": peak_memory_mb(),
        "native_kernels": native.library() is not None,
    }


def made_folder(name: str, options: Namespace) -> tuple[str, int]:
    """The checkpoint of that variant, made now if need be, and its bytes on disk."""
    folder = options.work / name
    if not (folder / "report.json").exists():
        if name in PACKED:
            words = ["--method", "rtn", "--bits", "4", "--group-size", "64", "--symmetric", "--no-evaluate"]
            command = record.llmslim("quantize", options.model, *words, "--embeddings-bits", PACKED[name])
        else:
            options.work.mkdir(parents=True, exist_ok=True)
            recipe = options.work / f"{name}.yaml"
            recipe.write_text(json.dumps({"steps": PRUNED[name], "dtype": "bfloat16", "evaluation": None}))
            command = record.llmslim("compress", options.model, str(recipe))
        record.run([*command, "--output", str(folder), "--overwrite"])
    return str(folder), json.loads((folder / "report.json").read_text())["size"]["result"]["bytes_on_disk"]


def one_round(name: str, spec: str, options: Namespace) -> dict[str, Any]:
    words = [str(options.new_tokens), str(options.repeats)]
    dtype = "fast" if name in PACKED else BASE.get(name, "bfloat16")
    command = [sys.executable, __file__, "--worker", spec, dtype, *words]
    return json.loads(record.run(command).stdout.splitlines()[-1])


def summarize(name: str, rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Median and spread of each figure, and its ratio to the dense model, round by round."""
    row: dict[str, Any] = {"name": name, "dtype": rounds[name][0]["dtype"]}
    row["native_kernels"] = rounds[name][0]["native_kernels"]
    for figure in (*FIGURES, "peak_memory_mb"):
        values = [each[figure] for each in rounds[name]]
        row[figure] = {"median": median(values), "min": min(values), "max": max(values)}
        for base in BASE:
            if base in rounds and base != name and figure in FIGURES:
                pairs = zip(values, (each[figure] for each in rounds[base]), strict=True)
                row[figure][f"to_{base}"] = median(value / other for value, other in pairs)
    return row


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        spec, dtype, new_tokens, repeats = sys.argv[2:]
        print(json.dumps(worker(spec, dtype, int(new_tokens), int(repeats))))
        return
    made = record.parser(__doc__ or "", "speed")
    made.add_argument("--model", default="demo")
    made.add_argument("--variants", nargs="+", choices=[*PACKED, *PRUNED, *BASE], default=[*PACKED, *BASE])
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--repeats", type=int, default=3, help="timed runs in a process")
    made.add_argument("--new-tokens", type=int, default=64)
    made.add_argument("--keep", action="store_true", help="keep the checkpoints in the work folder")
    options = record.parse(made)
    made_ones = {name: made_folder(name, options) for name in options.variants if name not in BASE}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for _ in range(options.rounds):
        for name in rounds:
            spec = made_ones[name][0] if name in made_ones else options.model
            rounds[name].append(one_round(name, spec, options))
    options.output.unlink(missing_ok=True)  # figures of different runs do not compare
    result = record.opened(options)
    result |= {key: getattr(options, key) for key in ("model", "rounds", "repeats", "new_tokens")}
    for name in rounds:
        size = {"bytes_on_disk": made_ones[name][1]} if name in made_ones else {}
        record.put(result, {**summarize(name, rounds), **size, "rounds": rounds[name]}, options.output)
    if not options.keep:
        for folder, _ in made_ones.values():
            shutil.rmtree(folder)
    print(tables_cost.speed(result))


if __name__ == "__main__":
    main()
