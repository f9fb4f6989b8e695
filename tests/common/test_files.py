"""Files are whole or as they were, with the modes that the umask gives."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.common import files
from llm.common.errors import UserError, printable


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_decides_the_mode_of_what_is_written(tmp_path: Path, umask: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "secret").write_text("x")
    (tmp_path / "a" / "secret").chmod(0o400)
    files.write_json(tmp_path / "new" / "a.json", {"a": 1})
    files.copy_files(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "new" / "a.json", tmp_path / "b" / "secret"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        assert path.parent.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device\); free space"):
        files.write_json(path, {"a": 2})
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_a_copy_of_what_is_there_already_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "below").mkdir(parents=True)
    (tmp_path / "a" / "below" / "x").write_bytes(b"\0")
    files.copy_files(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "below" / "x").read_bytes() == b"\0"
    monkeypatch.setattr(files, "write_file", None)
    files.copy_files(tmp_path / "a", tmp_path / "b")


def test_names_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2Jb\r\n\té漢\u202e\udce9") == "a\\x1b[2Jb\\r\n\té漢\\u202e\\udce9"
