"""The one exception that a command shows without a traceback, and the exit status it leads to."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """What the user gave cannot be used. The message is one sentence that names the fix."""


def exit_status(command: Callable[[], None]) -> int:
    """Run a command: 0; 2 for a UserError, printed as `error: ...`; 130 where it was interrupted."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
