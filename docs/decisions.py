"""The tables of docs/choosing.md: what to take, with the figures of evals/results behind each line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llmslim.step import step_class

RESULTS = Path(__file__).resolve().parent.parent / "evals" / "results"
Row = dict[str, Any]


class Choice(NamedTuple):
    """One line: the situation, what fits, and what was measured (result file, row), which tells the command."""

    situation: str
    method: str
    result: str
    row: str


@cache
def results(name: str) -> dict[str, Row]:
    """The rows of a committed result by their name."""
    rows = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
    return {row["name"]: row for row in rows}


def commands(row: Row, start: Row | None) -> list[str]:
    """What makes a row of the demo model, from what it started from if that is a row too."""
    steps = [*(start["steps"] if start else []), *row["steps"]]
    made = []
    for number, step in enumerate(steps):
        ((kind, fields),) = step.items()
        model = f"out/{number}" if number else "demo"
        flags = [flag(name, value) for name, value in fields.items() if name != "teacher"]
        method = f"{step_class(kind).verb} {model} --method {kind}"
        made.append(" ".join(["python -m llmslim", method, *flags, f"--output out/{number + 1}"]))
    return made


def flag(name: str, value: Any) -> str:
    word = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{word}" if isinstance(value, bool) else f"--{word} {value}"


def untrained(result: str, name: str) -> Row | None:
    """The row that a trained one started from."""
    return results(result).get(f"{name.split('/')[0]}/untrained")


def command_of(line: Choice) -> str:
    name = {"2-bit-qat/scales": "configs/qat-2bit"}.get(line.row, line.row)
    if name.startswith("configs/"):
        return f"`python -m llmslim compress demo {name}.yaml --output out/{name.split('/')[1]}`"
    row = results(line.result)[line.row]
    return ", then ".join(f"`{text}`" for text in commands(row, untrained(line.result, line.row)))


BYTES = [
    Choice(
        "Plain transformers or vLLM must load it; two minutes of one core",
        "`gptq`, 4 bits: `configs/gptq-4bit.yaml`",
        "recipes",
        "configs/gptq-4bit",
    ),
    Choice(
        "No text to calibrate with, or only seconds",
        "`rtn`, 8 bits: `configs/rtn-8bit.yaml`",
        "recipes",
        "configs/rtn-8bit",
    ),
    Choice(
        "Nothing may be lost, and llmslim loads it",
        "`gptq`, 5 bits: `configs/quality-5bit.yaml`",
        "recipes",
        "configs/quality-5bit",
    ),
    Choice(
        "As small as still useful",
        "`gptq`, 3 bits: `configs/gptq-3bit.yaml`",
        "recipes",
        "configs/gptq-3bit",
    ),
    Choice(
        "The fewest bytes, an edge device",
        "`mlp`, then `gptq` with 3 bits: `configs/tiny-edge.yaml`",
        "recipes",
        "configs/tiny-edge",
    ),
    Choice(
        "Two bits, with time to train (measured with embeddings left as they are, so larger)",
        "`qat`, then `scales`: `configs/qat-2bit.yaml`",
        "recovery",
        "2-bit-qat/scales",
    ),
]
PLAIN = [
    Choice(
        "A tenth of the blocks' parameters gone, nothing trained",
        "`layers`",
        "pruning",
        "layers/10%/influence-refit",
    ),
    Choice(
        "A fifth gone, nothing trained",
        "`layers` by angle",
        "pruning",
        "layers/20%/angular-refit",
    ),
    Choice(
        "Three tenths gone, nothing trained",
        "`layers`, then `mlp`",
        "pruning",
        "layers+channels/30%/output-refit",
    ),
    Choice(
        "A fifth gone, and ten minutes of one core to train on text like yours",
        "`mlp`, then `full`",
        "recovery",
        "pruned-20%/next-token",
    ),
    Choice(
        "A fifth gone and 4 bits, for prefill and bytes at once",
        "`mlp`, then `gptq`: `configs/prune-4bit.yaml`",
        "recipes",
        "configs/prune-4bit",
    ),
    Choice(
        "A tenth of the blocks gone and 4 bits, for latency",
        "`layers`, then `gptq`: `configs/shallow-4bit.yaml`",
        "recipes",
        "configs/shallow-4bit",
    ),
]


def megabytes(row: Row) -> str:
    """What the files take, and of how much at 16 bits."""
    taken = row["size"]["bytes_on_disk"]
    return f"{taken / 1e6:.0f} MB"


def perplexity(row: Row) -> str:
    found = row["quality"]
    return f"{found['perplexity']:.1f} ± {found['perplexity_stderr']:.1f}"


def choices(lines: list[Choice], base: str) -> str:
    """A table of choices with bytes, perplexity and CPU seconds, the uncompressed model last."""
    text = [
        "| your case | take | MB on disk | perplexity | CPU s | command |",
        "|---|---|---:|---:|---:|---|",
    ]
    for line in lines:
        row = results(line.result)[line.row]
        cells = [
            line.situation,
            line.method,
            megabytes(row),
            perplexity(row),
            f"{seconds(line.result, line.row):.0f}",
            command_of(line),
        ]
        text.append(f"| {' | '.join(cells)} |")
    row = results(base)["base"]
    text.append(f"| the model as it is, in 16 bits | | {base_megabytes()} | {perplexity(row)} | | |")
    return "\n".join(text)


def seconds(result: str, name: str) -> float:
    """CPU seconds of the commands that made a row, from Python's start to the end of the verification."""
    made = (untrained(result, name), results(result)[name])
    return sum(row["cpu_seconds"]["command"] for row in made if row)


