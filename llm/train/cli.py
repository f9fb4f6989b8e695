"""`python -m llm fit` and `validate`: one YAML, dotted overrides, unknown keys refused.

A config has seven parts: `decoder` (DecoderConfig), `model` (LanguageModule: optimizer, schedule ...), `data`
(TokenDataModule), `trainer` (Lightning's Trainer), `strategy` (StrategySettings: how it is spread over devices), `run`
(RunSettings) and `evaluation` (EvaluationSettings: what is asked of the model in the background); and
`seed_everything`, from which initial weights, the order of the data and the dropout follow (`initializer_seed`, where
given, names the initial weights alone).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.configuration_utils import PretrainedConfig

from ..common.devices import missing_gpus
from ..common.errors import UserError
from ..common.processes import PARENT
from ..data.module import TokenDataModule
from ..model import DecoderConfig
from ..runs import reading
from .attempt import Attempt
from .config_files import asks_for, with_new_names, with_value
from .evaluation import EvaluationSettings
from .module import LanguageModule
from .options import (
    ANY_PATH,
    AUTO,
    OTHERS,
    TRAINER_DEFAULTS,
    Sentences,
    class_paths,
    given_options,
    seed_problems,
    trainer_problems,
)
from .precision import choose
from .ranks import ReportedOnRankZeroError
from .run_folder import RunSettings
from .strategy import StrategySettings, device_count, plugins


class Parser(Sentences, LightningArgumentParser):
    """The parser of the classes themselves."""


class CLI(Attempt):
    """LightningCLI with the decoder and the run beside Lightning's own parts."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        left_out = {"model", "datamodule", "ckpt_path", "weights_only"}  # see --resume, which unpickles nothing
        left_out |= {"train_dataloaders", "val_dataloaders", "dataloaders", "verbose"}  # see `data`
        return {"fit": left_out, "validate": left_out}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        of_transformers = {field.name for field in dataclasses.fields(PretrainedConfig)}
        parser.add_class_arguments(DecoderConfig, "decoder", skip=of_transformers)
        parser.add_class_arguments(StrategySettings, "strategy")
        parser.add_class_arguments(RunSettings, "run")
        parser.add_class_arguments(EvaluationSettings, "evaluation")
        for name in ("initializer_seed", "init", "resume"):
            kind, default, text = OTHERS[name]
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        parser.add_argument("--allow-class-path", action="store_true", help=ANY_PATH)
        parser.link_arguments("decoder", "model.decoder", apply_on="instantiate")
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target)
        seeds = ("seed_everything", "initializer_seed")
        parser.link_arguments(seeds, "decoder.initializer_seed", lambda seed, own: seed if own is None else own)

    def _set_seed(self) -> None:
        if problems := seed_problems(self.config.get(self.subcommand or "", self.config)):
            raise UserError("; ".join(problems))
        super()._set_seed()

    def instantiate_classes(self) -> None:
        given = self.config.get(self.subcommand or "", self.config)
        problems = trainer_problems(given)
        strategy = StrategySettings(**vars(given["strategy"]))
        problems += strategy.problems(str(given["trainer.precision"]), bool(given["model.compile"]))
        problems += EvaluationSettings(**vars(given["evaluation"])).problems(given["run.checkpoint_every"])
        if problems:
            raise UserError("; ".join(problems))
        try:
            if given["trainer.accelerator"] in ("gpu", "cuda"):
                devices = given["trainer.devices"]
                needed = max(devices) + 1 if isinstance(devices, list) else device_count(devices)
                if problem := missing_gpus(needed):
                    raise UserError(problem)
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
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[PARENT] = str(os.getpid())  # for the ranks that Lightning starts
        ours = {"strategy": strategy.build(devices, clip, half), "plugins": [*(given["plugins"] or []), *plugins()]}
        return super().instantiate_trainer(**ours, **kwargs)


def main(command: str, arguments: list[str]) -> None:
    """Run `command` ("fit" or "validate").

    Raises:
        UserError: anything in the config or the data that cannot be used.
        StoppedError: a signal stopped the run, whose state is saved.
    """
    if command == "fit":
        arguments = with_precision(arguments)
    try:
        parse([command, *arguments])
    except ReportedOnRankZeroError as error:
        raise SystemExit(0) from error  # any other status would have this rank's watchers end rank zero in mid-sentence


def with_precision(arguments: list[str]) -> list[str]:
    """The arguments of `fit` with a precision in place of `trainer.precision: auto`: the run's own, or a measured one.

    Raises:
        UserError: there are several devices, which might decide differently.
    """
    if not asks_for(arguments, "trainer", "precision", AUTO):
        return arguments
    given = given_options("fit", arguments)
    if given["trainer.precision"] != AUTO:
        precision = given["trainer.precision"]
        return with_value(arguments, "trainer", "precision", AUTO, precision)
    if device_count(given["trainer.devices"]) * given["trainer.num_nodes"] != 1:
        raise UserError("trainer.precision auto is for one device: give bf16-mixed or 32-true")
    before = Path(given["run.folder"]) / "config.yaml"
    if before.is_file():
        precision = reading.config(before.parent).get("trainer", {}).get("precision")
    else:
        sizes = {name: given[f"decoder.{name}"] for name in ("hidden_size", "intermediate_size", "feedforward")}
        on_gpu = given["trainer.accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        rows = given["data.micro_batch_size"] or given["data.batch_size"]
        precision = choose(DecoderConfig(**sizes), rows * given["data.context"], on_gpu)
    print(f"trainer.precision auto: {precision}", file=sys.stderr)
    return [*with_value(arguments, "trainer", "precision", AUTO, precision), f"--trainer.precision={precision}"]


def parse(arguments: list[str], run: bool = True) -> CLI:
    """The CLI object of `arguments`; with `run` False the classes are made from the config and nothing is run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    with class_paths(any_path="--allow-class-path" in arguments):
        return CLI(
            LanguageModule,
            TokenDataModule,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_class=Parser,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"prog": "python -m llm"} if run else {},
            args=with_new_names(arguments),
            run=run,
        )
