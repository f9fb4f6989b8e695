"""What follows from a study's YAML: its runs, what they cost, what is wrong with their configs, and job arrays."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.cli import main
from llm.common.errors import UserError
from llm.runs.study_record import StudyRun, read_record
from llm.study.description import read_study
from llm.study.inspection import inspect
from llm.study.registration import register
from llm.study.run import share, slot_environment
from llm.study.runs import study_runs
from llm.study.tasks import task_configs

from .conftest import Study

ROOT = Path(__file__).parents[2]


def llama(width: int, layers: int, ffn: int, key_values: int) -> int:
    """Matrices and norms of the blocks, and the last norm."""
    return layers * (2 * width**2 + 2 * width * key_values + 3 * width * ffn + 2 * width) + width


def flops(blocks: int, vocab: int, width: int, layers: int, context: int) -> float:
    """6 N and the output matrix, and 12 L D T of the attention (Chowdhery et al. 2022, Appendix B); no norms."""
    return 6 * (blocks + vocab * width) + 12 * layers * width * context


NEMOTRON = {  # non-embedding parameters: width, layers
    "60M": llama(768, 7, 3072, 192),
    "124M": llama(1024, 8, 4096, 256),
    "250M": llama(1280, 10, 5120, 320),
    "500M": llama(1536, 15, 6144, 384),
    "1B": llama(2048, 16, 8192, 512),
}
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


def plan(study: Path, tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    assert main(["study", "plan", str(study), "--json", str(tmp_path / "plan.json"), *words]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_here_can_be_planned(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    begun = study.folder.exists()  # by somebody who works here
    planned = plan(path, tmp_path, "--device", "h100", "--flops-per-second", "4e14")
    told = capsys.readouterr().out
    assert all(size in told for size in study.sizes)
    assert all(each["fits"] and each["device_hours"] > 0 for each in planned)
    assert study.folder.exists() == begun
    main_runs = sum(each["runs"] for each in planned if each["stage"] == "main")
    assert main_runs == len(study.sizes) * len(study.seeds) * len(study.all_arms()) * len(study.tokens.budgets())
    if "nemotron" in path.stem:
        sizes = {each["size"]: each["non_embedding"] for each in planned if each["stage"] == "main"}
        assert sizes == NEMOTRON
        assert all(
            abs(count / int(size.rstrip("MB")) / (1e9 if "B" in size else 1e6) - 1) < 0.06
            for size, count in sizes.items()
        )
        (largest,) = (each for each in planned if (each["stage"], each["size"]) == ("main", "1B"))
        per_token = flops(sum([NEMOTRON["1B"], -33 * 2048]), 128256, 2048, 16, 4096)
        # 9 trunks of 20 tokens a parameter, each with a branch that trains the last 20% of 10
        assert largest["flops"] == pytest.approx(9 * (20 + 0.2 * 10) * NEMOTRON["1B"] * per_token, rel=1e-3)
        assert largest["device_hours"] == pytest.approx(largest["flops"] / 4e14 / 3600)


def test_runs_and_their_budgets(tiny_study: Study) -> None:
    """Per parameter of the baseline, the same for all arms; a trunk comes before its branches."""
    tokens = {"per_parameter": [0.5, 1, 2], "cooldown": 0.25, "max_epochs": 5}
    study = read_study(tiny_study(tokens=tokens, seeds=2, seed=4))
    inspection = inspect(study)
    runs = study_runs(inspection)
    assert len(runs) == 2 * 2 * 3 * 3 == len({run.name for run in runs})
    small = llama(32, 2, 64, 16)
    large = llama(40, 2, 64, 20)
    assert {run.size: run.parameters for run in runs} == {"small": small, "large": large}
    for run in runs:
        assert run.steps == round(float(run.budget.rstrip("x")) * run.parameters / 256)
        assert run.tokens == 256 * run.steps
        assert run.start == (0 if run.trunk is None else run.steps - round(0.25 * run.steps))
        assert run.trunk in (None, run.name.replace(f"-{run.budget}", "-2x"))
    names = [run.name for run in runs]
    assert all(names.index(run.trunk) < names.index(run.name) for run in runs if run.trunk)
    per_token = flops(small - 5 * 32, 512, 32, 2, 32)
    assert runs[0].flops == pytest.approx(per_token * runs[0].tokens)
    assert len({run.seed for run in runs}) == 4
    by_arm = {arm: [run.seed for run in runs if run.arm == arm] for arm in ("classic", "values", "null")}
    assert by_arm["classic"] == by_arm["values"] == by_arm["null"]


def test_without_a_cooldown_every_budget_starts_from_scratch(tiny_study: Study) -> None:
    study = read_study(tiny_study(tokens={"absolute": [2560, 5120]}, null_arm=False))
    record = register(inspect(study))
    assert all(run.trunk is None and run.share == 1 for run in record.runs)
    config = yaml.safe_load((study.folder / "configs" / f"{record.runs[0].name}.yaml").read_text())
    assert config["model"]["schedule"] == {"warmup_steps": 1}
    assert config["trainer"]["max_steps"] == 20


def test_problems_of_the_configs_are_told_together(tiny_study: Study) -> None:
    path = tiny_study(
        sizes={"large": {"decoder.hidden_size": 40}, "small": {}, "odd": {"decoder.hidden_size": 33}},
        arms={"classic": {}, "typo": {"decoder.streem": ["values"]}},
        allow_difference=["decoder.streem"],
    )
    with pytest.raises(UserError) as error:
        inspect(read_study(path))
    assert "typo at large, typo at small, typo at odd: unknown config key decoder.streem" in str(error.value)
    assert "classic at odd: num_attention_heads 4 does not divide hidden_size 33" in str(error.value)
    path = tiny_study(
        sizes={
            "large": {"decoder.hidden_size": 40},
            "small": {"data.batch_size": 9},
            "larger": {"decoder.hidden_size": 48},
        },
        tokens={"absolute": [256, 3e5, 1e6], "cooldown": 0.5},
        slurm={"small": {"gpus": 4}},
    )
    with pytest.raises(UserError) as error:
        inspect(read_study(path))
    parts = (
        "sizes must increase: large has",
        "warm-up 1 and cool-down 1 are longer than the run of 1 steps",
        "data.batch_size 9 is not a multiple of 4 device(s)",
        "epochs of",
        "raise tokens.max_epochs",
    )
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_study_without_its_store_is_planned_and_not_run(
    tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tiny_study(sizes={"small": {"data.store": "nowhere"}})
    assert len(plan(path, tmp_path)) == 1
    assert "note: nowhere is not here" in capsys.readouterr().out
    assert main(["study", "run", str(path)]) == 2
    assert "the store nowhere is not here" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_hours_come_from_what_is_given_or_measured(
    tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tiny_study(null_arm=False)
    assert [each["device_hours"] for each in plan(path, tmp_path)] == [None, None]
    assert "device-hours: give" in capsys.readouterr().out
    given = plan(path, tmp_path, "--tokens-per-second", "1000", "500")
    trained = 2 * (5120 + 3 * 256)  # two arms, each a run of 20 steps and a branch of 3
    assert [each["trained_tokens"] for each in given] == [trained, trained]
    assert [each["device_hours"] for each in given] == pytest.approx([trained / 1000 / 3600, trained / 500 / 3600])
    assert main(["study", "plan", str(path), "--tokens-per-second", "1000"]) == 2
    assert "--tokens-per-second needs a value for each of the sizes small, large" in capsys.readouterr().err

    record = register(inspect(read_study(path)))
    for run, rates in zip(record.runs[:3], ([100, 300, 200], [400], [1000]), strict=True):
        folder = record.folder / run.name
        folder.mkdir(parents=True)
        rows = [f"{step},{rate}" for step, rate in enumerate(rates, start=1)]
        (folder / "metrics.csv").write_text("\n".join(["step,tokens_per_second", *rows, ""]))
        (folder / "run.json").write_text('{"attempts": [{"devices": 2}]}')
    measured = plan(path, tmp_path)
    assert measured[0]["device_hours"] == pytest.approx(trained / 200 / 3600)  # of 200, 400, 1,000 over two devices
    assert measured[1]["device_hours"] is None


def _finish(folder: Path, run: StudyRun, loss: float) -> None:
    path = folder / run.name
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text("{}")
    (path / "summary.json").write_text(json.dumps({"step": run.steps, "validation_loss": loss}))


def test_the_search_decides_each_arms_value_at_every_size(tiny_study: Study) -> None:
    tune = {
        "key": "model.optimizer.lr",
        "values": [0.001, 0.002, 0.004, 0.008],
        "sizes": ["small", "large"],
        "seeds": 2,
    }
    sizes = {"small": {}, "large": {"decoder.hidden_size": 40}, "larger": {"decoder.hidden_size": 48}}
    study = read_study(tiny_study(tune=tune, sizes=sizes))
    inspection = inspect(study)
    record = register(inspection)
    search = [run for run in record.runs if run.stage == "tune"]
    assert len(search) == 2 * 2 * 2 * 4
    assert {run.budget for run in search} == {"2.56K"}
    assert not {run.seed for run in search} & {run.seed for run in record.runs if run.stage == "main"}
    assert not list((study.folder / "configs").rglob("*-seed*")) and record.choices == {}

    best = {
        ("classic", "small"): 0.002,
        ("classic", "large"): 0.004,
        ("values", "small"): 0.004,
        ("values", "large"): 0.008,
    }
    for run in search:
        distance = abs(tune["values"].index(run.value) - tune["values"].index(best[run.arm, run.size]))  # type: ignore[attr-defined]
        _finish(study.folder, run, 1.0 + distance)
    record = register(inspection)
    size = {name: inspection.of(name, "classic").non_embedding for name in sizes}
    ratio = (size["larger"] / size["large"]) ** (1 / math.log2(size["large"] / size["small"]))
    assert record.choices["classic"] == pytest.approx(
        {"small": 0.002, "large": 0.004, "larger": 0.004 * ratio}, rel=5e-3
    )
    (edge,) = record.notes
    assert "model.optimizer.lr of values at large is 0.008, the edge of the values that were tried" in edge
    for arm, chosen in (("classic", "classic"), ("values", "values"), ("null", "classic")):
        config = yaml.safe_load((study.folder / "configs" / "larger" / f"{arm}-seed1-5.12K.yaml").read_text())
        assert config["model"]["optimizer"]["lr"] == record.choices[chosen]["larger"]
    assert read_record(study.path) == record


def test_job_arrays_and_the_runs_of_a_task(tiny_study: Study, capsys: pytest.CaptureFixture) -> None:
    tune = {"key": "model.optimizer.lr", "values": [0.001, 0.002, 0.004], "sizes": ["small"]}
    slurm = {"large": {"nodes": 2, "gpus": 4, "cpus": 3, "time": "1:00:00"}}
    path = tiny_study(tune=tune, slurm=slurm, seeds=2)
    assert main(["study", "tasks", str(path)]) == 0
    lines = ["tune small 6 1 1 8 24:00:00", "main small 6 1 1 8 24:00:00", "main large 6 2 4 3 1:00:00"]
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["study", "tasks", str(path), "--stage", "main", "--size", "large", "--task", "2/6"]) == 2
    assert "the search of" in capsys.readouterr().err
    assert main(["study", "tasks", str(path), "--stage", "main"]) == 2

    inspection = inspect(read_study(tiny_study("plain", slurm=slurm, seeds=2)))
    folder, every = inspection.study.folder, []
    for number in range(1, 7):
        configs = list(task_configs(inspection, "main", "large", f"{number}/6"))
        assert [Path(config).stem.split("-")[-1] for config in configs] == ["5.12K", "2.56K"]
        every += configs
    runs = read_record(folder).runs
    assert every == [f"{folder}/configs/{run.name}.yaml" for run in runs if run.size == "large"]
    _finish(folder, next(run for run in runs if run.size == "large"), 1.0)
    assert list(task_configs(inspection, "main", "large", "1/6")) == every[1:2]
    for wrong in ("0/6", "7/6", "x", "1/x"):
        with pytest.raises(UserError, match="give I/N"):
            list(task_configs(inspection, "main", "large", wrong))


def test_tasks_and_slots_share_everything_out(tiny_study: Study) -> None:
    runs = study_runs(inspect(read_study(tiny_study(seeds=3))))
    parts = [share(runs, f"{task}/4") for task in range(1, 5)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
    assert share(runs, None) == runs
    for part in parts:
        assert all(run.trunk is None or run.trunk in [other.name for other in part] for run in part)
    assert slot_environment(1, 3, 8, []) == {"OMP_NUM_THREADS": "2"}
    assert slot_environment(0, 4, 2, []) == {"OMP_NUM_THREADS": "1"}
    gpus = [slot_environment(slot, 2, 8, ["0", "1", "2", "3"])["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)]
    assert gpus == ["0,1", "2,3"]
    assert [slot_environment(slot, 3, 8, ["4", "5"])["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "5", "4"]
