"""What all ranks know after a step, and what is done about a step that went wrong.

Stages of a step's end: every rank's loss and flags are added up -> a step that was skipped, or whose loss stands out,
is written to events.jsonl with its batch -> too many skipped in a row end the run.
"""

from __future__ import annotations

import statistics
import sys
from collections import deque
from typing import Any

import lightning.pytorch as pl

from .agreement import Agreement
from .lightning_loop import whole_step
from .run_folder import RunFolder

WINDOW = 128  # losses that a loss is compared with
ENOUGH = 32  # of them, before any is called a spike
DEVIATION = 1.4826  # standard deviations of a normal distribution in one median absolute deviation


class LossSpikeMonitor(pl.Callback):
    """Steps that changed nothing because their gradient was not finite, and losses that stand out from those before.

    Both go to events.jsonl with the batch, which `python -m llm batch RUN --step N` prints. A loss stands out where it
    is `run.spike_threshold` robust standard deviations above the median of the last `WINDOW`.
    """

    def __init__(self, run: RunFolder, agreement: Agreement) -> None:
        self.run, self.agreement = run, agreement
        self.skipped = self.in_a_row = 0
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        state = self.run.resumed.state if self.run.resumed else {}
        self.skipped, self.in_a_row = state.get("skipped_steps", 0), state.get("skipped_in_a_row", 0)
        self.recent.extend(state.get("recent_losses", []))

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run is guarded as if it had never stopped."""
        return {
            "skipped_steps": self.skipped,
            "skipped_in_a_row": self.in_a_row,
            "recent_losses": list(self.recent),
        }

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not whole_step(trainer, batch_idx):
            return
        if not module.skipped:
            self.in_a_row = 0
            if batch["num_items_in_batch"]:  # a step that predicts nothing has no loss
                self._look_for_spike(trainer)
                self.recent.append(self.agreement.loss)
            return
        self.skipped += 1
        self.in_a_row += 1
        facts = {"loss": self.agreement.loss, "gradient_norm": float(module.gradient_norm)}
        self._record_event(
            trainer, "skipped step", facts, f"loss {facts['loss']}, gradient norm {facts['gradient_norm']}"
        )
        if self.in_a_row >= self.run.settings.max_consecutive_skips:
            raise NotFiniteError(trainer.global_step, self.in_a_row, **facts)

    def _look_for_spike(self, trainer: pl.Trainer) -> None:
        if len(self.recent) < ENOUGH:
            return
        median = statistics.median(self.recent)
        deviation = DEVIATION * statistics.median(abs(loss - median) for loss in self.recent)
        above = (self.agreement.loss - median) / max(deviation, 1e-9)
        if above > self.run.settings.spike_threshold:
            facts = {"loss": self.agreement.loss, "median": median, "deviations": above}
            self._record_event(
                trainer, "loss spike", facts, f"loss {self.agreement.loss:.4f}, the median is {median:.4f}"
            )

    def _record_event(self, trainer: pl.Trainer, what: str, facts: dict[str, float], sentence: str) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        step = trainer.global_step
        batch = {"seed": data.seed, "rows": data.batch_size, "store": data.named}
        self.run.event(what, step, **facts, batch=batch)
        print(
            f"step {step}: {what} ({sentence}); python -m llm batch {self.run.path} --step {step} shows its text",
            file=sys.stderr,
        )


class NotFiniteError(ArithmeticError):
    """`in_a_row` steps, the last of them `step`, had a loss or a gradient that is not finite."""

    def __init__(self, step: int, in_a_row: int, loss: float, gradient_norm: float) -> None:
        super().__init__(f"loss {loss}, gradient norm {gradient_norm} at step {step}, {in_a_row} in a row")
        self.step, self.in_a_row, self.loss, self.gradient_norm = step, in_a_row, loss, gradient_norm
