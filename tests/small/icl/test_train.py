"""Training: the step against SGD written out, exact resume, layouts and precisions that agree, and when it stops."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm.common.errors import UserError
from small.experiment.runs import read_record
from small.icl import train as training
from small.icl.runs import PARTS, UNSHIFTED, IclSpec, Snapshot, read_snapshots
from small.icl.settings import IclSettings, IclSizes, Task
from small.icl.task import KINDS, World
from small.icl.train import Machine, finished, made, train

from .test_model import reference, weights_of

TASK = Task(classes=32, labels=8, novel_classes=16, content=12, positions=17)
SIZES = IclSizes(width=TASK.width, labels=8, key_width=10, neurons=14)
SMALL = IclSettings(("classic", "values"), (0, 1), 60, 16, snapshot_every=20, evaluation=50, until=None)


def small(**changed: object) -> IclSettings:
    return IclSettings(**{**vars(SMALL), **changed})  # type: ignore[arg-type]


def test_the_defaults_are_the_papers() -> None:
    """Burns et al. 2025, and the authors' code: github.com/tfburns/AMICL-and-residual-attention-streams."""
    given = IclSettings()
    assert (given.lr, given.batch, given.decay, given.steps, given.snapshot_every) == (0.01, 128, 1e-6, 75_000, 500)
    assert (given.evaluation, len(given.seeds)) == (10_000, 4)
    task = Task()
    assert (task.tokens, task.width, task.positions, task.content) == (17, 150, 65, 85)
    assert (task.classes, task.labels, task.copies, task.novel_classes, task.noise) == (512, 32, 2, 128, 0.1)
    assert IclSizes() == IclSizes(150, 32, 128, 128, 2)


def test_steps_are_plain_sgd_with_decaying_weights() -> None:
    """Against the losses of the written-out transformer and w <- (1 - 1e-2) w - 0.05 g."""
    settings = small(lr=0.05, decay=1e-2)
    (group, _) = made(IclSpec(TASK, SIZES, settings), Machine())
    model = group.models[1]
    ours = weights_of(model, 0)
    world = World(TASK, 0)
    for step in range(5):
        group.train(step)
        batch = world.batch(step, settings.batch)
        reference(ours, model.variants[0], SIZES, batch.inputs, batch.answers).backward()
        for weight in ours.values():
            with torch.no_grad():
                weight.copy_((1 - 1e-2) * weight - 0.05 * weight.grad)
            weight.grad = None
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter[0], ours[name], rtol=1e-4, atol=1e-5)


def test_a_killed_training_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through, killed = tmp_path / "through", tmp_path / "killed"
    expected = train(through, IclSpec(TASK, SIZES, SMALL), Machine())
    steps = iter(range(10**9))

    def until_killed(self: training.Runs, step: int) -> None:
        if next(steps) == 95:  # in the third stretch of 20 steps, of the first of two groups
            raise KeyboardInterrupt
        whole(self, step)

    whole = training.Runs.train
    monkeypatch.setattr(training.Runs, "train", until_killed)
    with pytest.raises(KeyboardInterrupt):
        train(killed, IclSpec(TASK, SIZES, SMALL), Machine())
    assert read_snapshots(killed)[-1].step == 40
    monkeypatch.undo()
    assert train(killed, IclSpec(TASK, SIZES, SMALL), Machine()) == expected
    for name in ("checkpoint.safetensors", "snapshots.csv"):
        assert (killed / name).read_bytes() == (through / name).read_bytes()
    assert [attempt["from_step"] for attempt in read_record(killed, IclSpec.program, PARTS)["attempts"]] == [0, 40]


def test_rows_beyond_the_weights_are_made_again(tmp_path: Path) -> None:
    """A kill between the rows and the weights of a snapshot leaves the rows alone."""
    folder = tmp_path / "runs"
    train(folder, IclSpec(TASK, SIZES, small(steps=20)), Machine())
    weights = (folder / "checkpoint.safetensors").read_bytes()
    train(folder, IclSpec(TASK, SIZES, small(steps=40)), Machine())
    expected = (folder / "snapshots.csv").read_bytes()
    (folder / "checkpoint.safetensors").write_bytes(weights)
    train(folder, IclSpec(TASK, SIZES, small(steps=40)), Machine())
    assert (folder / "snapshots.csv").read_bytes() == expected


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first = train(tmp_path / "runs", IclSpec(TASK, SIZES, SMALL), Machine())
    before = (tmp_path / "runs" / "checkpoint.safetensors").stat().st_mtime_ns
    assert train(tmp_path / "runs", IclSpec(TASK, SIZES, SMALL), Machine()) == first
    assert (tmp_path / "runs" / "checkpoint.safetensors").stat().st_mtime_ns == before


def accuracies(rows: list[Snapshot]) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        found.setdefault((row.variant, row.seed), []).extend(row.loss[kind] for kind in KINDS)
    return found


