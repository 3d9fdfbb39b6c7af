"""Anatomy: a model as stacks of blocks, and every parameter of it in a part with a name.

Nothing is copied, wrapped or remembered: each property reads the model anew, so the view stays right while
blocks are dropped and matrices are pruned, packed or factored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmslim.anatomy.block import Block, NamedModule
from llmslim.anatomy.family import TESTED, Family, family_of
from llmslim.anatomy.match import nearest
from llmslim.anatomy.parts import is_matrix, is_norm
from llmslim.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("embeddings", "attention", "mlp", "experts", "norms", "head", "other", "unmatched")
"""Where a parameter can belong; a tied one belongs to the first of its parts in this order."""


class Stack:
    """The blocks of one nn.ModuleList, in the order of execution."""

    def __init__(self, model: PreTrainedModel, family: Family, name: str) -> None:
        self.model, self.name = model, name
        self._family = family

    @property
    def modules(self) -> nn.ModuleList:
        return self.model.get_submodule(self.name)  # type: ignore[return-value]

    @property
    def blocks(self) -> list[Block]:
        return [Block(self.model, self._family, self.name, index) for index in range(len(self.modules))]

    @property
    def is_causal(self) -> bool:
        return self.blocks[0].attention.is_causal

    @property
    def final_norm(self) -> NamedModule | None:
        """The norm that the last block's output passes: the last one beside the ModuleList."""
        parent = self.name.rpartition(".")[0]
        siblings = self.model.get_submodule(parent).named_children()
        norms = [(f"{parent}.{name}".lstrip("."), module) for name, module in siblings if is_norm(module)]
        return norms[-1] if norms else None


class Anatomy:
    """A transformer, seen the same way whatever its family; real or on meta.

    `Anatomy.of(model)` refuses a model that it does not wholly understand. `Anatomy(model)` takes any, to say
    in `unmatched` what is in the way.

    Attributes:
        model: the model itself.
        family: its `config.model_type`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import PreTrainedModel  # slow: not for the help of a command

        if not isinstance(model, PreTrainedModel):
            raise UserError(f"a {type(model).__name__} is not a transformers model; give a PreTrainedModel")
        self.model = model
        self.family: str = model.config.model_type
        self._family = family_of(self.family)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Anatomy:
        """The anatomy of a model, or a UserError that lists what could not be matched."""
        anatomy = cls(model)
        if unmatched := anatomy.unmatched:
            rest = f"; and {len(unmatched) - 8} more" if len(unmatched) > 8 else ""
            raise UserError(
                f"{type(model).__name__} ({anatomy.family}) has parts that llmslim cannot place: "
                f"{'; '.join(unmatched[:8])}{rest}. Supported: {', '.join(TESTED)}, and families that name "
                f"their parts alike; another needs its names in llmslim/anatomy/families/{anatomy.family}.py"
            )
        return anatomy

    @property
    def stacks(self) -> list[Stack]:
        """One for most models; encoder, then decoder for T5.

        They are the ModuleLists of a class that the model never splits over devices, else the longest one.
        """
        lists = [
            (name, module) for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)
        ]
        whole = self.model._no_split_modules or ()
        found = [name for name, blocks in lists if any(type(block).__name__ in whole for block in blocks)]
        if not found and lists:
            found = [max(lists, key=lambda pair: len(pair[1]))[0]]
        return [Stack(self.model, self._family, name) for name in found]

    @property
    def blocks(self) -> list[Block]:
        """All blocks in the order of execution."""
        return [block for stack in self.stacks for block in stack.blocks]

    @property
    def embeddings(self) -> list[NamedModule]:
        """Tables of token, position and type embeddings, dense or packed; a tied one under each name."""
        return [(name, module) for name, module in self._outside() if hasattr(module, "num_embeddings")]

    @property
    def head(self) -> NamedModule | None:
        """The matrix that turns hidden states into logits over the vocabulary, if the model has one."""
        head = self.model.get_output_embeddings()
        return next(((name, module) for name, module in self.model.named_modules() if module is head), None)

    @property
    def tied(self) -> bool:
        """Whether the head and the token embeddings are the same tensor."""
        if self.head is None:
            return False
        embedding = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        return any(id(parameter) in embedding for parameter in self.head[1].parameters())

    @property
    def final_norm(self) -> NamedModule | None:
        """The norm before the head; BERT and its kin have none."""
        return self.stacks[-1].final_norm

    @property
    def is_decoder(self) -> bool:
        """Whether it is a causal language model through and through (T5 is not: see `Stack.is_causal`)."""
        return all(stack.is_causal for stack in self.stacks)

    @property
    def unmatched(self) -> list[str]:
        """What stands in the way: blocks whose parts do not add up, and modules that belong to no part."""
        if not self.stacks:
            return ["no nn.ModuleList of blocks"]
        problems = [problem for block in self.blocks for problem in block.problems()]
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in self.parts()["unmatched"]):
            problems.append(f"{owner or 'model'} ({type(self.model.get_submodule(owner)).__name__})")
        return problems

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Every parameter and saved buffer of the model, once, by its part: part -> dotted name -> tensor."""
        known = self._known()
        best: dict[int, tuple[int, str, Tensor]] = {}
        for name, tensor in _tensors(self.model):
            owner = nearest(name, known)
            rank = PARTS.index(known[owner] if owner else "unmatched")
            if id(tensor) not in best or rank < best[id(tensor)][0]:
                best[id(tensor)] = rank, name, tensor
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
        for rank, name, tensor in best.values():
            parts[PARTS[rank]][name] = tensor
        return parts

    def _known(self) -> dict[str, str]:
        """Dotted name of a module or parameter -> its part, for all that has one."""
        known = {name: "norms" for name, module in self._outside() if is_norm(module)}
        lists = [name for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)]
        for (
            name,
            module,
        ) in self._outside():  # poolers and prediction heads; a list of Linears is an unknown stack
            if is_matrix(module) and not nearest(name, lists):
                known[name] = "other"
        known |= dict.fromkeys((name for name, _ in self.embeddings), "embeddings")
        if self.head:
            known[self.head[0]] = "head"
        for block in self.blocks:
            known |= block.parts()
        return known

    def _outside(self) -> Iterator[NamedModule]:
        """The modules that are in no block."""
        stacks = [stack.name for stack in self.stacks]
        return ((name, module) for name, module in self.model.named_modules() if not nearest(name, stacks))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that are saved, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer
