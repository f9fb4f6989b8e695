"""A run and an export that version 0.1.0 made: the run resumes, and the export loads with its own code.

`release_0_1` holds the run at step 5 of 10, its metrics to the end, and the export of step 10: a model of 9,388
parameters on the 400 stories of the tests, with a value stream and a learned NMDA.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm.cli import main
from llm.model import DecoderConfig, DecoderForCausalLM

from .train.runs import metrics

MADE = Path(__file__).parent / "release_0_1"
SAME = ("train_loss", "validation_loss", "gradient_norm", "learning_rate")


def test_its_run_resumes(story_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(MADE / "run", run)
    words = ["--config", str(run / "config.yaml"), "--data.store", str(story_store), "--run.folder", str(run)]
    assert main(["fit", *words, "--resume", "auto"]) == 0
    assert "continuing from" in capsys.readouterr().err
    record = json.loads((run / "run.json").read_text())
    assert [attempt["from_step"] for attempt in record["attempts"]] == [0, 5] and "lives" not in record
    found, expected = metrics(run), metrics(MADE / "run")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, before in zip(found, expected, strict=True):
        assert row["data_digest"] == before["data_digest"]
        for name in SAME:
            assert bool(row[name]) == bool(before[name])
            assert not row[name] or float(row[name]) == pytest.approx(float(before[name]), rel=1e-5)


def test_its_export_loads_and_is_the_same_model_as_ours(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(MADE / "export", trust_remote_code=True)
    ours = DecoderForCausalLM(DecoderConfig.from_pretrained(MADE / "export"))
    ours.load_state_dict(load_file(MADE / "export" / "model.safetensors"))
    assert type(theirs) is not type(ours)
    ids = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert main(["generate", str(MADE / "export"), "--prompt", "Tom", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("Tom")
