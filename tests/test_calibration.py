"""The stream of blocks against the model's own forward, and what it sees against plain hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmslim.anatomy.parts import is_linear
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.experts import UnfuseExperts
from llmslim.quantization.gptq import GPTQ
from llmslim.step import StepRecord
from tests.tiny import FAMILIES, tiny_model

CPU = torch.device("cpu")
MOE = ("mixtral", "qwen3_moe")


def windows(count: int = 6, length: int = 24) -> Tensor:
    return torch.randint(5, 512, (count, length), generator=torch.Generator().manual_seed(3))


def stream_of(model: nn.Module, tokens: Tensor, per_chunk: int = 2) -> tuple[BlockStream, Lane]:
    stream = BlockStream(model, CPU, torch.float32)
    lane = Lane.of_tokens(
        "calibration", tokens, bool(model.config.is_encoder_decoder), windows_per_chunk=per_chunk
    )
    stream.add(lane)
    return stream, lane


def inputs_of(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": tokens}
    return {**inputs, "decoder_input_ids": tokens} if model.config.is_encoder_decoder else inputs


def flow(stream: BlockStream, visit=None) -> None:
    """Pass the lane through every stack, block by block."""
    lane = stream.lanes["calibration"]
    for stack in stream.anatomy.stacks:
        stream.enter(stack)
        for block in stack.blocks:
            if visit is None:
                stream.forward(block, lane)
            else:
                stream.walk(block, lane, list(block.linears()), visit)
        stream.leave(stack)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_whole_forward(family: str) -> None:
    model, tokens = tiny_model(family, use_cache=False), windows()
    with torch.no_grad():
        expected = model(**inputs_of(model, tokens))[0]
    stream, lane = stream_of(model, tokens)
    flow(stream)
    got = torch.cat([output[0] for _, output in stream.outputs(lane)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())  # nothing is left behind
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(model, tokens))[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_sees_what_hooks_see(family: str) -> None:
    model, tokens = tiny_model(family, use_cache=False), windows()
    if family in MOE:
        for block in BlockStream(model, CPU, torch.float32).anatomy.blocks:
            if type(block.mlp).__name__ == "Experts":
                UnfuseExperts(module=block.mlp.name).apply(model)
    seen: dict[str, Tensor] = {}
    stream, lane = stream_of(model, tokens)
    names = [name for block in stream.anatomy.blocks for name in block.linears()]
    flow(stream, lambda name, inputs: seen.__setitem__(name, _moments(inputs)))

    hooked: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: hooked[name].append(args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        expected = model(**inputs_of(model, tokens))[0]
    for handle in handles:
        handle.remove()
    assert {name for name, inputs in hooked.items() if inputs} == set(seen)
    for name, moments in seen.items():
        torch.testing.assert_close(moments, _moments(hooked[name]), rtol=2e-3, atol=2e-3)
    got = torch.cat([output[0] for _, output in stream.outputs(lane)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def _moments(inputs: list[Tensor]) -> Tensor:
    rows = torch.cat([chunk.reshape(-1, chunk.shape[-1]) for chunk in inputs])
    return rows.T @ rows


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
def test_a_walk_goes_on_through_what_replaces_a_linear(family: str) -> None:
    """Later Linears of a block must see the outputs of the replaced ones: zeroed here, so it cannot be missed."""
    model, tokens = tiny_model(family, use_cache=False), windows(4)
    stream, lane = stream_of(model, tokens)
    stack = stream.anatomy.stacks[0]
    stream.enter(stack)
    block = stack.blocks[0]
    attention_output = block.attention.o.name
    seen: dict[str, list[Tensor]] = {}

    def visit(name: str, inputs: list[Tensor]) -> None:
        seen[name] = inputs
        if name in (block.attention.v.name, attention_output):
            zero = nn.Linear(inputs[0].shape[-1], _outputs(model.get_submodule(name)), bias=False)
            nn.init.zeros_(zero.weight)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, zero)

    stream.walk(block, lane, list(block.linears()), visit)
    if block.attention.v.name != block.attention.q.name:
        assert all(float(chunk.abs().max()) == 0 for chunk in seen[attention_output])
    before, lane.hidden = lane.hidden, []
    stream.enter(stack)
    stream.forward(block, lane)
    for once, again in zip(before, lane.hidden, strict=True):
        torch.testing.assert_close(once, again)


def _outputs(module: nn.Module) -> int:
    return module.weight.shape[1] if type(module).__name__ == "Conv1D" else module.weight.shape[0]


def test_chunks_do_not_change_the_statistics() -> None:
    moments = []
    for per_chunk in (1, 6):
        model = tiny_model("mistral", use_cache=False)
        seen: dict[str, Tensor] = {}
        stream, _ = stream_of(model, windows(), per_chunk)
        flow(stream, lambda name, inputs, seen=seen: seen.__setitem__(name, _moments(inputs)))
        moments.append(seen)
    assert moments[0].keys() == moments[1].keys()
    for name in moments[0]:
        torch.testing.assert_close(moments[0][name], moments[1][name], rtol=1e-3, atol=1e-3)


def test_linears_that_share_an_input_share_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", use_cache=False)
    stream, _ = stream_of(model, windows())
    stats: dict[str, object] = {}
    original = GPTQ.quantize

    def quantize(self, name, weight, scheme, seen, record):
        stats[name.rpartition(".")[2]] = seen
        return original(self, name, weight, scheme, seen, record)

    monkeypatch.setattr(GPTQ, "quantize", quantize)
    stack = stream.anatomy.stacks[0]
    stream.enter(stack)
    GPTQ(bits=4, group_size=32).compress_block(stack.blocks[0], stream, None, StepRecord())
    assert stats["q_proj"] is stats["k_proj"] is stats["v_proj"]
    assert stats["gate_proj"] is stats["up_proj"]
    assert len({id(seen) for seen in stats.values()}) == 4


@pytest.mark.parametrize("family", MOE)
def test_experts_count_their_tokens_and_a_starved_one_is_named(family: str) -> None:
    model = tiny_model(family, use_cache=False)
    tokens = windows(2, 6)
    stream, _ = stream_of(model, tokens)
    record = StepRecord()
    block = next(b for b in stream.anatomy.blocks if type(b.mlp).__name__ == "Experts")
    router = model.get_submodule(block.mlp.router)
    with torch.no_grad():
        router.weight[:2].mul_(0)
        router.weight[2] = 100 * router.weight[3]  # experts 2 and 3 are always the extremes: one starves
    step = GPTQ(bits=4, group_size=32)
    stream.enter(stream.anatomy.stacks[0])
    for other in stream.anatomy.stacks[0].blocks[: block.index]:
        stream.forward(other, stream.lanes["calibration"])
    step.compress_block(block, stream, None, record)
    rows = {row["name"]: row for row in record.linears if ".experts." in row["name"]}
    assert len(rows) == 8  # four experts, two Linears each
    counted = sum(row.get("tokens", 0) for name, row in rows.items() if name.endswith("gate_up"))
    assert counted == 2 * tokens.numel()  # each token goes to two experts
    starved = {name for name, row in rows.items() if "tokens" not in row}
    assert starved == {note["where"] for note in record.notes}
    assert not any(is_linear(module) for module in block.linears().values())
