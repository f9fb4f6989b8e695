"""`python -m llm fit` and `validate`: one YAML, dotted overrides, unknown keys refused.

A config has seven parts: `decoder` (DecoderConfig), `model` (LanguageModule: optimizer, schedule ...), `data`
(TokenDataModule), `trainer` (Lightning's Trainer), `strategy` (StrategySettings: how it is spread over devices), `run`
(RunSettings) and `evaluation` (EvaluationSettings: what is asked of the model in the background); and
`seed_everything`, from which initial weights, the order of the data and the dropout follow (`initializer_seed`, where
given, names the initial weights alone).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings
from jsonargparse._common import parsing_settings
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
from .evaluation import EvaluationSettings
from .module import LanguageModule
from .ranks import ReportedOnRankZeroError
from .run_folder import RunSettings
from .strategy import StrategySettings, device_count, plugins

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
    "max_time": "send SIGUSR1 before a time limit, as slurm/launch.sh does: the run saves and can be resumed",
    "fast_dev_run": "give a small trainer.max_steps and another run.folder",
    "reload_dataloaders_every_n_epochs": "a run reads its data once through",
    "min_epochs": "give trainer.max_steps, at which a run ends",
    "min_steps": "give trainer.max_steps, at which a run ends",
    "limit_test_batches": "a run does not test: see python -m evals",
    "limit_predict_batches": "a run does not predict: see python -m llm generate",
    "gradient_clip_algorithm": "model.gradient_clip clips by the norm",
    "enable_progress_bar": "a run has a bar of its own",
    "enable_model_summary": "see python -m llm plan",
    "use_distributed_sampler": "the batches of a step are the same for any number of devices",
    "default_root_dir": "give run.folder",
    "sync_batchnorm": "the decoder has no batch norm",
    "barebones": "leave what is not needed out of run.loggers",
    "enable_autolog_hparams": "config.yaml in the run folder has all settings",
    "model_registry": "see python -m llm export",
}
# What it is told, and follows.
FOLLOWED = {
    "accelerator", "devices", "num_nodes", "precision", "max_steps", "log_every_n_steps", "callbacks", "plugins",
    "deterministic", "benchmark", "detect_anomaly", "profiler", "inference_mode", "limit_val_batches",
}  # fmt: skip
# Packages whose classes and functions a config may name under trainer (callbacks, plugins, profiler, ...): naming one
# is enough to have it called, so that any other takes --allow-class-path.
CALLABLE = ("lightning", "llm")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "32", 32, None)
EXAMPLES = {
    "fit": {"epilog": "example: python -m llm fit --config configs/stories_values.yaml --trainer.max_steps 100"},
    "validate": {"epilog": "example: python -m llm validate --config runs/stories/values/config.yaml"},
}


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence, with the nearest key that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        if denied := re.search(r"Importing '([\w.]+)' is not allowed", text):
            raise UserError(
                f"{denied[1]} is neither of Lightning nor of this project: read it, then pass --allow-class-path if "
                "you trust this config"
            )
        unknown = re.search(r"option '([\w.]+)'|Key '([\w.]+)' is not|unrecognized arguments: --([\w.]+)", text)
        if unknown:
            key = next(filter(None, unknown.groups()))
            known = [action.dest for action in self._actions]
            near = difflib.get_close_matches(key, known, n=1)
            text = f"unknown config key {key}" + (
                f": did you mean {near[0]}?" if near else ": see --help for the known"
            )
        raise UserError(text)


class CLI(Attempt):
    """LightningCLI with the decoder and the run beside Lightning's own parts."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        left_out = {"model", "datamodule", "ckpt_path", "weights_only"}  # see --resume, which unpickles nothing
        return {"fit": left_out, "validate": left_out}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        of_transformers = {field.name for field in dataclasses.fields(PretrainedConfig)}
        parser.add_class_arguments(DecoderConfig, "decoder", skip=of_transformers)
        parser.add_class_arguments(StrategySettings, "strategy")
        parser.add_class_arguments(RunSettings, "run")
        parser.add_class_arguments(EvaluationSettings, "evaluation")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="auto, or the path of a checkpoint or run to continue"
        )
        parser.add_argument(
            "--allow-class-path",
            action="store_true",
            help="let class_path name any class, not only Lightning's and ours; counts on the command line alone",
        )
        parser.link_arguments("decoder", "model.decoder", apply_on="instantiate")
        seed = "seed of the initial weights (default: seed_everything)"
        parser.add_argument("--initializer_seed", type=int | None, default=None, help=seed)
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target)
        seeds = ("seed_everything", "initializer_seed")
        parser.link_arguments(seeds, "decoder.initializer_seed", lambda seed, own: seed if own is None else own)

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


def with_new_names(arguments: list[str]) -> list[str]:
    """The arguments with today's names of options and of keys in config files; says which old ones it met."""
    found, met = [], []
    for before, word in zip(["", *arguments], arguments, strict=False):
        option, equals, value = word.partition("=")
        key = option.removeprefix("--").removesuffix("+")
        if option.startswith("--") and key in reading.RENAMED:
            met.append(key)
            word = f"--{reading.new_name(key)}{'+' * option.endswith('+')}{equals}{value}"
        elif before in ("--config", "-c") or option == "--config":
            path = value if option == "--config" else word
            if old_keys := _old_keys(path):
                met += old_keys if not (Path(path).parent / "run.json").is_file() else []  # an older run's own
                text = yaml.safe_dump(reading.renamed(yaml.safe_load(Path(path).read_text())), sort_keys=False)
                word = f"--config={text}" if option == "--config" else text  # jsonargparse reads content too
        found.append(word)
    first_rank = os.environ.get("LOCAL_RANK", "0") == os.environ.get("SLURM_PROCID", "0") == "0"
    for old in dict.fromkeys(met) if first_rank else ():
        new = reading.new_name(old)
        print(f"note: {old} is now called {new}; the old name works until version 0.3", file=sys.stderr)
    return found


def _old_keys(path: str) -> list[str]:
    """The old names in a config file that are set there; none where it cannot be read: the parser says so."""
    try:
        config = dict(reading.flat(yaml.safe_load(Path(path).read_text())))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []
    return [old for old in reading.RENAMED if old in config or any(key.startswith(f"{old}.") for key in config)]


def main(command: str, arguments: list[str]) -> None:
    """Run `command` ("fit" or "validate").

    Raises:
        UserError: anything in the config or the data that cannot be used.
        StoppedError: a signal stopped the run, whose state is saved.
    """
    try:
        parse([command, *arguments])
    except ReportedOnRankZeroError as error:
        raise SystemExit(0) from error  # any other status would have this rank's watchers end rank zero in mid-sentence


def parse(arguments: list[str], run: bool = True) -> CLI:
    """The CLI object of `arguments`; with `run` False the classes are made from the config and nothing is run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    with _class_paths(any_path="--allow-class-path" in arguments):
        return CLI(
            LanguageModule,
            TokenDataModule,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_class=Parser,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs=EXAMPLES | {"prog": "python -m llm"} if run else {},
            args=with_new_names(arguments),
            run=run,
        )


@contextmanager
def _class_paths(any_path: bool) -> Iterator[None]:
    """Have jsonargparse import what a config names from `CALLABLE` alone, or from anywhere."""
    before = dict(parsing_settings)
    if not any_path:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(CALLABLE))
    try:
        yield
    finally:
        parsing_settings.update(before)
