"""What a model takes from its context, on the windows of any store (Olsson et al. 2022, "In-context learning and
induction heads").

store, export -> windows -> loss at every position -> in-context score
                         -> heads on repeated random tokens (`heads.py`), FFN sparsity (`sparsity.py`)
              -> EXPORT/evals/incontext.json, figures

Numbering: token t of a window is the t-th that is predicted, so t tokens stand before it; its loss is entry t - 1. A
window is cut out of the stream of documents as training cuts it, and may hold several of them: where documents are
much shorter than the context, the early tokens of a window are no poorer in context than the late ones, and a score
near 0 says so.

Dimension letters: W windows, B windows of a batch, T positions (the context), V vocabulary.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evals.exports import Export, LoadedModel, NotNumbersError, facts, load_model
from evals.probes import heads, sparsity
from evals.probes.heads import SHORTEST, evaluating
from evals.probes.losses import model_context, open_store, token_losses
from evals.probes.sparsity import DASHES
from llm.common.devices import resolve_device
from llm.common.errors import UserError
from llm.common.files import write_file, write_json
from llm.common.plots import COLOURS, INK, as_png, new_figure, style
from llm.common.processes import progress_bar
from llm.common.tables import text_table
from llm.data.rows import Rows
from llm.data.store import TokenStore
from llm.data.stories import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EARLY, LATE, OF = 50, 500, 512  # the tokens whose losses are compared, in a context of at least so many
GINI_WINDOWS = 32  # windows for the sparsity of activations: of 1,024 tokens they hold 32,768
REPEATED = 50  # random tokens that are repeated once, where two of them fit the context
BINS_AN_OCTAVE = 4  # of the drawn curve
TICKS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000)
LEAST_CONTEXT = 2 * SHORTEST + 1  # what the heads' sequences take

Record = dict[str, Any]


# ---- Loss by position ------------------------------------------------------------------------------------------------


def window_items(store: TokenStore, windows: int, context: int) -> list[int]:
    """Numbers of at most `windows` of the split's windows of `context` tokens, spread evenly over all of it, so that
    every source has its share. UserError: the split is too short for one."""
    count = (store.tokens - 1) // context
    if count < 1:
        raise UserError(
            f"the {store.split} split of {store.path} holds {store.tokens:,} tokens, too few for a window of "
            f"{context:,}; give a smaller --context or another --split"
        )
    some = min(windows, count)
    return [index * count // some for index in range(some)]


def window_batches(store: TokenStore, items: Sequence[int], context: int, batch_size: int) -> Iterator[Tensor]:
    """The ids of the windows, (B, T + 1) int64 a batch: the first of each is input only."""
    rows = Rows([store], context)
    for first in range(0, len(items), batch_size):
        yield torch.from_numpy(np.stack(rows.read((0, item) for item in items[first : first + batch_size])))


def window_losses(
    loaded: LoadedModel, store: TokenStore, items: Sequence[int], context: int, batch_size: int
) -> np.ndarray:
    """-log p of every predicted token of each window, in nats: [W, T] float32."""
    losses = []
    with (
        evaluating(loaded.model),
        progress_bar(len(items), 0, loaded.export.name, "window", leave=False, delay=1) as bar,
    ):
        for ids in window_batches(store, items, context, batch_size):
            losses.append(token_losses(loaded.model, ids).numpy())
            bar.update(len(ids))
    return np.concatenate(losses)


def by_position(losses: np.ndarray) -> Record:
    """[W, T] losses -> their mean at each position and its standard error over windows (null for a single window)."""
    means = losses.mean(axis=0, dtype=np.float64)
    return {"loss": means.tolist(), "standard_error": _standard_error(losses)}


def in_bins(losses: np.ndarray) -> Record:
    """[W, T] losses -> means of each window over `position_bins`, so that two models can be paired by position."""
    bins = position_bins(losses.shape[1])
    means = np.stack([losses[:, first - 1 : last].mean(axis=1, dtype=np.float64) for first, last in bins], axis=1)
    return {"bins": bins, "per_window": np.round(means, 6).tolist()}


def in_context_score(losses: np.ndarray) -> Record:
    """Loss at token 500 minus loss at token 50, mean over windows: negative where context helps.

    Olsson et al. 2022, "in-context learning score". A context of T < 512 tokens is measured at tokens
    round(500 / 512 T) and round(50 / 512 T), at least 1. Both losses are of one window, so the standard error is that
    of their difference; `per_window` pairs two models on the same windows.

    Args:
        losses: [W, T].

    Returns:
        `early`, `late`: the tokens' numbers (1 is the first predicted); `loss_early`, `loss_late`, `value`: nats;
        `standard_error`: of `value` over windows, None for a single one; `per_window`: [W].
    """
    early, late = score_tokens(losses.shape[1])
    at_early, at_late = (losses[:, token - 1].astype(np.float64) for token in (early, late))
    difference = at_late - at_early
    errors = _standard_error(difference[:, None])
    return {
        "early": early,
        "late": late,
        "loss_early": float(at_early.mean()),
        "loss_late": float(at_late.mean()),
        "value": float(difference.mean()),
        "standard_error": errors and errors[0],
        "per_window": difference.tolist(),
    }


def score_tokens(context: int) -> tuple[int, int]:
    """The numbers of the two tokens whose losses make the score."""
    scale = min(context, OF) / OF
    return max(1, round(EARLY * scale)), round(LATE * scale)


def _standard_error(values: np.ndarray) -> list[float] | None:
    """Of the mean over the first axis."""
    if len(values) < 2:
        return None
    return (values.std(axis=0, ddof=1, dtype=np.float64) / math.sqrt(len(values))).tolist()


# ---- One export and one store ----------------------------------------------------------------------------------------


def measure_incontext(
    exports: Sequence[Export],
    store: Path,
    windows: int = 256,
    context: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    split: Split = "validation",
) -> list[Record]:
    """Measure every export on a store and keep each result in EXPORT/evals/incontext.json.

    `context`: positions of a window, None for what each model was trained with. All that can be refused without a
    model is refused before the first is loaded.
    """
    resolve_device(device)
    plans = []
    for export in exports:
        opened, config = open_store(export, store, split)
        length = model_context(export, config, context)
        if length < LEAST_CONTEXT:
            raise UserError(f"a context of {length} is too short; give --context {LEAST_CONTEXT} or more")
        items = window_items(opened, windows, length)
        plans.append((export, opened, length, items))
    results = []
    for export, opened, length, items in plans:
        if len(items) < windows:
            print(
                f"{export.name}: the {split} split of {store} holds {len(items):,} windows of {length:,} tokens, fewer "
                f"than {windows:,}; all of them are measured",
                file=sys.stderr,
            )
        result = _measure(export, opened, length, items, batch_size, device, dtype)
        write_json(export.results / "incontext.json", result)
        results.append(result)
    return results


def _measure(
    export: Export, store: TokenStore, context: int, items: Sequence[int], batch_size: int, device: str, dtype: str
) -> Record:
    loaded = load_model(export, device, dtype)
    losses = window_losses(loaded, store, items, context, batch_size)
    gini = _gini(loaded, store, items[:: -(-len(items) // GINI_WINDOWS)], context, batch_size)
    described = facts(loaded)
    del loaded  # two models at once need not fit
    return {
        "store": str(store.path),
        "store_fingerprint": store.fingerprint,
        "split": store.split,
        "windows": len(items),
        "context": context,
        "batch_size": batch_size,
        **described,
        "score": in_context_score(losses),
        "heads": _heads(export, store, context, device, dtype),
        "gini": gini,
        "positions": by_position(losses) | in_bins(losses),
    }


def _gini(
    loaded: LoadedModel, store: TokenStore, items: Sequence[int], context: int, batch_size: int
) -> list[float] | None:
    """Sparsity of each layer; None, and a line that says why, for a model whose feed-forward networks are not known."""
    try:
        return sparsity.ffn_gini(
            loaded.model, (ids[:, :-1] for ids in window_batches(store, items, context, batch_size))
        )
    except NotNumbersError:
        raise
    except UserError as error:
        print(f"{loaded.export.name}: {error}", file=sys.stderr)
        return None


def _heads(export: Export, store: TokenStore, context: int, device: str, dtype: str) -> Record:
    """Scores of all heads. The weights of attention are seen in the eager implementation alone, which needs memory for
    a square of the context; so the model is loaded once more, for sequences of 101 tokens."""
    from llm.pretrained import vocabulary

    loaded = load_model(export, device, dtype, attn_implementation="eager")
    first = store.end_of_document if store.begin_of_document is None else store.begin_of_document
    length = min(REPEATED, (context - 1) // 2)
    known = min(store.vocab_size, vocabulary(loaded.model.config))
    return heads.head_scores(loaded.model, known, length=length, first_token=first, context=context)._asdict()


# ---- For the eye -----------------------------------------------------------------------------------------------------


def format_results(names: Sequence[str], results: Sequence[Record]) -> str:
    """A table: losses at the two tokens, their difference with its standard error, the best heads, sparsity.

    Heads are layer.head, both counted from 0, with their scores in [0, 1].
    """
    rows = []
    for name, result in zip(names, results, strict=True):
        score = result["score"]
        error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.4f}"
        rows.append(
            [
                name,
                *(f"{score[f'loss_{which}']:.4f} ({score[which]})" for which in ("early", "late")),
                f"{score['value']:.4f}{error}",
                *(best_head(result["heads"][kind]) for kind in ("prefix_matching", "previous_token")),
                f"{result['gini'][0]:.3f} / {result['gini'][-1]:.3f}" if result["gini"] else "–",
            ]
        )
    header = ["model", "early loss (token)", "late loss (token)", "in-context score", "induction head"]
    return text_table([*header, "previous-token head", "Gini first / last"], rows)


def best_head(scores: Sequence[Sequence[float]]) -> str:
    """The highest of [layers][heads] scores: `layer.head (score)`, counted from 0."""
    score, layer, head = max(
        (score, -layer, -head) for layer, row in enumerate(scores) for head, score in enumerate(row)
    )
    return f"{-layer}.{-head} ({score:.2f})"


def write_figures(names: Sequence[str], results: Sequence[Record], out: Path) -> list[Path]:
    """positions.png, heads_prefix_matching.png, heads_previous_token.png and gini.png, each with all models."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out")
    named = dict(zip(names, results, strict=True))
    positions = {name: result["positions"] for name, result in named.items()}
    figures = {
        "positions": draw_positions(
            {name: values["loss"] for name, values in positions.items()},
            {name: values["standard_error"] for name, values in positions.items() if values["standard_error"]},
        ),
    }
    if gini := {name: result["gini"] for name, result in named.items() if result["gini"]}:
        figures["gini"] = sparsity.draw_gini(gini)
    for kind, title in (("prefix_matching", "prefix matching"), ("previous_token", "previous token")):
        figures[f"heads_{kind}"] = heads.draw_heads({n: r["heads"][kind] for n, r in named.items()}, title)
    for name, figure in figures.items():
        write_file(out / f"{name}.png", as_png(figure))
    return [out / f"{name}.png" for name in figures]


