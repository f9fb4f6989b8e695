"""The options of `fit` and `validate`, without torch: --help, and what the words and the config alone rule out.

Stages: keys of a config (`declarations.py`) -> a parser of them, of the library that LightningCLI parses with -> help,
or one sentence on what is wrong. What passes is parsed again in `cli.py`, with the classes themselves.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse._common import parsing_settings

from ..common.errors import UserError
from ..common.limits import BELOW_ONE, at_least, config_problems
from ..data.contradictions import of_rows, of_weights
from ..model.contradictions import contradictions, fill_sizes
from .config_files import config_paths, read_config, with_new_names
from .contradictions import of_context, of_interval, of_schedule, of_strategy
from .declarations import CHOICES, NESTED, Key, Unread, as_dataclass, choices, keys_of, names, nested, nested_keys

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
# What it is told, and follows, with the text of --help.
FOLLOWED = {
    "accelerator": "kind of device: cpu, gpu, or auto",
    "devices": "devices of a node: a number, a list of indices, or auto for all",
    "num_nodes": "nodes",
    "precision": "32-true (default); bf16-mixed: products in bfloat16, master weights in float32; bf16-true; or auto: "
    "on one device, whichever of the first two is faster, measured for a new run and kept by it",
    "max_steps": "optimizer steps of the run; has to be given",
    "log_every_n_steps": "optimizer steps between rows of metrics",
    "limit_val_batches": "batches of a validation, or a fraction of them (default: all)",
    "deterministic": "true or warn: deterministic algorithms alone",
    "benchmark": "let cuDNN choose its algorithms by timing them",
    "inference_mode": "validate in torch's inference mode instead of no_grad",
    "detect_anomaly": "trace the operation that made a NaN; slow",
    "profiler": "profiler of Lightning, by name or class_path",
    "callbacks": "further callbacks of Lightning, by class_path",
    "plugins": "further plugins of Lightning, by class_path",
}
# Packages whose classes and functions a config may name under trainer (callbacks, plugins, profiler, ...): naming one
# is enough to have it called, so that any other takes --allow-class-path.
CALLABLE = ("lightning", "llm")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "32", 32, None)
AUTO = "auto"  # of fit alone, see `precision.py`

EXAMPLES = {
    "fit": "python -m llm fit --config configs/stories_values.yaml --trainer.max_steps 100",
    "validate": "python -m llm validate --config runs/stories/values/config.yaml",
}
SUMMARIES = {
    "decoder": "sizes and switches of the model",
    "model": "how it is trained: optimizer, schedule, attention, compilation",
    "data": "token store, batches, validation",
    "trainer": "devices, precision, steps",
    "strategy": "how a run is spread over devices",
    "run": "run folder, checkpoints, logs",
    "evaluation": "evaluation in the background of training",
}
# Keys that follow from others: a config has them from neither hand nor run.
LINKED = {"model": {"decoder", "seed"}, "data": {"seed"}, "decoder": {"initializer_seed"}}
# name -> type, default and description of the options outside the parts
OTHERS: dict[str, tuple[Any, Any, str]] = {
    "seed_everything": (bool | int, 0, "seed of initial weights, order of the data and dropout"),
    "initializer_seed": (int | None, None, "seed of the initial weights (default: seed_everything)"),
    "init": (str | None, None, "published model, or export, whose weights the run starts from: a folder or a hub name"),
    "resume": (str | None, None, "auto, or the path of a checkpoint or run to continue"),
}
_OF_CLASSES = tuple(f"--trainer.{name}" for name in ("accelerator.", "callbacks", "plugins", "profiler"))
# jsonargparse's words for a key that there is not; the last is ours, of an error within settings of settings
UNKNOWN = r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'|Key '([\w.]+)' is not|unknown config key (\w+)"
ANY_PATH = "let class_path name any class, not only Lightning's and ours; only accepted on the command line"


class Sentences:
    """Of a parser of jsonargparse: errors as one sentence, with the nearest key that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError."""
        raise UserError(sentence(message, [action.dest for action in self._actions]))


class LightParser(Sentences, ArgumentParser):
    """A parser of options whose classes are not imported."""


def sentence(message: str, known: list[str]) -> str:
    """What jsonargparse says, in one sentence; of an unknown key, the nearest of those that are known."""
    text = " ".join(str(message).split())
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", text):
        return (
            f"{denied[1]} is neither of Lightning nor of this project: read it, then pass --allow-class-path if "
            "you trust this config"
        )
    if denied := re.search(r"unrecognized arguments: (?!--)(.*)", text):
        return f"{denied[1]} belongs to no option: write --KEY VALUE"
    group = "".join(f"{name}." for name in re.findall(r"(?:Group '|Parser key [\"'])([\w.]+)", text))
    if unknown := re.search(UNKNOWN, text):
        key = unknown[1] or f"{group}{next(filter(None, unknown.groups()))}"
        near = difflib.get_close_matches(key, [*known, *_nested_dests()], n=1)
        return f"unknown config key {key}" + (f": did you mean {near[0]}?" if near else ": see --help for the known")
    key = group.removesuffix(".")
    types = {f"{part}.{each.name}": each.type for part in SUMMARIES for each in keys_of(part)}
    types |= {dest: each.type for dest, each in _nested_dests().items()}
    types |= {name: kind for name, (kind, _, _) in OTHERS.items()}
    if types.get(key, Unread) is not Unread and (
        value := re.search(r"(?:Got value|Given value): (.*?)(?: - |$)", text)
    ):
        value_text = re.sub(r"NestedArg\(key='\w+', val=(.*)\)$", r"\1", value[1])
        value_text = textwrap.shorten(value_text, 100, placeholder=" ...")
        return f"{key} {value_text} is of the wrong type: give {type_words(types[key])}"
    return text


def _nested_dests() -> dict[str, Key]:
    """model.optimizer.lr ... -> its key."""
    return {f"model.{name.lower()}.{key.name}": key for name in NESTED for key in nested_keys(name)}


def type_words(kind: Any) -> str:
    """A type as a reader of YAML names it."""
    if kind in (int, float, str, bool, type(None)):
        words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
        return words[kind]
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(type_words, get_args(kind)))
    return {"list": "a list, [a, b]", "tuple": "a list, [a, b]", "dict": "a mapping, {a: b}"}.get(
        getattr(get_origin(kind), "__name__", ""), "its own keys"
    )


def checked(command: str, arguments: list[str]) -> list[str]:
    """The arguments of `command` ("fit" or "validate") with today's names; --help is printed, and ends the process.

    Raises:
        UserError: something in them, or in the config, that cannot be used.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print_help(command)
        raise SystemExit(0)
    arguments = with_new_names(arguments)
    check(command, arguments)
    return arguments


