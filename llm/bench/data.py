"""`python -m llm bench-data SOURCE... --tokenizer T`: speed of the data path, from text to batches.

Stages: inputs (files of repeated text; a store in memory, with --cold one on disk, a sparse one of many shards)  ->
tasks, each in its turn, round after round  ->  medians, ranges and ratios within a round, as a table and as JSON.

    encode    plain `tokenizers` on one core, beside all that `prepare` does to make shards, by one and by two workers
    read      random windows of a store that lies in memory: bare, as rows, as a trainer's micro-batches
    cold      random windows of a store that does not: bytes read from disk for each that is used, beside np.memmap
    start     from the store's path to the first batch of a far step, with 31,279 shards
    stalls    (with --stalls STORE, and nothing else) random micro-batches of a store of yours, where it lies: how long
              they take to read, and how long a GPU that takes --step-ms for each would wait

The last four are in `llm.bench.data_read`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backports import zstd

from ..common.errors import UserError
from ..common.files import write_json
from ..common.processes import available_cores, one_thread
from ..data.preparation.documents import BadDocuments, Source
from ..data.preparation.encode import shards_of
from ..data.preparation.recipe import PrepareSettings, open_folder
from ..data.preparation.settle import identity_with, resolve_recipe
from ..data.preparation.sources import open_sources
from ..data.tokenizer import load_tokenizer
from ..data.workers import Progress, run_all
from .data_read import Figures, Task, cold_tasks, read_tasks, stall_tasks, start_tasks

MIB = 2**20
FILES = 2  # of text: one for each of two workers
BATCH = 1000  # documents that plain `tokenizers` gets at a time


# ---- Encode ----------------------------------------------------------------------------------------------------------


def long_files(sources: Sequence[Source], folder: Path, size: int) -> list[str]:
    """Write the documents of the sources again and again, to `size` bytes of text, as .jsonl.zst under several names.

    The texts of one such file. Raises UserError for sources that cannot be read.
    """
    texts, missing = list[str](), size
    while missing > 0:
        for document in (document for source in sources for document in source.documents(BadDocuments())):
            texts.append(document.text)
            missing -= len(document.text.encode())
            if missing <= 0:
                break
    data = zstd.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    folder.mkdir()
    for number in range(FILES):
        (folder / f"{number}.jsonl.zst").write_bytes(data)
    return texts


def encode_tasks(patterns: Sequence[str], tokenizer: str, size: int, folder: Path) -> dict[str, Task]:
    """Plain `tokenizers` over the documents of one file, `prepare` over all files."""
    texts = long_files(open_sources(patterns), folder / "text", size)
    batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
    backend = load_tokenizer(tokenizer).backend_tokenizer
    outs = (folder / f"store-{number}" for number in itertools.count())
    return {
        "encode_batch": lambda: _plain(backend.encode_batch, batches),
        "encode_batch_fast": lambda: _plain(backend.encode_batch_fast, batches),
        "prepare, 1 worker": lambda: _prepare(folder / "text", tokenizer, next(outs), 1),
        "prepare, 2 workers": lambda: _prepare(folder / "text", tokenizer, next(outs), 2),
    }


def _plain(encode: Callable[..., list[Any]], batches: list[list[str]]) -> Figures:
    began = time.perf_counter()
    # Without `.ids`, which copies the numbers to Python: what follows encoding is prepare's to pay for.
    tokens = sum(len(encoding) for batch in batches for encoding in encode(batch, add_special_tokens=False))
    return {"tokens/s": tokens / (time.perf_counter() - began)}


def _prepare(text: Path, tokenizer: str, out: Path, workers: int) -> Figures:
    """The stages of `prepare`, cut where the first worker starts: what comes before does not grow with the text."""
    began = time.perf_counter()
    settings = PrepareSettings(tokenizer=tokenizer)
    sources, loaded = open_sources([str(text)]), load_tokenizer(tokenizer)
    open_folder(out, settings.plan(sources, identity_with(loaded, settings.bos)))
    recipe = resolve_recipe(out, settings, sources, loaded, workers)
    resolved = time.perf_counter()
    with Progress(sum(source.size for source in sources), len(sources)) as progress:
        results = run_all(partial(shards_of, recipe), sources, workers, progress)
    seconds, tokens = time.perf_counter() - resolved, 0
    for manifests in results:
        if isinstance(manifests, UserError):
            raise manifests
        tokens += sum(manifest.tokens for manifest in manifests)
    return {"tokens/s": tokens / seconds, "s before the first shard": resolved - began}


# ---- Command ---------------------------------------------------------------------------------------------------------

RATIOS = (  # of the first to the second, by their rates
    ("prepare, 1 worker", "encode_batch"),
    ("prepare, 1 worker", "encode_batch_fast"),
    ("prepare, 2 workers", "prepare, 1 worker"),
)


def time_tasks(tasks: dict[str, Task], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Each task's figures, by unit, a value a round; a drift of the machine hits all tasks alike."""
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in tasks}
    for turn in range(rounds):
        for name in list(tasks)[:: 1 if turn % 2 == 0 else -1]:
            for unit, value in tasks[name]().items():
                figures[name].setdefault(unit, []).append(value)
                print(f"round {turn + 1}/{rounds}  {name}: {shown(value)} {unit}", file=sys.stderr)
    return figures


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def ratios(figures: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Of two tasks, over the rounds."""
    found = {}
    for one, other in RATIOS:
        if {one, other} <= figures.keys():
            pairs = zip(figures[one]["tokens/s"], figures[other]["tokens/s"], strict=True)
            found[f"{one} / {other}"] = spread([a / b for a, b in pairs])
    return found


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result, a line a figure."""
    yield f"{result['device']}, {result['cores']} cores, {result['text']}"
    rows = [(name, spread(values), unit) for name, units in result["figures"].items() for unit, values in units.items()]
    rows += [(name, values, "") for name, values in result["ratios"].items()]
    width = max(len(name) for name, _, _ in rows)
    for name, values, unit in rows:
        span = f"({shown(values['least'])} to {shown(values['greatest'])})"
        yield f"{name:{width}}{shown(values['median']):>14} {span:<30}{unit}".rstrip()


def command_line(args: argparse.Namespace) -> str:
    """The words that measure the same again."""
    if args.stalls:
        words = ["--stalls", str(args.stalls), "--step-ms", f"{args.step_ms:g}"]
        return shlex.join([*words, "--rounds", str(args.rounds)])
    words = [*args.sources, "--tokenizer", args.tokenizer, "--text-mib", f"{args.text_mib:g}"]
    words += ["--cold", f"{args.cold:g}"] if args.cold else []
    return shlex.join([*words, "--shards", str(args.shards), "--rounds", str(args.rounds)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm bench-data`."""
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="text, as prepare takes it")
    parser.add_argument("--tokenizer", metavar="T", help="as prepare takes it")
    parser.add_argument(
        "--stalls", type=Path, metavar="STORE", help="only read random micro-batches of this store, where it lies"
    )
    parser.add_argument(
        "--step-ms",
        type=float,
        default=280,
        metavar="MS",
        help="with --stalls: computing time per micro-batch (default: 280, of 4 sequences at 1B on one H200)",
    )
    parser.add_argument(
        "--text-mib", type=float, default=40, metavar="N", help="of text a file, repeated (default: 40)"
    )
    parser.add_argument("--cold", type=float, metavar="GIB", help="also read a store of this size from the disk")
    parser.add_argument("--shards", type=int, default=31_279, help="of the store that is started on (default: 31,279)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which each task is measured once (default: 5)")
    parser.add_argument("--folder", type=Path, help="of the disk where the temporary stores are written")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result here")
    parser.epilog = "example: python -m llm bench-data data/*.jsonl.zstd --tokenizer gpt2 --cold 8 --folder /scratch"


def all_tasks(args: argparse.Namespace, folder: Path) -> dict[str, Task]:
    """Everything but --stalls."""
    tasks = encode_tasks(args.sources, args.tokenizer, int(args.text_mib * MIB), folder)
    tasks |= read_tasks(folder / "warm")
    tasks |= cold_tasks(folder / "cold", args.cold) if args.cold else {}
    return tasks | start_tasks(folder / "many", args.shards)


def run(args: argparse.Namespace) -> None:
    """Measure and print; with --out write the figures too. Raises UserError for input that cannot be used."""
    from ..common.environment import environment

    if min(args.rounds, args.shards) < 1 or min(args.text_mib, 1 if args.cold is None else args.cold) <= 0:
        raise UserError("--rounds and --shards must be at least 1, --text-mib and --cold above 0")
    if args.folder and not args.folder.is_dir():
        raise UserError(f"there is no folder {args.folder}; make it or name another --folder")
    if args.stalls and args.step_ms <= 0:
        raise UserError(f"--step-ms {args.step_ms:g} must be above 0")
    if not args.stalls and not (args.sources and args.tokenizer):
        raise UserError("give SOURCE and --tokenizer to measure everything, or --stalls STORE for a store of yours")
    with tempfile.TemporaryDirectory(dir=args.folder) as name, one_thread():
        folder = Path(name)
        tasks = stall_tasks(args.stalls, args.step_ms / 1000) if args.stalls else all_tasks(args, folder)
        figures = time_tasks(tasks, args.rounds)
    result = {
        "command": "python -m llm bench-data " + command_line(args),
        "text": str(args.stalls or f"{FILES} files of {args.text_mib:g} MiB of text, the sources repeated"),
        "cores": available_cores(),
        "figures": figures,
        "ratios": ratios(figures),
        **environment(),
    }
    print(*table(result), sep="\n")
    if args.out:
        write_json(args.out, result, indent=1)
