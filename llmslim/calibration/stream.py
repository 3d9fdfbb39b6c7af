"""BlockStream: carry token windows through a model while one block of it is in memory.

The model's own forward runs once per stack with its blocks stubbed: that yields the hidden states in front of
the first block and the arguments (masks, rotary tables, encoder states) that each block is called with. From
then on blocks are called one by one with those arguments. `walk` halts every chunk of windows in front of each
Linear of a block, so that a Linear can be decided on (and replaced) with the inputs it will really see, and the
chunks go on through what replaced it: one forward per block, statistics that include all earlier decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block, Stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_TOKENS = 2048  # enough rows for full GEMM speed; temporaries of one chunk stay small

Call = tuple[tuple[Any, ...], dict[str, Any]]
Visit = Callable[[str, list[Tensor]], None]


@dataclass
class Lane:
    """Token windows on their way through the blocks.

    Attributes:
        inputs: keyword arguments of the model's forward, one dict per chunk of windows.
        hidden: hidden states [windows, seq, hidden] in front of the next block, one per chunk.
        calls: the further arguments of each block, per chunk.
        finished: final hidden states of the stacks already passed, by stack name.
    """

    name: str
    inputs: list[dict[str, Tensor]]
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    finished: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of_tokens(
        cls, name: str, tokens: Tensor, is_encoder_decoder: bool = False, windows_per_chunk: int | None = None
    ) -> Lane:
        """A lane for windows `tokens` [windows, seq]; an encoder-decoder reads the same text on both sides."""
        per_chunk = windows_per_chunk or max(1, CHUNK_TOKENS // tokens.shape[1])
        chunks = [{"input_ids": chunk} for chunk in tokens.split(per_chunk)]
        if is_encoder_decoder:
            chunks = [{**chunk, "decoder_input_ids": chunk["input_ids"]} for chunk in chunks]
        return cls(name, chunks)


class _EndOfStack(Exception):
    """Raised by the last stub: what follows the blocks is not wanted yet."""


class BlockStream:
    """One model and the lanes that travel through it; the model's blocks are filled and freed by the caller.

    Args:
        model: a skeleton on meta (or a loaded model) with `use_cache` off in its config; what lies
            outside the blocks must be filled for `enter` and `outputs`, a block for `forward` and `walk`.
        dtype: what hidden states are kept and blocks are computed in.

    Attributes:
        lanes: by name.
        tails: by stack already entered, how many values its blocks return beside the hidden states.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.anatomy = Anatomy.of(model)
        self.device = device
        self.dtype = dtype
        self.lanes: dict[str, Lane] = {}
        self.tails: dict[str, int] = {}

    def add(self, lane: Lane) -> None:
        self.lanes[lane.name] = lane

    @torch.no_grad()
    def enter(self, stack: Stack) -> None:
        """Bring every lane in front of the first block of `stack`, whose first block must be filled."""
        for lane in self.lanes.values():
            resumed, lane.hidden, lane.calls = lane.hidden, [], []
            for index in range(len(lane.inputs)):
                calls = self._record(stack, lane, index)
                first = lane.calls[0] if lane.calls else None
                lane.calls.append(first if first is not None and _same(calls, first) else calls)
            if resumed:
                lane.hidden = resumed

    def _record(self, stack: Stack, lane: Lane, index: int) -> list[Call]:
        """Run the model's forward up to the end of `stack`, blocks stubbed, and note how each is called."""
        calls: list[Call] = []
        last = len(stack.blocks) - 1
        first_output: list[Any] = []

        def stub(position: int, real: Callable) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = _split(args, kwargs)
                hidden, args, kwargs = (_cast(x, self.dtype) for x in (hidden, args, kwargs))
                calls.append((args, kwargs))
                if position == 0:
                    lane.hidden.append(hidden)
                    # T5's first block computes the position bias that the others are given: run it for real
                    known = self.tails.get(stack.name)
                    first_output.append(hidden if known == 0 else real(hidden, *args, **kwargs))
                    self.tails[stack.name] = (
                        len(first_output[0]) - 1 if isinstance(first_output[0], tuple) else 0
                    )
                if position == last:
                    raise _EndOfStack
                return first_output[0]

            return forward

        patches = {b.module: stub(i, b.module.forward) for i, b in enumerate(stack.blocks)}
        patches.update(
            self._replies(lane, index, [s for s in self.anatomy.stacks if s.name in lane.finished])
        )
        try:
            with patched(patches), self._cast_embeddings():
                self.model(**_to(lane.inputs[index], self.device))
        except _EndOfStack:
            pass
        return calls

    def leave(self, stack: Stack) -> None:
        """Note the hidden states behind the last block of `stack` as its result."""
        for lane in self.lanes.values():
            lane.finished[stack.name] = lane.hidden
            lane.hidden, lane.calls = [], []

    @torch.no_grad()
    def forward(self, block: Block, lane: Lane) -> None:
        """Pass a lane through a block."""
        for index in range(len(lane.hidden)):
            lane.hidden[index] = self._call(block, lane, index)

    def _call(self, block: Block, lane: Lane, index: int) -> Tensor:
        args, kwargs = lane.calls[index][block.index]
        output = block.module(lane.hidden[index], *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def walk(self, block: Block, lane: Lane, names: list[str], visit: Visit) -> None:
        """Pass a lane through a block, halting all of it in front of each named Linear.

        `visit(name, inputs)` is called once per Linear, in order of execution, with the inputs [..., in] of the
        chunks that reach it; it may replace the module at `name`, and the lane goes on through the new one.
        An expert that no chunk reaches is not visited. `names` must be in order of execution wherever chunks
        take different ways (experts); elsewhere any order does.
        """
        order = {name: position for position, name in enumerate(names)}
        decided: set[str] = set()

        def halting(name: str, real: Callable, module: nn.Module) -> Callable:
            def forward(x: Tensor) -> Tensor:
                if name not in decided:
                    getcurrent().parent.switch((name, x))
                now = self.model.get_submodule(name)
                return real(x) if now is module else now(x)

            return forward

        modules = {name: self.model.get_submodule(name) for name in names}
        with patched({m: halting(n, m.forward, m) for n, m in modules.items()}):
            chunks = [
                greenlet(lambda index=index: self._call(block, lane, index))
                for index in range(len(lane.hidden))
            ]
            waiting: dict[int, tuple[str, Tensor]] = {}

            def go_on(index: int) -> None:
                result = chunks[index].switch()
                if chunks[index].dead:
                    lane.hidden[index] = result
                    waiting.pop(index, None)
                else:
                    waiting[index] = result

            for index in range(len(chunks)):
                go_on(index)
            while waiting:
                name = min((name for name, _ in waiting.values()), key=order.__getitem__)
                here = [index for index, (other, _) in waiting.items() if other == name]
                visit(name, [waiting[index][1] for index in here])
                decided.add(name)
                for index in here:
                    go_on(index)

    @torch.no_grad()
    def inputs_of(self, block: Block, lane: Lane, names: list[str]) -> dict[str, list[Tensor]]:
        """Pass a lane through a block and return the inputs of each named Linear, one tensor per chunk."""
        seen: dict[str, list[Tensor]] = {}
        self.walk(block, lane, names, lambda name, inputs: seen.__setitem__(name, list(inputs)))
        return seen

    @torch.no_grad()
    def outputs(self, lane: Lane) -> Iterator[tuple[dict[str, Tensor], Any]]:
        """The model's own outputs (logits ...) for each chunk of a lane that has passed all stacks."""
        for index, inputs in enumerate(lane.inputs):
            with patched(self._replies(lane, index, self.anatomy.stacks)), self._cast_embeddings():
                yield inputs, self.model(**_to(inputs, self.device))

    def _replies(self, lane: Lane, index: int, stacks: list[Stack]) -> dict[nn.Module, Callable]:
        """Stubs that answer with the final hidden states of stacks already passed."""
        patches: dict[nn.Module, Callable] = {}
        for stack in stacks:
            hidden, extra = lane.finished[stack.name][index], self.tails[stack.name]
            answer = (hidden, *[None] * extra) if extra else hidden
            for block in stack.blocks:
                patches[block.module] = lambda *args, answer=answer, **kwargs: answer
        return patches

    @contextmanager
    def _cast_embeddings(self) -> Iterator[None]:
        """Embedding tables may stay in their stored type: only the gathered rows are cast."""
        handles = [
            module.register_forward_hook(lambda module, args, output: output.to(self.dtype))
            for _, module in self.anatomy.embeddings
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def patched(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Replace the forward of modules for a while."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _split(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """Take the hidden states out of a block's arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def _to(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _same(a: Any, b: Any) -> bool:
    """Whether two recorded calls carry equal values, so that one can stand for both."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b
