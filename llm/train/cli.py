"""`python -m llm fit` and `validate`: one YAML, dotted overrides, unknown keys refused.

A config has five parts: `decoder` (DecoderConfig), `model` (LanguageModule: optimizer, schedule ...), `data`
(TokenDataModule), `trainer` (Lightning's Trainer) and `run` (RunSettings); and `seed_everything`, from which the
initial weights, the order of the data and the dropout follow.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import sys
import warnings
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers.configuration_utils import PretrainedConfig

from ..data.module import TokenDataModule
from ..data.store import check_vocabulary
from ..errors import UserError
from ..model import DecoderConfig
from . import checkpoint as checkpoints
from .callbacks import ValidationBar, callbacks
from .module import LanguageModule
from .run import RunFolder, RunSettings

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
}
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

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "datamodule"}, "validate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        of_transformers = {field.name for field in dataclasses.fields(PretrainedConfig)}
        parser.add_class_arguments(DecoderConfig, "decoder", skip=of_transformers)
        parser.add_class_arguments(RunSettings, "run")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="auto, or the path of a checkpoint or run to continue"
        )
        parser.link_arguments("decoder", "model.decoder", apply_on="instantiate")
        for target in ("model.seed", "data.seed", "decoder.initializer_seed"):
            parser.link_arguments("seed_everything", target)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # DecoderConfig: every problem of the config in one message
            raise UserError(str(error)) from error

    def _run_folder(self) -> RunFolder:
        return RunFolder(self._get(self.config_init, "run"), self._identity())

    def _identity(self) -> dict[str, Any]:
        data: TokenDataModule = self.datamodule
        data.open()
        check_vocabulary(data.store, self.model.decoder_config.unpadded_vocab_size)
        decoder = self.model.decoder_config.to_diff_dict()
        decoder.pop("transformers_version", None)
        return {
            "store_fingerprint": data.store.fingerprint,
            "seed": data.seed,
            "batch_size": data.batch_size,
            "context": data.context,
            "rows": data.kind,
            "decoder": decoder,
        }

    def before_fit(self) -> None:
        """Everything that can be refused is refused before the run folder is touched."""
        trainer: Trainer = self.trainer
        try:
            self.model.schedule.check(trainer.max_steps)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.datamodule.micro_batches(trainer.world_size)
        run = self._run_folder()
        for sentence in run.find(self._get(self.config_init, "resume")):
            print(f"passed over: {sentence}", file=sys.stderr)
        if run.resumed is not None:
            print(f"continuing from {run.resumed.path}", file=sys.stderr)
        if run.resumed is not None and run.resumed.step >= trainer.max_steps:
            run.close(run.resumed.state)  # a kill may have come between the last checkpoint and the summary
            print(f"{run.path} is finished at step {run.resumed.step}: nothing to do", file=sys.stderr)
        trainer.callbacks += callbacks(run)
        facts = {
            "seed": self.datamodule.seed,
            "parameters": self.model.model.num_parameters(),
            "store": str(self.datamodule.store_path),
            "store_fingerprint": run.identity["store_fingerprint"],
        }
        trainer.loggers = run.open(self._config_yaml(), facts, self.datamodule.store.path / "tokenizer")

    def before_validate(self) -> None:
        run = self._run_folder()
        run.find(self._get(self.config_init, "resume") or "auto")
        if run.resumed is None:
            raise UserError(f"{run.path} holds no complete checkpoint: train it first with llm fit")
        checkpoints.restore(run.resumed, self.model.model)
        self.trainer.callbacks.append(ValidationBar())
        print(f"validating {run.resumed.path}", file=sys.stderr)

    def after_validate(self) -> None:
        print(f"validation loss {self.model.validation_loss:.4f}")

    def _config_yaml(self) -> str:
        config = self.config[self.subcommand].clone()
        config.pop("config", None)
        config.pop("resume", None)
        return self._parser(self.subcommand).dump(config, skip_link_targets=True, skip_none=False)


def main(command: str, arguments: list[str]) -> None:
    """Run `command` ("fit" or "validate").

    Raises:
        UserError: anything in the config or the data that cannot be used.
    """
    parse([command, *arguments])


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
