"""Options of the small experiments follow from dataclasses of settings: defaults, presets, limits, help."""

import argparse
from dataclasses import dataclass, fields

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llm.common.errors import UserError
from llm.common.limits import BELOW_ONE, POSITIVE, at_least
from small.experiment.options import (
    add_options,
    chosen,
    option,
    problems,
    raise_problems,
    shown,
)
from small.grid.settings import PRESETS as GRID
from small.grid.settings import GridSettings, GridSizes
from small.icl.settings import PRESETS as ICL
from small.icl.settings import IclSettings, IclSizes, Task
from small.tem.settings import PRESETS as TEM
from small.tem.settings import MachineSizes, TemSettings, TransformerSizes
from small.vision.settings import VisionSettings, VisionSizes

EVERY = {
    GridSizes: GRID, GridSettings: GRID, Task: {}, IclSizes: {}, IclSettings: ICL, TransformerSizes: TEM,
    MachineSizes: TEM, TemSettings: TEM, VisionSizes: {}, VisionSettings: {},
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Settings of a walk."""

    seed: int = 0
    steps: int = option(10, "walking steps", at_least(1))
    lr: float = option(1e-3, "learning rate", POSITIVE)
    drop: float = option(0.0, "dropout", BELOW_ONE)
    test_every: int = option(5, "steps between tests", at_least(1), name="evaluate-every")
    spaces: tuple[str, ...] = option(("5x5", "6x6"), "spaces")
    kind: str = option("a", "kind", choices=("a", "b", "c"))
    patch: int | None = option(None, "patch (default: none)", at_least(1), kind=int)

    def __post_init__(self) -> None:
        raise_problems(problems(self))


def parsed(settings: type, *words: str, presets: dict | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, settings, presets)
    return parser.parse_args(words)


@given(st.integers(1, 99), st.floats(1e-6, 1e3), st.integers(1, 9), st.sampled_from("abc"), st.none() | st.integers(1))
def test_what_the_line_says_comes_before_the_preset_and_that_before_the_default(
    steps: int, lr: float, every: int, kind: str, patch: int | None
) -> None:
    words = ["--lr", repr(lr), "--evaluate-every", str(every), "--kind", kind, "--spaces", "3x3"]
    given_ = parsed(Settings, *words, *(["--patch", str(patch)] if patch else []))
    found = chosen(given_, Settings, {"lr": 7.0, "steps": steps, "seeds": 3}, seed=2)
    assert found == Settings(2, steps, lr, 0.0, every, ("3x3",), kind, patch)


def test_help_has_the_defaults_of_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    presets = {"paper": {"steps": 20}, "small": {"lr": 0.5, "spaces": ("2x2",)}}
    with pytest.raises(SystemExit):
        parsed(Settings, "--help", presets=presets)
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "--steps N walking steps (default: 20; small: 10)", "--lr X learning rate (default: 0.001; small: 0.5)",
        "spaces (default: 5x5 6x6; small: 2x2)", "--evaluate-every N steps between tests (default: 5)",
        "--patch N patch (default: none)", "--kind {a,b,c} kind (default: a)",
    ):  # fmt: skip
        assert said in text
    assert "--seed" not in text and shown("seeds", 3, {"a": {}, "b": {"seeds": 2}}) == "(default: 3; b: 2)"


def test_all_problems_are_named_together_by_their_options() -> None:
    with pytest.raises(UserError) as raised:
        Settings(steps=0, lr=float("nan"), drop=1.0, test_every=0, kind="d", patch=0)
    assert str(raised.value) == (
        "steps 0 must be at least 1; lr nan must be a finite number above 0; drop 1.0 must be at least 0 and below 1; "
        "evaluate-every 0 must be at least 1; kind 'd' is unknown: give a, b or c; patch 0 must be at least 1"
    )


@pytest.mark.parametrize("settings", EVERY, ids=lambda each: each.__name__)
def test_without_options_settings_are_their_defaults_and_presets_name_fields(settings: type) -> None:
    assert chosen(parsed(settings), settings) == settings()
    for preset in EVERY[settings].values():
        found = chosen(parsed(settings), settings, preset)
        known = {each.name for each in fields(settings) if each.metadata.get("text")} & preset.keys()
        assert all(getattr(found, name) == preset[name] for name in known)
