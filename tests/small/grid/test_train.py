"""Training: errors against a slow count, exact resume, the schedule, and what a folder refuses."""

import json
import math
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from llm.common.errors import UserError
from small.experiment.runs import copy_into
from small.grid.model import Answer, Variant
from small.grid.runs import GridSpec, read_rows
from small.grid.settings import GridSettings, GridSizes
from small.grid.train import Run, errors_of, train
from small.spaces import read, space

GRAPH = space("4x4")
SIZES = GridSizes(width=16, heads=2, head_dim=8, neurons=16, code=8, segment=4, memory=4)
SETTINGS = GridSettings(maps=2, letters=4, trials=3, steps=16, batch=4, lr=1e-2, walkers=6)
VARIANT = Variant("nmda:10")


def test_errors_are_those_of_a_slow_count() -> None:
    run = Run(GridSpec(GRAPH, SIZES, VARIANT, replace(SETTINGS, walkers=40, steps=200)))
    walks = run.world.trial("familiar", 5, 40, 200)
    wrong = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    hits: dict[str, list[bool]] = defaultdict(list)
    for walker in range(40):
        cells = walks.cells[walker].tolist()
        for segment in range(50):
            now = 4 * (segment + 1)
            place, failed = cells[now], bool(wrong[walker, segment])
            hits["working" if place in cells[max(0, now - 8) : now] else "reference"].append(failed)
            if place not in cells[:now]:
                hits["first"].append(failed)
    found = errors_of(wrong, walks, 4, SIZES.window)
    for name, count in (("working", "visited"), ("reference", "unvisited"), ("first", "new")):
        assert getattr(found, name) == sum(hits[name]) / len(hits[name])
        assert getattr(found, count) == len(hits[name])


def test_an_evaluation_counts_what_the_navigator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that always says the letter of the last cell is right where that is the letter, whatever the step before."""
    run = Run(GridSpec(GRAPH, SIZES, VARIANT, replace(SETTINGS, walkers=50)))

    def says_the_last(code, actions, letters, memory, asked) -> Answer:
        assert asked == (4,) and letters.shape == (50, 4) and actions.shape == (50, 5)
        return Answer(torch.nn.functional.one_hot(letters[:, -1:], 4).float(), code, (), ())

    monkeypatch.setattr(run.model, "forward", says_the_last)
    for kind in ("familiar", "novel"):
        walks = run.world.trial(kind, 2, 50, 16)
        found = run.evaluate(kind, 2)
        failed = [walks.letters[w, n] != walks.letters[w, n - 1] for w in range(50) for n in (4, 8, 12, 16)]
        wrong = found.working * found.visited + found.reference * found.unvisited
        assert round(wrong) == sum(map(int, failed)) and found.visited + found.unvisited == 200


def test_an_evaluation_carries_code_and_memory_from_segment_to_segment() -> None:
    """Against each walker's own passes, one segment after the other."""
    run = Run(GridSpec(GRAPH, SIZES, VARIANT, replace(SETTINGS, walkers=8, steps=40)))
    with torch.no_grad():
        for weight in run.model.parameters():  # large ones: what is not carried shows
            weight.add_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    walks, first = run.world.trial("novel", 3, 8, 40), run.first_code("novel", 3, 8)
    run.model.eval()
    wrong = torch.zeros(8, 10, dtype=torch.bool)
    for walker in range(8):
        actions, letters = walks.actions[walker : walker + 1], walks.letters[walker : walker + 1]
        code, memory = first[walker : walker + 1], ()
        for segment in range(10):
            begin = 4 * segment
            now = actions[:, begin : begin + 5], letters[:, begin : begin + 4]
            with torch.no_grad():
                answer = run.model(code, *now, memory, (4,))
            code, memory = answer.code, answer.memory
            wrong[walker, segment] = answer.logits[0, 0].argmax() != letters[0, begin + 4]
    assert 0 < wrong.sum() < 80
    assert run.evaluate("novel", 3) == errors_of(wrong, walks, 4, SIZES.window)


