"""Accuracy and training loss over the steps of runs: Figures 4, 5 and 9 of Burns et al. 2025.

RUN/exports/step-*/evals/lm_eval.json -> points -> one panel for each number of shots (5), one for each task (9)
RUN/metrics.csv                       -> training loss (4)

A line is a run, a colour the runs of one name (seeds); bands are one standard error over items to either side.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evals.exported_steps import Curve, ExportedRun, exported_steps, read_run
from evals.harness import metrics, results
from evals.harness.results import Result
from evals.harness.suites import SUITES, TITLES
from evals.harness.tasks import Protocol
from llm.common.errors import UserError
from llm.common.files import write_file
from llm.common.plots import COLOURS, INK, MARKERS, as_png, new_figure, style
from llm.common.tables import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = (*COLOURS, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # the rest of Okabe and Ito's
MARKS = (*MARKERS, "^", "D", "v", "P", "X")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))  # most shots first
ORDER = SUITES["base"].tasks  # of panels


class Point(NamedTuple):
    """What one exported step of a run reached, as shares of 1: of one task, or averaged over tasks.

    `error`: standard error over items, None for a single item; `chance`: of one choice drawn blindly, None where not
    known; `side`: what runs of several seeds have in common, and which colour they get.
    """

    run: str
    side: str
    step: int
    task: str
    shots: int
    accuracy: float
    error: float | None
    chance: float | None


class Look(NamedTuple):
    """How the lines of a run are drawn."""

    colour: str
    marker: str


# ---- Reading ---------------------------------------------------------------------------------------------------------


def labels(runs: Sequence[ExportedRun]) -> list[str]:
    """What each run is called: its name, its folder's where a name is there twice, the whole path where that is too."""
    ways: tuple[Callable[[ExportedRun], str], ...] = (lambda run: run.name, lambda run: run.folder.resolve().name)
    for way in ways:
        called = [way(run) for run in runs]
        if len(set(called)) == len(called):
            return called
    return [str(run.folder) for run in runs]


def results_over_steps(
    runs: Sequence[ExportedRun], tasks: Sequence[str] | None = None, shots: Sequence[int] | None = None
) -> list[tuple[ExportedRun, int, Result]]:
    """Every result of every exported step, by run and step; only those of `tasks` and `shots` where they are given.

    Raises UserError where two results of one task and number of shots were not measured alike.
    """
    found: list[tuple[ExportedRun, int, Result]] = []
    first: dict[results.Key, tuple[str, Result]] = {}
    for run in runs:
        for step, export in exported_steps(run.folder).items():
            for key, result in results.read(export).items():
                if (tasks is not None and key[0] not in tasks) or (shots is not None and key[1] not in shots):
                    continue
                where, other = first.setdefault(key, (str(export.folder), result))
                if differing := results.differing(other, result):
                    raise UserError(
                        f"{where} and {export.folder} were evaluated on {key[0]}, {key[1]}-shot, with different "
                        f"{', '.join(differing)}; evaluate all steps alike with `python -m evals run --checkpoints`"
                    )
                found.append((run, step, result))
    return found


def accuracy_over_steps(
    runs: Sequence[ExportedRun],
    metric: str = "acc",
    tasks: Sequence[str] | None = None,
    shots: Sequence[int] | None = None,
) -> list[Point]:
    """The accuracy of every exported step that was evaluated, in the order of runs and steps; empty where none was.

    `metric`: of the tasks that have it; others show what stands for them (`metrics.primary`), and those whose scores
    are no shares of 1 are left out. A group is one point a step. Raises UserError as `results_over_steps`.
    """
    called = dict(zip((run.folder for run in runs), labels(runs), strict=True))
    points: list[Point] = []
    sizes: dict[str, int] = {}
    for run, step, result in results_over_steps(runs, tasks, shots):
        name = metrics.primary(result, metric)
        if name is None or not metrics.of_result(result)[name].share:
            continue
        sizes[result["task"]] = result["n"]
        where = (called[run.folder], run.side, step, result["task"], result["shots"])
        points.append(Point(*where, result[name], result.get(f"{name}_stderr"), result.get("chance")))
    exports = [export for run in runs for export in exported_steps(run.folder).values()]
    for name, group in {n: g for export in exports for n, g in export.result("groups", {}).items()}.items():
        points = _as_one(points, name, {t: sizes.get(t, 0) if group["by_size"] else 1 for t in group["tasks"]})
    return points


