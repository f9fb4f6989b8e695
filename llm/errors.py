"""The address that `llm.common.errors` had in version 0.1; it works until 0.3."""

from .common.errors import *  # noqa: F403
