"""The YAML of a study: what it means, and everything that is wrong with it in one error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm.common.errors import UserError
from llm.study.description import configured, read_study
from llm.study.sections import Tokens

BASE = {"decoder": {"hidden_size": 8, "stream": []}, "model": {"optimizer": {"lr": 1e-3}}}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a study's YAML; keyword arguments replace its keys, None removes one."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def written(**changes: Any) -> Path:
        content = {
            "base": str(tmp_path / "base.yaml"),
            "folder": str(tmp_path / "study"),
            "baseline": "classic",
            "arms": {"classic": {}, "values": {"decoder.stream": ["values"]}},
            "sizes": {"small": {"decoder.hidden_size": 8}, "large": {"decoder.hidden_size": 16}},
            "seeds": 2,
            "tokens": {"per_parameter": [10, 20], "cooldown": 0.2},
        }
        content = {key: value for key, value in (content | changes).items() if value is not None}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "study.yaml"

    return written


def test_all_problems_are_told_together(write: Write) -> None:
    path = write(
        arms={"classic": {}, "wide": {"decoder.hidden_size": 9}, "nested": {"decoder": {"stream": []}}, "null": {}},
        sizes={"small": {"decoder.hidden_size": 8, "trainer.max_steps": 3}, "a/b": {}, "listed": []},
        tokens={"per_parameter": [20, 10], "absolute": 5, "cool_down": 0.2, "max_epochs": 0},
        tune={"key": "lr", "values": [1, 2], "sizes": ["tiny"], "rule": "guess"},
        slurm={"small": {"gpus": -1, "time": "soon"}, "huge": {}},
        seeds=[1, 1],
        seed="x",
        null_arm="no",
        baselin="classic",
    )
    with pytest.raises(UserError) as error:
        read_study(path)
    parts = (
        "unknown key baselin: did you mean baseline?",
        "unknown tokens key cool_down: did you mean cooldown?",
        "tokens needs either per_parameter or absolute",
        "tokens.max_epochs 0 must be",
        "sizes: the name a/b must be",
        "sizes.listed must be a mapping",
        "the arm null is made by the study",
        "tune.key lr must be a dotted config key",
        "tune.values must be at least three numbers",
        "tune.sizes must name some of the sizes, not ['tiny']",
        "tune.rule guess is unknown: give one of power_law, constant",
        "slurm.small.gpus -1 must be at least 0",
        "slurm.small.time soon must be a time",
        "slurm names the size huge",
        "seeds [1, 1] must be",
        "seed x must be a whole number",
        "null_arm no must be true or false",
    )
    assert [part for part in parts if part not in str(error.value)] == []


def test_contradictions_are_told_together(write: Write) -> None:
    path = write(
        arms={
            "classic": {},
            "wide": {"decoder.hidden_size": 9},
            "nested": {"decoder": 1},
            "lr": {"model.optimizer.lr": 1},
        },
        sizes={"small": {"decoder.hidden_size": 8, "trainer.max_steps": 3, "model.schedule.shape": "cosine"}},
        tune={"values": [1, 2, 3], "sizes": ["small"]},
    )
    with pytest.raises(UserError) as error:
        read_study(path)
    parts = (
        "arm wide and the sizes both set decoder.hidden_size",
        "arm wide differs from classic in decoder.hidden_size: add it to allow_difference",
        "arm nested: decoder must be a dotted config key",
        "arm lr: model.optimizer.lr is also tune.key",
        "size small: trainer.max_steps is set by the study",
        "size small: model.schedule.shape is set by the study",
    )
    assert [part for part in parts if part not in str(error.value)] == []


def test_what_differs_has_to_be_declared(write: Write) -> None:
    """Streams, activations and their parameters need no declaration."""
    nmda = {"decoder.hidden_act": "nmda", "decoder.nmda_alpha": 10.0}
    assert list(read_study(write(arms={"classic": {}, "nmda": nmda})).arms) == ["classic", "nmda"]
    arms = {"classic": {}, "clipped": {"model.gradient_clip": 2.0}}
    with pytest.raises(UserError, match=r"model\.gradient_clip: add it to allow_difference"):
        read_study(write(arms=arms))
    study = read_study(write(arms=arms, allow_difference=["model.gradient_clip"]))
    assert study.overrides("large", "clipped") == {"decoder.hidden_size": 16, "model.gradient_clip": 2.0}
    assert study.overrides("large", "null") == {"decoder.hidden_size": 16}
    assert study.all_arms() == ["classic", "clipped", "null"]


@pytest.mark.parametrize("text", ["[", "3", "null", "base: nowhere.yaml"])
def test_a_file_that_is_no_study(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=r"study\.yaml"):
        read_study(tmp_path / "study.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_study(tmp_path / "other.yaml")


def test_a_dial_makes_sizes(write: Write) -> None:
    study = read_study(write(sizes={"depth": [2, 4], "width_per_layer": 64, "heads_per_layer": 1}))
    assert list(study.sizes) == ["d2", "d4"]
    config = configured({"decoder": {"head_dim": 3, "norm": "rmsnorm"}}, study.sizes["d4"])["decoder"]
    assert config == {
        "norm": "rmsnorm",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_dim": None,
        "intermediate_size": None,
        "num_key_value_heads": None,
    }
    for wrong in ({"depth": [2]}, {"depth": 2, "width_per_layer": 64, "heads_per_layer": 1}):
        with pytest.raises(UserError, match="sizes needs depth, a list"):
            read_study(write(sizes=wrong))


def test_seeds_are_fresh_at_every_size_and_stay_when_the_study_grows(write: Write) -> None:
    study = read_study(write(seeds=3, seed=5))
    seeds = [study.seed_of(size, label) for size in study.sizes for label in study.seeds]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    more = read_study(write(seeds=4, seed=5, sizes={"tiny": {}, "small": {}, "large": {}}))
    assert [more.seed_of(size, label) for size in study.sizes for label in study.seeds] == seeds
    other = read_study(write(seeds=3, seed=6))
    assert not {other.seed_of(size, label) for size in study.sizes for label in study.seeds} & set(seeds)
    own = read_study(write(seeds=[7, 9]))
    assert [own.seed_of(size, label) for size in own.sizes for label in own.seeds] == [7, 9, 7, 9]


@given(st.dictionaries(st.sampled_from(["a.b", "a.c.d", "e.f"]), st.integers()), st.integers(), st.integers())
def test_overrides_are_set_where_their_keys_say(overrides: dict[str, Any], b: int, g: int) -> None:
    base = {"a": {"b": b}, "g": g}
    config = configured(base, overrides)
    assert base == {"a": {"b": b}, "g": g}
    for key, value in overrides.items():
        place = config
        for part in key.split("."):
            place = place[part]
        assert place == value
    assert config["g"] == g and config["a"]["b"] == overrides.get("a.b", b)


def test_budgets() -> None:
    per_parameter = Tokens(per_parameter=[10, 20.5])
    assert per_parameter.of(300) == [3000, 6150] and per_parameter.label(1) == "20.5x"
    absolute = Tokens(absolute=["1e6", 2_500_000_000])
    assert absolute.of(300) == [1e6, 2.5e9] and [absolute.label(n) for n in (0, 1)] == ["1M", "2.5B"]
    assert Tokens(absolute=20).label(0) == "20"


def test_the_source_of_an_arm_is_text_and_no_override(write: Write) -> None:
    values = {"source": "Somebody 2020", "decoder.stream": ["values"]}
    study = read_study(write(arms={"classic": {"source": "plain"}, "values": values}))
    assert study.arms == {"classic": {}, "values": {"decoder.stream": ["values"]}}
    with pytest.raises(UserError, match=r"arms\.values\.source must be text"):
        read_study(write(arms={"classic": {}, "values": values | {"source": ["Somebody"]}}))
