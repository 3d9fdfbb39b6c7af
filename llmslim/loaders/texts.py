"""From a text to the windows of tokens that calibration and evaluation run on.

Calibration and evaluation take their samples here, so a figure's protocol has one place: rows joined
into one text, tokenized once without special tokens, cut into full windows that do not overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from llmslim.errors import UserError
from llmslim.loaders.rows import BuiltinPart, iter_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextSample", "sample", "tokenize_rows", "window_edges", "windows"]

MARGIN = 256  # tokens: how far before a cut in the text its tokens may still feel the cut (a word or two)
POOL_TOKENS = (
    1_000_000  # a seeded choice is made among the windows of so many tokens; WikiText-2 test has 0.3 M
)


@dataclass(frozen=True)
class TextSample:
    """Windows of tokens, and how they were made.

    tokens: [num, seq_len], int64. spec: the text's name. join: what stands between two rows. bos, eos: the
    tokens that each window starts and ends with, where the tokenizer adds them. seed: None for the first
    windows of the text, else that of the choice.
    """

    tokens: torch.Tensor
    spec: str = "tokens"
    join: str = ""
    bos: int | None = None
    eos: int | None = None
    seed: int | None = None

    @property
    def data_hash(self) -> str:
        """SHA-256 of the token numbers (int64, row by row): equal hashes mean the same sample."""
        return hashlib.sha256(self.tokens.contiguous().numpy().tobytes()).hexdigest()

    @property
    def protocol(self) -> str:
        """One line to stand beside a figure."""
        num, seq_len = self.tokens.shape
        choice = "the first of the text" if self.seed is None else f"chosen with seed {self.seed}"
        rows = f"joined by {self.join!r}" if self.join else "concatenated as they are"
        edges = f"{'no BOS' if self.bos is None else f'each starts with token {self.bos}'}" + (
            "" if self.eos is None else f" and ends with token {self.eos}"
        )
        cut = f"{num} windows of {seq_len} tokens, stride {seq_len}, {choice}"
        return f"{self.spec}: {cut}; rows {rows}; {edges}"


def sample(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_len: int,
    seed: int | None = None,
    join: str = "",
    builtin_part: BuiltinPart = "calibration",
) -> TextSample:
    """`num_samples` windows of `seq_len` tokens of the text `spec` (see `rows.iter_rows`).

    Each window has the special tokens that the tokenizer puts around a text: BOS for a model that expects
    it, [CLS] and [SEP] for an encoder, nothing for GPT-2 or SmolLM2. With a seed, the windows are chosen
    among those of the first `POOL_TOKENS` tokens. Too short a text raises `UserError`.
    """
    bos, eos = window_edges(tokenizer)
    needed = num_samples * max(_body(seq_len, bos, eos), 1)
    max_tokens = needed if seed is None else max(needed, POOL_TOKENS)
    tokens = tokenize_rows(iter_rows(spec, builtin_part), tokenizer, join, max_tokens)
    chosen = windows(tokens, seq_len, num_samples, bos=bos, eos=eos, seed=seed, spec=spec)
    return TextSample(chosen, spec, join, bos, eos, seed)


def tokenize_rows(
    rows: Iterable[str], tokenizer: PreTrainedTokenizerBase, join: str = "", max_tokens: int | None = None
) -> torch.Tensor:
    """Token numbers [n], int64, of the rows as one text, without special tokens.

    join: "" leaves the rows as they are (WikiText's rows bring their line ends); a blank line, as in the
    GPTQ papers, is `"\\n\\n"`. max_tokens: the same tokens, but only the first so many, and reading and
    tokenizing only as much of the text as that takes.
    """
    pieces = _joined(rows, join)
    if max_tokens is None:
        return _encode("".join(pieces), tokenizer)
    text, wanted = "", 6 * (max_tokens + MARGIN)  # characters; prose has 4 to 5 in a token
    while True:
        text = _extend(text, pieces, wanted)
        tokens = _encode(text[:wanted], tokenizer)
        if len(tokens) >= max_tokens + MARGIN or len(text) < wanted:
            return tokens[:max_tokens]
        wanted *= 2


def _joined(rows: Iterable[str], join: str) -> Iterator[str]:
    rows = iter(rows)
    first = next(rows, "")
    return chain([first], (join + row for row in rows))


def _extend(text: str, pieces: Iterator[str], length: int) -> str:
    """`text` with as many of the pieces added as bring it to `length` characters."""
    parts, size = [text], len(text)
    while size < length and (piece := next(pieces, None)) is not None:
        parts.append(piece)
        size += len(piece)
    return "".join(parts)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    # verbose=False: one text of many windows is no mistake, and transformers would warn that it is too long
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def windows(
    tokens: torch.Tensor,
    seq_len: int,
    num: int,
    *,
    bos: int | None = None,
    eos: int | None = None,
    seed: int | None = None,
    spec: str = "the text",
) -> torch.Tensor:
    """Cut tokens [n] into full windows that follow each other without overlap; `num` of them: [num, seq_len].

    bos and eos, where given, stand at the ends of every window and count in its `seq_len`. seed None takes
    the first `num`; a seed draws `num` different ones, kept in the text's order. spec names the text in
    the error that a too short one raises.
    """
    if num < 1:
        raise UserError(f"{num} windows were asked for: it takes at least 1")
    body = _body(seq_len, bos, eos)
    if body < 1 or seq_len < 2:
        least = max(2, seq_len - body + 1)
        raise UserError(f"a window of {seq_len} tokens predicts nothing: it takes at least {least}")
    count = len(tokens) // body
    if count < num:
        raise UserError(_too_short(spec, len(tokens), count, num, seq_len, seq_len - body))
    chosen = torch.arange(num)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        chosen = order[:num].sort().values
    cut = tokens[: count * body].view(count, body)[chosen]
    edges = [cut.new_full((num, 1), edge) if edge is not None else cut[:, :0] for edge in (bos, eos)]
    return torch.cat([edges[0], cut, edges[1]], dim=1)


def _body(seq_len: int, bos: int | None, eos: int | None) -> int:
    """How many tokens of the text a window holds."""
    return seq_len - (bos is not None) - (eos is not None)


def _too_short(spec: str, length: int, count: int, num: int, seq_len: int, edges: int) -> str:
    if length == 0:
        return f"{spec!r} is empty: give a text of at least {num * (seq_len - edges)} tokens"
    ways = [f"at most {count} windows"] if count else []
    if length // num >= 1 and length // num + edges >= 2:
        ways.append(f"windows of at most {length // num + edges} tokens")
    return (
        f"{spec!r} has {length} tokens, so {count} full windows of {seq_len} tokens, and {num} were asked "
        f"for: ask for {' or '.join([*ways, 'a longer text'])}"
    )


def window_edges(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The special tokens that the tokenizer puts before and after a text: (bos or [CLS], eos or [SEP])."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    before, after = full[:start], full[start + len(bare) :]
    return (before[-1] if before else None), (after[0] if after else None)