def test_first_weights_are_those_of_notes() -> None:
    """N(0, 0.02), biases zero, transitions at the identity; the same ones whatever the form of the code."""
    sizes = GridSizes(width=128, neurons=256, code=32, heads=4, head_dim=32)
    positions = ("paper", "residual", "actions")
    forms = {
        form: Run(GridSpec(GRAPH, sizes, Variant(position=form), GridSettings(letters=4))).model for form in positions
    }
    weights = dict(forms["paper"].named_parameters())
    for name, weight in weights.items():
        if name == "codes.transitions":
            assert torch.equal(weight, torch.eye(32).repeat(5, 1))
        elif "norm" in name or ("bias" in name and "content" not in name):
            assert weight.unique().tolist() == [1.0 if name.endswith("norm.weight") else 0.0], name
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.2), name
    assert not dict(forms["residual"].named_parameters())["codes.transitions"].any()
    for other in ("residual", "actions"):
        shared = {name: w for name, w in forms[other].named_parameters() if not name.startswith("codes.")}
        assert all(torch.equal(weight, weights[name]) for name, weight in shared.items())


def test_dropout_falls_on_the_input_and_in_every_layer() -> None:
    run = Run(GridSpec(GRAPH, SIZES, VARIANT, SETTINGS))
    walks, code = run.world.trial("train", 1, 4, 4), run.first_code("train", 1, 4)
    asked = (code, walks.actions, walks.letters[:, :4], (), (4,))
    shares: dict[str, float] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, out, name=name: shares.update({name: (out == 0).float().mean().item()})
        )
        for name, module in run.model.named_modules()
        if isinstance(module, torch.nn.Dropout)
    ]
    run.model.train()(*asked)
    assert set(shares) == {"dropout", "layers.0.dropout", "layers.1.dropout"}
    assert all(0 < share < 0.4 for share in shares.values())
    for hook in hooks:
        hook.remove()
    assert torch.equal(run.model.eval()(*asked).logits, run.model(*asked).logits)


def test_bfloat16_products_are_near_and_not_equal() -> None:
    losses = {
        p: Run(GridSpec(GRAPH, SIZES, VARIANT, replace(SETTINGS, products=p, lr=1e-9))).train(1)
        for p in ("float32", "bfloat16")
    }
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.01)


def test_a_training_that_diverges_ends_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="the loss of trial 1 is nan, so the training has diverged: give an lr below 1e"
    ):
        train(tmp_path / "run", GridSpec(GRAPH, SIZES, VARIANT, replace(SETTINGS, lr=1e30)))
    assert [row.trial for row in read_rows(tmp_path / "run")] == [0]


def test_a_target_that_is_no_target_has_no_error() -> None:
    run = Run(GridSpec(GRAPH, SIZES, VARIANT, SETTINGS))
    walks = run.world.trial("familiar", 0, 2, 4)
    walks = walks._replace(gaps=torch.ones_like(walks.gaps))
    found = errors_of(torch.zeros(2, 1, dtype=torch.bool), walks, 4, 8)
    assert found.working == 0 and math.isnan(found.reference) and math.isnan(found.first)


@pytest.mark.parametrize("objective", ["steps", "parallel"])
def test_a_trial_is_adam_on_the_mean_cross_entropy(objective: str) -> None:
    """Against a loop with autograd, `torch.optim.Adam`'s update written out, and the schedule's rates."""
    sizes, settings = replace(SIZES, dropout=0.0), replace(SETTINGS, objective=objective, steps=8, clip=1e-3)
    run, other = (Run(GridSpec(GRAPH, sizes, VARIANT, settings)) for _ in range(2))
    loss = run.train(1)
    walks = other.world.trial("train", 1, 4, 8)
    weights = dict(other.model.named_parameters())
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    code, memory, losses, step = other.first_code("train", 1, 4), (), [], 0
    for segment in range(2):
        lr = 1e-2 * (1 - segment / (3 * 2))
        for asked in [(1, 2, 3, 4)] if objective == "parallel" else [(1,), (2,), (3,), (4,)]:
            first, last = 4 * segment, 4 * segment + asked[-1]
            answer = other.model(code, walks.actions[:, first : last + 1], walks.letters[:, first:last], memory, asked)
            chosen = answer.logits.log_softmax(-1).gather(
                -1, torch.stack([walks.letters[:, first + t] for t in asked], 1)[..., None]
            )
            losses.append(-chosen.mean())
            grads = dict(
                zip(weights, torch.autograd.grad(losses[-1], list(weights.values()), allow_unused=True), strict=True)
            )
            length = math.sqrt(sum(g.square().sum().item() for g in grads.values() if g is not None))
            step += 1
            with torch.no_grad():
                for name, weight in weights.items():
                    if grads[name] is None:
                        continue
                    gradient = grads[name] * min(1, 1e-3 / length)
                    mean, square = moments[name]
                    mean.mul_(0.9).add_(0.1 * gradient)
                    square.mul_(0.999).add_(0.001 * gradient**2)
                    weight -= lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        code, memory = answer.code.detach(), answer.memory
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    for (name, ours), theirs in zip(run.model.named_parameters(), weights.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3, msg=name)


