"""Which runs are pairs, and what is said of those that are not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.verdict.pair import Pairs, read_arms
from llm.common.errors import UserError

from ..made_up import make_run


def read_pairs(folders, declared=()) -> Pairs:
    """The pairs of one arm."""
    (pairs,) = read_arms(folders, declared)
    return pairs


def test_two_runs_that_differ_in_the_stream_are_a_pair(tmp_path):
    folders = [make_run(tmp_path / "classic"), make_run(tmp_path / "values", ["values"])]
    pairs = read_pairs(folders)
    assert pairs.names == ("classic", "values") and pairs.seeds == [1]
    assert pairs.change == {"decoder.stream": ([], ["values"])}
    assert pairs.notes == []


@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(1, 6)))
def test_runs_of_several_seeds_are_paired_in_any_order(tmp_path_factory, order):
    root = tmp_path_factory.mktemp("runs")
    seeds = (3, 1, 7)
    named = [(side, seed) for seed in seeds for side in ("classic", "values")]
    folders = [
        make_run(root / f"{side}-seed{seed}", ["values"] * (side == "values"), seed=seed) for side, seed in named
    ]
    pairs = read_pairs([folders[0], *(folders[n] for n in order)])
    assert pairs.names == ("classic", "values") and pairs.seeds == [1, 3, 7]
    assert [run.name for run in pairs.side(0)] == ["classic-seed1", "classic-seed3", "classic-seed7"]
    assert [run.name for run in pairs.side(1)] == ["values-seed1", "values-seed3", "values-seed7"]


def test_the_first_run_says_which_side_is_without_the_change(tmp_path):
    runs = [
        make_run(tmp_path / f"{side}{seed}", [side] if side else [], seed=seed)
        for seed in (1, 2)
        for side in ("", "keys")
    ]
    assert read_pairs([runs[1], runs[0], runs[2], runs[3]]).change == {"decoder.stream": (["keys"], [])}


def test_where_and_how_a_run_is_kept_does_not_matter(tmp_path):
    one = make_run(tmp_path / "a")
    other = make_run(
        tmp_path / "b",
        ["values"],
        config={
            **{"run.keep_checkpoints": 7, "evaluation.every": 10, "data.workers": 3, "data.store": "elsewhere"},
            **{"data.validate_every": 5, "data.micro_batch_size": 2},
        },
    )
    assert read_pairs([one, other]).notes == []


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"store": "f2"}, ["store_fingerprint (f1 and f2)"]),
        ({"seed": 2}, ["seed (1 and 2)"]),
        ({"steps": 30}, ["step (40 and 30)", "tokens_seen (40000 and 30000)", "trainer.max_steps (40 and 30)"]),
        ({"seed": 2, "store": "f2"}, ["store_fingerprint (f1 and f2)", "seed (1 and 2)"]),
        ({"digest": "e"}, ["not seen the same batches: their data digests differ from step 1 on"]),
        ({"config": {"model.optimizer.lr": 0.002}}, ["model.optimizer.lr (0.001 and 0.002)", "--allow-difference"]),
        (
            {"config": {"decoder.intermediate_size": 96, "data.batch_size": 4}},
            ["intermediate_size (64 and 96)", "(8 and 4)"],
        ),
        ({"config": {"decoder.rope": {"theta": 5.0}}}, ["decoder.rope.theta (None and 5.0)"]),
        ({"config": {"decoder.parametrization": "completep"}}, ["decoder.parametrization (None and completep)"]),
    ],
)
def test_runs_that_are_no_pair_are_refused(tmp_path, changes, messages):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", ["values"], **changes)]
    with pytest.raises(UserError) as refused:
        read_pairs(folders)
    assert all(message in str(refused.value) for message in ["these runs are no pairs", *messages])


def test_a_declared_key_may_differ_and_is_told(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", ["values"], config={"decoder.intermediate_size": 96})]
    pairs = read_pairs(folders, ["decoder.intermediate_size"])
    assert pairs.change == {"decoder.intermediate_size": (64, 96), "decoder.stream": ([], ["values"])}
    with pytest.raises(UserError, match=r"no run has a config key decoder\.width"):
        read_pairs(folders, ["decoder.width"])


def test_digests_are_compared_where_both_have_them(tmp_path):
    one, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", ["values"])
    text = (other / "metrics.csv").read_text().replace(",d17,", ",x17,")
    (other / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match="from step 17 on"):
        read_pairs([one, other])
    (other / "metrics.csv").write_text("\n".join(line.replace(",d", ",,") for line in text.splitlines()) + "\n")
    assert any("no pair" not in note and "digests" in note for note in read_pairs([one, other]).notes)


def test_what_a_reader_should_know_is_noted(tmp_path):
    one = make_run(tmp_path / "a")
    other = make_run(tmp_path / "b", record={"git_commit": "d", "device": "another"})
    text = (other / "metrics.csv").read_text()
    (other / "metrics.csv").write_text(text.replace("d40,0\n", "d40,2\n"))
    notes = " ".join(read_pairs([one, other]).notes)
    assert "compares a run with itself" in notes and "different commits" in notes and "different devices" in notes
    assert "skipped 2 steps" in notes


def test_seeds_that_do_not_pair_up(tmp_path):
    classic = [make_run(tmp_path / f"c{seed}", seed=seed) for seed in (1, 2)]
    values = [make_run(tmp_path / f"v{seed}", ["values"], seed=seed) for seed in (1, 3)]
    with pytest.raises(UserError, match=r"c2 \(seed 2\) has no run of its seed"):
        read_pairs([*classic, *values])
    with pytest.raises(UserError, match="have one seed"):
        read_pairs([*classic, values[0], make_run(tmp_path / "v1b", ["values"], seed=1)])
    with pytest.raises(UserError, match=r"c2 \(seed 2\) has no run of its seed"):
        read_pairs([*classic, values[0], make_run(tmp_path / "k2", ["keys"], seed=2)])
    with pytest.raises(UserError, match="same declared settings"):
        read_pairs([*classic, make_run(tmp_path / "c3", seed=3)])
    other = make_run(tmp_path / "v2", ["values"], seed=2, config={"model.optimizer.lr": 0.5})
    with pytest.raises(UserError, match=r"model\.optimizer\.lr \(0\.001 and 0\.5\)"):
        read_pairs([*classic, values[0], other])


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"config": {"model.optimizer.lr": 0.5}}, ["model.optimizer.lr (0.001 and 0.5)"]),
        ({"store": "f2"}, ["store_fingerprint (f1 and f2)"]),
        ({"steps": 30}, ["trainer.max_steps (40 and 30)"]),
    ],
)
def test_each_seed_is_a_pair_and_they_are_not_alike(tmp_path, changes, messages):
    """Both runs of the second seed have another setting: the mean over the seeds would be of two experiments."""
    sides: dict[str, list[str]] = {"c": [], "v": ["values"]}
    one = [make_run(tmp_path / f"{name}1", stream, seed=1) for name, stream in sides.items()]
    other = [make_run(tmp_path / f"{name}2", stream, seed=2, **changes) for name, stream in sides.items()]
    assert read_pairs(one).seeds == [1] and read_pairs(other).seeds == [2]
    with pytest.raises(UserError, match="these runs are no pairs") as refused:
        read_pairs([*one, *other])
    assert all(message in str(refused.value) for message in [f"{one[0]} and {other[0]} differ in", *messages])
    alike = [make_run(tmp_path / f"{name}3", stream, seed=3) for name, stream in sides.items()]
    assert read_pairs([*one, *alike]).seeds == [1, 3]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "summary.json").unlink(), "is not finished"),
        (lambda folder: (folder / "run.json").unlink(), "is not a run folder"),
        (lambda folder: (folder / "run.json").write_text("{"), "run.json cannot be read"),
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml cannot be read"),
        (lambda folder: (folder / "metrics.csv").unlink(), "lacks tokens in metrics.csv"),
        (lambda folder: (folder / "summary.json").write_text('{"step": 40}'), "lacks tokens_seen in summary.json"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, spoil, message):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", ["values"])]
    spoil(folders[1])
    with pytest.raises(UserError, match=message):
        read_pairs(folders)


def test_a_run_given_twice_or_alone(tmp_path):
    folder = make_run(tmp_path / "a")
    with pytest.raises(UserError, match="given twice"):
        read_pairs([folder, folder])
    with pytest.raises(UserError, match="one run is no pair"):
        read_pairs([folder])


def test_arms_are_each_paired_with_the_baseline(tmp_path):
    """In the order in which they are given, whatever the order of the seeds."""
    names = ["keys-seed2", "classic-seed1", "values-seed1", "keys-seed1", "classic-seed2", "values-seed2"]
    folders = [
        make_run(tmp_path / name, [name.split("-")[0]] * (name[0] != "c"), seed=int(name[-1]))
        for name in ["classic-seed2", *names[:4], names[5]]
    ]
    arms = read_arms(folders)
    assert [pairs.names for pairs in arms] == [("classic", "keys"), ("classic", "values")]
    assert all(pairs.seeds == [1, 2] for pairs in arms)
    assert [pairs.change["decoder.stream"] for pairs in arms] == [([], ["keys"]), ([], ["values"])]
    with pytest.raises(UserError, match=r"classic-seed1 \(seed 1\) has no run of its seed"):
        read_arms([folder for folder in folders if folder.name != "keys-seed1"])
    same = [
        make_run(tmp_path / side / "run", stream) for side, stream in (("a", []), ("b", ["keys"]), ("c", ["values"]))
    ]
    assert [pairs.names for pairs in read_arms(same)] == [("run (A)", "run (B)"), ("run (A)", "run (C)")]
