"""Quality, time and memory of quantizing SmolLM2-135M.

    python evals/quantization.py                              all variants: hours on one core
    python evals/quantization.py --variants 'gptq/4-bit-*'    some of them, by pattern; --list names them
    python evals/quantization.py --windows 2 --num-samples 2 --variants rtn/4-bit-sym --output /tmp/try.json

Each variant is quantized in a fresh process (group 64, 32 x 512 tokens), and the saved checkpoint is then
judged in another: perplexity, KL and top-1 agreement against the base in float32, over the first 16 windows
of 512 tokens of WikiText-2 test (rows concatenated as they are, no BOS) and of C4. The C4 data set here has
one split, so its first 200 documents are the test and calibration takes its windows from the others.

A variant that is in the results file with the same options is not run again unless --again.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import record
import tables

SCHEMES = {
    "4-bit-asym": ["--bits", "4", "--no-symmetric"],
    "4-bit-sym": ["--bits", "4", "--symmetric"],
    "3-bit-asym": ["--bits", "3", "--no-symmetric"],
    "3-bit-sym": ["--bits", "3", "--symmetric"],
    "2-bit-asym": ["--bits", "2", "--no-symmetric"],
    "8-bit-sym": ["--bits", "8", "--symmetric"],
}
METHODS = {  # name -> flags and whether it looks at a text; what stands first is run first
    "rtn-search": (["--method", "rtn", "--search"], False),
    "rtn": (["--method", "rtn"], False),
    "gptq": (["--method", "gptq"], True),
}
C4_TEST_DOCUMENTS = 200


def variants() -> dict[str, tuple[list[str], str | None]]:
    """Name -> flags of `quantize`, and the text it is calibrated on."""
    found: dict[str, tuple[list[str], str | None]] = {}
    for scheme, bits in SCHEMES.items():
        for method, (flags, calibrated) in METHODS.items():
            for text in ("wikitext", "c4") if calibrated else (None,):
                found["/".join(filter(None, (method, scheme, text)))] = (flags + bits, text)
    return found


def texts(data: str, work: Path) -> dict[str, str]:
    """The texts by name: `wikitext` and `c4` to calibrate on, each with `-test` to judge by."""
    prefix = f"{Path(data).absolute()}/" if data else ""
    wikitext = f"{prefix}Salesforce/wikitext:wikitext-2-raw-v1"
    calibration, test = work / "c4.jsonl", work / "c4-test.jsonl"
    if not (calibration.exists() and test.exists()):
        sys.path.insert(0, str(record.ROOT))
        from llmslim.loaders.rows import load_rows

        rows = load_rows(f"{prefix}allenai/c4:en:validation")
        work.mkdir(parents=True, exist_ok=True)
        for path, part in ((test, rows[:C4_TEST_DOCUMENTS]), (calibration, rows[C4_TEST_DOCUMENTS:])):
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in part))
    return {
        "wikitext": f"{wikitext}:validation",
        "wikitext-test": f"{wikitext}:test",
        "c4": str(calibration),
        "c4-test": str(test),
    }


def measure(name: str, options: Namespace, text: dict[str, str]) -> dict[str, Any]:
    """Quantize one variant and judge it."""
    flags, calibration = variants()[name]
    folder = options.work / name.replace("/", "-")
    command = record.llmslim("quantize", "demo", *flags, "--group-size", str(options.group_size))
    command += ["--seed", str(options.seed), "--no-evaluate"]
    if calibration:
        command += ["--calibration", text[calibration], "--num-samples", str(options.num_samples)]
        command += ["--seq-len", str(options.seq_len)]
    report, cost = record.quantized(command, folder)
    quality = {which: judge(folder, text[f"{which}-test"], options) for which in ("wikitext", "c4")}
    if not options.keep:
        shutil.rmtree(folder)
    return {
        "name": name,
        "options": settings(options),
        **cost,
        **record.outcome(report),
        "recipe": report["recipe"]["steps"],
        "quality": quality,
    }


def judge(folder: Path, text: str, options: Namespace) -> dict[str, Any]:
    words = ["--base", "demo", "--perplexity", text, "--seq-len", "512", "--windows", str(options.windows)]
    done = record.run(record.llmslim("evaluate", str(folder), *words, "--dtype", "float32", "--json"))
    figures: dict[str, Any] = json.loads(done.stdout)
    kept = ("perplexity", "base_perplexity", "nll_increase", "kl", "top1_agreement")
    named = {key: value for key, value in figures.items() if key.removesuffix("_stderr") in kept}
    named["protocol"] = figures["protocol"].removeprefix(f"{text}: ")  # where the text lies here tells nobody
    return {**named, **record.pick(figures, "windows", "seq_len", "data_hash", "dtype")}


def settings(options: Namespace) -> dict[str, int]:
    names = ("group_size", "num_samples", "seq_len", "windows", "seed", "threads")
    return {name: getattr(options, name) for name in names}


def worse_than_simpler(rows: list[dict[str, Any]]) -> list[str]:
    """Figures in which a method is worse than a simpler one (METHODS is in that order): each is a bug."""
    rank = list(METHODS)
    lines = []
    for row in rows:
        method, scheme = row["name"].split("/")[:2]
        for other in rows:
            simpler, same = other["name"].split("/")[:2]
            if same != scheme or rank.index(simpler) >= rank.index(method):
                continue
            for text, quality in row["quality"].items():
                mine, theirs = quality["perplexity"], other["quality"][text]["perplexity"]
                if mine > theirs:
                    lines.append(f"{row['name']} on {text}: {mine:.2f}, {other['name']} {theirs:.2f}")
    return lines


def main() -> None:
    made = record.sweep(__doc__ or "", "quantization")
    made.add_argument("--keep", action="store_true", help="keep the checkpoints in the work folder")
    made.add_argument("--group-size", type=int, default=64)
    options = record.parse(made)
    chosen = [name for name in variants() if any(fnmatch(name, pattern) for pattern in options.variants)]
    if options.list or not chosen:
        sys.exit("\n".join(variants()))
    result = record.opened(options)
    done = {row["name"] for row in result["rows"] if row["options"] == settings(options)}
    text = texts(options.data, options.work)
    for name in chosen:
        if options.again or name not in done:
            record.put(result, measure(name, options, text), options.output)
    order = list(variants())
    result["rows"].sort(key=lambda row: order.index(row["name"]))
    record.write(result, options.output)
    print(tables.quantization(result))
    for line in worse_than_simpler(result["rows"]):
        print(f"WORSE THAN A SIMPLER METHOD: {line}")


if __name__ == "__main__":
    main()
