"""A tiny study on the built-in stories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..train.runs import Config

Study = Callable[..., Path]


@pytest.fixture
def tiny_study(tiny_config: Config, tmp_path: Path) -> Study:
    """Writes the YAML of a study whose runs take a second; keyword arguments replace its keys, None removes one."""

    def write(name: str = "study", **changes: Any) -> Path:
        base = tiny_config(
            decoder__stream=[],
            model__schedule={"warmup_steps": 1},
            run__checkpoint_every=2,
            run__loggers=["csv"],
        ).rename(tmp_path / f"{name}-base.yaml")
        content = {
            "base": str(base),
            "folder": str(tmp_path / name),
            "baseline": "classic",
            "arms": {"classic": {}, "values": {"decoder.stream": ["values"]}},
            "sizes": {"small": {}, "large": {"decoder.hidden_size": 40}},
            "tokens": {"absolute": [2560, 5120], "cooldown": 0.3},  # 10 and 20 steps
        }
        content = {key: value for key, value in (content | changes).items() if value is not None}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write
