"""What `python -m llm bench` times: variants of a config through the whole `fit` loop, and the same-sized transformers
model in a bare PyTorch loop.

A step in parts, each up to the moment that ends it, with the work on a GPU waited for:

    data        the loop between two steps and the next batch, on the device
    forward     the decoder up to its last norm
    loss        head and cross-entropy; ours makes the head's gradient there too (`model/loss.py`)
    backward    the rest of the gradient
    optimizer   clipping and AdamW
    logging     what all ranks agree on, guard, measurements, loggers; transformers has none
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.module import TokenDataModule
from ..data.shard import SPLITS, ShardWriter, token_dtype
from ..data.store_index import write_index
from ..model import DecoderConfig, DecoderForCausalLM
from ..model.convert import TO_HF_ACTIVATION, model_to_hf
from ..model.fast_paths import FAST_PATHS
from ..train.allocator import keep_freed_memory
from ..train.callbacks import callbacks
from ..train.checkpointing import Checkpoints
from ..train.lightning_loop import whole_step
from ..train.module import LanguageModule
from ..train.optim import Schedule
from ..train.options import TRAINER_DEFAULTS
from ..train.run_folder import RunFolder, RunSettings
from ..train.signals import Signals


@dataclass(frozen=True)
class Variant:
    """What of the config is changed: settings of the decoder, fast paths switched off; and whether it is compiled."""

    decoder: dict[str, Any] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    compiled: bool = False


VARIANTS = {
    "config": Variant(),
    "classic": Variant({"stream": []}),
    "classic_compiled": Variant({"stream": []}, compiled=True),
    "values": Variant({"stream": ["values"]}),
    "queries_keys": Variant({"stream": ["queries", "keys"]}),
    "silu": Variant({"stream": [], "hidden_act": "silu"}),
    "nmda": Variant({"stream": [], "hidden_act": "nmda", "nmda_alpha": 10.0}),
    "plain": Variant({"stream": []}, FAST_PATHS),
    "plain_loss": Variant({"stream": []}, ("loss",)),
}
# The config without one fast path each, and without all, for --fast-paths
WITHOUT = {f"without_{name}": Variant(plain=(name,)) for name in FAST_PATHS} | {"without_all": Variant({}, FAST_PATHS)}
TRANSFORMERS = {  # name -> how
    "transformers": "eager",
    "transformers_compiled": "compiled",
    "transformers_blocks": "blocks",
    "transformers_liger": "liger",
}
PARTS = ("data", "forward", "loss", "backward", "optimizer", "logging")
UNCOUNTED = 2  # steps at the start of a window: they allocate and, where asked for, compile
MIB = 2**20


@dataclass
class Plan:
    """What is measured: `micro_batches` of `rows` x `context` tokens a step, on `device` at `precision`.

    masked: as data.mask_documents; transformers has no such thing.
    """

    module: LanguageModule
    precision: str
    context: int
    rows: int
    device: str
    compile: bool
    folder: Path
    micro_batches: int = 1
    masked: bool = False

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.rows * self.context

    def data(self) -> TokenDataModule:
        return TokenDataModule(
            str(self.folder),
            self.context,
            self.micro_batches * self.rows,
            micro_batch_size=self.rows,
            mask_documents=self.masked,
            validate_every=10**9,
        )

    def fill(self, steps: int) -> None:
        """Put a store into the folder that is enough for `steps` and those not counted."""
        vocabulary = int(self.module.decoder_config.unpadded_vocab_size or 0)
        random_store(self.folder, vocabulary, (steps + UNCOUNTED) * self.tokens_per_step + 1)


def random_store(folder: Path, vocab_size: int, tokens: int) -> None:
    """A token store of one document of random tokens in each split: speed does not depend on what is said."""
    generator, manifests = np.random.default_rng(0), {}
    for split in SPLITS:
        with ShardWriter(folder / split, "random", token_dtype(vocab_size)) as writer:
            writer.add(generator.integers(vocab_size, size=tokens), np.array([tokens]))
            manifests[split] = [writer.finish(split, {"location": "random", "size": 0, "sha256": ""}, "none", {})]
    write_index(folder, manifests, vocab_size=vocab_size, end_of_document=0, tokenizer_fingerprint="none")


def with_settings(config: DecoderConfig, **settings: Any) -> DecoderConfig:
    """A copy of the config with other settings."""
    changed = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed


def nearest_in_transformers(config: DecoderConfig) -> DecoderConfig:
    """The same sizes without what transformers' Llama and GPT-2 lack: switches off, GPT-2 with all its biases."""
    gated = config.feedforward == "gated"
    act = config.hidden_act if config.hidden_act in TO_HF_ACTIVATION else "silu" if gated else "gelu_new"
    biases = {} if gated else {"attention_bias": True, "mlp_bias": True}
    return with_settings(
        config,
        stream=[],
        softmax_scale=None,
        unpadded_vocab_size=config.vocab_size,
        hidden_act=act,
        parametrization="standard",
        **biases,
    )


