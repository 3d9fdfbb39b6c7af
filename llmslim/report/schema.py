"""Reading report.json, of this version and of older ones; the file may come from anybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from llmslim.errors import UserError

SCHEMA_VERSION = 2
"""2 added: files (hashes of what was verified), size.*.parts, details, speed.*.samples. 1 is read all the same:
what it has not is left out."""


class _Part(BaseModel):
    """What is read of a part of a report, and its types; what else stands there is left as it is."""

    model_config = ConfigDict(strict=True)


def measured(record: Any) -> Any:
    """None of a record that is empty or says that it was skipped."""
    return None if not record or (isinstance(record, dict) and "skipped" in record) else record


_IfMeasured = BeforeValidator(measured)


class _Estimate(_Part):
    value: float
    stderr: float | None = None


class _Perplexity(_Estimate):
    protocol: str = ""
    data_hash: str = ""


class _Quality(_Part):
    perplexity: _Perplexity
    base_perplexity: _Perplexity
    kl: _Estimate
    top1_agreement: _Estimate


class _Rate(_Part):
    tokens_per_second: float


class _Side(_Part):
    decode: _Rate | None = None
    prefill: _Rate | None = None
    peak_memory_mb: float | None = None
    load_seconds: float | None = None


class _Speed(_Part):
    base: Annotated[_Side | None, _IfMeasured] = None
    result: Annotated[_Side | None, _IfMeasured] = None


class _Size(_Part):
    bytes_on_disk: float
    bits_per_weight: float
    bits_per_block_weight: float


class _Sizes(_Part):
    base: _Size
    result: _Size


class _Metric(_Part):
    share: bool = False
    base: float | None = None
    base_stderr: float | None = None
    value: float | None = None
    stderr: float | None = None

    @model_validator(mode="after")
    def _of_both(self) -> Self:
        lacking = {"base", "base_stderr", "value", "stderr"} - self.model_fields_set
        if self.share and (lacking or self.base is None or self.value is None):
            raise ValueError("a share of 1 has base, base_stderr, value and stderr")
        return self


class _Task(_Part):
    main: str
    metrics: dict[str, _Metric]


class _Tasks(_Part):
    protocol: str = ""
    tasks: dict[str, _Task] = {}


class _GlueTask(_Part):
    score: float


class _Glue(_Part):
    tasks: dict[str, _GlueTask] = {}


class _Base(_Part):
    model: str
    spec: str = ""
    path: str | None = None


class _Recipe(_Part):
    steps: list[Annotated[dict[str, dict[str, Any]], Field(min_length=1)]]


class _Run(_Part):
    cpu_seconds: float | dict[str, float]
    wall_seconds: float
    peak_memory_mb: float
    resumed: bool


class _Environment(_Part):
    cpu: str
    threads: int
    device: str


class _StepRow(_Part):
    step: str
    size: _Size
    quality: Annotated[_Quality | None, _IfMeasured]


class _Note(_Part):
    where: str
    what: str


class _Verification(_Part):
    ok: bool | None


class _File(_Part):
    bytes: int
    sha256: str


class _Report(_Part):
    base: _Base
    recipe: _Recipe
    format: str
    linears: list[dict[str, Any]]
    notes: list[_Note]
    size: _Sizes
    quality: Annotated[_Quality | None, _IfMeasured]
    speed: Annotated[_Speed | None, _IfMeasured]
    run: _Run
    environment: _Environment
    steps: list[_StepRow] | None = None
    verification: _Verification = _Verification(ok=None)
    files: dict[Annotated[str, Field(pattern=r"^[^\x00]*$")], _File] | None = None
    tasks: Annotated[_Tasks | None, _IfMeasured] = None
    glue: Annotated[_Glue | None, _IfMeasured] = None


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        UserError: the folder has none, or one that is damaged or of a version that cannot be read.
    """
    path = folder / "report.json"
    if not folder.is_dir() or not path.is_file():
        raise UserError(f"{folder} is no run: name the --output folder of one, which has a report.json.")
    try:
        report = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is no JSON. Run again.") from error
    version = report.get("schema_version") if isinstance(report, dict) else None
    if not isinstance(version, int) or version < 1:
        raise UserError(
            f"{path} is no report of llmslim: its schema_version is {version!r}, not a number from 1 to "
            f"{SCHEMA_VERSION}."
        )
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema {version} and this llmslim reads up to {SCHEMA_VERSION}: update llmslim to read it."
        )
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {_problem(error)}. Run again.") from error
    return {
        "calibration": None,
        "plan": None,
        "steps": None,
        "verification": {"ok": None, "checks": []},
        **report,
    }


def _problem(error: ValidationError) -> str:
    """The first field that is not what it should be."""
    detail = error.errors(include_url=False)[0]
    field = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return f"it lacks {field}"
    return f"{field} = {str(detail['input'])[:40]!r}: {detail['msg'].removeprefix('Value error, ')}"
