"""An exported folder: checked before anything is loaded, then the model in it, and the results kept beside it.

A folder written by `python -m llm export RUN --out OUT` and any other transformers folder of a causal language model
are read alike; the first also says in `hippoformer.json` which run, step and seed it came from. torch and transformers
are imported where a model is loaded, so that a command that only reads results starts at once. Whose code a folder runs
is decided in `llm.pretrained`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm.common.devices import resolve_device, versions
from llm.common.errors import UserError
from llm.common.exported import read_card, weight_files, weights_sha256
from llm.common.files import read_json

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Export:
    """A folder that holds a model, and what `hippoformer.json` says of it (empty for a model from elsewhere).

    `trusted`: code of the folder's own may run (--trust-remote-code).
    """

    folder: Path
    info: dict[str, Any]
    trusted: bool = False

    @property
    def name(self) -> str:
        """The run's name where there is one, else the folder's."""
        return str(self.info.get("run", self.folder.name))

    @property
    def results(self) -> Path:
        """The folder of this model's evaluations."""
        return self.folder / "evals"

    def weights_sha256(self) -> str:
        """Of the weights that are in the folder now, whatever hippoformer.json says of them."""
        return weights_sha256(self.folder)

    def config(self) -> Any:
        """The configuration of the model; no weight is read. UserError: as `llm.pretrained.load_config`."""
        from llm.pretrained import load_config

        return load_config(self.folder, self.trusted)

    def tokenizer(self) -> Any:
        """The tokenizer. UserError: as `llm.pretrained.load_tokenizer`."""
        from llm.pretrained import load_tokenizer

        return load_tokenizer(self.folder, self.trusted)

    def result(self, name: str, absent: Any = None) -> Any:
        """The content of EXPORT/evals/`name`.json, or `absent` where that was never written.

        UserError: it is no object, or list of objects; or no list where `absent` is one.
        """
        path = self.results / f"{name}.json"
        if not path.is_file():
            return absent
        content = read_json(path)
        rows = content if isinstance(content, list) else [content]
        whole = all(isinstance(row, dict) and row for row in rows) and (rows or isinstance(absent, list))
        if not whole or (isinstance(absent, list) and rows is not content):
            raise UserError(f"{path} is damaged; delete it and measure again")
        return content


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer; `device` and `dtype` are recorded with every result."""

    export: Export
    model: Any
    tokenizer: Any

    @property
    def device(self) -> str:
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def open_export(folder: str | Path, trusted: bool = False) -> Export:
    """The exported folder at `folder`, refused with a UserError where it cannot hold a model. Loads nothing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: make it with `python -m llm export RUN --out {folder}`")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: make it with `python -m llm export RUN --out OUT`")
    if not weight_files(folder):
        raise UserError(
            f"{folder} has no weights (*.safetensors): make it again with `python -m llm export RUN --out OUT`"
        )
    return Export(folder, read_card(folder), trusted)


def check_tokenizer(export: Export) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for, before any weight is read.

    An id beyond the embedding is an index error on a CPU and a corrupted context on a GPU.
    """
    from llm.pretrained import vocabulary

    tokenizer, known = export.tokenizer(), vocabulary(export.config())
    ids = max(tokenizer.get_vocab().values()) + 1
    if ids > known:
        raise UserError(
            f"{export.folder}: the tokenizer has {ids:,} ids and the model {known:,}; "
            "put the tokenizer in the folder that the model was trained with"
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"{export.folder}: the tokenizer names neither a bos_token nor an eos_token; name one of them")


def load_model(
    export: Export,
    device: str = "auto",
    dtype: str = "auto",
    attn_implementation: str | None = None,
    changes: dict[str, Any] | None = None,
) -> LoadedModel:
    """The model of an exported folder on `device`, in evaluation mode, with its tokenizer.

    `device`: `auto` (a GPU where there is one) or a torch device; `dtype`: `auto` (the folder's) or another of DTYPES;
    `attn_implementation`: transformers' choice where None; `eager` alone shows the weights of attention; `changes`: of
    the folder's configuration.
    UserError: as `llm.pretrained.load_model`.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from llm import pretrained

    disable_progress_bar()  # of reading weights: a line for each model, within the bar of what is measured
    target = resolve_device(device)
    check_tokenizer(export)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = pretrained.load_model(
        export.folder, export.trusted, changes, dtype=kind, attn_implementation=attn_implementation
    )
    if hasattr(model, "enable_fast_paths"):  # one of ours
        model.enable_fast_paths()
    return LoadedModel(export, model.to(target), export.tokenizer())


class NotNumbersError(UserError):
    """A model's outputs are no numbers: nothing can be measured of it."""


ROUNDING = 1e-3  # nats: by so much a log-likelihood may lie above 0


def called(model: Any) -> str:
    """What a message calls a model: its folder, and the precision it computes in."""
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return f"{name} in {str(getattr(model, 'dtype', 'its precision')).removeprefix('torch.')}"


def check_numbers(values: Any, what: str, most: float = math.inf) -> None:
    """Refuse a measurement that holds NaN, an infinity or anything above `most`.

    Every measure goes through here: an accuracy of NaN log-likelihoods is the share of items whose first choice is
    right. Args: `values`, numbers of any shape; `what`, the model and what was measured of it.
    """
    array = np.asarray(values, dtype=np.float64)
    wrong = array[~(np.isfinite(array) & (array <= most))]
    if wrong.size:
        raise NotNumbersError(
            f"{what}: {wrong.size:,} of {array.size:,} values are impossible (the first is {wrong[0]:g}): give --dtype "
            "float32, or export the model again"
        )


def facts(loaded: LoadedModel) -> dict[str, Any]:
    """What is recorded with every result: the model, where and in which precision it ran, and the libraries."""
    return {
        "model": {"folder": loaded.export.folder.name, **loaded.export.info},
        "weights_sha256": loaded.export.weights_sha256(),
        "dtype": loaded.dtype,
        "device": loaded.device,
        "versions": versions(),
    }
