"""Step: decide. A method is one class whose fields are the YAML keys, the CLI flags and the rows of the docs.

Ladder: `Step` (whole model) -> `BlockStep` (sees one block and its calibration inputs) -> `LinearStep` (sees one
weight and the statistics of its inputs). Override the narrowest rung.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from llmslim.anatomy import Anatomy, Block
from llmslim.edit import DropBlocks, Edit
from llmslim.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmslim.calibration.stream import BlockStream
    from llmslim.loaders.models import ModelFiles

STEPS: dict[str, type[Step]] = {}
M = TypeVar("M", bound=BaseModel)

REFERENCE_PART = 3  # one window of so many is followed through the model as it was before the step


@dataclass
class StepRecord:
    """What a step did, for the report and for resuming.

    Attributes:
        edits: the changes of structure, in order.
        linears: one row per weight: name, bits, error, ...
        notes: every fallback and anomaly: (where, what).
        survey: what the step's survey found, by name; empty for a step without one.
        tell: shows a note on the work at the current block beside its progress.
        training: the history of the training of the current block, which the pass writes down.
        stored: what dense tensors of the output are stored in.
        source: what the step starts from.
    """

    edits: list[Edit] = field(default_factory=list)
    linears: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, str]] = field(default_factory=list)
    survey: dict[str, Tensor] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda note: None
    training: list[dict[str, Any]] = field(default_factory=list)
    stored: torch.dtype = torch.float32
    source: ModelFiles | None = None

    def note(self, where: str, what: str) -> None:
        self.notes.append({"where": where, "what": what})


class Outlook(Protocol):
    """The model in front of a step as the plan foresees it, on meta: for steps that settle how much they do by it.

    Attributes:
        anatomy: of the model.
        parameters: how many it has; a sparse weight counts whole.
        share: the same, as a share of those that the run started from.
        stored_bytes: size of its weight files.
    """

    @property
    def anatomy(self) -> Anatomy: ...

    @property
    def parameters(self) -> int: ...

    @property
    def share(self) -> float: ...

    @property
    def stored_bytes(self) -> int: ...

    def after(self, edits: list[Edit]) -> Outlook:
        """What these edits would leave."""


class Step(BaseModel):
    """A method. Subclasses set `kind` (the name in recipes) and `verb` (the CLI verb that offers it)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: ClassVar[str]
    verb: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            STEPS[cls.kind] = cls

    def given(self, name: str) -> bool:
        """Whether an option is not at its default: by value, since a recipe that a report tells has all fields."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def require_option(self, name: str, read: bool, of: str) -> None:
        """Refuse an option that is given and nothing would read; of a validator.

        Args:
            of: what reads it, in words.
        """
        if self.given(name) and not read:
            raise ValueError(f"{name} is an option of {of} only")

    @property
    def needs_calibration(self) -> bool:
        """Whether the step looks at a text."""
        return False

    def starts_from(self, files: ModelFiles) -> PreTrainedConfig | None:
        """The config of the model that a run with this step must start from, if it is not that of the files.

        Its architecture is that of the files with another head, which the run makes before the first step.

        Raises:
            UserError: there can be no such model.
        """
        return None

    def check_source(self, files: ModelFiles) -> None:
        """Refuse what cannot start from these files, as the run's first step; reads as little as it can.

        Raises:
            UserError: as `check` does.
        """

    def reads(self) -> list[Path]:
        """Files that the result depends on, beside the model, the text and the teacher."""
        return []

    def resolve(self, outlook: Outlook) -> tuple[list[Step], str]:
        """The steps that run in this one's place on this model, and what was chosen in words; on meta.

        A step that leaves nothing open runs itself, with nothing to tell.
        """
        return [self], ""

    def beside(self) -> list[Step]:
        """Steps of other kinds that its options ask for, which `resolve` puts around it."""
        return []

    def check(self, anatomy: Anatomy) -> None:
        """Refuse what cannot work on this model; runs on meta, before a weight is read.

        Raises:
            UserError: with the value received, the reason, and what would work.
        """

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        """The edits that the step will make, as far as they are known beforehand; for the plan and the format."""
        return []

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        """Memory the step needs at its peak beside a block's weights and the calibration states; for the plan."""
        return 0

    def disk_bytes(self, anatomy: Anatomy, tokens: int) -> int:
        """What the step keeps in the work folder for itself, on a text of so many tokens; for the plan."""
        return 0


