"""Memory of one device along a training step, in bytes: when it is highest, and of what it is then made.

Stages: what is held all through the step (`state_memory.py`) and what each block keeps (`activation_memory.py`) -> the
moments at which a step can be at its highest (the loss, the backward pass of each block, the embedding's, the sum over
devices, the update) -> the highest of them -> the largest micro-batch that fits.

Not in it: the CUDA context, NCCL's buffers, work space of cuBLAS, what the caching allocator loses to fragments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from .activation_memory import (
    Work,
    attention_work,
    backward_work,
    block_terms,
    checkpoint_terms,
    loss_backward,
    loss_forward,
    outer_terms,
    weight_copies,
)
from .parameters import block_parameters, ffn_matrices, head_parameters, parameters, table
from .state_memory import Layout, State, state

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Moment:
    """One moment of a step: bytes of each category on the device, and bytes in host memory."""

    name: str
    device: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.device.values())


@dataclass(frozen=True)
class Step:
    """The last micro-batch of a training step.

    Args:
        work: the micro-batch.
        layout: of the model's state.
        micro_batches: of the step.
        recompute: as model.activation_checkpointing: every n-th block is recomputed, 0 none.
    """

    work: Work
    layout: Layout
    micro_batches: int = 1
    recompute: int = 0

    def moments(self) -> list[Moment]:
        """In order of time."""
        return [*self._loss(), *self._blocks(), *self._end()]

    def peak(self) -> Moment:
        """The moment at which the device holds most."""
        return max(self.moments(), key=lambda moment: moment.total)

    @cached_property
    def _state(self) -> State:
        return state(self.work.config, self.work.formats.weights, self.layout, self.micro_batches)

    @property
    def _layers(self) -> range:
        return range(self.work.config.num_hidden_layers)

    @cached_property
    def _parameters(self) -> int:
        return parameters(self.work.config)

    def _recomputed(self, index: int) -> bool:
        return self.recompute > 0 and index % self.recompute == 0

    @cached_property
    def _kept(self) -> list[int]:
        """Bytes that the first 0, 1, 2 ... blocks and what is around them keep."""
        sums = [sum(outer_terms(self.work).values())]
        for index in self._layers:
            terms = (checkpoint_terms if self._recomputed(index) else block_terms)(self.work, index)
            sums.append(sums[-1] + sum(terms.values()))
        return sums

    def _copies(self, upto: int, again: int | None = None) -> int:
        """Bytes of autocast's copies of matrices that the first `upto` blocks keep, and block `again`, recomputed now.
        (Lightning has autocast keep no others.)"""
        blocks = [index for index in range(upto) if index == again or not self._recomputed(index)]
        return sum(weight_copies(self.work, index) for index in blocks)

    def _at(self, name: str, made: int, needed: int, **more: int) -> Moment:
        """The moment when `made` gradients are made and `needed` weights are still needed, with `more` beside."""
        s, device = self._state, dict.fromkeys(CATEGORIES, 0)
        summed = self.micro_batches > 1 or (s.in_backward and made > min(self.layout.bucket, self._parameters))
        for part in (s.held, s.after_sum if summed else {}, more):
            for category, size in part.items():
                device[category] += size
        device["gradients"] += int(s.per_gradient * made)
        device["weights"] += s.gathered(needed)
        device["buffers"] += s.summing(made) if s.in_backward and made < self._parameters else 0
        return Moment(name, device, s.host)

    def _loss(self) -> list[Moment]:
        """Everything is kept, and the loss makes the head's gradient already in its forward pass."""
        parts = {"loss": loss_forward(self.work), "loss, backward": loss_backward(self.work)}
        kept = {"activations": self._kept[-1], "weights": self._copies(len(self._layers))}
        return [
            self._at(name, 0, self._parameters, logits=sum(terms.values()), **kept) for name, terms in parts.items()
        ]

    def _blocks(self) -> list[Moment]:
        """Each block's backward pass, while the FFN's gradients are made; of tied embeddings the head's part waits."""
        config, result = self.work.config, []
        tied = self.work.formats.weights * table(config) if config.tie_word_embeddings else 0
        made = head_parameters(config)
        for index in reversed(self._layers):
            moment = self._at(
                f"block {index}, backward",
                made + sum(ffn_matrices(config)),
                self._parameters - made,
                activations=self._kept[index + 1] + self._at_work(index),
                weights=self._copies(index + 1, again=index),
                gradients=tied,
            )
            result.append(moment)
            made += block_parameters(config, index)
        return result

    def _at_work(self, index: int) -> int:
        """Bytes beyond what is kept: a recomputed block once more, and gradients of activations."""
        terms = block_terms(self.work, index)
        ffn = terms["inside the FFN"] + terms["inputs of the FFN"] + terms["norms"] // 2  # gone before the attention
        again = sum(terms.values()) if self._recomputed(index) else 0
        return again + max(backward_work(self.work), attention_work(self.work) - ffn)

    def _end(self) -> list[Moment]:
        """The embedding's gradient, with tied embeddings beside the head's; the sum over devices; the update."""
        s, p, config = self._state, self._parameters, self.work.config
        gradient = self.work.formats.weights * table(config)
        beside = config.tie_word_embeddings + (s.per_gradient == 0)  # where gradients do not stay, its own too
        embedding = self._at(
            "embedding, backward",
            p - table(config) if s.in_backward else p,
            0,
            activations=self._kept[0] + self.work.hidden,
            gradients=gradient * beside,
        )
        at_end = dict.fromkeys(CATEGORIES, 0)
        for part in (s.held, s.after_sum):
            for category, size in part.items():
                at_end[category] += size
        at_end["gradients"] += int(s.per_gradient * p)
        at_end["weights"] += s.gathered(0)
        return [
            embedding,
            Moment("sum over devices", at_end | {"buffers": at_end["buffers"] + s.summing(p)}, s.host),
            Moment("update", at_end | {"gradients": at_end["gradients"] + s.updating}, s.host),
        ]


def largest_micro_batch(rows: int, fits: Callable[[int], bool]) -> int | None:
    """The largest divisor of `rows` that fits, None where not even one row does."""
    divisors = (size for size in range(rows, 0, -1) if rows % size == 0)
    return next((size for size in divisors if fits(size)), None)
