"""Old names of options do what the new ones do, say so, and are not in --help."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.common.arguments import accept_old_name

NEW = {"--old-flag": "--flag", "--old-count": "--count", "--old-part": "--part", "--old-run": "--run"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--flag", dest="f", action="store_true")
    made.add_argument("--count", type=int, default=3, choices=range(9))
    made.add_argument("--part", action="append", default=[])
    made.add_argument("--run", action=argparse.BooleanOptionalAction)
    for old, new in [*NEW.items(), ("--no-old-run", "--no-run")]:
        accept_old_name(made, old, new)
    return made


WORDS = st.lists(
    st.sampled_from([("--old-flag",), ("--old-run",), ("--no-old-run",)])
    | st.tuples(st.just("--old-count"), st.integers(0, 8).map(str))
    | st.tuples(st.just("--old-part"), st.sampled_from("abc"))
)


@given(WORDS)
def test_old_names_give_what_the_new_ones_give(words: list[tuple[str, ...]]) -> None:
    old = [word for group in words for word in group]
    new = [NEW.get(word, "--no-run" if word == "--no-old-run" else word) for word in old]
    assert parser().parse_args(old) == parser().parse_args(new)


def test_it_is_said_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    parser().parse_args(["--old-count", "4"])
    assert capsys.readouterr().err == "note: --old-count is now called --count; the old name works until version 0.3\n"
    assert "old" not in parser().format_help()
    with pytest.raises(SystemExit):
        parser().parse_args(["--old-count", "nine"])