class Survey(Protocol):
    """The model as it is before a step, for steps that must see all of it before they decide on a part.

    Attributes:
        anatomy: of a skeleton on meta.
        tokens: calibration windows, int64 [windows, seq].
        seed: of the run.
        dtype: what the run computes in.
    """

    anatomy: Anatomy
    seed: int
    dtype: torch.dtype

    @property
    def tokens(self) -> Tensor: ...

    def tokenizer(self, step: BlockStep | None = None) -> Any:
        """The model's, or that of the other one that a step takes from."""

    @property
    def mask_token(self) -> int | None:
        """Id of the tokenizer's mask token, for the loss of a masked language model."""

    def progressed(self, done: int, total: int) -> None:
        """Tell how many windows are done."""

    def blocks(self) -> Iterator[tuple[Block, BlockStream]]:
        """Each block, filled, with the lane "calibration" in front of it; the consumer passes the lane."""

    def loaded(self) -> PreTrainedModel:
        """The whole model in float32, for gradients; takes the memory that this needs."""

    def other(
        self, step: BlockStep, exact: bool = False, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """The other model that a step takes from, whole and frozen; as stored, or in a type, the run's when None."""

    @property
    def scratch(self) -> Path:
        """A folder of this step's own in the run's work folder, for what a resumed run finds again."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Tell how far some work is."""

    def note(self, where: str, what: str, **figures: float) -> None:
        """Tell of a fallback or an anomaly, for the report."""


class BlockStep(Step):
    """A step that decides block by block, in order, with the inputs that earlier decisions produce."""

    @property
    def needs_survey(self) -> bool:
        """Whether the step looks at the whole model once, before it decides on the first block."""
        return False

    def survey(self, look: Survey) -> dict[str, Tensor]:
        """What the step must know of the whole model; `StepRecord.survey` has it from then on."""
        return {}

    def drops(self, anatomy: Anatomy, survey: dict[str, Tensor]) -> list[DropBlocks]:
        """What the step's survey takes out whole: those blocks are neither passed nor written."""
        return []

    @property
    def survey_processes(self) -> int:
        """How many processes, of this machine, make the survey together."""
        return 1

    @property
    def survey_copies(self) -> float:
        """How often the survey holds all weights in float32 (itself loaded, gradients, sums); for the plan."""
        return 0

    def other(self, base: ModelFiles) -> ModelFiles | None:
        """The model, beside the one that it changes, that its survey takes from; None when there is none.

        Args:
            base: what the run starts from.

        Raises:
            UserError: it is not there.
        """
        return None

    def write_beside(self, folder: Path, record: StepRecord) -> None:
        """Write to the checkpoint's folder, which is complete, what belongs to it and is none of its weights."""

    @property
    def writes_beside(self) -> bool:
        """Whether there is such a thing, which the next step would lose."""
        return False

    def survey_work(self, tokens: int, window: int) -> float:
        """Operations per weight of the survey, on a text of so many tokens in windows of so many; for the plan.

        A forward takes 2 per token, one with its backward 6.
        """
        return (6.0 if self.survey_copies else 2.0) * tokens

    def survey_span(self, window: int) -> int:
        """Tokens that the survey holds the gradients of at once, of windows of so many; for the plan."""
        return window

    def survey_predicted(self, vocabulary: int, window: int) -> int:
        """Tokens that the survey holds the logits of at once; for the plan."""
        return self.survey_span(window)

    def survey_bytes(self, anatomy: Anatomy, window: int) -> int:
        """What the survey holds at once beside weights, gradients and what passes through Linears; for the plan."""
        return 0

    @property
    def survey_limit(self) -> float:
        """Seconds after which the survey stops by itself."""
        return float("inf")

    @property
    def streams_calibration(self) -> bool:
        """Whether the text passes through the blocks while they are decided on."""
        return self.needs_calibration

    def outer_bytes(self, anatomy: Anatomy) -> int:
        """Memory that `compress_outer` needs at its peak beside what lies outside the blocks; for the plan."""
        return 0

    def compress_outer(self, stream: BlockStream, record: StepRecord) -> None:
        """Change what lies outside the blocks (embeddings, head), which is filled; runs first."""

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        """Change one block, which is filled, and pass the lane "calibration" through the result.

        Args:
            reference: the model as it was before the step, with the first `reference_share` of the same lane, still
                in front of this block, when `needs_reference`; the step passes it through the block.
        """
        raise TypeError(f"{type(self).__name__} does not define compress_block()")

    @property
    def text_limit(self) -> int | None:
        """Tokens of the text that pass through the blocks, the first ones; all when None."""
        return None

    @property
    def needs_reference(self) -> bool:
        """Whether the step compares with the inputs that the uncompressed model has."""
        return False

    def follows_reference(self, anatomy: Anatomy, tokens: int) -> bool:
        """Whether `needs_reference`, and a text of so many tokens tells enough for it."""
        return self.needs_reference

    @property
    def reference_share(self) -> float:
        """The share of the windows that is followed through the model as it was before the step."""
        return 1 / REFERENCE_PART

    @property
    def windows_per_chunk(self) -> int | None:
        """How many windows pass through a block together; as many as are fast when None."""
        return None

    @property
    def block_copies(self) -> int:
        """How often training holds a block's weights in float32; 0 for a step that does not train block by block."""
        return 0

    @property
    def blocks_limit(self) -> float:
        """Seconds after which the training of all blocks stops by itself."""
        return float("inf")

    def windows_trained(self, windows: int) -> float:
        """How many windows the training of one block takes in all, of a text of so many; for the plan."""
        return 0.0


def block_of(stream: BlockStream, block: Block) -> Block:
    """The block of another stream's model that stands at the same place."""
    return next(other for other in stream.anatomy.blocks if other.name == block.name)


def listed(names: Any) -> Any:
    """Names of which one may be several with commas between, as on the command line, as a tuple; of a validator."""
    some = [names] if isinstance(names, str) else names
    if not isinstance(some, list | tuple) or not all(isinstance(name, str) for name in some):
        return names
    return tuple(part.strip() for name in some for part in name.split(",") if part.strip())


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"*.{p}") for p in patterns)


