"""Options of the small experiments, declared next to the settings that they set. Imports no torch.

`option` declares a field of a dataclass of settings: its default, its help and its limits, once. From that follow the
option of the command line (`add_options`), the settings of a command line and its preset (`chosen`), and the check
(`problems`).
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

from llm.common.arguments import add_command, add_version
from llm.common.errors import UserError, exit_status
from llm.common.limits import Limit
from llm.common.threads import set_wait_policy, warn_if_busy

Settings = TypeVar("Settings")  # a dataclass
Presets = Mapping[str, Mapping[str, Any]]  # name -> the values that it sets; the first is the default


def option(
    default: Any,
    text: str = "",
    limit: Limit | None = None,
    choices: Sequence[str] = (),
    name: str = "",
    kind: Callable[[str], Any] | None = None,
) -> Any:
    """Declare a field of a dataclass of settings.

    Args:
        default: value without the option.
        text: help; the default is added, unless it is in the text. A field without help is no option.
        limit, choices: what the value must be, or one of.
        name: of the option, where it is not that of the field.
        kind: type of the value, where the default does not have it.
    """
    known = {"text": text, "limit": limit, "choices": choices, "name": name, "kind": kind or type(default)}
    return field(default=default, metadata=known)


def problems(settings: Any) -> list[str]:
    """Return a sentence for each field of `settings` that is outside its limit or choices."""
    found = []
    for each in fields(settings):
        value, limit, choices = getattr(settings, each.name), each.metadata.get("limit"), each.metadata.get("choices")
        if limit and value is not None and not limit.holds(value):
            found.append(f"{_name(each)} {value} must be {limit.text}")
        if choices and value not in choices:
            found.append(f"{_name(each)} {value!r} is unknown: give {', '.join(choices[:-1])} or {choices[-1]}")
    return found


def raise_problems(found: Sequence[str]) -> None:
    """Raise UserError with all problems together, if there are any."""
    if found:
        raise UserError("; ".join(found))


def add_options(command: argparse.ArgumentParser, settings: type, presets: Presets | None = None) -> None:
    """Declare an option for each field of `settings` that has help, and that no other dataclass has declared."""
    declared = {action.dest for action in command._actions}
    for each in fields(settings):
        if not (text := each.metadata.get("text")) or each.name in declared:
            continue
        kind, many = each.metadata["kind"], isinstance(each.default, tuple)
        command.add_argument(
            f"--{_name(each)}",
            dest=each.name,
            type=str if many else kind,
            nargs="+" if many else None,
            choices=each.metadata["choices"] or None,
            metavar=None if each.metadata["choices"] else {int: "N", float: "X"}.get(kind, "S"),
            help=text if "(default" in text else f"{text} {shown(each.name, each.default, presets)}",
        )


def chosen(
    options: argparse.Namespace, settings: type[Settings], preset: Mapping[str, Any] | None = None, **others: Any
) -> Settings:
    """Make settings of a command line, then of its preset, then of their own defaults; `others` come before all."""
    found = {}
    for name in (each.name for each in fields(settings) if each.metadata.get("text")):  # type: ignore[arg-type]
        value = getattr(options, name)
        if (value := (preset or {}).get(name) if value is None else value) is not None:
            found[name] = tuple(value) if isinstance(value, list) else value
    return settings(**found | others)


def shown(name: str, default: Any, presets: Presets | None = None) -> str:
    """Return the defaults of an option, of all presets: "(default: 3; small: 2)"."""
    values = {preset: set_by.get(name, default) for preset, set_by in (presets or {"": {}}).items()}
    first, *_ = values.values()
    return f"(default: {'; '.join([_word(first), *(f'{n}: {_word(v)}' for n, v in values.items() if v != first)])})"


def _name(each: Any) -> str:
    """The option of a field, without its dashes."""
    return each.metadata.get("name") or each.name.replace("_", "-")


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_word, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- Commands --------------------------------------------------------------------------------------------------------


def run_command(program: str, parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the command that a line names, whose options know the whole `line`.

    Returns the exit status: 0, or 2 for input that cannot be used, with one line on stderr.
    """
    set_wait_policy()
    add_version(parser)
    words = sys.argv[1:] if arguments is None else list(arguments)

    def run() -> None:
        options = parser.parse_args(words)
        if hasattr(options, "device"):  # a command that computes
            warn_if_busy()
        options.line = shlex.join(["python", "-m", program, *words])
        options.command(options)

    return exit_status(run)


