"""How fast is a packed Linear? Each route against torch's dense Linear.

    python evals/linear_speed.py [--threads 1] [--bits 4] [--group-size 64] [--json]

Milliseconds per call, the best of many (so that other programs on the machine count little). Shapes are those
of SmolLM2-135M: MLP up and down, attention output, and the head.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from llmslim.quantization import native, routes
from llmslim.quantization.grid import QuantizedWeight, Scheme
from llmslim.quantization.packed import PackedLinear

SHAPES = [(1536, 576), (576, 1536), (576, 576), (49152, 576)]
ROWS = [1, 4, 16, 64, 512]
SECONDS = 0.3


def milliseconds(call: Callable[[], object]) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def measure(out_features: int, in_features: int, rows: int, scheme: Scheme) -> dict[str, float]:
    codes = torch.randint(0, 2**scheme.bits, (out_features, in_features), dtype=torch.uint8)
    grid = scheme.scale_shape(out_features, in_features)
    zero_point = None if scheme.symmetric else torch.randint(0, 2**scheme.bits, grid, dtype=torch.uint8)
    weight = QuantizedWeight(scheme, codes, torch.rand(grid).bfloat16().float() * 0.01, zero_point)
    layer = PackedLinear.from_quantized(weight)
    x = torch.randn(rows, in_features)
    half = x.bfloat16()
    dense = weight.dequantize()
    dense_half = dense.bfloat16()
    result = {
        "dense fp32": milliseconds(lambda: torch.nn.functional.linear(x, dense)),
        "dense bf16": milliseconds(lambda: torch.nn.functional.linear(half, dense_half)),
        "packed fp32": milliseconds(lambda: layer(x)),
        "packed bf16": milliseconds(lambda: layer(half)),
    }
    if native.library() is not None:
        result["blocked fp32"] = milliseconds(lambda: routes.blocked_linear(layer, x))
        if rows <= 64:
            result["native fp32"] = milliseconds(lambda: routes.native_linear(layer, x))
    if routes.int4pack_takes(layer, half):
        result["int4pack bf16"] = milliseconds(lambda: routes.int4pack_linear(layer, half))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scheme = Scheme(bits=options.bits, group_size=options.group_size, symmetric=not options.asymmetric)
    table = []
    with torch.inference_mode():
        for out_features, in_features in SHAPES:
            for rows in ROWS if out_features < 10000 else ROWS[:3]:
                times = measure(out_features, in_features, rows, scheme)
                table.append({"out": out_features, "in": in_features, "rows": rows, "milliseconds": times})
                if not options.json:
                    line = "  ".join(f"{name} {value:.3f}" for name, value in times.items())
                    print(f"{out_features:6}x{in_features:<5} {rows:4} rows   {line}", flush=True)
    if options.json:
        print(
            json.dumps(
                {
                    "torch": torch.__version__,
                    "threads": options.threads,
                    **scheme.model_dump(),
                    "table": table,
                }
            )
        )


if __name__ == "__main__":
    main()
