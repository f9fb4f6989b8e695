"""Stores written with numpy alone, and what is in them, worked out the plain way."""

import hashlib
import json
import random
from dataclasses import asdict

import numpy as np

from llm.data.shard import Manifest, token_dtype
from llm.data.store_index import write_index
from llm.data.tokenizer import tokenizer_fingerprint

END = 0  # the end-of-document id of the small BPE
BEGIN = 399  # an id that no document here holds


def write_store(path, shards, vocab_size=400, tokenizer=None, validation=(), begin=None):
    """A store written with numpy alone. `shards` holds lists of documents, each a list of ids without begin and end."""
    first = [] if begin is None else [begin]
    manifests = {}
    for split, contents in (("train", shards), ("validation", validation)):
        folder = path / split
        folder.mkdir(parents=True)
        manifests[split] = []
        for number, documents in enumerate(contents):
            name = f"{number:05d}-part"
            ids = np.array([i for document in documents for i in [*first, *document, END]], token_dtype(vocab_size))
            ends = np.cumsum([len(first) + len(document) + 1 for document in documents], dtype="<u8")
            ids.tofile(folder / f"{name}.tokens")
            ends.tofile(folder / f"{name}.ends")
            manifest = Manifest(
                name=name,
                split=split,
                source={"location": "by hand", "size": 0, "sha256": ""},
                documents_in=len(documents),
                documents=len(documents),
                left_out={},
                bad=[],
                tokens=len(ids),
                bytes_in=0,
                bytes_out=ids.nbytes,
                sha256={
                    k: hashlib.sha256((folder / f"{name}.{k}").read_bytes()).hexdigest() for k in ("tokens", "ends")
                },
                dtype=ids.dtype.name,
                tokenizer_fingerprint="",
                versions={},
            )
            (folder / f"{name}.json").write_text(json.dumps(asdict(manifest)))
            manifests[split].append(manifest)
    fingerprint = "none"
    if tokenizer is not None:
        tokenizer.save_pretrained(path / "tokenizer")
        fingerprint = tokenizer_fingerprint(tokenizer)
    write_index(
        path,
        manifests,
        vocab_size=vocab_size,
        end_of_document=END,
        begin_of_document=begin,
        tokenizer_fingerprint=fingerprint,
    )
    return path


def some_shards(count=7, seed=0):
    draw = random.Random(seed)
    return [
        [[draw.randrange(1, BEGIN) for _ in range(draw.randrange(40))] for _ in range(draw.randrange(30))]
        for _ in range(count)
    ]


def joined(shards):
    """All ids in one row and the end of each document in it, the plain way."""
    ids, ends = [], []
    for documents in shards:
        for document in documents:
            ids += [*document, END]
            ends.append(len(ids))
    return np.array(ids, np.int64), np.array(ends, np.int64)
