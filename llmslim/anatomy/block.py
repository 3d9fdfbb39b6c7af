"""A block of a transformer: read anew from the model at each look, so that it is right after every edit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from llmslim.anatomy.family import ATTENTION_ROLES, MLP_ROLES, Family
from llmslim.anatomy.match import Roles, match_roles, nearest, read_attention, read_experts, read_mlp
from llmslim.anatomy.parts import MLP, Attention, Experts, Matrices, features, is_linear, is_matrix, is_norm
from llmslim.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NamedModule = tuple[str, nn.Module]
CACHE_SCALES = ("k_scale", "v_scale")
"""Buffers that an attention may have for the FP8 KV cache of vLLM (`kvcache.fp8`)."""


class Block:
    """One transformer block: its attention, its MLP or experts, its norms."""

    def __init__(self, model: PreTrainedModel, family: Family, stack: str, index: int) -> None:
        self.model, self.index, self.name = model, index, f"{stack}.{index}"
        self._family = family

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.name)

    @property
    def roles(self) -> Roles:
        """site -> role -> dotted name, for the sites attention, cross_attention, mlp, experts, shared_mlp."""
        return match_roles(self.model, self.name, self._family)

    @property
    def attention(self) -> Attention:
        return read_attention(self.model, self.roles["attention"], self._family, self.name)

    @property
    def cross_attention(self) -> Attention | None:
        names = self.roles["cross_attention"]
        return read_attention(self.model, names, self._family, f"{self.name} cross") if names else None

    @property
    def mlp(self) -> MLP | Experts | None:
        roles = self.roles
        if roles["experts"] and roles["mlp"]:
            raise UserError(f"{self.name}: both an mlp and experts")
        if roles["experts"]:
            shared = read_mlp(self.model, roles["shared_mlp"], self.name) if roles["shared_mlp"] else None
            return read_experts(self.model, roles["experts"], shared, self.name)
        return read_mlp(self.model, roles["mlp"], self.name) if roles["mlp"] else None

    @property
    def norms(self) -> list[NamedModule]:
        """All norms inside the block, also those on q and k."""
        return [
            (f"{self.name}.{path}", module) for path, module in self.module.named_modules() if is_norm(module)
        ]

    def linears(self) -> dict[str, nn.Module]:
        """Every dense matrix by its dotted name, in the order of the module tree; never a router.

        Fused experts are 3-D parameters, not modules: see `Experts`; unfused ones are listed in order. Of a
        factored matrix, both factors are listed.
        """
        roles = self.roles
        matrices = (*ATTENTION_ROLES, *MLP_ROLES, "experts")
        owners = {name for names in roles.values() for role, name in names.items() if role in matrices}
        return {
            name: module
            for path, module in self.module.named_modules()
            if is_linear(module) and nearest(name := f"{self.name}.{path}", owners)
        }

    def matrices(self) -> list[Matrices]:
        """All matrices of whatever kind, those of experts too, be they fused or not; for what a block takes."""
        found = []
        experts = self.roles["experts"].get("experts", "\0")
        top_k = getattr(self.model.config.get_text_config(), "num_experts_per_tok", None)
        for path, module in self.module.named_modules():
            name = f"{self.name}.{path}"
            if name == experts:
                stacks = [p.shape for p in module.parameters(recurse=False) if p.ndim == 3]
                found += [Matrices(rows, width, n, top_k or n) for n, rows, width in stacks]
                count = sum(1 for _ in module.children()) or 1
            if is_matrix(module):
                used = (top_k or count) / count if name.startswith(f"{experts}.") else 1.0
                found.append(Matrices(*features(module), used=used))
        return found

    def parts(self) -> dict[str, str]:
        """Dotted name of a module or parameter -> its part (one of PARTS)."""
        parts = {name: "norms" for name, _ in self.norms}
        for site, names in self.roles.items():
            for name in names.values():
                parts[name] = {"cross_attention": "attention", "shared_mlp": "experts"}.get(site, site)
        for name, _ in self.module.named_buffers():
            if name.rpartition(".")[2] in CACHE_SCALES:
                parts[f"{self.name}.{name}"] = "attention"
        return parts

    def problems(self) -> list[str]:
        """Why the block cannot be read; empty if it can."""
        problems = []
        for part in ("attention", "cross_attention", "mlp"):
            try:
                getattr(self, part)
            except UserError as error:
                problems.append(str(error))
        return problems