@torch.no_grad()
def copy_weights(given: DecoderForCausalLM, model: DecoderForCausalLM) -> None:
    """What only one has, or in another size, starts as it always does."""
    model.tie_weights()
    own = model.state_dict()
    known = {
        name: value for name, value in given.state_dict().items() if name in own and own[name].shape == value.shape
    }
    lacking = model.load_state_dict(known, strict=False).missing_keys
    for owner in {name.rpartition(".")[0] for name in lacking}:
        model._init_weights(model.get_submodule(owner))


class KeepOnDevice(SingleDeviceStrategy):
    """Leaves the model on its device: Lightning would take it to the host's memory after every fit."""

    def teardown(self) -> None:
        self.precision_plugin.teardown()


class StepTimer:
    """Seconds of the steps under way.

    Args:
        parts: also of each part; a GPU is then waited for between them, which makes a step longer.
    """

    def __init__(self, parts: bool) -> None:
        self.parts = parts
        self.seconds: dict[str, float] = defaultdict(float)
        self.ends: list[float] = []  # of each step
        self.began = self.last = now()

    def stop(self, part: str) -> None:
        """The part ends now."""
        if self.parts:
            moment = now()
            self.seconds[part] += moment - self.last
            self.last = moment

    def step(self, part: str) -> None:
        """The part and a step end now; of the first UNCOUNTED steps no seconds are kept."""
        self.stop(part)
        self.ends.append(self.last if self.parts else now())
        if len(self.ends) == UNCOUNTED:
            self.seconds.clear()


@dataclass
class Window:
    """What one turn of a contender gives."""

    tokens_per_second: float
    parts: dict[str, float]  # seconds of each part of a step, where they were watched
    first_step: float  # seconds from the start of the loop to the end of its first step: allocates, compiles
    peak_mib: float = math.nan  # of the GPU's memory, where it was watched

    @classmethod
    def of(cls, watch: StepTimer, steps: int, tokens_per_step: int) -> Window:
        """Of the last `steps` steps."""
        rate = steps * tokens_per_step / (watch.ends[-1] - watch.ends[UNCOUNTED - 1])
        parts = {part: watch.seconds.get(part, 0.0) / steps for part in PARTS} if watch.parts else {}
        return cls(rate, parts, watch.ends[0] - watch.began)


class First(pl.Callback):
    """Tells the watch where parts end; it acts before the run's own callbacks."""

    def __init__(self, watch: StepTimer) -> None:
        self.watch = watch

    def on_train_start(self, *_: Any, **__: Any) -> None:
        self.watch.began = self.watch.last = now()

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.watch.stop("data")

    def on_after_backward(self, *_: Any, **__: Any) -> None:
        self.watch.stop("backward")

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.watch.stop("optimizer")


class Last(pl.Callback):
    """The same at the end of a step, after all other callbacks."""

    def __init__(self, watch: StepTimer) -> None:
        self.watch = watch

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if whole_step(trainer, batch_idx):
            self.watch.step("logging")

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """The next turn makes the moments anew, and Lightning would move them to the host's memory."""
        trainer.optimizers[0].state.clear()


def now() -> float:
    """Seconds, after all work on a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class TrainerLoop:
    """Our model through the whole fit loop: loader, callbacks, CSV and TensorBoard loggers."""

    def __init__(self, plan: Plan, module: LanguageModule) -> None:
        self.plan, self.module, self.model = plan, module, module.model

    @classmethod
    def of_variant(cls, plan: Plan, variant: Variant) -> TrainerLoop:
        """A variant of the plan's module, with its weights."""
        given = plan.module
        with no_init_weights():  # to draw a billion numbers takes 20 seconds
            module = LanguageModule(
                with_settings(given.decoder_config, **variant.decoder),
                given.optimizer_settings,
                Schedule(shape="constant"),
                gradient_clip=given.gradient_clip or 1.0,
                activation_checkpointing=given.every_nth,
                compile=plan.compile or variant.compiled,
                attention=given.attention,
                disable_fast_paths=[*given.disable_fast_paths, *variant.plain],
                retain_freed_memory=given.retain_freed_memory,
            )
        copy_weights(given.model, module.model)
        return cls(plan, module)

    def window(self, steps: int, parts: bool) -> Window:
        """Train `steps` steps, and UNCOUNTED before; `parts` as in `StepTimer`."""
        watch = StepTimer(parts)
        hooks = [
            self.model.model.register_forward_hook(lambda *_: watch.stop("forward")),
            self.model.register_forward_hook(lambda *_: watch.stop("loss")),
        ]
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(RunSettings(f"{folder}/run", checkpoint_every=10**9), {})
            own = [each for each in callbacks(run, Signals()) if not isinstance(each, Checkpoints)]
            trainer = pl.Trainer(
                **TRAINER_DEFAULTS | {"limit_val_batches": 0},
                max_steps=steps + UNCOUNTED,
                accelerator=self.plan.device,
                strategy=KeepOnDevice("cuda:0" if self.plan.device == "gpu" else "cpu"),
                precision=self.plan.precision,  # type: ignore[arg-type]
                callbacks=[First(watch), *own, Last(watch)],
            )
            trainer.loggers = run.open("", {})
            trainer.fit(self.module, datamodule=self.plan.data())
        for hook in hooks:
            hook.remove()
        return Window.of(watch, steps, self.plan.tokens_per_step)


