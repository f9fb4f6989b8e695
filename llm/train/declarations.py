"""The keys of a config, read from the source of the classes that declare them, so that torch is not imported.

LightningCLI makes its parser from live classes, whose imports take six seconds of a CPU. What it asks those classes for
(names, types, defaults, descriptions) also stands in their source. `tests/train/test_options.py` compares the two.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import inspect
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse.typing import register_type

LLM = Path(__file__).parents[1]
REQUIRED = dataclasses.MISSING
MODEL, DATA = "LanguageModule", "TokenDataModule"
DECODER = ("model/config.py", "DecoderConfig")
# part of a config -> file and class that declare it
PARTS = {
    "decoder": DECODER,
    "model": ("train/module.py", MODEL),
    "data": ("data/module.py", DATA),
    "trainer": ("", "Trainer"),
    "strategy": ("train/strategy.py", "StrategySettings"),
    "run": ("train/run_folder.py", "RunSettings"),
    "evaluation": ("train/evaluation.py", "EvaluationSettings"),
}
# key -> file and name of the tuple or dict of the names that it may have; then of those it had in earlier versions
CHOICES: dict[str, tuple[tuple[str, str], ...]] = {
    "decoder.norm": (("model/norms.py", "NORMS"),),
    "decoder.position": (("model/config.py", "POSITIONS"),),
    "decoder.feedforward": (("model/feedforward.py", "FEEDFORWARDS"),),
    "decoder.hidden_act": (("model/activations.py", "NAMES"),),
    "decoder.stream": (("model/streams.py", "STREAMS"),),
    "decoder.stream_source": (("model/streams.py", "SOURCES"),),
    "decoder.stream_weight": (("model/streams.py", "WEIGHTS"),),
    "decoder.value_embedding": (("model/value_embeddings.py", "PLACES"),),
    "decoder.residual": (("model/residual.py", "FORMS"),),
    "decoder.parametrization": (("model/parametrization.py", "PARAMETRIZATIONS"),),
    "model.optimizer.name": (("train/optim.py", "OPTIMIZERS"),),
    "model.schedule.shape": (("train/optim.py", "SHAPES"),),
    "model.attention": (("train/attention.py", "NAMES"),),
    "model.disable_fast_paths": (("model/fast_paths.py", "FAST_PATHS"),),
    "data.packing": (("data/rows.py", "PACKING"), ("data/rows.py", "KINDS")),
    "strategy.name": (("train/strategy.py", "NAMES"),),
    "strategy.communication_dtype": (("train/strategy.py", "DTYPES"),),
    "run.on_full_disk": (("train/run_folder.py", "ON_FULL_DISK"),),
    "run.loggers": (("train/run_folder.py", "LOGGERS"),),
}
NESTED = {"Optimizer": ("train/optim.py", "Optimizer"), "Schedule": ("train/optim.py", "Schedule")}


class Unread:
    """The type of a value that is left as it is: jsonargparse would import the class that an Any names."""


register_type(Unread, lambda value: value, lambda value: value, type_check=lambda value, kind: True)


class Key(NamedTuple):
    """One key of a part: its type (Unread where the source alone does not tell it), default and description."""

    name: str
    type: Any
    default: Any
    text: str


@cache
def keys_of(part: str) -> tuple[Key, ...]:
    """The keys of a part of a config, in the order of their declaration.

    Raises:
        OSError, SyntaxError, LookupError: the source is not there, or not as expected.
    """
    file, name = PARTS[part]
    path = LLM / file if file else _lightning() / "pytorch/trainer/trainer.py"
    return tuple(_keys(path, name))


@cache
def nested_keys(name: str) -> tuple[Key, ...]:
    """The keys of `Optimizer` or `Schedule`, which are settings of `model`."""
    file, _ = NESTED[name]
    return tuple(_keys(LLM / file, name))


@cache
def nested(name: str) -> type:
    """A dataclass with these keys."""
    return as_dataclass(name, nested_keys(name))


def choices(key: str, earlier: bool = False) -> list[str]:
    """The names that a key may have; of a key with a list, the names that may be in it."""
    return [name for place in CHOICES[key][: 2 if earlier else 1] for name in names(*place)]


def names(file: str, constant: str) -> list[str]:
    """The strings in a tuple, or the keys of a dict, that a file of `llm` calls `constant`."""
    return list(_names(_tree(LLM / file), constant))


@cache
def _tree(path: Path) -> ast.Module:
    source = path.read_text(encoding="utf-8")
    try:
        return ast.parse(source)
    except SystemError as error:  # what CPython 3.11 makes of Ctrl-C in here
        raise KeyboardInterrupt from error


def _names(module: ast.Module, constant: str) -> Iterator[str]:
    """The strings in a tuple, or the keys of a dict, of a module; *OTHER is those of another constant."""
    for node in module.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if constant not in map(ast.unparse, targets):
            continue
        value: Any = getattr(node, "value", None)
        parts: list[Any] = value.keys if isinstance(value, ast.Dict) else value.elts
        for part in parts:
            if isinstance(part, ast.Starred):
                yield from _names(module, ast.unparse(part.value))
            else:
                yield ast.literal_eval(part)
        return
    raise LookupError(constant)


def as_dataclass(name: str, keys: tuple[Key, ...]) -> type:
    """A dataclass of these keys, from which jsonargparse makes the same options as from the class itself."""
    fields = [
        (key.name, key.type, _field(key.default)) for key in sorted(keys, key=lambda key: key.default != REQUIRED)
    ]
    made = dataclasses.make_dataclass(name, fields)
    made.__module__, made.__doc__ = __name__, ""  # jsonargparse imports a type again by its name
    return made


def __getattr__(name: str) -> type:
    if name in NESTED:
        return nested(name)
    raise AttributeError(name)


def _field(default: Any) -> Any:
    if default is REQUIRED:
        return dataclasses.field()
    if default.__hash__ is None:  # a list, or settings of its own
        return dataclasses.field(default_factory=lambda: copy.copy(default))
    return dataclasses.field(default=default)


def _lightning() -> Path:
    found = importlib.util.find_spec("lightning")
    if found is None or not found.submodule_search_locations:
        raise LookupError("lightning is not installed")
    return Path(found.submodule_search_locations[0])


def _class(path: Path, name: str) -> ast.ClassDef:
    """A class that a module defines, or imports from a module beside it."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in [each.name for each in node.names]:
            return _class(path.with_name(f"{node.module}.py"), name)
    raise LookupError(f"{path} has no class {name}")


