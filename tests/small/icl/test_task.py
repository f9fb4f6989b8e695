"""The pair task's rules, on the statistics of 10,000 sequences each; sequences as a function of their seed."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy import stats

from llm.common.errors import UserError
from small.icl.settings import Task
from small.icl.task import COUNTED_UP_TO, KINDS, Sequences, World, _ranks, amicl_task

N = 10_000
TASK = Task()
E = TASK.content


def share(hits: torch.Tensor) -> float:
    return hits.double().mean().item()


def near(found: float, expected: float, count: int = N) -> bool:
    """Within 4.5 standard deviations of a share: a right rule fails once in 150,000 tests."""
    return abs(found - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / count) + 1e-12


@pytest.fixture(scope="module")
def world() -> World:
    return World(TASK, seed=5)


@pytest.fixture(scope="module")
def train(world: World) -> Sequences:
    """10,000 training sequences, of 100 batches."""
    drawn = [world.batch(step, N // 100) for step in range(100)]
    return Sequences(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


@pytest.fixture(scope="module")
def fixed(world: World) -> dict[str, Sequences]:
    return {kind: world.evaluation(kind, 0, N) for kind in KINDS}


# ---- What a training sequence is made of -----------------------------------------------------------------------------


def test_half_are_novel_and_half_of_the_known_are_bursty(train: Sequences) -> None:
    assert near(share(train.novel), 0.5)
    known = ~train.novel
    assert near(share(train.bursty[known]), 0.5, int(known.sum()))
    assert train.bursty[train.novel].all(), "nothing but the context can tell a novel class's label"


def test_a_bursty_sequence_has_four_classes_of_four_labels_twice_each(train: Sequences) -> None:
    for classes, labels in zip(train.classes[train.bursty][:2000], train.labels[train.bursty][:2000], strict=True):
        context = classes[:-1].tolist()
        assert sorted(context.count(each) for each in set(context)) == [2, 2, 2, 2]
        assert len(set(labels.tolist())) == 4
        assert classes[-1].item() in context


def test_bursts_come_in_random_order_and_the_query_is_any_of_them(train: Sequences) -> None:
    context, query = train.classes[train.bursty][:, :-1], train.classes[train.bursty][:, -1:]
    count = len(context)
    for place in range(8):  # each place has the query's class in a quarter of the sequences
        assert near(share(context[:, place] == query.squeeze(1)), 0.25, count)
    assert near(share(context[:, 0] == context[:, 1]), 1 / 7, count)  # of the seven others one is its copy


def test_other_sequences_draw_all_their_classes_freely(train: Sequences) -> None:
    free = train.classes[~train.bursty]
    counts = torch.bincount(free.flatten(), minlength=512)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-5
    in_context = share((free[:, :-1] == free[:, -1:]).any(1))
    assert near(in_context, 1 - (1 - 1 / 512) ** 8, len(free))
    distinct = share(torch.tensor([len(set(row.tolist())) == 8 for row in free[:, :-1] % 32]))
    expected = math.prod(1 - taken / 32 for taken in range(8))  # labels do repeat
    assert near(distinct, expected, len(free))


def test_classes_of_bursts_are_uniform(train: Sequences) -> None:
    known = train.classes[train.bursty & ~train.novel]
    novel = train.classes[train.novel]
    assert novel.max() < 128 <= known.max() < 512
    for classes, count in ((known, 512), (novel, 128)):
        # One of each burst, as copies and the four labels of a sequence depend on each other.
        assert stats.chisquare(torch.bincount(classes[:, -1], minlength=count).numpy()).pvalue > 1e-5


def test_labels_are_the_classes_modulo_32(train: Sequences) -> None:
    assert torch.equal(train.labels, train.classes[:, :-1] % 32)
    assert torch.equal(train.answers, train.classes[:, -1] % 32)


# ---- How it is written down ------------------------------------------------------------------------------------------


def test_label_tokens_are_the_label_vectors(world: World, train: Sequences) -> None:
    assert torch.equal(train.inputs[:, 1::2, -E:], world.label_means[train.labels])


def test_objects_are_their_prototypes_with_noise_of_norm_one(world: World, train: Sequences) -> None:
    known = ~train.novel
    objects = train.inputs[known][:, ::2, -E:]
    noise = objects * math.sqrt(1 + 0.1**2) - world.class_means[train.classes[known]]
    assert stats.kstest(noise.flatten()[:: 7 * 9].numpy() * math.sqrt(E) / 0.1, "norm").pvalue > 1e-5
    means = world.class_means[train.classes[known]]
    slope = ((objects * means).sum() / means.square().sum()).item()
    assert slope == pytest.approx(1 / math.sqrt(1.01), abs=1e-3)
    alike = torch.nn.functional.cosine_similarity(noise[:, 0], noise[:, 8]).mean().item()
    assert abs(alike) < 0.01, "every object token has noise of its own"


def test_novel_objects_come_from_prototypes_of_their_batch(train: Sequences) -> None:
    first, second = train.inputs[:100], train.inputs[100:200]
    kept = []
    for inputs, classes, novel in (
        (first, train.classes[:100], train.novel[:100]),
        (second, train.classes[100:200], train.novel[100:200]),
    ):
        objects, which = inputs[novel][:, ::2, -E:].flatten(0, 1), classes[novel].flatten()
        kept.append(torch.stack([objects[which == each].mean(0) for each in range(128) if (which == each).any()]))
        same = torch.nn.functional.cosine_similarity(objects, objects[which == which[0]][:1])[which == which[0]]
        assert same.min() > 0.95
    similar = torch.nn.functional.cosine_similarity(kept[0][:, None], kept[1][None], dim=-1)
    assert similar.max() < 0.7, "another batch has other prototypes"


def test_prototypes_are_normal_with_variance_one_in_85(world: World) -> None:
    for means in (world.class_means, world.label_means):
        assert stats.kstest(means.flatten().numpy() * math.sqrt(E), "norm").pvalue > 1e-5


def test_positions_are_one_hot_from_a_random_offset(train: Sequences) -> None:
    positions = train.inputs[:, :, :65]
    assert positions.shape == (N, 17, 65)
    assert torch.equal(positions.sum(-1), torch.ones(N, 17))
    places = positions.argmax(-1)
    assert torch.equal(places, train.offsets[:, None] + torch.arange(17))
    counts = torch.bincount(train.offsets, minlength=49)
    assert len(counts) == 49
    assert stats.chisquare(counts.numpy()).pvalue > 1e-5


# ---- Evaluation sets -------------------------------------------------------------------------------------------------


def in_context(drawn: Sequences) -> torch.Tensor:
    return (drawn.labels == drawn.answers[:, None]).any(1)


def test_test_sequences_follow_the_training_rules(fixed: dict[str, Sequences]) -> None:
    assert near(share(fixed["test"].novel), 0.5)
    assert near(share(fixed["test"].bursty), 0.75)


def test_ic_is_bursty_and_novel_with_its_answer_in_the_context(fixed: dict[str, Sequences]) -> None:
    drawn = fixed["ic"]
    assert drawn.novel.all() and drawn.bursty.all() and in_context(drawn).all()
    assert torch.equal((drawn.labels == drawn.answers[:, None]).sum(1), torch.full((N,), 2))


def test_ic2_shifts_the_labels_of_known_classes_and_the_answer(world: World, fixed: dict[str, Sequences]) -> None:
    drawn = fixed["ic2"]
    assert not drawn.novel.any() and drawn.bursty.all() and in_context(drawn).all()
    assert torch.equal(drawn.labels, (drawn.classes[:, :-1] + 1) % 32)
    assert torch.equal(drawn.answers, (drawn.classes[:, -1] + 1) % 32)
    assert torch.equal(drawn.inputs[:, 1::2, -E:], world.label_means[drawn.labels])
    objects = drawn.inputs[:, -1, -E:]  # the objects stay what they were
    assert torch.equal((objects @ world.class_means.T).argmax(1), drawn.classes[:, -1])


def test_iw_never_has_its_answer_in_the_context(fixed: dict[str, Sequences]) -> None:
    drawn = fixed["iw"]
    assert not drawn.novel.any() and not drawn.bursty.any() and not in_context(drawn).any()
    assert stats.chisquare(torch.bincount(drawn.classes[:, -1], minlength=512).numpy()).pvalue > 1e-5
    ahead = (drawn.labels - drawn.answers[:, None]) % 32
    assert stats.chisquare(torch.bincount(ahead.flatten(), minlength=32)[1:].numpy()).pvalue > 1e-5
    members = torch.bincount(drawn.classes[:, :-1].flatten() // 32, minlength=16)
    assert stats.chisquare(members.numpy()).pvalue > 1e-5


def test_trials_of_amicl_have_no_positions_and_a_blank() -> None:
    world = World(amicl_task(20, 100), 2)
    drawn = world.trials(0, N)
    assert drawn.inputs.shape == (N, 20, 100)
    assert not drawn.inputs[:, -1].any() and in_context(drawn).all()
    assert near(share(drawn.bursty), 0.5)
    context = drawn.classes[~drawn.bursty]
    once = share(torch.tensor([row[:-1].tolist().count(row[-1].item()) == 1 for row in context]))
    assert near(once, (511 / 512) ** 8, len(context))


# ---- A function of the seed ------------------------------------------------------------------------------------------


def test_sequences_are_a_function_of_seed_and_step(world: World) -> None:
    again = World(TASK, seed=5)
    again.batch(3, 16)  # what was drawn before does not matter
    assert torch.equal(world.batch(7, 16).inputs, again.batch(7, 16).inputs)
    assert torch.equal(world.evaluation("ic", 1, 9).inputs, again.evaluation("ic", 1, 9).inputs)
    for other in (world.batch(8, 16), World(TASK, seed=6).batch(7, 16)):
        assert not torch.equal(world.batch(7, 16).inputs, other.inputs)


def test_a_compiled_batch_is_the_same_but_for_rounding(world: World) -> None:
    compiled, plain = World(TASK, seed=5, compiled=True).batch(7, 16), world.batch(7, 16)
    torch.testing.assert_close(compiled.inputs, plain.inputs, atol=1e-6, rtol=0)
    for one, other in zip(compiled[1:], plain[1:], strict=True):
        assert torch.equal(one, other)


@given(st.integers(1, 9), st.sampled_from([1, 5, COUNTED_UP_TO, COUNTED_UP_TO + 1, 200]), st.integers(0, 99))
def test_ranks_are_those_of_scipy(rows: int, keys: int, seed: int) -> None:
    drawn = torch.rand(rows, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = stats.rankdata(drawn.numpy(), "ordinal", axis=1)[:, : 1 + keys // 2] - 1
    assert _ranks(drawn, 1 + keys // 2).tolist() == expected.tolist()


def test_parts_of_an_evaluation_share_their_novel_classes(world: World) -> None:
    first, second = (world.evaluation("ic", part, 2000) for part in (0, 1))
    assert not torch.equal(first.inputs, second.inputs)
    asked_for = first.classes[0, -1]
    one, other = (drawn.inputs[:, -1, -E:][drawn.classes[:, -1] == asked_for] for drawn in (first, second))
    assert torch.nn.functional.cosine_similarity(one[:1], other).min() > 0.9


@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.floats(0, 1), st.floats(0, 1), st.floats(0, 2),
    st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_any_task_keeps_its_rules(groups, copies, room, bursty, novel, noise, distinct, blank, seed) -> None:
    tokens = 2 * groups * copies + 1 + blank
    task = Task(
        classes=24, labels=8, pairs=groups * copies, copies=copies, bursty=bursty, novel=novel, novel_classes=16,
        noise=noise, content=12, positions=(tokens + room) if room else 0, distinct_labels=distinct, blank=blank,
    )  # fmt: skip
    drawn = World(task, seed).batch(0, 20)
    assert drawn.inputs.shape == (20, tokens, task.width)
    assert drawn.inputs.isfinite().all()
    assert torch.equal(drawn.answers, drawn.classes[:, -1] % 8)
    assert (drawn.offsets <= room).all()
    for row in range(20):
        context = drawn.classes[row, :-1].tolist()
        if drawn.bursty[row]:
            assert drawn.classes[row, -1].item() in context
            if distinct:
                assert {context.count(each) for each in context} == {copies}
                assert len(set(drawn.labels[row].tolist())) == groups


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"bursty": 1.5, "novel": -0.1}, ("bursty 1.5", "novel -0.1")),
        ({"classes": 500}, ("classes 500", "32 labels")),
        ({"copies": 3}, ("pairs 8", "copies 3")),
        ({"pairs": 40, "copies": 1, "positions": 99}, ("40", "32")),
        ({"positions": 10}, ("positions 10", "17 tokens")),
        ({"pairs": 0}, ("pairs 0",)),
        ({"noise": float("nan")}, ("noise",)),
    ],
)  # fmt: skip
def test_rules_that_contradict_each_other_are_refused(changed: dict, named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        Task(**changed)
    assert all(word in str(refused.value) for word in named)


@pytest.mark.parametrize("length", [3, 2, 7, -4])
def test_lengths_without_a_pair_for_the_query_are_refused(length: int) -> None:
    with pytest.raises(UserError, match="even and at least 4"):
        amicl_task(length)
