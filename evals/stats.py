"""The address that `evals.verdict.statistics` had in version 0.1; it works until 0.3."""

from evals.verdict.statistics import *  # noqa: F403
