"""The model that training learns from: which it is, and whether it fits; told before weights are read."""

from __future__ import annotations

import json
from collections.abc import Sequence

from llmslim.anatomy import Anatomy
from llmslim.checkpoint.reader import plain_config, read_edits
from llmslim.edit import replay
from llmslim.errors import UserError
from llmslim.loaders.models import ModelFiles, find, skeleton
from llmslim.loaders.texts import TextSample
from llmslim.step import Step
from llmslim.training.step import TrainStep


def teacher_files(spec: str, base: ModelFiles, otherwise: str = "") -> ModelFiles:
    """The named model; else the one that `base` was made from, as its report tells, or `base` itself.

    Args:
        otherwise: what else would do, for the message: ", or ...".

    Raises:
        UserError: it is not there.
    """
    report = base.folder / "report.json"
    if spec or not report.is_file():
        return find(spec) if spec else base
    origin = json.loads(report.read_text()).get("base", {})
    try:
        return find(origin["spec"], origin.get("revision"))
    except (UserError, KeyError) as error:
        raise UserError(
            f"{base.spec} was made from {origin.get('spec')!r}, which is not here to distill from: name it with "
            f"--teacher{otherwise}."
        ) from error


def check_training(
    steps: Sequence[Step], files: ModelFiles, text: TextSample | None, students: Sequence[Anatomy]
) -> list[ModelFiles]:
    """Refuse teachers and texts that steps which train cannot learn from.

    Args:
        students: what stands in front of each step, on meta.

    Returns:
        The teachers.

    Raises:
        UserError: in one sentence.
    """
    teachers: list[ModelFiles] = []
    for number, step in enumerate(steps):
        if not isinstance(step, TrainStep):
            continue
        if text is not None and step.needs_calibration:
            step.check_text(len(text.tokens))
        if not step.distills:
            continue
        teacher = teacher_files(step.teacher, files, step.without_teacher)
        if number == 0 and teacher.folder == files.folder:
            raise UserError(
                f"{files.spec} would be distilled from itself: name the uncompressed model with --teacher"
                f"{step.without_teacher}."
            )
        check_tokens(teacher, files)
        step.check_teacher(teacher.config, teacher.spec)
        model = skeleton(plain_config(teacher))
        replay(model, read_edits(teacher)[1])
        step.check_pair(students[number], Anatomy(model))
        teachers.append(teacher)
    return teachers


def check_tokens(teacher: ModelFiles, student: ModelFiles) -> None:
    """Refuse a teacher to whom the student's token ids say something else.

    Vocabularies may be padded to different sizes behind the same tokens, as those of one family often are. Models
    without a tokenizer are compared by the size alone.

    Raises:
        UserError: in one sentence, with a token that differs.
    """
    if teacher.folder == student.folder:
        return
    sizes = [files.config.get_text_config().vocab_size for files in (teacher, student)]
    its, own = _tokens(teacher), _tokens(student)
    if its is not None and own is not None and its != own:
        token, number = min(own.items() - its.items() or its.items() - own.items(), key=lambda item: item[1])
        raise UserError(
            f"The teacher {teacher.spec} has other tokens than {student.spec} ({len(its)} and {len(own)}; token "
            f"{number}, {token!r}, is one that differs): a teacher must have the same."
        )
    padded = its is not None and own is not None and len(own) <= min(sizes)
    if sizes[0] != sizes[1] and not padded:
        raise UserError(
            f"The teacher {teacher.spec} has a vocabulary of {sizes[0]} tokens and {student.spec} one of "
            f"{sizes[1]}: a teacher must have the same tokens."
        )


def _tokens(files: ModelFiles) -> dict[str, int] | None:
    try:
        vocabulary: dict[str, int] = files.tokenizer().get_vocab()
    except UserError:
        return None
    return vocabulary