class TransformersBaseline:
    """transformers' model of the same sizes in a bare PyTorch loop.

    Args:
        how: "eager"; "compiled", as a whole, with which its attention gets a mask made of all positions and is slower
            (torch before 2.14: its `masking_utils.py`); "blocks", at its best: each block compiled, and the loss, with
            freed memory kept as ours is; "liger", with Liger-Kernel's kernels and loss (Hsu et al. 2024).
    """

    def __init__(self, plan: Plan, how: str) -> None:
        self.plan, self.how = plan, how
        self.device = torch.device("cuda" if plan.device == "gpu" else "cpu")
        with self.device:
            model: PreTrainedModel = model_to_hf(nearest_in_transformers(plan.module.decoder_config))
        model.set_attn_implementation(plan.module.attention)
        half = torch.bfloat16 if plan.precision == "bf16-true" else torch.float32
        self.model = model.to(self.device, half).train()  # type: ignore[arg-type]
        self.model.config.use_cache = False
        blocks = [each for each in self.model.modules() if isinstance(each, GradientCheckpointingLayer)]
        if every_nth := plan.module.every_nth:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for index, block in enumerate(blocks):
                block.gradient_checkpointing = index % every_nth == 0
        self.optimizer = plan.module.optimizer_settings.build(self.model)
        self.clip = plan.module.gradient_clip or 1.0
        if how == "blocks":
            for block in blocks:
                block.compile()
            self.model.loss_function = torch.compile(self.model.loss_function)
        if how == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            # Positions would be those of every Llama in this process; norms and activations are of any made later.
            apply_liger_kernel_to_llama(rope=False, model=self.model)
        self.forward = torch.compile(self.model) if how == "compiled" else self.model

    def window(self, steps: int, parts: bool) -> Window:
        """The same. Compiled as a whole, its forward part is in the loss."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.plan.rows, self.plan.context)
        vocabulary = self.model.config.vocab_size
        each = self.plan.micro_batches
        batches = [torch.randint(vocabulary, shape, generator=generator) for _ in range(each * (steps + UNCOUNTED))]
        keep = self.how == "blocks" and self.device.type == "cpu" and self.plan.module.retain_freed_memory
        if keep:
            keep_freed_memory(True)
        watch, hooks = StepTimer(parts), []
        if self.how != "compiled":
            hooks = [self.model.base_model.register_forward_hook(lambda *_: watch.stop("forward"))]
        for index, batch in enumerate(batches):
            ids = batch.to(self.device, non_blocking=True)
            watch.stop("data")
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16-mixed"):
                loss = self.forward(input_ids=ids, labels=ids).loss / each
            watch.stop("loss")
            loss.backward()
            watch.stop("backward")
            if (index + 1) % each:
                continue
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            watch.step("optimizer")
        for hook in hooks:
            hook.remove()
        self.optimizer.state.clear()  # the other contenders need the memory
        if keep:
            keep_freed_memory(False)
        return Window.of(watch, steps, self.plan.tokens_per_step)


def contender(name: str, plan: Plan) -> TrainerLoop | TransformersBaseline:
    """The contender called `name`, its model built."""
    if name in TRANSFORMERS:
        return TransformersBaseline(plan, TRANSFORMERS[name])
    return TrainerLoop.of_variant(plan, (VARIANTS | WITHOUT)[name])


def fast_paths_of(module: LanguageModule) -> list[str]:
    """The fast paths that a model has a use for and its config does not switch off."""
    c = module.decoder_config
    unused = {
        "dropout": not (c.attention_dropout or c.residual_dropout or c.embedding_dropout),
        "rotary": c.position != "rope",
        "norm": c.norm != "rmsnorm",
    }
    return [name for name in FAST_PATHS if not unused.get(name) and name not in module.disable_fast_paths]
