"""The notebooks run from any folder, and what they print is true of the runs that come with them."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small

MISSING = "the notebooks need pip install '.[notebooks]'"
nbformat = pytest.importorskip("nbformat", reason=MISSING)
nbclient = pytest.importorskip("nbclient", reason=MISSING)
pytest.importorskip("ipykernel", reason=MISSING)

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "small/notebooks"
NAMES = ("grid", "tem")
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@pytest.fixture
def executed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook of this name, executed in an empty folder by this Python."""
    for name in (
        "IPYTHONDIR",
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
    ):  # not those of the user
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    empty = tmp_path / "empty"
    empty.mkdir()
    notebook = _read(request.param)
    where = {"metadata": {"path": str(empty)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    return notebook


def _read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def _printed(notebook: Any) -> list[str]:
    """Every line of text that the cells print, or of their results; warnings depend on the environment."""
    outputs = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") != "stderr"
    ]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return [line for text in texts for line in text.splitlines() if not line.startswith("<")]


def _number(notebook: Any, label: str) -> float:
    """The number that is printed after a label."""
    (line,) = [line for line in _printed(notebook) if line.startswith(f"{label}:")]
    return float(NUMBER.findall(line.partition(":")[2])[0])


def _assert_as_committed(notebook: Any, name: str) -> None:
    """The committed outputs are those of an execution, up to what rounding on another processor does."""
    now, committed = _printed(notebook), _printed(_read(name))
    assert [NUMBER.sub("#", line) for line in now] == [NUMBER.sub("#", line) for line in committed]
    for line, before in zip(now, committed, strict=True):
        values, expected = ([float(x.replace(",", "")) for x in NUMBER.findall(each)] for each in (line, before))
        np.testing.assert_allclose(values, expected, atol=0.05, err_msg=line)


@pytest.mark.parametrize("executed", ["grid"], indirect=True)
def test_grid_error_out_of_the_context_is_below_chance(executed: Any) -> None:
    _assert_as_committed(executed, "grid")
    loaded = small.load(NOTEBOOKS / "runs/grid")
    episode = loaded.episode(seed=1, walkers=256)
    guesses = loaded.activations(episode)["logits"].argmax(-1)
    wrong: dict[str, list[bool]] = {"inside": [], "outside": []}
    for cells, letters, guess in zip(episode["cell"], episode["letter"], guesses, strict=True):
        last_visit = {cells[0]: 0}
        for step, (cell, letter) in enumerate(zip(cells[1:], letters[1:], strict=True), start=1):
            since = step - last_visit.get(cell, -100)
            last_visit[cell] = step
            group = "inside" if since <= 8 else "outside" if since > 16 else None
            if group and step > 128:
                wrong[group].append(guess[step - 1] != letter)
    inside, outside = (float(np.mean(group)) for group in wrong.values())
    assert _number(executed, "in the context") == pytest.approx(inside, abs=2e-3)
    assert _number(executed, "out of the context") == pytest.approx(outside, abs=2e-3)
    assert _number(executed, "chance") == pytest.approx(0.9) and inside < outside < 0.45
    place = _number(executed, "median correlation of the halves, twelve best")
    shuffled = _number(executed, "the same, walkers shuffled")
    assert place > 0.8 and abs(shuffled) < 0.5


@pytest.mark.parametrize("executed", ["tem"], indirect=True)
def test_tem_zero_shot_accuracy_is_above_chance(executed: Any) -> None:
    _assert_as_committed(executed, "tem")
    loaded = small.load(NOTEBOOKS / "runs/tem")
    episode = loaded.episode(seed=1, environments=96)
    actions, symbols = torch.from_numpy(episode["action"]), torch.from_numpy(episode["symbol"])
    with torch.no_grad():
        guesses = loaded.model(actions, symbols).logits.argmax(-1)
    right = []
    for cells, taken, seen, guess in zip(episode["cell"], actions.tolist(), symbols.tolist(), guesses, strict=True):
        visited, links = {cells[0]}, set()
        for step in range(1, len(cells)):
            link = cells[step - 1], taken[step]
            if link not in links and cells[step] in visited and taken[step] > 0:
                right.append(int(guess[step - 1]) == seen[step])
            links.add(link)
            visited.add(cells[step])
    assert _number(executed, "zero-shot accuracy") == pytest.approx(np.mean(right), abs=2e-3)
    assert np.mean(right) > 0.9 and _number(executed, "chance") == pytest.approx(1 / 45, abs=1e-3)
    for baseline in ("most frequent symbol so far", "actions of another walk"):
        assert _number(executed, baseline) < 0.25


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_names_the_command_of_its_run_and_both_are_small(name: str) -> None:
    folder = NOTEBOOKS / "runs" / name
    record = json.loads((folder / "run.json").read_text())
    notebook = _read(name)
    commands = [attempt["command"] for attempt in record["attempts"]]
    assert all(f"\n    {command}\n" in notebook.cells[0].source for command in commands)
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 150_000
    assert sum(file.stat().st_size for file in folder.iterdir()) < 400_000