def results(path: Path) -> tuple[bytes, bytes]:
    return (path / "errors.csv").read_bytes(), (path / "checkpoint.safetensors").read_bytes()


@pytest.mark.parametrize("objective", ["steps", "parallel"])
def test_a_killed_training_goes_on_with_the_same_bits(objective: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, objective=objective, trials=6, evaluate_every=2)
    train(tmp_path / "whole", GridSpec(GRAPH, SIZES, VARIANT, settings))
    killed = tmp_path / "killed"
    ask = (
        "import sys, time; from pathlib import Path; from small.grid import train as t\n"
        "from small.spaces import space; from small.grid.model import *; from small.grid.settings import *\n"
        "keep = t.GridFolder.keep\n"
        "def slow(self, row, trial, run):\n"
        "    keep(self, row, trial, run); print(trial, flush=True); time.sleep(0.3)\n"
        "t.GridFolder.keep = slow\n"
        f"t.train(Path(sys.argv[1]), t.GridSpec(space('4x4'), {SIZES!r}, {VARIANT!r}, {settings!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", ask, str(killed)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 3:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [row.trial for row in read_rows(killed)] == [0, 2]
    rows = train(killed, GridSpec(GRAPH, SIZES, VARIANT, settings))
    assert results(killed) == results(tmp_path / "whole")
    assert [row.trial for row in rows] == [0, 2, 4, 6]
    attempts = json.loads((killed / "run.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, 3]
    kept = results(killed)
    assert train(killed, GridSpec(GRAPH, SIZES, VARIANT, settings))[-1] == rows[-1]
    assert results(killed) == kept and json.loads((killed / "run.json").read_text())["attempts"] == attempts


def test_runs_of_one_seed_share_what_they_have_in_common() -> None:
    """First weights, maps and walks: alpha and streams are the one difference."""
    one, other = (
        Run(GridSpec(GRAPH, SIZES, Variant(act, streams=s), SETTINGS))
        for act, s in (("nmda:0", ()), ("relu", ("values",)))
    )
    for (name, left), (_, right) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(left, right), name
    assert (one.world.letters == other.world.letters).all()


def test_compiled_steps_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In few graphs for all times of a segment, with memory and without. Compiled dropout draws other numbers.

    The backend is the one that runs graphs and their gradients as they were traced: Inductor would take a minute.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    sizes, settings = replace(SIZES, dropout=0.0, layers=1, segment=8), replace(SETTINGS, trials=1)
    plain, compiled = (Run(GridSpec(GRAPH, sizes, VARIANT, settings), compiled=c) for c in (False, True))
    torch._dynamo.utils.counters.clear()
    assert compiled.train(1) == pytest.approx(plain.train(1), rel=1e-4)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 8  # of 16 steps with other shapes
    for (name, left), right in zip(plain.model.named_parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4, msg=name)


def test_a_space_of_a_file_is_trained(tmp_path: Path) -> None:
    maze = tmp_path / "maze.txt"
    maze.write_text("...\n.#.\n...\n")
    rows = train(tmp_path / "run", GridSpec(read(maze), SIZES, VARIANT, replace(SETTINGS, trials=1)))
    assert [row.trial for row in rows] == [0, 1] and math.isfinite(rows[1].loss)


def test_a_short_training_learns(tmp_path: Path) -> None:
    """What was seen a few steps ago is told on maps that were never trained on: working memory."""
    sizes = replace(SIZES, width=32, neurons=64, code=16, dropout=0.0)
    settings = GridSettings(
        maps=8, letters=4, trials=12, steps=128, batch=64, lr=3e-3, objective="parallel", walkers=64, evaluate_every=12
    )
    first, last = train(tmp_path / "run", GridSpec(space("3x3"), sizes, VARIANT, settings))
    assert first.errors["novel"].working > 0.6
    assert last.errors["novel"].working < 0.45
    assert last.errors["novel"].reference > 0.6  # chance is 0.75


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", GridSpec(GRAPH, SIZES, VARIANT, replace(SETTINGS, trials=1)))
    for changed in (
        {"space": space("4x5")}, {"sizes": replace(SIZES, neurons=8)}, {"variant": Variant("nmda:1")},
        {"settings": replace(SETTINGS, trials=1, lr=0.1)},
    ):  # fmt: skip
        asked = {"space": GRAPH, "sizes": SIZES, "variant": VARIANT, "settings": replace(SETTINGS, trials=1)} | changed
        with pytest.raises(UserError, match="holds runs with different settings"):
            train(tmp_path / "run", GridSpec(**asked))
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        train(tmp_path / "run", GridSpec(GRAPH, SIZES, VARIANT, replace(SETTINGS, trials=1)))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"maps": 0, "lr": 0.0}, "maps 0 must be at least 1; lr 0.0"),
        ({"objective": "both"}, "objective 'both'"),
        ({"products": "float16"}, "dtype 'float16'"),
        ({"clip": math.inf}, "clip inf"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        replace(SETTINGS, **changed)


def test_steps_must_be_whole_segments() -> None:
    with pytest.raises(UserError, match="steps 18 must be a multiple of the segment 4"):
        Run(GridSpec(GRAPH, SIZES, VARIANT, replace(SETTINGS, steps=18)))


def test_a_run_is_trained_further_when_it_is_asked_for_more_trials(tmp_path: Path) -> None:
    """From the weights after three trials, with the rates of the longer schedule."""
    settings = replace(SETTINGS, objective="parallel")
    train(tmp_path, GridSpec(GRAPH, SIZES, VARIANT, settings), quiet=True)
    longer = GridSpec(GRAPH, SIZES, VARIANT, replace(settings, trials=5))
    plain = Run(longer)
    copy_into(plain.tensors(), tmp_path)
    rows = train(tmp_path, longer, quiet=True)
    assert [row.trial for row in rows] == [0, 1, 2, 3, 4, 5]
    losses = [plain.train(trial) for trial in (4, 5)]
    assert [row.loss for row in rows[-2:]] == pytest.approx(losses)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["trials"] == 5
    assert list(train(tmp_path, GridSpec(GRAPH, SIZES, VARIANT, settings), quiet=True))[1:] == list(rows)[1:]  # fewer


def test_errors_of_the_training_pass_are_those_of_its_own_answers(tmp_path: Path, monkeypatch) -> None:
    """The authors' way: dropout on, the training batch, the last step of every segment."""
    settings = replace(SETTINGS, objective="steps", familiar="training", trials=1, batch=20)
    run, answers = Run(GridSpec(GRAPH, replace(SIZES, dropout=0.5), VARIANT, settings)), []
    forward = run.model.forward

    def kept(code, actions, letters, memory, asked) -> Answer:
        answer = forward(code, actions, letters, memory, asked)
        if asked == (4,):
            answers.append(answer.logits[:, 0].argmax(-1))
        return answer

    monkeypatch.setattr(run.model, "forward", kept)
    run.train(1)
    walks = run.world.trial("train", 1, 20, 16)
    wrong = torch.stack(answers, dim=1) != walks.letters[:, 4::4]
    assert run.training_errors == errors_of(wrong, walks, 4, SIZES.window)
    rows = train(tmp_path, GridSpec(GRAPH, replace(SIZES, dropout=0.5), VARIANT, settings), quiet=True)
    assert rows[1].errors["familiar"] == run.training_errors != rows[0].errors["familiar"]


def test_runs_of_earlier_versions_have_todays_defaults(tmp_path: Path) -> None:
    spec = GridSpec(GRAPH, SIZES, VARIANT, replace(SETTINGS, trials=1))
    train(tmp_path, spec, quiet=True)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["settings"]["familiar"]  # which they did not know
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert train(tmp_path, spec, quiet=True)[-1].trial == 1
    with pytest.raises(UserError, match=r"settings\.familiar \(evaluation there, training asked for\)"):
        train(tmp_path, replace(spec, settings=replace(spec.settings, familiar="training")), quiet=True)
