"""Files of a data set, wherever they lie: a folder, a zip or a tar archive (plain, gz, bz2, xz), a single file."""

import pickle
import tarfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import NamedTuple

from llm.common.errors import UserError
from llm.common.files import first_line

# What reading and parsing damaged files raises.
BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, pickle.UnpicklingError, EOFError, OSError,
    RuntimeError, ValueError, LookupError, TypeError, AttributeError,
)  # fmt: skip
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")


class Files(NamedTuple):
    """Names, sorted, with / between their parts; and their bytes."""

    path: Path
    names: list[str]
    read: Callable[[str], bytes]

    def ending(self, end: str) -> str | None:
        """The first name that is `end` or ends in /`end`; None where there is none."""
        return next((name for name in self.names if name == end or name.endswith(f"/{end}")), None)

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """What goes wrong inside is a UserError that names this file."""
        with _said_of(f"{self.path}: {name}"):
            yield


@contextmanager
def opened(path: Path, largest: int) -> Iterator[Files]:
    """The files of a folder or an archive.

    Args:
        largest: bytes that the files of an archive may have together, unpacked.

    Raises:
        UserError: it is damaged, too large, or may not be read, also where that shows only while its files are.
    """
    with _said_of(str(path)):
        if path.is_dir():
            names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
            yield Files(path, names, lambda name: (path / name).read_bytes())
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_size(str(path), sum(each.file_size for each in archive.infolist()), largest)
                yield Files(path, sorted(archive.namelist()), archive.read)
        elif path.name.endswith(ARCHIVES):
            with tarfile.open(path) as archive:
                # All of it in the archive's own order: every step back would decompress it from the start.
                contents, size = dict[str, bytes](), 0
                for member in archive:
                    check_size(str(path), size := size + member.size, largest)
                    if member.isfile() and (file := archive.extractfile(member)):
                        contents[member.name] = file.read()
            yield Files(path, sorted(contents), contents.__getitem__)
        else:
            yield Files(path, [path.name], lambda _: path.read_bytes())


def check_size(what: str, size: int, largest: int) -> None:
    """Raise UserError where `what` has more bytes than are allowed: a small archive may hold what no memory does."""
    if size > largest:
        raise UserError(
            f"{what} unpacks to {size:,} bytes or more, and this data set has {largest:,} at most: fetch it again"
        )


@contextmanager
def _said_of(what: str) -> Iterator[None]:
    what = " ".join(what.split())  # a name in an archive may have any characters
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{what} may not be read ({error.strerror}): give yourself the right to, or a copy") from error
    except BROKEN as error:
        why = textwrap.shorten(first_line(error).rstrip(":"), 200, placeholder=" ...")
        raise UserError(f"{what} is damaged, cut off or something else ({why}): fetch it again") from error
