"""The one exception that is meant for the person at the keyboard, and what it suggests."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A request that cannot be met: one sentence with the value received, the reason, and what would work.

    The command line prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """


class VerificationError(RuntimeError):
    """A saved checkpoint does not give what was made: a defect of llmslim, or of the machine.

    The command line prints it without a traceback and exits with code 1 (`--debug` shows the traceback).
    """


def first_line(error: BaseException) -> str:
    """What an error says, for a message that goes on behind it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' when something known is close to the word, for a message."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
