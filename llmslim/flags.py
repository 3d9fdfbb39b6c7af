"""Command-line flags from pydantic fields: one definition serves Python, YAML, the command line and its help.

A flag that is not typed leaves no trace, so that defaults live in the fields alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from llmslim.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations, has no defaults, and whose errors are `UserError`s."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=32, width=100
            ),
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`).")

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """What was typed, by destination.

        Raises:
            UserError: for an unknown option, with the nearest known one.
        """
        parsed, unknown = self.parse_known_intermixed_args(argv)
        for word in unknown:
            option = word.split("=")[0]
            if option.startswith("-"):
                raise UserError(
                    f"Unknown option {option}{nearest(option, self.options())}; "
                    f"`{self.prog} --help` lists all."
                )
        if unknown:
            raise UserError(f"{unknown[0]!r} is one word too many: `{self.usage_line()}`.")
        return vars(parsed)

    def options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option[:2] == "--"]

    def format_usage(self) -> str:
        return f"usage: {self.usage_line()}\n"

    def format_help(self) -> str:
        self.usage = self.usage_line()
        return super().format_help()

    def usage_line(self) -> str:
        """The verb and its positional arguments."""
        words = [
            f"[{a.metavar} ...]" if a.nargs == "*" else str(a.metavar)
            for a in self._actions
            if not a.option_strings
        ]
        return " ".join([self.prog, *words, "[options]"])


def add_field(
    group: Any, dest: str, field: FieldInfo, *, flag: str | None = None, default: str | None = None
) -> None:
    """Give a field a flag.

    A bool becomes --x/--no-x; a tuple is given one by one (`--include P --include Q`), of numbers at once
    (`--drop 3,7`); a mapping of patterns to options entry by entry (`--override
    'PATTERN:bits=8,group_size=32'` for `overrides`), of which the field's title is the form, with an example.

    Args:
        group: a parser or a group of one.
        dest: key of the value in what `Parser.parse` returns; its last part names the flag.
        flag: another name for it.
        default: what help says of the default, instead of the field's own.
    """
    name = dest.rsplit(".", 1)[-1]
    annotation, origin = field.annotation, get_origin(field.annotation)
    options: dict[str, Any] = {"dest": dest, "help": _help(field, default)}
    if annotation in (bool, bool | None):
        options["action"] = argparse.BooleanOptionalAction
    elif origin is dict:
        name, form, example = name.removesuffix("s"), str(field.title), (field.examples or [""])[0]
        options |= {"action": _Entries, "type": partial(_entry, form, example), "metavar": f"'{form}'"}
    elif origin is tuple and int in get_args(annotation):
        options |= {"type": number_or_text, "metavar": "N,N,..."}
    elif origin is tuple:
        options |= {"action": "append", "metavar": "PATTERN" if name in ("include", "exclude") else "TEXT"}
    else:
        options |= {"type": str if annotation is str else number_or_text, "metavar": _metavar(annotation)}
    group.add_argument(flag or f"--{name.replace('_', '-')}", **options)


def merged(fields: dict[str, FieldInfo]) -> FieldInfo:
    """One field for the flag that several methods share: help says for each what it means and which words it takes.

    Args:
        fields: by method. Their types are the same, except that each may take words of its own (Literal); which of
            them a method takes, its own field checks.
    """
    texts: dict[str, list[str]] = {}
    for method, field in fields.items():
        texts.setdefault(field.description or "", []).append(method)
    first = next(iter(fields.values()))
    if len(texts) == 1:
        return first
    words = dict.fromkeys(word for field in fields.values() for word in _words(field.annotation))
    annotation = Literal[tuple(words)] if words else first.annotation
    description = "; ".join(f"{' and '.join(methods)}: {text}" for text, methods in texts.items())
    return FieldInfo(annotation=annotation, default=first.default, description=description)  # type: ignore[arg-type]


def _words(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


class _Entries(argparse.Action):
    """Gathers entries of a mapping."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **value})


def _entry(form: str, example: str, text: str) -> dict[str, dict[str, Any]]:
    """{'*.down_proj': {'bits': 8}} from '*.down_proj:bits=8'; {'full': {}} from 'full' where options may be missing."""
    if "[" in form and text and not set(text) & set(":="):
        return {text: {}}
    name, _, rest = text.rpartition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if not name or not all(key and equals and value for key, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}, such as {example!r}")
    return {name: {key: number_or_text(value) for key, _, value in pairs}}


def number_or_text(text: str) -> Any:
    """8 from '8', 0.5 from '0.5', True from 'true'; anything else stays text. Fields check the value."""
    if text in ("true", "false"):
        return text == "true"
    kinds: tuple[Callable[[str], Any], ...] = (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _metavar(annotation: Any) -> str:
    """N, X, TEXT or the choices, from a type."""
    names = {int: "N", float: "X", str: "TEXT", type(None): ""}
    options = [annotation] if get_origin(annotation) is Literal else get_args(annotation) or [annotation]
    words: list[str] = []
    for option in options:
        choices = get_args(option) if get_origin(option) is Literal else ()
        words += [str(choice) for choice in choices] or [names.get(option, "VALUE")]
    return "|".join(word for word in words if word)


def _help(field: FieldInfo, default: str | None) -> str:
    text = field.description or ""
    if default is None:
        default = default_text(field.get_default(call_default_factory=True))
    return (f"{text} (default: {default})" if default else text).replace("%", "%%")


def default_text(value: Any) -> str:
    """A default as help shows it; empty for nothing."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None or value in ((), {}, "") else str(value)
