"""Classification heads: whether a model has the one that a task needs, and a fresh one where it has not."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, cast

from llmslim.errors import UserError
from llmslim.loaders.glue import TASKS, Reading, Task, pad_token

if TYPE_CHECKING:
    import transformers
    from torch import Tensor

    from llmslim.loaders.models import ModelFiles


def classifier_class(config: transformers.PreTrainedConfig) -> type[transformers.PreTrainedModel]:
    """The family's class with a head that classifies sequences."""
    import transformers

    mapping = transformers.AutoModelForSequenceClassification._model_mapping
    if config.is_encoder_decoder:
        raise UserError(
            f"{config.model_type!r} is an encoder-decoder, which llmslim makes no classifier of: use an encoder or a "
            "decoder."
        )
    if type(config) not in mapping:
        raise UserError(
            f"transformers has no class of {config.model_type!r} that classifies a text: use a family that "
            "AutoModelForSequenceClassification knows, encoder or decoder."
        )
    return cast("type[transformers.PreTrainedModel]", mapping[type(config)])


def classifies(config: transformers.PreTrainedConfig, task: Task) -> bool:
    """Whether a model of that config has a head with the labels of the task.

    Names that the config gives no task of GLUE (LABEL_0, or a model's own) count as this one's, in their order.
    """
    import transformers

    from llmslim.loaders.models import model_class

    mapping = transformers.AutoModelForSequenceClassification._model_mapping
    known = type(config) in mapping and model_class(config) is mapping[type(config)]
    return known and config.num_labels == task.num_labels and not _other_task(config, task)


def _other_task(config: transformers.PreTrainedConfig, task: Task) -> str:
    """The labels of the head, where they are those of another task; else empty."""
    names = _label_names(config)
    if set(names) == set(task.labels) or not any(set(names) == set(other.labels) for other in TASKS.values()):
        return ""
    return ", ".join(names)


def _label_names(config: transformers.PreTrainedConfig) -> dict[str, int]:
    """The outputs of a head by name, in lower case."""
    return {str(name).lower(): int(index) for index, name in (config.id2label or {}).items()}


def require_head(config: transformers.PreTrainedConfig, task: Task, spec: str) -> None:
    """Refuse a model without a head for the task."""
    from llmslim.loaders.models import model_class

    if classifies(config, task):
        return
    name = model_class(config).__name__
    has = f"{name} has one of {config.num_labels}" if "Classification" in name else f"{name} has none"
    labels = f"{task.num_labels} label{'s' * (task.num_labels > 1)}"
    other = _other_task(config, task)
    if other and config.num_labels == task.num_labels:
        has, labels = f"that of {name} tells {other}", f"{labels} ({', '.join(task.labels)})"
    raise UserError(
        f"{spec} cannot be scored on {task.name}: that needs a classification head of {labels}, and {has}; "
        "`llmslim finetune` makes one."
    )


def label_columns(config: transformers.PreTrainedConfig, task: Task) -> list[int]:
    """For each label of the task, the output of the head that stands for it: by name, else in the same order."""
    names = _label_names(config)
    if set(names) != set(task.labels):
        return list(range(task.num_labels))
    return [names[label] for label in task.labels]


def replaced_head(before: transformers.PreTrainedConfig, after: transformers.PreTrainedConfig) -> str:
    """In words, what a fresh head takes the place of; empty when there was none."""
    from llmslim.loaders.models import model_class

    if "Classification" not in model_class(before).__name__:
        return ""
    labels = ", ".join(map(str, (after.id2label or {}).values()))
    others = ", ".join(map(str, (before.id2label or {}).values()))
    return (
        f"a fresh classification head ({labels}) in the place of one of {before.num_labels} labels ({others})"
    )


def reading(model: transformers.PreTrainedModel, tokenizer: Any) -> Reading:
    """How a model takes the sentences that its tokenizer reads; its config gets what fills up a batch.

    A decoder finds the last token of a text by that.
    """
    taken = inspect.signature(model.forward).parameters
    pad = model.config.pad_token_id = pad_token(model.config, tokenizer)
    return Reading(tokenizer, [name for name in tokenizer.model_input_names if name in taken], pad)


def positions(model: transformers.PreTrainedModel) -> int | None:
    """Tokens that a model can take; None where nothing limits them.

    RoBERTa and its kin count positions from behind the id of the padding token.
    """
    limit: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if limit > 0 and name.endswith("position_embeddings") and padding is not None:
            return limit - int(padding) - 1
    return limit if limit > 0 else None


def require_positions(what: str, length: int, model: transformers.PreTrainedModel, spec: str) -> None:
    """Refuse more tokens than a model can take.

    Args:
        what: the option that gave the length.
        spec: the model, in words.
    """
    limit = positions(model)
    if limit and length > limit:
        raise UserError(f"{what} {length} is more than the {limit} positions of {spec}; use at most {limit}.")


def require_vocabulary(tokens: Tensor, model: transformers.PreTrainedModel, spec: str) -> None:
    """Refuse token ids that a model has no embedding for."""
    size = cast("int", model.get_input_embeddings().num_embeddings)
    if int(tokens.max()) >= size:
        raise UserError(
            f"The tokenizer of {spec} gives token {int(tokens.max())}, and the model has embeddings for {size}: it is "
            "another model's, or tokens were added to it alone; put the model's own beside it."
        )


def headed_config(files: ModelFiles, task: Task) -> transformers.PreTrainedConfig:
    """The config of the model with a head for the task.

    Raises:
        UserError: its family has no such head, or its weights are no longer those of a plain model.
    """
    cls = classifier_class(files.config)
    if getattr(files.config, "quantization_config", None) is not None:
        raise UserError(
            f"{files.spec} has no classification head for {task.name}, and a compressed checkpoint cannot be given "
            "one: fine-tune the uncompressed model, and compress that."
        )
    config = copy.deepcopy(files.config)
    config.architectures = [cls.__name__]
    config.num_labels = task.num_labels
    config.id2label = dict(enumerate(task.labels or ("score",)))
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = "single_label_classification" if task.labels else "regression"
    config.pad_token_id = pad_token(config, files.tokenizer())  # decoders find the last token of a text by it
    return config
