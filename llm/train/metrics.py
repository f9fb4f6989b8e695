"""What a run measures of itself, and its progress bars."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ..common.files import first_line
from ..common.processes import peak_rss, progress_bar
from ..data.rows import DIGESTS
from .agreement import Agreement
from .flops import device_peak, flops_per_token
from .lightning_loop import is_logged, validate_now, whole_step
from .loggers import MetricsFile
from .loss_guard import LossSpikeMonitor
from .run_folder import RunFolder


class Measurements(pl.Callback):
    """Loss, learning rate, gradient norm and throughput, every `trainer.log_every_n_steps` steps, to all loggers.

    train_loss is the mean over the steps since the last row, without skipped ones; tokens_per_second is measured over
    the same steps, without validation and checkpoints; tokens are predicted tokens, padding not counted. mfu is model
    FLOPs per second over the peak of all devices, empty where the device's peak is not known; epochs count how often
    the run went through its store, or each of its stores; skipped_steps are those of the whole run (see
    `loss_guard.py`). Learned numbers of switches have a column for each layer: `learned_switches`. So
    has activation_rms on request: of the rows that rank zero had last.

    data_digest, in metrics.csv alone as it is no number to plot, is the sum of the digests of all rows of all steps
    since step 0 (see `rows.py`): two runs that agree in it have seen equal data up to there. A run that was begun
    before there were digests has none.
    """

    def __init__(self, run: RunFolder, agreement: Agreement, guard: LossSpikeMonitor) -> None:
        self.run, self.agreement, self.guard = run, agreement, guard
        self.bar = tqdm(disable=True)
        self.validated_at = -1
        self.failed: set[str] = set()  # loggers that lost a row, by name
        self.digest_since = 0  # of this rank, since the digests of all ranks were last added up

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        state: dict[str, Any] = self.run.resumed.state if self.run.resumed else {"data_digest": "0"}
        self.tokens_seen: int = state.get("tokens_seen", 0)
        self.seconds_before: float = state.get("seconds", 0.0)
        self.losses: list[float] = state.get("window_losses", [])
        known = state.get("data_digest")
        self.digest = None if known is None else int(known, 16)  # of all ranks
        self.memory_before: int | None = state.get("peak_memory_bytes") if self.run.resumed else 0

    def state(self, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        """For the checkpoint; every rank has to ask for it together."""
        return {
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds(),
            "window_losses": list(self.losses),  # since the last row of metrics
            "data_digest": self.data_digest(trainer, module),
            "peak_memory_bytes": self.peak_memory(module.device),
        }

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.peak = self.run.settings.peak_flops or device_peak(module.device, "16" in str(trainer.precision))
        self.flops = flops_per_token(module.decoder_config, trainer.datamodule.context)
        hidden = not trainer.is_global_zero
        self.bar = progress_bar(trainer.max_steps, trainer.global_step, "train", "step", disable=hidden)
        self.started = time.perf_counter()
        self._start_clock()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.digest_since += batch["data_digest"]
        if not whole_step(trainer, batch_idx):
            return
        self.tokens_seen += batch["num_items_in_batch"]
        if not module.skipped and batch["num_items_in_batch"]:
            self.losses.append(self.agreement.loss)
        self.bar.update()
        if is_logged(trainer, trainer.global_step):
            self._log_training(trainer, module)

    def _log_training(self, trainer: pl.Trainer, module: Any) -> None:
        # Of steps that were all skipped it is nan; of steps that predict nothing there is none.
        loss = statistics.fmean(self.losses) if self.losses else math.nan if module.skipped else None
        rate = (self.tokens_seen - self.clock_tokens) / (time.perf_counter() - self.clock)
        self._log(
            trainer,
            train_loss=loss,
            perplexity=None if loss is None else math.exp(min(loss, 700.0)),  # exp(710) is beyond float64
            learning_rate=module.learning_rate,
            gradient_norm=module.gradient_norm.item(),
            tokens_per_second=rate,
            mfu=rate * self.flops / (self.peak * trainer.world_size) if self.peak else None,
            skipped_steps=self.guard.skipped,
            data_digest=self.data_digest(trainer, module),
            **learned_switches(module),
            **{f"activation_rms/{layer}": rms.item() for layer, rms in enumerate(module.activation_rms)},
        )
        said = "" if loss is None else f"loss {loss:.3f}, "
        self.bar.set_postfix_str(f"{said}{rate:,.0f} tokens/s", refresh=False)
        self.losses = []
        self._start_clock()

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit":
            self.skip(time.perf_counter() - self.paused)
            self.validated_at = trainer.global_step
            self._log(trainer, validation_loss=module.validation_loss)
            if trainer.is_global_zero:
                tqdm.write(f"step {trainer.global_step}: validation loss {module.validation_loss:.4f}", file=sys.stderr)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.validated_at != trainer.global_step:
            validate_now(trainer)
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.bar.close()

    def seconds(self) -> float:
        """Seconds of training so far, validation and checkpoints included, over all attempts at the run."""
        return self.seconds_before + time.perf_counter() - self.started

    def peak_memory(self, device: torch.device) -> int | None:
        """Bytes of rank zero at their most, over all attempts at the run; None where an earlier one did not measure it.

        On a GPU what torch had allocated there; else the resident memory of the process, Python and its libraries
        among it, which Linux alone tells.
        """
        if self.memory_before is None or (device.type != "cuda" and not sys.platform.startswith("linux")):
            return None
        now = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
        return max(self.memory_before, now)

    def data_digest(self, trainer: pl.Trainer, module: Any) -> str | None:
        """The digest of the run's data so far, 16 hex digits; every rank has to ask for it together."""
        if self.digest is None:
            return None
        since = torch.tensor(self.digest_since % DIGESTS, device=module.device)
        self.digest = (self.digest + int(trainer.strategy.reduce(since, reduce_op="sum"))) % DIGESTS
        self.digest_since = 0
        return f"{self.digest:016x}"

    def skip(self, seconds: float) -> None:
        """Leave `seconds` out of the throughput."""
        self.clock += seconds

    def _start_clock(self) -> None:
        self.clock, self.clock_tokens = time.perf_counter(), self.tokens_seen

    def _log(self, trainer: pl.Trainer, **values: float | str | None) -> None:
        epochs = trainer.datamodule.epochs(trainer.global_step)
        row = {"tokens": self.tokens_seen, **epochs, **values, "seconds": self.seconds()}
        measured = {name: value for name, value in row.items() if value is not None}
        numbers = {name: value for name, value in measured.items() if not isinstance(value, str)}
        for logger in trainer.loggers:
            try:
                logger.log_metrics(measured if isinstance(logger, MetricsFile) else numbers, trainer.global_step)
            except Exception as error:  # no logger ends a run
                self._record_failure(trainer, str(logger.name), first_line(error))

    def _record_failure(self, trainer: pl.Trainer, logger: str, why: str) -> None:
        if logger not in self.failed:
            self.failed.add(logger)
            tqdm.write(f"the logger {logger} lost a row ({why}); training continues", file=sys.stderr)
            self.run.event("logger failed", trainer.global_step, logger=logger, why=why)


