"""Every config loads, has the size it should have (on the meta device), and a pair differs where it says."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm.model import DecoderConfig, DecoderForCausalLM
from llm.train.optim import Schedule

FOLDER = Path(__file__).parents[1] / "configs"
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))


def llama_parameters(vocab: int, width: int, layers: int, ffn: int, key_values: int) -> int:
    """Tied embedding, q and o, k and v, three FFN matrices, two norms a layer and one at the end."""
    return vocab * width + layers * (2 * width**2 + 2 * width * key_values + 3 * width * ffn + 2 * width) + width


def gpt2_parameters(vocab: int, width: int, layers: int, positions: int, biases: bool) -> int:
    """Tied embedding, positions, 12 D^2 a layer, biases 4 D (attention) + 5 D (FFN), LayerNorms with two vectors."""
    layer = 12 * width**2 + 4 * width + (9 * width if biases else 0)
    return (vocab + positions) * width + layers * layer + 2 * width


PARAMETERS = {
    "stories": llama_parameters(1024, 128, 4, 384, 128) + 1024 * 128,  # untied
    "modern": llama_parameters(1024, 128, 4, 384, 128) + 1024 * 128 + 4 * 2 * 32,  # and norms of queries and keys
    "tinystories_8m": gpt2_parameters(50257, 256, 8, 256, True),
    "gpt2_124m": gpt2_parameters(50304, 768, 12, 1024, False),
    "1b": llama_parameters(131072, 2048, 16, 8192, 512),
}
NMDA = {"decoder.hidden_act", "decoder.nmda_alpha", "run.folder"}
PAIRS = [  # what the two configs of a pair may differ in
    ("stories_classic", "stories_values", {"decoder.stream", "run.folder"}),
    ("tinystories_8m_classic", "tinystories_8m_values", {"decoder.stream", "run.folder"}),
    ("gpt2_124m_gelu", "gpt2_124m_nmda10", NMDA),
    ("1b_classic", "1b_values", {"decoder.stream", "run.folder"}),
    ("1b_classic", "1b_nmda", NMDA),
]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows = {}
    for key, value in config.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def test_no_config_is_forgotten() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {name for *names, _ in PAIRS for name in names}


@pytest.mark.parametrize(("first", "second", "allowed"), PAIRS)
def test_a_pair_differs_only_where_it_says(first: str, second: str, allowed: set[str]) -> None:
    a, b = flat(load(first)), flat(load(second))
    assert {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)} == allowed


@pytest.mark.parametrize("path", [*sorted(FOLDER.glob("*.yaml")), *RECIPES], ids=lambda path: path.stem)
def test_parses_and_counts(path: Path) -> None:
    from llm.train.cli import parse

    with torch.device("meta"):
        cli = parse(["--config", str(path), "--trainer.accelerator", "cpu"], run=False)
    config = cli.model.decoder_config
    assert cli.model.model.num_parameters() == PARAMETERS[path.stem.rsplit("_", 1)[0]]
    assert config.initializer_seed == cli.datamodule.seed == cli.model.seed == 1
    assert cli.datamodule.context == config.max_position_embeddings
    schedule: Schedule = cli.model.schedule
    assert schedule.problems(cli.trainer.max_steps) == []
    assert cli.datamodule.micro_batches(ranks=1) >= 1


def test_the_readmes_fit_commands_can_be() -> None:
    from llm.train.cli import parse

    text = (FOLDER.parent / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"python -m llm fit (--config configs/[^;\n]*)", text)
    assert found
    commands = [command.replace("$arm", arm) for command in found for arm in ("classic", "values")]
    for command in commands:
        with torch.device("meta"):
            cli = parse(shlex.split(command, comments=True), run=False)
        assert cli.model.problems(cli.trainer.max_steps, cli.datamodule.context) == []


def test_the_1b_run_is_the_papers() -> None:
    """Burns et al. 2025, Tables 3 and 4: 40,000 x 512 x 4,096 = 83.9e9 tokens."""
    config = load("1b_values")
    assert config["trainer"]["max_steps"] * config["data"]["batch_size"] * config["data"]["context"] == 83_886_080_000
    model = DecoderConfig(**config["decoder"])
    assert model.head_dim == 64
    with torch.device("meta"):
        assert DecoderForCausalLM(model).num_parameters() == pytest.approx(1.24e9, rel=0.01)
