"""Path integration against a product for each walker and step."""

import torch

from small.recurrence import path_integration


def test_codes_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    transitions, first = torch.randn(3, 5, 5), torch.randn(4, 5)
    actions = torch.randint(3, (4, 7))
    found = path_integration(first, actions, transitions.flatten(0, 1), lambda old, moved: torch.tanh(old + moved))
    for walker in range(4):
        code = first[walker]
        for time in range(7):
            if time:
                code = torch.tanh(code + code @ transitions[actions[walker, time]])
            torch.testing.assert_close(found[walker, time], code)