def _as_one(points: Sequence[Point], name: str, weights: dict[str, int]) -> list[Point]:
    """The tasks of a group as one point a run, step and number of shots, where all of them are there."""
    rest = [point for point in points if point.task not in weights]
    parts: dict[tuple[str, int, int], list[Point]] = {}
    for point in points:
        if point.task in weights:
            parts.setdefault((point.run, point.step, point.shots), []).append(point)
    for those in (those for those in parts.values() if len(those) == len(weights)):
        shares = np.array([weights[point.task] for point in those]) / sum(weights.values())
        values = [(point.accuracy, point.error or 0.0, point.chance or 0.0) for point in those]
        mean, errors, chance = (shares * np.array(column) for column in zip(*values, strict=True))
        whole = those[0]._replace(task=name, accuracy=float(mean.sum()), error=math.hypot(*errors))
        rest.append(whole._replace(chance=float(chance.sum()) or None))
    return rest


def average(points: Sequence[Point]) -> list[Point]:
    """The mean over tasks at each run, step and number of shots; `task` is then "" and tasks' errors are independent.

    Averaged over the tasks that every run has at this number of shots; a step that lacks one of them is left out, as a
    mean over other tasks would make a step in the curve.
    """
    means = []
    for shots in sorted({point.shots for point in points}):
        here = [point for point in points if point.shots == shots]
        tasks = common_tasks(here)
        for run, step in dict.fromkeys((point.run, point.step) for point in here):
            parts = [p for p in here if (p.run, p.step) == (run, step) and p.task in tasks]
            if not tasks or len(parts) < len(tasks):
                continue
            errors, chances = [p.error for p in parts], [p.chance for p in parts]
            error = None if None in errors else math.hypot(*(e for e in errors if e is not None)) / len(parts)
            chance = None if None in chances else float(np.mean([c for c in chances if c is not None]))
            mean = float(np.mean([p.accuracy for p in parts]))
            means.append(Point(run, parts[0].side, step, "", shots, mean, error, chance))
    return means


def common_tasks(points: Sequence[Point]) -> set[str]:
    """The tasks that every run was evaluated on, at some step."""
    runs = {point.run for point in points}
    return set.intersection(*({p.task for p in points if p.run == run} for run in runs)) if runs else set()


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw_average(points: Sequence[Point], columns: int = 1) -> "Figure":
    """Figure 5: mean accuracy over the tasks, a panel for each number of shots. `points`: of single tasks, not none."""
    means, looks = average(points), _looks(points)
    shots = sorted({point.shots for point in means})
    with style():
        figure, panels = _panels(max(len(shots), 1), columns, same_scale=True)
        for number, panel in zip(shots, panels, strict=False):
            here = [point for point in means if point.shots == number]
            tasks = len(common_tasks([point for point in points if point.shots == number]))
            _draw_lines(panel, here, looks, {number: LINES[0]})
            panel.set_title(f"{number}-shot, mean of {tasks} task{'s' * (tasks != 1)}")
        _legend(figure, looks, {}, means)
    return figure


def draw_tasks(points: Sequence[Point], columns: int = 1) -> "Figure":
    """Figure 9: a panel for each task, a line for each run and number of shots. `points`: not none."""
    looks, shots = _looks(points), sorted({point.shots for point in points}, reverse=True)
    lines = {number: LINES[index % len(LINES)] for index, number in enumerate(shots)}
    tasks = list(dict.fromkeys(t for t in [*ORDER, *(p.task for p in points)] if any(p.task == t for p in points)))
    with style():
        figure, panels = _panels(len(tasks), columns)
        for task, panel in zip(tasks, panels, strict=False):
            _draw_lines(panel, [point for point in points if point.task == task], looks, lines)
            panel.set_title(TITLES.get(task, task))
        _legend(figure, looks, lines, points)
    return figure


