"""An exported folder: checked before anything is loaded, then the model in it, and the results kept beside it.

A folder written by `python -m llm export RUN OUT` and any other transformers folder of a causal language model are
read alike; the first also says in `hippoformer.json` which run, step and seed it came from. torch and transformers are
imported where a model is loaded, so that a command that only reads results starts at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.common.devices import resolve_device, versions
from llm.common.errors import UserError
from llm.common.files import first_line, read_json

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Export:
    """A folder that holds a model, and what `hippoformer.json` says of it (empty for a model from elsewhere)."""

    folder: Path
    info: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's name where there is one, else the folder's."""
        return str(self.info.get("run", self.folder.name))

    @property
    def results(self) -> Path:
        """The folder of this model's evaluations."""
        return self.folder / "evals"

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


def open_export(folder: str | Path) -> Export:
    """The exported folder at `folder`, refused with a UserError where it cannot hold a model. Loads nothing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: make it with `python -m llm export RUN {folder}`")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: make it with `python -m llm export RUN OUT`")
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise UserError(f"{folder} has no weights (*.safetensors): make it again with `python -m llm export RUN OUT`")
    card = folder / "hippoformer.json"
    info = read_json(card) if card.is_file() else {}
    if not isinstance(info, dict):
        raise UserError(f"{card} is damaged; make the folder again with `python -m llm export RUN OUT`")
    return Export(folder, info)


def check_tokenizer(export: Export) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for, before any weight is read.

    An id beyond the embedding is an index error on a CPU and a corrupted context on a GPU.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(export.folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(export.folder, trust_remote_code=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{export.folder} is not a transformers folder with a tokenizer: {first_line(error)}"
        ) from error
    ids = max(tokenizer.get_vocab().values()) + 1
    known = getattr(config, "unpadded_vocab_size", config.vocab_size)  # ours; others do not tell padded rows apart
    if ids > known:
        raise UserError(
            f"{export.folder}: the tokenizer has {ids:,} ids and the model {known:,}; "
            "put the tokenizer in the folder that the model was trained with"
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"{export.folder}: the tokenizer names neither a bos_token nor an eos_token; name one of them")


def load_model(
    export: Export, device: str = "auto", dtype: str = "auto", attn_implementation: str | None = None
) -> LoadedModel:
    """The model of an exported folder on `device`, in evaluation mode, with its tokenizer.

    `device`: `auto` (a GPU where there is one) or a torch device; `dtype`: `auto` (the folder's) or another of DTYPES;
    `attn_implementation`: transformers' choice where None; `eager` alone shows the weights of attention.
    A weight that the folder lacks is a UserError: transformers would fill it with random numbers and go on.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading weights: a line for each model, within the bar of what is measured
    target = resolve_device(device)
    check_tokenizer(export)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            export.folder,
            trust_remote_code=True,
            dtype=kind,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    except Exception as error:  # the folder's own code and safetensors raise whatever they like
        raise UserError(f"{export.folder} does not load as a causal model: {first_line(error)}") from error
    model, report = loaded
    if lacking := [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]:
        raise UserError(
            f"{export.folder} lacks {len(lacking)} of the model's weights (the first: {sorted(lacking)[0]}); "
            "export it again"
        )
    if hasattr(model, "enable_fast_paths"):  # one of ours
        model.enable_fast_paths()
    tokenizer = AutoTokenizer.from_pretrained(export.folder, trust_remote_code=True)
    return LoadedModel(export, model.to(target).eval(), tokenizer)


def facts(loaded: LoadedModel) -> dict[str, Any]:
    """What is recorded with every result: the model, where and in which precision it ran, and the libraries."""
    return {
        "model": {"folder": loaded.export.folder.name, **loaded.export.info},
        "dtype": loaded.dtype,
        "device": loaded.device,
        "versions": versions(),
    }
