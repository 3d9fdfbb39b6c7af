"""Recipes: what a run does, as YAML, as CLI flags, or in Python; always the same typed record.

steps:
  - gptq: {bits: 4, group_size: 64}
calibration: {text: builtin, num_samples: 32, seq_len: 512}
evaluation: {text: "builtin:test", windows: 16}
format: auto
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from llmslim.errors import UserError, nearest
from llmslim.step import Step, build_step, checked, explain, listed

if TYPE_CHECKING:
    from typing_extensions import Self


class Calibration(BaseModel):
    """The text that steps look at."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str = Field("builtin", description="NAME[:CONFIG[:SPLIT]], a .txt/.jsonl/.parquet file, or builtin")
    num_samples: int = Field(32, ge=1, description="windows of the text")
    seq_len: int = Field(512, ge=2, description="tokens per window")


class Evaluation(BaseModel):
    """What base and result are measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str = Field("builtin:test", description="text for perplexity and divergence")
    windows: int = Field(16, ge=1, description="non-overlapping windows from its start")
    seq_len: int = Field(512, ge=2, description="tokens per window")
    join: str = Field("", description="what stands between the rows of the text")
    speed: bool = Field(True, description="measure decode and prefill speed and memory of base and result")
    tasks: tuple[str, ...] = Field(
        (), description="tasks of lm-eval for base and result, such as [arc_easy, piqa]"
    )
    tasks_limit: int | None = Field(None, ge=1, description="the first questions of each task; all when null")
    tasks_data: str = Field(
        "", description="folder of their data sets in the Hub's layout; the Hub when empty"
    )
    glue: tuple[str, ...] = Field(
        (),
        description="tasks of GLUE for a classifier and its base, such as [sst2]; that of finetune when empty",
    )
    glue_subset: int | None = Field(
        None, ge=2, description="the first examples of each split of them, for a quick look; all when null"
    )
    glue_data: str = Field(
        "", description="folder of nyu-mll/glue in the Hub's layout; that of finetune, or the Hub, when empty"
    )
    steps: bool = Field(
        False, description="measure what each step of the recipe leaves, too, and draw steps.svg"
    )

    @field_validator("tasks", "glue", mode="before")
    @classmethod
    def _several(cls, names: Any) -> Any:
        return listed(names)

    @model_validator(mode="after")
    def _tasks_to_limit(self) -> Self:
        for name in ("tasks_limit", "tasks_data"):
            if getattr(self, name) and not self.tasks:
                raise ValueError(f"{name} is about tasks, and there are none: name some, or leave it out")
        return self


class Recipe(BaseModel):
    """A run: steps in order, the texts, and how the result is stored.

    Attributes:
        dtype: type of what stays dense in the output; auto keeps the model's own.
        evaluation: None skips the measurements (never the verification).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: tuple[SerializeAsAny[Step], ...]
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    format: Literal["auto", "llmslim", "compressed-tensors", "gptq", "bitsandbytes"] = Field(
        "auto",
        description="of the output; auto: compressed-tensors (of bnb: bitsandbytes) if it can hold it, else llmslim",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of what stays dense in the output; auto: the model's own"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="chooses the calibration windows")

    @property
    def reads_text(self) -> bool:
        """Whether a step looks at the calibration text."""
        return any(one.needs_calibration for step in self.steps for one in (step, *step.beside()))

    @property
    def measures_steps(self) -> bool:
        """Whether what each step leaves is measured, not the result alone."""
        return self.evaluation is not None and self.evaluation.steps

    @property
    def fine_tunings(self) -> list[Any]:
        """The steps that train a classifier on a task of GLUE."""
        return [step for step in self.steps if step.kind == "finetune"]

    @property
    def glue_tasks(self) -> tuple[str, ...]:
        """Tasks of GLUE to be scored on: those that are asked for, else the one that is trained last."""
        trained = tuple(step.glue for step in self.fine_tunings[-1:])
        return (self.evaluation.glue or trained) if self.evaluation is not None else ()

    @property
    def glue_data(self) -> str:
        """The folder of their data; the Hub when ""."""
        folders = [step.data for step in self.fine_tunings[-1:]]
        return next(filter(None, [self.evaluation.glue_data if self.evaluation else "", *folders]), "")

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON that `Recipe.parse` reads back."""
        record = self.model_dump(mode="json", exclude={"steps"})
        steps = [{step.kind: step.model_dump(mode="json", exclude_unset=False)} for step in self.steps]
        return {"steps": steps, **record}

    @classmethod
    def parse(cls, record: Any) -> Recipe:
        """A recipe from YAML or JSON data; anything unknown is refused with the nearest known name.

        Raises:
            UserError: in one sentence.
        """
        _require_steps(record)
        steps = []
        for entry in record["steps"]:
            if isinstance(entry, str):
                entry = {entry: {}}
            if not isinstance(entry, dict) or len(entry) != 1:
                raise UserError(
                    f"A step of a recipe is one name with its options, such as `gptq: {{bits: 4}}`, not {entry!r}."
                )
            kind, fields = next(iter(entry.items()))
            if not isinstance(fields, dict | None):
                raise UserError(f"{kind} takes options by name, such as `gptq: {{bits: 4}}`, not {fields!r}.")
            _require_names(entry, fields or {})
            steps.append(build_step(kind, fields or {}))
        return cls.checked(**{**record, "steps": tuple(steps)})

    @classmethod
    def checked(cls, **fields: Any) -> Recipe:
        """A recipe of these fields; what is wrong with one is refused in one sentence."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise UserError(_explain_nested(error)) from error

    @classmethod
    def read(cls, path: Path, overrides: list[str] = []) -> Recipe:  # noqa: B006 - never changed
        """A recipe file, with `key=value` overrides such as `gptq.bits=3` or `calibration.num_samples=8`."""
        import yaml

        if not path.is_file():
            raise UserError(f"No recipe at {path}.")
        try:
            record = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from error
        for override in overrides:
            _require_steps(record)
            _override(record, override)
        return cls.parse(record)


def _require_steps(record: Any) -> None:
    if not isinstance(record, dict) or not isinstance(record.get("steps"), list) or not record["steps"]:
        raise UserError("A recipe is a mapping with a list of steps, such as `steps: [{gptq: {bits: 4}}]`.")
    _require_names(record)


def _require_names(*mappings: dict[Any, Any]) -> None:
    for key in (key for mapping in mappings for key in mapping):
        if not isinstance(key, str):
            raise UserError(f"A recipe has names in front of its colons, such as `bits: 4`, not {key!r}.")


def _override(record: dict[str, Any], override: str) -> None:
    """Set a dotted key of a recipe; a first part that names a step reaches into the steps of that name."""
    import yaml

    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise UserError(f"{override!r} is not an override: write key=value, such as gptq.bits=3.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: {text!r} is not a value in YAML.") from error
    record["steps"] = [{entry: {}} if isinstance(entry, str) else entry for entry in record["steps"]]
    named = [entry for entry in record["steps"] if isinstance(entry, dict) and path[0] in entry]
    known = [
        *(kind for entry in record["steps"] if isinstance(entry, dict) for kind in entry),
        *Recipe.model_fields,
    ]
    if path[0] not in known:
        raise UserError(
            f"{override!r}: the recipe has no {path[0]!r}{nearest(path[0], known)}; "
            f"what can be changed is {', '.join(dict.fromkeys(known))}."
        )
    for target in named or [record]:
        for part in path[:-1]:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
            if not isinstance(target, dict):
                raise UserError(f"{override!r}: {part!r} has no keys below it.")
        target[path[-1]] = value


def _explain_nested(error: ValidationError) -> str:
    """The first problem, told for the innermost section that it lies in."""
    location = error.errors()[0]["loc"]
    sections: dict[str, type[BaseModel]] = {"calibration": Calibration, "evaluation": Evaluation}
    section, value = sections.get(str(location[0])), error.errors()[0]["input"]
    fields = {str(location[-1]): value} if len(location) > 1 else value
    if section is None or not isinstance(fields, dict):
        return explain(error, "the recipe", Recipe)
    checked(section, str(location[0]), fields)
    return explain(error, "the recipe", Recipe)
