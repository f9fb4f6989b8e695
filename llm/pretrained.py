"""A folder that transformers loads, an export of ours or another model's: whose code runs, and what is loaded.

config.json, tokenizer_config.json -> is there code of the folder's own? -> configuration, tokenizer, model

An export carries the files of `llm.model`. Where they are those of this version, our own classes are used and nothing
of the folder runs. Any other code runs only if the caller trusts it, as transformers and lm-eval have it. Its class is
then taken by the content of its files: transformers itself knows a model's class by the class of its configuration,
and two folders of one name could share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils.hub import HF_MODULES_CACHE

from .common.errors import UserError
from .common.exported import text_config
from .common.files import first_line, read_json
from .model import DecoderConfig, DecoderForCausalLM

CODE = Path(__file__).parent / "model"
# What an export of ours names in its auto_map.
CLASSES = {"config.DecoderConfig", "decoder.DecoderConfig", "decoder.Decoder", "decoder.DecoderForCausalLM"}
# `code_sha256` of the exports of released versions, whose weights today's classes load: 0.1.0.
RELEASED = {"dda4ef3a38aab4f6045bcf2c6f25c1e27de67e3ad01b2ec72f1e6ecd6189d0f5"}


def vocabulary(config: Any) -> int:
    """Return how many ids the model knows; the rows that only pad its embedding are not counted."""
    text = text_config(config)
    return int(getattr(text, "unpadded_vocab_size", None) or text.vocab_size)


# ---- Whose code ------------------------------------------------------------------------------------------------------


def code_sha256(folder: Path) -> str:
    """Return one sha256 of the Python files in a folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def foreign_code(folder: Path) -> list[str]:
    """Return what would have to run from the folder, or from the hub in its name, to load it: files or classes.

    Empty where transformers' classes or our own load it. UserError: a configuration that is no JSON object.
    """
    named = {name for file in ("config.json", "tokenizer_config.json") for name in _auto_map(folder / file)}
    if not named or _object(folder / "config.json").get("model_type") in CONFIG_MAPPING:  # transformers has its own
        return []
    if not named <= CLASSES or not _is_our_type(folder):
        return sorted(named - CLASSES) or sorted(named)
    if code_sha256(folder) in RELEASED:
        return []
    return [
        path.name
        for path in sorted(folder.glob("*.py"))
        if (CODE / path.name).is_file() and path.read_bytes() != (CODE / path.name).read_bytes()
    ]


def check_trusted(folder: Path, trusted: bool) -> None:
    """Raise a UserError where the folder has code of its own and the user does not trust it."""
    if not trusted and (foreign := foreign_code(folder)):
        some = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(
            f"{folder} would run code of its own, which is not this version's ({some}): read it, then pass "
            "--trust-remote-code if you trust whoever made it"
        )


def _auto_map(file: Path) -> Iterator[str]:
    """The classes that a configuration has transformers import; those of an old tokenizer are a bare list."""
    given = _object(file).get("auto_map") or {}
    for value in given.values() if isinstance(given, dict) else [given]:
        yield from (str(name) for name in (value if isinstance(value, list) else [value]) if name)


def _is_our_type(folder: Path) -> bool:
    return _object(folder / "config.json").get("model_type") == DecoderConfig.model_type


def _object(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: give the folder of a transformers model")
    return content


def _is_ours(folder: Path) -> bool:
    """Whether our own classes load the folder."""
    return _is_our_type(folder) and not foreign_code(folder)


# ---- Loading ---------------------------------------------------------------------------------------------------------


def load_config(folder: Path, trusted: bool = False) -> Any:
    """Return the folder's configuration. UserError: it cannot be read, or has code that is not `trusted`."""
    check_trusted(folder, trusted)
    with _loading(folder, "holds no configuration that transformers reads"):
        if _is_ours(folder):
            return DecoderConfig.from_pretrained(folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=trusted)


def load_tokenizer(folder: Path, trusted: bool = False) -> Any:
    """Return the folder's tokenizer. UserError: as `load_config`."""
    config = load_config(folder, trusted)
    with _loading(folder, "is not a transformers folder with a tokenizer"):
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trusted)


def load_model(folder: Path, trusted: bool = False, changes: dict[str, Any] | None = None, **how: Any) -> Any:
    """Return the folder's causal language model in evaluation mode; `how` is for `from_pretrained`.

    `changes`: keys of the configuration whose values are not the folder's.

    UserError: as `load_config`, or a weight is missing, which transformers would fill with random numbers.
    """
    config = load_config(folder, trusted)
    for key, value in (changes or {}).items():
        setattr(config, key, value)
    with _loading(folder, "does not load as a causal model"):
        model, report = _model_class(folder, config).from_pretrained(
            folder, config=config, output_loading_info=True, **how
        )
    if lacking := [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]:
        raise UserError(
            f"{folder} lacks {len(lacking)} of the model's weights (the first: {sorted(lacking)[0]}); export it again"
        )
    return model.eval()


def _model_class(folder: Path, config: Any) -> Any:
    if _is_ours(folder):
        return DecoderForCausalLM
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if not reference or type(config).__module__.startswith("transformers."):
        return AutoModelForCausalLM
    return add_generation_mixin_to_remote_model(get_class_from_dynamic_module(reference, folder))


@contextmanager
def _loading(folder: Path, problem: str) -> Iterator[None]:
    """Turn whatever transformers, safetensors and the folder's own code raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and _is_of_cache(error.filename):
            raise UserError(
                f"the code of {folder} cannot be copied to {HF_MODULES_CACHE} ({error.strerror}): set HF_MODULES_CACHE "
                "to a folder that can be written"
            ) from error
        raise UserError(f"{folder} {problem}: {first_line(error)}") from error


def _is_of_cache(path: Any) -> bool:
    """Whether a path is where transformers puts code that it imports, or a folder above."""
    cache = Path(HF_MODULES_CACHE)
    return path is not None and (Path(path) in [cache, *cache.parents] or cache in Path(path).parents)