def make_parser(
    program: str, description: str, declarations: Sequence[Callable[[Any], None]]
) -> argparse.ArgumentParser:
    """Return the parser of a program; each of the `declarations` adds a command, with the function that runs it."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for declare in declarations:
        declare(commands)
    return parser


def add_bench(commands: Any, program: str, parts: str, rounds: int) -> argparse.ArgumentParser:
    """Declare the command `bench`, for `bench.benchmark`; `parts` says what is timed."""
    command = add_command(
        commands,
        "bench",
        f"time {parts}, next to straightforward implementations",
        "Times each part and a straightforward implementation of it. Both run in every round; the first round is not "
        "counted. Prints median times, and each ratio as the median over rounds with minimum and maximum.",
        f"python -m {program} bench --json benchmarks/results/{program.removeprefix('small.')}_cpu.json",
    )
    command.add_argument("--rounds", type=count, default=rounds, metavar="N", help=f"timed rounds (default: {rounds})")
    command.add_argument("--json", type=Path, metavar="FILE", help="JSON file for the full result (default: none)")
    add_device(command)
    return command


def add_record(commands: Any, program: str, example: str) -> argparse.ArgumentParser:
    """Declare the command `record`, and return it for the options that are passed on to the program's `load`.

    Their names go to set_defaults(of_load=...).
    """
    command = add_command(
        commands,
        "record",
        "write an episode and a trained model's activity in it to an .npz file",
        "Loads a run, draws an episode of its task, and writes what the model read and how its units were active as "
        "named arrays; `axes` is a JSON object with the names of their axes. Prints names, axes, shapes. In Python: "
        "small.load(RUN), see small/experiment/loaded.py.",
        f"python -m {program} record {example} --out activity.npz",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="folder of one run")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, .npz (required)")
    command.add_argument("--episode", type=int, default=0, metavar="N", help="seed of the episode (default: 0)")
    add_device(command)
    command.set_defaults(command=_record, of_load=())
    return command


def _record(options: argparse.Namespace) -> None:
    from .loaded import write_recording
    from .loading import load

    if options.out.suffix != ".npz":
        raise UserError(f"--out {options.out} must end in .npz")
    if options.episode < 0:
        raise UserError(f"--episode {options.episode} must be at least 0")
    others = {name: getattr(options, name) for name in options.of_load if getattr(options, name) is not None}
    loaded = load(options.folder, device_of(options), **others)
    shapes = write_recording(loaded, options.episode, options.out)
    for name, shape in shapes.items():
        print(f"{name:20} {' x '.join(loaded.axes[name]) or 'one number':50} {' x '.join(map(str, shape))}")
    print(options.out)


def add_auto_dtype(command: argparse.ArgumentParser) -> None:
    """Let the --dtype of a command be auto, too, for `products.take_auto`."""
    (dtype,) = (action for action in command._actions if action.dest == "products")
    dtype.choices = (*dtype.choices, "auto")  # type: ignore[misc]
    dtype.help = str(dtype.help).replace(" (default", "; auto times both and keeps the faster (default")


def add_runs(command: argparse.ArgumentParser, presets: Presets, text: str = "") -> None:
    """Declare --preset, where there are several, and the seeds of the runs; `text` says what the presets are."""
    first, *others = presets
    if others:
        command.add_argument("--preset", choices=presets, default=first, help=f"{text} (default: {first})")
    number = shown("seeds", None, presets)
    command.add_argument("--seeds", type=count, metavar="N", help=f"number of seeds {number}")
    command.add_argument("--first-seed", type=int, default=0, metavar="N", help="first seed (default: 0)")


def seeds_of(options: argparse.Namespace, preset: Mapping[str, Any]) -> range:
    """Return the seeds that are asked for with the options of `add_runs`."""
    number = preset["seeds"] if options.seeds is None else options.seeds
    return range(options.first_seed, options.first_seed + number)


def add_out(command: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    """Declare --out; required without a default."""
    path = default and Path(default)
    text = f"{text} ({f'default: {default}' if default else 'required'})"
    command.add_argument("--out", type=Path, default=path, required=path is None, metavar="DIR", help=text)


def add_streams(command: argparse.ArgumentParser) -> None:
    """Declare the residual attention streams of `variants.Variant`."""
    command.add_argument(
        "--streams",
        nargs="+",
        default=(),
        metavar="S",
        help="residual attention streams: any of queries, keys, values (default: none)",
    )
    command.add_argument(
        "--source",
        choices=("previous", "accumulated", "first"),
        default="previous",
        help="layers whose projection a stream carries: the previous one, the sum of all earlier ones, or the first "
        "(default: previous)",
    )


def add_folders(command: argparse.ArgumentParser, least: int = 1) -> None:
    """Declare the folders of trainings that a command reads, at least 1 or 0 of them."""
    command.add_argument(
        "folders",
        nargs="+" if least else "*",
        type=Path,
        metavar="DIR",
        help="--out folder of a training, or the folder of one run in it",
    )


def add_figures_out(command: argparse.ArgumentParser) -> None:
    """Declare --out of figures, for `check_figures_out`."""
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the figures (default: the folder of the runs)"
    )


def check_figures_out(options: argparse.Namespace) -> None:
    """Raise UserError if figures of several folders would go to one."""
    if options.out is not None and len(options.folders) > 1:
        raise UserError("--out is one folder, and there are several of runs: give one of them, or leave out --out")


def add_device(command: argparse.ArgumentParser) -> None:
    """Declare --device, for `device_of`."""
    command.add_argument("--device", help="device: cpu or cuda (default: a GPU if available, else the CPU)")


def device_of(options: argparse.Namespace) -> str:
    """Return the device that is asked for; UserError if it is not there."""
    from llm.common.devices import resolve_device  # imports torch, which --help does without

    return str(resolve_device(options.device or "auto"))


def count(text: str) -> int:
    """Read a whole number of at least 1, as a type of argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
