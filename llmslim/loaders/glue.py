"""The GLUE tasks (Wang et al. 2018, arXiv:1804.07461): their sentences, as tokens, with their labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmslim.errors import UserError, nearest
from llmslim.loaders.rows import records

DATASET = "nyu-mll/glue"
TEACHER = "teacher_"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        columns: of the data set, the sentences in their order.
        labels: names of the classes, by number; none for a score (regression).
        metrics: names of what is measured, in `llmslim.metrics.METRICS`.
        train: rows of its training part.
        tokens: of such a row, on average (BERT's; of QQP, MNLI, QNLI and WNLI about).
        splits: of the validation part; what is measured on the second one is called `_mismatched`.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    train: int
    tokens: int
    metrics: tuple[str, ...] = ("accuracy",)
    splits: tuple[str, ...] = ("validation",)

    @property
    def num_labels(self) -> int:
        """Outputs that a classification head has for this task."""
        return len(self.labels) or 1


ENTAILS = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), 8551, 11, ("matthews",)),
        Task("sst2", ("sentence",), ("negative", "positive"), 67349, 13),
        Task(
            "mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), 3668, 53, ("f1", "accuracy")
        ),
        Task(
            "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), 363846, 31, ("f1", "accuracy")
        ),
        Task("stsb", ("sentence1", "sentence2"), (), 5749, 28, ("pearson", "spearman")),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            392702,
            39,
            splits=("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", ("question", "sentence"), ENTAILS, 104743, 50),
        Task("rte", ("sentence1", "sentence2"), ENTAILS, 2490, 70),
        Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment"), 635, 38),
    )
}


def task_of(name: str) -> Task:
    """The task of that name, or a UserError that suggests the nearest."""
    if name not in TASKS:
        raise UserError(f"Unknown GLUE task {name!r}{nearest(name, TASKS)}; there are {', '.join(TASKS)}.")
    return TASKS[name]


def task_rows(task: Task, split: str, folder: str = "") -> list[dict[str, Any]]:
    """The rows of a split, from the Hub, or from `FOLDER/nyu-mll/glue` in the Hub's layout.

    Raises:
        UserError: the data are not there, or have not the columns or the labels of the task.
    """
    rows = list(_records(task, split, folder))
    wanted = (*task.columns, "label")
    lacks = [column for column in wanted if not rows or column not in rows[0]]
    if lacks:
        there = f"the columns {', '.join(rows[0])}" if rows else "no rows"
        raise UserError(
            f"{DATASET}:{task.name}:{split} has {there}, and {task.name} needs {', '.join(wanted)}."
        )
    classes = range(len(task.labels))
    some = f"those of {task.name} are 0 to {len(classes) - 1} ({', '.join(task.labels)})"
    for number, row in enumerate(rows, 1):
        label, where = row["label"], f"Row {number} of {DATASET}:{task.name}:{split}"
        if not (label in classes if classes else isinstance(label, int | float) and math.isfinite(label)):
            raise UserError(
                f"{where} has the label {label!r}, and {some if classes else 'its labels are numbers'}."
            )
        missing = next((column for column in task.columns if not isinstance(row[column], str)), None)
        if missing:
            raise UserError(f"{where} has {row[missing]!r} in its column {missing!r}, which is no text.")
    return rows


def train_size(task: Task, folder: str = "") -> int:
    """Rows of the training part, without reading them: of parquet files in FOLDER, else what GLUE has."""
    files = data_files(task, "train", folder)
    if not files or any(file.suffix != ".parquet" for file in files):
        return task.train
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(file).num_rows for file in files)


def data_files(task: Task, split: str, folder: str = "") -> list[Path]:
    """The files of a split in FOLDER; none when it comes from the Hub."""
    return sorted((Path(folder).expanduser() / DATASET / task.name).glob(f"{split}*")) if folder else []


def require_data(task: Task, splits: Sequence[str], folder: str = "", flag: str = "--data") -> None:
    """Refuse data of which one of these splits is not there, without reading them.

    Args:
        flag: the option that names the folder.
    """
    for split in splits:
        _records(task, split, folder, flag)


def _records(task: Task, split: str, folder: str, flag: str = "--data") -> Iterable[dict[str, Any]]:
    name = str(Path(folder).expanduser() / DATASET) if folder else DATASET
    try:
        return records(f"{name}:{task.name}:{split}")
    except UserError as error:
        # not what else could be given as a text
        reason = re.split(": (?:give|write) ", str(error))[0].rstrip(".")
        raise UserError(
            f"No GLUE data for {task.name}: {reason}; with {flag} FOLDER they are read from FOLDER/{DATASET}."
        ) from error


class Reading(NamedTuple):
    """How a model reads sentences.

    Attributes:
        tokenizer: its own.
        inputs: names of what it takes, of what the tokenizer can give.
        pad: id of the token that fills up a batch.
    """

    tokenizer: Any
    inputs: list[str]
    pad: int

    def encoded(self, texts: Sequence[list[str]], max_length: int) -> dict[str, list[list[int]]]:
        """Each input of sentences, or of pairs."""
        segments = "token_type_ids" in self.inputs  # which a tokenizer may be silent about and yet know
        found = self.tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=segments)
        columns = {name: rows for name, rows in found.items() if name in self.inputs}
        of_none = {"input_ids": self.pad, "attention_mask": 1}  # a model reads one token at least
        for name, rows in columns.items():
            columns[name] = [row or [of_none.get(name, 0)] for row in rows]
        return columns

    def padded(self, columns: Mapping[str, Sequence[list[int]]]) -> dict[str, Tensor]:
        """Inputs of some sentences, to their longest at the right: int64 [batch, seq] each."""
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(row, dtype=torch.int64) for row in rows],
                batch_first=True,
                padding_value=self.pad if name == "input_ids" else 0,
            )
            for name, rows in columns.items()
        }


class Sentences(torch.utils.data.Dataset):
    """Sentences (or pairs) as tokens, with labels, as one model reads them, or two.

    Args:
        rows: of the task's data set.
        reading: of the model.
        max_length: tokens that a sentence, or pair, is cut to.
        teacher: of another model that gets the same sentences; its inputs are called `teacher_...` in a batch.

    Attributes:
        beside: by name, what else a batch has of its sentences, [sentences, ...].
    """

    def __init__(
        self,
        task: Task,
        rows: Sequence[dict[str, Any]],
        reading: Reading,
        max_length: int,
        teacher: Reading | None = None,
    ) -> None:
        texts = [[str(row[column]) for row in rows] for column in task.columns]
        readings = {"": reading} if teacher is None else {"": reading, TEACHER: teacher}
        tokenizers = {id(one.tokenizer): one for one in readings.values()}
        wanted = sorted({name for one in readings.values() for name in one.inputs})
        encoded = {
            key: one._replace(inputs=wanted).encoded(texts, max_length) for key, one in tokenizers.items()
        }
        self._read = [
            (prefix, one, {n: rows for n, rows in encoded[id(one.tokenizer)].items() if n in one.inputs})
            for prefix, one in readings.items()
        ]
        self.labels = torch.tensor(
            [row["label"] for row in rows], dtype=torch.int64 if task.labels else torch.float32
        )
        self.lengths = [len(ids) for ids in self._read[0][2]["input_ids"]]
        self.beside: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sentence: lists of ints, and its label."""
        found = {p + name: rows[index] for p, _, columns in self._read for name, rows in columns.items()}
        further = {name: rows[index] for name, rows in self.beside.items()}
        return {**found, **further, "labels": self.labels[index]}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: each input int64 [batch, seq], padded at the right; labels [batch]."""
        whole = ("labels", *self.beside)
        batch = {name: torch.stack([example[name] for example in examples]) for name in whole}
        for prefix, reading, columns in self._read:
            rows = {name: [example[prefix + name] for example in examples] for name in columns}
            batch.update({prefix + name: tensor for name, tensor in reading.padded(rows).items()})
        return batch

    def inputs(self, batch: Mapping[str, Tensor], whose: str = "") -> dict[str, Tensor]:
        """What the model takes of a batch, or with `TEACHER` the other one."""
        read = {prefix: columns for prefix, _, columns in self._read}
        return {name: batch[whose + name] for name in read[whose]}


def pad_token(config: Any, tokenizer: Any) -> int:
    """What fills up a batch; for decoders, which often name nothing, the end of a text."""
    candidates = (
        config.pad_token_id,
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    )
    return next((token for token in candidates if token is not None), 0)
