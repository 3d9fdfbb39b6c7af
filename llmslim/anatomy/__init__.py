"""See any transformer the same way: stacks, blocks, attention, MLP, as views on the real modules."""

from llmslim.anatomy.anatomy import Anatomy, Stack
from llmslim.anatomy.block import Block
from llmslim.anatomy.family import Family
from llmslim.anatomy.parts import MLP, Attention, Experts, Projection

__all__ = ["MLP", "Anatomy", "Attention", "Block", "Experts", "Family", "Projection", "Stack"]
