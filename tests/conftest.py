"""What tests of several rooms share."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
from torch import Tensor

from llmslim.loaders import texts

# as the command line sets it, which is too late where a test has imported datasets before
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

texts.POOL_TOKENS = 10_000  # a quarter of the suite's time went into tokens that no tiny model was shown
os.fsync = lambda fd: None  # a tenth: nothing here outlives the machine

_encode, _encoded = texts._encode, dict[tuple[str, str], Tensor]()


def _encoded_once(text: str, tokenizer: Any) -> Tensor:
    """Another tenth: hundreds of tests read the same text by the same tokenizer."""
    key = text, tokenizer.backend_tokenizer.to_str()
    if key not in _encoded:
        _encoded[key] = _encode(text, tokenizer)
    return _encoded[key].clone()


texts._encode = _encoded_once


def pytest_collection_finish() -> None:
    """Modules, which stay, are no longer looked through for garbage: that was a third of the time of training tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws at random does not hang on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification in this process; tests/test_checkpoint_verify.py has it in a fresh one."""
    from llmslim import pipeline
    from llmslim.checkpoint.verify import verify

    monkeypatch.setattr(pipeline, "verify_in_fresh_process", verify)
