"""Loading and saving again: the reader's parts, from_pretrained's options, and save_pretrained."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import llmslim.plugin  # noqa: F401
from llmslim.anatomy import Anatomy
from llmslim.checkpoint import writer
from llmslim.checkpoint.formats import compact_modules, formats
from llmslim.checkpoint.head import write_headed
from llmslim.checkpoint.load import load
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.errors import UserError
from llmslim.loaders.models import find
from llmslim.prepare import prepare
from llmslim.quantization.packed import PackedEmbedding, PackedLinear
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Recipe
from tests.checkpoints import inputs_of, logits_of, make
from tests.tiny import save_tiny, tiny_model

STEPS = {
    "llmslim": RTN(bits=3, group_size=32, symmetric=False, embeddings_bits=8),
    "compressed-tensors": RTN(bits=4, group_size=32),
    "gptq": RTN(bits=4, group_size=32, scale_dtype="float16"),
}


@pytest.fixture(scope="module", params=STEPS)
def made(request, tmp_path_factory):
    """A checkpoint of a tied model in each format, with the logits of the model in memory."""
    root = tmp_path_factory.mktemp(request.param)
    model = make(save_tiny("qwen2", root / "source"), root / "made", STEPS[request.param], request.param)
    return root / "made", logits_of(model)


def test_saving_a_loaded_model_gives_the_same_bytes_and_config(made, tmp_path):
    folder, _ = made
    model, _ = load(str(folder), dtype="auto")
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path)]
    assert configs[0] == configs[1]


def test_weights_are_packed_once_and_ties_are_kept(made):
    folder, logits = made
    model, tokenizer = load(str(folder), dtype=torch.float32)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) >= 21
    assert not model.training and tokenizer.chat_template
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, PackedEmbedding):
        assert head.weight_packed is table.weight_packed and head.weight_scale is table.weight_scale
    else:
        assert head.weight is table.weight
    assert torch.equal(logits_of(model), logits)


def test_base_model_alone_loads_from_a_checkpoint_with_a_head(made):
    folder, _ = made
    if json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] != "llmslim":
        pytest.skip("for llmslim's own format")
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto")
    inputs = inputs_of(whole)
    assert isinstance(base.layers[0].self_attn.q_proj, PackedLinear)
    with torch.no_grad():
        assert torch.equal(base(**inputs)[0], whole.model(**inputs)[0])


def test_a_dense_folder_loads_as_it_is(tmp_path):
    save_tiny("llama", tmp_path)
    model, _ = load(str(tmp_path), dtype=torch.float32)
    assert torch.equal(logits_of(model), logits_of(tiny_model("llama")))


def test_pickles_are_never_loaded(tmp_path):
    """transformers takes pytorch_model.bin where no file of safetensors has the name that it looks for."""
    save_tiny("llama", tmp_path)
    torch.save(tiny_model("llama", seed=1).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").rename(tmp_path / "decoy.safetensors")
    files = find(str(tmp_path))
    for read in (lambda: load(str(tmp_path)), lambda: write_headed(files, 0, tmp_path / "headed")):
        with pytest.raises(UserError, match="pytorch_model.bin: llmslim reads no pickle files"):
            read()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "pytorch_model.bin"}}))
    with pytest.raises(UserError, match="does not name safetensors files"):
        load(str(tmp_path))


def test_a_config_names_no_weight_file(tmp_path):
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    model, _ = load(str(tmp_path), dtype=torch.float32)
    assert torch.equal(logits_of(model), logits_of(tiny_model("llama")))


def test_an_adapter_among_the_files_of_the_model_is_refused(tmp_path):
    """transformers would put it into the model whole, pickled or not; what is streamed would be without."""
    save_tiny("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="to a folder of their own"):
        load(str(tmp_path))


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_told(index, tmp_path):
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="does not name safetensors files"):
        load(str(tmp_path))


@pytest.mark.parametrize("header", ["[]", "3", "{", '{"a": 1}', '{"a": {"data_offsets": [0, 0]}}'])
def test_a_damaged_header_is_told(header, tmp_path):
    save_tiny("llama", tmp_path)
    data = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(UserError, match="has a damaged header"):
        load(str(tmp_path))


@pytest.mark.parametrize("change", [
    {"shape": [2**40, 2**40]},
    {"shape": [-64]},
    {"shape": ["64"]},
    {"shape": "64"},
    {"shape": [63]},
    {"dtype": "F64"},
    {"dtype": "F31"},
    {"dtype": ["F32"]},
    {"data_offsets": [-256, 256]},
    {"data_offsets": [256, 0]},
    {"data_offsets": [0, 2**63]},
    {"data_offsets": [0, "256"]},
    {"data_offsets": [0]},
])  # fmt: skip
def test_a_header_that_does_not_fit_the_data_is_told(change, tmp_path):
    """In a plan too, which would count by the shapes."""
    save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    length = int.from_bytes((data := path.read_bytes())[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"] |= change
    crafted = json.dumps(header).encode()
    path.write_bytes(len(crafted).to_bytes(8, "little") + crafted + data[8 + length :])
    for work in (load, lambda spec: prepare(spec, Recipe(steps=(STEPS["gptq"],)))):
        with pytest.raises(UserError, match="has a damaged header|is cut off"):
            work(str(tmp_path))


def test_a_type_that_torch_has_not_is_told(tmp_path):
    save_tiny("llama", tmp_path)
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(UserError, match="the tensor x of type F4, and llmslim reads F64, F32"):
        load(str(tmp_path))


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(("form", "name", "cast"), [
    ("llmslim", f"{Q}.weight_packed", lambda t: t.float()),
    ("llmslim", f"{Q}.weight_packed", lambda t: t.long() + 256),
    ("llmslim", f"{Q}.weight_packed", lambda t: t[:, 1:].clone()),
    ("llmslim", f"{Q}.weight_scale", lambda t: t.int()),
    ("compressed-tensors", f"{Q}.weight_packed", lambda t: t.float()),
    ("compressed-tensors", f"{Q}.weight_scale", lambda t: t.int()),
    ("gptq", f"{Q}.qweight", lambda t: t.long()),
    ("gptq", f"{Q}.scales", lambda t: t.int()),
    ("llmslim", "model.norm.weight", lambda t: t.long()),
    ("llmslim", "model.norm.weight", lambda t: t[1:].clone()),
])  # fmt: skip
def test_tensors_of_another_type_or_shape_are_refused_by_their_headers(form, name, cast, tmp_path):
    """As when they are streamed; transformers would cast them and compute with what comes out."""
    make(save_tiny("llama", tmp_path / "source"), tmp_path / "made", STEPS[form], form)
    path = tmp_path / "made" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: cast(tensors[name])}, path, metadata={"format": "pt"})
    for work in (load, lambda spec: CheckpointReader(find(spec))):
        with pytest.raises(UserError, match=f"tensor {name} is .*, its config announces"):
            work(str(tmp_path / "made"))


@pytest.mark.parametrize(("config", "reason"), [
    ({"quant_method": "awq", "bits": 4}, "awq"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, "gptq_v2"),
])  # fmt: skip
def test_foreign_checkpoints_are_refused_by_the_reader(config, reason, tmp_path):
    save_tiny("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(UserError, match=reason):
        CheckpointReader(find(str(tmp_path)))


def test_asymmetric_compressed_tensors_of_others_are_read(tmp_path):
    """Those that transformers 5 cannot load without dequantizing."""
    make(
        save_tiny("llama", tmp_path / "source"),
        tmp_path / "made",
        RTN(bits=4, group_size=32, symmetric=False),
        "llmslim",
    )
    model, _ = load(str(tmp_path / "made"), dtype=torch.float32)
    form = formats()["compressed-tensors"]
    tensors = {
        n: t for n, t in load_file(tmp_path / "made" / "model.safetensors").items() if ".weight_" not in n
    }
    for name, module in compact_modules(model).items():
        tensors |= form.stored(name, module)
    edits = CheckpointReader(find(str(tmp_path / "made"))).edits
    save_file(tensors, tmp_path / "made" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "made" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": form.config(edits, model, torch.float32)}
    path.write_text(json.dumps(config))
    again, _ = load(str(tmp_path / "made"), dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(model))


def test_fill_casts_and_rounds(tmp_path):
    save_tiny("llama", tmp_path)
    reader = CheckpointReader(find(str(tmp_path)))
    models = [reader.model_skeleton(), reader.model_skeleton()]
    stored = load_file(tmp_path / "model.safetensors")
    reader.fill(models, None, torch.float32, round_to=torch.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"
    assert models[0].get_parameter(name).is_meta
    reader.fill(models, "model.layers.1", torch.float32, round_to=torch.bfloat16)
    for model in models:
        assert torch.equal(model.get_parameter(name), stored[name].bfloat16().float())
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16  # a table that is not tied
        assert model.lm_head.weight.dtype == torch.float32
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert reader.streams and reader.weights.stored_bytes == sum(t.numel() * 4 for t in stored.values())


def test_families_that_need_conversion_are_served_from_memory(tmp_path):
    save_tiny("mixtral", tmp_path)
    reader = CheckpointReader(find(str(tmp_path)))
    assert not reader.streams
    model = reader.model_skeleton()
    reader.fill([model], None, torch.float32)
    for block in Anatomy.of(model).blocks:
        reader.fill([model], block.name, torch.float32, forget=True)
    assert torch.equal(logits_of(model), logits_of(tiny_model("mixtral")))
    assert not [name for name in reader._whole if "layers" in name]


def test_older_names_stream(tmp_path):
    save_tiny("gpt_neox", tmp_path)  # stores embed_out, which is called lm_head now
    assert CheckpointReader(find(str(tmp_path))).streams


def test_shards_and_index(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    model = make(save_tiny("llama", tmp_path / "source"), tmp_path / "made", STEPS["compressed-tensors"])
    files = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert "model-00001-of-00004.safetensors" in files and "model.safetensors.index.json" in files
    assert not [name for name in files if name.startswith("part-") or name == "model.safetensors"]
    loaded, _ = load(str(tmp_path / "made"), dtype=torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_run_killed_while_parts_were_removed_finishes(tmp_path):
    make(save_tiny("llama", tmp_path / "source"), tmp_path / "made", STEPS["compressed-tensors"])
    whole = (tmp_path / "made" / "model.safetensors").read_bytes()
    (tmp_path / "made" / "part-00003.safetensors").write_bytes(b"left behind")
    again = writer.CheckpointWriter(tmp_path / "made", formats()["compressed-tensors"], torch.float32)
    again.finish(find(str(tmp_path / "source")), [])
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == whole
    assert not list((tmp_path / "made").glob("part-*"))
