"""A model taken apart: the body, which gives the last hidden states, and the way from there to the logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmslim.calibration.stream import patched
from llmslim.training.forward import run
from llmslim.training.logits import LazyLogits, Logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = 8  # tokens on which it is seen whether a model can be taken apart
ROUGH = {torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative difference of two ways to the same logits
FINE = 1e-3  # the same in float32


class Parted:
    """A model that is run up to its last hidden states, and from there for a few tokens at a time.

    What comes behind the body is the model's own forward with the body's answer given: heads with transforms, biases
    and adapters, packed and tied ones, scaled and capped logits are as the model has them. A model that does not come
    to the same logits in this way, found on a few tokens, is run as a whole; its logits then exist whole, too.

    Args:
        tokens: int64 [windows, seq], a sample; on any device.

    Attributes:
        body: what `run` and `observe` take: the part with the blocks; the model itself where it is not parted.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        self.model = model
        self.body: nn.Module = model
        some = tokens[:1, :PROBE].to(model.device)
        body = _called(model, some)
        if body is not None and self._goes(body, some):
            self.body = body

    @torch.no_grad()
    def _goes(self, body: nn.Module, tokens: Tensor) -> bool:
        """Whether each token, in whatever order they come, is given the logits that the whole model gives it."""
        output = run(body, tokens)
        if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
            return False
        calls: list[nn.Module] = []
        with _watched([body], calls):
            wanted = run(self.model, tokens).logits[0].float()
        allowed = ROUGH.get(self.model.dtype, FINE)
        found = self._behind(body, output, output.last_hidden_state[0].flip(0)).flip(0).float()
        return len(calls) == 1 and bool((found - wanted).norm() <= allowed * wanted.norm())

    def logits(self, output: Any) -> Logits:
        """The logits [batch, seq, vocabulary] of what the body gave."""
        if self.body is self.model:
            return output.logits  # type: ignore[no-any-return]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        head = partial(self._behind, self.body, output)
        vocabulary = self.model.config.get_text_config().vocab_size
        return LazyLogits(output.last_hidden_state, head, vocabulary, trained)

    def _behind(self, body: nn.Module, output: Any, hidden: Tensor) -> Tensor:
        """[tokens, width] -> [tokens, vocabulary]."""
        given = replace(output, last_hidden_state=hidden[None])
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with patched({body: lambda *args, **kwargs: given}):
            return run(self.model, tokens).logits[0]  # type: ignore[no-any-return]


@torch.no_grad()
def _called(model: PreTrainedModel, tokens: Tensor) -> nn.Module | None:
    """The outermost of the models within a model that its forward calls: OPT's is no child of its own."""
    from transformers import PreTrainedModel

    inner = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model]
    calls: list[nn.Module] = []
    with _watched(inner, calls):
        run(model, tokens)
    return calls[-1] if calls else None


def _watched(modules: Sequence[nn.Module], calls: list[nn.Module]) -> ExitStack:
    """Inside, which of the modules have run is noted, in the order in which they end."""
    stack = ExitStack()
    for module in modules:
        handle = module.register_forward_hook(lambda module, inputs, output: calls.append(module))
        stack.callback(handle.remove)
    return stack
