"""What the tests of `prepare` share: sources, what is in a store, the processes of a run."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from llm.data.store import TokenStore

SPLITS = ("train", "validation")


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def plain_ids(folder, text):
    """The ids of a text by the saved tokenizer, as `tokenizers` gives them one text at a time."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def documents_of(path, split):
    store = TokenStore.open(path, split)
    return [store.document_tokens(index).tolist() for index in range(store.documents)]


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def children(process):
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # no /proc
        return []


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
