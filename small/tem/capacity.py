"""Capacity of memories: the share that is recalled, against the number that is stored, by each rule.

Whittington et al. 2022, Sections 5 and 6: TEM's memory is linear attention, and so has the capacity of a classical
Hopfield network, which grows with its width; powers have more, and exponentials more still (Demircigil et al. 2017).

    random codes, random symbols -> memories, one after the other -> after each, one of them at random is asked for by
    its code, or by one near it -> share of right symbols

Codes are normal vectors of norm sqrt(K), so that a code's score with itself is sqrt(K), and the exponential's capacity
of the order of e^(2 sqrt(K)); learned codes may be longer. Symbols are one-hot. TEM's places are the same codes, all
with one sum, so that the weights of Equation 10 are constant, as the paper expects them to be learned: one linear step
is then linear attention. A memory that corrects has these places at half the size of codes. Nothing is trained.

Dimension letters: B repeats, S memories, K width of a code.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.common.errors import UserError
from llm.common.processes import progress_bar
from llm.common.tables import text_table

from ..draws import seed_number
from .correcting import recall_correcting
from .memory import RULES, Rule, attention, recall
from .settings import SEPARATIONS, SYMBOLS

MACHINES = {
    "TEM, linear": RULES["linear"], "TEM, paper": RULES["paper"], "TEM, code": RULES["code"].at(10**9)
}  # fmt: skip
CORRECTED = 256  # memories at most of one that corrects: it stores one after the other, and a walk has as many
EQUAL_SUM = 0.05  # times 1 / sqrt(K) is the mean of a place: what a ReLU recalls falls where it is far from 0
WIDEST, MOST = 4096, 16_384  # K: beyond, e^sqrt(K) nears float32's end. S: S^2 weights are 1 GiB
NUMBERS = 2**24  # of attention weights at a time: 64 MB
BINS = 24  # of a curve, of equal ratio
REACHED = 0.9


Rules = Callable[[Tensor, Tensor, Tensor], Tensor]  # codes, symbols, queries -> symbols, of every time


class Curve(NamedTuple):
    """Recall of one rule at one width."""

    rule: str  # one of SEPARATIONS or MACHINES
    width: int  # K
    memories: list[float]  # the mean of each bin
    recall: list[float]  # share of right symbols

    @property
    def capacity(self) -> float:
        """How many memories there are where recall falls below REACHED, between bins on a line; infinite if never."""
        for place, now in enumerate(self.recall):
            if now < REACHED:
                if not place:
                    return self.memories[0]
                share = (self.recall[place - 1] - REACHED) / (self.recall[place - 1] - now)
                return self.memories[place - 1] + share * (self.memories[place] - self.memories[place - 1])
        return math.inf


def measure_capacity(
    widths: Sequence[int], most: int, repeats: int, noise: float, seed: int, device: str = "cpu"
) -> list[Curve]:
    """Curves of every rule at every width.

    Args:
        widths: K.
        most: memories.
        repeats: sets of memories.
        noise: standard deviation of what is added to each component of a query, beside 1 of a code.

    Raises:
        UserError: a number that cannot be.
    """
    in_range = all(1 <= width <= WIDEST for width in widths) and 2 <= most <= MOST
    if not in_range or repeats < 1 or seed < 0 or not 0 <= noise < math.inf:
        raise UserError(
            f"widths must be 1 to {WIDEST:,}, memories 2 to {MOST:,}, repeats at least 1, the seed at least 0, and the "
            "noise finite and not below 0"
        )
    rules: dict[str, Rules] = {name: _attending(name) for name in SEPARATIONS}
    rules |= {name: _remembering(rule) for name, rule in MACHINES.items()}
    edges = torch.logspace(0, math.log10(most + 1), BINS + 1).round().long().unique().tolist()
    bins = [slice(begin - 1, end - 1) for begin, end in itertools.pairwise(edges)]
    curves = []
    asked = [*itertools.product(dict.fromkeys(widths), rules)]
    for width, name in progress_bar(len(asked), 0, "capacity", "curve", iterable=asked, leave=False):
        own = [part for part in bins if not _corrects(name) or part.stop <= CORRECTED]
        curve = _recall(rules[name], width, own[-1].stop, repeats, noise, seed, device)
        means = [curve[part].mean().item() for part in own]
        curves.append(Curve(name, width, [(part.start + 1 + part.stop) / 2 for part in own], means))
    return curves


def _recall(rule: Rules, width: int, most: int, repeats: int, noise: float, seed: int, device: str) -> Tensor:
    """The share of repeats that are right with 1 to `most` memories, (S,)."""
    generator, at_once = torch.Generator().manual_seed(seed_number(seed, "capacity")), max(1, NUMBERS // most**2)
    right = torch.zeros(most, dtype=torch.float64)
    for begin in range(0, repeats, at_once):
        count = min(at_once, repeats - begin)
        codes = math.sqrt(width) * F.normalize(torch.randn(count, most, width, generator=generator), dim=-1)
        symbols = torch.randint(SYMBOLS, (count, most), generator=generator)
        asked = (torch.rand(count, most, generator=generator) * torch.arange(1, most + 1)).long()  # (B, S)
        queries = codes.gather(1, asked[..., None].expand(-1, -1, width))
        queries = queries + noise * torch.randn(queries.shape, generator=generator)
        recalled = rule(codes.to(device), symbols.to(device), queries.to(device))
        right += (recalled.cpu() == symbols.gather(1, asked)).double().sum(0)
    return right / repeats


def _attending(separation: str) -> Rules:
    """TEM-t's memory: codes (B, S, K), symbols (B, S), queries (B, S, K) -> symbols (B, S)."""

    def recalled(codes: Tensor, symbols: Tensor, queries: Tensor) -> Tensor:
        values = F.one_hot(symbols, SYMBOLS).to(codes.dtype)
        found, _ = attention(nn.Identity(), queries, codes, values, separation)
        return found.argmax(-1)

    return recalled


