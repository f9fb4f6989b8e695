"""The address that `small.spaces` had in version 0.1; it works until 0.3."""

from ..spaces import *  # noqa: F403
