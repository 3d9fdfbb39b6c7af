"""Quantize a model with GPTQModel on one core of the CPU; what it cost and what came of it, as JSON.

    taskset -c 1 python evals/peers/gptqmodel_baseline.py --model smollm2-fp32 --quantized smollm2-gptq \\
        --data ../shared/data/Salesforce/wikitext [--dtype float32] \\
        [--append evals/results/peers_gptqmodel.json]

Runs in the peer's own environment (evals/README.md says how to make it), without llmslim. What no flag names
is GPTQModel's default: `desc_act=False`, `act_group_aware=True`, `damp_percent=0.05`, batch size 1 and, on a
CPU, bfloat16. Calibration is the first windows of the validation text: rows concatenated as they are, no BOS.
Perplexity is that of `gptq_perplexity.py`, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
# Its default is half the CPUs, and with fewer than 2 workers it refuses to start.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

PACKAGES = ("gptqmodel", "torch", "transformers", "datasets", "accelerate", "torchao")


def cpu_seconds(of: int = resource.RUSAGE_SELF) -> float:
    usage = resource.getrusage(of)
    return usage.ru_utime + usage.ru_stime


def calibration_windows(
    tokenizer: Any, data: str, num_samples: int, seq_len: int
) -> list[dict[str, list[int]]]:
    from datasets import load_dataset

    rows = load_dataset(data, "wikitext-2-raw-v1", split="validation")["text"]
    ids = tokenizer("".join(rows), add_special_tokens=False)["input_ids"]
    if len(ids) < num_samples * seq_len:
        raise ValueError(
            f"{num_samples} windows of {seq_len} tokens were asked for, the text has {len(ids)} tokens"
        )
    windows = [ids[i * seq_len : (i + 1) * seq_len] for i in range(num_samples)]
    return [{"input_ids": window, "attention_mask": [1] * seq_len} for window in windows]


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """Quantize and save; seconds and memory of it."""
    start = time.perf_counter()
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = calibration_windows(tokenizer, args.data, args.num_samples, args.seq_len)
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=True)
    model = GPTQModel.load(args.model, config, device="cpu", dtype=dtype)

    cpu, wall = cpu_seconds(), time.perf_counter()
    model.quantize(calibration, batch_size=1)
    quantized = cpu_seconds() - cpu, time.perf_counter() - wall
    model.save(args.quantized)
    saved = cpu_seconds() - cpu, time.perf_counter() - wall
    whole = cpu_seconds(), time.perf_counter() - start
    names = ("quantize", "quantize_and_save", "process")
    times = [
        dict(zip(names, map(_tenth, column), strict=True))
        for column in zip(quantized, saved, whole, strict=True)
    ]
    return {
        "cpu_seconds": {**times[0], "child_processes": _tenth(cpu_seconds(resource.RUSAGE_CHILDREN))},
        "wall_seconds": times[1],
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "checkpoint_mb": _tenth(
            sum(f.stat().st_size for f in Path(args.quantized).glob("*.safetensors")) / 1e6
        ),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _tenth(value: float) -> float:
    return round(value, 1)


def perplexity(args: argparse.Namespace) -> dict[str, Any]:
    script = str(Path(__file__).with_name("gptq_perplexity.py"))
    words = ["--model", args.model, "--quantized", args.quantized, "--data", args.data]
    done = subprocess.run([sys.executable, script, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the results file, in place of an older one of its name."""
    result = json.loads(path.read_text())
    result["rows"] = [old for old in result["rows"] if old["name"] != row["name"]] + [row]
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--data", required=True, help="Salesforce/wikitext, or a folder laid out like it")
    parser.add_argument("--quantized", required=True, help="folder for the quantized checkpoint")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="auto is GPTQModel's default: bfloat16 on a CPU")
    parser.add_argument("--append", type=Path, metavar="FILE", help="a results file to add the row to")
    args = parser.parse_args()
    scheme = {key: getattr(args, key) for key in ("bits", "group_size", "num_samples", "seq_len")}
    computes_in = "bfloat16" if args.dtype == "auto" else args.dtype
    row = {
        "name": f"GPTQModel {version('gptqmodel')} GPTQ, {args.bits}-bit symmetric, {computes_in}",
        **scheme,
        "computes_in": computes_in,
        **quantize(args),
        **perplexity(args),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    print(json.dumps(row, indent=1))
    if args.append:
        append(args.append, row)


if __name__ == "__main__":
    main()
