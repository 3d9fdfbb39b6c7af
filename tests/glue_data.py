"""Toy GLUE data sets in the layout of the Hub's: a word of the first sentence tells the label."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
COLUMNS = {  # as the card of nyu-mll/glue has them, with what stands beside `train`
    "cola": (("sentence",), ("validation",)),
    "sst2": (("sentence",), ("validation",)),
    "mrpc": (("sentence1", "sentence2"), ("validation",)),
    "qqp": (("question1", "question2"), ("validation",)),
    "stsb": (("sentence1", "sentence2"), ("validation",)),
    "mnli": (("premise", "hypothesis"), ("validation_matched", "validation_mismatched")),
    "qnli": (("question", "sentence"), ("validation",)),
    "rte": (("sentence1", "sentence2"), ("validation",)),
    "wnli": (("sentence1", "sentence2"), ("validation",)),
}
FILL = ("the", "module", "is", "a", "function", "of", "class")


def write_glue(folder: Path, tasks: Sequence[str], train: int = 256, validation: int = 64) -> Path:
    """Write `FOLDER/nyu-mll/glue/TASK/SPLIT-*.parquet` and the README that names them; returns the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root, configs = folder / "nyu-mll" / "glue", []
    for name in tasks:
        (columns, splits), generator = COLUMNS[name], random.Random(name)
        (root / name).mkdir(parents=True)
        configs += [f"- config_name: {name}", "  data_files:"]
        for split, count in {"train": train, **dict.fromkeys(splits, validation)}.items():
            rows = [_row(columns, name != "stsb", index, generator) for index in range(count)]
            pq.write_table(pa.Table.from_pylist(rows), root / name / f"{split}-00000-of-00001.parquet")
            configs += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (root / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", ""]))
    return folder


def _row(columns: Sequence[str], classes: bool, index: int, generator: random.Random) -> dict[str, Any]:
    said = [generator.choice(GOOD if index % 2 else BAD)]
    texts = [_sentence(said, generator), *(_sentence([], generator) for _ in columns[1:])]
    label: Any = index % 2 if classes else 5.0 * (index % 2)
    return {**dict(zip(columns, texts, strict=True)), "label": label, "idx": index}


def _sentence(words: list[str], generator: random.Random) -> str:
    fill: Callable[[int], list[str]] = lambda most: generator.choices(FILL, k=generator.randint(1, most))  # noqa: E731
    return " ".join([*fill(6), *words, *fill(6)])
