"""The one exception that a command shows without a traceback."""


class UserError(Exception):
    """What the user gave cannot be used. The message is one sentence that names the fix.

    Commands print it as `error: ...` and leave with status 2 (see `llm.cli.main`).
    """
