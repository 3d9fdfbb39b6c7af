"""Whether the other models that steps take from fit: teachers, and what is gone back to; before weights are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from llmslim.anatomy import Anatomy
from llmslim.anatomy.parts import features
from llmslim.checkpoint.reader import plain_config, read_edits
from llmslim.edit import replay
from llmslim.errors import UserError
from llmslim.loaders.heads import require_positions
from llmslim.loaders.models import ModelFiles, skeleton
from llmslim.loaders.texts import TextSample, sample
from llmslim.step import Step
from llmslim.training.step import PlacingStep, TrainStep


class Other(NamedTuple):
    """A model that a step takes from.

    Attributes:
        values: of its parameters and buffers, as it is loaded.
        weights: of the matrices that each token passes.
    """

    step: PlacingStep
    files: ModelFiles
    values: int
    weights: int


def check_others(
    steps: Sequence[Step], files: ModelFiles, text: TextSample | None, fronts: Sequence[Anatomy]
) -> list[Other]:
    """Refuse teachers, texts and earlier models that steps cannot learn from, or go back to.

    Args:
        fronts: what stands in front of each step, on meta.

    Raises:
        UserError: in one sentence.
    """
    others: list[Other] = []
    for number, step in enumerate(steps):
        if not isinstance(step, PlacingStep):
            continue
        if isinstance(step, TrainStep) and text is not None and step.needs_calibration:
            step.check_text(len(text.tokens))
        other = step.other(files)
        if other is None:
            continue
        if number == 0 and other.folder.resolve() == files.folder.resolve():
            raise UserError(step.of_itself(files.spec))
        if isinstance(step, TrainStep):
            step.check_teacher(other.config, other.spec)
            if step.by_token:
                check_tokens(other, files, step.otherwise, text if step.needs_calibration else None)
        model = skeleton(plain_config(other))
        replay(model, read_edits(other)[1])
        if isinstance(step, TrainStep) and text is not None and step.needs_calibration:
            require_positions("seq_len", text.tokens.shape[1], model, f"the teacher {other.spec}")
        anatomy = Anatomy(model)
        if isinstance(step, TrainStep) and step.predicts:
            check_predictions(anatomy, fronts[number], step.kind)
        step.check_pair(fronts[number], anatomy)
        values = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        passed = sum(matrices.passed for block in anatomy.blocks for matrices in block.matrices())
        head = math.prod(features(anatomy.head[1])) if anatomy.head is not None else 0
        others.append(Other(step, other, values, head + int(passed)))
    return others


def check_predictions(teacher: Anatomy, student: Anatomy, kind: str) -> None:
    """Refuse a teacher that predicts no tokens, or others at the same place than the student does.

    Args:
        kind: of the step that compares them.

    Raises:
        UserError: in one sentence.
    """
    name = type(teacher.model).__name__
    if teacher.head is None or teacher.model.config.is_encoder_decoder:
        raise UserError(
            f"{kind} compares distributions over tokens, and the teacher, a {name}, predicts none from one text: name "
            "a causal or masked language model."
        )
    its, own = ("causal" if one.is_decoder else "masked" for one in (teacher, student))
    if its != own:
        raise UserError(
            f"The teacher is a {its} language model ({name}), and the model a {own} one "
            f"({type(student.model).__name__}), which predict different tokens at the same place: name a {own} teacher."
        )


def check_tokens(
    teacher: ModelFiles, student: ModelFiles, otherwise: str = "", text: TextSample | None = None
) -> None:
    """Refuse a teacher to whom the student's token ids say something else.

    Vocabularies may be padded to different sizes behind the same tokens, as those of one family often are; and one may
    have tokens more, if the text is the same ids to both. Distributions are compared over the ids that both have.
    Models without a tokenizer are compared by the size alone.

    Args:
        otherwise: what a teacher with other tokens could do, for messages.
        text: what is learned from; None where that is not known by its tokens.

    Raises:
        UserError: in one sentence, with a token that differs.
    """
    if teacher.folder.resolve() == student.folder.resolve():
        return
    sizes = [files.config.get_text_config().vocab_size for files in (teacher, student)]
    its, own = _tokens(teacher), _tokens(student)
    if its is not None and own is not None and its != own:
        if text is None or not _agree(its, own):
            why = ""
        elif int(text.tokens.max()) >= min(sizes):
            why = f", and the text has a token beyond the {min(sizes)} of both"
        elif not _reads_alike(teacher, text):
            why = ", and the text is other ids to it"
        else:
            return
        token, number = min(own.items() - its.items() or its.items() - own.items(), key=lambda item: item[1])
        raise UserError(
            f"The teacher {teacher.spec} has other tokens than {student.spec} ({len(its)} and {len(own)}; token "
            f"{number}, {token!r}, is one that differs){why}: a teacher must have the same{otherwise}."
        )
    padded = its is not None and own is not None and len(own) <= min(sizes)
    if sizes[0] != sizes[1] and not padded:
        raise UserError(
            f"The teacher {teacher.spec} has a vocabulary of {sizes[0]} tokens and {student.spec} one of "
            f"{sizes[1]}: a teacher must have the same tokens{otherwise}."
        )


def _agree(one: dict[str, int], other: dict[str, int]) -> bool:
    """Whether no token has two ids, and no id two tokens."""
    every = one | other
    return other | one == every and len(set(every.values())) == len(every)


def _reads_alike(teacher: ModelFiles, text: TextSample) -> bool:
    """Whether the teacher's tokenizer makes the same windows of the text."""
    number, length = text.tokens.shape
    try:
        read = sample(text.spec, teacher.tokenizer(), number, length, text.seed, text.join)
    except UserError:  # too short a text, in its tokens
        return False
    return read.tokens.equal(text.tokens)


def _tokens(files: ModelFiles) -> dict[str, int] | None:
    try:
        vocabulary: dict[str, int] = files.tokenizer().get_vocab()
    except UserError:
        return None
    return vocabulary