def draw_loss(runs: Sequence[ExportedRun]) -> "Figure":
    """Figure 4: training loss over steps; thin as logged, bold its running mean over a fiftieth of the run.

    The first fiftieth may run out of the figure at the top, where it would press the rest of it flat.
    """
    called = labels(runs)
    looks = _look_of(dict(zip(called, (run.side for run in runs), strict=True)))
    tops = []
    with style():
        figure = new_figure()
        axes = figure.subplots()
        for run, name in zip(runs, called, strict=True):
            steps, losses = (np.array(values) for values in _finite(run.curve("train_loss", "step")))
            if not len(steps):
                continue
            colour = looks[name].colour
            axes.plot(steps, losses, color=colour, linewidth=0.5, alpha=0.35)
            axes.plot(steps, running_mean(losses, len(losses) // 50), color=colour, linewidth=1.6, label=name)
            tops.append((np.quantile(losses, 0.98), losses.min()))
        if tops:
            high, low = max(top for top, _ in tops), min(low for _, low in tops)
            axes.set_ylim(low - 0.04 * (high - low or 1), high + 0.06 * (high - low or 1))
            axes.legend()
        axes.set(ylabel="training loss (nats per token)")
        _steps_axis(axes)
    return figure


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the values within `width` // 2 to either side, of fewer at the ends: [N] -> [N]."""
    half = max(width // 2, 0)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _finite(curve: Curve) -> Curve:
    pairs = [pair for pair in zip(*curve, strict=True) if math.isfinite(pair[1])]
    return Curve([at for at, _ in pairs], [value for _, value in pairs])


def _looks(points: Sequence[Point]) -> dict[str, Look]:
    return _look_of({point.run: point.side for point in points})


def _look_of(sides: dict[str, str]) -> dict[str, Look]:
    """A colour for each side, a marker for each run, both in the order given."""
    order = list(dict.fromkeys(sides.values()))
    return {
        run: Look(PALETTE[order.index(side) % len(PALETTE)], MARKS[number % len(MARKS)])
        for number, (run, side) in enumerate(sides.items())
    }


def _panels(count: int, columns: int, same_scale: bool = False) -> "tuple[Figure, list[Axes]]":
    """A figure of `count` panels in so many columns; what is left of the last row stays empty."""
    columns = min(columns, count)
    rows = -(-count // columns)
    width = 4.6 if columns == 1 else 3.4 * columns
    figure = new_figure(width, 2.5 * rows + 0.6)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=same_scale).flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    for first in axes[:count:columns]:
        first.set_ylabel("accuracy, %")
    return figure, axes[:count]


def _draw_lines(axes: "Axes", points: Sequence[Point], looks: dict[str, Look], lines: dict[int, Any]) -> None:
    """A line with its band for each run and number of shots, and the level of chance."""
    size = 3.2 if len(lines) == 1 else 2.2
    for run, shots in dict.fromkeys((point.run, point.shots) for point in points):
        own = sorted((p for p in points if (p.run, p.shots) == (run, shots)), key=lambda point: point.step)
        steps, values = [p.step for p in own], np.array([100 * p.accuracy for p in own])
        errors = np.array([100 * (p.error or 0.0) for p in own])
        look = looks[run]
        axes.fill_between(steps, values - errors, values + errors, color=look.colour, alpha=0.16, linewidth=0)
        axes.plot(
            steps, values, color=look.colour, linestyle=lines[shots], linewidth=1.3, marker=look.marker, markersize=size
        )
    for chance in {point.chance for point in points if point.chance is not None}:
        axes.axhline(100 * chance, color=INK, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    axes.margins(y=0.08)
    _steps_axis(axes)


def _steps_axis(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.grid(axis="y")


def _legend(figure: "Figure", looks: dict[str, Look], lines: dict[int, Any], points: Sequence[Point]) -> None:
    """Below the panels: what each colour, each line and the level of chance mean."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=3.2, label=run) for run, look in looks.items()
    ]
    if len(lines) > 1:
        handles += [Line2D([], [], color=INK, linestyle=lines[shots], label=f"{shots}-shot") for shots in sorted(lines)]
    if any(point.chance is not None for point in points):
        handles.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 4)), label="chance"))
    room = figure.get_size_inches()[0] / (0.75 + 0.085 * max(len(str(handle.get_label())) for handle in handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(int(room), len(handles))))


# ---- Output ----------------------------------------------------------------------------------------------------------


def evaluate(
    folders: Sequence[Path], out: Path | None, metric: str, trusted: bool, protocol: Protocol, *how: Any
) -> tuple[str, dict[str, str]]:
    """Evaluate every exported step of the runs in `folders`, as `harness.run(exports, protocol, *how)` does; figures.

    `out`: where they go (RUN/exports of the first run where None). Returns what `write_figures` says, and what is
    lacking. UserError: a folder that is no run, a run without exported steps, and all that `harness.run` refuses.
    """
    from evals.harness import run as harness

    runs = [_run_with_steps(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run folder is given twice; give each run once")
    place = runs[0].folder / "exports" if out is None else out
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is a file; give a folder with --out")
    exports = [export for run in runs for export in exported_steps(run.folder, trusted).values()]
    made, missing = harness.run(exports, protocol, *how)
    if not made:
        return "", missing
    tasks, shots = ({result[key] for _, result in made} for key in ("task", "shots"))
    return write_figures(runs, place, sorted(tasks), sorted(shots), metric), missing


def _run_with_steps(folder: Path) -> ExportedRun:
    """The run in a folder, refused where no step of it is exported."""
    if (folder / "config.json").is_file() and not (folder / "run.json").is_file():
        raise UserError(f"{folder} is an exported folder, no run; leave --checkpoints out, or give its run folder")
    run = read_run(folder)
    if not exported_steps(folder):
        raise UserError(f"{folder} has no exported steps; make them with `python -m llm export {folder} --all`")
    return run


def write_figures(
    runs: Sequence[ExportedRun], out: Path, tasks: Sequence[str], shots: Sequence[int], metric: str = "acc"
) -> str:
    """Write accuracy.png (Figure 5), accuracy-by-task.png (9), loss.png (4) and accuracy.csv to `out`; the first two
    only where a task has an accuracy.

    Returns a table of the mean accuracies and where the files are.
    """
    points = accuracy_over_steps(runs, metric, tasks, shots)
    files: dict[str, str | bytes] = {}
    if points:
        files["accuracy.png"] = as_png(draw_average(points, columns=3))
        files["accuracy-by-task.png"] = as_png(draw_tasks(points, columns=3))
    files |= {"loss.png": as_png(draw_loss(runs)), "accuracy.csv": accuracy_csv(runs, tasks, shots)}
    for name, content in files.items():
        write_file(out / name, content)
    return f"{mean_table(points, metric)}\n\nwritten to {out}: {', '.join(files)}"


def mean_table(points: Sequence[Point], metric: str) -> str:
    """Figure 5 as text: a line for each run and step, a column for each number of shots."""
    means = {(point.run, point.step, point.shots): point for point in average(points)}
    shots = sorted({key[2] for key in means})
    header = ["run", "step", *(f"{number}-shot, mean {metric} %" for number in shots)]
    rows = []
    for run, step in dict.fromkeys((point.run, point.step) for point in points):
        cells = [means.get((run, step, number)) for number in shots]
        rows.append([run, f"{step:,}", *(results.percent(c.accuracy, c.error) if c else "–" for c in cells)])
    return text_table(header, rows)


def accuracy_csv(
    runs: Sequence[ExportedRun], tasks: Sequence[str] | None = None, shots: Sequence[int] | None = None
) -> str:
    """Every metric of every run, step, task and number of shots, in full precision; an empty cell: not measured."""
    called = dict(zip((run.folder for run in runs), labels(runs), strict=True))
    found = results_over_steps(runs, tasks, shots)
    names = dict.fromkeys(name for _, _, result in found for name in metrics.of_result(result))
    columns = [*(column for name in names for column in (name, f"{name}_stderr")), "n", "chance"]
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["run", "seed", "step", "task", "shots", *columns])
    for run, step, result in found:
        values = [result.get(column) for column in columns]
        lines.writerow([called[run.folder], run.seed, step, result["task"], result["shots"], *values])
    return text.getvalue()