def check(command: str, arguments: list[str]) -> None:
    """Refuse what can be refused without torch: a file, a key, a type, a name, a number out of its limit.

    Raises:
        UserError: naming the key, and what it may be.
    """
    for path in config_paths(arguments):
        read_config(path)
    if any(word.startswith(("--print_config", *_OF_CLASSES)) for word in arguments):
        return  # options that only classes have
    with class_paths(any_path="--allow-class-path" in arguments):
        given = parser_of(command).parse_args(arguments)
    if problems := problems_of(given):
        raise UserError("; ".join(problems))


def problems_of(given: Namespace) -> list[str]:
    """Values that cannot be, each a sentence."""
    names_and_seeds = [*seed_problems(given), *trainer_problems(given), *_name_problems(given)]
    single = [*names_and_seeds, *config_problems("", given.get), *_decoder_problems(given)]
    return single or _contradictions(given)


def seed_problems(given: Namespace) -> list[str]:
    """Seeds that numpy does not take; true is Lightning's word for any seed, which nobody could repeat."""
    seed = given["seed_everything"]
    good = not isinstance(seed, bool) and 0 <= seed < 2**32
    return [] if good else [f"seed_everything {seed} must be a number from 0 to {2**32 - 1}"]


def trainer_problems(given: Namespace) -> list[str]:
    """What of `trainer` this project decides elsewhere or cannot do, each a sentence."""
    defaults = {key.name: key.default for key in keys_of("trainer")}
    problems = [
        f"trainer.{key} is not read here: {ours}"
        for key, ours in OURS.items()
        if given.get(f"trainer.{key}") not in (None, defaults[key], TRAINER_DEFAULTS.get(key))
    ]
    devices = str(given["trainer.devices"])
    if not (isinstance(given["trainer.devices"], list) or re.fullmatch(r"auto|-1|0*[1-9]\d*", devices)):
        problems.append(f"trainer.devices {devices} must be a number of devices, a list of their indices, or auto")
    if given["trainer.precision"] not in (*PRECISIONS, AUTO):
        known = ", ".join(name for name in PRECISIONS if isinstance(name, str))
        problems.append(f"trainer.precision must be one of {known}")
    return problems


def _name_problems(given: Namespace) -> list[str]:
    """Names of parts that do not exist, each a sentence."""
    problems = []
    for key in CHOICES:
        value = given.get(key)
        given_names, known = value if isinstance(value, list) else [value], choices(key)
        given_names = [each for each in given_names if not isinstance(each, dict)]  # a class of loggers
        unknown = [each for each in given_names if each not in choices(key, earlier=True)]
        if value is not None and unknown:
            shown = unknown if isinstance(value, list) else repr(value)
            some = "any" if isinstance(value, list) else "one"
            fix = " or ".join(known) if len(known) == 2 else f"{some} of {', '.join(known)}"
            problems.append(f"{key} {shown} is unknown: give {fix}")
    return problems


