"""Memory of one device along a training step, in bytes, for one device, DDP and DeepSpeed's ZeRO 1, 2 and 3.

Stages: what is always held -> the moments at which a step can be at its highest (the loss, the backward pass of each
block, the embedding's, the sum over devices, the update) -> the highest of them -> the largest micro-batch that fits.

What ZeRO divides is in Rajbhandari et al. 2020 (Section 3.1); what is allocated beside it was read in DeepSpeed 0.19.8
(`runtime/bf16_optimizer.py`, `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`), as `strategy.py` sets it up:
bf16 weights, fp32 master weights, gradients accumulated and sent in fp32.

P parameters, N devices, b numbers in a bucket; other letters as in `activation_memory.py`. All fp32 AdamW: 4 bytes
each for the master weight and two moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..model import DecoderConfig
from .activation_memory import (
    Formats,
    Work,
    attention_work,
    backward_work,
    block_matrices,
    block_terms,
    checkpoint_terms,
    loss_backward,
    loss_forward,
    outer_terms,
    stream_widths,
    weight_copies,
)

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
LIVE = 500_000_000  # weights that ZeRO-3 keeps gathered: half of max_reuse_distance, forward and back, its default
FALLBACK = 500_000_000  # numbers that DeepSpeed's BF16_Optimizer joins for one all-reduce (MEMORY_OPT_ALLREDUCE_SIZE)


@dataclass(frozen=True)
class Layout:
    """How the model's state lies on `devices` devices.

    Args:
        stage: 0 is one device, or DDP over several; 1, 2, 3 of ZeRO.
        devices: N.
        offload: master weights and moments in host memory.
        bucket: b, numbers reduced at once; never more than the model has.
        overlap: sums run beside the backward pass, from a second bucket (GPUs).
    """

    stage: int
    devices: int
    bucket: int
    offload: bool = False
    overlap: bool = True

    @property
    def name(self) -> str:
        if self.stage == 0:
            return "one device" if self.devices == 1 else "ddp"
        return f"zero {self.stage}" + (" offload" if self.offload else "")


@dataclass(frozen=True)
class Moment:
    """One moment of a step: bytes of each category on the device, and bytes in host memory."""

    name: str
    device: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.device.values())


@dataclass
class State:
    """What a layout holds all through a step, and what it adds on the way; bytes, or functions of numbers summed.

    Args:
        held: bytes of each category.
        host: bytes in host memory.
        per_gradient: bytes of a gradient that stays once it is made.
        reducing: bytes at work in the sum of so many gradients.
        in_backward: whether gradients are summed within the backward pass, or after it.
        updating: bytes at work in the update.
        live: bytes of gathered weights, given the number of weights that the rest of the step needs.
    """

    held: dict[str, int]
    host: int = 0
    per_gradient: int = 0
    reducing: Callable[[int], int] = lambda numbers: 0
    in_backward: bool = False
    updating: int = 0
    live: Callable[[int], int] = lambda numbers: 0
    late: dict[str, int] = field(default_factory=dict)  # held from the first sum on


def formats(precision: str, stage: int) -> Formats:
    """Bytes of numbers for `trainer.precision`: autocast on one device and under DDP, bf16 weights under DeepSpeed."""
    if precision in ("32-true", "32", "None"):
        return Formats(4, 4, 4)
    if precision == "bf16-mixed" and stage == 0:
        return Formats(4, 4, 2, autocast=True)
    return Formats(2, 2, 2)


def block_parameters(config: DecoderConfig, index: int) -> int:
    """Numbers trained in block `index`."""
    c = config
    count = block_matrices(c) + 2 * _norm_parameters(c)
    if c.attention_bias:
        count += c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads) + c.hidden_size
    if c.mlp_bias:
        count += (2 if c.feedforward == "gated" else 1) * c.intermediate_size + c.hidden_size
    if index > 0 and c.stream_weight != "fixed":
        count += sum(width // c.head_dim if c.stream_weight == "head" else 1 for width in stream_widths(c))
    return count + (2 if c.hidden_act == "nmda" and c.nmda_learnable else 0)


def ffn_parameters(config: DecoderConfig) -> int:
    """Numbers in the matrices of one FFN."""
    return (3 if config.feedforward == "gated" else 2) * config.hidden_size * config.intermediate_size


def _norm_parameters(config: DecoderConfig) -> int:
    return (2 if config.norm == "layernorm" else 1) * config.hidden_size


def table(config: DecoderConfig) -> int:
    """Numbers in the embedding: V D."""
    return config.vocab_size * config.hidden_size


def parameters(config: DecoderConfig) -> int:
    """P."""
    c = config
    blocks = sum(block_parameters(c, index) for index in range(c.num_hidden_layers))
    tables = table(c) * (1 if c.tie_word_embeddings else 2)
    positions = c.max_position_embeddings * c.hidden_size if c.position == "learned" else 0
    return tables + positions + blocks + _norm_parameters(c)


def state(config: DecoderConfig, form: Formats, layout: Layout, micro_batches: int) -> State:
    """What the layout holds while a step of `micro_batches` goes on."""
    p, n = parameters(config), layout.devices
    if layout.stage == 0:
        return _plain(p, n, form, micro_batches)
    make = {1: _zero_1, 2: _zero_2, 3: _zero_3}[layout.stage]
    return make(config, form, layout, micro_batches)


def _plain(p: int, n: int, form: Formats, micro_batches: int) -> State:
    """Weights, gradients and two moments in one format. DDP's buckets hold the gradients
    (gradient_as_bucket_view) and last, but those of micro-batches that are not sent lie beside them."""
    g = form.weights
    kept = (n > 1) + (micro_batches > 1)
    held = {"weights": g * p, "optimizer": 2 * g * p, "gradients": kept * g * p}
    return State(held, per_gradient=0 if kept else g)


def _zero_1(config: DecoderConfig, form: Formats, layout: Layout, micro_batches: int) -> State:
    """Master weights and moments divided. In bf16, DeepSpeed's BF16_Optimizer: a whole fp32 gradient beside the bf16
    one, joined in one tensor to be summed unless the matrices alone are more than FALLBACK. In fp32 and with off-load
    the optimizer of stage 2, without its division of gradients."""
    p, n, b, w = parameters(config), layout.devices, min(layout.bucket, parameters(config)), form.weights
    part, several = -(-p // n), micro_batches > 1
    held = {"weights": w * p, "gradients": 0, "optimizer": 8 * part}
    if layout.offload:
        held |= {"optimizer": 0, "gradients": 4 * p if several else 0}
        largest = w * table(config)
        reducing = _stage_2_sum(config, Formats(4, 4, 4), layout)
        return State(
            held | {"buffers": largest},
            host=(16 + w) * part + largest,
            per_gradient=0 if several else 4,
            reducing=lambda numbers: reducing(numbers) + 4 * b * (1 + layout.overlap) + 4 * part,
        )
    held["weights"] += 4 * part  # the master weights; fp32 weights too have them twice
    if w == 2:
        held["gradients"] = 4 * p + (2 * p if several else 0)
        return State(held, per_gradient=0 if several else 2, reducing=lambda numbers: 4 * p if p <= FALLBACK else 0)
    held["gradients"] = 4 * p if several else 0
    reducing = _stage_2_sum(config, form, layout)
    return State(
        held | {"buffers": 4 * b * (1 + layout.overlap)},
        per_gradient=0 if several else 4,
        reducing=lambda numbers: reducing(numbers) + 4 * part,
        updating=4 * part,
    )


def _zero_2(config: DecoderConfig, form: Formats, layout: Layout, micro_batches: int) -> State:
    """Gradients divided too: those of other devices are gone once they are summed, at every micro-batch."""
    p, n, b, w = parameters(config), layout.devices, min(layout.bucket, parameters(config)), form.weights
    part, largest = -(-p // n), w * table(config)
    held = {"weights": w * p, "gradients": 0, "optimizer": 0, "buffers": w * b * (1 + layout.overlap)}
    host = 0
    if layout.offload:
        held["buffers"] += largest
        host = (16 + w) * part + largest
    else:
        held["weights"] += 4 * part
        held["optimizer"] = 8 * part
    reducing = _stage_2_sum(config, form, layout)
    if w == 2:
        return State(held, host, reducing=reducing, in_backward=True, late={"gradients": 4 * part})
    once = 1 + (micro_batches > 1)  # the sum of the micro-batches so far and the one under way
    return State(held, host, 0, reducing, True, updating=4 * part, late={"gradients": 4 * part * once})


def _stage_2_sum(config: DecoderConfig, form: Formats, layout: Layout) -> Callable[[int], int]:
    """A bucket joined anew, and in fp32 where it is not; a table larger than the bucket goes by its devices' parts."""
    p = parameters(config)
    b, part = min(layout.bucket, p), -(-p // layout.devices)
    joined = form.weights + (4 if form.weights == 2 else 0)

    def reducing(numbers: int) -> int:
        if numbers >= p and table(config) > b:
            return joined * min(table(config), b + part) + form.weights * table(config)
        return joined * b if numbers >= b or numbers >= p else 0

    return reducing


def _zero_3(config: DecoderConfig, form: Formats, layout: Layout, micro_batches: int) -> State:
    """Weights divided too, and gathered for use: those that are soon used again stay."""
    p, n, b, w = parameters(config), layout.devices, min(layout.bucket, parameters(config)), form.weights
    part = -(-p // n)
    held = {"weights": w * part, "gradients": 4 * part, "optimizer": 8 * part, "buffers": 4 * b}
    if w == 2:
        held["weights"] += 4 * part
    host = 0
    if layout.offload:
        host = 20 * part
        held |= {"weights": w * part, "gradients": 0, "optimizer": 0}

    def reducing(numbers: int) -> int:
        if numbers >= p and table(config) > b:  # its gradient, whole, in fp32, and that once more in devices' order
            return (w + 4 + (4 if w == 2 else 0)) * table(config)
        return 4 * b if numbers >= b or numbers >= p else 0

    live = LIVE + table(config)
    return State(
        held,
        host,
        reducing=reducing,
        in_backward=True,
        updating=0 if layout.offload else 4 * part,
        live=lambda numbers: w * min(numbers, live),
    )


def moments(work: Work, layout: Layout, micro_batches: int, recompute: int = 0) -> list[Moment]:
    """The moments of a step's last micro-batch.

    Args:
        recompute: as model.activation_checkpointing: every n-th block is recomputed, 0 none.
    """
    c, form = work.config, work.formats
    s = state(c, form, layout, micro_batches)
    p, layers = parameters(c), range(c.num_hidden_layers)
    held_before = s.late if micro_batches > 1 else {}
    kept = [_kept(work, index, recompute) for index in layers]
    outer, copies = sum(outer_terms(work).values()), weight_copies(work)
    head = (0 if c.tie_word_embeddings else table(c)) + _norm_parameters(c)
    tied = form.weights * table(c) if c.tie_word_embeddings else 0  # waits for the embedding's own gradient

    def at(name: str, done: int, needed: int, **bytes_of: int) -> Moment:
        """`done` gradients are made; `needed` weights are yet to be used."""
        device = dict.fromkeys(CATEGORIES, 0)
        reduced = s.in_backward and done >= min(layout.bucket, p)
        for part in (s.held, s.late if reduced else held_before, bytes_of):
            for category, size in part.items():
                device[category] += size
        device["gradients"] += s.per_gradient * done
        device["weights"] += s.live(needed)
        device["buffers"] += s.reducing(done) if s.in_backward else 0
        return Moment(name, device, s.host)

    all_kept = outer + sum(kept)
    loss = loss_forward(work)
    result = [
        at("loss", 0, p, activations=all_kept, logits=sum(loss.values()), weights=copies * len(layers)),
        at(
            "loss, backward",
            0,
            p,
            activations=all_kept,
            logits=sum(loss_backward(work).values()),
            weights=sum(copies for index in layers if not _recomputed(index, recompute)),
        ),
    ]
    done = head
    for index in reversed(layers):
        whole = sum(block_terms(work, index).values())
        ffn_gone = whole - _ffn_terms(work, index)
        again = whole if _recomputed(index, recompute) else 0  # beside its inputs
        at_work = max(backward_work(work), attention_work(work) + ffn_gone - whole)
        ffn = ffn_parameters(c)
        done += block_parameters(c, index)
        result.append(
            at(
                f"block {index}, backward",
                done - block_parameters(c, index) + ffn,
                p - done,
                activations=outer + sum(kept[: index + 1]) + again + at_work,
                weights=sum(copies for j in range(index + 1) if j == index or not _recomputed(j, recompute)),
                gradients=tied,
            )
        )
    own = form.weights * table(c)  # the embedding's gradient
    spread = work.hidden + own if micro_batches > 1 or s.per_gradient == 0 or tied else work.hidden
    result.append(at("embedding, backward", p, table(c), activations=outer, gradients=spread + tied - work.hidden))
    result.append(_sum_moment(at, s, p))
    result.append(_update_moment(s, p))
    return result


def _sum_moment(at: Callable[..., Moment], s: State, p: int) -> Moment:
    return at("sum over devices", p, 0, buffers=0 if s.in_backward else s.reducing(p))


def _update_moment(s: State, p: int) -> Moment:
    device = dict.fromkeys(CATEGORIES, 0) | s.held
    for category, size in s.late.items():
        device[category] += size
    device["gradients"] += s.per_gradient * p + s.updating
    return Moment("update", device, s.host)


def _recomputed(index: int, recompute: int) -> bool:
    return recompute > 0 and index % recompute == 0


def _kept(work: Work, index: int, recompute: int) -> int:
    terms = checkpoint_terms(work, index) if _recomputed(index, recompute) else block_terms(work, index)
    return sum(terms.values())


def _ffn_terms(work: Work, index: int) -> int:
    terms = block_terms(work, index)
    return terms["inside the FFN"] + terms["inputs of the FFN"] + terms["norms"] // 2


def peak(moments: Iterable[Moment]) -> Moment:
    """The moment at which the device holds most."""
    return max(moments, key=lambda moment: moment.total)


def largest_micro_batch(rows: int, fits: Callable[[int], bool]) -> int | None:
    """The largest divisor of `rows` that fits, None where not even one row does."""
    divisors = [size for size in range(rows, 0, -1) if rows % size == 0]
    return next((size for size in divisors if fits(size)), None)
