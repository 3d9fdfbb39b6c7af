"""The sensitivity report against what masking shows, and `inspect --sensitivity`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmslim import cli
from llmslim.inspection import sensitivity
from llmslim.loaders.models import find
from llmslim.loaders.texts import sample
from llmslim.recipe import Calibration
from tests.tiny import save_tiny, tiny_model

TEXT = Calibration(num_samples=4, seq_len=32)
WORDS = ["--num-samples", "2", "--seq-len", "32"]


def attention_outputs(
    folder: Path, name: str, tokens: Tensor, without: slice | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of one o_proj of a tiny llama, with some of its inputs masked, and the hidden states."""
    model = tiny_model("llama")
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    seen: list[Tensor] = []
    linear = model.get_submodule(name)

    def mask(module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        if without is not None:
            x[..., without] = 0
        return (x,)

    linear.register_forward_pre_hook(mask)
    linear.register_forward_hook(lambda module, args, output: seen.append(output.double()))
    with torch.no_grad():
        hidden = model.eval()(tokens, output_hidden_states=True).hidden_states
    return seen[0], torch.stack(hidden)


def test_losses_of_heads_are_what_masking_loses(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    found = sensitivity(str(folder), TEXT)
    tokens = sample(TEXT.text, find(str(folder)).tokenizer(), TEXT.num_samples, TEXT.seq_len, 0).tokens
    row = found["blocks"][0]
    name, heads = row["heads"][0]["name"], row["heads"][0]["lost"]
    whole, hidden = attention_outputs(folder, name, tokens)
    width = tiny_model("llama").get_submodule(name).in_features // len(heads)
    for head, lost in enumerate(heads):
        masked, _ = attention_outputs(folder, name, tokens, slice(head * width, (head + 1) * width))
        assert lost == pytest.approx(float((whole - masked).square().sum() / whole.square().sum()), rel=1e-3)
    cosine = torch.cosine_similarity(hidden[0].float(), hidden[1].float(), dim=-1).mean()
    assert row["influence"] == pytest.approx(float(1 - cosine), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "mixtral", "gpt2"])
def test_every_kind_of_model_is_measured(family: str, tmp_path: Path) -> None:
    """More channels cost more, and a refit never costs."""
    folder = save_tiny(family, tmp_path / family)
    for row in sensitivity(str(folder), TEXT)["blocks"]:
        assert row["influence"] > 0 and row["heads"] and row["channels"]
        for one in row["channels"]:
            assert one["lost"] == sorted(one["lost"]) and one["refitted"] == sorted(one["refitted"])
        for one in (*row["heads"], *row["channels"]):
            assert all(0 <= r <= 1.01 * lost for lost, r in zip(one["lost"], one["refitted"], strict=True))


def test_inspect_shows_and_saves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    out = tmp_path / "out"
    assert cli.main(["inspect", str(folder), "--sensitivity", *WORDS, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "influence" in shown and "model.layers.1" in shown and "channels" in shown
    kept = json.loads((out / "sensitivity.json").read_text())
    assert len(kept["blocks"]) == 3 and kept["calibration"]["data_hash"]
    assert (out / "sensitivity.svg").read_text().lstrip().startswith("<?xml")
    assert cli.main(["inspect", str(folder), "--sensitivity", *WORDS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == kept["blocks"]
    assert cli.main(["inspect", str(folder), "--sensitivity", *WORDS, "--output", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num-samples", "2"], "--num-samples is an option of --sensitivity"),
        (["--output", "x"], "--output is an option of --sensitivity"),
        (["--sensitivity", "--seq-len", "1"], "seq_len"),
        (["--sensitivity", "--calibration", "./nothing.txt"], "nothing.txt"),
    ],
)
def test_bad_input(words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    assert cli.main(["inspect", str(folder), *words]) == 2
    assert told in capsys.readouterr().err