def _decoder_problems(given: Namespace) -> list[str]:
    """Sizes and probabilities of the model that cannot be, each a sentence."""
    problems = []
    for constant, limit in (("SIZES", at_least(1)), ("PROBABILITIES", BELOW_ONE)):
        values = {key: given.get(key) for key in (f"decoder.{name}" for name in names("model/config.py", constant))}
        problems += [f"{k} {v} must be {limit.text}" for k, v in values.items() if v is not None and not limit.holds(v)]
    return problems


def _contradictions(given: Namespace) -> list[str]:
    """Settings that cannot be together, a sentence each."""
    decoder, data, run = given["decoder"].clone(), given["data"], given["run"]
    fill_sizes(decoder)
    schedule, max_steps = given["model.schedule"], given["trainer.max_steps"]
    precision, compiled = str(given["trainer.precision"]), bool(given["model.compile"])
    problems = [
        *contradictions(decoder, names("model/streams.py", "DENSE"), names("model/residual.py", "CONNECTIONS")),
        *of_context(data.context, decoder.position, decoder.max_position_embeddings),
        *of_rows(data.packing, data.mask_documents),
        *of_weights(data.store),
        *of_strategy(given["strategy"], precision, compiled, names("train/strategy.py", "SHARDED")),
        *of_interval("run.keep_every", run.keep_every, run.checkpoint_every),
        *of_interval("evaluation.every", given["evaluation.every"], run.checkpoint_every),
    ]
    if schedule and max_steps >= 1:  # `plan` and `bench` read configs without either
        problems += of_schedule(schedule, max_steps, names("train/optim.py", "DECAYS"))
    return problems


def given_options(command: str, arguments: list[str]) -> Namespace:
    """The options of arguments that `check` has let pass, without those that only classes have."""
    pairs = zip(["", *arguments], arguments, strict=False)
    left_out = [w.startswith(_OF_CLASSES) or (b.startswith(_OF_CLASSES) and "=" not in b) for b, w in pairs]
    with class_paths(any_path=True):
        return parser_of(command).parse_args([w for w, out in zip(arguments, left_out, strict=True) if not out])


# ---- Parser and help -------------------------------------------------------------------------------------------------


def parser_of(command: str, for_help: bool = False) -> LightParser:
    """The parser of a command; for its help without what is not followed, and with settings of settings one by one."""
    parser = LightParser(prog=f"python -m llm {command}", epilog=f"example: {EXAMPLES[command]}")
    parser.usage = f"python -m llm {command} --config FILE [--resume auto] [--PART.KEY VALUE ...]"
    parser.add_argument(
        "-c",
        "--config",
        action="config",
        help="YAML of a run; may be repeated: later files override earlier ones key by key",
    )
    for part, summary in SUMMARIES.items():
        keys = [_declared(part, key, for_help) for key in keys_of(part) if not (for_help and key.name in _hidden(part))]
        parser.add_class_arguments(as_dataclass(part, tuple(keys)), part)
        texts = {f"{part}.{key.name}": key.text for key in keys}
        texts |= {dest: key.text for dest, key in _nested_dests().items()}
        for action in parser._actions:
            if action.dest in texts:
                names = f"names: {', '.join(choices(action.dest))}" if for_help and action.dest in CHOICES else ""
                action.help = " ".join(filter(None, (texts[action.dest], names)))
            elif action.dest == part:
                action.help = argparse.SUPPRESS
        groups = parser.groups or {}
        groups[part].title = f"{part}: {summary}"
    for name in NESTED if for_help else ():
        groups[f"model.{name.lower()}"].title = f"model.{name.lower()}: keys of its own"
    for name, (kind, default, text) in OTHERS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--allow-class-path", action="store_true", help=ANY_PATH)
    return parser


def _hidden(part: str) -> set[str]:
    """Keys that help leaves out: those that follow from others, and those of the trainer that are not followed."""
    return LINKED.get(part, set()) | (set(OURS) if part == "trainer" else set())


def _declared(part: str, key: Key, for_help: bool) -> Key:
    """A key as the parser declares it."""
    if part == "trainer":
        default = TRAINER_DEFAULTS.get(key.name, key.default)
        return key._replace(default=default, text=FOLLOWED.get(key.name, key.text))
    if key.name in LINKED.get(part, ()):
        return key._replace(type=Unread, default=None)
    name = next((name for name in NESTED if part == "model" and key.name == name.lower()), None)
    return key._replace(type=nested(name), default=nested(name)()) if for_help and name else key


def print_help(command: str) -> None:
    """Print the options of a command, with the keys that are followed."""
    text = parser_of(command, for_help=True).format_help()
    print(re.sub(r"type:\s+(<class\s+'Unread'>|Optional\[Unread\]),\s+", "", text), end="")


@contextmanager
def class_paths(any_path: bool) -> Iterator[None]:
    """Have jsonargparse import what a config names from `CALLABLE` alone, or from anywhere."""
    before = dict(parsing_settings)
    if not any_path:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(CALLABLE))
    try:
        yield
    finally:
        parsing_settings.update(before)
