"""Peak memory and time on a model of 1.1B random weights, and on one of twice the blocks.

    python evals/memory.py [--blocks 22 44]

The models (2.2 and 4.1 GB, `random_llama.py`) are made in the work folder and deleted after. 4-bit GPTQ,
8 x 512 tokens of the built-in text, no evaluation; the run verifies its checkpoint as always. Peak memory is
that of the quantizing process (VmHWM), beside the figure that the plan gave before a weight was read. What
doubling the blocks does to both is the last row over the first.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import record
import tables_cost

SHAPE = ("hidden", "intermediate", "heads", "kv_heads", "vocabulary")


def measure(blocks: int, options: Namespace) -> dict[str, Any]:
    """Make the model, quantize it, and delete both."""
    base, output = options.work / f"base-{blocks}", options.work / f"4-bit-{blocks}"
    shutil.rmtree(base, ignore_errors=True)
    shape = [word for name in SHAPE for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    script = Path(__file__).with_name("random_llama.py")
    command = [sys.executable, str(script), str(base), "--blocks", str(blocks), *shape]
    size = json.loads(record.run([*command, "--seed", str(options.seed)]).stdout.splitlines()[-1])["bytes"]
    words = ["--method", "gptq", "--bits", "4", "--group-size", "64", "--calibration", "builtin"]
    words += ["--num-samples", str(options.num_samples), "--seq-len", str(options.seq_len), "--no-evaluate"]
    report, cost = record.quantized(record.llmslim("quantize", str(base), *words), output)
    for folder in (base, output):
        shutil.rmtree(folder)
    planned = report["plan"]["peak_memory"] / 1e6
    return {
        "name": f"{blocks} blocks",
        "blocks": blocks,
        **{name: getattr(options, name) for name in (*SHAPE, "num_samples", "seq_len")},
        "base_mb": round(size / 1e6, 1),
        "parameters": report["size"]["base"]["parameters"],
        "bytes_on_disk": report["size"]["result"]["bytes_on_disk"],
        **cost,
        "planned_peak_mb": round(planned, 1),
        "planned_seconds": round(report["plan"]["seconds"], 1),
        "planned_over_measured": round(planned / report["run"]["peak_memory_mb"], 3),
        "compute_dtype": report["environment"]["compute_dtype"],
        "notes": len(report["notes"]),
    }


def main() -> None:
    made = record.parser(__doc__ or "", "memory")
    made.add_argument("--blocks", type=int, nargs="+", default=[22, 44])
    made.add_argument("--hidden", type=int, default=2048)
    made.add_argument("--intermediate", type=int, default=5632)
    made.add_argument("--heads", type=int, default=32)
    made.add_argument("--kv-heads", type=int, default=4)
    made.add_argument("--vocabulary", type=int, default=32000)
    made.add_argument("--num-samples", type=int, default=8)
    made.add_argument("--seq-len", type=int, default=512)
    options = record.parse(made)
    result = record.opened(options)
    for blocks in options.blocks:
        record.put(result, measure(blocks, options), options.output)
    result["rows"].sort(key=lambda row: row["blocks"])
    record.write(result, options.output)
    print(tables_cost.memory(result))


if __name__ == "__main__":
    main()
