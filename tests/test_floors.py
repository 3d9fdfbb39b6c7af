"""The floors of the house: imports go down, never up or sideways; importing llmslim imports nothing heavy.

Imports are read from the source with ast, so that one inside a function or for type checkers alone counts
too: a type that a floor knows is a floor that it depends on.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from llmslim.step import ROOMS

PACKAGE = Path(__file__).parent.parent / "llmslim"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__", "cli", "commands", "flags", "generation", "inspection", "progress"),
    (
        "pipeline",
        "identity",
        "prepare",
        "plan",
        "recipe",
        "report",
        "hub",
        "passes",
        "together",
        "survey",
        "teacher",
        "work",
        "measure",
        "size",
        "outlook",
    ),
    ("evaluation", "checkpoint", "plugin"),
    (
        "quantization",
        "pruning",
        "sharing",
        "factorization",
        "kvcache",
        "recovery",
        "distillation",
        "finetuning",
    ),
    ("training",),
    ("lineage", "step", "linear_step", "edit", "experts", "sparse", "masks", "lowrank", "ties", "metrics"),
    ("calibration",),
    ("anatomy", "loaders", "history"),
    ("errors", "files", "memory", "process", "ranks", "cpu"),
)
"""From the roof down, each a set of rooms (packages) and single modules of DESIGN.md and their like."""

ORDERED = {
    # Rooms of one floor that are no alternatives to each other: the earlier may use the later.
    "cli": ("__main__", "cli", "commands", "inspection", "generation", "flags", "progress"),
    "pipeline": (
        "pipeline",
        "identity",
        "prepare",
        "measure",
        "hub",
        "report",
        "plan",
        "outlook",
        "together",
        "survey",
        "teacher",
        "passes",
        "recipe",
        "size",
        "work",
    ),
    "evaluation": ("evaluation", "plugin", "checkpoint"),
    "step": (
        "lineage",
        "linear_step",
        "step",
        "experts",
        "sparse",
        "edit",
        "masks",
        "lowrank",
        "ties",
        "metrics",
    ),
    "files": ("files", "errors"),
}


class Import(NamedTuple):
    """`importer` (a dotted module) imports `imported` in that line."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def imports_of(path: Path) -> list[Import]:
    """Every import of a module of llmslim in a source file, wherever it stands."""
    importer = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    found: list[Import] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [str(node.module)]
            if names == ["llmslim"]:  # `from llmslim import pipeline`
                names = [f"llmslim.{alias.name}" for alias in node.names]
        found += [Import(importer, name, node.lineno) for name in names if name.split(".")[0] == "llmslim"]
    return found


def room_of(module: str) -> str:
    """The room or single module below llmslim; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def floor_of(room: str) -> int:
    """0 is the roof."""
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def allowed(importer: str, imported: str) -> bool:
    """Whether a room may import another: down, or within itself, or along the order of its floor."""
    if importer == imported:
        return True
    above, below = floor_of(importer), floor_of(imported)
    if above != below:
        return above < below
    order = next((rooms for rooms in ORDERED.values() if importer in rooms), ())
    return imported in order and order.index(importer) < order.index(imported)


SOURCES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for path in SOURCES for found in imports_of(path)]


def test_every_room_has_a_floor() -> None:
    placed = {room for rooms in FLOORS for room in rooms}
    rooms = {room_of(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)) for path in SOURCES}
    assert rooms - {"__init__"} <= placed
    assert set(ROOMS) <= set(FLOORS[3])
    assert len(placed) == sum(map(len, FLOORS))
    for order in ORDERED.values():
        assert len({floor_of(room) for room in order}) == 1


def breaks(found: Import) -> bool:
    importer, imported = room_of(found.importer), room_of(found.imported)
    return bool(importer and imported) and not allowed(importer, imported)


@pytest.mark.parametrize("importer", sorted({room_of(found.importer) for found in IMPORTS} - {""}))
def test_imports_go_down(importer: str) -> None:
    assert not [str(found) for found in IMPORTS if room_of(found.importer) == importer and breaks(found)]


def test_the_rule_itself() -> None:
    assert allowed("pipeline", "plan") and allowed("quantization", "calibration") and allowed("step", "edit")
    assert not allowed("plan", "pipeline") and not allowed("quantization", "checkpoint")  # up
    assert not allowed("quantization", "pruning") and not allowed("pruning", "quantization")  # sideways
    assert not allowed("anatomy", "loaders") and not allowed("loaders", "anatomy")
    assert not allowed("errors", "loaders")


def test_the_package_itself_is_imported_for_no_public_name() -> None:
    """`llmslim.load` in a room would be a way past the floors: everything public hangs on the package."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                public = node.value.id == "llmslim" and not node.attr.startswith("__")
                assert not public, f"{path}:{node.lineno} takes {node.attr} from the package"


def test_importing_llmslim_or_its_doors_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, llmslim, llmslim.cli, llmslim.commands.run, llmslim.errors, llmslim.flags; "
    code += "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_help_of_a_step_imports_no_transformers() -> None:
    """The fields of the steps need torch, which is half of the wait already."""
    code = "import sys; from llmslim.commands.run import step_parser; step_parser('x', 'quantize').format_help(); "
    code += "print([n for n in ('transformers', 'compressed_tensors', 'datasets') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
