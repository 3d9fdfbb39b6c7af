"""Answers to benchmark questions in a file, so that what was asked once, or before a kill, is not asked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmslim.loaders.digest import sha256_of


class Kept:
    """Answers of one model, a line of JSON each: a digest of the question, and the answer. For lm-eval's `cache_hook`.

    lm-eval's own cache is pickled, which llmslim neither writes nor reads. A last line that was cut off counts for
    nothing. What is drawn at random is asked anew.

    Args:
        path: is made when the first answer comes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.answers = path, {}
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            path.write_text("".join(whole), "utf-8")
        self.answers = dict(json.loads(line) for line in whole)

    def add_partial(self, kind: str, question: Any, answer: Any) -> None:
        """Called by lm-eval with every answer as it comes."""
        key = _key(kind, question)
        if key in self.answers:
            return
        self.answers[key] = answer
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, answer]) + "\n")

    def asked(self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Answers to requests (lm-eval's, with `args`), of which those that are not here are asked."""
        if kind == "generate_until" and any(request.args[1].get("do_sample") for request in requests):
            return ask(list(requests))
        keys = [_key(kind, request.args) for request in requests]
        new = [request for key, request in zip(keys, requests, strict=True) if key not in self.answers]
        for request, answer in zip(new, ask(new) if new else [], strict=True):
            self.add_partial(kind, request.args, answer)
        found = [self.answers[key] for key in keys]
        return [tuple(answer) if isinstance(answer, list) else answer for answer in found]


def kept_in(folder: Path, model: Path, adapter: str | None, *how: object) -> Kept:
    """The answers of a model in a folder: of its files as they are, asked in such a way (type, cache, ...).

    Args:
        adapter: folder of one, whose files count too.
    """
    digest = hashlib.sha256(json.dumps([adapter is not None, *how], default=str).encode())
    read = [*model.glob("*.safetensors"), *model.glob("*.json"), *model.glob("kv_cache/*")]
    for path in [*sorted(read), *(sorted(Path(adapter).expanduser().glob("adapter_*")) if adapter else [])]:
        if path.name != "report.json":
            digest.update(f"{path.name} {sha256_of(path)}".encode())
    return Kept(folder / f"answers-{digest.hexdigest()[:24]}.jsonl")


def _key(kind: str, question: Any) -> str:
    return hashlib.sha256(json.dumps([kind, question], default=str).encode()).hexdigest()[:32]
