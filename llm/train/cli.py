"""`python -m llm fit` and `validate`: one YAML, dotted overrides, unknown keys refused.

A config has seven parts: `decoder` (DecoderConfig), `model` (LanguageModule: optimizer, schedule ...), `data`
(TokenDataModule), `trainer` (Lightning's Trainer), `strategy` (StrategySettings: how it is spread over devices), `run`
(RunSettings) and `evaluation` (EvaluationSettings: what is asked of the model in the background); and
`seed_everything`, from which initial weights, the order of the data and the dropout follow.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.configuration_utils import PretrainedConfig

from ..data.module import TokenDataModule
from ..data.store import check_vocabulary
from ..errors import StoppedError, UserError
from ..model import DecoderConfig
from . import checkpoint as checkpoints
from .attention import attention_problems
from .callbacks import Opening, callbacks
from .evaluation import Evaluations, EvaluationSettings
from .flops import flops_per_token
from .guards import NotFiniteError
from .measure import ValidationBar
from .module import LanguageModule
from .ranks import ToldElsewhereError, lost_contact
from .run import RunFolder, RunSettings
from .signals import SAVING, Signals
from .strategy import StrategySettings, device_count, end_children, plugins

# What the run folder does for itself is off in Lightning, and a run is counted in steps, not epochs.
TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,
    "log_every_n_steps": 10,
    "devices": 1,
}
# What Lightning's trainer could be told and this project decides elsewhere.
OURS = {
    "gradient_clip_val": "give model.gradient_clip",
    "accumulate_grad_batches": "give data.batch_size and data.micro_batch_size",
    "val_check_interval": "give data.validate_every, in optimizer steps",
    "check_val_every_n_epoch": "give data.validate_every, in optimizer steps",
    "num_sanity_val_steps": "a run validates at data.validate_every and at its end",
    "max_epochs": "give trainer.max_steps: a run is counted in optimizer steps",
    "enable_checkpointing": "give run.checkpoint_every",
    "logger": "give run.loggers",
    "strategy": "give strategy.name",
    "limit_train_batches": "give trainer.max_steps",
    "overfit_batches": "give a small store in data.store",
    "fast_dev_run": "give a small trainer.max_steps and another run.folder",
    "reload_dataloaders_every_n_epochs": "a run reads its data once through",
}
PARTS = {"seed_everything", "decoder", "model", "data", "trainer", "strategy", "run", "evaluation"}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "32", 32, None)
EXAMPLES = {
    "fit": {"epilog": "example: python -m llm fit --config configs/stories_values.yaml --trainer.max_steps 100"},
    "validate": {"epilog": "example: python -m llm validate --config runs/stories/values/config.yaml"},
}


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence, with the nearest key that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        unknown = re.search(r"option '([\w.]+)'|Key '([\w.]+)' is not|unrecognized arguments: --([\w.]+)", text)
        if unknown:
            key = next(filter(None, unknown.groups()))
            known = [action.dest for action in self._actions]
            near = difflib.get_close_matches(key, known, n=1)
            text = f"unknown config key {key}" + (
                f": did you mean {near[0]}?" if near else ": see --help for the known"
            )
        raise UserError(text)


class CLI(LightningCLI):
    """LightningCLI with the decoder and the run beside Lightning's own parts."""

    run_folder: RunFolder | None = None
    signals: Signals | None = None
    evaluations: Evaluations | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "datamodule"}, "validate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        of_transformers = {field.name for field in dataclasses.fields(PretrainedConfig)}
        parser.add_class_arguments(DecoderConfig, "decoder", skip=of_transformers)
        parser.add_class_arguments(StrategySettings, "strategy")
        parser.add_class_arguments(RunSettings, "run")
        parser.add_class_arguments(EvaluationSettings, "evaluation")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="auto, or the path of a checkpoint or run to continue"
        )
        parser.link_arguments("decoder", "model.decoder", apply_on="instantiate")
        for target in ("model.seed", "data.seed", "decoder.initializer_seed"):
            parser.link_arguments("seed_everything", target)

    def instantiate_classes(self) -> None:
        given = self.config.get(self.subcommand or "", self.config)
        defaults = inspect.signature(Trainer).parameters
        for key, ours in OURS.items():
            if given.get(f"trainer.{key}") not in (None, defaults[key].default, TRAINER_DEFAULTS.get(key)):
                raise UserError(f"trainer.{key} is not read here: {ours}")
        problems = []
        if given["trainer.precision"] not in PRECISIONS:
            names = ", ".join(name for name in PRECISIONS if isinstance(name, str))
            problems.append(f"trainer.precision must be one of {names}")
        strategy = StrategySettings(**vars(given["strategy"]))
        problems += strategy.problems(str(given["trainer.precision"]))
        problems += EvaluationSettings(**vars(given["evaluation"])).problems(given["run.checkpoint_every"])
        if problems:
            raise UserError("; ".join(problems))
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            # DecoderConfig raises all its problems together; the others are Lightning's, on devices and strategies
            raise UserError(" ".join(str(error).split())) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's Trainer with the strategy that the config names."""
        given = self._get(self.config_init, "trainer")
        strategy: StrategySettings = self._get(self.config_init, "strategy")
        devices = device_count(given["devices"]) * int(given["num_nodes"])
        clip = self._get(self.config_init, "model").gradient_clip
        half = "bf16" in str(given["precision"])
        ours = {"strategy": strategy.build(devices, clip, half), "plugins": [*(given["plugins"] or []), *plugins()]}
        return super().instantiate_trainer(**ours, **kwargs)

    def _identity(self) -> dict[str, Any]:
        data: TokenDataModule = self.datamodule
        data.open()
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
        if self._get(self.config_init, "trainer").log_every_n_steps < 1:
            problems.append("trainer.log_every_n_steps must be at least 1")
        if problems:
            raise UserError("; ".join(problems))
        self.datamodule.micro_batches(trainer.world_size)
        self.run_folder = RunFolder(self._get(self.config_init, "run"))
        self.signals = Signals()
        self.signals.install()
        opening = Opening(self.run_folder, self._open, self._get(self.config_init, "strategy").timeout)
        evaluation = self._get(self.config_init, "evaluation")
        self.evaluations = Evaluations(self.run_folder, evaluation) if evaluation.every else None
        trainer.callbacks += [opening, *callbacks(self.run_folder, self.signals, self.evaluations)]

    def _open(self) -> list[Logger]:
        """On rank zero: find where the run starts, open its folder and say so. Returns the loggers.

        Everything that can be refused is refused before the folder is touched.
        """
        trainer, data = self.trainer, self.datamodule
        run, resume = self._folder(), self._get(self.config_init, "resume")
        run.identity = self._identity()
        passed_over = run.find(resume)
        for sentence in passed_over:
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
        print(data.summary(trainer.max_steps), file=sys.stderr)
        if trainer.world_size > 1:
            print(data.division(trainer.world_size), file=sys.stderr)
        facts = {
            "seed": data.seed,
            "parameters": self.model.parameter_count,
            "flops_per_token": flops_per_token(self.model.decoder_config, data.context),
            "store": data.named,
            "store_fingerprint": run.identity["store_fingerprint"],
        }
        loggers = run.open(self._config_yaml(), facts, data.tokenizer, list(data.epochs(0)), devices=trainer.world_size)
        for sentence in passed_over:
            run.event("checkpoint passed over", run.resumed.step if run.resumed else 0, why=sentence)
        if self.evaluations is not None:
            self.evaluations.begin(run.resumed.step if run.resumed else 0, trainer.max_steps)
        return loggers

    def _evaluate_rest(self, step: int) -> None:
        """Take up what the lives of a finished run have left to evaluate."""
        if self.evaluations is not None and any(self.evaluations.unfinished(step, step)):
            self._folder().hold()
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
            self._ended(f"{error}")
            raise self._on_rank_zero(UserError(self._explain(error))) from error
        except StoppedError as error:
            self._ended(error.name, self._where_it_stands())
            raise self._on_rank_zero(error) from None
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            if self.trainer.interrupted and self.run_folder is not None:
                self._ended("Ctrl-C", self._where_it_stands())
                raise self._on_rank_zero(KeyboardInterrupt()) from error
            raise
        except (RuntimeError, OSError) as error:
            if self.trainer.world_size > 1 and lost_contact(error):
                self._ended("lost contact to the other ranks")
                raise UserError(self._lost(error)) from error
            raise
        finally:
            try:
                if self.evaluations is not None:
                    self.evaluations.end()
            finally:  # also where Ctrl-C came once more
                end_children(self.trainer, patience=60.0 if sys.exc_info()[0] is None else 5.0)
                if self.signals is not None:
                    self.signals.restore()
                if self.run_folder is not None:
                    self.run_folder.release()

    def _ended(self, why: str, sentence: str = "") -> None:
        """On rank zero: note in the run's folder why this life ended, and say so."""
        if self.run_folder is None or not self.trainer.is_global_zero:
            return
        self.run_folder.event("stopped", self.trainer.global_step, why=why)
        if sentence:
            print(f"{why}: {sentence}", file=sys.stderr)

    def _on_rank_zero(self, error: BaseException) -> BaseException:
        """The error, which all ranks have; those but rank zero leave it to it to say so."""
        return error if self.trainer.is_global_zero else ToldElsewhereError(str(error))

    def _lost(self, error: BaseException) -> str:
        settings = self._get(self.config_init, "strategy")
        why = " ".join(str(error).split())
        return (
            f"rank {self.trainer.global_rank} lost contact to the other ranks at step {self.trainer.global_step}: one "
            f"has died, or hangs for longer than strategy.timeout {settings.timeout:g} s (its own log says which); "
            f"continue with --resume auto ({why[:300]})"
        )

    def _where_it_stands(self) -> str:
        run = self._folder()
        last = checkpoints.newest(run.path / "checkpoints", hashed=False)[0]
        kept = f"its newest checkpoint is of step {last.step}" if last else "it has no checkpoint yet"
        return (
            f"{run.path} stopped at step {self.trainer.global_step}; {kept}: go on with "
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


def main(command: str, arguments: list[str]) -> None:
    """Run `command` ("fit" or "validate").

    Raises:
        UserError: anything in the config or the data that cannot be used.
        StoppedError: a signal stopped the run, whose state is saved.
    """
    try:
        parse([command, *arguments])
    except ToldElsewhereError as error:
        raise SystemExit(0) from error  # any other status would have this rank's watchers end rank zero in mid-sentence


def parse(arguments: list[str], run: bool = True) -> CLI:
    """The CLI object of `arguments`; with `run` False the classes are made from the config and nothing is run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    return CLI(
        LanguageModule,
        TokenDataModule,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_class=Parser,
        seed_everything_default=0,
        trainer_defaults=TRAINER_DEFAULTS,
        parser_kwargs=EXAMPLES | {"prog": "python -m llm"} if run else {},
        args=arguments,
        run=run,
    )
