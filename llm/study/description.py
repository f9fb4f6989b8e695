"""The YAML of a study: which arms are compared, at which sizes, with which seeds and how many tokens.

Stages: YAML -> sections, each a dataclass that names its own problems -> what contradicts between sections -> one
`Study`, or one error with all problems. Imports no torch; `inspection.py` checks the configs that follow from it.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..common.errors import UserError
from ..runs import reading
from ..runs.study_record import NULL_ARM, SOURCE
from .sections import SET_BY_THE_STUDY, Resources, Tokens, Tune

NAME = re.compile(r"[\w.+-]+")
Overrides = dict[str, Any]  # dotted key of a config -> value


@dataclass(frozen=True)
class Study:
    """A study whose sections fit together.

    Args:
        path, text: of its YAML; `base_text` of the config that it starts from.
        base: that config, nested, with today's names.
        folder: of the runs and of the study's record.
        baseline: one of `arms`.
        arms, sizes: name -> overrides of the base; the sizes ascend.
        seed: names the seeds of all runs.
        seeds: of each size, as "1", "2" ...; or the user's own, where `own_seeds`.
        null_arm: whether there is an arm `null`, the baseline with other initial weights.
        allow_difference: keys in which arms may differ, in addition to `reading.allowed_differences`.
    """

    path: Path
    text: str
    base_text: str
    base: dict[str, Any]
    folder: Path
    baseline: str
    arms: dict[str, Overrides]
    sizes: dict[str, Overrides]
    seed: int
    seeds: list[str]
    own_seeds: bool
    tokens: Tokens
    tune: Tune | None
    null_arm: bool
    allow_difference: list[str]
    slurm: dict[str, Resources]

    def overrides(self, size: str, arm: str) -> Overrides:
        """Return the overrides of an arm at a size."""
        return self.sizes[size] | self.arms[self.baseline if arm == NULL_ARM else arm]

    def all_arms(self) -> list[str]:
        """Return the names of the arms, the null arm last."""
        return [*self.arms, *([NULL_ARM] if self.null_arm else [])]

    def seed_of(self, size: str, label: str) -> int:
        """Return the seed of a run: fresh at every size, unless the user gave seeds."""
        return int(label) if self.own_seeds else self.derived(size, label)

    def derived(self, *words: str) -> int:
        """Return a seed named by the study's and these words, below 2^31."""
        digest = hashlib.sha256(": ".join([f"study seed {self.seed}", *words]).encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


def configured(base: dict[str, Any], *overrides: Overrides) -> dict[str, Any]:
    """Return a copy of a nested config with dotted keys set, the last one that names a key deciding."""
    config = copy.deepcopy(base)
    for key, value in (item for part in overrides for item in part.items()):
        *parents, name = key.split(".")
        place = config
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[name] = copy.deepcopy(value)
    return config


# ---- Reading ---------------------------------------------------------------------------------------------------------

KEYS = (
    "base folder baseline arms sizes seed seeds tokens tune null_arm allow_difference slurm"
).split()  # of the YAML, in its usual order
Section = TypeVar("Section", Tokens, Tune, Resources)


def read_study(path: Path) -> Study:
    """Read a study's YAML.

    Raises:
        UserError: it cannot be read, or what it says cannot be; the message names every problem.
    """
    text, content = _read_yaml(path, "the YAML of a study, such as those in configs/studies")
    problems = [_unknown("key", key, KEYS) for key in content if key not in KEYS]
    base_text, base = "", dict[str, Any]()
    try:
        base_text, base = _read_yaml(Path(str(content.get("base"))), "base: the YAML of a run")
    except UserError as error:
        problems.append(str(error))
    arms = _names("arms", content.get("arms"), problems)
    for name, overrides in arms.items():
        if not isinstance(overrides.pop(SOURCE, ""), str):
            problems.append(f"arms.{name}.{SOURCE} must be text: the paper, and how this arm differs from it")
    sizes = _names("sizes", _dialled(content.get("sizes"), problems), problems)
    tokens = _section(Tokens, "tokens", content.get("tokens"), problems)
    tune = _section(Tune, "tune", content["tune"], problems) if content.get("tune") else None
    slurm = _names("slurm", content.get("slurm") or {}, problems)
    resources = {size: _section(Resources, f"slurm.{size}", slurm.get(size, {}), problems) for size in sizes}
    seeds, allowed = content.get("seeds", 1), content.get("allow_difference") or []
    problems += [
        *tokens.problems(),
        *(tune.problems(sizes) if tune else []),
        *(problem for size, wanted in resources.items() for problem in wanted.problems(size)),
        *(f"slurm names the size {size}, which there is not" for size in slurm if size not in sizes),
        *_scalar_problems(content, arms, seeds, allowed),
    ]
    own = isinstance(seeds, list)
    study = Study(
        path=path,
        text=text,
        base_text=base_text,
        base=reading.renamed(base),
        folder=Path(str(content.get("folder"))),
        baseline=str(content.get("baseline")),
        arms=arms,
        sizes=sizes,
        seed=content.get("seed", 0),
        seeds=[str(seed) for seed in (seeds if own else range(1, seeds + 1 if isinstance(seeds, int) else 1))],
        own_seeds=own,
        tokens=tokens,
        tune=tune,
        null_arm=content.get("null_arm", True) is True,
        allow_difference=[reading.new_name(str(key)) for key in allowed] if isinstance(allowed, list) else [],
        slurm=resources,
    )
    if problems := problems or _contradictions(study):
        raise UserError(f"{path} cannot be run: " + "; ".join(problems))
    return study


def _read_yaml(path: Path, what: str) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, dict(yaml.safe_load(text))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({why}): give {what}") from error


def _scalar_problems(content: dict[str, Any], arms: Overrides, seeds: Any, allowed: Any) -> list[str]:
    problems = []
    if not isinstance(content.get("folder"), str):
        problems.append("folder is missing: name the folder of the study's runs")
    if content.get("baseline") not in arms:
        problems.append(f"baseline {content.get('baseline')} must be one of the arms")
    if len(arms) < 2:
        problems.append("arms must name the baseline and at least one other")
    if NULL_ARM in arms:
        problems.append(f"the arm {NULL_ARM} is made by the study: give yours another name")
    if not isinstance(content.get("seed", 0), int):
        problems.append(f"seed {content['seed']} must be a whole number")
    counted = isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1
    listed = isinstance(seeds, list) and seeds and all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    if not counted and not (listed and len(set(seeds)) == len(seeds)):
        problems.append(f"seeds {seeds} must be a count of at least 1, or a list of different seeds")
    if not isinstance(content.get("null_arm", True), bool):
        problems.append(f"null_arm {content['null_arm']} must be true or false")
    if not isinstance(allowed, list):
        problems.append("allow_difference must be a list of dotted config keys")
    return problems


def _dialled(sizes: Any, problems: list[str]) -> Any:
    """Return sizes by name, those of a dial made from its depths: d4 has 4 layers, and width and heads for each."""
    if not isinstance(sizes, dict) or "depth" not in sizes or isinstance(sizes["depth"], dict):
        return sizes
    per_layer = ("width_per_layer", "heads_per_layer")
    problems += [_unknown("sizes key", key, ("depth", *per_layer)) for key in sizes if key not in ("depth", *per_layer)]
    depths = sizes["depth"] if isinstance(sizes["depth"], list) else []
    whole = [*depths, *(sizes.get(name) for name in per_layer)]
    if not depths or not all(isinstance(number, int) and number >= 1 for number in whole):
        problems.append("sizes needs depth, a list of layers, with width_per_layer and heads_per_layer, whole numbers")
        return {}
    follow = dict.fromkeys(("intermediate_size", "num_key_value_heads", "head_dim"))  # None: made from the width
    return {
        f"d{depth}": {
            "decoder.num_hidden_layers": depth,
            "decoder.hidden_size": depth * sizes["width_per_layer"],
            "decoder.num_attention_heads": depth * sizes["heads_per_layer"],
            **{f"decoder.{name}": None for name in follow},
        }
        for depth in depths
    }


def _names(section: str, content: Any, problems: list[str]) -> dict[str, Overrides]:
    """Return a mapping of names to mappings; what is none of it goes to `problems`."""
    if not isinstance(content, dict) or (not content and section != "slurm"):
        problems.append(f"{section} must map each name to its overrides")
        return {}
    found = {}
    for name, overrides in content.items():
        if isinstance(name, bool) or not isinstance(name, str | int) or not NAME.fullmatch(str(name)):
            problems.append(f"{section}: the name {name} must be letters, digits and . + - _, in quotes if need be")
        elif overrides is not None and not isinstance(overrides, dict):
            problems.append(f"{section}.{name} must be a mapping")
        else:
            found[str(name)] = {reading.new_name(str(key)): value for key, value in (overrides or {}).items()}
    return found


def _section(kind: type[Section], name: str, content: Any, problems: list[str]) -> Section:
    if not isinstance(content, dict):
        problems.append(f"{name} must be a mapping")
        return kind()
    known = [field.name for field in fields(kind)]
    problems += [_unknown(f"{name} key", key, known) for key in content if key not in known]
    return kind(**{key: value for key, value in content.items() if key in known})


def _contradictions(study: Study) -> list[str]:
    """Return what does not fit together, a sentence each."""
    problems = []
    reserved = [*SET_BY_THE_STUDY, *(["model.schedule.shape"] if study.tokens.cooldown else [])]
    for kind, group in (("arm", study.arms), ("size", study.sizes)):
        for name, overrides in group.items():
            for key in overrides:
                if "." not in key:
                    problems.append(f"{kind} {name}: {key} must be a dotted config key, such as decoder.stream")
                elif key in reserved:
                    problems.append(f"{kind} {name}: {key} is set by the study, remove it")
                elif study.tune and key == study.tune.key:
                    problems.append(f"{kind} {name}: {key} is also tune.key, remove one of them")
    for name, overrides in study.arms.items():
        if both := sorted({key for key in overrides for size in study.sizes.values() if key in size}):
            problems.append(f"arm {name} and the sizes both set {', '.join(both)}: keep one of them")
        problems += _undeclared(study, name)
    return problems


def _undeclared(study: Study, arm: str) -> list[str]:
    """Return a sentence if an arm differs from the baseline in keys that nobody has declared."""
    first, second = ({**dict(reading.flat(study.base)), **study.arms[name]} for name in (study.baseline, arm))
    allowed = reading.allowed_differences([first, second]) | set(study.allow_difference)
    given = study.arms[study.baseline].keys() | study.arms[arm].keys()
    different = ", ".join(sorted(key for key in given - allowed if first.get(key) != second.get(key)))
    if not different:
        return []
    return [f"arm {arm} differs from {study.baseline} in {different}: add it to allow_difference if it is meant"]


def _unknown(what: str, key: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"unknown {what} {key}: " + (f"did you mean {near[0]}?" if near else f"give some of {', '.join(known)}")
