"""CIFAR-100 and TinyImageNet from their published files, as tensors.

    CIFAR-100      cifar-100-binary    train.bin, test.bin: a byte of superclass, a byte of class, 3 x 32 x 32 pixels
                   cifar-100-python    train, test, meta: pickles of Python 2
                   parquet             train-*.parquet, test-*.parquet: a PNG and a label in each row, as in the hub
    TinyImageNet   tiny-imagenet-200   wnids.txt, train/WNID/images/*.JPEG, val/images and val/val_annotations.txt

as folders or archives. TinyImageNet's own test images have no public labels, so its validation images are the test.
"""

import io
import json
import pickle
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm.common.errors import UserError
from llm.common.processes import progress_bar

from .archive import Files, check_size, opened

ROWS_AT_ONCE = 16  # of a parquet file: a value that repeats is one in the file and several here
CIFAR_ROW = 2 + 3 * 32 * 32  # bytes: two labels, then red, green and blue planes


class Split(NamedTuple):
    """Images with their classes."""

    pixels: Tensor  # (N, 3, side, side) uint8
    labels: Tensor  # (N,) int64


@dataclass(frozen=True)
class Images:
    """A data set."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def side(self) -> int:
        """Of an image, in pixels."""
        return self.train.pixels.shape[-1]

    def summary(self) -> str:
        """What it is, in a line, and a second one where it is not all of what is published."""
        published, counts = DATASETS[self.name], (len(self.train.labels), len(self.test.labels))
        line = (
            f"{published.title}: {counts[0]:,} training and {counts[1]:,} test images of {len(self.classes)} classes, "
            f"{self.side} x {self.side} pixels"
        )
        if counts != (published.train, published.test):
            line += f"\nnote: the published data set has {published.train:,} and {published.test:,} images"
        return line

    @cached_property
    def record(self) -> dict[str, Any]:
        """What tells it from another data set."""
        check = 0
        for tensor in (*self.train, *self.test):
            check = zlib.crc32(tensor.numpy().data, check)
        counts = {"train": len(self.train.labels), "test": len(self.test.labels)}
        return {"name": self.name, "classes": len(self.classes), "side": self.side, **counts, "crc32": f"{check:08x}"}

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training images, in units of 255: (3, 1, 1) twice."""
        counts = torch.zeros(3, 256, dtype=torch.float64)
        for block in self.train.pixels.split(4096):
            for channel in range(3):
                counts[channel] += torch.bincount(block[:, channel].flatten().int(), minlength=256)
        values, shares = torch.arange(256) / 255.0, counts / counts.sum(1, keepdim=True)
        mean = (shares * values).sum(1, keepdim=True)  # (3, 1)
        deviation = (shares * (values - mean) ** 2).sum(1, keepdim=True).sqrt()
        return mean[..., None].float(), deviation[..., None].clamp(min=1 / 255).float()  # a flat channel has none


class Published(NamedTuple):
    """A data set as it is published."""

    title: str
    side: int  # of an image, in pixels
    train: int  # images
    test: int
    page: str
    found_as: tuple[str, ...]  # in a folder of data sets
    read: "Callable[[Files, bool], Images]"

    @property
    def largest(self) -> int:
        """Bytes of its files, unpacked or decoded: four times those of its pixels."""
        return 4 * (self.train + self.test) * 3 * self.side**2


def load(name: str, path: Path, quiet: bool = False) -> Images:
    """Read a data set, with a progress bar where images must be decoded.

    Args:
        name: one of DATASETS.
        path: the data set's folder or archive, or a folder in which one lies under its published name.

    Raises:
        UserError: it is not there, damaged, or of something else.
    """
    published = DATASETS[name]
    try:
        place = next((path / each for each in published.found_as if (path / each).exists()), path)
        there = place.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"{path} cannot be looked into ({error.strerror}): give another --data") from error
    if not there:
        raise UserError(
            f"{path} is not there: fetch {published.title} as {' or '.join(published.found_as[-2:])} from "
            f"{published.page} and give its place as --data"
        )
    with opened(place, published.largest) as files:
        images = published.read(files, quiet)
        for split, part in (("training", images.train), ("test", images.test)):
            _check(files.path, split, part, len(images.classes))
    if images.test.pixels.shape[1:] != images.train.pixels.shape[1:]:
        raise UserError(f"{files.path}: images of training and test are not of one size: fetch it again")
    return images


def _check(path: Path, split: str, part: Split, classes: int) -> None:
    """UserError where there are no images, or labels that no class has."""
    if not len(part.labels) or len(part.labels) != len(part.pixels):
        raise UserError(
            f"{path} has {len(part.pixels)} {split} images and {len(part.labels)} labels of them: fetch it again"
        )
    if not 0 <= part.labels.min() <= part.labels.max() < classes:
        wrong = int(part.labels[(part.labels < 0) | (part.labels >= classes)][0])
        raise UserError(f"{path} has a {split} label {wrong}, and classes from 0 to {classes - 1}: fetch it again")


