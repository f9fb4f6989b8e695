"""Rows fetched from repositories of the hub's form on this disk, read again without a network, and stock lm-eval's
numbers on the same: where the working directory holds OWNER/NAME, `load_dataset` takes that folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import yaml

from evals.__main__ import main
from evals.harness.prefetch import prefetch, whole
from llm import export as exporting
from llm.cli import main as llm
from llm.common.errors import UserError

from ..rows import arc_rows, piqa_rows, rows_of

# As the hub has them: named configs in the README, a parquet file or several for each split.
LAYOUT = {
    "baber/piqa": {"default": ("data", {"train": 14, "validation": 12, "test": 3})},
    "allenai/ai2_arc": {
        "ARC-Easy": ("ARC-Easy", {"train": 9, "validation": 3, "test": 6}),
        "ARC-Challenge": ("ARC-Challenge", {"train": 8, "validation": 2, "test": 5}),
    },
}


def write_repository(name: str, rows: dict[tuple[str, str], list[dict]] | None = None) -> None:
    """A repository of `LAYOUT` in the working directory, with rows by (config, split) where they are not made up."""
    card = []
    for config, (folder, splits) in LAYOUT[name].items():
        make = piqa_rows if name == "baber/piqa" else arc_rows
        card.append({"config_name": config, "data_files": []})
        for split, count in splits.items():
            found = (rows or {}).get((config, split)) or make(f"{config} {split} “é” ", count)
            path = Path(name) / folder / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(found).to_parquet(path)
            card[-1]["data_files"].append({"split": split, "path": f"{folder}/{split}-*"})
    (Path(name) / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with repositories of PIQA and ARC, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in LAYOUT:
        write_repository(name)
    return tmp_path


def fetch(folder: Path, task: str) -> str:
    """The line on a task that can be fetched."""
    (line,), missing = prefetch(folder, [task])
    assert missing == {}
    return line


def test_rows_are_those_of_the_hub(hub, capsys):
    assert main(["prefetch", "data", "--tasks", "piqa", "arc_easy", "arc_challenge", "stories"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["piqa: fetched 14 train, 12 validation", "arc_easy: fetched 9 train, 3 validation, 6 test"]
    assert lines[-1] == "stories: reads what is here, nothing to fetch"
    for task, (repository, config) in {
        "piqa": ("baber/piqa", "default"),
        "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
        "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    }.items():
        files = sorted(path.name for path in (hub / "data" / task).glob("*.jsonl"))
        splits = (
            ["train", "validation"] if task == "piqa" else ["test", "train", "validation"]
        )  # no answers in its test
        assert files == [f"{split}.jsonl" for split in splits]
        for split in splits:
            folder = LAYOUT[repository][config][0]
            parquet = datasets.Dataset.from_parquet(f"{repository}/{folder}/{split}-00000-of-00001.parquet")
            assert rows_of(hub / f"data/{task}/{split}.jsonl") == parquet.to_list()
    assert not list((hub / "data").rglob("*.part"))


def test_what_is_whole_is_not_fetched_again(hub, capsys):
    folder = hub / "data/piqa"
    assert fetch(hub / "data", "piqa") == "piqa: fetched 14 train, 12 validation"
    files = {path: path.stat().st_ino for path in folder.glob("*.json*")}
    (hub / "baber/piqa/README.md").rename(hub / "gone")  # nothing is asked of the hub
    assert fetch(hub / "data", "piqa") == "piqa: there already, 14 train, 12 validation"
    assert {path: path.stat().st_ino for path in folder.glob("*.json*")} == files
    (hub / "gone").rename(hub / "baber/piqa/README.md")
    content = (folder / "train.jsonl").read_bytes()
    for spoil in (
        lambda: (folder / "train.jsonl").write_bytes(content[:-40]),
        lambda: (folder / "train.jsonl").write_bytes(content.replace(b"goal 3", b"goal 4")),
        lambda: (folder / "train.jsonl").unlink(),
    ):
        spoil()
        assert not whole(folder, ["train"])
        assert fetch(hub / "data", "piqa") == "piqa: fetched 14 train, 12 validation"
        assert (folder / "train.jsonl").read_bytes() == content


@pytest.mark.parametrize("moment", ["train.jsonl.part", "validation.jsonl.part", "source.json", "train.jsonl"])
def test_a_fetch_that_was_killed_leaves_nothing_that_looks_whole(hub, monkeypatch, moment):
    """Killed when `moment` would be written or put in its place, of which each is done once a file."""
    original = {name: getattr(Path, name) for name in ("open", "replace")}

    def stop(name: str) -> Callable:
        def act(self: Path, *args, **kwargs):
            target = Path(args[0]) if name == "replace" else self
            if target.name == moment and (name == "replace" or args[:1] == ("wb",)):
                raise KeyboardInterrupt
            return original[name](self, *args, **kwargs)

        return act

    with monkeypatch.context() as patch:
        for name in original:
            patch.setattr(Path, name, stop(name))
        with pytest.raises(KeyboardInterrupt):
            prefetch(hub / "data", ["piqa"])
    assert not list((hub / "data/piqa").glob("*.jsonl")) and not whole(hub / "data/piqa", ["train", "validation"])
    assert fetch(hub / "data", "piqa") == "piqa: fetched 14 train, 12 validation"
    assert whole(hub / "data/piqa", ["train", "validation"])
    assert not list((hub / "data").rglob("*.part"))


def test_what_cannot_be_fetched(hub, capsys):
    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main(["prefetch", *words]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        return error

    # The tests have HF_HUB_OFFLINE set, as a machine without a network should.
    assert "Rowan/hellaswag cannot be fetched (" in refused("data", "--tasks", "hellaswag")
    assert "run this where the hub can be reached" in refused("data", "--tasks", "hellaswag")
    assert "there is no suite no_such_task" in refused("data", "--suite", "no_such_task")
    assert "there is no task no_such_task" in refused("data", "--tasks", "no_such_task")
    (hub / "file").touch()
    assert "file is a file" in refused("file", "--tasks", "piqa")
    (hub / "own/piqa").mkdir(parents=True)
    (hub / "own/piqa/train.jsonl").write_text("{}\n")
    assert "own/piqa/train.jsonl was put there by someone else" in refused("own", "--tasks", "piqa")
    assert (hub / "own/piqa/train.jsonl").read_text() == "{}\n"
    (hub / "own/piqa/source.json").write_text("[")
    assert "source.json is damaged; delete" in refused("own", "--tasks", "piqa")
    (hub / "baber/piqa/README.md").write_text("")
    for split in ("validation", "test"):
        (hub / f"baber/piqa/data/{split}-00000-of-00001.parquet").unlink()
    assert "baber/piqa has no validation, which piqa of lm-eval" in refused("data", "--tasks", "piqa")
    assert not list((hub / "data").rglob("*.json*"))
    with pytest.raises(UserError, match="is a file"):
        prefetch(hub / "file", ["piqa"])


def results_of(folder: Path, name: str) -> tuple[dict, list[dict]]:
    """The one result, without what the samples' form decides on, and the items of a task at so many shots."""
    (result,) = [
        r for r in json.loads((folder / "evals/lm_eval.json").read_text()) if f"{r['task']}-{r['shots']}" == name
    ]
    return result, rows_of(folder / f"evals/samples/{name}shot.jsonl")


