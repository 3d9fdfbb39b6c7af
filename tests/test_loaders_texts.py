"""Texts: names to rows, rows to tokens, tokens to windows."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmslim.errors import UserError
from llmslim.loaders.rows import iter_rows, load_rows
from llmslim.loaders.texts import (
    POOL_TOKENS,
    sample,
    tokenize_rows,
    window_edges,
    windows,
)

CORPUS = load_rows("builtin:calibration")


def bpe(bos: bool = False, split: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as of GPT-2; `split=False`: merges cross words, as in Llama 2 and Gemma."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    lines = [line for row in CORPUS[:8] for line in row.splitlines(keepends=True)]
    tokenizer.train_from_iterator(lines, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def wordpiece() -> PreTrainedTokenizerFast:
    """As of BERT: [CLS] text [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CORPUS[:8], trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe()


def hub_folder(folder: Path, files: dict[str, list[dict]]) -> Path:
    """A data set in the Hub's layout: `{"config/split": rows}` as parquet, and a README that names them."""
    configs: dict[str, list[str]] = {}
    for name, rows in files.items():
        config, split = name.split("/")
        (folder / config).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet")
        configs.setdefault(config, []).append(split)
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for s in splits for line in (f"  - split: {s}", f"    path: {config}/{s}-*")]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that would go to the network fails at once, here and in CI."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(spec: str) -> str:
    with pytest.raises(UserError) as error:
        load_rows(spec)
    return str(error.value)


def test_folder_in_hub_layout(tmp_path, offline):
    first, second, other = [{"text": " a \n"}, {"text": ""}], [{"text": "b"}], [{"text": "c"}]
    folder = hub_folder(tmp_path / "set", {"one/train": first, "one/test": second, "two/test": other})
    assert load_rows(f"{folder}:one:train") == [" a \n", ""]
    assert load_rows(f"{folder}:one:test") == ["b"]
    assert load_rows(f"{folder}:two") == ["c"]
    assert "one, two" in refused(str(folder))
    assert "train, test" in refused(f"{folder}:one")
    assert "'three'" in refused(f"{folder}:three:test")
    assert "'dev'" in refused(f"{folder}:one:dev")
    assert "too many colons" in refused(f"{folder}:one:test:x")


def test_bare_folder_with_one_choice(tmp_path, offline):
    folder = hub_folder(tmp_path / "set", {"only/validation": [{"id": 1, "sentence": "a"}]})
    assert load_rows(str(folder)) == ["a"]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "train.jsonl").write_text('{"text": "x", "n": 1}\n{"text": "y", "n": 2}\n')
    assert load_rows(str(plain)) == ["x", "y"]


@pytest.mark.parametrize("name", ["./missing/folder", "nobody/no-such-set", "nosuch"])
def test_name_that_is_nowhere(name, offline):
    assert name in refused(name)


def test_files(tmp_path):
    text, lines, table = (tmp_path / f"a.{suffix}" for suffix in ("txt", "jsonl", "parquet"))
    text.write_bytes("für\r\nzwei\n".encode())
    lines.write_text('{"n": 1, "body": "a"}\n\n{"n": 2, "body": null}\n')
    pq.write_table(pa.table({"title": ["t", "u"], "text": ["a", None]}), table)
    assert load_rows(str(text)) == ["für\nzwei\n"]
    assert load_rows(str(lines)) == ["a", ""]
    assert load_rows(str(table)) == ["a", ""]
    lines.write_bytes(b'{"text": null, "title": "no"}\n{"text": "a \xff", "title": "no"}\n')
    assert load_rows(str(lines)) == ["", "a \ufffd"]  # a null is no reason to read another column