def _unknown(files: Files, published: Published) -> UserError:
    return UserError(
        f"{files.path} holds no {published.title}: give --data a folder or an archive with the files of "
        f"{', '.join(published.found_as)} ({published.page})"
    )


def _lines(files: Files, name: str) -> list[str]:
    with files.naming(name):
        return [line for line in files.read(name).decode().splitlines() if line.strip()]


# ---- CIFAR-100 -------------------------------------------------------------------------------------------------------


def _cifar100(files: Files, quiet: bool) -> Images:
    if (train := files.ending("train.bin")) and (test := files.ending("test.bin")):
        names = files.ending("fine_label_names.txt")
        if names is None:
            raise UserError(f"{files.path} has no fine_label_names.txt next to train.bin: fetch it again")
        return Images("cifar100", tuple(_lines(files, names)), *(_binary(files, name) for name in (train, test)))
    if (meta := files.ending("meta")) and (train := files.ending("train")) and (test := files.ending("test")):
        with files.naming(meta):
            classes = tuple(map(str, _unpickled(files, meta)["fine_label_names"]))
        return Images("cifar100", classes, *(_python(files, name) for name in (train, test)))
    if all(_shards(files, split) for split in ("train", "test")):
        (train_part, classes), (test_part, _) = (_parquet(files, split, quiet) for split in ("train", "test"))
        return Images("cifar100", classes, train_part, test_part)
    raise _unknown(files, DATASETS["cifar100"])


def _binary(files: Files, name: str) -> Split:
    with files.naming(name):
        content = np.frombuffer(files.read(name), np.uint8)
        if len(content) % CIFAR_ROW:
            raise ValueError(f"it has {len(content)} bytes, which are no rows of {CIFAR_ROW}")
        rows = content.reshape(-1, CIFAR_ROW)
        return _split(np.array(rows[:, 2:]), rows[:, 1])


def _python(files: Files, name: str) -> Split:
    with files.naming(name):
        content = _unpickled(files, name)
        pixels = content["data"]
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (CIFAR_ROW - 2,):
            raise ValueError(f"it holds no rows of {CIFAR_ROW - 2} bytes")
        return _split(np.array(pixels, order="C"), content["fine_labels"])


def _split(pixels: np.ndarray, labels: Any) -> Split:
    """(N, 3072) or (N, 3, side, side) uint8 with their classes; ValueError for labels that are no whole numbers."""
    numbers = np.array(labels)
    if len(labels) and (numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer)):
        raise ValueError("its labels are no whole numbers")
    if pixels.ndim == 2:
        pixels = pixels.reshape(-1, 3, 32, 32)
    return Split(torch.from_numpy(pixels), torch.from_numpy(numbers.astype(np.int64)))


