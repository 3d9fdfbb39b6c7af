"""What every result carries, and how a command is run and timed.

Nothing here imports torch: the process that times others stays small, so that it cannot colour their figures.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "compressed-tensors", "datasets", "lm-eval")


def parser(docstring: str, name: str) -> ArgumentParser:
    """The options that all scripts share; `name` is that of the results file."""
    made = ArgumentParser(description=docstring, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=ROOT / "evals" / "results" / f"{name}.json")
    made.add_argument("--threads", type=int, default=1, help="CPU threads, and cores to run on")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--work",
        type=Path,
        default=ROOT / "out" / "evals" / name,
        help="folder for models, emptied after use",
    )
    return made


def sweep(docstring: str, name: str) -> ArgumentParser:
    """The options of a script that measures one variant after another on texts; with those of `parser`."""
    made = parser(docstring, name)
    made.add_argument(
        "--variants", nargs="+", metavar="PATTERN", default=["*"], help="names, or patterns of them"
    )
    made.add_argument("--list", action="store_true", help="name the variants, and stop")
    made.add_argument("--again", action="store_true", help="measure anew what is in the results file")
    shared = ROOT.parent / "shared" / "data"
    there = str(shared) if shared.is_dir() else ""
    made.add_argument("--data", default=there, help="folder of data sets (default: the Hub)")
    made.add_argument("--num-samples", type=int, default=32)
    made.add_argument("--seq-len", type=int, default=512)
    made.add_argument("--windows", type=int, default=16)
    return made


def parse(made: ArgumentParser) -> Namespace:
    """Parse the command line, and keep this process and its children to `--threads` cores."""
    options = made.parse_args()
    options.output, options.work = options.output.absolute(), options.work.absolute()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    os.environ |= {
        "OMP_NUM_THREADS": str(options.threads),
        "MKL_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return options


def machine() -> dict[str, Any]:
    """The CPU by name, what it can do that matters here, and its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = entries.get("flags", "").split()
    return {
        "cpu": entries.get("model name", platform.processor() or platform.machine()),
        "avx2": "avx2" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def fast_type() -> str:
    """The type in which this CPU multiplies matrices fastest."""
    sys.path.insert(0, str(ROOT))
    from llmslim.cpu import fast_bfloat16

    return "bfloat16" if fast_bfloat16() else "float32"


def versions() -> dict[str, str]:
    """Python, llmslim (with its commit) and the packages that figures depend on."""
    sys.path.insert(0, str(ROOT))
    import llmslim

    found = {"python": platform.python_version(), "llmslim": f"{llmslim.__version__} ({commit()})"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is checked out, marked when the package differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip()

    return f"{git('rev-parse', '--short', 'HEAD')}{'+' if git('status', '--short', 'llmslim') else ''}"


def opened(options: Namespace) -> dict[str, Any]:
    """The results file to go on with, or a new one.

    Rows of another machine stay, and say which it was; a file of another seed or thread count is not continued.
    """
    header = {"machine": machine(), "threads": options.threads, "seed": options.seed}
    result: dict[str, Any] = {"rows": []}
    if options.output.exists():
        result = json.loads(options.output.read_text())
        differs = [key for key in ("threads", "seed") if result.get(key) != header[key]]
        if differs:
            sys.exit(
                f"{options.output} was measured with another {' and '.join(differs)}: give --output FILE."
            )
        if result["machine"] != header["machine"]:
            for row in result["rows"]:
                row.setdefault("machine", result["machine"])
    for row in result["rows"]:
        if row.get("machine") == header["machine"]:
            del row["machine"]
    return {
        "command": command_line(),
        **header,
        "versions": versions(),
        "date": now(),
        **pick(result, "rows"),
    }


def pick(record: dict[str, Any], *names: str) -> dict[str, Any]:
    """The entries of those names that are there."""
    return {name: record[name] for name in names if name in record}


def put(result: dict[str, Any], row: dict[str, Any], path: Path) -> None:
    """Add a row, in place of an older one of its name, and write the file whole or not at all."""
    row |= {"command": command_line(), "llmslim_commit": commit(), "date": now()}
    result["rows"] = [old for old in result["rows"] if old["name"] != row["name"]] + [row]
    write(result, path)


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command_line() -> str:
    """As it was typed, from the project's folder."""
    script = Path(sys.argv[0]).resolve()
    return shlex.join(["python", str(script.relative_to(ROOT)), *sys.argv[1:]])


@dataclass(frozen=True)
class Run:
    """A finished command.

    Attributes:
        cpu_seconds: user and system time of the process and all its descendants.
        largest_process_mb: peak resident memory of the largest of them, in MB (10^6 bytes).
    """

    stdout: str
    cpu_seconds: float
    wall_seconds: float
    largest_process_mb: float


def run(command: list[str]) -> Run:
    """Run a command in a fresh process and measure it; its stderr passes through.

    Raises:
        SystemExit: the command failed.
    """
    print("+", shlex.join(command), file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        stdout = out.read()
    if process.returncode:
        sys.exit(f"{stdout}\nfailed with exit code {process.returncode}: {shlex.join(command)}")
    return Run(stdout, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024 / 1e6)


def llmslim(*words: str) -> list[str]:
    return [sys.executable, "-m", "llmslim", *words]


def outcome(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the result itself."""
    return {
        "size": report["size"]["result"],
        "format": report["format"],
        "compute_dtype": report["environment"]["compute_dtype"],
        "notes": len(report["notes"]),
    }


def quantized(command: list[str], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a command such as `quantize` that writes to `folder`; its report, and what it cost.

    cpu_seconds: "steps" is the quantization alone (read, calibrate, solve, write), "command" everything:
    Python's start, imports, the passes, and the verification in a process of its own.
    peak_memory_mb: "process" is the quantizing process before verification, "largest" of all processes.
    """
    done = run([*command, "--output", str(folder), "--overwrite"])
    report = json.loads((folder / "report.json").read_text())
    cost = {
        "cpu_seconds": {
            "steps": round(sum(report["run"]["cpu_seconds"].values()), 1),
            "command": round(done.cpu_seconds, 1),
        },
        "wall_seconds": round(done.wall_seconds, 1),
        "peak_memory_mb": {
            "process": round(report["run"]["peak_memory_mb"], 1),
            "largest": round(done.largest_process_mb, 1),
        },
    }
    return report, cost
