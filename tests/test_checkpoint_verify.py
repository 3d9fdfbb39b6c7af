"""Verification passes a good checkpoint and names what is wrong with a bad one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmslim.checkpoint import verify as verification
from llmslim.checkpoint.load import load_model
from llmslim.checkpoint.verify import verify, verify_in_fresh_process
from llmslim.quantization.rtn import RTN
from tests.checkpoints import make
from tests.tiny import save_tiny

STEP = RTN(bits=4, group_size=32, embeddings_bits=8)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    source = save_tiny("qwen2", root / "source")  # tied
    make(source, root / "good", STEP, "llmslim")
    return root / "good"


@pytest.fixture
def folder(good, tmp_path):
    """A copy to spoil."""
    shutil.copytree(good, tmp_path / "copy")
    return tmp_path / "copy"


def probe_of(good):
    return good.with_name("good-probe")


def spoil(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def failed(folder, good):
    report = verify(folder, probe_of(good))
    assert not report["ok"]
    return {check["check"]: check["detail"] for check in report["checks"] if not check["ok"]}


def test_a_good_checkpoint_passes_in_a_fresh_process(good):
    report = verify_in_fresh_process(good, probe_of(good))
    assert report["ok"], report
    assert report["max_error"] == 0.0
    assert [check["check"] for check in report["checks"]] == ["tensors", "streamed", "whole", "tokenizer"]


@pytest.mark.parametrize(("family", "form", "fields"), [
    ("t5", "gptq", {"bits": 4, "group_size": 32, "symmetric": False, "scale_dtype": "float16"}),
    ("mixtral", "auto", {"bits": 6, "group_size": 32}),
    ("gpt_neox", "compressed-tensors", {"bits": 8, "group_size": "channel"}),
])  # fmt: skip
def test_other_families_and_formats_pass(family, form, fields, tmp_path):
    make(save_tiny(family, tmp_path / "source"), tmp_path / "made", RTN(**fields), form)
    report = verify(tmp_path / "made", tmp_path / "made-probe")
    assert report["ok"] and report["max_error"] == 0.0, report


def test_a_bfloat16_checkpoint_is_its_own_rounding(tmp_path):
    make(
        save_tiny("llama", tmp_path / "source"),
        tmp_path / "made",
        RTN(bits=4, group_size=32),
        dtype=torch.bfloat16,
    )
    report = verify(tmp_path / "made", tmp_path / "made-probe")
    assert report["checks"][0]["ok"] and report["max_error"] == 0.0, report
    dense = load_file(tmp_path / "made" / "model.safetensors")["lm_head.weight"]
    assert dense.dtype == torch.bfloat16


def test_tied_packed_embeddings_are_stored_once(good):
    names = load_file(good / "model.safetensors")
    assert "model.embed_tokens.weight_packed" in names
    assert not any(name.startswith("lm_head") for name in names)
    assert json.loads((good / "config.json").read_text())["tie_word_embeddings"] is True


def test_missing_tensor_is_named(folder, good):
    spoil(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale"))
    assert (
        "lacks 1 tensors, such as model.layers.1.mlp.up_proj.weight_scale" in failed(folder, good)["tensors"]
    )


def test_extra_tensor_is_named(folder, good):
    spoil(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 64)}))
    assert "has unannounced 1 tensors, such as lm_head.weight" in failed(folder, good)["tensors"]


def test_wrong_type_is_named(folder, good):
    spoil(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].half()}))
    assert "model.norm.weight" in failed(folder, good)["tensors"]


def test_one_flipped_bit_is_found_where_it_is(folder, good):
    def flip(tensors):
        tensors["model.layers.1.mlp.up_proj.weight_packed"][3, 5] ^= 1

    spoil(folder, flip)
    assert "beginning at model.layers.1" in failed(folder, good)["streamed"]


def test_cut_off_file_fails(folder, good):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut off" in failed(folder, good)["tensors"]


def test_missing_tokenizer_files_are_named(folder, good):
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in failed(folder, good)


def told(probe, **settings):
    path = probe / "probe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_where_the_device_of_the_run_is_out_of_reach_other_kernels_are_forgiven(good, tmp_path):
    """The CPU computes what a GPU has computed: a tenth of the logits' scale may lie between, twice that scale not."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for by, ok in ((0.1, True), (2.0, False)):
        probe = tmp_path / str(by)
        shutil.copytree(probe_of(good), probe)
        told(probe, dtype="bfloat16")
        logits = load_file(probe / "logits.safetensors")["logits"]
        logits[..., 7] += by * logits.square().mean().sqrt()
        save_file({"logits": logits}, probe / "logits.safetensors")
        assert not verify(good, probe)["ok"]
        told(probe, device="cuda:0")
        report = verify(good, probe)
        assert report["ok"] is ok and "cuda:0 being out of reach" in report["checks"][1]["detail"], report


def test_the_probe_is_computed_where_the_run_was(good, tmp_path, monkeypatch):
    seen = []

    class Seen(verification.BlockStream):
        def __init__(self, model, device, dtype):
            seen.append(device)
            super().__init__(model, torch.device("cpu"), dtype)

    def load_here(files, dtype, device):
        seen.append(device)
        return load_model(files, dtype, torch.device("cpu"))

    monkeypatch.setattr(verification, "BlockStream", Seen)
    monkeypatch.setattr("llmslim.checkpoint.load.load_model", load_here)
    probe = tmp_path / "probe"
    shutil.copytree(probe_of(good), probe)
    told(probe, device="cpu:0")
    report = verify(good, probe)
    assert report["ok"] and seen == [torch.device("cpu:0")] * 2