def base_megabytes() -> str:
    """The demo model at 16 bits a weight."""
    size = results("recipes")["configs/gptq-4bit"]["size"]
    return f"{2 * size['parameters'] / 1e6:.0f} MB"


def speeds() -> str:
    """Decode and prefill against bf16 of the same run."""
    named = {
        "4-bit-e8": ("speed", "4 bits, embeddings and head at 8 (`--embeddings-bits 8`), packed"),
        "pruned-layers": ("speed_pruned", "three tenths of the blocks' parameters gone by `layers`"),
        "pruned-channels": ("speed_pruned", "the same by `mlp`"),
        "pruned-mix": ("speed_pruned", "the same by `heads` and `mlp`"),
    }
    text = [
        "| what was made | decode after 32 tokens | decode after 512 | prefill of 512 | peak memory |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (result, said) in named.items():
        row, base = results(result)[name], results(result)["bf16"]
        figures = [f"{row[what]['to_bf16']:.2f}x" for what in ("decode_32", "decode_512", "prefill_512")]
        peaks = [one["peak_memory_mb"]["median"] for one in (row, base)]
        text.append(f"| {said} | {' | '.join(figures)} | {peaks[0]:.0f} MB (bf16 {peaks[1]:.0f} MB) |")
    return "\n".join(text)


def memory() -> str:
    """What streaming takes of a model that is larger."""
    text = ["| model | its weights | peak memory of the run | wall time, one core |", "|---|---:|---:|---:|"]
    for row in results("memory").values():
        text.append(
            f"| {row['parameters'] / 1e9:.1f}B parameters | {row['base_mb'] / 1e3:.1f} GB | "
            f"{row['peak_memory_mb']['process'] / 1e3:.2f} GB | {row['wall_seconds'] / 60:.0f} minutes |"
        )
    return "\n".join(text)


def encoders() -> str:
    """An encoder by recipe, and classifiers."""
    row = results("pruning_encoder")["recipe/configs/encoder"]
    text = ["| your case | take | measured |", "|---|---|---|"]
    similar = row["stsb_spearman"]
    text.append(
        "| Sentence embeddings | `configs/encoder.yaml` | "
        f"{100 * row['blocks_left']:.0f} % of the blocks' bytes; "
        f"cosine {row['cosine']['mean']:.3f} to the base's; STS-B {similar['result']:.3f}, base {similar['base']:.3f} |"
    )
    found = results("glue")
    teacher = found["mrpc/teacher"]
    for name, take, situation in (
        ("mrpc/taught", "`finetune --student-layers 3 --teacher ...`", "A classifier with half the blocks"),
        ("mrpc/8bit", "the same, then `rtn` with 8 bits", "and half the bytes of its blocks"),
    ):
        one = found[name]
        text.append(
            f"| {situation} | {take} | MRPC: {100 * one['score']:.1f}, the teacher {100 * teacher['score']:.1f}; "
            f"{megabytes(one)}, the teacher {megabytes(teacher)} |"
        )
    small, large, alone, twice = (
        found[f"sst2/{kind}"] for kind in ("by-decoder", "decoder", "teacher", "r-drop")
    )
    text.append(
        "| A classifier from labels, where twice the time per step is affordable | `finetune --r-drop 1` | "
        f"SST-2: {100 * twice['score']:.1f}, without {100 * alone['score']:.1f} |"
    )
    text.append(
        "| What a large classifier knows, in a small one of another family | `finetune --teacher ... --hidden 0 "
        f"--attention 0` | SST-2: {100 * small['score']:.1f}, the teacher {100 * large['score']:.1f}, by labels alone "
        f"{100 * alone['score']:.1f}: try without first; "
        f"{megabytes(small)}, the teacher {megabytes(large)} |"
    )
    return "\n".join(text)


def caches() -> str:
    """Long contexts: what the KV cache takes and what fewer bits of it cost."""
    found = results("kv_cache")
    text = [
        "| your case | take | MB of cache at 8,000 tokens | perplexity at 2,048 | decode at 8,000 |",
        "|---|---|---:|---:|---:|",
    ]
    for kind, situation, take in (
        ("kivi-4", "The choice to begin with", "`--kv-bits 4`; stored: `configs/long-context.yaml`"),
        ("kivi-8", "Nothing may be lost", "`--kv-bits 8`"),
        ("pca-2", "The fewest bits", "`--kv-bits 2 --kv-method pca`, which measures the keys first"),
        ("rotated-2", "The same, with nothing measured", "`--kv-bits 2 --kv-method rotated`"),
        ("full", "the cache as it is, in 16 bits", ""),
    ):
        quality, held = found[f"quality/{kind}"]["perplexity"], found[f"memory/{kind}"]["cache_bytes"]
        ratio = found.get(f"speed/{kind}", {}).get("ratio")
        speed = "" if ratio is None else f"{ratio:.1f}x"
        text.append(f"| {situation} | {take} | {held / 1e6:.0f} | {quality:.2f} | {speed} |")
    return "\n".join(text)


TABLES: dict[str, Callable[[], str]] = {
    "bytes": lambda: choices(BYTES, "recipes"),
    "plain": lambda: choices(PLAIN, "pruning"),
    "speeds": speeds,
    "caches": caches,
    "memory": memory,
    "encoders": encoders,
}
"""By the name of their markers in docs/choosing.md."""


def recipe_figure(name: str) -> str:
    """What was measured of a recipe in configs/, in one sentence."""
    places = [
        ("recipes", f"configs/{name}"),
        ("pruning_encoder", f"recipe/configs/{name}"),
        ("recovery", {"qat-2bit": "2-bit-qat/scales"}.get(name, "")),
    ]
    for result, row_name in places:
        row = results(result).get(row_name)
        if row is None:
            continue
        took = f"{seconds(result, row_name):.0f} CPU seconds"
        if "quality" not in row:
            return (
                f"Measured on MiniLM: {100 * row['blocks_left']:.0f} % of the blocks' bytes stay, cosine "
                f"{row['cosine']['mean']:.3f} to the embeddings of the base, {took} (`evals/results/{result}.json`)."
            )
        as_run = ", with its embeddings left as they are" if result == "recovery" else ""
        return (
            f"Measured on SmolLM2-135M{as_run}: {megabytes(row)} on disk, WikiText-2 perplexity {perplexity(row)} (the "
            f"model as it is: {base_megabytes()}, {perplexity(results('recipes')['base'])}), {took} "
            f"(`evals/results/{result}.json`)."
        )
    return "Not among the committed results (`evals/results`)."
