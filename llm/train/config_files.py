"""Config files among the arguments of `fit`: which they are, what is in them, and other keys or values in their place.

Imports no torch.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UserError
from ..runs import reading


def config_paths(arguments: list[str]) -> list[str]:
    """The values of --config that are paths: a text with a line or a key in it is a config itself."""
    pairs = zip(["", *arguments], arguments, strict=False)
    values = [word.partition("=")[2] if "=" in word else "" for word in arguments if word.startswith("--config=")]
    values += [word for before, word in pairs if before in ("--config", "-c")]
    return [value for value in values if not re.search(r"\n|:\s|^\s*[{\[]", value)]


def read_config(path: str) -> dict[str, Any]:
    """The content of a config file.

    Raises:
        UserError: it is not there, or not a mapping in YAML.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"--config {path} {why}: give the YAML of a run, such as those in configs/") from error
    except (ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"--config {path} is not YAML ({why}): correct it there") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no keys: give the YAML of a run, such as those in configs/")
    return content


def with_new_names(arguments: list[str], quietly: bool = False) -> list[str]:
    """The arguments with today's names of options and of keys in config files; says, unless `quietly`, which it met."""
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
    for old in dict.fromkeys(met) if first_rank and not quietly else ():
        new = reading.new_name(old)
        print(f"note: {old} is now called {new}; the old name works until version 0.3", file=sys.stderr)
    return found


def asks_for(arguments: list[str], part: str, key: str, value: Any) -> bool:
    """Whether an option or a config file among the arguments gives a key this value, overridden or not."""
    option = f"--{part}.{key}"
    words = any(word == f"{option}={value}" for word in arguments)
    words |= any(pair == (option, value) for pair in itertools.pairwise(arguments))
    return words or with_value(arguments, part, key, value, None) != arguments


def with_value(arguments: list[str], part: str, key: str, old: Any, new: Any) -> list[str]:
    """The arguments with another value of a key in config files and texts that have `old` there."""
    found = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        option, equals, value = word.partition("=")
        path = word if before in ("--config", "-c") else value if option == "--config" and value else None
        if path is not None:
            config = yaml.safe_load(Path(path).read_text() if path in config_paths(["--config", path]) else path)
            section = config.get(part)
            if isinstance(section, dict) and section.get(key) == old:
                section[key] = new
                word = f"{option}{equals}" * (path is value) + yaml.safe_dump(config, sort_keys=False)
        found.append(word)
    return found


def _old_keys(path: str) -> list[str]:
    """The old names in a config file that are set there; none where it cannot be read: the parser says so."""
    try:
        config = dict(reading.flat(yaml.safe_load(Path(path).read_text())))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []
    return [old for old in reading.RENAMED if old in config or any(key.startswith(f"{old}.") for key in config)]
