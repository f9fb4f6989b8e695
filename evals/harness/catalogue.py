"""Tasks by name: lm-eval's own tasks, groups and tags, YAML of the user's, texts and token stores, and `stories`.

names -> their YAML files -> groups and tags taken apart -> a `Definition` of each task, a reason for each not found

lm-eval parses all of its 14,000 YAML files to know what it has. Here the names are read off as text, and only the files
of the wanted tasks are parsed, by lm-eval's own loader. Nothing here reads a row.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from evals.harness.built_in import Rows, story_rows, text_rows
from evals.harness.suites import BUILT_IN, YAML
from llm.common.errors import UserError
from llm.common.files import first_line

OFFICIAL = Path(str(getattr(find_spec("lm_eval"), "origin", ""))).parent / "tasks"
HERE = Path(__file__).parent / "task_files"
NAMED = re.compile(r"""^["']?(?:task|group)["']?: *["']?([^\s"'#]+)""", re.MULTILINE)
OF_GROUP = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag")  # not its tasks' settings

Names = Mapping[str, Path]  # of tasks and groups -> the YAML that defines them


class Definition(NamedTuple):
    """One task as its YAML says.

    config: with what it includes filled in; functions are the text "FOLDER/FILE.NAME".
    yaml: what a generated YAML says of it, mostly an `include`.
    digest: sha256 of a YAML that is not lm-eval's, with the code next to it; None of an official or built-in one, of
    which task and package versions tell as much.
    rows: makes the rows of a task that needs no file, of so many items at least (None: of all).
    """

    name: str
    config: dict[str, Any]
    yaml: dict[str, Any]
    digest: str | None = None
    rows: Callable[[int | None], Rows] | None = None

    @property
    def evaluated(self) -> str | None:
        """The split whose rows are scored, by lm-eval's rule."""
        return self.config.get("test_split") or self.config.get("validation_split")

    @property
    def examples(self) -> str | None:
        """The split that few-shot examples are drawn from, where the task names one."""
        own = self.config.get("fewshot_config") or {}
        return own.get("split") or self.config.get("fewshot_split")

    def shots(self, asked: Sequence[int] | None) -> tuple[int, ...]:
        """The numbers of examples; lm-eval overrules a task's own number, but not a 0, and rolling takes none."""
        own = self.config.get("num_fewshot")
        if own == 0 or self.config.get("output_type") == "loglikelihood_rolling":
            return (0,)
        return (own or 0,) if asked is None else tuple(asked)


class Group(NamedTuple):
    """Tasks whose mean lm-eval reports as one number. by_size: each item counts alike, not each task."""

    tasks: tuple[str, ...]
    by_size: bool


class Found(NamedTuple):
    """Tasks and the groups among what was asked for, by name; `missing`: what was asked for -> why it is not there."""

    tasks: dict[str, Definition]
    groups: dict[str, Group]
    missing: dict[str, str]


def find(asked: Sequence[str]) -> Found:
    """The tasks behind names (of lm-eval's tasks, groups and tags), YAML files and folders, texts and token stores."""
    found = Found({}, {}, {})
    for name in asked:
        try:
            tasks = list(_tasks_behind(name, found.groups))
            for task in tasks:
                _check_name(task, found.tasks)
            found.tasks.update({task.name: task for task in tasks})
        except UserError as error:
            found.missing[name] = str(error)
    return found


def _check_name(task: Definition, others: Mapping[str, Definition]) -> None:
    if "/" in task.name:
        raise UserError(f"the task {task.name} has a / in its name, and results are files; rename it")
    if (other := others.get(task.name)) is not None and other.yaml != task.yaml:
        raise UserError(f"two tasks are called {task.name}; rename one")


def _tasks_behind(name: str, groups: dict[str, Group]) -> Iterator[Definition]:
    """The tasks that one word of the command line stands for; a group that is asked for is added to `groups`."""
    path = Path(name)
    if name in BUILT_IN:
        yield _built_in(name, name, lambda limit: story_rows())
    elif name in official_names():
        yield from _of_yaml(official_names()[name], official_names(), groups)
    elif path.suffix in YAML and path.is_file():
        yield from _of_yaml(path.resolve(), {**official_names(), **_names_below(path.resolve().parent)}, groups)
    elif path.is_dir() and (mine := _names_below(path.resolve())):
        for file in dict.fromkeys(mine.values()):
            yield from _of_yaml(file, {**official_names(), **mine}, groups)
    elif path.exists():
        yield _built_in(_text_name(path), "text", partial(text_rows, path))
    elif tagged := _tagged(name):
        for task in tagged:
            yield from _of_yaml(official_names()[task], official_names(), {})
    else:
        raise UserError(
            f"there is no task {name}: lm-eval has no task, group or tag of that name, and no such file is here; "
            "`python -m lm_eval ls tasks` lists all names"
        )


def _text_name(path: Path) -> str:
    """FILE.txt; of a store, whose folder is often just called so, the last two folders."""
    whole = path.resolve()
    return f"{whole.parent.name}-{whole.name}" if path.is_dir() else whole.name


# ---- YAML ------------------------------------------------------------------------------------------------------------


@cache
def official_names() -> dict[str, Path]:
    """lm-eval's tasks and groups, and the file of each."""
    return _names_in(_official_texts())


@cache
def _official_texts() -> dict[Path, str]:
    return _texts_below(OFFICIAL)


def _names_below(folder: Path) -> dict[str, Path]:
    return _names_in(_texts_below(folder))


def _texts_below(folder: Path) -> dict[Path, str]:
    """The YAML files in a folder, and what they include, which has no suffix in lm-eval: path -> text, sorted."""
    files = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    wanted = sorted(path for path in files if path.suffix in ("", *YAML))
    return {path: path.read_text(encoding="utf-8", errors="replace") for path in wanted}


def _names_in(texts: Mapping[Path, str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path, text in texts.items():
        for name in NAMED.findall(text) if path.suffix in YAML else ():
            found.setdefault(name, path)
    return found


@cache
def _tagged(tag: str) -> list[str]:
    """lm-eval's tasks with a tag. Only folders with a file of tags in which the word occurs are indexed, by lm-eval."""
    from lm_eval.tasks._index import TaskIndex

    word = re.compile(rf"\b{re.escape(tag)}\b")
    holding = (path for path, text in _official_texts().items() if "tag" in text and word.search(text))
    folders = {OFFICIAL / path.relative_to(OFFICIAL).parts[0] for path in holding}
    entries = [TaskIndex.build([folder]).get(tag) for folder in folders]  # of several at once, the last would count
    return sorted(set().union(*(entry.tags for entry in entries if entry is not None)))


def _load(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return dict(load_yaml(path, resolve_func=False))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: an include of itself, no mapping
        raise UserError(f"{path} is not the YAML of a task ({first_line(error)}); correct it") from error


def _of_yaml(
    path: Path, names: Names, groups: dict[str, Group], overrides: Mapping[str, Any] | None = None
) -> Iterator[Definition]:
    """The task of a YAML, or the tasks of the group that it defines, all the way down."""
    config = _load(path)
    if "group" not in config or "class" in config:
        yield _definition(str(config.get("task")), path, config, overrides)
        return
    tasks = list(_members(config, path, names, overrides or {}))
    if (means := config.get("aggregate_metric_list")) is not None:
        by_size = all(mean.get("weight_by_size", True) for mean in (means if isinstance(means, list) else [means]))
        groups[config["group"]] = Group(tuple(task.name for task in tasks), by_size)
    yield from tasks


def _definition(
    name: str, path: Path, config: dict[str, Any], overrides: Mapping[str, Any] | None = None
) -> Definition:
    own = {key: value for key, value in (overrides or {}).items() if key != "task"}
    return Definition(name, config | own, {"include": str(path), "task": name, **own}, _digest(path, config | own))


def _built_in(name: str, kind: str, rows: Callable[[int | None], Rows]) -> Definition:
    path = HERE / f"{kind}.yaml"
    return _definition(name, path, _load(path))._replace(rows=rows)


def _digest(path: Path, config: Mapping[str, Any]) -> str | None:
    if path.is_relative_to(OFFICIAL) or path.is_relative_to(HERE):
        return None
    sha256 = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for code in sorted(path.parent.glob("*.py")):
        sha256.update(code.read_bytes())
    return sha256.hexdigest()


def _members(config: Mapping[str, Any], path: Path, names: Names, overrides: Mapping[str, Any]) -> Iterator[Definition]:
    """The tasks of a group, as lm-eval builds them: its own settings and then the member's overrule a task's."""
    shared = {key: value for key, value in config.items() if key not in OF_GROUP} | dict(overrides)
    for member in config["task"] if isinstance(config.get("task"), list) else []:
        item = {"task": member} if isinstance(member, str) else dict(member)
        name = str(item.get("group") or item.get("task"))
        settings = shared | {key: value for key, value in item.items() if key not in ("group", "task")}
        if name in names:
            yield from _of_yaml(names[name], names, {}, settings)
        elif "group" in item:  # defined where it stands
            yield from _members(item, path, names, shared)
        elif isinstance(member, dict):
            yield _inline(f"{config['group']}::{name}", settings, path)
        elif tagged := _tagged(name):
            for task in tagged:
                yield from _of_yaml(names[task], names, {}, settings)
        else:
            raise UserError(f"{path} names {name}, which is not a task, group or tag")


def _inline(name: str, settings: dict[str, Any], path: Path) -> Definition:
    """A task that its group defines where it stands."""
    included = settings.get("include")
    base = _load(path.parent / included) if included else {}
    whole = {**settings, "task": name} | ({"include": str(path.parent / included)} if included else {})
    return Definition(name, base | settings, whole, _digest(path, settings))
