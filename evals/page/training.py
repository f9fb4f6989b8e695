"""What was trained: sizes, optimizer, batch and data of a pair, its configs line by line, and its learned numbers."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from safetensors import SafetensorError, safe_open

from evals.exported_steps import Curve, ExportedRun
from evals.page.loss_curves import token_unit
from evals.probes.heads import whole_ticks
from llm.common.exported import weight_files
from llm.common.html import Table
from llm.common.plots import new_figure, style
from llm.runs import reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BY_HEAD = re.compile(r"layers\.(\d+)\..*\b(queries|keys|values)_weight$")  # a tensor of an export
LEARNED = re.compile(r"(?!activation_rms/)([\w.]+)/(\d+)")  # a column of metrics.csv: NAME/LAYER
WITHOUT_SENSE = ("run.folder",)  # differs between any two runs


def training_facts(run: ExportedRun) -> list[tuple[str, str]]:
    """Sizes, optimizer, batch and data of a run, in words; what its config does not say is left out."""
    keys = dict(reading.flat(run.config))
    record = run.record
    lines = [
        ("Model", "{} layers, {} wide, {} heads, {} in the feed-forward, vocabulary {}", "decoder", (
            "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")),
        ("Parts", "{}, {}, {} feed-forward, {}", "decoder", ("norm", "position", "feedforward", "hidden_act")),
        ("Optimizer", "{}, learning rate {}, betas {}, weight decay {}", "model.optimizer", (
            "name", "lr", "betas", "weight_decay")),
        ("Schedule", "{}, {} steps of warm-up, gradient clipped at {}", "model", (
            "schedule.shape", "schedule.warmup_steps", "gradient_clip")),
        ("Batch", "{} sequences of {} tokens, {}", "data", ("batch_size", "context", "packing")),
        ("Data", "{}", "data", ("store",)),
        ("Steps", "{}, in {}", "trainer", ("max_steps", "precision")),
    ]  # fmt: skip
    facts = []
    for what, form, part, names in lines:
        values = [keys.get(f"{part}.{name}") for name in names]
        if None not in values:
            facts.append((what, form.format(*map(_text, values))))
    if "data" in run.config and isinstance(run.config["data"].get("store"), dict):  # a mixture: store -> weight
        stores = run.config["data"]["store"].items()
        facts.append(("Data", ", ".join(f"{store} ({weight:g})" for store, weight in stores)))
    if record.get("parameters"):
        facts.append(("Parameters", f"{record['parameters']:,}"))
    return facts


def config_table(pair: Sequence[ExportedRun], names: Sequence[str]) -> Table:
    """The keys in which the configs of a pair differ."""
    one, other = (dict(reading.flat(run.config)) for run in pair)
    rows = [
        [key, _text(one.get(key, "–")), _text(other.get(key, "–"))]
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key) and key not in WITHOUT_SENSE
    ]
    note = f"All other keys of config.yaml are equal, but for {', '.join(WITHOUT_SENSE)}."
    return Table("Difference of the configs", ["key", *names], rows, note)


def learned_curves(run: ExportedRun) -> dict[str, dict[int, Curve]]:
    """The learned numbers of a run's switches over tokens: name -> layer -> curve."""
    found: dict[str, dict[int, Curve]] = {}
    for column in run.metrics[0] if run.metrics else ():
        if match := LEARNED.fullmatch(column):
            curve = run.curve(column)
            if curve.values:
                found.setdefault(match[1], {})[int(match[2])] = curve
    return found


def head_weights(folder: Path) -> dict[str, dict[int, list[float]]]:
    """Learned stream weights of an exported folder by stream, layer and head; of a dense source, of the layer before.

    Empty where a layer has one weight for all its heads, or if the files cannot be read: what is compared was measured
    before.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for path in weight_files(folder):
        with suppress(SafetensorError), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                match = BY_HEAD.search(name)
                values = file.get_tensor(name).double() if match else None
                if match and values is not None and values.shape[-3] > 1:
                    last = values[-1] if values.ndim == 4 else values
                    found.setdefault(match[2], {})[int(match[1])] = last.flatten().tolist()
    return {stream: dict(sorted(layers.items())) for stream, layers in found.items()}


def draw_head_weights(stream: str, layers: Mapping[int, Sequence[float]], title: str) -> "Figure":
    """A heat map of the weights of one stream, layer by head; white is 0."""
    values = list(layers.values())
    top = max(abs(value) for row in values for value in row) or 1.0
    with style():
        figure = new_figure(4.6, min(4.6, 1.6 + 0.35 * len(values)))
        axes = figure.subplots()
        image = axes.imshow(
            values, origin="lower", aspect="auto", interpolation="none", cmap="RdBu_r", vmin=-top, vmax=top
        )
        axes.set_yticks(range(len(values)), [str(layer) for layer in layers])
        axes.set(xlabel="head", ylabel="layer", title=title, xticks=whole_ticks(len(values[0])))
        figure.colorbar(image, label=f"weight of arriving {stream}")
    return figure


def draw_learned(name: str, layers: Mapping[int, Curve], title: str) -> "Figure":
    """One learned number over training, a line for each layer, from dark (first) to bright (last)."""
    unit, word = token_unit(max(curve.tokens[-1] for curve in layers.values()))
    with style():
        figure = new_figure()
        axes = figure.subplots()
        for place, (layer, curve) in enumerate(sorted(layers.items())):
            colour = colormaps["viridis"](0.15 + 0.6 * place / max(1, len(layers) - 1))
            at = [tokens / unit for tokens in curve.tokens]
            axes.plot(at, curve.values, color=colour, label=f"layer {layer}" if len(layers) <= 8 else None)
        if len(layers) <= 8:
            axes.legend()
        else:
            axes.set_title(f"{title}, layers {min(layers)} to {max(layers)}, dark to bright")
        axes.set(xlabel=f"tokens seen{word}", ylabel=name)
        if len(layers) <= 8:
            axes.set_title(title)
        axes.grid(axis="y")
    return figure


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
