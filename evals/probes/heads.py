"""Attention heads at work in context: induction (prefix-matching) and previous-token heads of every layer.

A sequence of random tokens is shown twice (Olsson et al. 2022, "In-context Learning and Induction Heads"). Nothing but
the first copy tells what comes next in the second, so a head that looks there, at the token after the one it stands
on, does induction; a previous-token head is what such a head reads from.

Dimension letters: L layers, H heads, N sequences, B of them at once, T tokens shown, C tokens of a copy, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.exports import ROUNDING, called, check_numbers
from llm.common.errors import UserError
from llm.common.exported import text_config, trained_context
from llm.common.plots import COLOURS, new_figure, style
from llm.common.processes import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORTEST = 3  # in copies of two tokens, the token before is also the one after the last occurrence
BUDGET = 2**26  # float32 numbers held at once: 256 MiB of attention and logits


class HeadScores(NamedTuple):
    """Scores of all heads, [layers][heads] in [0, 1]; losses of the two copies in nats per token; tokens of a copy."""

    prefix_matching: list[list[float]]
    previous_token: list[list[float]]
    loss_first: float
    loss_second: float
    length: int


@torch.inference_mode()
def head_scores(
    model: Any,
    vocabulary: int,
    sequences: int = 16,
    length: int = 50,
    seed: int = 0,
    first_token: int | None = None,
    context: int | None = None,
) -> HeadScores:
    """Prefix-matching and previous-token scores of all heads, and the loss of both copies.

    A sequence is `length` different ids below `vocabulary`, drawn alike, shown twice, after `first_token` where there
    is one (which is then not drawn). `length` shrinks until the model's context (what it was trained with, its
    positions where None) holds 2 `length` + 1 tokens and until there are as many ids; the scores say what it was.
    Models are comparable where it is equal.

    Prefix matching is the mean attention from each token of the second copy to the token after its occurrence in the
    first; previous-token the mean attention from each token to the one before it. The losses leave out the first token
    of either copy, which nothing foretells: both are of the same tokens. Random state and training mode are untouched.
    UserError: the model does not show its attention, or it has room for fewer than SHORTEST tokens twice.
    """
    if sequences < 1:
        raise UserError("no sequence to measure heads on: give at least one")
    length = _fitting(model, vocabulary, length, first_token, context)
    if getattr(model.config, "_attn_implementation", "eager") != "eager":
        raise UserError(_NO_ATTENTION)
    ids = repeated(vocabulary, sequences, length, seed, first_token)  # (N, T)
    parts = []
    with evaluating(model):
        split = ids.split(_rows(model, ids.shape[1], vocabulary))
        for rows in progress_bar(len(split), 0, "heads", "batch", iterable=split, leave=False, delay=1):
            batch = rows.to(model.device)
            output = model(input_ids=batch, output_attentions=True, use_cache=False)
            parts.append((*_sums(output.attentions, length), _copy_losses(output.logits, batch, length)))
            del output  # before the next is made
    prefix, previous, losses = (torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True))  # (L, H) twice, (2,)
    what = f"{called(model)} on repeated tokens"
    check_numbers(-losses, f"log-likelihoods of {what}", most=ROUNDING)
    check_numbers(torch.stack([prefix, previous]), f"attention of {what}")
    first, second = (losses / (sequences * (length - 1))).tolist()
    return HeadScores(
        (prefix / (sequences * length)).tolist(),
        (previous / (sequences * (ids.shape[1] - 1))).tolist(),
        first,
        second,
        length,
    )


_NO_ATTENTION = "the model does not show its attention: load it with attn_implementation='eager'"


def _fitting(model: Any, vocabulary: int, length: int, first_token: int | None, context: int | None) -> int:
    """The longest copy up to `length` that fits the model's context twice and has only different ids."""
    context = trained_context(model.config, {"context": context})
    ids = vocabulary - (first_token is not None and 0 <= first_token < vocabulary)
    fitting = min(length, ids, length if context is None else (context - 1) // 2)
    if fitting < SHORTEST:
        raise UserError(
            f"copies of {fitting} tokens (of {length} asked for, {ids} ids, a context of {context}) do not tell heads "
            f"apart: it takes {SHORTEST} tokens, as many ids, and a model with a context of {2 * SHORTEST + 1}"
        )
    return fitting


def repeated(vocabulary: int, sequences: int, length: int, seed: int, first_token: int | None) -> Tensor:
    """The ids (N, T), T = 2 length, plus 1 with a first token. Within a copy no id comes twice: one occurrence each."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randperm(vocabulary, generator=generator) for _ in range(sequences))
    spared = -1 if first_token is None else first_token
    copy = torch.stack([draw[draw != spared][:length] for draw in draws])  # (N, C)
    start = [] if first_token is None else [torch.full((sequences, 1), first_token)]
    return torch.cat([*start, copy, copy], dim=1)


def _rows(model: Any, tokens: int, vocabulary: int) -> int:
    """Sequences at once: the attention of all layers, and logits with their logarithms, stay within BUDGET numbers."""
    config = text_config(model.config)
    layers, heads = (getattr(config, name, 1) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(config, "vocab_size", vocabulary)
    return max(1, BUDGET // (layers * heads * tokens**2 + 2 * tokens * width))


def _sums(attentions: Sequence[Tensor | None] | None, length: int) -> tuple[Tensor, Tensor]:
    """Attention of each layer (B, H, T, T) summed over tokens and sequences: to the prefix's next token, to the token
    before; (L, H) each, float64 on the CPU. Both are diagonals: entry (t, t - d) of the attention.
    """
    if not attentions or any(layer is None or layer.ndim != 4 for layer in attentions):
        raise UserError(_NO_ATTENTION)
    prefix, previous = [], []
    for layer in attentions:
        assert layer is not None
        to_prefix = layer.diagonal(1 - length, dim1=-2, dim2=-1)[..., -length:]  # (B, H, C): the second copy's tokens
        to_previous = layer.diagonal(-1, dim1=-2, dim2=-1)  # (B, H, T - 1)
        prefix.append(to_prefix.cpu().double().sum(dim=(0, 2)))
        previous.append(to_previous.cpu().double().sum(dim=(0, 2)))
    return torch.stack(prefix), torch.stack(previous)


def _copy_losses(logits: Tensor, ids: Tensor, length: int) -> Tensor:
    """Loss (2,) of the first and of the second copy, summed over sequences and all tokens of a copy but its first.

    logits (B, T, V), ids (B, T); softmax in float32.
    """
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = losses.view(len(ids), -1).cpu().double()  # (B, T - 1): entry t is of token t + 1
    first, second = losses[:, -2 * length + 1 : -length], losses[:, -length + 1 :]  # (B, C - 1) each
    return torch.stack([first.sum(), second.sum()])


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; afterwards, and on an error, every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---- Figures ---------------------------------------------------------------------------------------------------------


def chance_levels(length: int) -> dict[str, float]:
    """Both scores of a head that attends to all visible tokens alike, of two copies of `length` tokens."""
    of_second = [1 / seen for seen in range(length + 1, 2 * length + 1)]
    of_all = [1 / seen for seen in range(2, 2 * length + 1)]
    return {
        "prefix_matching": sum(of_second) / len(of_second),
        "previous_token": sum(of_all) / len(of_all),
    }


def draw_heads(scores_by_name: Mapping[str, list[list[float]]], title: str, least: float = 0.0) -> "Figure":
    """Heat maps of layer and head, one panel a model, on one scale from 0 to the highest score of all, or to `least`.

    A model's strongest head is framed, and named above its panel. Layers and heads count from 0, as in the scores.
    """
    shapes = [(len(scores), len(scores[0])) for scores in scores_by_name.values()]
    layers, heads = (max(sizes) for sizes in zip(*shapes, strict=True))
    columns = 1 if heads > 12 or heads >= 2 * layers else min(2, len(shapes))
    rows = -(-len(shapes) // columns)
    panel = min(max(3.6 / columns * layers / heads, 0.8), 4.0)  # inches; cells nearly square where they can be
    top = max(least, *(max(map(max, scores)) for scores in scores_by_name.values())) or 1.0
    with style():
        figure = new_figure(4.6, rows * (panel + 0.62) + 0.55)
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in panels[len(shapes) :]:
            axes.remove()
        for axes, (name, scores) in zip(panels, scores_by_name.items(), strict=False):
            image = _draw_panel(axes, fill(name, 46 // columns), scores, top)
        figure.suptitle(title, fontsize=11)
        figure.supxlabel("head", fontsize=10)
        figure.supylabel("layer", fontsize=10)
        bar = figure.colorbar(image, ax=panels[: len(shapes)], fraction=0.06, pad=0.02, label="mean attention")
        bar.ax.tick_params(length=2, labelsize=9)
        bar.ax.spines["outline"].set_visible(False)
    return figure


def _draw_panel(axes: Any, name: str, scores: list[list[float]], top: float) -> Any:
    """One model's heat map; the strongest head of equals is the first."""
    from matplotlib.patches import Rectangle

    # Drawn without interpolation, so that an SVG holds one pixel a head and browsers keep its edges sharp.
    image = axes.imshow(scores, origin="lower", aspect="auto", interpolation="none", cmap="viridis", vmin=0, vmax=top)
    value, layer, head = max((value, -i, -j) for i, row in enumerate(scores) for j, value in enumerate(row))
    layer, head = -layer, -head
    axes.add_patch(
        Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2, clip_on=False)
    )
    axes.set_title(f"{name}\nlayer {layer}, head {head}: {value:.2g}", fontsize=9)
    axes.set_xticks(whole_ticks(len(scores[0])))
    axes.set_yticks(whole_ticks(len(scores)))
    axes.tick_params(length=2, labelsize=9)
    axes.spines[:].set_visible(False)
    return image


def whole_ticks(count: int) -> range:
    """At most eight whole numbers below `count`, from 0 on."""
    return range(0, count, -(-count // 8))
