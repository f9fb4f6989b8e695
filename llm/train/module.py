"""The LightningModule: loss, optimizer, learning rate, clipping.

Dimension letters: B sequences of a micro-batch, T time.
"""

from __future__ import annotations

import hashlib
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..common.limits import config_problems
from ..model import DecoderConfig, DecoderForCausalLM
from ..model.fast_paths import FAST_PATHS
from ..model.loss import IGNORED
from .compilation import configure_compiler
from .contradictions import of_context
from .fully_sharded import FullyShardedStrategy, clip_sharded_gradients
from .lightning_loop import is_logged
from .optim import Optimizer, Schedule
from .strategy import ZeroStrategy


class LanguageModule(pl.LightningModule):
    """Next-token training of a decoder.

    A batch is a dict: input_ids and shift_labels (B, T) int64, labels already shifted and -100 where there is nothing
    to predict; where documents are masked position_ids (B, T), restarting at 0 with each; num_items_in_batch, the
    number of predicted tokens in the whole global batch; data_digest, which the model is not given (see `rows.py`).
    The gradient is that of the mean over those tokens, whatever the number of micro-batches and devices and however
    the tokens fall on them.

    Args:
        decoder: sizes and switches of the model.
        optimizer: its name and settings.
        schedule: of the learning rate.
        seed: names the dropout of every step; initial weights have `decoder.initializer_seed`.
        gradient_clip: largest gradient norm; None does not clip. (The norm is logged either way.)
        z_loss: coefficient of the squared logarithm of the softmax's denominator, which is added to the loss in the
            gradient; PaLM has 1e-4. The logged loss is the cross-entropy alone.
        activation_checkpointing: recompute blocks in the backward pass: less memory, up to a third more time. True is
            every block, a number n every n-th.
        compile: torch.compile the blocks and the loss; the first step takes longer.
        attention: "sdpa", "eager", "flex_attention", "flash_attention_2" or "flash_attention_3" (`attention.py`).
        disable_fast_paths: fast paths that stay off, any of those of `llm/model/fast_paths.py`.
        log_activation_rms: log the root mean square of each block's output as "activation_rms/LAYER".
        retain_freed_memory: on a CPU, memory that is freed stays with the process while it trains (`allocator.py`).
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
        seed: int = 0,
        gradient_clip: float | None = 1.0,
        z_loss: float = 0.0,
        activation_checkpointing: bool | int = False,
        compile: bool = False,
        attention: str = "sdpa",
        disable_fast_paths: list[str] | None = None,
        log_activation_rms: bool = False,
        retain_freed_memory: bool = True,
    ) -> None:
        super().__init__()
        self.decoder_config = decoder
        self.optimizer_settings = optimizer or Optimizer()
        self.schedule = schedule or Schedule()
        self.seed, self.gradient_clip, self.z_loss = seed, gradient_clip, z_loss
        self.model = DecoderForCausalLM(decoder)
        self.model.enable_fast_paths(name for name in FAST_PATHS if name not in (disable_fast_paths or ()))
        self.parameter_count = self.model.num_parameters()  # ZeRO will leave each rank a part
        self.every_nth = int(activation_checkpointing)
        if self.every_nth > 0:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for index, block in enumerate(self.model.model.layers):
                block.gradient_checkpointing = index % self.every_nth == 0
        self.compiled = compile
        if compile:
            configure_compiler()
            for block in self.model.model.layers:
                block.compile()
            self.model.lm_head.compiled_loss = True  # read by the fast output head alone
        self.attention, self.retain_freed_memory = attention, retain_freed_memory
        self.disable_fast_paths = disable_fast_paths or []
        self.log_activation_rms = log_activation_rms
        self.activation_rms: list[Tensor] = []  # of each block in the last micro-batch of a logged step
        self.step_loss = torch.zeros(())  # of the step under way: this rank's share of the global mean
        self.gradient_norm = torch.zeros(())  # of the last step, before clipping
        self.skipped = False  # whether the last step changed nothing, its gradient not being finite
        self.validation_loss: float | None = None  # of the last validation

    def problems(self, max_steps: int, context: int) -> list[str]:
        """Settings that cannot be: each a sentence."""
        problems = [*self.optimizer_settings.problems(), *self.schedule.problems(max_steps)]
        problems += config_problems("model", (vars(self) | {"activation_checkpointing": self.every_nth}).get)
        if unknown := set(self.disable_fast_paths).difference(FAST_PATHS):
            problems.append(
                f"model.disable_fast_paths {sorted(unknown)} is unknown: give any of {', '.join(FAST_PATHS)}"
            )
        decoder = self.decoder_config
        return problems + of_context(context, decoder.position, decoder.max_position_embeddings)

    def setup(self, stage: str) -> None:
        self.model.set_attn_implementation(self.attention)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer; learning rates are set before each step, so there is no scheduler with a state."""
        return self.optimizer_settings.build(self.model)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        factor = self.schedule.factor(self.global_step, self.trainer.max_steps)
        self.learning_rate = self.optimizer_settings.lr * factor
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * factor
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        seed = step_seed(self.seed, self.global_step, self.global_rank, micro_batch)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace for each unused backend
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss whose average over micro-batches (Lightning) and ranks (the strategy) is the global token mean."""
        micro_batches = self.trainer.accumulate_grad_batches
        if batch_idx % micro_batches == 0:
            self.step_loss = torch.zeros((), device=self.device, dtype=torch.float32)
        inputs = {name: value for name, value in batch.items() if name != "data_digest"}
        inputs["num_items_in_batch"] = max(1, batch["num_items_in_batch"])  # of none, the sum of no losses is 0
        inputs |= {"z_loss": self.z_loss} if self.z_loss else {}
        measured = self.log_activation_rms and is_logged(self.trainer, self.global_step + 1)
        out = self._measured(inputs) if measured else self.model(**inputs)
        loss = out.loss * (micro_batches * self.trainer.world_size)
        self.step_loss += loss.detach() / micro_batches
        return loss * (loss.detach() * 0 + 1)  # a loss that is not finite makes its gradient so: all ranks see that

    def _measured(self, inputs: dict[str, Any]) -> Any:
        """The model's output; `activation_rms` is then that of its blocks."""
        last_block: list[Tensor] = []  # transformers' last hidden state comes after the final norm
        with self.model.model.norm.register_forward_pre_hook(lambda _, given: last_block.append(given[0])):
            out = self.model(**inputs, output_hidden_states=True)
        outputs = [*out.hidden_states[1:-1], *last_block]
        self.activation_rms = [hidden.detach().float().square().mean().sqrt() for hidden in outputs]
        return out

    def optimizer_step(self, *words: Any, **others: Any) -> None:
        """Gradients go with the step, not before the next backward pass as Lightning has it: the forward pass between
        needs their memory. (DeepSpeed has its own.)"""
        super().optimizer_step(*words, **others)
        if not isinstance(self.trainer.strategy, ZeroStrategy):
            self.model.zero_grad(set_to_none=True)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip; a gradient that is not finite is dropped, so that the optimizer changes nothing at all.

        DeepSpeed does both itself, and calls this after every micro-batch.
        """
        if isinstance(self.trainer.strategy, ZeroStrategy):
            return
        limit = float("inf") if self.gradient_clip is None else self.gradient_clip
        sharded = isinstance(self.trainer.strategy, FullyShardedStrategy)
        clip = clip_sharded_gradients if sharded else torch.nn.utils.clip_grad_norm_
        self.gradient_norm = clip(self.model.parameters(), limit)
        self.skipped = not torch.isfinite(self.gradient_norm)
        if self.skipped:
            self.model.zero_grad(set_to_none=True)

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # summed loss, predicted tokens

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = self.model(**batch | {"num_items_in_batch": 1}).loss
        self.sums += torch.stack([loss.double(), (batch["shift_labels"] != IGNORED).sum()])

    def on_validation_epoch_end(self) -> None:
        total, tokens = self.trainer.strategy.reduce(self.sums, reduce_op="sum").tolist()
        self.validation_loss = total / tokens


def step_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """The seed of dropout in one micro-batch: a function of where in the run it is, so a resumed run draws the same."""
    digest = hashlib.sha256(f"dropout:{seed}:{step}:{rank}:{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
