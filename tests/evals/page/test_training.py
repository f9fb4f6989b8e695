"""What was trained, on the page of a comparison."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evals.exported_steps import read_run
from evals.page.training import (
    config_table,
    draw_head_weights,
    draw_learned,
    head_weights,
    learned_curves,
    training_facts,
)
from llm.model import DecoderConfig, DecoderForCausalLM
from tests.evals.made_up import make_run

SETTINGS = {
    "model.optimizer.name": "adamw",
    "model.optimizer.betas": [0.9, 0.95],
    "model.optimizer.weight_decay": 0.1,
    "data.context": 1024,
    "data.packing": "packed",
    "trainer.precision": "bf16-mixed",
}


def test_the_facts_of_a_run_and_in_what_its_pair_differs(tmp_path: Path) -> None:
    first = read_run(make_run(tmp_path / "classic", config=SETTINGS))
    second = read_run(make_run(tmp_path / "values", ["values"], config=SETTINGS | {"data.workers": 2}))
    facts = dict(training_facts(first))
    assert facts["Optimizer"] == "adamw, learning rate 0.001, betas [0.9, 0.95], weight decay 0.1"
    assert facts["Batch"] == "8 sequences of 1,024 tokens, packed" and facts["Data"] == "store"
    assert facts["Steps"] == "40, in bf16-mixed" and facts["Parameters"] == "12,345"
    assert "Schedule" not in facts  # this config does not say it
    table = config_table([first, second], ("classic", "values"))
    assert table.header == ["key", "classic", "values"]
    assert table.rows == [["data.workers", "0", "2"], ["decoder.stream", "[]", "[values]"]]
    mixed = read_run(make_run(tmp_path / "mixed", config={"data.store": {"a.b": 0.75, "c": 0.25}}))
    assert dict(training_facts(mixed))["Data"] == "a.b (0.75), c (0.25)"


@pytest.mark.parametrize("layers", [2, 12])
def test_learned_numbers_are_drawn_by_layer(tmp_path: Path, layers: int) -> None:
    folder = make_run(tmp_path / "nmda")
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    columns = [f"nmda_alpha/{layer}" for layer in range(layers)] + ["activation_rms/0"]
    values = [",".join(str(step + 100 * layer) for layer in range(len(columns))) for step in range(len(lines))]
    added = [f"{header},{','.join(columns)}", *(f"{line},{more}" for line, more in zip(lines, values, strict=True))]
    (folder / "metrics.csv").write_text("\n".join(added) + "\n")
    found = learned_curves(read_run(folder))
    assert list(found) == ["nmda_alpha"] and list(found["nmda_alpha"]) == list(range(layers))
    assert found["nmda_alpha"][1].values[:2] == [100.0, 101.0] and found["nmda_alpha"][1].tokens[0] == 1000
    (axes,) = draw_learned("nmda_alpha", found["nmda_alpha"], "nmda").axes
    drawn = [list(line.get_ydata()) for line in axes.lines]
    assert drawn == [found["nmda_alpha"][layer].values for layer in range(layers)]
    assert (axes.get_legend() is None) == (layers > 8)
    assert len({tuple(line.get_color()) for line in axes.lines}) == layers
    assert learned_curves(read_run(make_run(tmp_path / "classic"))) == {}


@pytest.mark.parametrize(("source", "dtype"), [("previous", torch.bfloat16), ("dense", torch.float32)])
def test_stream_weights_by_head_are_those_of_the_export(tmp_path: Path, source: str, dtype: torch.dtype) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    streams = {"stream": ["queries", "values"], "stream_source": source, "stream_weight": "head"}
    model = DecoderForCausalLM(DecoderConfig(**sizes, **streams, num_key_value_heads=2)).to(dtype)
    expected: dict[str, dict[int, list[float]]] = {"queries": {}, "values": {}}
    for layer in (1, 2):
        for name, heads in (("queries", 4), ("values", 2)):
            weight = getattr(model.model.layers[layer].attention.stream, f"{name}_weight")
            with torch.no_grad():
                weight.copy_(torch.randn_like(weight))
            expected[name][layer] = weight.detach().reshape(-1, heads)[-1].tolist()
    model.save_pretrained(tmp_path)
    found = head_weights(tmp_path)
    assert found == {
        name: {layer: pytest.approx(row) for layer, row in rows.items()} for name, rows in expected.items()
    }
    axes, bar = draw_head_weights("values", found["values"], "values").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    np.testing.assert_allclose(axes.images[0].get_array(), [expected["values"][layer] for layer in (1, 2)], atol=1e-6)
    assert bar.get_ylabel() == "weight of arriving values"
    DecoderForCausalLM(DecoderConfig(**sizes, stream=["values"], stream_weight="layer")).save_pretrained(tmp_path / "b")
    assert head_weights(tmp_path / "b") == {}
