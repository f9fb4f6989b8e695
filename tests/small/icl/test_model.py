"""The batched transformers against one transformer written out with matrix products, and how runs keep apart."""

import math

import pytest
import torch
from torch import Tensor

from llm.common.errors import UserError
from small.icl.model import Transformers
from small.icl.settings import IclSizes, Task, Variant
from small.icl.task import World

PAPER = ("classic", "queries", "keys", "values")
BEYOND = ("queries+values", "values:learned", "queries+keys+values:accumulated", "values:first", "classic:nmda10")
TASK = Task()


def reference(weights: dict[str, Tensor], variant: Variant, sizes: IclSizes, inputs: Tensor, answers: Tensor) -> Tensor:
    """Mean cross-entropy of one run, from Section 3.2: weights of that run, inputs (B, T, D), answers (B,)."""
    x, raw = inputs, {"queries": [], "keys": [], "values": []}
    time, k = inputs.shape[1], sizes.key_width
    future = torch.ones(time, time).triu(1).bool()
    for n in range(sizes.layers):
        w = weights[f"projections.{n}"]
        now = {}
        for name, rows in (("queries", w[:k]), ("keys", w[k : 2 * k]), ("values", w[2 * k :])):
            own = x @ rows.T
            earlier = {"previous": raw[name][-1:], "first": raw[name][:1], "accumulated": raw[name]}[variant.source]
            strength = weights.get(f"weight {n} {name}", torch.ones(()))
            now[name] = own + strength * sum(earlier) if name in variant.streams and n else own
            raw[name].append(own)
        scores = (now["queries"] @ now["keys"].mT).masked_fill(future, -torch.inf)
        x = x + scores.softmax(-1) @ now["values"]
    x = x[:, -1]
    for n in range(3):
        x = x @ weights[f"hidden.{n}"].T + weights[f"biases.{n}"].squeeze()
        x = x.clamp(min=0) if variant.nmda is None else x / (1 + variant.nmda * torch.exp(-x))
    logits = x @ weights["read_out"].T
    return (logits.logsumexp(-1) - logits.gather(1, answers[:, None]).squeeze(1)).mean()


def weights_of(model: Transformers, run: int) -> dict[str, Tensor]:
    """Copies of one run's weights that gather gradients of their own."""
    variant, seed = divmod(run, len(model.seeds))
    found = {}
    for name, tensor in model.named_parameters():
        if name.startswith("streams."):
            _, place, parameter = name.split(".")
            layer, owner = divmod(int(place), len(model.variants))
            if owner == variant:
                found[f"weight {layer} {parameter.removesuffix('_weight')}"] = tensor[seed].squeeze()
        else:
            found[name] = tensor[run]
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in found.items()}


def make(names: tuple[str, ...], seeds: tuple[int, ...] = (0, 1), layers: int = 2, task: Task = TASK) -> Transformers:
    sizes = IclSizes(width=task.width, labels=task.labels, layers=layers)
    return Transformers([Variant.parse(name) for name in names], seeds, sizes, task.tokens, task.content)


def batches(seeds: tuple[int, ...], size: int = 8, task: Task = TASK) -> tuple[Tensor, Tensor]:
    drawn = [World(task, seed).batch(0, size) for seed in seeds]
    return torch.stack([d.inputs for d in drawn]), torch.stack([d.answers for d in drawn])


