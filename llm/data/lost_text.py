"""Characters of a text that its ids do not hold.

    texts  ->  CountingEncoder  ->  ids, and a `LostText` that grows

A character is lost where no id comes from it, or where the unknown token stands for it. White space is left out of the
count: tokenizers that cut text into words say by the cut where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from .tokenizer import encode_documents

LIMIT = 0.01  # of the characters; more is an error
DROPPED = "\ufdd0"  # the unknown token of the twin: no character of Unicode's
AROUND = 12  # characters of text on either side in the example
SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()])  # there are none beyond
# Normalizers and pre-tokenizers that drop no character, by the names that `tokenizers` gives them.
LOSSLESS = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel", "Replace", "Digits", "Metaspace",
    "UnicodeScripts", "Split", "Punctuation",
}  # fmt: skip


@dataclass
class LostText:
    """How much of a text its ids do not hold.

    characters        of the text, white space left out; 0 where the tokenizer can lose none
    untraced          of those, the ones from which no id comes
    unknown           of those, the ones that the unknown token stands for
    unknown_tokens    in the ids
    example           the first of either, in its place
    """

    characters: int = 0
    untraced: int = 0
    unknown: int = 0
    unknown_tokens: int = 0
    example: str = ""

    def add(self, other: LostText) -> None:
        """Count what `other` has counted, too."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) or value if name == "example" else getattr(self, name) + value)

    @property
    def share(self) -> float:
        """Lost characters / characters."""
        return (self.untraced + self.unknown) / max(1, self.characters)

    def __str__(self) -> str:
        """Say it in words; nothing where nothing is lost."""
        parts = []
        if self.untraced:
            parts.append(
                f"{self.untraced:,} characters ({self.untraced / self.characters:.2%}) leave no trace in the ids"
            )
        if self.unknown_tokens:
            share = self.unknown / self.characters
            parts.append(f"{self.unknown_tokens:,} unknown tokens stand for {self.unknown:,} characters ({share:.2%})")
        return " and ".join(parts) + f", as in {self.example!r}" if parts else ""


def total(counted: Iterable[dict[str, Any]]) -> LostText:
    """Add up counts in the form that manifests have, that of `asdict`; an older manifest has none."""
    found = LostText()
    for each in counted:
        found.add(LostText(**each))
    return found


class CountingEncoder:
    """Encodes as `encode_documents` does, and counts what is lost.

    Places of ids in the text cost four times as much as the ids. They are asked for only where a text has an unknown
    token, or a character that leaves no id when it stands alone. A BPE model without an unknown token drops characters
    and then tells wrong places for the others of the word: a twin that has one is asked.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = self.counter = tokenizer
        whole = json.loads(tokenizer.to_str())
        model = whole["model"]
        steps = [*_steps(whole["normalizer"]), *_steps(whole["pre_tokenizer"])]
        self.can_lose, self.unknown = _can_lose(tokenizer, steps, model), _unknown_id(tokenizer, model)
        self.by_character = not any(_drops_patterns(step) for step in steps)
        self.plain: set[str] = set()  # characters that leave a known id when they stand alone
        self.drops = model["type"] == "BPE" and model["unk_token"] is None
        if self.can_lose and self.drops:
            self.unknown = max(tokenizer.get_vocab().values()) + 1
            model |= {"unk_token": DROPPED, "fuse_unk": False, "vocab": model["vocab"] | {DROPPED: self.unknown}}
            self.counter = Tokenizer.from_str(json.dumps(whole))

    def encode(self, texts: Sequence[str], lost: LostText) -> list[list[int]]:
        """Ids of each text; what is lost is added to `lost`."""
        encoded = encode_documents(self.tokenizer, texts)
        for text, ids in zip(texts, encoded, strict=True) if self.can_lose else ():
            if self.by_character and self._is_plain(text) and self.unknown not in ids:
                lost.characters += sum(map(len, text.split()))
            else:
                lost.add(self._placed(text))
        return encoded

    def _is_plain(self, text: str) -> bool:
        """Whether each character of `text` leaves a known id when it stands alone."""
        for mark in set(text) - self.plain:
            if mark.isspace() or not (alone := self._placed(mark)).untraced + alone.unknown:
                self.plain.add(mark)
        return self.plain.issuperset(text)

    def _placed(self, text: str) -> LostText:
        """Count one text by the places of its ids."""
        self.counter.encode_special_tokens = True
        encoding = self.counter.encode(text, add_special_tokens=False)
        return self._counted(text, np.array(encoding.ids), np.array(encoding.offsets, np.int64).reshape(-1, 2))

    def _counted(self, text: str, ids: np.ndarray, offsets: np.ndarray) -> LostText:
        """Count one text, whose ids (n,) come from the characters [start, end) of `offsets` (n, 2)."""
        visible = ~np.isin(np.frombuffer(text.encode("utf-32-le"), np.uint32), SPACES)
        is_unknown = np.zeros(len(ids), bool) if self.unknown is None else ids == self.unknown
        known = _covered(offsets[~is_unknown], len(text))
        unknown = _covered(offsets[is_unknown], len(text)) & ~known & visible
        if self.drops:
            unknown[:] = False
        untraced = visible & ~known & ~unknown
        places = np.flatnonzero(untraced | unknown)
        return LostText(
            characters=int(visible.sum()),
            untraced=int(untraced.sum()),
            unknown=int(unknown.sum()),
            unknown_tokens=0 if self.drops else int(is_unknown.sum()),
            example=text[max(0, int(places[0]) - AROUND) : int(places[0]) + AROUND] if places.size else "",
        )


def _can_lose(tokenizer: Tokenizer, steps: Sequence[dict[str, Any]], model: dict[str, Any]) -> bool:
    """Whether there may be a text that `tokenizer` loses a character of: False where every byte has an id."""
    if any(step["type"] not in LOSSLESS or _drops_patterns(step) for step in steps):
        return True
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if any(step["type"] == "ByteLevel" for step in steps):
        return not set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys()
    return not (model.get("byte_fallback") and {f"<0x{byte:02X}>" for byte in range(256)} <= vocabulary.keys())


def _drops_patterns(step: dict[str, Any]) -> bool:
    """Whether a step may drop what several characters make up, of which each alone would stay."""
    return step.get("behavior") == "Removed" or (step["type"] == "Replace" and not step["content"])


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The normalizers or pre-tokenizers of a tokenizer.json, those of a sequence one by one."""
    if step is None:
        return
    below = step.get("normalizers") or step.get("pretokenizers")
    if below is None:
        yield step
    else:
        for each in below:
            yield from _steps(each)


def _unknown_id(tokenizer: Tokenizer, model: dict[str, Any]) -> int | None:
    """The id of the unknown token; None where the model has none."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    return None if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])


def _covered(offsets: np.ndarray, length: int) -> np.ndarray:
    """Which of `length` characters lie in one of the ranges [start, end): (length,) bool."""
    change = np.zeros(length + 1, np.int64)
    np.add.at(change, offsets[:, 0], 1)
    np.add.at(change, offsets[:, 1], -1)
    return np.cumsum(change)[:-1] > 0
