"""Rows that are made here and not fetched: the `stories` task, and the documents of texts and token stores."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.common.errors import UserError
from llm.data.preparation.documents import BadDocuments
from llm.data.preparation.sources import open_sources
from llm.data.store import TokenStore
from llm.data.stories import choice_items

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # by split

# `stories`: seeds of its few-shot pool and of its evaluated items, and how many of each are made.
STORIES = {"train": (1_000_003, 200), "validation": (2_000_003, 1_000)}


def story_rows() -> Rows:
    """Both splits of `stories`; an example whose beginning is also evaluated is left out."""
    evaluated = list(choice_items(*STORIES["validation"]))
    seen = {item["ctx"] for item in evaluated}
    return {
        "train": [item for item in choice_items(*STORIES["train"]) if item["ctx"] not in seen],
        "validation": evaluated,
    }


def text_rows(path: Path, limit: int | None) -> Rows:
    """The first `limit` documents (None: all) of a token store's validation split, or of what `prepare` takes as text.

    UserError: a form of file that `prepare` does not know, a broken line, no text at all.
    """
    documents = _of_store(path) if (path / "store.json").is_file() else _of_files(path)
    rows = [{"text": text} for text, _ in zip(documents, range(limit) if limit else iter(int, 1), strict=False)]
    if not rows:
        raise UserError(f"{path} holds no document with any text; name another")
    return {"test": rows}


def _of_store(path: Path) -> Iterator[str]:
    store = TokenStore.open(path, "validation")
    tokenizer, marks = store.tokenizer(), {store.end_of_document, store.begin_of_document}
    for index in range(store.documents):
        ids = [int(token) for token in store.document_tokens(index) if token not in marks]
        if text := str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)):
            yield text


def _of_files(path: Path) -> Iterator[str]:
    for source in open_sources([str(path)]):
        yield from (document.text for document in source.documents(BadDocuments()) if document.text)