@pytest.mark.parametrize(
    ("settings", "machine", "near"),
    [
        (SMALL, Machine(together=True), 1e-3),
        pytest.param(SMALL, Machine(compile=True), 1e-3, marks=pytest.mark.slow),
        (small(variants=("values", "keys", "classic")), Machine(together=True), 1e-3),  # whatever is beside it
        (small(products="bfloat16"), Machine(), 0.03),
    ],
    ids=["together", "compiled", "other company", "bfloat16"],
)
def test_layouts_and_precisions_train_alike(
    tmp_path: Path, settings: IclSettings, machine: Machine, near: float
) -> None:
    expected = accuracies(train(tmp_path / "apart", IclSpec(TASK, SIZES, SMALL), Machine()))
    found = accuracies(train(tmp_path / "other", IclSpec(TASK, SIZES, settings), machine))
    for run, losses in expected.items():
        torch.testing.assert_close(torch.tensor(found[run]), torch.tensor(losses), rtol=near, atol=near)


def test_a_training_goes_on_in_another_layout(tmp_path: Path) -> None:
    train(tmp_path / "runs", IclSpec(TASK, SIZES, small(steps=40)), Machine(together=True))
    train(tmp_path / "runs", IclSpec(TASK, SIZES, SMALL), Machine())
    train(tmp_path / "through", IclSpec(TASK, SIZES, SMALL), Machine())
    one, other = (accuracies(read_snapshots(tmp_path / name)) for name in ("runs", "through"))
    for run, losses in other.items():
        torch.testing.assert_close(torch.tensor(one[run]), torch.tensor(losses), rtol=1e-3, atol=1e-3)


def test_runs_of_a_seed_begin_alike_and_see_the_same_sequences() -> None:
    (group, _) = made(IclSpec(TASK, SIZES, small(variants=("classic", "values", "keys:learned:nmda2"))), Machine())
    for model in group.models[1:]:
        theirs = dict(model.named_parameters())
        for name, parameter in group.models[0].named_parameters():
            assert torch.equal(parameter, theirs[name])