def _remembering(rule: Rule) -> Rules:
    """TEM's memory, of conjunctions of 45 K numbers."""

    def recalled(codes: Tensor, symbols: Tensor, queries: Tensor) -> Tensor:
        sensory, places = F.one_hot(symbols, SYMBOLS).to(codes.dtype), _of_equal_sum(codes)
        if not rule.corrects:
            return recall(sensory, places, _of_equal_sum(queries), rule).argmax(-1)
        walk, asked = ((each * (0.5 * each.shape[-1] ** 0.5)).clamp(-1, 1) for each in (places, _of_equal_sum(queries)))
        walk = torch.cat([walk, walk[:, -1:]], dim=1)  # the place after the last is not stored
        return recall_correcting(sensory, walk, rule, [codes.shape[-1]], None, asked)[0].argmax(-1)

    return recalled


def _of_equal_sum(codes: Tensor) -> Tensor:
    """Places of norm 1 with one sum, near zero, so that they stay unlike: (..., K) -> (..., K)."""
    centred = F.normalize(codes - codes.mean(-1, keepdim=True), dim=-1)
    return F.normalize(centred + EQUAL_SUM * codes.shape[-1] ** -0.5, dim=-1)


def _corrects(name: str) -> bool:
    return name in MACHINES and MACHINES[name].corrects


def capacity_table(curves: Sequence[Curve], most: int) -> str:
    """Where recall falls below REACHED, a row for each rule and a column for each width."""
    widths = sorted({curve.width for curve in curves})
    at = {(curve.rule, curve.width): curve.capacity for curve in curves}
    ends = {curve.rule: min(most, CORRECTED) if _corrects(curve.rule) else most for curve in curves}
    rows = []
    for rule in dict.fromkeys(curve.rule for curve in curves):
        found = [at[rule, width] for width in widths]
        rows.append([rule, *(f"{number:.0f}" if math.isfinite(number) else f"> {ends[rule]}" for number in found)])
    header = [f"memories to a recall of {REACHED}", *(f"width {width}" for width in widths)]
    return text_table(header, rows)
