"""Put the committed results into the README.

python evals/render.py             print the tables
python evals/render.py --check     exit 1 when the README's differ
python evals/render.py --write     put them between its two markers
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tables
import tables_cost
from tables import Result

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def where(result: Result) -> str:
    """The machine, versions and day that a table's figures come from, and which rows are from another machine."""
    versions = result["versions"]
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("llmslim", "torch", "transformers") if name in versions
    )
    told = f"{named(result['machine'])}, {threads}; {packages}; {result['date'][:10]}. `{result['command']}`"
    others: dict[str, list[str]] = {}
    for row in result["rows"]:
        if "machine" in row:
            others.setdefault(named(row["machine"]), []).append(row["name"])
    for machine, names in others.items():
        told += f"\n\nOn {machine}, which is faster or slower: {', '.join(_gathered(names, result))}."
    return told


def _gathered(names: list[str], result: Result) -> list[str]:
    """Names of rows, `task/*` for all of a task's (and of a seed's, `task/*/seed-1`)."""

    def kin(name: str) -> str:
        task, _, rest = name.partition("/")
        return f"{task}/*{rest[rest.find('/') :] if '/' in rest else ''}"

    rows = [row["name"] for row in result["rows"]]
    families = {kin(name): {row for row in rows if kin(row) == kin(name)} for name in names}
    whole = {one for one, members in families.items() if len(members) > 1 and members.issubset(names)}
    return list(dict.fromkeys(kin(name) if kin(name) in whole else name for name in names))


def named(machine: dict[str, Any]) -> str:
    kind = (
        "AVX512-BF16" if machine["avx512_bf16"] else "AVX2, no AVX512-BF16" if machine["avx2"] else "no AVX2"
    )
    return f"{machine['cpu']} ({kind})"


PICTURES: dict[str, list[tuple[str, str, str]]] = {
    "kv_cache": [
        (
            "kv_cache.svg",
            "KL along a text, memory and decoding time by length, for each kind of KV cache",
            "The same kinds of caches along a text, and by the length of what they hold.",
        ),
        (
            "kv_needle.svg",
            "how likely the digits of a number in a long text are, by depth and length, for each kind of KV cache",
            "A number stands in a long text and is asked for at its end: how likely its digits are then, and how many "
            "answers are exact.",
        ),
    ]
}
"""Results -> of each picture its file beside them, what it shows, and a sentence; drawn or not."""


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "quantization": ("SmolLM2-135M, groups of 64, 32 x 512 calibration tokens", tables.quantization),
    "peers_gptqmodel": ("The same by GPTQModel, on one core", tables_cost.peers),
    "pruning": ("Pruning SmolLM2-135M, 32 x 512 calibration tokens, nothing trained", tables.pruning),
    "pruning_encoder": (
        "Pruning MiniLM: sentence embeddings of GLUE, nothing trained",
        tables.pruning_encoder,
    ),
    "glue": (
        "MiniLM on GLUE's validation data: teachers, 3-layer students by labels and by the teacher, quantized",
        tables.glue,
    ),
    "factorization": (
        "Low-rank factors, SmolLM2-135M, 32 x 512 calibration tokens, nothing trained",
        tables.by_share,
    ),
    "sharing": (
        "Blocks that share weights, SmolLM2-135M, 32 x 512 calibration tokens, nothing trained",
        tables.by_bytes,
    ),
    "recovery": (
        "Training after compression, SmolLM2-135M, on WikiText-2 valid or (@c4) on C4",
        tables.recovery,
    ),
    "recovery_two_cores": ("Half an hour of training on C4, two cores, as above", tables.recovery),
    "recipes": (
        "The recipes in configs/, SmolLM2-135M, 32 x 512 calibration tokens of WikiText-2",
        tables.by_bytes,
    ),
    "lm": ("Questions by lm-eval, zero-shot, SmolLM2-135M and what the recipes make of it", tables.lm),
    "kv_cache": ("Quantized KV caches, SmolLM2-135M, one core", tables_cost.kv_cache),
    "suite": ("Standard suites (evals/suites/)", tables.suite),
    "speed": (
        "Speed at batch 1: median of the rounds (smallest-largest), ratio to the dense model",
        tables_cost.speed,
    ),
    "speed_pruned": (
        "Speed with about 30% of the blocks' parameters removed, batch 1, as above",
        tables_cost.speed,
    ),
    "peers_load": (
        "Checkpoints read by other programs: greedy text against that of transformers",
        tables_cost.peers_load,
    ),
    "training": ("Training in several processes, SmolLM2-135M, two cores", tables_cost.training),
    "memory": ("A large model of random weights, 4-bit GPTQ, streamed", tables_cost.memory),
}


def rendered(folder: Path) -> str:
    """All results in the folder as markdown, in the order of SECTIONS."""
    parts = []
    for name, (title, section) in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text("utf-8"))
            parts.append(f"**{title}**\n\n{section(result)}\n\nMeasured on {where(result)}")
            for file, shows, said in PICTURES.get(name, []):
                if (folder / file).exists():
                    parts.append(f"![{shows}](evals/results/{file})\n\n{said}")
    if (folder / "pareto.svg").exists():
        parts.append(f"**All so far: bytes on disk against perplexity, SmolLM2-135M**\n\n{tables.PARETO}")
    return "\n\n".join(parts)


def replaced(readme: str, text: str) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: it does not have each marker once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"The README needs the lines {BEGIN} and {END}, once each and in this order.")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--check", action="store_true")
    made.add_argument("--write", action="store_true")
    made.add_argument("--readme", type=Path, default=ROOT / "README.md")
    made.add_argument("--results", type=Path, default=ROOT / "evals" / "results")
    options = made.parse_args(argv)
    text = rendered(options.results)
    if not (options.check or options.write):
        print(text)
        return 0
    readme = options.readme.read_text("utf-8")
    wanted = replaced(readme, text)
    if options.write:
        options.readme.write_text(wanted, "utf-8")
    elif wanted != readme:
        print(
            f"{options.readme} does not show evals/results: run `python evals/render.py --write`.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