def learned_switches(module: Any) -> dict[str, float]:
    """The learned numbers of every layer's parts that have a method `learned`, as "NAME/LAYER".

    Every rank has to ask for it together: ZeRO 3 and FSDP2 gather them.
    """
    parts = [
        (layer, part)
        for layer, block in enumerate(module.model.model.layers)
        for part in block.modules()
        if hasattr(part, "learned")
    ]
    values: dict[str, float] = {}
    with _gathered([part for _, part in parts]):
        for layer, part in parts:
            values |= {f"{name}/{layer}": tensor.item() for name, tensor in part.learned().items()}
    return values


def _gathered(parts: list[torch.nn.Module]) -> AbstractContextManager:
    """With the whole of the parts' own parameters, of which each rank holds a part under ZeRO 3 or FSDP2."""
    parameters = [parameter for part in parts for parameter in part.parameters(recurse=False)]
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return _in_whole(parts)
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


@contextmanager
def _in_whole(parts: list[torch.nn.Module]) -> Iterator[None]:
    own: list[dict[str, Any]] = [dict(part._parameters) for part in parts]
    try:
        for part, named in zip(parts, own, strict=True):
            part._parameters.update({name: each.full_tensor() for name, each in named.items() if each is not None})
        yield
    finally:
        for part, named in zip(parts, own, strict=True):
            part._parameters.update(named)


class ValidationBar(pl.Callback):
    """A progress bar over the validation rows where they take more than a few seconds."""

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        batches = int(sum(map(int, trainer.num_val_batches)))
        hidden = not trainer.is_global_zero
        self.bar = progress_bar(batches, 0, "validate", "batch", leave=False, delay=3, disable=hidden)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.bar.update()

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.bar.close()
