"""The README shows the committed results, and the script that puts them there does what it says."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "evals"))

import kv_cache  # noqa: E402
import kv_plots  # noqa: E402
import pareto  # noqa: E402
import render  # noqa: E402
import tables  # noqa: E402
import tables_cost  # noqa: E402
import variants  # noqa: E402

MARKED = f"# Title\n\nbefore\n{render.BEGIN}\nold\n{render.END}\nafter\n"


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, list[str]]:
    """A README with markers beside one results file, and the arguments that name them."""
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(MARKED)
    results.mkdir()
    row = {
        "name": "9 blocks",
        "blocks": 9,
        "parameters": 1_100_000_000,
        "base_mb": 2200.0,
        "peak_memory_mb": {"process": 1500.0},
        "planned_peak_mb": 1650.0,
        "planned_over_measured": 1.1,
        "cpu_seconds": {"steps": 100.0},
        "wall_seconds": 120.0,
    }
    double = {**row, "name": "18 blocks", "blocks": 18, "base_mb": 4400.0, "wall_seconds": 180.0}
    result = {
        "command": "python evals/memory.py",
        "machine": {"cpu": "A Fine CPU", "avx2": True, "avx512_bf16": False},
        "versions": {"torch": "9.9"},
        "threads": 1,
        "date": "2026-11-24T10:00:00+00:00",
        "rows": [row, double],
    }
    (results / "memory.json").write_text(json.dumps(result))
    return readme, ["--readme", str(readme), "--results", str(results)]


def test_readme_shows_the_results():
    readme = ROOT / "README.md"
    if readme.exists() and render.BEGIN in readme.read_text("utf-8"):
        assert render.main(["--check"]) == 0


def test_every_committed_result_is_rendered_and_placed():
    for path in (ROOT / "evals" / "results").glob("*.json"):
        result = json.loads(path.read_text("utf-8"))
        assert path.stem in render.SECTIONS, f"{path.name} is shown nowhere"
        assert {"command", "machine", "versions", "threads", "seed", "date", "rows"} <= set(result)
        assert result["rows"]
        text = render.SECTIONS[path.stem][1](result)
        for table in (part for part in text.split("\n\n") if part.startswith("|")):
            columns = {line.count(" | ") for line in table.splitlines()}
            assert len(columns) == 1, f"{path.name} renders to a ragged table"
        lines = text.splitlines()
        for row in result[
            "rows"
        ]:  # in a line of its own, in the column of its share, or of its task (the heading)
            name, _ = variants.seeded(row["name"])
            parts = [part for part in name.split("/") if part not in tables.CURVE]
            if path.stem == "glue":
                assert parts[0] in lines[0] and any(parts[1] in line for line in lines[1:])
                continue
            if path.stem == "kv_cache":  # a column per what was measured, a line per cache
                assert any(parts[1] in line for line in lines[1:])
                continue
            assert name == "base" or any(
                name in line or all(part in line for part in parts) for line in lines
            )


def test_what_is_repeated_has_three_seeds():
    """The sentence below a table says so."""
    for path in (ROOT / "evals" / "results").glob("*.json"):
        seeds: dict[str, set[int]] = {}
        for row in (rows := json.loads(path.read_text("utf-8"))["rows"]):
            name, seed = variants.seeded(row["name"])
            seeds.setdefault(name, set()).add(seed or 0)
            assert seed is None or row["options"]["seed"] == seed
        assert all(found in ({0}, {0, 1, 2}) for found in seeds.values()), path.name
        assert len(rows) == sum(map(len, seeds.values()))


def test_a_variant_of_a_seed_is_made_apart(tmp_path: Path):
    options = Namespace(seed=0, work=tmp_path, threads=1)
    assert variants.of_seed("rte/taught", options) == ("rte/taught", options)
    assert variants.again(["rte/taught"], (3,)) == ["rte/taught/seed-3"]
    name, own = variants.of_seed("rte/taught/seed-3", options)
    assert name == "rte/taught" and vars(own) == {"seed": 3, "work": tmp_path / "seed-3", "threads": 1}
    assert options.seed == 0


def test_only_variants_without_a_row_of_their_seed_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "evals" / "glue.py")])
    output, asked = tmp_path / "r.json", []
    words = ["--variants", "a*", "--threads", "1", "--output", str(output), "--work", str(tmp_path)]

    def measure(name: str, options: Namespace) -> dict:
        asked.append((name, options.seed))
        return {"name": name, "options": variants.settings(options)}

    def run(order: list[str]) -> list[str]:
        asked.clear()
        options = variants.parser("", "r").parse_args(words)
        variants.each(options, order, measure, lambda result: "")
        return [row["name"] for row in json.loads(output.read_text())["rows"]]

    assert run(["a", "b"]) == ["a"] and asked == [("a", 0)]
    order = ["a", "b", *variants.again(["a", "b"])]
    assert run(order) == ["a", "a/seed-1", "a/seed-2"] and asked == [("a", 1), ("a", 2)]
    assert run(order) and not asked


def test_seeds_are_a_mean_and_its_spread():
    def row(name: str, value: float, **more: object) -> dict:
        cost = {"cpu_seconds": {"steps": 100 * value}, "peak_memory_mb": {"process": 5.0}}
        size, quality = {"size": {"bytes_on_disk": 2e6}}, {"quality": {"perplexity": value}}
        scores = {"metrics": {"accuracy": {"value": value / 100}}, "score": value / 100}
        return {"name": name, **cost, **size, **quality, **scores, **more}

    rows = [
        row(f"rte/{kind}{seed}", value, kind=kind, task="rte")
        for kind, values in (("teacher", (60.0, 64.0, 68.0)), ("taught", (50.0, 50.0, 56.0)))
        for seed, value in zip(("", "/seed-1", "/seed-2"), values, strict=True)
    ]
    table = tables.glue({"rows": [*rows, row("sst2/teacher", 90.0, kind="teacher", task="sst2")]})
    assert "| teacher | 64.0 ± 4.0 | 90.0 | 77.0 | 100.0 % | 2.0 | 15400 |" in table
    assert "| taught | 52.0 ± 3.5 |  | 52.0 | 81.2 % | 2.0 | 5200 |" in table and "three seeds" in table
    assert "±" not in tables.glue({"rows": rows[:1]})

    lost = [row("base", 30.0), row("cut/untrained", 50.0), row("cut/untrained/seed-1", 54.0)]
    won = [row(name, value, minutes=7) for name, value in (("cut/a", 40.0), ("cut/a/seed-1", 42.0))]
    table = tables.recovery({"rows": lost + won})
    assert "| cut/untrained | 2.0 |  | 52.00 ± 2.83 |  |  |  | 5200 | 5 |" in table
    assert "| cut/a | 2.0 | 7 | 41.00 ± 1.41 | 50 % |  |  | 4100 | 5 |" in table


def test_write_then_check(project):
    readme, places = project
    assert render.main(["--check", *places]) == 1
    assert render.main(["--write", *places]) == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\nbefore\n{render.BEGIN}\n") and text.endswith(
        f"\n{render.END}\nafter\n"
    )
    assert (
        "old" not in text and "A Fine CPU (AVX2, no AVX512-BF16), one thread; torch 9.9; 2026-11-24" in text
    )
    assert "| 1.10B, 9 blocks | 2.20 GB | 1.50 GB | 1.65 GB (1.10x) | 100 | 120 |" in text
    assert "| 2x the blocks | 2.00x | 1.00x |  | 1.00x | 1.50x |" in text
    assert render.main(["--check", *places]) == 0
    readme.write_text(text.replace("1.50 GB", "1.49 GB", 1))
    assert render.main(["--check", *places]) == 1


@pytest.mark.parametrize("text", ["none", f"{render.END} {render.BEGIN}", MARKED + MARKED])
def test_markers_must_stand_once_and_in_order(text: str):
    with pytest.raises(ValueError, match="once each"):
        render.replaced(text, "new")


def test_the_front_is_a_front():
    found = pareto.points(pareto.RESULTS)
    best = pareto.front(found)
    assert {point.source for point in found} >= {"base", "pruning", "quantization"}
    assert len(set(best)) == len(best) and set(best) <= set(found)

    def beats(one: pareto.Point, other: pareto.Point) -> bool:
        no_worse = one.bytes <= other.bytes and one.perplexity <= other.perplexity
        return no_worse and one[2:] != other[2:]

    assert not any(beats(one, other) for one in found for other in best)
    assert all(any(one[2:] == other[2:] or beats(one, other) for one in best) for other in found)


def test_one_seed_is_drawn(tmp_path: Path):
    row = {"quality": {**pareto.PROTOCOL, "perplexity": 40.0}, "size": {"bytes_on_disk": 5, "parameters": 2}}
    rows = [{"name": name, **row} for name in ("a", "a/seed-1", "b")]
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows}))
    assert [point.name for point in pareto.points(tmp_path)] == ["a", "b"]


def test_only_rows_of_one_protocol_are_compared():
    quality = {**pareto.PROTOCOL, "perplexity": 40.0}
    assert pareto.comparable({"quality": quality}) == 40.0
    assert pareto.comparable({"quality": {"wikitext": quality, "c4": {"perplexity": 1.0}}}) == 40.0
    assert pareto.comparable({"options": {"model": "another"}, "quality": quality}) is None
    for name in pareto.PROTOCOL:
        assert pareto.comparable({"quality": {**quality, name: 3}}) is None
    assert pareto.comparable({"cosine": {"mean": 0.9}}) is None


def test_the_picture_shows_the_front_of_the_committed_results(tmp_path: Path):
    pytest.importorskip("matplotlib")
    pareto.main(["--output", str(tmp_path / "pareto.svg")])
    for path in (tmp_path / "pareto.svg", pareto.RESULTS / "pareto.svg"):
        drawn = path.read_text("utf-8")
        for point in pareto.front(pareto.points(pareto.RESULTS)):
            assert f"<!-- {point.name}, {point.perplexity:.1f} -->" in drawn, f"run evals/pareto.py: {point}"


def test_kv_caches_along_the_text_and_by_length(tmp_path: Path, project):
    pytest.importorskip("matplotlib")
    header = json.loads((tmp_path / "results" / "memory.json").read_text())
    along = {"perplexity": 2.0, "kl": 0.3, "kl_by_position": [0.0, 0.25]}
    length = {
        "lengths": [10, 20],
        "full_bytes": [8, 9],
        "bytes": [2, 3],
        "full_ms": [4.0, 9.0],
        "ms": [2.0, 3.0],
    }
    grid = {
        "lengths": [5],
        "depths": [0.0, 1.0],
        "numbers": [7, 8],
        "exact": [[1.0, 0.5]],
        "logprob": [[-0.1, -1]],
    }
    rows = {
        "quality/full": {"perplexity": 2.0},
        "quality/k-4": along,
        "length/k-4": length,
        "needle/k-4": grid,
    }
    rows["tokenwise/k-4"] = {"kl": 0.5}
    result = {**header, "rows": [{"name": name, **row} for name, row in rows.items()]}
    text = tables_cost.kv_cache(result)
    assert "k-4 0.5000 (0.2500)." in text and "k-4 3 of 4." in text and "k-4 2.00x, 3.00x." in text

    folder = tmp_path / "kv"
    folder.mkdir()
    (folder / "kv_cache.json").write_text(json.dumps(result))
    assert "svg" not in render.rendered(folder)
    kv_plots.curves(result, folder / "kv_cache.svg")
    kv_plots.heat_maps(result, folder / "kv_needle.svg")
    assert all("</svg>" in path.read_text("utf-8") for path in folder.glob("*.svg"))
    assert "(evals/results/kv_cache.svg)" in (shown := render.rendered(folder)) and "kv_needle.svg)" in shown


def test_differences_from_the_full_cache():
    torch = pytest.importorskip("torch")
    full, found = torch.randn(2, 6, 11).log_softmax(-1)
    window = torch.randint(11, (6,))
    kl, more = kv_cache.difference(found, full, window)
    wanted = torch.nn.functional.kl_div(found, full, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl, wanted, atol=1e-6) and more.shape == (5,)
    losses = [torch.nn.functional.cross_entropy(one[:-1], window[1:]) for one in (found, full)]
    assert torch.allclose(more.mean(), losses[0] - losses[1], atol=1e-6)
    assert kv_cache.along(torch.arange(512.0)) == [127.5, 383.5]
