"""What loaders settle before a model is read: converted GGUF files, and the type to compute in."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmslim import cpu
from llmslim.checkpoint.load import load
from llmslim.cpu import fast_bfloat16
from llmslim.errors import UserError
from llmslim.inspection import inspect
from llmslim.loaders import gguf
from llmslim.loaders.models import compute_dtype, find
from tests.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")


def seconds(a: torch.Tensor) -> float:
    begun = time.perf_counter()
    for _ in range(20):
        a @ a
    return time.perf_counter() - begun


def test_products_are_of_the_type_that_is_quicker_here() -> None:
    a = torch.randn(384, 384)
    ratio = min(seconds(a.bfloat16()) for _ in range(4)) / min(seconds(a) for _ in range(4))
    if 0.8 < ratio < 1.25:
        pytest.skip("both take the same time on this machine")
    assert (compute_dtype(CPU, stored=torch.bfloat16) == torch.bfloat16) is (ratio < 1)
    assert compute_dtype(CPU, stored=torch.float32) == torch.float32


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_the_quicker_type_is_found_inside_autocast_too(
    slow: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    class Counted(torch.Tensor):
        def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
            nonlocal now
            product = torch.Tensor.__matmul__(self, other)
            now += 2.0 if product.dtype == slow else 1.0
            return product

    ones = torch.ones(2, 2).as_subclass(Counted)
    monkeypatch.setattr(cpu.torch, "ones", lambda *size, **how: ones)
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now)
    monkeypatch.setenv(cpu.ANSWER, "")
    fast_bfloat16.cache_clear()
    try:
        with torch.autocast("cpu"):
            assert fast_bfloat16() is (slow == torch.float32)
        assert os.environ[cpu.ANSWER] == str(int(slow == torch.float32))  # for processes that this one starts
    finally:
        fast_bfloat16.cache_clear()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_code_beside_a_model_is_never_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks whether to run it; a pipe that says yes must not be heard."""
    folder, ran = save_tiny("llama", tmp_path / "model"), tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Tok: pass\n"
    )
    told = json.loads((folder / name).read_text())
    own = {"AutoTokenizer": ["evil.Tok", None], "AutoConfig": "evil.Tok"}
    told |= {"auto_map": own, "tokenizer_class": "Tok", "model_type": "own"}
    (folder / name).write_text(json.dumps(told))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match="llmslim runs none but transformers' own"):
        find(str(folder)).tokenizer()
    assert not ran.exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"hidden_act": "loud"}, r"config.json describes no LlamaForCausalLM that can be built \(KeyError: 'loud'\)"),
    ({"rope_parameters": {"rope_type": "no", "rope_theta": 1e4}}, "KeyError: 'no'"),
    ({"architectures": ["GPT2LMHeadModel"]}, "no GPT2LMHeadModel that can be built"),
    ({"architectures": 5}, "architectures are 5, and they are a list of names"),
    ({"architectures": [["x"]]}, "architectures are .*, and they are a list of names"),
    ({"num_key_value_heads": 0}, "ZeroDivisionError"),
    ({"pad_token_id": 100_000}, "Padding_idx must be within"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, and it takes at least 1"),
    ({"vocab_size": 0}, "vocab_size is 0, and it takes at least 1"),
    ({"hidden_size": 0}, "hidden_size is 0, and it takes at least 1"),
    ({"dtype": "int8"}, "dtype is 'int8', and models compute in"),
    ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn', and models compute in"),
    ({"quantization_config": {"quant_method": ["x"]}}, r"quantized with \['x'\], which is no name of a method"),
    ({"quantization_config": {"quant_method": "llmslim", "format_version": 1, "edits": [{"edit": ["x"]}]}},
     r"unknown edit \['x'\]"),
])  # fmt: skip
def test_a_config_that_describes_no_model_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = save_tiny("llama", tmp_path)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | change))
    for work in (load, inspect):
        with pytest.raises(UserError, match=said):
            work(str(folder))


def test_a_config_whose_weights_transformers_alone_reads_is_refused_too(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    told = json.loads((folder / "config.json").read_text())
    told |= {"hidden_act": "loud", "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="KeyError: 'loud'"):
        load(str(folder))


def test_of_two_conversions_at_once_the_second_finds_the_first_ones(tmp_path: Path) -> None:
    made, folder = tmp_path / "made", tmp_path / "folder"
    for place, text in ((made, "mine"), (folder, "theirs")):
        place.mkdir()
        (place / "config.json").write_text(text)
    gguf.move(made, folder)
    assert (folder / "config.json").read_text() == "theirs" and not made.exists()


def test_a_conversion_names_the_extra_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("LLMSLIM_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gguf: pip install 'llmslim\[gguf\]'"):
        find(str(tmp_path / "model.gguf"))


def test_a_conversion_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter(range(0, 600, 4))
    assert [*gguf.telling("converting", "abcdefgh", lambda: next(now))] == list("abcdefgh")
    assert capsys.readouterr().out.splitlines() == [f"converting: {done}/8" for done in (2, 5)]


def test_what_killed_conversions_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    alive = os.getppid()
    folders = {process: tmp_path / f"model-1.partial-{process}" for process in (dead.pid, alive, os.getpid())}
    for folder in folders.values():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    gguf._clear(tmp_path / "model-1")
    assert all(folder.exists() for folder in folders.values())  # a moment old: perhaps of another machine
    for folder in folders.values():
        for path in (folder / "model.safetensors", folder):
            os.utime(path, (0, 0))
    gguf._clear(tmp_path / "model-1")
    assert list(tmp_path.iterdir()) == [folders[alive]]


def test_what_cannot_take_its_place_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    made, folder = tmp_path / "made", tmp_path / "folder"
    made.mkdir()
    folder.write_text("a file of the user's")
    with pytest.raises(OSError, match="folder"):
        gguf.move(made, folder)
    assert folder.read_text() == "a file of the user's" and not made.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_config_without_a_type_has_that_of_its_files(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("llama").to(dtype).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert find(str(tmp_path)).dtype == dtype


def test_a_revision_is_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--revision v1 is of a model of the Hub, and .* is here"):
        find(str(save_tiny("llama", tmp_path)), "v1")