def draw_positions(
    losses: Mapping[str, Sequence[float]], errors: Mapping[str, Sequence[float]] | None = None
) -> "Figure":
    """Loss over position of one or several models, on a logarithmic axis: the mean over bins of equal width on it.

    Without bins the noise of single positions, hundreds of them on the right, would hide the difference of two models.
    The band, where standard errors are given, is that of one position: at least as wide as that of a bin's mean.
    """
    with style():
        figure = new_figure()
        axes = figure.subplots()
        for index, (name, values) in enumerate(losses.items()):
            pair, place = divmod(index, len(COLOURS))
            colour, dashes = COLOURS[place], DASHES[pair % len(DASHES)]
            bins = position_bins(len(values))
            centres = [math.sqrt(first * last) for first, last in bins]
            line = np.array([np.mean(values[first - 1 : last]) for first, last in bins])
            axes.plot(centres, line, color=colour, linestyle=dashes, linewidth=1.6, label=name)
            if errors and name in errors:
                wide = np.array([np.sqrt(np.mean(np.square(errors[name][first - 1 : last]))) for first, last in bins])
                axes.fill_between(centres, line - wide, line + wide, color=colour, alpha=0.18, linewidth=0)
        axes.set(xlabel="token of the window", ylabel="loss (nats per token)")
        _position_axis(axes, max(map(len, losses.values())))
        axes.legend()
    return figure


