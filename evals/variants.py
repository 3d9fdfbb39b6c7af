"""Recipes as variants: each runs in a fresh process, its checkpoint is judged in another, and a row says how it went.

What `pruning.py`, `factorization.py`, `sharing.py` and `recipes.py` share. A name that ends in `/seed-1` is the variant
before it from that seed, all that it is made from included; other names are of --seed. Judged is perplexity in float32
over the first 16 windows of 512 tokens of WikiText-2 test (rows concatenated as they are, no BOS).
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import record

Steps = list[dict[str, dict[str, Any]]]
SEED = "/seed-"


def parser(docstring: str, name: str) -> ArgumentParser:
    """The options of a script of variants; `name` is that of the results file."""
    made = record.sweep(docstring, name)
    made.add_argument("--model", default="demo")
    return made


def run(options: Namespace, variants: dict[str, Steps], render: Callable[[dict[str, Any]], str]) -> None:
    """Measure the chosen variants that the results file has not with the same options; print the tables."""
    each(options, list(variants), lambda name, options: measure(name, variants[name], options), render)


def each(
    options: Namespace,
    order: list[str],
    measure: Callable[[str, Namespace], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
    known: Callable[[Namespace], dict[str, Any]] | None = None,
) -> None:
    """`run` for rows that are measured in another way.

    Args:
        known: what a row's `options` are, if not `settings`.
    """
    chosen = [name for name in order if any(fnmatch(name, pattern) for pattern in options.variants)]
    if options.list or not chosen:
        sys.exit("\n".join(order))
    result = record.opened(options)
    done = {row["name"]: row["options"] for row in result["rows"]}
    for name in chosen:
        variant, own = of_seed(name, options)
        if options.again or done.get(name) != (known or settings)(own):
            record.put(result, {**measure(variant, own), "name": name}, options.output)
    result["rows"].sort(key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
    record.write(result, options.output)
    print(render(result))


def again(names: list[str], seeds: tuple[int, ...] = (1, 2)) -> list[str]:
    """The same variants from other seeds."""
    return [f"{name}{SEED}{seed}" for seed in seeds for name in names]


def seeded(name: str) -> tuple[str, int | None]:
    """A variant's name without its seed, and the seed."""
    variant, _, seed = name.partition(SEED)
    return variant, int(seed) if seed else None


def of_seed(name: str, options: Namespace) -> tuple[str, Namespace]:
    """A variant's name without its seed, and the options with that seed and a work folder of its own."""
    variant, seed = seeded(name)
    own = {} if seed is None else {"seed": seed, "work": options.work / f"seed-{seed}"}
    return variant, Namespace(**{**vars(options), **own})


def measure(
    name: str,
    steps: Steps,
    options: Namespace,
    keep: Path | None = None,
    text: str | None = None,
    elsewhere: str | None = None,
) -> dict[str, Any]:
    """Run one variant and judge it; without steps the model is judged as it is.

    Args:
        keep: where its checkpoint is to stay; removed when not given.
        text: to calibrate and train on, if not WikiText-2 valid.
        elsewhere: another text to judge by, besides.
    """
    prefix = f"{Path(options.data).absolute()}/" if options.data else ""
    judged = {"quality": f"{prefix}Salesforce/wikitext:wikitext-2-raw-v1:test"}
    judged |= {"elsewhere": elsewhere} if elsewhere else {}
    folder = keep or options.work / name.replace("/", "-").replace("%", "").replace(":", "-")
    if not steps:
        found = {kind: judge(options.model, test, options) for kind, test in judged.items()}
        return {"name": name, "options": settings(options), **found}
    recipe = {
        "steps": steps,
        "calibration": {
            "text": text or judged["quality"].replace(":test", ":validation"),
            "num_samples": options.num_samples,
            "seq_len": options.seq_len,
        },
        "evaluation": None,
        "seed": options.seed,
    }
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / f"{folder.name}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    report, cost = record.quantized(record.llmslim("compress", options.model, str(path)), folder)
    beside = folder / "adapter"
    adapter = beside if beside.is_dir() else None
    found = {kind: judge(str(folder), test, options, adapter) for kind, test in judged.items()}
    extra = {"adapter_bytes": sum(f.stat().st_size for f in beside.iterdir())} if adapter else {}
    if keep is None:
        shutil.rmtree(folder)
    path.unlink()
    return {
        "name": name,
        "options": settings(options),
        **cost,
        **record.outcome(report),
        **extra,
        "steps": steps,
        "blocks_left": blocks_left(report),
        **found,
    }


def blocks_left(report: dict[str, Any]) -> float:
    """Bytes in the result's blocks, as a share of those of the base's in the same 16-bit type."""
    size = report["size"]
    return size["result"]["block_bytes"] / (2 * size["base"]["block_parameters"])


def judge(model: str, text: str, options: Namespace, adapter: Path | None = None) -> dict[str, Any]:
    words = [
        "--perplexity",
        text,
        "--seq-len",
        "512",
        "--windows",
        str(options.windows),
        "--dtype",
        "float32",
        "--json",
        *(["--adapter", str(adapter)] if adapter else []),
    ]
    figures: dict[str, Any] = json.loads(record.run(record.llmslim("evaluate", model, *words)).stdout)
    return record.pick(figures, "perplexity", "perplexity_stderr", "windows", "seq_len", "data_hash", "dtype")


def settings(options: Namespace) -> dict[str, Any]:
    return {
        name: getattr(options, name)
        for name in ("model", "num_samples", "seq_len", "windows", "seed", "threads")
    }
