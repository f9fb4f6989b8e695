"""A run that starts from another run's checkpoint is, to the last bit, the run of its schedule from scratch."""

import json
import signal
from pathlib import Path

import pytest
import yaml

from llm.runs import reading
from llm.train import checkpoint as checkpoints

from .preloaded import LLM, Python
from .runs import Config, assert_same_weights, fit, losses, measured
from .test_fit_attempts import KILLED

COMMON = {
    "model__schedule": {"shape": "constant", "warmup_steps": 2},
    "trainer__log_every_n_steps": 3,  # a row's mean spans the branch
    "data__validate_every": 4,
    "decoder__residual_dropout": 0.1,
    "run__checkpoint_every": 100,
}


def cooled_down(steps: int) -> dict[str, object]:
    return {
        **COMMON,
        "trainer__max_steps": steps,
        "model__schedule": {**COMMON["model__schedule"], "cooldown_steps": 4},
    }  # type: ignore[dict-item]


def test_a_branch_equals_the_run_from_scratch(tiny_config: Config, tmp_path: Path) -> None:
    """Killed before it has a checkpoint of its own, it begins at the trunk's again."""
    trunk, branch, scratch = (tmp_path / name for name in ("trunk", "branch", "scratch"))
    kept = {"run__keep_steps": [10, 13], "run__keep_checkpoints": 1}
    assert fit(tiny_config(**cooled_down(24), **kept, run__folder=str(trunk))) == 0
    assert [path.name for path in reading.folders(trunk / "checkpoints")] == [f"step-{n:08d}" for n in (10, 13, 24)]
    start = str(trunk / "checkpoints" / "step-00000010")
    config = str(tiny_config(**cooled_down(14), run__folder=str(branch), run__start_from=start))
    words = ["fit", "--config", config, "--resume", "auto"]
    killed = Python(KILLED, ["llm.train.module:LanguageModule:training_step", "3", *words])
    assert killed.wait() == -signal.SIGKILL
    assert Python(LLM, words).wait() == 0
    assert fit(tiny_config(**cooled_down(14), run__folder=str(scratch))) == 0

    assert measured(branch) == measured(scratch)
    assert list(losses(branch)) == [3, 6, 9, 12, 14]
    assert_same_weights(branch, scratch, 14)
    ours, theirs = (checkpoints.find(run) for run in (branch, scratch))
    assert {name: value.tolist() for name, value in ours.optimizer_state().items()} == {
        name: value.tolist() for name, value in theirs.optimizer_state().items()
    }
    summaries = [json.loads((run / "summary.json").read_text()) for run in (branch, scratch)]
    for name in ("step", "tokens_seen", "validation_loss"):
        assert summaries[0][name] == summaries[1][name]
    validated = [{row["step"]: row["validation_loss"] for row in measured(run)} for run in (trunk, branch)]
    assert (
        validated[0]["8"] == validated[1]["8"] and validated[0]["12"] != validated[1]["12"]
    )  # it cools down from 10 on
    attempts = json.loads((branch / "run.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [10, 10]


def test_a_branch_of_another_run_is_refused(tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fit(tiny_config(trainer__max_steps=5, run__folder=str(tmp_path / "trunk"))) == 0
    start, other = str(tmp_path / "trunk" / "checkpoints" / "step-00000005"), str(tmp_path / "other")
    assert fit(tiny_config(run__folder=other, run__start_from=start, data__batch_size=4)) == 2
    assert "belongs to another run, it differs in batch_size" in capsys.readouterr().err
    assert fit(tiny_config(run__folder=other, run__start_from=start + "0", run__keep_steps=[0])) == 2
    assert "run.keep_steps" in capsys.readouterr().err
    assert fit(tiny_config(run__folder=other, run__start_from=start + "0")) == 2
    assert "is not a complete checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_folder_that_was_only_locked_is_no_run_yet(tiny_config: Config, tmp_path: Path) -> None:
    """A kill may come between the lock and run.json."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "run.json.part").touch()
    assert fit(tiny_config(trainer__max_steps=3), "--resume", "auto") == 0


def test_initial_weights_have_a_seed_of_their_own(tiny_config: Config, tmp_path: Path) -> None:
    """Data and dropout stay those of seed_everything."""
    runs = {name: tmp_path / name for name in ("one", "other")}
    for name, seed in (("one", None), ("other", 9)):
        config = tiny_config(trainer__max_steps=3, run__folder=str(runs[name]))
        assert fit(config, *([] if seed is None else ["--initializer_seed", str(seed)])) == 0
    one, other = (measured(run) for run in runs.values())
    assert [row["data_digest"] for row in one] == [row["data_digest"] for row in other]
    assert one[0]["train_loss"] != other[0]["train_loss"]
    identities = [json.loads((run / "run.json").read_text())["identity"] for run in runs.values()]
    assert [identity["decoder"]["initializer_seed"] for identity in identities] == [3, 9]
    assert [identity["seed"] for identity in identities] == [3, 3]
    config = yaml.safe_load((runs["other"] / "config.yaml").read_text())
    assert config["initializer_seed"] == 9
    assert fit(runs["other"] / "config.yaml", "--resume", "auto", "--trainer.max_steps", "4") == 0
