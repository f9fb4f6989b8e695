"""Training of both models: against a plain loop, resumed after a kill, and the command line with its table."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llm.common.errors import UserError
from small.experiment.groups import grouped
from small.experiment.runs import read_rows
from small.tem.machine import Machine
from small.tem.memory import RULES, Rule
from small.tem.model import TemTransformer
from small.tem.runs import Model, Row, TemRun, TemSpec, names, read_runs
from small.tem.settings import MachineSizes, TemSettings, TransformerSizes
from small.tem.tables import accuracy_table, comparison
from small.tem.train import Run, train

SETTINGS = TemSettings(
    spaces=("3x3", "3x4"), symbols=6, steps=6, batch=4, walk_from=8, walk_to=12, test_every=2, tested=4, tested_steps=20
)  # fmt: skip
TEM_T = Model(TransformerSizes(code=8, keys=6, values=5, neurons=7))
TEM = Model(MachineSizes(code=9, modules=(6, 3), sensory=4, neurons=7), RULES["code"])


def test_a_training_is_adam_on_fresh_walks_of_growing_length() -> None:
    run = Run(TemSpec(TEM_T, SETTINGS))
    plain = TEM_T.build(run.environments.actions, 6)
    plain.load_state_dict(run.model.state_dict())
    adam = torch.optim.Adam(plain.parameters(), SETTINGS.lr)
    for step, steps in enumerate((8, 9, 10, 10, 11, 12), start=1):
        episode = run.environments.episode("train", step, 4, steps)
        logits = plain(episode.actions, episode.symbols).logits
        loss = F.nll_loss(logits.log_softmax(-1).reshape(-1, 6), episode.symbols[:, 1:].reshape(-1))
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), SETTINGS.clip)
        adam.step()
        assert run.train(step).item() == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(run.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", [TEM_T, TEM], ids=["tem-t", "tem"])
def test_a_model_survives_its_record(model: Model) -> None:
    again = Model.from_record(json.loads(json.dumps(model.record())))
    assert again == model
    assert isinstance(model.build(5, 6), TemTransformer if model.rule is None else Machine)


def results(folder: Path) -> tuple[list, dict[str, torch.Tensor]]:
    """All but the seconds."""
    tensors = load_file(folder / "checkpoint.safetensors")
    assert tensors.pop("seconds") > 0
    return [(row.step, *row[2:]) for row in read_rows(folder / "accuracy.csv", Row)][1:], tensors


@pytest.mark.parametrize("model", [TEM_T, TEM], ids=["tem-t", "tem"])
def test_a_killed_training_ends_with_the_same_weights(model: Model, tmp_path: Path) -> None:
    train(tmp_path / "whole", TemSpec(model, SETTINGS), quiet=True)
    ask = (
        "import sys, time; from pathlib import Path\n"
        "from tests.small.tem.test_train import *\n"
        "from small.experiment.runs import TableFolder\n"
        "keep = TableFolder.keep\n"
        "def slow(self, row, step, tensors):\n"
        "    keep(self, row, step, tensors); print(step, flush=True); time.sleep(0.3)\n"
        "TableFolder.keep = slow\n"
        f"train(Path(sys.argv[1]), TemSpec({'TEM_T' if model == TEM_T else 'TEM'}, SETTINGS), quiet=True)"
    )
    killed = tmp_path / "killed"
    with subprocess.Popen([sys.executable, "-c", ask, str(killed)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 2:
            pass
        process.send_signal(signal.SIGKILL)
    assert [row.step for row in read_rows(killed / "accuracy.csv", Row)] == [0, 2]
    rows = train(killed, TemSpec(model, SETTINGS), quiet=True)
    assert [row.step for row in rows] == [0, 2, 4, 6] and rows[-1].seconds > rows[1].seconds > 0
    for one, other in zip(results(killed), results(tmp_path / "whole"), strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        else:
            assert one == other
    before = (killed / "run.json").read_bytes()
    assert list(train(killed, TemSpec(model, SETTINGS), quiet=True))[1:] == list(rows)[1:]
    assert (killed / "run.json").read_bytes() == before


@pytest.mark.parametrize("model", [TEM_T, TEM], ids=["tem-t", "tem"])
def test_walks_that_are_carried_over_resume(model: Model, tmp_path: Path) -> None:
    settings = replace(SETTINGS, walk_from=20, walk_to=9, walk_spread=5, backprop=5)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, TemSpec(model, settings), quiet=True)
    # Stopped after four of six steps: the rest is from the checkpoint alone.
    with pytest.MonkeyPatch.context() as patched:
        plain = Run.train

        def until_four(run: Run, step: int) -> torch.Tensor:
            if step > 4:
                raise KeyboardInterrupt
            return plain(run, step)

        patched.setattr(Run, "train", until_four)
        with pytest.raises(KeyboardInterrupt):
            train(parts, TemSpec(model, settings), quiet=True)
    train(parts, TemSpec(model, settings), quiet=True)
    (rows, tensors), (expected, same) = results(parts), results(whole)
    assert rows == expected and all(torch.equal(tensors[name], same[name]) for name in same)
    assert {name for name in same if name.startswith("carry.")} == {
        "carry.code", *(f"carry.{name}" for name in (["matrix"] if model.rule else ["keys", "values", "count"]))
    }  # fmt: skip


@pytest.mark.parametrize("rule", [None, Rule(), Rule(form="matrix")], ids=["tem-t", "sums", "matrix"])
def test_parts_of_a_walk_are_the_walk(rule: Rule | None) -> None:
    """Logits of a part after the other, with what is carried over, are those of the walk at once."""
    torch.manual_seed(0)
    model = (TEM_T if rule is None else Model(TEM.sizes, rule)).build(5, 6)
    actions, symbols = torch.randint(5, (3, 13)), torch.randint(6, (3, 13))
    whole = model(actions, symbols).logits
    carry = model.carry(3, 12)
    carry.memory["count" if rule is None else "matrix"].fill_(7)  # of a walk before: forgotten
    parts = [slice(0, 6), slice(5, 7), slice(6, 13)]
    found = torch.cat([model(actions[:, p], symbols[:, p], carry).logits for p in parts], dim=1)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_surprising_moments_cannot_be_carried_over() -> None:
    model = Model(replace(TEM_T.sizes, store="new"))
    with pytest.raises(UserError, match="--backprop carries all moments over: drop --store new"):
        Run(TemSpec(model, replace(SETTINGS, backprop=4)))


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    train(tmp_path, TemSpec(TEM_T, SETTINGS), quiet=True)
    for model, settings, sentence in (
        (TEM, SETTINGS, "model.name"), (TEM_T, replace(SETTINGS, lr=0.1), "settings.lr"),
        (TEM_T, replace(SETTINGS, spaces=("3x3",)), "settings.spaces"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"different settings \({sentence}"):
            train(tmp_path, TemSpec(model, settings), quiet=True)


def test_a_diverged_training_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss before step 2 is nan.*give an lr below 1e\+30"):
        train(tmp_path, TemSpec(TEM_T, replace(SETTINGS, lr=1e30)), quiet=True)


def made(model: Model, seed: int, *rows: tuple[int, float, float]) -> TemRun:
    """A run with rows of step, seconds and zero-shot accuracy."""
    made = [Row(s, t, 1.0, 0.99, z, 30.0) for s, t, z in rows]
    return TemRun(model, TemSettings(seed=seed), folder=Path(f"{seed}"), rows=made)


def test_the_table_says_when_runs_got_there_and_compares_within_seeds() -> None:
    first = [made(TEM_T, s, (0, 0, 0.1), (50, 2.0, 0.8), (100, 4.0, 0.9 + s / 100)) for s in range(3)]
    second = [made(TEM, s, (0, 0, 0.1), (100, 12.0, 0.4 + s * s / 100)) for s in range(3)]
    text = accuracy_table([*first, *second])
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines() if line.startswith("TEM")}
    assert lines["TEM-t"][-3:] == ["40.0", "100", "4"] and lines["TEM"][-3:] == ["120.0", "not", "not"]
    differences = np.array([0.5, 0.5, 0.48])
    half = 4.302652729911275 * differences.std(ddof=1) / 3**0.5
    assert (
        f"{differences.mean():+.3f} after 100 steps, 95% interval {differences.mean() - half:+.3f} to "
        f"{differences.mean() + half:+.3f} within 3 seeds; a step of the second takes 3.0 times as long"
    ) in text
    assert "no test, as fewer than two seeds" in comparison(first[:1], second)


def test_runs_under_way_are_compared_where_all_have_been() -> None:
    first = [made(TEM_T, s, (0, 0, 0.1), (50, 2.0, 0.5 + s / 10), (100, 9.0, 0.9)) for s in (0, 1)]
    first.append(made(TEM_T, 7, (0, 0, 0.1)))  # a seed that the other side lacks
    second = [made(TEM, 0, (0, 0, 0.1), (50, 4.0, 0.4), (100, 8.0, 0.8)), made(TEM, 1, (0, 0, 0.1), (50, 4.0, 0.4))]
    text = comparison(first, second)
    assert (
        "zero-shot accuracy +0.150 after 50 steps" in text and "within 2 seeds; a step of the second takes 2.0" in text
    )
    assert "no test" in comparison([made(TEM_T, s, (0, 0, 0.1)) for s in (0, 1)], second)


def test_rules_of_a_memory_make_groups(tmp_path: Path) -> None:
    """Two runs that differ in the steps of the attractor are no two seeds."""
    runs = [made(Model(TEM.sizes, replace(RULES["code"], steps=steps)), 0, (0, 0, 0.1)) for steps in (5, 1)]
    assert names(grouped(runs)) == ["TEM, rule.steps 5", "TEM, rule.steps 1"]


def test_a_space_that_changed_under_its_name_is_another(tmp_path: Path) -> None:
    maze = tmp_path / "maze.txt"
    maze.write_text("#####\n#...#\n#...#\n#####\n")
    settings = replace(SETTINGS, spaces=(str(maze),))
    train(tmp_path / "run", TemSpec(TEM_T, settings), quiet=True)
    assert len(read_runs(tmp_path)) == 1
    maze.write_text("#####\n#...#\n#.#.#\n#...#\n#####\n")
    with pytest.raises(UserError, match=r"different settings \(spaces\..*maze.txt"):
        train(tmp_path / "run", TemSpec(TEM_T, settings), quiet=True)
    with pytest.raises(UserError, match=r"a file among the spaces of .* has changed since"):
        read_runs(tmp_path)
