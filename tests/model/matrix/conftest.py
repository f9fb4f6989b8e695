"""One folder for each kind of model, with a name that no Python module could have, loaded as a stranger would."""

import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.exported import byte_tokenizer

from .kinds import KINDS, Load


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported folders by kind."""
    root = tmp_path_factory.mktemp("kinds")
    found = {}
    for kind, make in KINDS.items():
        found[kind] = root / kind / "lr=1e-3"
        make().save_pretrained(found[kind])
        byte_tokenizer().save_pretrained(found[kind])
    return found


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, PreTrainedModel]:
    found = {}
    for kind, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers") and not type(model).__module__.startswith("llm")
        model.generation_config.eos_token_id = None  # every generation is as long as was asked for
        found[kind] = model
    return found


@pytest.fixture
def load(loaded: dict[str, PreTrainedModel]) -> Load:
    return lambda kind: deepcopy(loaded[kind]).eval()


@pytest.fixture(scope="session")
def torchao() -> Iterator[None]:
    """torchao, which has a folder of its own: where it can be imported, transformers does so in every process, which
    takes a second and prints four lines."""
    folder = Path(sys.prefix, "torchao")
    if not folder.exists():
        pytest.skip(f"torchao is not in {folder}: run make test")
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))
