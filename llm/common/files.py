"""Files written whole or not at all, and JSON."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UserError


def read_json(path: Path) -> Any:
    """The content of a JSON file; a UserError names the file where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({first_line(error)}); delete it, and measure or export again"
        ) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: aside first, then renamed over. Text is UTF-8.

    UserError: a full disk, a folder that cannot be written; what was there stays.
    """
    write_files({path: content})


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files, all or none: none gets its name before all are written. As `write_file`."""
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


def write_json(path: Path, content: Any) -> None:
    """`write_file` of indented JSON."""
    write_file(path, as_json(content))


def as_json(content: Any) -> str:
    """Indented JSON."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def first_line(error: BaseException) -> str:
    """What an error says, without its traceback's other lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