def draw_position_differences(first: Record, second: Record, names: Sequence[str]) -> "Figure":
    """Loss of the second model minus the first by position, with a 95% interval: Student's, over the windows of both.

    first, second: `in_bins` of the two, of the same windows.
    """
    from scipy import stats

    differences = np.array(second["per_window"]) - np.array(first["per_window"])  # [W, bins]
    count = len(differences)
    mean, error = differences.mean(axis=0), differences.std(axis=0, ddof=1) / math.sqrt(count)
    half = float(stats.t.isf(0.025, count - 1)) * error
    centres = [math.sqrt(low * high) for low, high in first["bins"]]
    with style():
        figure = new_figure()
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.fill_between(centres, mean - half, mean + half, color=COLOURS[1], alpha=0.25, linewidth=0)
        axes.plot(centres, mean, color=COLOURS[1], linewidth=1.6)
        axes.set(xlabel="token of the window", ylabel="difference (nats per token)", title=f"{names[1]} − {names[0]}")
        _position_axis(axes, first["bins"][-1][1])
    return figure


def _position_axis(axes: Any, last: int) -> None:
    """A logarithmic axis of tokens up to `last`."""
    axes.set_xscale("log")
    ticks = [tick for tick in TICKS if tick <= last]
    axes.set_xticks(ticks, [f"{tick:,d}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y")


def position_bins(positions: int) -> list[tuple[int, int]]:
    """The tokens 1, ..., `positions` in bins (first, last) of equal width on a logarithmic axis, none of them empty."""
    width = 2 ** (1 / BINS_AN_OCTAVE)
    edges = [width**step for step in range(math.ceil(math.log(positions, width)) + 1)]
    # Half a bin at the end belongs to the one before: a bin of a single token would be all noise.
    starts = sorted({1, *(math.ceil(edge - 1e-9) for edge in edges if edge * math.sqrt(width) <= positions)})
    return [(first, next_one - 1) for first, next_one in zip(starts, [*starts[1:], positions + 1], strict=True)]
