"""Whether settings carry over from size to size: python -m benchmarks.transfer coordinates | rates.

    coordinates    root mean squares inside models of several widths and depths, before and after a few steps
    rates          validation loss over learning rates, trained at several widths and depths

Both train toy models on the built-in stories under `standard` and `completep` (llm/model/parametrization.py), from the
same base size. They write a CSV and a picture to docs/, and the tables between the marks of docs/scaling.md.
"""

import argparse
import csv
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from benchmarks.ladder import PAGE, as_csv, markdown, page_with
from llm.common.errors import UserError, exit_status
from llm.common.files import write_files
from llm.common.plots import COLOURS, INK, MARKERS, as_png, new_figure, style
from llm.data.order import WindowOrder
from llm.data.store import TokenStore
from llm.model import DecoderConfig, DecoderForCausalLM
from llm.model.fast_paths import FAST_PATHS
from llm.train.optim import Optimizer, Schedule

DOCS = PAGE.parent
VOCABULARY, CONTEXT, ROWS = 512, 64, 8
PARAMETRIZATIONS = ("standard", "completep")


class Size(NamedTuple):
    """Width and layers; heads are 16 wide and the FFN three times the width at every size."""

    width: int
    depth: int

    def __str__(self) -> str:
        return f"{self.width} x {self.depth}"


BASE = Size(32, 2)
WIDER = (BASE, Size(64, 2), Size(128, 2), Size(256, 2))
DEEPER = (BASE, Size(32, 4), Size(32, 8), Size(32, 16))
RATES = tuple(2.0**n for n in range(-9, -3))  # 0.002 to 0.0625
RATE_SIZES = (BASE, Size(128, 2), Size(32, 8))
RATE_STEPS, COORDINATE_STEPS, COORDINATE_RATE = 100, 10, 2.0**-8
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "nmda": {"hidden_act": "nmda", "nmda_alpha": 10.0},
    **{source: {"stream": ["values"], "stream_source": source} for source in ("previous", "accumulated", "first")},
}
UNSCALED = "accumulated, sum undivided"  # what `completep` would be without its rule for this stream
FIXED = ("depth", "width")  # of models that grow in the other
Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.transfer coordinates",
    )
    parser.add_argument("what", choices=tuple(KINDS))
    options = parser.parse_args(arguments)

    def run() -> None:
        torch.set_num_threads(1)
        kind = KINDS[options.what]
        with tempfile.TemporaryDirectory() as folder:
            rows = list(kind.measured(story_texts(Path(folder))))
        write_files(
            {
                kind.result: as_csv(rows),
                kind.picture: kind.draw(rows),
                PAGE: page_with({options.what: kind.table(rows)}),
            }
        )
        print(kind.table(rows))

    return exit_status(run)