def test_fetched_rows_give_the_numbers_of_the_hub(hub, make_export):
    """Sockets are refused in these tests: neither command here asks for one."""
    folder = make_export(context=1024)
    words = ["run", str(folder), "--tasks", "piqa", "arc_challenge", "--shots", "0", "2", "--device", "cpu"]
    assert main(words) == 0
    found = {name: results_of(folder, name) for name in ("piqa-0", "piqa-2", "arc_challenge-0", "arc_challenge-2")}
    assert main(["prefetch", "data", "--tasks", "piqa", "arc_challenge"]) == 0
    for name in ("baber", "allenai"):
        (hub / name).rename(hub / f"{name} is gone")
    assert main([*words, "--data", "data", "--overwrite"]) == 0
    assert {name: results_of(folder, name) for name in found} == found


@pytest.fixture
def hippoformer(tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported folder of a tiny trained run with a residual value stream."""
    settings = {"decoder__max_position_embeddings": 256, "data__context": 256, "trainer__max_steps": 2}
    settings |= {"run__checkpoint_every": 2}
    assert llm(["fit", "--config", str(tiny_config(**settings))]) == 0
    monkeypatch.setattr(exporting, "check_reload", lambda *_: None)  # tested elsewhere, and slow
    exporting.export(tmp_path / "run", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("items", ["made up", pytest.param("real", marks=pytest.mark.slow)])
def test_the_command_line_of_stock_lm_eval_gives_the_same_numbers(hub, hippoformer, items, request):
    """Official task, official command, on the folder as it is."""
    if items == "real":
        real = request.getfixturevalue("real_items") / "piqa"
        rows = {("default", split): rows_of(real / f"{split}.jsonl")[:40] for split in ("train", "validation")}
        write_repository("baber/piqa", rows)
    environment = os.environ | {"HF_DATASETS_CACHE": str(hub / "stock"), "HF_MODULES_CACHE": str(hub / "modules")}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "piqa", "--num_fewshot", "1"]
    command += ["--model_args", f"pretrained={hippoformer},trust_remote_code=True", "--limit", "12", "--device", "cpu"]
    command += ["--batch_size", "4", "--log_samples", "--output_path", str(hub / "stock-out")]
    done = subprocess.run(command, cwd=hub, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (stock,) = [json.loads(path.read_text()) for path in (hub / "stock-out").rglob("results_*.json")]
    (samples,) = [rows_of(path) for path in (hub / "stock-out").rglob("samples_piqa_*.jsonl")]

    assert main(["prefetch", "data", "--tasks", "piqa"]) == 0
    words = ["run", str(hippoformer), "--tasks", "piqa", "--shots", "1", "--limit", "12", "--data", "data"]
    assert main([*words, "--device", "cpu", "--batch-size", "4"]) == 0
    result, ours = results_of(hippoformer, "piqa-1")
    for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        assert stock["results"]["piqa"][f"{name},none"] == result[name]
    samples.sort(key=lambda sample: sample["doc_id"])
    assert [sample["prompt_hash"] for sample in samples] == [sample["prompt_hash"] for sample in ours]
    for sample, own in zip(samples, ours, strict=True):
        expected = [float(loglikelihood) for loglikelihood, _ in sample["filtered_resps"]]
        assert own["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
    assert len({tuple(own["loglikelihoods"]) for own in ours}) == 12
