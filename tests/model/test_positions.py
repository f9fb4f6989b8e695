"""Rotary positions in two passes against complex multiplication."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from llm.model.fast_rotary import fast_rotate
from llm.model.positions import inverse_frequencies, rotary_angles, rotate


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 30), st.integers(1, 8), st.sampled_from([1.0, 1.7]))
@settings(max_examples=40, deadline=None)
def test_value_and_gradient(batch: int, heads: int, time: int, half: int, scaling: float) -> None:
    x = torch.randn(batch, heads, time, 2 * half, requires_grad=True)
    frequencies = inverse_frequencies(2 * half, 10_000.0, x.device)
    places = torch.randint(500, (batch, time))
    angles = rotary_angles(places, frequencies, scaling, torch.float32)
    turn = torch.polar(torch.tensor(scaling), places[:, None, :, None] * frequencies)  # of the pair (i, i + half)
    turned = torch.complex(*x.chunk(2, dim=-1)) * turn
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    direction = torch.randn_like(x)
    wanted = torch.autograd.grad((expected * direction).sum(), x)[0]
    for found in (rotate(x, angles), fast_rotate(x, angles)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad((found * direction).sum(), x)[0], wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_is_turned_in_float32_and_rounded_once() -> None:
    x = torch.randn(2, 3, 50, 16).bfloat16()
    angles = rotary_angles(torch.arange(50)[None], inverse_frequencies(16, 1e4, x.device), 1.0, torch.float32)
    for turn in (rotate, fast_rotate):
        assert torch.equal(turn(x, angles), turn(x.float(), angles).bfloat16())
        assert turn(x, angles).dtype == torch.bfloat16