def test_bad_files(tmp_path):
    two, broken, listed, fake = (tmp_path / n for n in ("two.jsonl", "bad.jsonl", "list.jsonl", "no.parquet"))
    two.write_text(json.dumps({"question": "a", "answer": "b", "n": 1}))
    broken.write_text('{"text": "a"}\n{"text": \n')
    listed.write_text("[1]\n")
    fake.write_text("text")
    assert "question, answer, n" in refused(str(two))
    assert "line 2" in refused(str(broken))
    assert "line 1" in refused(str(listed))
    listed.write_text('{"text": "a"}\n{"text": 5}\n')
    assert "row 2" in refused(str(listed)) and "5" in refused(str(listed))
    assert "not a parquet file" in refused(str(fake))
    assert "missing.txt" in refused(str(tmp_path / "missing.txt"))


def test_builtin_parts_are_disjoint_and_deterministic():
    parts = {part: load_rows(f"builtin:{part}") for part in ("calibration", "test")}
    paragraphs = {part: [p for row in rows for p in row.split("\n\n") if p] for part, rows in parts.items()}
    assert not set(paragraphs["calibration"]) & set(paragraphs["test"])
    assert all(sum(map(len, rows)) > 100_000 for rows in parts.values())
    assert load_rows("builtin") == parts["calibration"] == load_rows("builtin:calibration")
    assert load_rows("builtin", builtin_part="test") == parts["test"]
    assert "calibration, test and code" in refused("builtin:train")
    assert "def wrap(" in "".join(load_rows("builtin:code"))


def test_rows_are_joined_as_asked(tokenizer):
    rows = [" = Title = \n", "", "one two", "three"]

    def ids(text):
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    assert tokenize_rows(rows, tokenizer).tolist() == ids(" = Title = \none twothree")
    assert tokenize_rows(rows, tokenizer, join="\n\n").tolist() == ids("\n\n".join(rows))
    assert tokenize_rows([], tokenizer).tolist() == []
    assert tokenize_rows(rows, bpe(bos=True)).tolist() == ids("".join(rows))


@pytest.mark.parametrize("join", ["", "\n\n"])
@pytest.mark.parametrize(
    "make", [bpe, lambda: bpe(split=False), wordpiece], ids=["bpe", "unsplit", "wordpiece"]
)
def test_prefix_equals_prefix_of_the_whole(make, join):
    tokenizer, rows = make(), CORPUS[:12]
    whole = tokenize_rows(rows, tokenizer, join)
    for wanted in (0, 1, 511, 3000, len(whole) - 1, len(whole) + 1):
        assert torch.equal(tokenize_rows(rows, tokenizer, join, wanted), whole[:wanted])
    assert torch.equal(tokenize_rows([join.join(rows)], tokenizer, join, 3000), whole[:3000])
    assert len(whole) > 10_000


def test_prefix_where_one_token_holds_many_characters():
    """The first guess of how much text to read is too little; asking again must still give the prefix."""
    spaces = [" " * 30 + "word\n"] * 5000
    tokenizer = wordpiece()
    whole = tokenize_rows(spaces, tokenizer)
    assert torch.equal(tokenize_rows(spaces, tokenizer, max_tokens=3000), whole[:3000])
    assert len(whole) > 3000


def test_prefix_does_not_feel_the_cut():
    """The text read for n tokens may end within a word; that word must not be among the n."""
    vocab = {"[UNK]": 0, "abcdefgh": 1, "abcde": 2}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    text = "abcdefgh " + "abcde " * 4000  # six characters a token but the first: 6 n of them end in word n
    expected = torch.tensor([1] + [2] * 4000)
    for wanted in range(2, 1500, 10):
        assert torch.equal(tokenize_rows([text], tokenizer, max_tokens=wanted), expected[:wanted])


def test_prefix_reads_no_more_than_it_needs(tokenizer):
    read = []

    def rows():
        for row in CORPUS * 100:
            read.append(len(row))
            yield row

    assert len(tokenize_rows(rows(), tokenizer, max_tokens=1000)) == 1000
    assert sum(read) < 30_000