# ---- Training --------------------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """Token ids of the stories, (tokens,) each."""

    train: Tensor
    validation: Tensor

    def batch(self, step: int, seed: int) -> Tensor:
        """Return the ids of a step, (ROWS, CONTEXT + 1)."""
        order = WindowOrder((len(self.train) - 1) // CONTEXT, ROWS, seed)
        return torch.stack([self.train[CONTEXT * order.item(step, row) :][: CONTEXT + 1] for row in range(ROWS)])


def story_texts(folder: Path, documents: int = 1500) -> Texts:
    """Prepare built-in stories in a folder, and return their ids.

    Raises:
        UserError: they cannot be prepared there.
    """
    from llm.cli import main as llm

    words = ["--documents", str(documents), "--train-tokenizer", str(VOCABULARY), "--workers", "1"]
    if llm(["prepare", "stories", *words, "--out", str(folder / "store")]):
        raise UserError(f"{folder}/store cannot be prepared: see above")
    stores = [TokenStore.open(folder / "store", split) for split in ("train", "validation")]
    return Texts(*(torch.from_numpy(store.read(0, store.tokens)).long() for store in stores))


def make_model(size: Size, parametrization: str, seed: int, **switches: Any) -> DecoderForCausalLM:
    """Return a model of a size, whose base size is `BASE`."""
    model = DecoderForCausalLM(
        DecoderConfig.llama(
            vocab_size=VOCABULARY,
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=size.width // 16,
            max_position_embeddings=CONTEXT,
            initializer_range=0.9 / math.sqrt(BASE.width),
            initializer_seed=seed,
            parametrization=parametrization,
            base_hidden_size=BASE.width,
            base_num_hidden_layers=BASE.depth,
            base_head_dim=16,
            **switches,
        )
    )
    model.enable_fast_paths(FAST_PATHS)
    return model


def training(
    model: DecoderForCausalLM, texts: Texts, rate: float, steps: int, seed: int, schedule: Schedule, optimizer: str
) -> Iterator[float]:
    """Train, and yield the loss of each step before its update, in nats per token."""
    updater = Optimizer(name=optimizer, lr=rate).build(model)
    for step in range(steps):
        ids = texts.batch(step, seed)
        loss = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
        yield loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in updater.param_groups:
            group["lr"] = group["initial_lr"] * schedule.factor(step, steps)
        updater.step()
        updater.zero_grad()


# ---- Coordinates -----------------------------------------------------------------------------------------------------

COORDINATES = ("residual stream", "attention", "FFN", "values", "logits")


@torch.no_grad()
def coordinates(model: DecoderForCausalLM, ids: Tensor) -> dict[str, float]:
    """Return root mean squares in the last block: of its output, its attention, FFN and values; and of the logits."""
    block, found = model.model.layers[-1], dict[str, Tensor]()

    def keep(name: str) -> Any:
        def hook(module: Any, given: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            found[name] = first["values"] if isinstance(first, dict) else first  # of a stream, what attention uses

        return hook

    stream = block.attention.stream
    parts = (block, block.attention, block.feedforward, stream or block.attention.v_proj, model.lm_head)
    hooks = [part.register_forward_hook(keep(name)) for name, part in zip(COORDINATES, parts, strict=True)]
    model(ids)
    for hook in hooks:
        hook.remove()
    return {name: tensor.float().square().mean().sqrt().item() for name, tensor in found.items()}


def coordinates_of(
    texts: Texts, size: Size, parametrization: str, switch: str, steps: int = COORDINATE_STEPS, optimizer: str = "adamw"
) -> Iterator[Row]:
    """Measure a model before its first step and after `steps`; yield a row each."""
    model = make_model(size, parametrization, seed=1, **SWITCHES[switch.partition(",")[0]])
    if switch == UNSCALED:
        for block in model.model.layers:
            block.attention.stream.scale = 1.0
    ids = texts.validation[: ROWS * CONTEXT].view(ROWS, CONTEXT)
    what = {"parametrization": parametrization, "switch": switch, "width": size.width, "depth": size.depth}
    for count in (0, steps):
        if count:
            list(training(model, texts, COORDINATE_RATE, steps, 1, Schedule("constant"), optimizer))
        values = coordinates(model, ids)
        yield (
            {key: str(value) for key, value in what.items()}
            | {"step": str(count)}
            | {name: f"{value:.5g}" for name, value in values.items()}
        )


def all_coordinates(texts: Texts) -> Iterator[Row]:
    """Measure the plain model over width and depth, and each switch at both ends under `completep`."""
    measured = [("standard", "plain"), *(("completep", switch) for switch in (*SWITCHES, UNSCALED))]
    for parametrization, switch in measured:
        for size in dict.fromkeys((*WIDER, *DEEPER) if switch == "plain" else (BASE, WIDER[-1], DEEPER[-1])):
            yield from coordinates_of(texts, size, parametrization, switch)


def growth(rows: Sequence[Row], sizes: Sequence[Size], name: str, step: int | None = None) -> float:
    """Return how many times larger a coordinate is at the last of `sizes` than at the first, after the last step."""
    last = str(max(int(row["step"]) for row in rows) if step is None else step)
    values = [
        float(row[name])
        for size in (sizes[-1], sizes[0])
        for row in rows
        if (row["width"], row["depth"], row["step"]) == (str(size.width), str(size.depth), last)
    ]
    return values[0] / values[1]


def coordinate_table(rows: Sequence[Row]) -> str:
    """Growth of each coordinate from the base to the widest and to the deepest model."""
    lines = []
    for parametrization, switch in dict.fromkeys((row["parametrization"], row["switch"]) for row in rows):
        own = [row for row in rows if (row["parametrization"], row["switch"]) == (parametrization, switch)]
        for axis, sizes in (("width x 8", WIDER), ("depth x 8", DEEPER)):
            cells = [f"{growth(own, sizes, name):.2f}" for name in COORDINATES]
            lines.append([parametrization, switch, axis, *cells])
    return markdown(["parametrization", "model", "from the base", *COORDINATES], lines)


def draw_coordinates(rows: Sequence[Row]) -> bytes:
    """Draw residual stream, FFN and logits of the plain model over width and over depth, as a PNG."""
    with style():
        figure = new_figure(8.0, 4.6)
        panels = figure.subplots(2, 3, sharey="col")
        shown = ("residual stream", "FFN", "logits")
        for line, (axis, sizes) in zip(panels, (("width", WIDER), ("layers", DEEPER)), strict=True):
            for axes, name in zip(line, shown, strict=True):
                _draw_coordinate(axes, [row for row in rows if row["switch"] == "plain"], sizes, name, axis)
        panels[1][1].legend(fontsize=8, loc="upper left")
        figure.supylabel("root mean square", fontsize=10)
        return as_png(figure)


def _draw_coordinate(axes: Axes, rows: Sequence[Row], sizes: Sequence[Size], name: str, axis: str) -> None:
    at = [size.width if axis == "width" else size.depth for size in sizes]
    for n, parametrization in enumerate(PARAMETRIZATIONS):
        for step in sorted({int(row["step"]) for row in rows}):
            values = [
                float(row[name])
                for size in sizes
                for row in rows
                if (row["parametrization"], row["width"], row["depth"], row["step"])
                == (parametrization, str(size.width), str(size.depth), str(step))
            ]
            label = f"{parametrization}, " + (f"after {step} steps" if step else "at the start")
            axes.plot(
                at, values, MARKERS[n], linestyle="-" if step else "--", color=COLOURS[n], label=label, markersize=4,
                fillstyle="full" if step else "none", linewidth=1.2,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=axis, title=name)
    axes.set_xticks(at, [str(number) for number in at])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")


# ---- Learning rates --------------------------------------------------------------------------------------------------


def all_rates(texts: Texts) -> Iterator[Row]:
    """Train every size with every learning rate under both parametrizations; at the base size they are one."""
    for size in RATE_SIZES:
        for parametrization in PARAMETRIZATIONS[: 1 if size == BASE else 2]:
            for rate in RATES:
                loss = final_loss(texts, size, parametrization, rate)
                print(f"{size} {parametrization} {rate:.4g}: {loss:.4f}", file=sys.stderr)
                for name in PARAMETRIZATIONS if size == BASE else (parametrization,):
                    yield {
                        "parametrization": name, "width": str(size.width), "depth": str(size.depth),
                        "rate": f"{rate:.6g}", "loss": f"{loss:.5f}",
                    }  # fmt: skip


def final_loss(texts: Texts, size: Size, parametrization: str, rate: float, steps: int = RATE_STEPS) -> float:
    """Train once; return the validation loss, nats per token."""
    model = make_model(size, parametrization, seed=1)
    list(training(model, texts, rate, steps, 1, Schedule("cosine", warmup_steps=steps // 10), "adamw"))
    count = min(256, (len(texts.validation) - 1) // CONTEXT)
    ids, targets = (texts.validation[first : first + count * CONTEXT].view(count, CONTEXT) for first in (0, 1))
    with torch.no_grad():
        return float(model(ids, shift_labels=targets).loss)


def losses_of(rows: Sequence[Row], size: Size, parametrization: str) -> dict[float, float]:
    """Return the loss of each learning rate, ascending."""
    wanted = (parametrization, str(size.width), str(size.depth))
    own = [row for row in rows if (row["parametrization"], row["width"], row["depth"]) == wanted]
    return dict(sorted((float(row["rate"]), float(row["loss"])) for row in own))


def optimum(rows: Sequence[Row], size: Size, parametrization: str) -> float:
    """Return the best learning rate: the minimum of a parabola in ln rate through the best and its neighbours."""
    curve = [(math.log(rate), loss) for rate, loss in losses_of(rows, size, parametrization).items()]
    best = min(range(len(curve)), key=lambda n: curve[n][1])
    if best in (0, len(curve) - 1):
        return math.exp(curve[best][0])
    (a, left), (b, least), (_, right) = curve[best - 1 : best + 2]
    return math.exp(b + (b - a) * (left - right) / (2 * (left - 2 * least + right)))


def rate_table(rows: Sequence[Row]) -> str:
    """Best learning rate of each size, and what the base size's best rate costs there."""
    lines = []
    for size in RATE_SIZES:
        cells = [str(size)]
        for parametrization in PARAMETRIZATIONS:
            losses = losses_of(rows, size, parametrization)
            of_base = min(RATES, key=lambda rate: abs(math.log(rate / optimum(rows, BASE, parametrization))))
            kept = min(losses, key=lambda rate: abs(math.log(rate / of_base)))
            cells += [f"{optimum(rows, size, parametrization):.4f}", f"{losses[kept] - min(losses.values()):.3f}"]
        lines.append(cells)
    names = [f"{name}: {what}" for name in PARAMETRIZATIONS for what in ("best rate", "lost at the base's, nats")]
    return markdown(["width x layers", *names], lines)


def draw_rates(rows: Sequence[Row]) -> bytes:
    """Draw validation loss over learning rates, a line per size, as a PNG."""
    with style():
        figure = new_figure(8.0, 4.6)
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        groups = [[size for size in RATE_SIZES if getattr(size, fixed) == getattr(BASE, fixed)] for fixed in FIXED]
        for line, sizes in zip(panels, groups, strict=True):
            for n, (axes, parametrization) in enumerate(zip(line, PARAMETRIZATIONS, strict=True)):
                for m, size in enumerate(sizes):
                    losses = losses_of(rows, size, parametrization)
                    axes.plot(
                        list(losses), list(losses.values()), MARKERS[n], linestyle="-", color=COLOURS[n],
                        alpha=0.35 + 0.65 * m / (len(sizes) - 1), label=str(size), markersize=4, linewidth=1.2,
                    )  # fmt: skip
                    axes.axvline(optimum(rows, size, parametrization), color=COLOURS[n], alpha=0.25, linewidth=0.8)
                axes.set(xscale="log", title=parametrization)
                axes.set_xticks(RATES, [f"{rate:.3g}" for rate in RATES], fontsize=8)
                axes.set_xticks([], minor=True)
                axes.grid(axis="y")
                axes.legend(fontsize=8)
        best = min(float(row["loss"]) for row in rows)
        panels[0][0].set_ylim(best - 0.1, best + 2.0)
        figure.supxlabel("learning rate", fontsize=10, color=INK)
        figure.supylabel("validation loss, nats per token", fontsize=10)
        return as_png(figure)


# ---- Files -----------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """One of the two measurements: what measures, tables and draws it, and where it is kept."""

    measured: Any
    table: Any
    draw: Any
    result: Path
    picture: Path


KINDS = {
    "coordinates": Kind(
        all_coordinates, coordinate_table, draw_coordinates, DOCS / "coordinates.csv", DOCS / "coordinates.png"
    ),
    "rates": Kind(all_rates, rate_table, draw_rates, DOCS / "rates.csv", DOCS / "rates.png"),
}


def read_rows(name: str) -> list[Row]:
    """Return the rows of a CSV that is there."""
    with KINDS[name].result.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())