def require_matches(option: str, patterns: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse patterns of module names that match nothing, which would be typed in vain.

    Args:
        known: dotted names that a pattern can match.
        what: one of them is, in words.

    Raises:
        UserError: with the nearest of the names' last parts, and all of them.
    """
    missing = [pattern for pattern in patterns if not any(matches(name, (pattern,)) for name in known)]
    if missing:
        leaves = sorted({name.rpartition(".")[2] for name in known})
        raise UserError(
            f"{option} {', '.join(map(repr, missing))}: no such {what}"
            f"{nearest(missing[0].rpartition('.')[2], leaves)}; there are {', '.join(leaves)}."
        )


def step_class(kind: str) -> type[Step]:
    """The step of that name, or a UserError that suggests the nearest."""
    load_steps()
    if kind not in STEPS:
        raise UserError(f"Unknown step {kind!r}{nearest(kind, STEPS)}; there are {', '.join(sorted(STEPS))}.")
    return STEPS[kind]


def load_steps() -> None:
    """Import every method room, whose steps and edits enter the registries by being defined."""
    import importlib
    import pkgutil

    for room in ROOMS:
        package = importlib.import_module(f"llmslim.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"llmslim.{room}.{module.name}")


ROOMS = (
    "quantization",
    "pruning",
    "factorization",
    "sharing",
    "kvcache",
    "recovery",
    "distillation",
    "finetuning",
)


def build_step(kind: str, fields: dict[str, Any]) -> Step:
    """A step from its recipe entry; unknown or impossible values are refused in one sentence."""
    return checked(step_class(kind), kind, fields)


def checked(cls: type[M], what: str, fields: dict[str, Any]) -> M:
    """A model of these fields; what is wrong with one is refused in one sentence.

    Raises:
        UserError: as `explain` says it.
    """
    try:
        return cls(**fields)
    except ValidationError as error:
        raise UserError(explain(error, what, cls)) from error


def explain(error: ValidationError, what: str, cls: type[BaseModel]) -> str:
    """The first problem of a pydantic error as one sentence for the person who typed the value."""
    detail = error.errors()[0]
    key = str(detail["loc"][0]) if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        known = ", ".join(cls.model_fields)
        return f"Unknown option {key!r} for {what}{nearest(key, cls.model_fields)}; it takes {known}."
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{what}: {key} = {detail['input']!r}: {message}." if key else f"{what}: {message}."
