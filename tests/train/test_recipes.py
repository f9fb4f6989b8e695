"""The recipes in configs/recipes: planned, trained for some steps on the built-in stories, and exported."""

from pathlib import Path

import pytest

from llm import export as exporting
from llm.cli import main
from llm.pretrained import load_model

from .runs import fit, losses, metrics, weights

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))
STEPS = 8
SHORT = (
    f"--trainer.max_steps {STEPS} --trainer.log_every_n_steps 1 --data.batch_size 2 --data.context 32 "
    f"--data.validate_every {STEPS} --data.validation_rows 4 --model.schedule.warmup_steps 1 "
    f"--model.schedule.cooldown_steps 4 --run.checkpoint_every {STEPS} --run.keep_every {STEPS}"
).split()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned_trained_and_exported(
    recipe: Path, story_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", "--config", str(recipe), "--device", "h100"]) == 0
    run, plain = tmp_path / "run", tmp_path / "without z-loss"
    store = ["--data.store", str(story_store)]
    assert fit(recipe, *SHORT, *store, "--run.folder", str(run)) == 0
    assert fit(recipe, *SHORT, *store, "--run.folder", str(plain), "--model.z_loss", "0") == 0
    curve = [float(loss) for loss in losses(run).values()]
    assert len(curve) == STEPS and curve[-1] < curve[0]
    assert losses(run)[1] == losses(plain)[1]  # logged losses are without it
    assert losses(run)[STEPS] != losses(plain)[STEPS]  # but the weights have learned from it
    rates = [float(row["learning_rate"]) for row in metrics(run) if row["learning_rate"]]
    assert len(set(rates[1:5])) == 1 and rates[5] > rates[6] > rates[7] > 0
    monkeypatch.setattr(exporting, "check_reload", lambda *_: None)  # ten seconds a folder
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    model = load_model(tmp_path / "out")
    assert set(dict(model.named_parameters())) == set(weights(run, STEPS))
