"""Checks that the settings of all small experiments make."""

from collections.abc import Mapping, Sequence

from llm.common.errors import UserError

# Fields of settings that the command line calls otherwise; run.json has them by these names.
OPTIONS = {
    "snapshot_every": "evaluate-every", "test_every": "evaluate-every", "until": "stop-accuracy", "products": "dtype",
}  # fmt: skip


def below(owner: object, least: Mapping[str, float]) -> list[str]:
    """A sentence for each field of `owner` that is below its least."""
    values = {name: getattr(owner, name) for name in least}
    return [
        f"{OPTIONS.get(name, name)} {value} must be at least {least[name]}"
        for name, value in values.items()
        if value < least[name]
    ]


def refuse(problems: Sequence[str]) -> None:
    """UserError with all problems together, if there are any."""
    if problems:
        raise UserError("; ".join(problems))
