"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """A request that cannot be met: one sentence with the value received, the reason, and what would work.

    The command line prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """
