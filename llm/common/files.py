"""Files that are written atomically, and JSON."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UserError


def read_json(path: Path, fix: str = "delete it, and measure or export again") -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: the file cannot be read or is not JSON. The message names the file and ends with `fix`.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({first_line(error)}); {fix}") from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically: to a temporary file, then renamed. Text is UTF-8. The umask decides the mode.

    Raises:
        UserError: a full disk, or a folder that cannot be written. What was there stays.
    """
    write_files({path: content})


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files as `write_file` does; none gets its name before all are written."""
    asides = {path: path.with_name(path.name + ".part") for path in contents}
    path = next(iter(contents))
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with asides[path].open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())  # renamed unwritten, a file would be empty after a power cut
        for path, aside in asides.items():
            aside.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free space, or give a folder that can be written"
        ) from error
    finally:
        for aside in asides.values():
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON as `write_file` does."""
    write_file(path, as_json(content, indent))


def follow_umask(folder: Path) -> None:
    """Give every file in a new folder the mode that the umask leaves: safetensors makes its files private (0600).

    The mode is read off a file that is made and removed here: asking for the umask would change it for other threads.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def as_json(content: Any, indent: int | None = 2) -> str:
    """Return JSON with a line break at its end."""
    return json.dumps(content, indent=indent, ensure_ascii=False) + "\n"


def copy_files(source: Path, target: Path) -> None:
    """Copy a folder's files, those below it too, as new files: a source that is read-only gives none that is.

    A file that has the same content in `target` already stays as it is.

    Raises:
        UserError: a file cannot be read or written.
    """
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        new = target / path.relative_to(source)
        try:
            content = path.read_bytes()
            is_there = new.is_file() and new.read_bytes() == content
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); let this user read it") from error
        if not is_there:
            write_file(new, content)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def with_attempts(record: dict[str, Any]) -> dict[str, Any]:
    """The content of a run.json with its attempts under `attempts`; version 0.1 had another key for them."""
    earlier = record.get("lives")
    if earlier is None or "attempts" in record:
        return record
    return {key: value for key, value in record.items() if key != "lives"} | {"attempts": earlier}
