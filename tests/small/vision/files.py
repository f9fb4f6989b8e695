"""Small data sets in exactly the files in which CIFAR-100 and TinyImageNet are published, written without `small`."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ("apple", "bee", "cup", "dolphin", "elm")


def pictures(count: int, side: int, seed: int, classes: int = len(NAMES)) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (count, 3, side, side) uint8 and labels; a class is a colour and a stripe, with noise."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(count) % classes)
    pixels = draw.normal(110, 25, (count, 3, side, side))
    for number, label in enumerate(labels):
        pixels[number, label % 3] += 60
        pixels[number, :, :, label * side // classes : (label + 1) * side // classes] += 70
    return pixels.clip(0, 255).astype(np.uint8), labels


def cifar_binary(folder: Path, **splits: tuple[np.ndarray, np.ndarray]) -> Path:
    """cifar-100-binary: rows of a coarse label, a fine label and three planes."""
    root = folder / "cifar-100-binary"
    root.mkdir(parents=True)
    for split, (pixels, labels) in splits.items():
        rows = [bytes([label // 2, label]) + image.tobytes() for image, label in zip(pixels, labels, strict=True)]
        (root / f"{split}.bin").write_bytes(b"".join(rows))
    (root / "fine_label_names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (root / "coarse_label_names.txt").write_text("things\nothers\nlast\n")
    (root / "readme.html").write_text("<html></html>")
    return root


class _Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes str as Python 2 did: the opcode of a byte string."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, text: str | bytes) -> None:
        content = text.encode("latin1") if isinstance(text, str) else text
        if len(content) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) + content)
        else:
            self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(text)

    def save_number(self, truth: bool) -> None:
        self.write(pickle.BININT1 + bytes([truth]))  # dtype("u1", 0, 1)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[bool] = save_number


def python2_pickle(content: object) -> bytes:
    """A pickle as NumPy 1 under Python 2 wrote it."""
    file = io.BytesIO()
    _Python2(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_python(folder: Path, **splits: tuple[np.ndarray, np.ndarray]) -> Path:
    """cifar-100-python: pickled dictionaries."""
    root = folder / "cifar-100-python"
    root.mkdir(parents=True)
    for split, (pixels, labels) in splits.items():
        content = {
            "filenames": [f"image_s_{n:06d}.png" for n in range(len(labels))],
            "batch_label": f"{split}ing batch 1 of 1",
            "fine_labels": [int(label) for label in labels],
            "coarse_labels": [int(label) // 2 for label in labels],
            "data": pixels.reshape(len(pixels), -1),
        }
        (root / split).write_bytes(python2_pickle(content))
    meta = {"fine_label_names": list(NAMES), "coarse_label_names": ["things", "others", "last"]}
    (root / "meta").write_bytes(python2_pickle(meta))
    (root / "file.txt~").write_bytes(b"")
    return root


def cifar_parquet(folder: Path, named: bool = True, **splits: tuple[np.ndarray, np.ndarray]) -> Path:
    """The layout of the hub: a struct of PNG bytes and path, and class names in the schema."""
    root = folder / "cifar100"
    root.mkdir(parents=True)
    features = {"fine_label": {"names": list(NAMES), "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})} if named else None
    for split, (pixels, labels) in splits.items():
        shards = 2 if split == "train" else 1
        for shard, rows in enumerate(np.array_split(np.arange(len(labels)), shards)):
            table = pa.table(
                {
                    "img": [{"bytes": encoded(pixels[row], "PNG"), "path": None} for row in rows],
                    "fine_label": pa.array(labels[rows], pa.int64()),
                    "coarse_label": pa.array(labels[rows] // 2, pa.int64()),
                }
            ).replace_schema_metadata(about)
            pq.write_table(table, root / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    return root


def tiny_imagenet(folder: Path, **splits: tuple[np.ndarray, np.ndarray]) -> Path:
    """tiny-imagenet-200: train and val; its test images are there without labels."""
    root = folder / "tiny-imagenet-200"
    wnids = [f"n{7 * (5 - n):08d}" for n in range(5)]  # wnids.txt is in no order
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (root / "words.txt").write_text(
        "".join(f"{wnid}\t{name}, of a kind\n" for wnid, name in zip(wnids, NAMES, strict=True))
    )
    pixels, labels = splits["train"]
    counts = dict.fromkeys(wnids, 0)
    for image, label in zip(pixels, labels, strict=True):
        wnid = wnids[label]
        place = root / "train" / wnid / "images"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{wnid}_{counts[wnid]}.JPEG").write_bytes(encoded(image, "JPEG"))
        counts[wnid] += 1
    for wnid, count in counts.items():
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n" * count)
    lines = []
    for number, (image, label) in enumerate(zip(*splits["test"], strict=True)):
        (root / "val" / "images" / f"val_{number}.JPEG").write_bytes(encoded(image, "JPEG"))
        lines.append(f"val_{number}.JPEG\t{wnids[label]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "test" / "images" / "test_0.JPEG").write_bytes(encoded(pixels[0], "JPEG"))
    return root


def encoded(image: np.ndarray, kind: str) -> bytes:
    """(3, side, side) as a file; one of a single plane's values as a grey one."""
    content = io.BytesIO()
    grey = (image == image[:1]).all()
    picture = Image.fromarray(image[0]) if grey else Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    picture.save(content, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return content.getvalue()


def tarred(root: Path) -> Path:
    """The folder as ROOT.tar.gz beside it."""
    path = root.parent / f"{root.name}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(root, root.name)
    return path


def zipped(root: Path) -> Path:
    """The folder as ROOT.zip beside it."""
    path = root.parent / f"{root.name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root.parent))
    return path
