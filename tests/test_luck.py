"""`python -m benchmarks.luck`: what it trains, averages and tables, at a size of seconds."""

import numpy as np
import pytest
import torch

from benchmarks import luck
from benchmarks.transfer import CONTEXT, ROWS, VOCABULARY, Texts, make_model, training
from llm.train.optim import Schedule


@pytest.fixture(scope="module")
def texts() -> Texts:
    generator = torch.Generator().manual_seed(0)
    return Texts(*(torch.randint(VOCABULARY, (n * CONTEXT + 1,), generator=generator) for n in (4 * ROWS, 3)))


def test_a_run_is_judged_by_its_last_weights_and_by_moving_averages(
    texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(luck, "AVERAGES", (0.15, 0.9))
    setting = luck.Setting(Schedule("constant", warmup_steps=1), rate=0.01, steps=4, deviation=0.5)
    found = {row["weights"]: float(row["loss"]) for row in luck.rows_of(texts, "short", setting, 3)}

    model = make_model(luck.SIZE, "standard", 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1.0)
    history = []
    for _ in training(model, texts, 0.01, 4, 1, setting.schedule, "adamw"):
        history.append({name: value.detach().clone() for name, value in model.named_parameters()})
    history.append(dict(model.named_parameters()))
    losses = {luck.LAST: luck.validation_loss(model, texts)}
    for decay in (0.15, 0.9):
        average = history[0]
        for step, weights in enumerate(history[1:], start=1):
            kept = min(decay, (1 + step) / (10 + step))
            average = {name: kept * average[name] + (1 - kept) * weights[name] for name in average}
        other = make_model(luck.SIZE, "standard", 3)
        other.load_state_dict(average, strict=False)
        losses[f"moving average, {decay:g}"] = luck.validation_loss(other, texts)
    assert found == pytest.approx(losses, abs=2e-5)
    assert len({round(loss, 5) for loss in losses.values()}) == 3


def test_the_interval_of_a_standard_deviation_covers_it() -> None:
    """Of 400 tables of 8 seeds each, about 95% contain the true deviation."""
    draws = np.random.default_rng(1).normal(1.0, 0.1, (400, 8))
    rows = [
        {"setting": str(n), "seed": str(m), "weights": luck.LAST, "loss": f"{loss:.6f}", "seconds": "1"}
        for n, losses in enumerate(draws)
        for m, loss in enumerate(losses)
    ]
    cells = [line.split("|")[3] for line in luck.table(rows).splitlines()[2:]]
    bounds = [[float(word) for word in cell.split("(")[1].strip(" )").split(" to ")] for cell in cells]
    assert 0.92 < np.mean([low <= 0.1 <= high for low, high in bounds]) < 0.98
    first = luck.table(rows).splitlines()[2].split("|")
    assert float(first[2]) == pytest.approx(draws[0].mean(), abs=1e-4)
    assert float(first[3].split("(")[0]) == pytest.approx(draws[0].std(ddof=1), abs=1e-4)
    costs = [float(line.split("|")[5]) for line in luck.table(rows).splitlines()[2:]]
    assert costs == pytest.approx(draws.var(axis=1, ddof=1) / draws[0].var(ddof=1), abs=0.051)  # equal seconds
