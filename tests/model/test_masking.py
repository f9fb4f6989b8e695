"""Documents packed in a window with the positions that `data.mask_documents` gives: each is as if it were alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm.data.rows import positions
from llm.model import DecoderForCausalLM

from .switches import STYLES, make_model, tokens

END = 3
LENGTHS = [[7, 1, 9, 8], [1, 4, 20], [25], [2, 2, 2, 2, 17]]  # documents of each row; the last may lack its end
STREAMS = {name: [name] for name in ("values", "queries", "keys")} | {
    "none": [],
    "all": ["queries", "keys", "values"],
}
every_stream = pytest.mark.parametrize("stream", STREAMS)
every_style = pytest.mark.parametrize("style", STYLES)


def windows() -> Tensor:
    """(4, 25) ids, END where a document ends and nowhere else."""
    ids = tokens(4, 25) % (50 - END - 1) + END + 1
    for row, lengths in enumerate(LENGTHS):
        ids[row, torch.tensor(lengths).cumsum(0)[:-1] - 1] = END
    return ids


def restarts(ids: Tensor) -> Tensor:
    return torch.from_numpy(positions(ids.numpy(), END))


def documents(rows: Tensor) -> list[list[Tensor]]:
    """Each row (T, ...) cut into its documents, each with a batch of one."""
    return [[part[None] for part in row.split(lengths)] for row, lengths in zip(rows, LENGTHS, strict=True)]


def checkpointed(model: DecoderForCausalLM) -> None:
    model.train().gradient_checkpointing_enable({"use_reentrant": False})


def compiled(model: DecoderForCausalLM) -> None:
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend="aot_eager")


WAYS: dict[str, Callable[[DecoderForCausalLM], object]] = {
    "sdpa": lambda model: model.set_attn_implementation("sdpa"),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "checkpointed": checkpointed,
    "compiled": compiled,
}


@pytest.mark.parametrize(
    ("stream", "way"),
    [(s, w) for w in WAYS for s in STREAMS if w != "compiled" or s in ("none", "all")],  # compiling takes seconds
)
@every_style
def test_a_document_in_a_window_is_as_if_alone(style: str, stream: str, way: str) -> None:
    """Logits of a document, and their gradients with respect to it, are those of the document alone; the gradients
    with respect to the other documents are exactly zero, and not so without the mask."""
    model = make_model(style, stream=STREAMS[stream], initializer_range=0.1)
    WAYS[way](model)
    ids = windows()
    embedded = model.get_input_embeddings()(ids).detach()
    packed, open_ = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    masked_logits = model(inputs_embeds=packed, position_ids=restarts(ids), use_cache=False).logits
    open_logits = model(inputs_embeds=open_, use_cache=False).logits
    weights = torch.randn(masked_logits.shape, generator=torch.Generator().manual_seed(1))
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            document = (row, slice(start, start + length))
            alone = embedded[document][None].clone().requires_grad_()
            logits = model(inputs_embeds=alone, use_cache=False).logits
            torch.testing.assert_close(masked_logits[document], logits[0], rtol=1e-5, atol=1e-5)
            (expected,) = torch.autograd.grad((logits[0] * weights[document]).sum(), alone)
            (gradient,) = torch.autograd.grad(
                (masked_logits[document] * weights[document]).sum(), packed, retain_graph=True
            )
            torch.testing.assert_close(gradient[document], expected[0], rtol=1e-3, atol=1e-3)
            gradient[document] = 0
            assert not gradient.any()
            if start:
                (leak,) = torch.autograd.grad(
                    (open_logits[document] * weights[document]).sum(), open_, retain_graph=True
                )
                assert (leak[row, :start] != 0).all()
            start += length


@every_stream
@every_style
def test_without_an_end_the_mask_changes_nothing(style: str, stream: str) -> None:
    """Bitwise: positions that only count are those that the model counts itself."""
    model, ids = make_model(style, stream=STREAMS[stream]), tokens(2, 16) + END + 1
    counted = torch.arange(16).expand(2, 16)
    assert torch.equal(restarts(ids), counted)
    assert torch.equal(model(ids, position_ids=counted).logits, model(ids).logits)


@every_style
def test_every_label_counts_once_in_the_loss(style: str) -> None:
    """The first token of a document is predicted from the end of the one before: the loss is the mean over as many
    tokens as without the mask, each given only its own document."""
    model, ids = make_model(style, stream=["values"]), windows()
    inputs, labels = ids[:, :-1], ids[:, 1:]
    loss = model(input_ids=inputs, shift_labels=labels, position_ids=restarts(inputs)).loss
    total, count = 0.0, 0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            logits = model(inputs[row, start : start + length][None]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, labels[row, start : start + length], reduction="sum")
            count += len(logits)
            start += length
    assert count == labels.numel()
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-6)
