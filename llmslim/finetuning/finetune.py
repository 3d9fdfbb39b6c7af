"""Fine-tune a classifier on a GLUE task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.files import load_tensors, save_tensors
from llmslim.loaders.glue import (
    TASKS,
    TEACHER,
    Reading,
    Sentences,
    Task,
    data_files,
    require_data,
    task_of,
    task_rows,
    train_size,
)
from llmslim.loaders.heads import (
    classifies,
    headed_config,
    label_columns,
    reading,
    require_head,
    require_positions,
)
from llmslim.memory import KEPT
from llmslim.metrics import predicted, require_metrics, scores
from llmslim.training.inside import InsideFields
from llmslim.training.whole import WholeStep, drops_out

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from typing_extensions import Self

    from llmslim.loaders.models import ModelFiles
    from llmslim.step import Survey
    from llmslim.training.loop import Judge, Loss

    Taught = tuple[PreTrainedModel, Reading] | Tensor
    """A teacher and how it reads, or its logits of all sentences, [sentences, labels]."""

SAMPLE = 256  # sentences that projections are fitted to before training
PIECE = 4096  # sentences that a teacher is asked about between two files
TARGET = "target"  # of a batch: what the teacher said of it
OF_TEACHER = ("alpha", "temperature", *InsideFields.model_fields)


class Finetune(InsideFields, WholeStep):
    """Train all weights of a dense model as a classifier: (1 - alpha) * labels + alpha * teacher + inside + r_drop.

    - labels: cross-entropy, or the squared error of a score (stsb).
    - teacher: KL from its distribution over the classes, both divided by the temperature (Hinton et al. 2015,
      arXiv:1503.02531); the squared error from its score. Without a teacher alpha is 0.
    - inside: the teacher's hidden states and relations of its last attention (TinyBERT, arXiv:1909.10351; MiniLMv2,
      arXiv:2012.15828), and whatever else `distill --method features` compares; padding is left out.
    - r_drop: how far two passes of a sentence lie apart, each with its own dropout (R-Drop; Liang et al. 2021,
      arXiv:2106.14448): the mean of the KL each way, or the squared error of scores, both passes being moved. What is
      asked of one pass is asked of their mean, as in the authors' code: their paper's alpha is twice as large. A step
      takes twice as long. Not beside a teacher whose inside is compared.

    With hidden 0 and attention 0 the teacher teaches by its classes alone: it reads the sentences by its own tokenizer,
    may have other tokens than the student, and is asked once for each sentence, before training.

    With validation, or choose_on_validation, the best by the task's score (the mean of its metrics, as
    `evaluate --glue` has it) is kept. The report says where the data that it is scored on have chosen it.
    Batches are of like length, padded to their longest. Dropout is what the config says.
    """

    kind: ClassVar[str] = "finetune"
    verb: ClassVar[str] = "finetune"
    validating: ClassVar[str] = "--validation SHARE or --choose-on-validation"
    of_packed: ClassVar[str] = "fine-tune the model that it was made from, then quantize that"

    glue: str = Field("", description=f"the task: {', '.join(TASKS)}")
    data: str = Field("", description="holds nyu-mll/glue in the Hub's layout; the Hub when not given")
    max_length: int = Field(128, ge=2, description="tokens that a sentence, or pair, is cut to")
    teacher: str = Field(
        "", description="classifier of the same task to learn from; labels alone when not given"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="share of the teacher's classes in the loss")
    temperature: float = Field(1.0, gt=0, description="divides the logits of both sides when distilling")
    r_drop: float = Field(
        0.0, ge=0, description="weight of how far two passes with dropout lie apart; at twice the time"
    )
    lr: float = Field(5e-5, gt=0, description="peak learning rate of AdamW; cosine to 0 at the end")
    epochs: float = Field(3.0, gt=0, le=1e9, description="passes over the training sentences")
    batch_size: int = Field(32, ge=1, description="sentences that are held in memory at once")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of products in training; auto: bfloat16 where the model is stored so and it is fast",
    )
    save_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints to resume from")
    validation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training sentences held out; what has the best score of the task on it is kept",
    )
    choose_on_validation: bool = Field(
        False,
        description="keep what scores best on the task's validation data, as most published figures do; its score "
        "there is then no independent one",
    )

    @model_validator(mode="after")
    def _of_the_teacher(self) -> Self:
        changed = next(filter(self.given, OF_TEACHER), None)
        if changed and not self.teacher:
            raise ValueError(f"{changed} is about learning from a teacher, and none is given")
        if self.teacher and not self.alpha and not self.inside:
            raise ValueError("alpha 0 and nothing inside leaves nothing to learn from the teacher")
        if self.r_drop and self.teacher and self.inside:
            raise ValueError(
                "r_drop compares two passes of the student, of which the teacher's inside meets one: leave it out, or "
                f"give {' and '.join(f'{name} 0' for name in self.inside)}"
            )
        if self.given("temperature") and self.glue in TASKS and not TASKS[self.glue].labels:
            raise ValueError(
                f"temperature divides the logits of classes, and {self.glue} is a score without any"
            )
        if self.choose_on_validation and self.validation:
            raise ValueError(
                "choose_on_validation keeps what is best on the task's validation data, and validation what is best "
                "on a share of the training sentences: give one of them"
            )
        self.require_batch(self.batch_size)
        return self

    @property
    def validates(self) -> bool:
        return self.choose_on_validation or super().validates

    def held(self, examples: int) -> int:
        return len(self._judging()) if self.choose_on_validation else super().held(examples)

    def _judging(self) -> list[dict[str, Any]]:
        """The validation sentences that choose; of MNLI the matched ones."""
        return task_rows(self.task, self.task.splits[0], self.data) if self.choose_on_validation else []

    @property
    def _splits(self) -> tuple[str, ...]:
        """Of the data, those that are read."""
        return ("train", self.task.splits[0]) if self.choose_on_validation else ("train",)

    @property
    def _passes(self) -> int:
        """Of each sentence in a step."""
        return 2 if self.r_drop else 1

    @property
    def task(self) -> Task:
        """Raises `UserError` for a name that is none."""
        if not self.glue:
            raise UserError(f"Which task should it learn? Give --glue with one of {', '.join(TASKS)}.")
        return task_of(self.glue)

    @property
    def needs_calibration(self) -> bool:
        return False  # the step brings its own text

    def survey_work(self, tokens: int, window: int) -> float:
        held = self.validation * (1.0 - 1 / 3)  # an epoch runs it once, forward alone
        return self._passes * super().survey_work(round(self._tokens * (1 - held)), self._length)

    def asked(self, tokens: int, window: int) -> float:
        return super().asked(self._tokens, self._length)

    @property
    def _length(self) -> int:
        """Of a sentence, on average."""
        return min(self.task.tokens, self.max_length)

    @property
    def _tokens(self) -> int:
        return self._used(train_size(self.task, self.data)) * self._length

    def _used(self, rows: int) -> int:
        """How many of the sentences are taken: where a teacher is asked about them, as many as max_steps comes to."""
        if self.max_steps is None or not self.teacher or self.by_token:
            return rows
        seen = self.max_steps * self.batch
        return min(rows, math.ceil(seen / (1 - self.validation)))

    def survey_span(self, window: int) -> int:
        # freed memory is kept for batches of other lengths: in training a 135M decoder half as much again stood empty
        return self._passes * self.batch_size * self.max_length * 3 // 2

    def survey_bytes(self, anatomy: Anatomy, window: int) -> int:
        return KEPT + (self.inside_bytes(anatomy, self.batch_size, self.max_length) if self.teacher else 0)

    @property
    def distills(self) -> bool:
        return bool(self.teacher)

    @property
    def predicts(self) -> bool:
        return False  # tokens

    @property
    def dropout_trains(self) -> bool:
        return True  # with a teacher, too: there are labels to learn by heart

    def starts_from(self, files: ModelFiles) -> PreTrainedConfig | None:
        return None if classifies(files.config, self.task) else headed_config(files, self.task)

    def reads(self) -> list[Path]:
        return [file for split in self._splits for file in data_files(self.task, split, self.data)]

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        require_data(self.task, self._splits, self.data)
        if self.validates:
            require_metrics()
        config = anatomy.model.config
        require_head(config, self.task, "The model of this step")  # a recipe with two tasks
        require_positions("max_length", self.max_length, anatomy.model, "the model")
        if self.r_drop and not drops_out(anatomy.model):
            raise UserError(
                f"r_drop {self.r_drop:g} compares two passes with dropout, and {type(config).__name__} of the model "
                "has none: give it some in config.json, or leave r_drop out."
            )

    @property
    def by_token(self) -> bool:
        return bool(self.inside)

    @property
    def otherwise(self) -> str:
        return f", unless it teaches by its classes alone: {', '.join(f'{name} 0' for name in self.inside)}"

    @property
    def keeps_other(self) -> bool:
        return self.by_token and super().keeps_other  # what it says of the classes is asked before

    def check_teacher(self, config: PreTrainedConfig, spec: str) -> None:
        require_head(config, self.task, f"The teacher {spec}")

    def check_pair(self, front: Anatomy, other: Anatomy) -> None:
        super().check_pair(front, other)
        require_positions("max_length", self.max_length, other.model, "the teacher")

    def learned_from(self, look: Survey) -> Taught | None:
        """The teacher and how it reads, or all that it says."""
        if not self.teacher:
            return None
        if not self.by_token:
            return self._said(look)
        model = look.other(self)
        return model, reading(model, look.tokenizer(self))

    def _said(self, look: Survey) -> Tensor:
        """The teacher's logits of all training sentences, [sentences, labels]; in files, of which each is made once."""
        from llmslim.training.forward import label_logits

        rows = self._rows(look)
        starts = range(0, len(rows), PIECE)
        paths = [look.scratch / "teacher" / f"{start:09d}.safetensors" for start in starts]
        if not all(path.exists() for path in paths):
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            model = look.other(self, dtype=self.products(look.dtype))
            its = reading(model, look.tokenizer(self))
            for start, path in zip(starts, paths, strict=True):
                if path.exists():
                    continue

                def told(done: int, total: int, before: int = start) -> None:
                    look.progress("teacher", before + done, len(rows))

                data = Sentences(self.task, rows[start : start + PIECE], its, self.max_length)
                try:
                    logits = label_logits(model, self.task, data, self.batch_size, told)
                except UserError as error:
                    raise UserError(f"The teacher {self.teacher} teaches nothing: {error}") from error
                save_tensors(path, {"logits": logits})
        return torch.cat([load_tensors(path)["logits"] for path in paths])

    def examples(self, look: Survey, model: PreTrainedModel, teacher: Taught | None) -> Sentences:
        own, its = reading(model, look.tokenizer()), None
        if isinstance(teacher, tuple):
            # token by token: its own tokenizer may put others in front, or at the end
            its = teacher[1]._replace(tokenizer=own.tokenizer, pad=own.pad)
            teacher[0].config.pad_token_id = own.pad
        data = Sentences(self.task, self._rows(look), own, self.max_length, its)
        if isinstance(teacher, Tensor):
            data.beside = {TARGET: teacher}
        return data

    def _rows(self, look: Survey) -> list[dict[str, Any]]:
        """The task's training sentences, in an order that the seed gives; at the end those that choose."""
        rows = task_rows(self.task, "train", self.data)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(look.seed)).tolist()
        return [*(rows[index] for index in order[: self._used(len(rows))]), *self._judging()]

    def products(self, dtype: torch.dtype) -> torch.dtype:
        return super().products(dtype) if self.precision == "auto" else getattr(torch, self.precision)

    def criterion(self, model: PreTrainedModel, teacher: Taught | None, data: Any) -> tuple[Loss, nn.Module]:
        from llmslim.training.forward import run

        columns = label_columns(model.config, self.task)
        inside = _Inside(self, model, teacher[0], data) if isinstance(teacher, tuple) else None

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            if self.r_drop:
                batch = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
            if inside is None:
                given, target = run(model, data.inputs(batch)).logits, batch.get(TARGET)
                terms: list[Tensor] = []
            else:
                given, target, terms = inside(model, batch)
            logits = given[:, columns].float()
            value = self._labels(logits, batch["labels"])
            if target is not None:
                value = (1 - self.alpha) * value + self.alpha * self._response(logits, target)
            if self.r_drop:
                value = value + self.r_drop * self._apart(*logits.chunk(2))
            return torch.stack([value, *terms]).sum()

        return loss, inside.comparison.projections if inside else nn.ModuleList()

    def judge(self, model: PreTrainedModel, data: Any) -> Judge:
        from llmslim.training.forward import run
        from llmslim.training.loop import Judge

        columns = label_columns(model.config, self.task)

        def predict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return predicted(self.task, run(model, data.inputs(batch)).logits[:, columns])

        return Judge(predict, lambda found, labels: scores(self.task, found, labels))

    def _labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits [batch, labels]."""
        if self.task.labels:
            return F.cross_entropy(logits, labels)
        return F.mse_loss(logits[:, 0], labels)

    def _response(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of logits and the teacher's, [batch, labels]."""
        from llmslim.training.losses import divergence

        if self.task.labels:
            return divergence(logits, target, self.temperature)
        return F.mse_loss(logits, target)

    def _apart(self, first: Tensor, second: Tensor) -> Tensor:
        """Of the logits of two passes, [batch, labels]."""
        if not self.task.labels:
            return F.mse_loss(first, second)
        first, second = first.log_softmax(-1), second.log_softmax(-1)
        return ((first.exp() - second.exp()) * (first - second)).sum(-1).mean() / 2  # of both KLs


class _Inside:
    """A teacher beside the student, whose inside is compared."""

    def __init__(
        self, step: Finetune, model: PreTrainedModel, teacher: PreTrainedModel, data: Sentences
    ) -> None:
        self.teacher, self.data = teacher, data
        self.columns = label_columns(teacher.config, step.task)
        some = data.collate([data[index] for index in range(min(SAMPLE, len(data)))])
        sample = {name: tensor.to(model.device) for name, tensor in some.items()}
        samples = data.inputs(sample), data.inputs(sample, TEACHER)
        self.comparison = step.comparison(model, teacher, samples, sample["attention_mask"].bool())

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The student's logits, the teacher's of the labels [batch, labels], and what the insides differ by."""
        views = self.comparison.views
        mine = views[0].of(model, self.data.inputs(batch))
        with torch.no_grad():
            its = views[1].of(self.teacher, self.data.inputs(batch, TEACHER))
        terms = self.comparison.losses(mine, its, batch["attention_mask"].bool())
        return mine.output.logits, its.output.logits[:, self.columns].float(), terms
