"""Every published form gives the same images, and what is broken is named in one sentence."""

import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from llm.common.errors import UserError
from small.vision.datasets import DATASETS, load

from .files import (
    NAMES,
    cifar_binary,
    cifar_parquet,
    cifar_python,
    encoded,
    pictures,
    python2_pickle,
    tarred,
    tiny_imagenet,
    zipped,
)

TRAIN, TEST = pictures(30, 32, 0), pictures(12, 32, 1)
FORMS: dict[str, Callable[..., Path]] = {"binary": cifar_binary, "python": cifar_python, "parquet": cifar_parquet}


@pytest.mark.parametrize("place", ["folder", "archive", "above"])
@pytest.mark.parametrize("form", FORMS)
def test_cifar_100_in_every_form(form: str, place: str, tmp_path: Path) -> None:
    root = FORMS[form](tmp_path, train=TRAIN, test=TEST)
    path = {"folder": root, "archive": tarred(root), "above": tmp_path}[place]
    images = load("cifar100", path, quiet=True)
    for split, (pixels, labels) in ((images.train, TRAIN), (images.test, TEST)):
        assert np.array_equal(split.pixels.numpy(), pixels) and np.array_equal(split.labels.numpy(), labels)
        assert split.pixels.dtype == torch.uint8 and split.labels.dtype == torch.int64
    assert images.classes == NAMES and images.side == 32


def test_all_forms_of_one_data_set_have_one_record_and_other_images_another(tmp_path: Path) -> None:
    records = [load("cifar100", f(tmp_path, train=TRAIN, test=TEST), True).record for f in FORMS.values()]
    other = load("cifar100", cifar_binary(tmp_path / "other", train=TRAIN, test=pictures(12, 32, 2)), True).record
    assert records[0] == records[1] == records[2] != other
    assert {key: value for key, value in other.items() if key != "crc32"} == {
        "name": "cifar100", "classes": 5, "side": 32, "train": 30, "test": 12
    }  # fmt: skip


def test_parquet_without_class_names_numbers_them(tmp_path: Path) -> None:
    images = load("cifar100", cifar_parquet(tmp_path, named=False, train=TRAIN, test=TEST), True)
    assert images.classes == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("place", ["folder", "archive", "above", "tar"])
