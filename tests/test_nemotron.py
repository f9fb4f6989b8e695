"""The data path of the 1B runs from end to end, on files laid out as Nemotron-CC is."""

import csv
import signal
import time
from pathlib import Path

import pytest
import yaml

from llm.cli import main

from .train.preloaded import LLM, Python, wait_for_none

ROOT = Path(__file__).parents[1]
SHRUNK = {  # the model only: the data's settings are those of the config, but for the size of a batch
    "decoder.hidden_size": 32,
    "decoder.intermediate_size": 64,
    "decoder.num_hidden_layers": 2,
    "decoder.num_attention_heads": 4,
    "decoder.num_key_value_heads": 2,
    "data.context": 16,  # nearly all time goes into the output head, which keeps its width
    "data.batch_size": 4,
    "data.validate_every": 25,
    "data.validation_rows": 4,
    "model.schedule.warmup_steps": 5,
    "model.schedule.cooldown_steps": 5,
    "strategy.name": "auto",
    "trainer.precision": "32-true",  # a processor without bfloat16 takes ten times as long with it
    "trainer.max_steps": 50,
    "trainer.log_every_n_steps": 1,
    "trainer.accelerator": "cpu",
    "run.checkpoint_every": 10,
    "run.loggers": "[csv]",
}


@pytest.fixture(scope="module")
def store(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nemotron") / "store"
    words = [
        "prepare",
        str(real_data / "nemotron-cc-layout"),
        "--path-filter",
        "quality=high",
        "--path-filter",
        "kind=actual",
    ]
    words += ["--id-key", "warc_record_id", "--tokenizer", str(real_data / "gpt2-tokenizer"), "--out", str(out)]
    assert main([*words, "--subset-tokens", "900e3", "--deduplicate", "--seed", "1"]) == 0
    assert main(["inspect", str(out), "--verify"]) == 0
    return out


def digests(run: Path) -> dict[int, tuple[str, str]]:
    """Step -> (digest of the data so far, loss)."""
    with (run / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["train_loss"]]
    return {int(row["step"]): (row["data_digest"], row["train_loss"]) for row in rows}


@pytest.mark.parametrize(
    ("vocabulary", "compiled"),
    [
        pytest.param({"vocab_size": 50257, "unpadded_vocab_size": None}, True, id="compiled", marks=pytest.mark.slow),
        pytest.param({"vocab_size": 131072}, False, id="padded"),
    ],
)
def test_fifty_steps_killed_and_resumed_with_other_workers_see_the_same_data(
    vocabulary: dict, compiled: bool, store: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load((ROOT / "configs" / "1b_values.yaml").read_text())
    sizes = {"unpadded_vocab_size": 50257} | vocabulary
    changes = SHRUNK | {"data.store": str(store), "model.compile": compiled}
    changes |= {f"decoder.{name}": value for name, value in sizes.items()}
    for dotted, value in changes.items():
        part, *middle, name = dotted.split(".")
        place = config[part]
        for key in middle:
            place = place[key]
        place[name] = yaml.safe_load(value) if isinstance(value, str) else value
    config["data"].pop("micro_batch_size", None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def command(run: str, workers: int) -> list[str]:
        words = ["fit", "--config", str(tmp_path / "config.yaml"), "--run.folder", str(tmp_path / run)]
        return [*words, "--data.workers", str(workers), "--resume", "auto"]

    def start(run: str, workers: int) -> Python:
        """In a process of its own: what this one has compiled before would change how compiled blocks round."""
        return Python(LLM, command(run, workers))

    assert start("whole", 0).wait() == 0
    process = start("broken", 2)
    deadline = time.monotonic() + 300
    while not (tmp_path / "broken" / "metrics.csv").exists() or 23 not in digests(tmp_path / "broken"):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_none()
    assert start("broken", 1).wait() == 0
    whole = digests(tmp_path / "whole")
    assert list(whole) == list(range(1, 51))
    assert len({digest for digest, _ in whole.values()}) == 50
    assert digests(tmp_path / "broken") == whole
