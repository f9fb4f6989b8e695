"""Checks that the settings of all small experiments make."""

from collections.abc import Mapping


def below(owner: object, least: Mapping[str, float]) -> list[str]:
    """A sentence for each field of `owner` that is below its least."""
    values = {name: getattr(owner, name) for name in least}
    return [f"{name} {value} must be at least {least[name]}" for name, value in values.items() if value < least[name]]