def test_tiny_imagenet(place: str, tmp_path: Path) -> None:
    train, test = pictures(25, 64, 0), pictures(10, 64, 1)
    train[0][3] = train[0][3, :1]  # a grey image, of which the published set has some
    root = tiny_imagenet(tmp_path, train=train, test=test)
    path = {"folder": root, "archive": zipped(root), "above": tmp_path, "tar": tarred(root)}[place]
    images = load("tiny-imagenet", path, quiet=True)
    assert images.classes == tuple(f"{name}, of a kind" for name in reversed(NAMES))  # by WordNet id

    def as_read(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG"))).convert("RGB")).transpose(2, 0, 1)

    assert np.array_equal(images.test.pixels.numpy(), np.stack([as_read(image) for image in test[0]]))
    assert np.array_equal(images.test.labels.numpy(), 4 - test[1])
    by_class = np.argsort(4 - train[1], kind="stable")  # files in the order of their names
    assert np.array_equal(images.train.pixels.numpy(), np.stack([as_read(train[0][n]) for n in by_class]))
    assert np.array_equal(images.train.labels.numpy(), (4 - train[1])[by_class])
    grey = images.train.pixels[list(by_class).index(3)]
    assert (grey == grey[:1]).all()


def test_an_archive_in_another_order_and_of_another_machine_is_the_same_data_set(tmp_path: Path) -> None:
    root = _tiny(tmp_path)
    record = load("tiny-imagenet", root, True).record
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            archive.add(file, file.relative_to(tmp_path).as_posix(), recursive=False)
    assert load("tiny-imagenet", tmp_path / "other.tar", True).record == record
    image = next((root / "train").rglob("*.JPEG"))
    (image.parent / f"._{image.name}").write_bytes(b"what a Mac leaves there")
    with (root / "val" / "val_annotations.txt").open("a") as file:
        file.write("\n")
    assert load("tiny-imagenet", root, True).record == record


def test_parquet_as_the_hub_converts_it(tmp_path: Path) -> None:
    root = _parquet(tmp_path)
    for split in ("train", "test"):
        (root / split).mkdir()
        for number, file in enumerate(sorted(root.glob(f"{split}-*.parquet"))):
            file.rename(root / split / f"{number:04d}.parquet")
    images = load("cifar100", root, True)
    assert np.array_equal(images.train.pixels.numpy(), TRAIN[0])


def test_statistics_are_those_of_numpy(tmp_path: Path) -> None:
    mean, deviation = load("cifar100", _binary(tmp_path), True).statistics
    scaled = TRAIN[0] / 255
    np.testing.assert_allclose(mean[:, 0, 0], scaled.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(deviation[:, 0, 0], scaled.std((0, 2, 3)), rtol=1e-6)
    flat = cifar_binary(tmp_path / "flat", train=(np.zeros((5, 3, 32, 32), np.uint8), np.arange(5)), test=TEST)
    assert (load("cifar100", flat, True).statistics[1] > 0).all()


def test_the_summary_says_what_is_missing_of_the_published_set(tmp_path: Path) -> None:
    summary = load("cifar100", cifar_binary(tmp_path, train=TRAIN, test=TEST)).summary()
    assert summary.startswith("CIFAR-100: 30 training and 12 test images of 5 classes, 32 x 32 pixels")
    assert "note: the published data set has 50,000 and 10,000 images" in summary


# ---- What is broken --------------------------------------------------------------------------------------------------


class _Call:
    def __reduce__(self) -> tuple:
        return os.system, ("touch called",)


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _changed(root: Path, name: str, content: bytes | None) -> Path:
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_bytes(content)
    return root


def _binary(folder: Path) -> Path:
    return cifar_binary(folder, train=TRAIN, test=TEST)


def _python(folder: Path) -> Path:
    return cifar_python(folder, train=TRAIN, test=TEST)


def _parquet(folder: Path) -> Path:
    return cifar_parquet(folder, train=TRAIN, test=TEST)


def _table(**columns: list) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def _tiny(folder: Path) -> Path:
    return tiny_imagenet(folder, train=pictures(10, 64, 0), test=pictures(5, 64, 1))


ROW = bytes(3074)
BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an archive cut off": (lambda t: _cut(tarred(_binary(t))), "cifar-100-binary.tar.gz is damaged, cut off"),
    "a zip archive cut off": (lambda t: _cut(zipped(_tiny(t))), "tiny-imagenet-200.zip is damaged, cut off"),
    "a page in place of an archive": (
        lambda t: _changed(t, "cifar-100-python.tar.gz", b"<html>404</html>") / "cifar-100-python.tar.gz",
        "cifar-100-python.tar.gz is damaged, cut off",
    ),
    "a part of a row": (lambda t: _changed(_binary(t), "train.bin", ROW[:-5]), "train.bin is damaged, cut off or some"),
    "no rows": (lambda t: _changed(_binary(t), "test.bin", b""), "has 0 test images"),
    "a class that is not there": (
        lambda t: _changed(_binary(t), "test.bin", b"\x00\x07" + ROW[2:]), "a test label 7, and classes from 0 to 4"
    ),
    "no class names": (lambda t: _changed(_binary(t), "fine_label_names.txt", None), "no fine_label_names.txt"),
    "no test images": (lambda t: _changed(_binary(t), "test.bin", None), "holds no CIFAR-100"),
    "a pickle cut off": (lambda t: _changed(_python(t), "train", (t / "cifar-100-python/train").read_bytes()[:999]),
                         "cifar-100-python: train is damaged"),
    "a pickle that calls": (
        lambda t: _changed(_python(t), "test", pickle.dumps({"data": _Call()})), "it asks for posix.system"
    ),
    "a pickle of something else": (lambda t: _changed(_python(t), "meta", python2_pickle([1])), "meta is damaged"),
    "pixels of another shape": (
        lambda t: _changed(_python(t), "test", pickle.dumps({"data": np.zeros((2, 9)), "fine_labels": [0, 0]})),
        "test is damaged, cut off or something else (it holds no rows of 3072 bytes)",
    ),
    "labels that are too few": (
        lambda t: _changed(
            _python(t), "test", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]})
        ),
        "has 2 test images and 1 labels",
    ),
    "parquet cut off": (
        lambda t: _changed(_parquet(t), "test-00000-of-00001.parquet", b"PAR1 and no more"), "00001.parquet is damaged"
    ),
    "no annotations": (lambda t: _changed(_tiny(t), "val/val_annotations.txt", None), "holds no TinyImageNet"),
    "an image that is missing": (lambda t: _changed(_tiny(t), "val/images/val_3.JPEG", None), "val_3.JPEG is missing"),
    "an image that is none": (
        lambda t: _changed(_tiny(t), "val/images/val_2.JPEG", b"no image"), "val_2.JPEG is damaged, cut off or some"
    ),
    "an image of another size": (
        lambda t: _changed(_tiny(t), "val/images/val_2.JPEG", encoded(pictures(1, 32, 0)[0][0], "JPEG")),
        "val_2.JPEG has 32 x 32 pixels",
    ),
    "a class that is not listed": (
        lambda t: _changed(_tiny(t), "wnids.txt", b"n00000007\nn00000014\n"), "which wnids.txt has not"
    ),
    "class names that are no text": (
        lambda t: _changed(_binary(t), "fine_label_names.txt", b"\xff\xfe"), "fine_label_names.txt is damaged"
    ),
    "annotations that are no text": (
        lambda t: _changed(_tiny(t), "val/val_annotations.txt", b"\xff\xfe"), "val/val_annotations.txt is damaged"
    ),
    "class names that are a number": (
        lambda t: _changed(_python(t), "meta", python2_pickle({"fine_label_names": 3})), "meta is damaged"
    ),
    "labels that are no numbers": (
        lambda t: _changed(
            _python(t), "test", pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": ["apple"]})
        ),
        "its labels are no whole numbers",
    ),
    "labels that are fractions": (
        lambda t: _changed(
            _python(t), "test", pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [0.5]})
        ),
        "its labels are no whole numbers",
    ),
    "parquet of something else": (
        lambda t: _changed(_parquet(t), "test-00000-of-00001.parquet", _table(img=["a"], label=[1])),
        "test-00000-of-00001.parquet is damaged",
    ),
    "a shard that is missing": (
        lambda t: _changed(_parquet(t), "train-00001-of-00002.parquet", None), "has 1 of the 2 train files"
    ),
    "two sets of shards": (lambda t: (_parquet(t / "a"), _parquet(t / "b"), t)[2], "train files in several folders"),
    "a name that is too long": (lambda t: t / ("x" * 300), "cannot be looked into (File name too long)"),
    "an empty folder": (lambda t: (t / "nothing").mkdir() or t / "nothing", "holds no CIFAR-100: give --data"),  # type: ignore[func-returns-value]
    "nothing": (lambda t: t / "nowhere", "is not there: fetch CIFAR-100 as cifar-100-binary.tar.gz"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_said_in_one_sentence(what: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, sentence = BROKEN[what]
    path = make(tmp_path)
    name = "tiny-imagenet" if "tiny" in str(path) else "cifar100"
    with pytest.raises(UserError) as raised:
        load(name, path, quiet=True)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "called").exists()


def test_archives_are_found_under_their_published_names_and_no_others(tmp_path: Path) -> None:
    archive = tarred(_binary(tmp_path))
    shutil.rmtree(tmp_path / "cifar-100-binary")
    assert len(load("cifar100", tmp_path, True).test.labels) == 12
    archive.rename(tmp_path / "mine.tar.gz")
    with pytest.raises(UserError, match="holds no CIFAR-100"):
        load("cifar100", tmp_path, True)
    assert len(load("cifar100", tmp_path / "mine.tar.gz", True).test.labels) == 12
    assert [published.title for published in DATASETS.values()] == ["CIFAR-100", "TinyImageNet"]
