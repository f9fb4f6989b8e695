"""A command that asks for more memory than there is ends with a sentence."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from llm.common.errors import exit_status

HUGE = 1 << 50


@pytest.mark.parametrize("ask", [lambda: torch.empty(HUGE), lambda: np.empty(HUGE), lambda: bytes(HUGE)])
def test_too_large_a_size_is_a_sentence(ask: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: print(ask())) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: this machine's memory is too small for this (") and said.count("\n") == 1
    assert "give smaller sizes" in said


def test_other_errors_of_torch_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        exit_status(lambda: print(torch.zeros(2).reshape(3)))
