"""What all tests share: threads, a small story store, and a tiny training run on it."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported: two test processes share two cores, and OpenMP threads that spin for each other's core
# make both ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell without job control starts what it puts in the background with SIGINT ignored; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
import yaml

from llm.cli import main

from . import signatures as signatures  # which it makes quicker to read
from .real_data import need
from .train.preloaded import end_all

hypothesis.settings.register_profile("shared", deadline=None)  # the cores are shared: no example is timed
hypothesis.settings.load_profile("shared")


# Folders and files whose tests take longest, the longest first: what begins last should be short, so that two workers
# end together.
LONGEST = ("test_kills.py", "test_ranks.py", "test_nemotron.py", "bench", "plan", "train", "small")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        parts = item.path.relative_to(Path(__file__).parent).parts
        return next((n for n, name in enumerate(LONGEST) if name in parts), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs on this machine is not part of a test."""
    monkeypatch.setattr("llm.common.threads._machine_seconds", lambda: None)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; skips without it."""
    return need()


@pytest.fixture(scope="session")
def story_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store of 400 built-in stories with a vocabulary of about 500."""
    store = tmp_path_factory.mktemp("stories") / "store"
    words = ["prepare", "stories", "--documents", "400", "--train-tokenizer", "512", "--workers", "1"]
    assert main([*words, "--out", str(store)]) == 0
    return store


@pytest.fixture
def tiny_config(story_store: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of a tiny run; keyword arguments with __ for dots override it: tiny_config(data__context=16)."""

    def write(**overrides: object) -> Path:
        config: dict = {
            "seed_everything": 3,
            "decoder": {
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32,
                "stream": ["values"],
            },
            "model": {
                "optimizer": {"lr": 3e-3},
                "schedule": {"warmup_steps": 1, "cooldown_steps": 1},
            },
            "data": {
                "store": str(story_store),
                "context": 32,
                "batch_size": 8,
                "validate_every": 10,
                "validation_rows": 16,
            },
            "trainer": {"max_steps": 20, "accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1},
            "run": {"folder": str(tmp_path / "run"), "checkpoint_every": 5},
        }
        for dotted, value in overrides.items():
            place = config
            *parents, last = dotted.split("__")
            for name in parents:
                place = place[name]
            place[last] = value
        path = tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write
