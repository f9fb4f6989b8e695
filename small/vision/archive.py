"""Files of a data set, wherever they lie: a folder, a tar archive of any compression, a zip archive, a single file."""

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import NamedTuple

from evals.models import first_line
from llm.errors import UserError

BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, OSError, RuntimeError)


class Files(NamedTuple):
    """Names with / between their parts, and their bytes. Errors of `read` are for `whole` to name."""

    path: Path
    names: list[str]
    read: Callable[[str], bytes]

    def ending(self, end: str) -> str | None:
        """The first name that is `end` or ends in /`end`; None where there is none."""
        return next((name for name in self.names if name == end or name.endswith(f"/{end}")), None)


@contextmanager
def opened(path: Path) -> Iterator[Files]:
    """The files of a folder or an archive.

    Raises:
        UserError: it is not there or damaged, also where that shows only while its files are read.
    """
    if not path.exists():
        raise UserError(f"{path} is not there: give --data the folder or the archive of the data set")
    try:
        if path.is_dir():
            names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
            yield Files(path, names, lambda name: (path / name).read_bytes())
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield Files(path, sorted(archive.namelist()), archive.read)
        elif path.name.endswith((".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2")):
            with tarfile.open(path) as archive:
                members = {member.name: member for member in archive if member.isfile()}
                yield Files(path, list(members), lambda name: archive.extractfile(members[name]).read())  # type: ignore[union-attr]
        else:
            yield Files(path, [path.name], lambda _: path.read_bytes())
    except BROKEN as error:
        raise UserError(f"{path} is damaged or cut off ({first_line(error)}): fetch it again") from error