def test_windows_follow_each_other():
    tokens = torch.arange(1000, 1103)
    assert windows(tokens, 10, 3).tolist() == torch.arange(1000, 1030).view(3, 10).tolist()
    assert windows(tokens, 10, 2, bos=1).tolist() == [[1, *range(1000, 1009)], [1, *range(1009, 1018)]]
    assert windows(tokens, 10, 2, bos=1, eos=2)[1].tolist() == [1, *range(1008, 1016), 2]
    assert windows(tokens, 10, 10).shape == (10, 10)


def test_seeded_windows_are_a_choice_without_replacement():
    tokens = torch.arange(1003)
    chosen = windows(tokens, 10, 30, seed=3)
    starts = chosen[:, 0]
    assert torch.equal(chosen, starts[:, None] + torch.arange(10))
    assert (starts % 10 == 0).all() and (starts.diff() > 0).all()
    assert torch.equal(chosen, windows(tokens, 10, 30, seed=3))
    assert not torch.equal(chosen, windows(tokens, 10, 30, seed=4))
    assert torch.equal(windows(tokens, 10, 100, seed=0), windows(tokens, 10, 100))


def test_too_short_text_says_what_would_work():
    tokens = torch.arange(100)
    with pytest.raises(UserError) as error:
        windows(tokens, 30, 4, bos=1, spec="my.txt")
    message = str(error.value)
    assert "'my.txt' has 100 tokens, so 3 full windows of 30 tokens, and 4 were asked for" in message
    assert windows(tokens, 30, int(re.search(r"at most (\d+) windows", message)[1]), bos=1).shape == (3, 30)
    assert windows(tokens, int(re.search(r"at most (\d+) tokens", message)[1]), 4, bos=1).shape == (4, 26)
    with pytest.raises(UserError, match="is empty: give a text of at least 40 tokens"):
        windows(tokens[:0], 10, 4)
    with pytest.raises(UserError, match="at least 3"):
        windows(tokens, 2, 1, bos=0, eos=1)
    with pytest.raises(UserError, match="at least 1"):
        windows(tokens, 10, 0)


def test_edges_are_the_tokenizers_own(tokenizer):
    assert window_edges(tokenizer) == (None, None)
    assert window_edges(bpe(bos=True)) == (0, None)
    assert window_edges(wordpiece()) == (1, 2)


def test_sample_of_a_file(tmp_path, tokenizer):
    path = tmp_path / "prose.txt"
    path.write_text("".join(CORPUS))
    taken = sample(str(path), tokenizer, 4, 64)
    assert torch.equal(taken.tokens, tokenize_rows(CORPUS, tokenizer)[:256].view(4, 64))
    assert taken.data_hash == sample("builtin", tokenizer, 4, 64).data_hash
    assert taken.data_hash != sample("builtin:test", tokenizer, 4, 64).data_hash
    assert "4 windows of 64 tokens, stride 64" in taken.protocol and "no BOS" in taken.protocol
    everything = tokenize_rows(CORPUS, tokenizer, max_tokens=POOL_TOKENS)
    seeded = sample(str(path), tokenizer, 4, 64, seed=1)
    assert torch.equal(seeded.tokens, windows(everything, 64, 4, seed=1))
    assert "seed 1" in seeded.protocol
    with pytest.raises(UserError, match="prose.txt"):
        sample(str(path), tokenizer, 10_000, 64)


def test_sample_with_bos_and_for_an_encoder():
    taken = sample("builtin", bpe(bos=True), 3, 32)
    assert taken.bos == 0 and taken.tokens.shape == (3, 32) and (taken.tokens[:, 0] == 0).all()
    assert torch.equal(taken.tokens[:, 1:].flatten(), tokenize_rows(CORPUS, bpe(), max_tokens=93))
    encoded = sample("builtin", wordpiece(), 2, 16).tokens
    assert (encoded[:, 0] == 1).all() and (encoded[:, -1] == 2).all() and not (encoded[:, 1:-1] == 1).any()


def test_iter_rows_is_lazy(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\nnot json\n')
    rows = iter_rows(str(path))
    assert next(rows) == "a"
    with pytest.raises(UserError, match="line 2"):
        next(rows)
