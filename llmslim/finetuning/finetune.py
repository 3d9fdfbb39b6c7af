"""Fine-tune a classifier on a GLUE task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
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
from llmslim.loaders.heads import classifies, headed_config, label_columns, positions, reading, require_head
from llmslim.metrics import predicted, require_metrics, scores
from llmslim.training.inside import InsideFields
from llmslim.training.whole import WholeStep

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from typing_extensions import Self

    from llmslim.loaders.models import ModelFiles
    from llmslim.step import Survey
    from llmslim.training.forward import Seen
    from llmslim.training.loop import Judge, Loss

SAMPLE = 256  # sentences that projections are fitted to before training
OF_TEACHER = ("alpha", "temperature", *InsideFields.model_fields)


class Finetune(InsideFields, WholeStep):
    """Train all weights of a dense model as a classifier: (1 - alpha) * labels + alpha * teacher + inside.

    - labels: cross-entropy, or the squared error of a score (stsb).
    - teacher: KL from its distribution over the classes, both divided by the temperature (Hinton et al. 2015,
      arXiv:1503.02531); the squared error from its score. Without a teacher alpha is 0.
    - inside: the teacher's hidden states and relations of its last attention (TinyBERT, arXiv:1909.10351; MiniLMv2,
      arXiv:2012.15828), and whatever else `distill --method features` compares; padding is left out.

    The teacher reads the sentences by its own tokenizer. One with other tokens than the student, whose inside cannot
    be compared token by token, teaches by its classes alone: with hidden 0 and attention 0.

    With validation the best by the task's score (the mean of its metrics, as `evaluate --glue` has it) is kept.
    Batches are of like length, padded to their longest. Dropout is what the config says.
    """

    kind: ClassVar[str] = "finetune"
    verb: ClassVar[str] = "finetune"
    without_tokens: ClassVar[str] = ", unless it teaches by its classes alone: hidden 0 and attention 0"

    glue: str = Field("", description=f"the task: {', '.join(TASKS)}")
    data: str = Field("", description="holds nyu-mll/glue in the Hub's layout; the Hub when not given")
    max_length: int = Field(128, ge=2, description="tokens that a sentence, or pair, is cut to")
    teacher: str = Field(
        "", description="classifier of the same task to learn from; labels alone when not given"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="share of the teacher's classes in the loss")
    temperature: float = Field(1.0, gt=0, description="divides the logits of both sides when distilling")
    lr: float = Field(5e-5, gt=0, description="peak learning rate of AdamW; cosine to 0 at the end")
    epochs: float = Field(3.0, gt=0, description="passes over the training sentences")
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

    @model_validator(mode="after")
    def _of_the_teacher(self) -> Self:
        changed = next(filter(self.given, OF_TEACHER), None)
        if changed and not self.teacher:
            raise ValueError(f"{changed} is about learning from a teacher, and none is given")
        self.require_batch(self.batch_size)
        return self

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
        length = min(self.task.tokens, self.max_length)
        if self.max_steps:
            return super().survey_work(0, length)
        held = self.validation * (1.0 - 1 / 3)  # an epoch runs it once, forward alone
        return super().survey_work(round(train_size(self.task, self.data) * length * (1 - held)), length)

    def survey_span(self, window: int) -> int:
        return self.batch_size * self.max_length

    def survey_bytes(self, anatomy: Anatomy, window: int) -> int:
        return self.inside_bytes(anatomy, self.batch_size, self.max_length) if self.teacher else 0

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
        return data_files(self.task, "train", self.data)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        require_data(self.task, ("train",), self.data)
        if self.validation:
            require_metrics()
        config = anatomy.model.config
        require_head(config, self.task, "The model of this step")  # a recipe with two tasks
        self._check_length(anatomy.model, "model")

    @property
    def by_token(self) -> bool:
        return bool(self.inside)

    def check_teacher(self, config: PreTrainedConfig, spec: str) -> None:
        require_head(config, self.task, f"The teacher {spec}")

    def check_pair(self, front: Anatomy, other: Anatomy) -> None:
        super().check_pair(front, other)
        self._check_length(other.model, "teacher")

    def learned_from(self, look: Survey) -> tuple[PreTrainedModel, Reading] | None:
        """The teacher, and how it reads."""
        model = super().learned_from(look)
        return None if model is None else (model, reading(model, look.tokenizer(self)))

    def examples(
        self, look: Survey, model: PreTrainedModel, teacher: tuple[PreTrainedModel, Reading] | None
    ) -> Sentences:
        """The task's training sentences, in an order that the seed gives."""
        rows = task_rows(self.task, "train", self.data)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(look.seed)).tolist()
        mixed = [rows[index] for index in order]
        its = teacher[1] if teacher else None
        return Sentences(self.task, mixed, reading(model, look.tokenizer()), self.max_length, its)

    def products(self, look: Survey) -> torch.dtype:
        return super().products(look) if self.precision == "auto" else getattr(torch, self.precision)

    def criterion(
        self, model: PreTrainedModel, teacher: tuple[PreTrainedModel, Reading] | None, data: Any
    ) -> tuple[Loss, list[nn.Parameter]]:
        from llmslim.training.forward import run

        columns = label_columns(model.config, self.task)
        learn = None if teacher is None else _Teacher(self, model, teacher[0], data)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            inputs = data.inputs(batch)
            if learn is None:
                return self._labels(run(model, inputs).logits[:, columns].float(), batch["labels"])
            mine = learn.inside.views[0].of(model, inputs)
            logits = mine.output.logits[:, columns].float()
            return learn(self._labels(logits, batch["labels"]), logits, mine, batch)

        return loss, list(learn.inside.projections.parameters()) if learn else []

    def judge(self, model: PreTrainedModel, data: Any) -> Judge:
        from llmslim.training.loop import Judge

        columns = label_columns(model.config, self.task)

        def predict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return predicted(self.task, model(**data.inputs(batch)).logits[:, columns])

        return Judge(predict, lambda found, labels: scores(self.task, found, labels))

    def _check_length(self, model: PreTrainedModel, which: str) -> None:
        limit = positions(model)
        if limit and self.max_length > limit:
            raise UserError(
                f"max_length {self.max_length} is more than the {limit} positions of the {which}."
            )

    def _labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits [batch, labels]."""
        if self.task.labels:
            return F.cross_entropy(logits, labels)
        return F.mse_loss(logits[:, 0], labels)


class _Teacher:
    """What a batch teaches: adds the teacher's part to the loss of the labels."""

    def __init__(
        self, step: Finetune, model: PreTrainedModel, teacher: PreTrainedModel, data: Sentences
    ) -> None:
        self.step, self.model, self.data = step, teacher, data
        self.columns = label_columns(teacher.config, step.task)
        some = data.collate([data[index] for index in range(min(SAMPLE, len(data)))])
        sample = {name: tensor.to(model.device) for name, tensor in some.items()}
        samples = data.inputs(sample), data.inputs(sample, TEACHER)
        self.inside = step.comparison(model, teacher, samples, sample["attention_mask"].bool())

    def __call__(self, value: Tensor, logits: Tensor, mine: Seen, batch: dict[str, Tensor]) -> Tensor:
        from llmslim.training.losses import divergence

        step = self.step
        with torch.no_grad():
            its = self.inside.views[1].of(self.model, self.data.inputs(batch, TEACHER))
        target = its.output.logits[:, self.columns].float()
        classes = bool(step.task.labels)
        response = divergence(logits, target, step.temperature) if classes else F.mse_loss(logits, target)
        value = (1 - step.alpha) * value + step.alpha * response
        return torch.stack([value, *self.inside.losses(mine, its, batch["attention_mask"].bool())]).sum()
