"""Toy data sets of lm-eval's tasks arc_easy, piqa and lambada_openai, in the layout of the Hub's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

WORDS = (
    "the",
    "module",
    "is",
    "a",
    "function",
    "of",
    "class",
    "and",
    "method",
    "for",
    "value",
    "returns",
    "object",
)


def write_lm_data(folder: Path, rows: int = 16) -> Path:
    """Write allenai/ai2_arc (test, train), baber/piqa (validation) and EleutherAI/lambada_openai (test)."""
    draw = random.Random(0)

    def said(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, most)))

    def arc(_: int) -> dict[str, Any]:
        labels = list("ABCD")
        choices = {"text": [said(5) for _ in labels], "label": labels}
        return {"id": said(2), "question": said(12), "choices": choices, "answerKey": draw.choice(labels)}

    def piqa(_: int) -> dict[str, Any]:
        return {"goal": said(9), "sol1": said(7), "sol2": said(7), "label": draw.randint(0, 1)}

    def lambada(_: int) -> dict[str, Any]:
        return {"text": said(20)}

    _write(
        folder / "allenai/ai2_arc",
        "ARC-Easy",
        {split: [arc(i) for i in range(rows)] for split in ("test", "train")},
    )
    _write(folder / "baber/piqa", "default", {"validation": [piqa(i) for i in range(rows)]})
    _write(folder / "EleutherAI/lambada_openai", "default", {"test": [lambada(i) for i in range(rows)]})
    return folder


def _write(root: Path, config: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / config).mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), root / config / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
