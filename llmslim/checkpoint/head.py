"""A plain checkpoint with a fresh head, for a run that needs one which the model has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmslim.checkpoint.writer import copy_metadata
from llmslim.loaders.models import ModelFiles, model_class


def write_headed(files: ModelFiles, seed: int, folder: Path) -> None:
    """Write a model with a fresh head; the same seed gives the same head.

    Args:
        files: their config names the class with the head, and the folder holds the weights without.
    """
    files.weights  # noqa: B018  refuses folders without safetensors
    cls: Any = model_class(files.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls.from_pretrained(
            files.folder,
            config=files.config,
            dtype=files.dtype,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
    copy_metadata(files.folder, folder)
    model.save_pretrained(folder)
    tokenizer = files.tokenizer()
    if tokenizer.pad_token_id is None:  # else whoever loads the classifier cannot batch texts
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(files.config.pad_token_id)
        tokenizer.save_pretrained(folder)