def test_evaluation_counts_what_the_logits_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot against a recount, one sequence at a time; the last part is smaller than the others."""
    monkeypatch.setattr(training, "AT_ONCE", 20)
    (group, _) = made(IclSpec(TASK, SIZES, SMALL), Machine())
    for step in range(30):
        group.train(step)
    rows = group.snapshot(20)
    world, model = World(TASK, 0), group.models[1]
    weights = weights_of(model, 0)
    for kind in ("iw", "ic2"):
        drawn = [world.evaluation(kind, part, count) for part, count in enumerate((20, 20, 10))]
        inputs = torch.cat([each.inputs for each in drawn])
        answers = torch.cat([each.answers for each in drawn])
        losses = torch.stack(
            [
                torch.stack(
                    [reference(weights, model.variants[0], SIZES, one[None], torch.tensor([n])) for n in range(8)]
                )
                for one in inputs
            ]
        )  # (50, 8): minus the logarithm of each label's probability
        assert rows[1].accuracy[kind] == pytest.approx((losses.argmin(1) == answers).float().mean().item())
        assert rows[1].loss[kind] == pytest.approx(losses.gather(1, answers[:, None]).mean().item(), rel=1e-4)
    learned = torch.cat([each.classes[:, -1] for each in drawn]) % TASK.labels  # the label that training showed
    unshifted = losses.gather(1, learned[:, None]).mean().item()
    assert rows[1].loss[UNSHIFTED] == pytest.approx(unshifted, rel=1e-4) != pytest.approx(rows[1].loss["ic2"], rel=1e-3)


# ---- When it stops ---------------------------------------------------------------------------------------------------


def row(snapshot: int, seed: int, ic: float, ic2: float = 0.99) -> Snapshot:
    accuracy = {"test": 0.0, "ic": ic, "ic2": ic2, "iw": 0.0}
    return Snapshot(snapshot, 500 * snapshot, "values", seed, accuracy, dict.fromkeys(KINDS, 1.0))


@pytest.mark.parametrize(
    ("curves", "stops"),
    [
        ([[0.96] * 5, [0.97] * 5], True),
        ([[0.96] * 4, [0.97] * 4], False),  # not yet five
        ([[0.1, 0.96, 0.96, 0.96, 0.96, 0.96], [0.97] * 6], True),
        ([[0.96, 0.96, 0.94, 0.96, 0.96], [0.97] * 5], False),  # it fell back
        ([[0.96] * 5, [0.9] * 5], False),  # the other seed
        ([[0.95] * 5], False),  # passed is above
    ],
)
def test_it_stops_when_all_runs_have_passed_for_good(curves: list[list[float]], stops: bool) -> None:
    rows = [row(n, seed, curve[n]) for n in range(len(curves[0])) for seed, curve in enumerate(curves)]
    assert finished(rows, IclSettings()) is stops


def test_ic2_must_have_passed_too() -> None:
    assert not finished([row(n, 0, 0.99, ic2=0.9) for n in range(5)], IclSettings())
    assert finished([row(150, 0, 0.1)], IclSettings())  # 75,000 steps


def test_a_training_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Callable = lambda model, *_: torch.tensor([[each] * len(model.runs) for each in (0.99, 0.1, 0.1)])  # noqa: E731
    monkeypatch.setattr(training, "_measures", fake)
    rows = train(tmp_path / "runs", IclSpec(TASK, SIZES, small(steps=2000, until=0.9, patience=3)), Machine())
    assert rows[-1].snapshot == 2


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    train(tmp_path / "runs", IclSpec(TASK, SIZES, small(steps=20)), Machine())
    kept = (tmp_path / "runs" / "snapshots.csv").read_bytes()
    with pytest.raises(UserError, match=r"settings\.lr .*another --out"):
        train(tmp_path / "runs", IclSpec(TASK, SIZES, small(lr=0.5)), Machine())
    assert (tmp_path / "runs" / "snapshots.csv").read_bytes() == kept


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * 64])
def test_damaged_weights_are_refused_and_left(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = tmp_path / "runs"
    train(folder, IclSpec(TASK, SIZES, small(steps=20)), Machine())
    path = folder / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    left = path.read_bytes()
    with pytest.raises(UserError, match="delete it to train from the start"):
        train(folder, IclSpec(TASK, SIZES, SMALL), Machine())
    assert path.read_bytes() == left


@pytest.mark.parametrize("text", ["", "snapshot,step\n1,2\n", "{}"])
def test_damaged_rows_are_refused(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "runs"
    train(folder, IclSpec(TASK, SIZES, small(steps=20)), Machine())
    (folder / "snapshots.csv").write_text(text)
    with pytest.raises(UserError, match=r"snapshots\.csv"):
        train(folder, IclSpec(TASK, SIZES, SMALL), Machine())


def test_a_foreign_folder_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds no training"):
        train(foreign, IclSpec(TASK, SIZES, SMALL), Machine())
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        train(tmp_path / "file", IclSpec(TASK, SIZES, SMALL), Machine())
    (foreign / "thesis.tex").unlink()
    (foreign / "run.json").write_text(json.dumps({"attempts": 3}))
    with pytest.raises(UserError, match=r"run\.json"):
        train(foreign, IclSpec(TASK, SIZES, SMALL), Machine())


def test_a_full_disk_keeps_the_snapshot_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs"
    expected = train(tmp_path / "through", IclSpec(TASK, SIZES, SMALL), Machine())
    train(folder, IclSpec(TASK, SIZES, small(steps=20)), Machine())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm.common.files.os.fsync", full)
    with pytest.raises(UserError, match=r"No space left.*free space"):
        train(folder, IclSpec(TASK, SIZES, SMALL), Machine())
    monkeypatch.undo()
    assert train(folder, IclSpec(TASK, SIZES, SMALL), Machine()) == expected


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"steps": 70}, "multiple of evaluate-every"),
        ({"batch": 0, "lr": -1.0}, "batch 0.*lr"),
        ({"variants": ("values", "values")}, "none twice"),
        ({"variants": ()}, "at least one variant"),
        ({"seeds": ()}, "at least one seed"),
        ({"until": 1.5}, "stop-accuracy"),
        ({"products": "fp8"}, "float32 or bfloat16"),
        ({"lr": float("inf")}, "lr inf"),
        ({"variants": ("vales", "keys:best")}, "vales.*best"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        small(**changed)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="--device cpu"):
        Machine("cuda:7" if not torch.cuda.is_available() else "cuda:99")
    with pytest.raises(UserError, match="--device cpu"):
        Machine("toaster")


def test_runs_that_all_diverged_end_and_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = train(tmp_path / "runs", IclSpec(TASK, SIZES, small(lr=1e4, steps=200)), Machine(together=True))
    assert rows[-1].step == 20
    assert "pass a smaller --lr" in capsys.readouterr().err
    assert read_snapshots(tmp_path / "runs")[-1].step == 20


def test_a_diverged_run_spares_the_others_of_its_model() -> None:
    (alone,) = made(IclSpec(TASK, SIZES, small(variants=("values",), seeds=(0,))), Machine())
    (group,) = made(IclSpec(TASK, SIZES, SMALL), Machine(together=True))
    with torch.no_grad():
        group.models[0].projections[0][0] = math.nan  # classic, seed 0
    for step in range(3):
        alone.train(step)
        group.train(step)
    ours, theirs = alone.models[0].read_out[0], group.models[0].read_out
    torch.testing.assert_close(theirs[2], ours, rtol=1e-4, atol=1e-6)
    assert theirs[0].isnan().any() and theirs[1:].isfinite().all()


def test_the_folder_is_held_while_it_trains_and_free_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked from another process: a process's own lock never stands in its own way."""
    folder, whole, held = tmp_path / "runs", training.Runs.snapshot, []

    def refused() -> bool:
        ask = "import sys, pathlib; from llm.common.lock import acquire_lock; acquire_lock(pathlib.Path(sys.argv[1]))"
        outcome = subprocess.run([sys.executable, "-c", ask, str(folder)], capture_output=True, text=True)
        return "another process is training" in outcome.stderr

    def asked(self: training.Runs, step: int) -> list[Snapshot]:
        held.append(refused())
        return whole(self, step)

    monkeypatch.setattr(training.Runs, "snapshot", asked)
    train(folder, IclSpec(TASK, SIZES, small(steps=20, seeds=(0,))), Machine())
    assert held == [True, True]
    assert not refused()
