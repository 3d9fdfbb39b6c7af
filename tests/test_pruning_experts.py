"""Whole experts: removing them is masking them, what is measured of them is what they do, results are plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmslim.anatomy import Anatomy, Block, Experts
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.pruning.edits import narrow_experts
from llmslim.pruning.experts import PruneExperts, Routing
from llmslim.recipe import Calibration
from llmslim.step import StepRecord, build_step
from tests.tiny import example_inputs, save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("verified_here")

QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=4, seq_len=32), "evaluation": None}
MIXTURES = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in (*MIXTURES, "llama")}


def mixtures(model: PreTrainedModel) -> list[tuple[Block, Experts]]:
    return [(block, mlp) for block in Anatomy.of(model).blocks if isinstance(mlp := block.mlp, Experts)]


def masked(routers: dict[int, list[int]]) -> Callable[..., Tensor]:
    """F.linear that gives -inf for the logits of removed experts, by the id of the router's weight."""
    linear = F.linear

    def forward(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        logits = linear(x, weight, *rest)
        for expert in set(range(len(weight))) - set(routers.get(id(weight), range(len(weight)))):
            logits[..., expert] = -torch.inf
        return logits

    return forward


@pytest.mark.parametrize("family", MIXTURES)
def test_surgery_is_masking_the_router(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, narrow = tiny_model(family), tiny_model(family)
    inputs = example_inputs(model)
    keeps = [[1, 3], [0, 1, 3], [0, 2]]
    routers = {}
    for (block, experts), keep in zip(mixtures(model), keeps, strict=False):
        routers[id(model.get_submodule(experts.router).weight)] = keep
        narrow_experts(next(b for b, _ in mixtures(narrow) if b.name == block.name), torch.tensor(keep))
    with torch.no_grad():
        found, whole = narrow(**inputs).logits, model(**inputs).logits
        monkeypatch.setattr(F, "linear", masked(routers))
        expected = model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((whole - expected).abs().max()) > 0.1


def routing(family: str) -> tuple[Experts, Routing, PreTrainedModel]:
    """Of the first mixture, for one window."""
    model = tiny_model(family)
    model.config.use_cache = False
    stream = BlockStream(model, torch.device("cpu"), torch.float32)
    tokens = torch.randint(5, 512, (6, 32), generator=torch.Generator().manual_seed(0))
    lane = Lane.of_tokens("calibration", tokens, windows_per_chunk=2)
    stream.add(lane)
    stream.enter(stream.anatomy.stacks[0])
    block, experts = mixtures(model)[0]
    before = [hidden.clone() for hidden in lane.hidden]
    seen = Routing.of(block, experts, stream, lane)
    assert all(torch.equal(a, b) for a, b in zip(before, lane.hidden, strict=True))
    assert model.get_submodule(experts.name) is experts.module
    return experts, seen, model


@pytest.mark.parametrize("family", MIXTURES)
def test_routing_is_what_the_experts_do_token_by_token(family: str) -> None:
    experts, seen, model = routing(family)
    inputs = torch.cat(seen.inputs)
    gate_up, down = (model.get_parameter(name) for name in (experts.gate_up or "", experts.down or ""))
    router = model.get_submodule(experts.router)
    tokens, weight, output = (torch.zeros(experts.num_experts, dtype=torch.float64) for _ in range(3))
    total = torch.zeros_like(inputs)
    with torch.no_grad():
        for row, x in enumerate(inputs):
            probabilities = (router.weight @ x).softmax(0)
            best = probabilities.topk(2)
            shares = (
                best.values / best.values.sum() if getattr(router, "norm_topk_prob", True) else best.values
            )
            for share, expert in zip(shares, best.indices.tolist(), strict=True):
                gate, up = (gate_up[expert] @ x).chunk(2)
                given = down[expert] @ (F.silu(gate) * up)
                total[row] += share * given
                tokens[expert] += 1
                weight[expert] += float(share)
                output[expert] += float(share * given.norm())
    assert torch.equal(seen.tokens, tokens)
    torch.testing.assert_close(seen.weight, weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.output, output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(seen.outputs), total, rtol=1e-4, atol=1e-4)
    step = PruneExperts(ranking="output")
    torch.testing.assert_close(step._scores(experts, seen), output / tokens, rtol=1e-4, atol=1e-4)
    assert torch.equal(PruneExperts(ranking="routing")._scores(experts, seen), seen.weight)


@pytest.mark.parametrize("ranking", ["output", "routing", "random"])
@pytest.mark.parametrize("family", MIXTURES)
def test_the_result_is_plain_and_loads(
    family: str, ranking: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    step = build_step("experts", {"ratio": 0.25, "ranking": ranking})
    result = compress(str(folders[family]), [step], tmp_path / "out", **QUICK)
    assert result.report["verification"]["ok"] and result.report["verification"]["max_error"] == 0
    config = json.loads((result.folder / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert getattr(model.config, "num_local_experts" if family == "mixtral" else "num_experts") == 3
    base = AutoModelForCausalLM.from_pretrained(folders[family])
    rows = {row["name"]: row for row in result.report["linears"]}
    assert len(rows) == len(mixtures(base))
    for (_, old), (_, new) in zip(mixtures(base), mixtures(model), strict=True):
        row = rows[old.name]
        assert (row["what"], row["kept"], row["total"]) == ("experts", 3, 4)
        assert torch.equal(
            model.get_parameter(f"{new.name}.down_proj"),
            base.get_parameter(f"{old.name}.down_proj")[row["units"]],
        )
        routers = [m.get_parameter(f"{e.router}.weight") for m, e in ((base, old), (model, new))]
        assert torch.equal(routers[1], routers[0][row["units"]])
        if ranking != "random":
            assert 0 < row["output_error"] < 2 and row["tokens"] == 128


@pytest.mark.parametrize("ranking", ["output", "routing"])
def test_an_expert_that_nothing_reaches_goes_first_and_is_told(ranking: Any) -> None:
    model = tiny_model("mixtral", num_experts_per_tok=1)
    model.config.use_cache = False
    block, experts = mixtures(model)[0]
    router = model.get_parameter(f"{experts.router}.weight").data
    router[2] = router[[0, 1, 3]].mean(0)  # never the best
    stream = BlockStream(model, torch.device("cpu"), torch.float32)
    stream.add(Lane.of_tokens("calibration", torch.randint(5, 512, (8, 64))))  # all others are reached
    stream.enter(stream.anatomy.stacks[0])
    record = StepRecord()
    PruneExperts(ratio=0.25, ranking=ranking).compress_block(block, stream, None, record)
    assert record.linears[0]["units"] == [0, 1, 3] and record.linears[0]["output_error"] == 0
    assert record.notes == [
        {"where": f"{experts.name}.2", "what": "no calibration token reached it: it counts as nothing"}
    ]


@pytest.mark.parametrize(
    ("family", "ratio", "words"),
    [
        ("mixtral", 0.75, "takes 3 of the 4 experts .* at least 2 must stay.*ratios that fit: 0.25, 0.5"),
        ("qwen3_moe", 0.1, "takes 0 of the 4 experts"),
        ("llama", 0.25, "A llama model has no experts to prune"),
    ],
)
def test_what_does_not_fit_is_refused(
    family: str, ratio: float, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        compress(str(folders[family]), [PruneExperts(ratio=ratio)], tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("first", "words"), [("rtn", "before you quantize"), ("magnitude", "single weights")]
)
def test_packed_experts_are_refused(first: str, words: str, folders: dict[str, Path], tmp_path: Path) -> None:
    steps = [build_step(first, {"group_size": 16} if first == "rtn" else {}), PruneExperts()]
    with pytest.raises(UserError, match=words):
        compress(str(folders["mixtral"]), steps, tmp_path / "out", **QUICK)


def test_experts_then_their_channels(folders: dict[str, Path], tmp_path: Path) -> None:
    steps = [PruneExperts(ratio=0.5), build_step("mlp", {"ratio": 0.5, "multiple_of": 8})]
    result = compress(str(folders["mixtral"]), steps, tmp_path / "out", **QUICK)
    (count, width) = {
        (e.num_experts, e.width) for _, e in mixtures(AutoModelForCausalLM.from_pretrained(result.folder))
    }.pop()
    assert (count, width) == (2, 32) and "quantization_config" not in json.loads(
        (result.folder / "config.json").read_text()
    )
