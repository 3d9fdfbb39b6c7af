"""llmslim push"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from llmslim.flags import Parser

if TYPE_CHECKING:
    from llmslim.hub import Upload


def parser(prog: str) -> Parser:
    made = Parser(
        prog,
        "Publish the output of a run on the Hugging Face Hub: weights, tokenizer, model card and report, in one\n"
        "commit. Only what was verified goes up. The token comes from HF_TOKEN or `hf auth login`. A push that\n"
        "broke off goes on when the same command is given again.",
        "examples:\n"
        f"  {prog} out/smol-4bit ann/smollm2-4bit --dry-run\n"
        f"  {prog} out/smol-4bit ann/smollm2-4bit --private",
    )
    made.add_argument("folder", metavar="FOLDER", help="the output of a run")
    made.add_argument("repo", metavar="USER/NAME", help="the repository; made if it is not there")
    made.add_argument("--private", action="store_true", help="make the repository private")
    made.add_argument("--dry-run", action="store_true", help="show what would go up, and change nothing")
    made.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files there that are not this run's, delete the rest",
    )
    return made


def run(options: dict[str, Any]) -> None:
    from llmslim.hub import push

    dry_run = options.get("dry_run", False)
    if not dry_run:
        print(f"pushing {options['folder']} to {options['repo']} ...", file=sys.stderr, flush=True)
    done = push(
        options["folder"],
        options["repo"],
        private=options.get("private", False),
        overwrite=options.get("overwrite", False),
        dry_run=dry_run,
    )
    print(told(done, dry_run))


def told(done: Upload, dry_run: bool = False) -> str:
    """The files and what became of them, for a person."""
    going = sum(item.bytes for item in done.items if item.fate not in ("same", "deleted"))
    rows = [f"  {item.bytes / 1e6:>12,.3f} MB  {item.path:<40} {item.fate}".rstrip() for item in done.items]
    if dry_run:
        compared = "" if done.compared else " Without a token the repository was not looked at."
        return "\n".join(
            [f"Would go to {done.url}, {going / 1e6:,.1f} MB:", *rows, f"Nothing was sent.{compared}"]
        )
    if done.commit is None:
        return f"All of it is at {done.url} already."
    return "\n".join([*rows, f"Pushed {going / 1e6:,.1f} MB to {done.url} (commit {done.commit[:10]})."])
