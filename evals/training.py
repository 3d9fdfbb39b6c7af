"""What training in several processes holds and takes: all weights of SmolLM2-135M, in shares or whole.

    python evals/training.py --threads 2

One process with batches of 4 x 256 tokens, and two with half of each: data parallel, and with `--shard` (FSDP), with
the cores shared among them. 20 steps on the built-in text, next token, float32. Memory is the most that each process
held from its start to its end, summed, with what the one holds that starts them; the loss at the end shows that all
three learn the same.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from typing import Any

import record
import tables_cost

WAYS: dict[str, list[str]] = {
    "one process": ["--batch-size", "4"],
    "two": ["--batch-size", "2", "--processes", "2"],
    "two with --shard": ["--batch-size", "2", "--processes", "2", "--shard"],
}


def measure(way: str, options: Namespace) -> dict[str, Any]:
    """Train in one way, and delete what came of it."""
    output = options.work / "trained"
    words = ["--method", "full", "--objective", "next_token", *WAYS[way]]
    words += ["--max-steps", str(options.max_steps), "--seq-len", str(options.seq_len)]
    words += ["--calibration", options.text, "--num-samples", str(4 * options.max_steps)]
    words += ["--dtype", "float32", "--no-evaluate"]
    report, cost = record.quantized(record.llmslim("recover", "demo", *words), output)
    history = [json.loads(line) for line in (output / "training.jsonl").read_text("utf-8").splitlines()]
    shutil.rmtree(output)
    held = [note for note in report["notes"] if "held_mb" in note]
    together = held[0]["held_mb"] if held else report["run"]["peak_memory_mb"]
    return {
        "name": way,
        "batch_tokens": 4 * options.seq_len,
        "held_mb": round(together, 1),
        "planned_mb": round(report["plan"]["peak_memory"] / 1e6, 1),
        "seconds_per_step": round(history[-1]["train_runtime"] / options.max_steps, 2),
        "last_loss": next(line["loss"] for line in reversed(history) if "loss" in line),
        "notes": [note["what"] for note in report["notes"]],
        **cost,
    }


def main() -> None:
    made = record.parser(__doc__ or "", "training")
    made.add_argument("--text", default="builtin", help="a text to learn from")
    made.add_argument("--max-steps", type=int, default=20)
    made.add_argument("--seq-len", type=int, default=256)
    options = record.parse(made)
    result = record.opened(options)
    for way in WAYS:
        record.put(result, measure(way, options), options.output)
    record.write(result, options.output)
    print(tables_cost.training(result))


if __name__ == "__main__":
    main()
