"""The results of a folder: a table, pictures, and one page, index.html, with all that the folder has.

what a command draws -> pictures.json (name -> caption), added to what earlier commands drew -> index.html

The page lies next to its pictures and opens without a network.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llm.common.environment import now
from llm.common.files import write_file, write_json
from llm.common.html import Section, Table, linked, page, typeset

from .experiment.runs import RECORD, read_record
from .plots import Picture, write
from .walk_page import SCRIPT, WALK, walk_section

CAPTIONS, PAGE = "pictures.json", "index.html"
LONGEST = 60  # characters of a list of settings
UNITS = {"small.grid": "trial", "small.icl": "step", "small.tem": "step", "small.vision": "epoch"}


def show(
    text: str, folder: Path, table: str, pictures: Iterable[Picture], program: str, runs: Sequence[Path] = ()
) -> None:
    """Print a table and the paths of its pictures; write all of them to the folder, and its page.

    Args:
        text, table: the table and the name of its file.
        program: as in "small.icl".
        runs: folders of runs, or of several runs each.
    """
    write_file(folder / table, text + "\n")
    print(text, end="\n\n")
    show_pictures(folder, pictures, program, runs)


def show_pictures(folder: Path, pictures: Iterable[Picture], program: str, runs: Sequence[Path] = ()) -> None:
    """Write pictures and the page of a folder, and print their paths; see `show`."""
    drawn = {}
    for picture in pictures:
        print(write(picture, folder))
        drawn[picture.name] = picture.caption
    captions = _read(folder / CAPTIONS) | drawn
    captions = {name: caption for name, caption in captions.items() if (folder / f"{name}.png").is_file()}
    write_json(folder / CAPTIONS, captions)
    records = {path.name: read_record(path, program, ()) for path in _run_folders(runs)}
    write_file(folder / PAGE, format_page(folder, captions, records, program))
    print(folder / PAGE)


def format_page(folder: Path, captions: dict[str, str], records: dict[str, dict[str, Any]], program: str) -> str:
    """Return the page: a walk if the folder has one, pictures, settings of the runs and the time of each attempt.

    Args:
        folder: of the pictures.
        captions: of each picture, by name.
        records: run.json of each run, by the name of its folder.
        program: as in "small.icl".
    """
    walk = _read(folder / WALK)
    sections = [
        *([walk_section(walk)] if walk else []),
        Section("Figures", pictures=[linked(name, caption) for name, caption in captions.items()]),
        *([_settings(records), _times(records, UNITS[program])] if records else []),
    ]
    texts = [_text(path) for path in sorted(folder.glob("*.txt"))]
    counts = [f"{len(captions)} figure{'s' * (len(captions) != 1)}"]
    counts += [f"{len(records)} run{'s' * (len(records) != 1)}"] if records else []
    return page(
        f"python -m {program}",
        f"{folder.resolve().name}: {' of '.join(counts)}",
        typeset([*sections, *texts]),
        f"{PAGE} of python -m {program}, {now()}",
        script=SCRIPT if walk else "",
        local_images=True,
    )


def _text(path: Path) -> Section:
    return Section(path.name, code=path.read_text(encoding="utf-8", errors="replace"))


def _settings(records: dict[str, dict[str, Any]]) -> Section:
    """All settings: those that all runs share, and a table of those in which they differ."""
    each = {
        run: _flat({part: values for part, values in record.items() if part != "attempts"})
        for run, record in records.items()
    }
    names = list(dict.fromkeys(name for flat in each.values() for name in flat))
    differ = [name for name in names if len({flat.get(name) for flat in each.values()}) > 1]
    first = next(iter(each.values()))
    rows = [[run, *(flat.get(name, "") for name in differ)] for run, flat in each.items()]
    table = [Table("Settings in which the runs differ", ["run", *differ], rows)] if differ else []
    facts = [(name, first[name]) for name in names if name not in differ]
    return Section("Settings", facts=facts, tables=table)


def _flat(record: dict[str, Any]) -> dict[str, str]:
    """Return every setting of a run as text, by name; long lists by their length."""
    found: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}: {inner}": text for inner, text in _flat(value).items()}
        elif isinstance(value, list):
            text = ", ".join(map(str, value)) or "none"
            found[name] = text if len(text) <= LONGEST else f"{len(value)} entries"
        else:
            found[name] = "none" if value is None else str(value)
    return found


def _times(records: dict[str, dict[str, Any]], unit: str) -> Section:
    """A row for each attempt at a run; seconds are those of training and its tests."""
    rows, commands = [], []
    for run, record in records.items():
        for attempt in record["attempts"]:
            first, last, seconds = (attempt.get(name, 0) for name in ("from_step", "to_step", "seconds"))
            each = f"{seconds / (last - first):.3g}" if last > first else ""
            device = str(attempt.get("device", ""))
            rows.append([run, str(attempt.get("began", "")), f"{first} to {last}", f"{seconds:g}", each, device])
            commands.append(str(attempt.get("command", "")))
    header = ["run", "began", f"{unit}s", "seconds", f"seconds per {unit}", "device"]
    note = "Seconds are those of training and its tests, of one attempt at a run."
    return Section(
        "Times", tables=[Table("Attempts", header, rows, note)], code="\n".join(dict.fromkeys(filter(None, commands)))
    )


def _run_folders(runs: Sequence[Path]) -> list[Path]:
    """Return the folders that have a run.json: those given, or those in them."""
    return [
        path
        for folder in runs
        for path in ([folder] if (folder / RECORD).is_file() else sorted(p.parent for p in folder.glob(f"*/{RECORD}")))
    ]


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if the file is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
