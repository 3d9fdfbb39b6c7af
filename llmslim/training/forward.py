"""Running a model in training: without a cache, with a look at what happens inside, and to write text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llmslim.errors import UserError
from llmslim.loaders.glue import Sentences, Task
from llmslim.loaders.heads import label_columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = Tensor | Mapping[str, Tensor]
"""Tokens int64 [batch, seq], or all that a model takes, by name."""
SHORT = 512  # tokens


class Scores(NamedTuple):
    """What attention softmaxes.

    Attributes:
        values: q k^T / sqrt(head_dim), and what is added by position, float32 [batch, heads, seq, seq].
        allowed: bool, broadcastable to values: which tokens (last) a token sees.
    """

    values: Tensor
    allowed: Tensor


class Seen(NamedTuple):
    """A forward pass: the output, what modules gave in between (the first, of a tuple), what attentions softmaxed."""

    output: Any
    given: list[Tensor]
    scores: list[Scores]


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The output of a model; no cache is made."""
    caches = bool(getattr(model.config, "use_cache", False))
    named = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    return model(**named, use_cache=False) if caches else model(**named)


@torch.no_grad()
def label_logits(
    model: PreTrainedModel,
    task: Task,
    data: Sentences,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> Tensor:
    """What a classifier gives each label of sentences, float32 [sentences, labels], on the CPU.

    Batches are of like length: a padded token costs as much as a real one.

    Raises:
        UserError: for NaN or infinity.
    """
    columns = label_columns(model.config, task)
    order = sorted(range(len(data)), key=lambda index: data.lengths[index])
    found = torch.zeros(len(data), len(columns))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = data.collate([data[index] for index in rows])
        inputs = {name: tensor.to(model.device) for name, tensor in data.inputs(batch).items()}
        found[rows] = run(model, inputs).logits[:, columns].float().cpu()
        if not found[rows].isfinite().all():
            raise UserError(
                "the model's logits hold NaN or infinity, so nothing can be measured: look for such values in its "
                "weights, or load it with dtype float32 if it was made for a wider range"
            )
        progress(start + len(rows), len(order))
    return found


def observe(
    model: nn.Module, inputs: Inputs, modules: Sequence[nn.Module], attentions: Sequence[nn.Module] = ()
) -> Seen:
    """Run a model and look inside.

    Args:
        modules: whose outputs are kept.
        attentions: modules whose scores are kept; they must run on `scaled_dot_product_attention`.
    """
    given: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        given[module] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.callback(module.register_forward_hook(keep).remove)
        found = stack.enter_context(_scores(attentions)) if attentions else {}
        output = run(model, inputs)
    return Seen(output, [given[module] for module in modules], [found[module] for module in attentions])


@contextmanager
def _scores(attentions: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Scores]]:
    """Fill a dict with what each of these modules hands to torch's attention, which keeps no scores itself."""
    found: dict[nn.Module, Scores] = {}
    running: list[nn.Module] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention and running:
                found[running[-1]] = scores_of(*args[:3], **kwargs)
            return func(*args, **kwargs)

    with ExitStack() as stack:
        for module in attentions:
            enter = module.register_forward_pre_hook(lambda module, inputs: running.append(module))
            leave = module.register_forward_hook(lambda module, inputs, output: running.clear())
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(Watch())
        yield found


def scores_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> Scores:
    """The scores of a call of `scaled_dot_product_attention`; arguments are its own."""
    with torch.autocast(query.device.type, enabled=False):  # half a type's digits are gone after the product
        keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
        values = query.float() @ keys.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones(values.shape[-2:], dtype=torch.bool, device=values.device)
    if is_causal:
        allowed = allowed.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:  # what is added: the least number, or infinity, where nothing is seen
        allowed = allowed & (attn_mask > torch.finfo(attn_mask.dtype).min / 2)
        values = values + attn_mask.float().clamp_min(-1e4)
    return Scores(values, allowed)


@contextmanager
def products_in(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Inside, matrix products are computed in that type (autocast); weights keep theirs.

    On a CPU the attention of short sequences stays in float32: the backward pass of torch's fused kernel in bfloat16
    takes 12 times as long at 14 tokens, with AMX, and as long at 512.
    """
    if dtype == torch.float32:
        yield
        return
    with torch.autocast(device, dtype), _ShortAttention() if device == "cpu" else nullcontext():
        yield


class _ShortAttention(TorchFunctionMode):
    """Attention that gradients come back through, in float32 where sequences are short; not when it is recomputed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if (args[0] if args else kwargs["query"]).shape[-2] >= SHORT:
            return func(*args, **kwargs)
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return func(*map(_full, args), **{name: _full(value) for name, value in kwargs.items()}).to(dtype)


def _full(value: Any) -> Any:
    """In float32, if it is a tensor of numbers; a mask of bools stays one."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def sampled(model: nn.Module, prompt: Tensor, length: int, known: int | None = None) -> Tensor:
    """The prompt, int64 [batch, seq], and `length` tokens drawn from a causal model's own distribution.

    Temperature 1, nothing cut off, whatever the model's generation config says; an end-of-text token ends nothing, as
    in the windows of a text. Drawn by torch's own generator, in eval mode.

    Args:
        known: the first so many ids alone are drawn; all when None.
    """
    training = model.training
    model.eval()
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    text, asked, cache = prompt, prompt, None
    for _ in range(length):
        output = model(input_ids=asked, past_key_values=cache, use_cache=True, **last)
        cache = output.past_key_values
        asked = torch.multinomial(output.logits[:, -1, :known].float().softmax(-1), 1)
        text = torch.cat([text, asked], 1)
    model.train(training)
    return text