def _keys(path: Path, name: str) -> Iterator[Key]:
    """The fields of a class, or the arguments of its constructor."""
    source = _class(path, name)
    constructor = next((n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    text = descriptions(ast.get_docstring(source) or "")
    if constructor is None:
        for node in source.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                key = node.target.id
                yield Key(key, _type(node.annotation), _value(node.value), text.get(key, ""))
            elif ast.unparse(node) == "vars().update(FIELDS)":  # the parameters of activations
                yield from (Key(key, type(value), value, text.get(key, "")) for key, value in _activation_fields())
        return
    text |= descriptions(ast.get_docstring(constructor) or "")
    given = constructor.args
    arguments = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(arguments) - len(given.defaults)) + list(given.defaults)
    pairs = [*zip(arguments, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    for argument, default in pairs:
        if argument.arg != "self":
            yield Key(argument.arg, _type(argument.annotation), _value(default), text.get(argument.arg, ""))


def _activation_fields() -> Iterator[tuple[str, Any]]:
    """ACTIVATION_NAME and default of each parameter of an activation (`PARAMETRIC` in `activations.py`)."""
    path = LLM / "model/activations.py"
    for node in _tree(path).body:
        if not (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PARAMETRIC"):
            continue
        if not isinstance(node.value, ast.Dict):
            raise LookupError("PARAMETRIC is not written as a dict")
        for key, kind in zip(node.value.keys, node.value.values, strict=True):
            (defaults,) = (
                part.value
                for part in _class(path, ast.unparse(kind)).body
                if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == "defaults"
            )
            for name, value in _value(defaults).items():
                yield f"{_value(key)}_{name}", value


def _type(annotation: ast.expr | None) -> Any:
    """The type that an annotation names; Unread where it names a class whose module would have to be imported."""
    if annotation is None:
        return Unread
    names = {name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")}
    names |= {name: nested(name) for name in NESTED if name in ast.unparse(annotation)}
    try:
        return eval(compile(ast.Expression(annotation), "annotation", "eval"), names)
    except (NameError, TypeError):
        return Unread


def _value(node: ast.expr | None) -> Any:
    """The default that an expression gives."""
    if node is None:
        return REQUIRED
    try:
        return ast.literal_eval(node)
    except ValueError:  # field(default_factory=list), or =lambda: [...]
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "field"):
            raise
    (factory,) = (word.value for word in node.keywords if word.arg == "default_factory")
    empty: dict[str, Any] = {"list": [], "dict": {}}
    return ast.literal_eval(factory.body) if isinstance(factory, ast.Lambda) else empty[ast.unparse(factory)]


def descriptions(docstring: str) -> dict[str, str]:
    """name -> text of the entries of a docstring: `name: text`, `name (type): text` or `name, name: text`."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", inspect.cleandoc(docstring)):
        if match := re.match(r"    (\w+(?:, \w+)*)(?: \(\w+\))?:\s+(.*)", entry, re.S):
            text = " ".join(re.split(r"\n(?=\S)", match[2])[0].split())
            found |= dict.fromkeys(match[1].split(", "), text)
    return found