@pytest.mark.parametrize(("names", "layers"), [(PAPER, 2), (BEYOND, 2), (BEYOND, 4), (("values:learned",), 6)])
def test_losses_and_gradients_equal_the_written_out_transformer(names: tuple[str, ...], layers: int) -> None:
    model = make(names, layers=layers).double()
    model.products = torch.float64
    model.causal = model.causal.double()
    inputs, answers = (part.double() if part.is_floating_point() else part for part in batches(model.seeds))
    with torch.no_grad():  # learned weights of a stream begin at 1, where an error could hide
        for name, parameter in model.named_parameters():
            if name.startswith("streams."):
                parameter.copy_(torch.linspace(0.3, 1.7, parameter.numel()).view_as(parameter))
    losses = model.loss(model(inputs), answers)
    losses.sum().backward()
    for run, (variant, seed) in enumerate(model.runs):
        place = model.seeds.index(seed)
        weights = weights_of(model, run)
        loss = reference(weights, variant, model.sizes, inputs[place], answers[place])
        torch.testing.assert_close(losses[run], loss, rtol=1e-6, atol=0)  # the softmax is in float32
        loss.backward()
        for name, parameter in model.named_parameters():
            if not name.startswith("streams."):
                expected = weights[name].grad
                atol = 1e-4 * expected.abs().max().item()
                torch.testing.assert_close(parameter.grad[run], expected, rtol=1e-4, atol=atol)
        for n in range(1, layers):
            for stream in variant.streams if variant.learned else ():
                own = model.streams[n * len(names) + names.index(variant.name)].get_parameter(f"{stream}_weight")
                expected = weights[f"weight {n} {stream}"].grad
                torch.testing.assert_close(own.grad[place].squeeze(), expected, rtol=1e-4, atol=0)


def test_weights_begin_as_the_notes_say() -> None:
    """Attention of variance 1/85, MLP at He; a deviation over 10^4 numbers and more is known to 2%."""
    model = make(("classic",), (3,))
    deviations = [
        *((weight, 1 / math.sqrt(85)) for weight in model.projections),
        *zip(model.hidden, (math.sqrt(2 / 150), math.sqrt(2 / 128), math.sqrt(2 / 128)), strict=True),
    ]
    for weight, expected in deviations:
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(weight.mean().item()) < 0.05 * expected
    assert model.read_out.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.05)
    assert [tuple(bias.shape) for bias in model.biases] == [(1, 1, 1)] * 3  # one scalar a layer


def test_runs_of_one_seed_share_their_weights_and_other_seeds_do_not() -> None:
    model = make(("classic", "values"), (4, 9))
    alone = make(("values",), (9,), layers=3)
    for weight, other in ((model.projections[1], alone.projections[1]), (model.read_out, alone.read_out)):
        assert torch.equal(weight[0], weight[2]) and torch.equal(weight[1], weight[3])
        assert torch.equal(weight[3], other[0]), "whatever runs are beside it, and however deep"
        assert not torch.equal(weight[0], weight[1])
    assert not torch.equal(model.projections[0], model.projections[1])


@pytest.mark.parametrize("name", PAPER)
def test_a_later_token_is_not_seen(name: str) -> None:
    """Causal: what tokens attend to in the first layer holds no later token, so neither do their keys and values."""
    model = make((name,), (0,), layers=3)
    inputs, _ = batches((0,), 4)
    changed = inputs.clone()
    changed[:, :, 9:] = changed[:, :, 9:].flip(1)  # of other sequences of the batch
    seen = []
    for each in (inputs, changed):
        attended, _ = model._attend(0, each, [None], last=False)
        seen.append(attended)
    assert torch.equal(seen[0][:, :, :9], seen[1][:, :, :9])
    assert not torch.equal(seen[0][:, :, 9:], seen[1][:, :, 9:])


def test_bfloat16_stays_near() -> None:
    exact, rounded = make(PAPER), make(PAPER)
    rounded.products = torch.bfloat16
    inputs, _ = batches(exact.seeds)
    logits, near = exact(inputs), rounded(inputs)
    assert near.dtype == torch.float32
    assert 0 < (logits - near).abs().max() < 0.05 * logits.abs().max()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("classic", Variant("classic")),
        ("values+queries:accumulated", Variant("", ("queries", "values"), "accumulated")),
        ("keys:learned:nmda0.5", Variant("", ("keys",), learned=True, nmda=0.5)),
        ("classic:nmda0", Variant("", nmda=0.0)),
        ("classic:nmda1e-05", Variant("", nmda=1e-5)),
    ],
)
def test_names_of_variants(name: str, expected: Variant) -> None:
    found = Variant.parse(name)
    assert (found.streams, found.source, found.learned, found.nmda) == (
        expected.streams, expected.source, expected.learned, expected.nmda,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["vales", "values+", "", "values:last", "classic:learned", "values:first:accumulated", "classic:nmda10:learned"]
    + [f"classic:nmda{alpha}" for alpha in ("", "-1", "x", "²", "inf", "nan")],
)
def test_names_of_no_variant_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="variant"):
        Variant.parse(name)
