"""Pruning the residual stream: rotations that change nothing, streams that fit, and the road on every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.pruning import width as room
from llmslim.pruning.importance import least_squares
from llmslim.pruning.residual import narrow_block, narrow_outer, stream_norms, untie
from llmslim.pruning.width import PruneWidth, components, turning
from llmslim.recipe import Calibration, Recipe
from llmslim.step import build_step
from tests.tiny import FAMILIES, example_inputs, meta_model, randomize, save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("verified_here")

QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe")
"""Families with RMSNorms in front of attention and MLP."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


def orthogonal(width: int, kept: int | None = None, seed: int = 0) -> Tensor:
    """[width, kept] with orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:, :kept].contiguous()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**example_inputs(model)).logits


def narrow(model: PreTrainedModel, found: dict[str, Tensor]) -> None:
    """What the step does to a model that is streamed, to one in memory."""
    anatomy = Anatomy(model)
    if "components" in found and anatomy.tied:
        untie(anatomy)
    assert anatomy.final_norm is not None
    narrow_outer(anatomy, turning(found, {"outside": room._gain(anatomy.final_norm[1])}, model))
    for block in anatomy.blocks:
        first, second = (room._gain(model.get_submodule(name)) for name in stream_norms(block))
        narrow_block(block, turning(found, {"attention": first, "mlp": second}, model))


@pytest.mark.parametrize("family", ROTATED)
def test_a_rotation_of_the_whole_stream_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    narrow(model, {"components": orthogonal(64)})
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def writers(model: PreTrainedModel) -> list[Tensor]:
    """Views [d, ...] of all that writes to the stream."""
    found = [model.get_input_embeddings().weight.T]
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            found.append(parameter)
        elif name.endswith("down_proj"):  # experts [E, H, I]
            found.append(parameter.transpose(0, 1))
    return found


@pytest.mark.parametrize("family", ROTATED)
def test_channels_that_are_zero_everywhere_go_without_a_trace(family: str) -> None:
    """The norms see fewer channels: this holds by the factor sqrt(d/d') alone, but for their epsilon."""
    model = tiny_model(family, rms_norm_eps=1e-9)
    kept = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:40].sort().values
    gone = torch.tensor([channel for channel in range(64) if channel not in kept.tolist()])
    with torch.no_grad():
        for tensor in writers(model):
            tensor[gone] = 0
    before = logits(model)
    narrow(model, {"kept": kept})
    assert model.get_input_embeddings().weight.shape[1] == 40
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ROTATED)
def test_pca_of_a_stream_in_a_subspace_is_exact(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Survey, pass, checkpoint: the stream lives in 40 of 64 dimensions, which the components find."""
    model = tiny_model(family, rms_norm_eps=1e-9)
    inside = orthogonal(64, 40)
    with torch.no_grad():
        for tensor in writers(model):
            tensor.copy_(torch.tensordot(inside @ inside.T, tensor, dims=1))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((folders[family] / name).read_bytes())
    step = PruneWidth(ratio=0.375, basis="pca", refit=family != "llama")
    report = compress(str(folder), [step], tmp_path / "out", **QUICK).report
    assert report["verification"]["ok"] and {row["kept"] for row in report["linears"]} == {40}
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(made), logits(model), atol=1e-3, rtol=1e-3)


class Look:
    """A survey of a model that is loaded whole."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        self.model, self.tokens, self.seed = model, tokens, 0
        self.anatomy = Anatomy.of(model)

    def blocks(self) -> Any:
        from llmslim.calibration.stream import BlockStream, Lane

        stream = BlockStream(self.model, torch.device("cpu"), torch.float32)
        stream.add(Lane.of_tokens("calibration", self.tokens))
        for stack in stream.anatomy.stacks:
            for block in stack.blocks:
                if block.index == 0:
                    stream.enter(stack)
                yield block, stream
            stream.leave(stack)


@torch.no_grad()
def norm_traffic(model: PreTrainedModel, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(inputs [tokens, d], outputs) of every norm of width d, from one ordinary forward."""
    seen: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if "Norm" in type(module).__name__ and module.weight.shape == (64,):
            module.register_forward_hook(
                lambda m, args, out: seen.append((args[0].flatten(0, -2), out.flatten(0, -2)))
            )
    model(input_ids=tokens)
    return seen


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_components_are_those_of_the_normalised_states(family: str) -> None:
    tokens = example_inputs(tiny_model(family), batch=4)["input_ids"]
    step = PruneWidth(ratio=0.5, basis="pca")
    found = step.survey(Look(tiny_model(family), tokens))["components"].double()
    rows = torch.cat(
        [nn.functional.normalize(x.double(), dim=1) for x, _ in norm_traffic(tiny_model(family), tokens)]
    )
    assert len(rows) == 7 * tokens.numel()
    expected = torch.linalg.svd(rows, full_matrices=False).Vh[:32].T
    torch.testing.assert_close((found.T @ expected).abs(), torch.eye(32).double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(32).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_channels_are_those_with_the_largest_mean_activation(family: str) -> None:
    tokens = example_inputs(tiny_model(family), batch=4)["input_ids"]
    step = PruneWidth(ratio=0.25, refit=False)
    found = step.survey(Look(tiny_model(family), tokens))["kept"]
    activity = torch.stack([out.abs().mean(0) for _, out in norm_traffic(tiny_model(family), tokens)]).sum(0)
    assert found.tolist() == sorted(activity.argsort(descending=True)[:48].tolist())


def test_components_have_a_fixed_sign() -> None:
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    found = components(rows.T @ rows, 5)
    assert torch.equal(found, components(rows.T @ rows, 5))
    assert bool((found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("basis", ["channels", "pca"])
@pytest.mark.parametrize("family", ROTATED)
def test_the_result_is_a_plain_smaller_model(
    family: str, basis: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    step = build_step("width", {"ratio": 0.25, "basis": basis, "refit": family != "mistral"})
    report = compress(str(folders[family]), [step], tmp_path / "out", **QUICK).report
    assert report["verification"]["ok"] and report["verification"]["max_error"] == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["hidden_size"] == 48 and "quantization_config" not in config
    assert config["head_dim"] == (32 if family == "qwen3" else 16)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert made.get_input_embeddings().weight.shape == (512, 48) and bool(logits(made).isfinite().all())
    stored = load_file(tmp_path / "out/model.safetensors")
    assert ("lm_head.weight" in stored) == (family != "qwen2" or basis == "pca")
    untied = [note for note in report["notes"] if "24,576 parameters" in note["what"]]
    assert len(untied) == (family == "qwen2" and basis == "pca")


@pytest.mark.parametrize(
    ("family", "basis", "words"),
    [
        ("gpt2", "channels", "prune --method mlp or heads"),
        ("gpt2", "pca", "ln_1 is a LayerNorm"),
        ("opt", "channels", "prune --method mlp or heads"),
        ("gpt_neox", "channels", "prune --method mlp or heads"),
        ("gemma2", "channels", "a scale of the embeddings"),
        ("gemma2", "pca", "layers.0 has 4"),
        ("bert", "channels", "neither embedding, final norm nor head"),
        ("t5", "channels", "an encoder and a decoder"),
    ],
)
def test_families_that_cannot_are_refused(
    family: str, basis: str, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        compress(str(folders[family]), [PruneWidth(basis=basis)], tmp_path / "out", **QUICK)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("fields", "width"),
    [
        ({"ratio": 0.25}, 48),
        ({"ratio": 0.3}, 48),
        ({"ratio": 0.32}, 40),
        ({"ratio": 0}, 64),
        ({"ratio": 0.9, "multiple_of": 1}, 8),
        ({"ratio": 0.4, "multiple_of": 32}, 32),
    ],
)
def test_the_width_is_the_nearest_that_fits(fields: dict[str, Any], width: int) -> None:
    assert PruneWidth(**fields)._width(Anatomy(meta_model("llama"))) == width


def test_the_width_is_one_that_the_config_accepts() -> None:
    """Llama wants a multiple of its number of heads, though they keep their own width."""
    anatomy = Anatomy(meta_model("llama", hidden_size=60, num_attention_heads=6, num_key_value_heads=3))
    assert PruneWidth(ratio=0.3, multiple_of=4)._width(anatomy) == 36  # 44 and 40 are no multiples of 6
    with pytest.raises(UserError, match=r"ratios that fit: 0.2, 0.4, 0.6, 0.8"):
        PruneWidth(ratio=0.05, multiple_of=4)._width(anatomy)
    with pytest.raises(UserError, match="try a smaller multiple_of"):
        PruneWidth(ratio=0.5, multiple_of=64)._width(anatomy)


@pytest.mark.parametrize("basis", ["channels", "pca"])
def test_it_goes_with_other_steps(basis: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2 cannot say the width of a head, but a quarter less of both leaves it as it was."""
    steps = [
        build_step("mlp", {"ratio": 0.5}),
        PruneWidth(basis=basis),
        build_step("rtn", {"group_size": 16}),
    ]
    report = compress(str(folders["qwen2"]), steps, tmp_path / "out", **QUICK).report
    assert report["verification"]["ok"] and report["verification"]["max_error"] == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"]) == (48, 64)
    if basis == "channels":
        steps = [build_step("heads", {"ratio": 0.25}), PruneWidth()]
        report = compress(str(folders["gpt2"]), steps, tmp_path / "gpt2", **QUICK).report
        assert report["verification"]["ok"]
        config = json.loads((tmp_path / "gpt2/config.json").read_text())
        assert (config["n_embd"], config["n_head"]) == (48, 3) and "quantization_config" not in config


def test_a_killed_run_goes_on(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the stack, where the lanes are narrow and the first block is read as it was."""
    step = PruneWidth(basis="pca", refit=True)
    compress(str(folders["qwen2"]), [step], tmp_path / "whole", **QUICK)
    real = PruneWidth.compress_block

    def dying(self: PruneWidth, block: Any, *rest: Any) -> None:
        if block.index == 2:
            raise KeyboardInterrupt
        real(self, block, *rest)

    monkeypatch.setattr(PruneWidth, "compress_block", dying)
    with pytest.raises(KeyboardInterrupt):
        compress(str(folders["qwen2"]), [step], tmp_path / "out", **QUICK)
    monkeypatch.setattr(PruneWidth, "compress_block", real)
    assert compress(str(folders["qwen2"]), [step], tmp_path / "out", **QUICK).report["run"]["resumed"]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_norms_that_are_elsewhere_are_found_out(folders: dict[str, Path]) -> None:
    """OLMo-2 has two RMSNorms per block as well, behind attention and MLP."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("olmo2", **FAMILIES["llama"].config)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model, 0)
    tokens = example_inputs(model)["input_ids"]
    with pytest.raises(UserError, match="is not"):
        PruneWidth(basis="pca").survey(Look(model, tokens))


def test_blocks_that_run_side_by_side_are_not_refitted() -> None:
    model = tiny_model("gpt_neox")
    tokens = example_inputs(model)["input_ids"]
    with pytest.raises(UserError, match="give --no-refit"):
        PruneWidth(refit=True).survey(Look(model, tokens))


def test_fit_is_ridge_regression_to_what_was_there() -> None:
    """Solved as ordinary least squares, with rows of its own for the pull."""
    generator = torch.Generator().manual_seed(0)
    x, wanted = (torch.randn(200, n, generator=generator, dtype=torch.float64) for n in (12, 5))
    prior, damping = torch.randn(5, 12, generator=generator, dtype=torch.float64), 0.1
    hessian = x.T @ x
    ridge = (damping * float(hessian.diagonal().mean())) ** 0.5
    rows = torch.cat([x, ridge * torch.eye(12, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([wanted, ridge * prior.T])).solution.T
    found = least_squares(wanted.T @ x, hessian, damping, prior)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("basis", ["channels", "pca"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "qwen3_moe"])
def test_refit_follows_the_uncompressed_model(
    family: str, basis: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Logits on the text that it was fitted on come nearer; qwen2 has biases, phi3 fused matrices."""
    text = {"calibration": Calibration(num_samples=32, seq_len=64), "evaluation": None}
    tokens = prepare(str(folders[family]), Recipe(steps=(PruneWidth(),), **text)).options.tokens
    assert tokens is not None
    with torch.no_grad():
        base = tiny_model(family)(input_ids=tokens[:8]).logits
    errors = {}
    for refit in (False, True):
        step = PruneWidth(ratio=0.125, basis=basis, refit=refit)
        compress(str(folders[family]), [step], tmp_path / str(refit), **text)
        made = AutoModelForCausalLM.from_pretrained(tmp_path / str(refit), dtype=torch.float32)
        with torch.no_grad():
            errors[refit] = float((made(input_ids=tokens[:8]).logits - base).square().mean())
    assert errors[True] < 0.9 * errors[False]
