"""One attempt at a run, from what can be refused beforehand to what is told at its end."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..common.errors import StoppedError, UserError
from ..common.processes import raise_open_file_limit
from ..data.module import TokenDataModule
from ..data.store import check_vocabulary
from ..runs import reading
from ..runs.failure import AFTER_SIGTERM
from . import checkpoint as checkpoints
from .attention import attention_problems
from .callbacks import OpenRunFolder, callbacks
from .evaluation import Evaluations
from .flops import flops_per_token
from .initial_weights import Source, check_tokenizer, read_source, start_from
from .loss_guard import NotFiniteError
from .metrics import ValidationBar
from .precision import slower_in_bf16
from .ranks import ReportedOnRankZeroError, is_lost_rank_error
from .run_folder import RunFolder
from .signals import SAVING, Signals
from .strategy import terminate_children

MANY_FILES = 1000  # whose sizes take a second where each takes a millisecond
# Callbacks of Lightning that watch or change what this project decides elsewhere.
NOT_USED = {
    "EarlyStopping": "it watches what Lightning logs, which is nothing here: set trainer.max_steps",
    "ModelCheckpoint": "set run.checkpoint_every",
    "LearningRateFinder": "set model.optimizer.lr",
    "BatchSizeFinder": "set data.micro_batch_size, see python -m llm bench --find-micro-batch",
    "GradientAccumulationScheduler": "set data.batch_size and data.micro_batch_size",
    "StochasticWeightAveraging": "average exported checkpoints instead",
    "Timer": "send SIGUSR1 before a time limit",
}
PARTS = {"seed_everything", "initializer_seed", "init"}  # of a config
PARTS |= {"decoder", "model", "data", "trainer", "strategy", "run", "evaluation"}


class Attempt(LightningCLI):
    """One attempt at a run: what is refused before it, where it starts, and what is told at its end."""

    run_folder: RunFolder | None = None
    signals: Signals | None = None
    evaluations: Evaluations | None = None
    source: Source | None = None  # that the initial weights come from
    init_sha256: str | None = None  # of its weights

    def _identity(self) -> dict[str, Any]:
        data: TokenDataModule = self.datamodule
        data.open()
        if data.files > MANY_FILES:
            print(f"checking the size of {data.files:,} files of {data.named}", file=sys.stderr)
        data.check_sizes()
        check_vocabulary(data.components[0].train, self.model.decoder_config.unpadded_vocab_size)
        decoder = self.model.decoder_config.to_diff_dict()
        decoder.pop("transformers_version", None)
        return {
            "store_fingerprint": data.fingerprint,
            "seed": data.seed,
            "batch_size": data.batch_size,
            "context": data.context,
            "rows": data.kind,
            "mask_documents": data.mask_documents or None,  # runs from before it have no such key
            "init_sha256": self.init_sha256,  # nor this
            "decoder": decoder,
        }

    def _attention_problems(self, training: bool) -> list[str]:
        return attention_problems(
            self.model.attention,
            on_gpu=self.trainer.strategy.root_device.type == "cuda",
            half="bf16" in str(self.trainer.precision),
            masked=self.datamodule.mask_documents,
            dropout=self.model.decoder_config.attention_dropout,
            training=training,
        )

    def before_fit(self) -> None:
        """What can be refused without the other ranks is refused here, the rest in `_open`."""
        trainer: Trainer = self.trainer
        problems = [*self.model.problems(trainer.max_steps, self.datamodule.context), *self.datamodule.problems()]
        problems += self._attention_problems(training=True)
        named = [type(callback).__name__ for callback in trainer.callbacks]
        problems += [f"trainer.callbacks {name}: {NOT_USED[name]}" for name in named if name in NOT_USED]
        strategy = self._get(self.config_init, "strategy")
        if strategy.name == "deepspeed":
            optimizer = self.model.optimizer_settings
            problems += optimizer.sharding_problems(strategy.stage, strategy.offload_optimizer)
        if not (self._get(self.config_init, "trainer").log_every_n_steps or 0) >= 1:
            problems.append("trainer.log_every_n_steps must be at least 1")
        if problems:
            raise UserError("; ".join(problems))
        self.datamodule.micro_batches(trainer.world_size)
        raise_open_file_limit()  # each shard of a store is a file
        self.run_folder = RunFolder(self._get(self.config_init, "run"))
        self._read_initial_weights()
        self.signals = Signals()
        self.signals.install()
        opening = OpenRunFolder(self.run_folder, self._open, strategy.timeout)
        evaluation = self._get(self.config_init, "evaluation")
        self.evaluations = Evaluations(self.run_folder, evaluation) if evaluation.every else None
        trainer.callbacks += [opening, *callbacks(self.run_folder, self.signals, self.evaluations)]

    def _read_initial_weights(self) -> None:
        """Copy the weights that the config names. A run that resumes has its own, and keeps the hash of these."""
        name, run = self._get(self.config_init, "init"), self._folder()
        if name is None:
            return
        begun = self._get(self.config_init, "resume") is not None and reading.folders(run.path / "checkpoints")
        kept = reading.record(run.path).get("init_sha256") if begun else None
        if kept is not None:
            self.init_sha256 = kept
            return
        self.source = read_source(name)
        self.init_sha256 = self.source.sha256
        notes = start_from(self.source, self.model.model)
        if self.trainer.is_global_zero:
            print(*map("init: {}".format, notes), sep="\n", file=sys.stderr)

    def _open(self) -> list[Logger]:
        """On rank zero: lock the folder, find where the run starts, open it and say so. Returns the loggers.

        Everything that can be refused is refused before anything but the lock is written.
        """
        trainer, data = self.trainer, self.datamodule
        run, resume = self._folder(), self._get(self.config_init, "resume")
        run.identity = self._identity()
        if self.source is not None:
            store = data.components[0].train
            if said := check_tokenizer(self.source, store, data.tokenizer):
                print(f"init: {said}", file=sys.stderr)
        if resume is not None:
            print("verifying the checkpoint to continue from", file=sys.stderr)
        skipped = run.acquire(resume)
        for sentence in skipped:
            print(f"passed over: {sentence}", file=sys.stderr)
        if run.resumed is not None:
            print(f"continuing from {run.resumed.path}", file=sys.stderr)
        elif resume is not None:
            print(f"no checkpoint in {run.path} yet: starting at step 0", file=sys.stderr)
        if run.resumed is not None and run.resumed.step >= trainer.max_steps:
            if run.resumed.path.parent == run.path / "checkpoints":
                run.close(run.resumed.state)  # a kill may have come between the last checkpoint and the summary
                self._evaluate_rest(run.resumed.step)
            print(f"{run.path} is finished at step {run.resumed.step}: nothing to do", file=sys.stderr)
            return []
        if self.evaluations is not None:
            self.evaluations.check()
        notes = [*data.warnings, *self._precision_notes()]
        print(data.summary(trainer.max_steps), *map("note: {}".format, notes), sep="\n", file=sys.stderr)
        if trainer.world_size > 1:
            print(data.division(trainer.world_size), file=sys.stderr)
        facts = {
            "seed": data.seed,
            "parameters": self.model.parameter_count,
            "flops_per_token": flops_per_token(self.model.decoder_config, data.context),
            "store": data.named,
            "store_fingerprint": run.identity["store_fingerprint"],
            "init_sha256": self.init_sha256,
            "begin_of_document": data.components[0].train.begin_of_document,  # an export begins prompts with it
        }
        spread = {"devices": trainer.world_size, "strategy": self._get(self.config_init, "strategy").described}
        loggers = run.open(self._config_yaml(), facts, data.tokenizer, list(data.epochs(0)), **spread)
        for sentence in skipped:
            run.event("checkpoint passed over", run.resumed.step if run.resumed else 0, why=sentence)
        if self.evaluations is not None:
            self.evaluations.begin(run.resumed.step if run.resumed else 0, trainer.max_steps)
        return loggers

    def _precision_notes(self) -> list[str]:
        if self.trainer.strategy.root_device.type != "cpu" or "bf16" not in str(self.trainer.precision):
            return []
        data = self.datamodule
        rows = data.batch_size // (self.trainer.world_size * data.micro_batches(self.trainer.world_size))
        note = slower_in_bf16(self.model.decoder_config, rows * data.context)
        return [note] if note else []

    def _evaluate_rest(self, step: int) -> None:
        """Take up what the attempts of a finished run have left to evaluate."""
        if self.evaluations is not None and any(self.evaluations.unfinished(step, step)):
            self.evaluations.begin(step, step)

    def after_fit(self) -> None:
        """On rank zero: wait for the evaluations that training has outrun. Ctrl-C ends without them.

        Raises:
            StoppedError: a signal asked to stop; the same command goes on with them.
        """
        if self.evaluations is None or self.signals is None or not self.trainer.is_global_zero:
            return
        came = self.signals.came
        self.signals.restore(signal.SIGINT)  # there is no step any more that is to be made whole
        try:
            done = self.evaluations.wait(lambda: any(came.values()))
        except KeyboardInterrupt:
            done = False
        saving = [number for number in SAVING if came[number]]
        if not done and saving:
            raise StoppedError(self.trainer.global_step, saving[0].name)
        if not done:
            print("evaluation interrupted; the run is finished: --resume auto evaluates the rest", file=sys.stderr)

    def _folder(self) -> RunFolder:
        return self.run_folder or RunFolder(self._get(self.config_init, "run"))

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except NotFiniteError as error:
            self._ended(f"{error}", diverged=True)
            raise self._on_rank_zero(UserError(self._explain(error))) from error
        except StoppedError as error:
            self._ended(error.name, self._where_it_stands())
            raise self._on_rank_zero(error) from None
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            if self.trainer.interrupted and self.run_folder is not None:
                self._ended("Ctrl-C", self._where_it_stands())
                raise self._on_rank_zero(KeyboardInterrupt()) from error
            raise
        except MisconfigurationException as error:  # of a callback or a plugin that the config names
            raise self._on_rank_zero(UserError(" ".join(str(error).split()))) from error
        except (RuntimeError, OSError) as error:
            if self.trainer.world_size > 1 and is_lost_rank_error(error):
                self._ended("lost contact to the other ranks")
                raise UserError(self._lost(error)) from error
            raise
        finally:
            try:
                if self.evaluations is not None:
                    self.evaluations.end()
            finally:  # also where Ctrl-C came once more
                terminate_children(self.trainer, patience=60.0 if sys.exc_info()[0] is None else 5.0)
                if self.signals is not None:
                    self.signals.restore()
                if self.run_folder is not None:
                    self.run_folder.release()

    def _ended(self, why: str, sentence: str = "", **facts: Any) -> None:
        """On rank zero: note in the run's folder why this attempt ended, and say so."""
        if self.run_folder is None or not self.trainer.is_global_zero:
            return
        self.run_folder.event("stopped", self.trainer.global_step, why=why, **facts)
        if sentence:
            print(f"{why}: {sentence}", file=sys.stderr)

    def _on_rank_zero(self, error: BaseException) -> BaseException:
        """The error, which all ranks have; those but rank zero leave it to it to say so."""
        return error if self.trainer.is_global_zero else ReportedOnRankZeroError(str(error))

    def _lost(self, error: BaseException) -> str:
        settings = self._get(self.config_init, "strategy")
        why = " ".join(str(error).split())
        ending = self.signals is not None and self.signals.came[signal.SIGTERM]
        return (
            f"rank {self.trainer.global_rank} lost contact to the other ranks at step {self.trainer.global_step}"
            f"{AFTER_SIGTERM if ending else ''}: one has died, or hangs for longer than strategy.timeout "
            f"{settings.timeout:g} s (its own log says which); continue with --resume auto ({why[:300]})"
        )

    def _where_it_stands(self) -> str:
        run = self._folder()
        last = checkpoints.newest(run.path / "checkpoints", hashed=False)[0]
        kept = f"its newest checkpoint is of step {last.step}" if last else "it has no checkpoint yet"
        return (
            f"{run.path} stopped at step {self.trainer.global_step}; {kept}: resume with "
            f"python -m llm fit --config {run.path}/config.yaml --resume auto"
        )

    def _explain(self, error: NotFiniteError) -> str:
        data, step = self.datamodule, error.step
        batch = f"seed {data.seed}, step {step}, rows 0 to {data.batch_size - 1} of {data.named}"
        folder = Path(self._get(self.config_init, "run").folder)
        last = checkpoints.newest(folder / "checkpoints", before=step - error.in_a_row)[0]
        return (
            f"{error.in_a_row} step(s) in a row changed nothing: the loss is {error.loss} and the gradient norm "
            f"{error.gradient_norm} at step {step} (its batch: {batch}); the last good checkpoint is "
            f"{last.path if last else 'none'}: continue from it with --resume and a lower model.optimizer.lr"
        )

    def before_validate(self) -> None:
        if problems := [*self.datamodule.problems(), *self._attention_problems(training=False)]:
            raise UserError("; ".join(problems))
        run = self._folder()
        run.identity = self._identity()
        resume = self._get(self.config_init, "resume")
        path = run.path if resume in (None, "auto") else Path(resume)
        checkpoint = checkpoints.find(path) if (path / "checkpoints").is_dir() else checkpoints.read(path)
        run.check_identity(checkpoint, ["decoder"])
        checkpoints.restore(checkpoint, self.model.model)
        self.trainer.callbacks.append(ValidationBar())
        if self.trainer.is_global_zero:
            print(f"validating {checkpoint.path}", file=sys.stderr)

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            print(f"validation loss {self.model.validation_loss:.4f}")

    def _config_yaml(self) -> str:
        config = self.config[self.subcommand].clone()
        for key in vars(config).keys() - PARTS:  # --resume and what only `fit` can be told
            config.pop(key)
        return self._parser(self.subcommand).dump(config, skip_link_targets=True, skip_none=False, skip_validation=True)