class _Unpickler(pickle.Unpickler):
    """Of arrays and plain containers alone: a pickle may call anything, and this one came from elsewhere."""

    ALLOWED = frozenset(
        [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
        + [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickled(files: Files, name: str) -> dict[str, Any]:
    try:
        found = _Unpickler(io.BytesIO(files.read(name)), encoding="latin1").load()
    except MemoryError as error:  # a damaged length
        raise ValueError("it asks for more memory than there is") from error
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}


def _shards(files: Files, split: str) -> list[str]:
    """The parquet files of a split: train-00000-of-00001.parquet and the like, or train/0000.parquet.

    Raises:
        UserError: they lie in several folders, or some are missing.
    """
    pattern = re.compile(rf"(.*/)?(?:{split}(?:-\d+-of-(\d+))?|{split}/\d+)\.parquet")
    found = [match for name in files.names if (match := pattern.fullmatch(name))]
    if len({match[1] for match in found}) > 1:
        raise UserError(
            f"{files.path} has {split} files in several folders ({found[0][0]}, {found[-1][0]}): give one as --data"
        )
    if found and found[0][2] and len(found) != int(found[0][2]):
        raise UserError(
            f"{files.path} has {len(found)} of the {int(found[0][2])} {split} files: fetch those that are missing"
        )
    return [match[0] for match in found]


def _parquet(files: Files, split: str, quiet: bool) -> tuple[Split, tuple[str, ...]]:
    import pyarrow.parquet as pq

    largest = DATASETS["cifar100"].largest
    images: list[bytes] = []
    places: list[str] = []
    labels: list[int] = []
    names: tuple[str, ...] = ()
    for name in _shards(files, split):
        with files.naming(name):
            file = pq.ParquetFile(io.BytesIO(files.read(name)))
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            check_size(f"{files.path}: {name}", sum(group.total_byte_size for group in groups), largest)
            first = len(images)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=["img", "fine_label"]):
                images += [image["bytes"] for image in batch["img"].to_pylist()]
                labels += batch["fine_label"].to_pylist()
                check_size(f"{files.path}: {name}", sum(map(len, images)), largest)
            places += [f"{name}, row {row}" for row in range(len(images) - first)]
            about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            features = about.get("info", {}).get("features", {})
            names = tuple(map(str, features.get("fine_label", {}).get("names", ())))
    pixels = _decoded(files, places, images, largest, quiet)
    with files.naming(name):
        part = _split(pixels, labels)
        return part, names or tuple(map(str, range(int(part.labels.max()) + 1)))


# ---- TinyImageNet ----------------------------------------------------------------------------------------------------


def _tiny_imagenet(files: Files, quiet: bool) -> Images:
    listed, annotated = files.ending("wnids.txt"), files.ending("val/val_annotations.txt")
    if listed is None or annotated is None:
        raise _unknown(files, DATASETS["tiny-imagenet"])
    root = listed.removesuffix("wnids.txt")
    classes = sorted(_lines(files, listed))
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    # A name in ._ is what a Mac leaves beside a file on disks of others.
    pattern = re.compile(rf"{re.escape(root)}train/([^/]+)/images/(?!\._)[^/]+\.JPEG")
    train = [(match[0], match[1]) for name in files.names if (match := pattern.fullmatch(name))]
    rows = (line.split("\t") for line in _lines(files, annotated))
    test = [(f"{root}val/images/{row[0]}", row[1] if len(row) > 1 else "") for row in rows]
    there = set(files.names)
    for name, wnid in (*train, *test):
        if wnid not in numbers or name not in there:
            what = f"{name} is missing" if wnid in numbers else f"{name} is of {wnid!r}, which wnids.txt has not"
            raise UserError(f"{files.path}: {what}: fetch it again")
    words = f"{root}words.txt"
    largest = DATASETS["tiny-imagenet"].largest
    called = dict(line.split("\t", 1) for line in (_lines(files, words) if words in there else ()) if "\t" in line)
    splits = (
        _split(
            _decoded(files, [name for name, _ in part], _contents(files, (name for name, _ in part)), largest, quiet),
            [numbers[wnid] for _, wnid in part],
        )
        for part in (train, test)
    )
    return Images("tiny-imagenet", tuple(called.get(wnid, wnid) for wnid in classes), *splits)


# ---- Images ----------------------------------------------------------------------------------------------------------


def _contents(files: Files, names: Iterable[str]) -> Iterable[bytes]:
    for name in names:
        with files.naming(name):
            yield files.read(name)


def _decoded(files: Files, names: Sequence[str], contents: Iterable[bytes], largest: int, quiet: bool) -> np.ndarray:
    """Compressed images -> (N, 3, side, side) uint8; grey ones get three equal planes."""
    from PIL import Image, UnidentifiedImageError

    def decode(named: tuple[str, bytes]) -> np.ndarray:
        name, content = named
        with files.naming(name):
            try:
                image = Image.open(io.BytesIO(content))  # its header alone
                check_size(f"{files.path}: {name}", len(names) * 3 * image.width * image.height, largest)
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
                raise ValueError("no image of a known format and size") from error

    pixels = np.empty((0, 3, 1, 1), np.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter's lock
        decoded = pool.map(decode, zip(names, contents, strict=True))
        bar = progress_bar(len(names), 0, "images", " images", iterable=decoded, leave=False, disable=quiet)
        for row, image in enumerate(bar):
            if not row:
                pixels = np.empty((len(names), *image.shape), np.uint8)
            if image.shape != pixels.shape[1:] or image.shape[1] != image.shape[2]:
                raise UserError(
                    f"{files.path}: {names[row]} has {image.shape[2]} x {image.shape[1]} pixels, and the images must "
                    "be squares of one size: fetch it again"
                )
            pixels[row] = image
    return pixels


DATASETS = {
    "cifar100": Published(
        "CIFAR-100", 32, 50_000, 10_000, "https://www.cs.toronto.edu/~kriz/cifar.html",
        ("cifar-100-binary", "cifar-100-python", "cifar100", "cifar-100-binary.tar.gz", "cifar-100-python.tar.gz"),
        _cifar100,
    ),
    "tiny-imagenet": Published(
        "TinyImageNet", 64, 100_000, 10_000, "http://cs231n.stanford.edu",
        ("tiny-imagenet-200", "tiny-imagenet-200.zip"), _tiny_imagenet,
    ),
}  # fmt: skip
