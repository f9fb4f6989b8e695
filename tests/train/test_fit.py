"""`python -m llm fit` as a user runs it."""

import inspect
import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from scipy import stats

from llm.cli import main
from llm.data.order import WindowOrder
from llm.data.store import TokenStore
from llm.model import DecoderConfig, DecoderForCausalLM
from llm.runs.batch import data_of
from llm.train.loggers import MetricsFile
from llm.train.module import LanguageModule
from llm.train.options import FOLLOWED, OURS

from .runs import Config, events, fit, losses, metrics, weights


def test_losses_and_weights_are_those_of_a_bare_loop(tiny_config: Config, story_store: Path, tmp_path: Path) -> None:
    """An independent training loop: own windows, own schedule arithmetic, torch's AdamW, no Lightning."""
    config = tiny_config(
        trainer__max_steps=12,
        data__micro_batch_size=2,  # four micro-batches against one batch here
        model__schedule={"warmup_steps": 3, "cooldown_steps": 5},
    )
    assert fit(config) == 0
    settings = yaml.safe_load(config.read_text())
    model = DecoderForCausalLM(DecoderConfig(**settings["decoder"], initializer_seed=3)).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}], betas=(0.9, 0.95)
    )
    store = TokenStore.open(story_store, "train")
    stream = torch.from_numpy(store.read(0, store.tokens))
    order = WindowOrder((store.tokens - 1) // 32, 8, 3)
    expected = {}
    for step in range(12):
        rows = torch.stack([stream[32 * order.item(step, row) :][:33] for row in range(8)])
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = [0.5 * (1 + math.cos(math.pi * (s - 3) / 9)) for s in (step, 7)]
        factor = (step + 1) / 3 if step < 3 else cosine[0] if step < 7 else cosine[1] * (12 - step) / 5
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        optimizer.step()
        optimizer.zero_grad()
        expected[step + 1] = loss.item()
    found = losses(tmp_path / "run")
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert float(found[step]) == pytest.approx(loss, abs=2e-5)
    saved = weights(tmp_path / "run", 12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=1e-3, atol=1e-4, msg=name)


def test_accumulation_weighs_tokens_not_micro_batches(tiny_config: Config, tmp_path: Path) -> None:
    """Documents of unequal length: the mean over all tokens of the step, however the rows are cut into batches."""
    curves = []
    for micro in (8, 2, 1):
        run = tmp_path / str(micro)
        settings = {"data__packing": "per_document", "data__context": 256, "data__micro_batch_size": micro}
        assert fit(tiny_config(**settings, run__folder=str(run), trainer__max_steps=6)) == 0
        curves.append([float(loss) for loss in losses(run).values()])
        tokens = [int(row["tokens"]) for row in metrics(run)]
        assert tokens[0] < 0.9 * 8 * 256  # the rows do differ in length
    assert curves[1] == pytest.approx(curves[0], rel=2e-6)  # sums in another order
    assert curves[2] == pytest.approx(curves[0], rel=2e-6)


def test_what_a_run_leaves_behind(tiny_config: Config, story_store: Path, tmp_path: Path) -> None:
    assert fit(tiny_config(), "--trainer.max_steps", "10") == 0
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    assert record["store_fingerprint"] == TokenStore.open(story_store).fingerprint
    assert record["seed"] == 3
    assert {"torch", "lightning", "transformers"} <= record["versions"].keys()
    assert (len(record["git_commit"] or "") >= 40) == (Path(__file__).parents[2] / ".git").exists()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 10
    rows = metrics(run)
    assert [row["step"] for row in rows if row["validation_loss"]] == ["10"]
    last = rows[-2] if rows[-1]["validation_loss"] else rows[-1]
    assert int(last["tokens"]) == 10 * 8 * 32
    assert float(last["perplexity"]) == pytest.approx(math.exp(float(last["train_loss"])))
    assert float(last["gradient_norm"]) > 0
    assert float(last["tokens_per_second"]) > 0
    assert last["mfu"] == ""
    assert list((run / "tensorboard").glob("events*"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 10
    again = tmp_path / "again"
    assert main(["fit", "--config", str(run / "config.yaml"), "--run.folder", str(again)]) == 0
    assert losses(again) == losses(run)


def test_validation_is_the_token_mean_over_the_whole_split(
    tiny_config: Config, story_store: Path, tmp_path: Path
) -> None:
    for rows in ("windows", "documents"):
        run = tmp_path / rows
        config = tiny_config(data__packing=rows, data__validation_rows=None, trainer__max_steps=3, run__folder=str(run))
        assert fit(config) == 0
        model = DecoderForCausalLM.from_pretrained(run / "checkpoints" / "step-00000003").eval()
        store = TokenStore.open(story_store, "validation")
        if rows == "windows":
            pieces = [store.read(32 * i, 33) for i in range((store.tokens - 1) // 32)]
        else:
            pieces = [store.document_tokens(i)[:33] for i in range(store.documents)]
        total = count = 0.0
        for piece in pieces:
            ids = torch.from_numpy(piece)[None]
            with torch.no_grad():
                logits = model(ids[:, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(piece) - 1
        summary = json.loads((run / "summary.json").read_text())
        assert summary["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_validate_prints_the_checkpoints_loss(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tiny_config(trainer__max_steps=3)
    assert fit(config) == 0
    loss = json.loads((tmp_path / "run" / "summary.json").read_text())["validation_loss"]
    capsys.readouterr()
    for file in (config, tmp_path / "run" / "config.yaml"):
        assert main(["validate", "--config", str(file)]) == 0
        assert capsys.readouterr().out.strip() == f"validation loss {loss:.4f}"


def test_the_stream_is_the_only_difference_of_a_pair(tiny_config: Config, tmp_path: Path) -> None:
    """Off is bitwise the plain model through the whole loop; on is another curve from the same first loss on."""
    curves = {}
    for name, settings in {
        "plain": {"decoder__stream": []},
        "off": {"decoder__stream": [], "decoder__stream_source": "first", "decoder__stream_weight": "head"},
        "on": {"decoder__stream": ["values"]},
    }.items():
        assert fit(tiny_config(**settings, run__folder=str(tmp_path / name), trainer__max_steps=6)) == 0
        curves[name] = losses(tmp_path / name)
    assert curves["plain"] == curves["off"]
    assert all(curves["plain"][step] != curves["on"][step] for step in (2, 6))


def test_losses_that_are_not_finite_end_the_run(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"model__schedule": {"shape": "constant"}, "run__checkpoint_every": 1, "run__max_consecutive_skips": 3}
    assert fit(tiny_config(**settings, trainer__max_steps=4)) == 0
    capsys.readouterr()
    assert fit(tiny_config(**settings, model__optimizer__lr=1e30), "--resume", "auto") == 2
    message = capsys.readouterr().err
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    good = kept[0]  # two are kept; but none goes while steps are being skipped
    assert [path.name for path in kept] == [f"step-{step:08d}" for step in (4, 5, 6, 7)]
    for part in (
        "3 step(s) in a row",
        "the loss is ",
        "at step 8",
        "rows 0 to 7",
        f"checkpoint is {good}:",
        "--resume",
    ):
        assert part in message
    told = events(tmp_path / "run")
    expected = [*(("skipped step", step) for step in (6, 7, 8)), ("stopped", 8)]
    assert [(line["event"], line["step"]) for line in told] == expected
    assert told[0]["batch"] == {"seed": 3, "rows": 8, "store": message.split("rows 0 to 7 of ")[1].split(")")[0]}


def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def overflows_at_the_ninth(parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 9:
            parameters[0].grad[0] = math.inf
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflows_at_the_ninth)
    run = tmp_path / "run"
    assert fit(tiny_config(run__checkpoint_every=4, trainer__max_steps=9)) == 0
    before, after = weights(run, 8), weights(run, 9)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [(line["event"], line["step"], line["gradient_norm"]) for line in events(run)] == [
        ("skipped step", 9, "inf")
    ]
    last = [row for row in metrics(run) if row["train_loss"]][-1]
    assert (last["skipped_steps"], last["train_loss"]) == ("1", "nan")  # no loss of the row's steps counts
    calls.clear()
    capsys.readouterr()
    assert fit(tiny_config(run__folder=str(tmp_path / "strict"), run__max_consecutive_skips=1)) == 2
    assert "gradient norm inf at step 9" in capsys.readouterr().err


def test_a_loss_that_stands_out_is_told_with_its_batch(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And again by a run that was resumed shortly before it: the losses before it are in the checkpoint."""
    step_loss = LanguageModule.training_step

    def much_higher_at_step_50(module: LanguageModule, batch: dict, batch_idx: int) -> torch.Tensor:
        loss = step_loss(module, batch, batch_idx)
        if module.global_step == 49:
            module.step_loss += 3.0
        return loss

    monkeypatch.setattr(LanguageModule, "training_step", much_higher_at_step_50)
    run = tmp_path / "run"
    settings = {"model__optimizer__lr": 1e-4, "run__checkpoint_every": 45, "run__keep_checkpoints": 9}
    assert fit(tiny_config(**settings, trainer__max_steps=60)) == 0
    (spike,) = events(run)
    assert (spike["event"], spike["step"]) == ("loss spike", 50)
    found = [float(loss) for loss in losses(run).values()]
    assert spike["median"] == pytest.approx(statistics.median(found[:49]))
    scale = stats.median_abs_deviation(found[:49], scale="normal")
    assert spike["deviations"] == pytest.approx((found[49] - spike["median"]) / scale, rel=1e-4)
    assert f"llm batch {run} --step 50" in capsys.readouterr().err
    back = str(run / "checkpoints" / "step-00000045")
    assert fit(tiny_config(**settings, trainer__max_steps=60), "--resume", back) == 0
    assert [line["deviations"] for line in events(run)] == [spike["deviations"]] * 2


@pytest.mark.parametrize("precision", [pytest.param("bf16-mixed", marks=pytest.mark.slow), "32-true"])
def test_activation_checkpointing_and_compile_train_alike(tiny_config: Config, tmp_path: Path, precision: str) -> None:
    curves = []
    switches: dict[str, dict[str, bool]] = {"plain": {}, "recompute": {"model__activation_checkpointing": True}}
    if precision == "bf16-mixed":  # in fp32: test_compiled_blocks_stay_within_the_spread_of_rounding
        switches["compiled"] = {"model__compile": True}
    for name, switch in switches.items():
        run = tmp_path / name
        assert fit(tiny_config(**switch, run__folder=str(run), trainer__precision=precision, trainer__max_steps=5)) == 0
        curves.append([float(loss) for loss in losses(run).values()])
    tolerance = 2e-3 if precision == "bf16-mixed" else 1e-5
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=tolerance)


BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "small vocabulary": (["--decoder.vocab_size", "100"], "vocab_size"),
    "heads": (["--decoder.num_attention_heads", "5"], "does not divide"),
    "key": (["--decoder.hidden_sise", "5"], "did you mean decoder.hidden_size"),
    "type": (["--data.batch_size", "many"], "data.batch_size"),
    "recompute": (["--model.activation_checkpointing", "-2"], "every n-th block"),
    "schedule": (["--trainer.max_steps", "1"], "longer than the run"),
    "loggers": (["--run.loggers", "[csv,papyrus]"], "papyrus"),
    "too little text": (["--data.context", "10000000"], "too few"),
    "rows": (["--data.packing", "pages"], "packed or per_document"),
    "nothing to mask": (["--data.packing", "per_document", "--data.mask_documents", "true"], "mask_documents"),
    "weights": (["--data.store", "{a: 0, b: -1}"], "weight -1.0 of b"),
    "nothing at once": (["--data.batch_size", "0", "--data.workers", "-1"], "data.workers -1"),
    "optimizer": (["--model.optimizer.lr", "-1", "--model.optimizer.betas", "[0.9,1.5]"], "betas"),
    "clip": (["--model.gradient_clip", "0"], "null for none"),
    "warm-up": (["--model.schedule.warmup_steps", "-5"], "warmup_steps -5 must be at least 0"),
    "validation": (["--data.validation_rows", "-1"], "validation_rows"),
    "logging": (["--trainer.log_every_n_steps", "0"], "log_every_n_steps"),
    "workers": (["--data.workers", "100000"], "data.workers 100000 must be 0 to 256"),
    "time": (["--trainer.max_time", "00:00:00:03"], "send SIGUSR1 before a time limit"),
    "not ours": (["--trainer.gradient_clip_val", "0.1"], "model.gradient_clip"),
    "accumulation": (["--trainer.accumulate_grad_batches", "4"], "data.micro_batch_size"),
    "epochs": (["--trainer.max_epochs", "0"], "trainer.max_steps"),
    "precision": (["--trainer.precision", "16-mixed"], "bf16-mixed"),
    "positions": (["--decoder.position", "learned", "--data.context", "64"], "max_position_embeddings"),
    "devices": (["--trainer.devices", "0"], "devices"),
    "indivisible": (["--trainer.devices", "3"], "the nearest that is, is 9"),
    "strategy": (["--trainer.strategy", "ddp"], "give strategy.name"),
    "repeated data": (["--trainer.limit_train_batches", "3"], "give trainer.max_steps"),
    "strategy name": (
        ["--strategy.name", "warp", "--run.on_full_disk", "panic"],
        "strategy.name 'warp' is unknown",
    ),
    "two names": (
        ["--strategy.name", "warp", "--run.on_full_disk", "panic"],
        "run.on_full_disk 'panic' is unknown",
    ),
    "stage": (["--strategy.stage", "4", "--strategy.bucket_elements", "0"], "strategy.stage 4 must be 1, 2 or 3"),
    "off-load": (["--strategy.offload_optimizer", "true"], "needs strategy.name deepspeed"),
    "compiled hooks": (
        ["--strategy.name", "deepspeed", "--strategy.stage", "3", "--model.compile", "true"],
        "set model.compile false, or strategy.stage 1 or 2",
    ),
    "rounded gradients": (["--strategy.communication_dtype", "bf16"], "of trainer.precision 32-true"),
    "rounded how": (["--strategy.communication_dtype", "fp8"], "give fp32 or bf16"),
    "no master weights": (["--strategy.name", "deepspeed", "--trainer.precision", "bf16-true"], "bf16-mixed"),
    "time-out": (["--strategy.timeout", "0"], "above 0 and at most"),
    "nor here": (["--strategy.name", "fsdp2", "--trainer.precision", "bf16-true"], "under fsdp2: give bf16-mixed"),
    "kept for good": (["--run.keep_every", "7"], "multiple of run.checkpoint_every 5"),
    "full disk": (["--run.on_full_disk", "panic"], "stop or continue"),
}


def test_bad_input_is_one_sentence_and_writes_nothing(
    tiny_config: Config, tmp_path: Path, story_store: Path, capsys: pytest.CaptureFixture
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(story_store, torn)
    shard = next((torn / "train").glob("*.tokens"))
    shard.write_bytes(shard.read_bytes()[:-10])
    beyond = tmp_path / "beyond"
    shutil.copytree(story_store, beyond)
    index = json.loads((beyond / "store.json").read_text())
    (beyond / "store.json").write_text(json.dumps(index | {"vocab_size": 100}))
    of_files: dict[str, tuple[list[str], str]] = {
        "no store": (["--data.store", str(tmp_path / "nowhere")], "llm prepare"),
        "no config": (["--config", str(tmp_path / "none.yaml")], "none.yaml"),
        "torn shard": (["--data.store", str(torn)], shard.name),
        "resume": (["--resume", str(tmp_path / "nowhere")], "nowhere"),
        "id beyond": (["--data.store", str(beyond)], "beyond its vocabulary"),
    }
    for name, (words, part) in (BAD_INPUT | of_files).items():
        assert fit(tiny_config(), *words) == 2, name
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: "), name
        assert part in message, (name, message)
        if name != "id beyond":  # seen when it is read
            assert not (tmp_path / "run").exists(), name


def test_every_option_of_lightnings_trainer_is_followed_or_refused() -> None:
    """A new version of Lightning may add one."""
    known = set(inspect.signature(Trainer).parameters)
    assert known == FOLLOWED.keys() | OURS.keys() and not FOLLOWED.keys() & OURS.keys()


def test_learned_switches_have_a_column_for_each_layer(tiny_config: Config, tmp_path: Path) -> None:
    """They are those of the checkpoint of the same step."""
    settings: dict = {"hidden_act": "nmda", "nmda_alpha": 4.0, "nmda_learnable": True, "stream_weight": "head"}
    config = tiny_config(**{f"decoder__{name}": value for name, value in settings.items()}, trainer__max_steps=5)
    assert fit(config) == 0
    row = next(row for row in metrics(tmp_path / "run") if row["step"] == "5" and row["train_loss"])
    saved = weights(tmp_path / "run", 5)
    for layer in range(2):
        act = f"model.layers.{layer}.feedforward.act"
        assert float(row[f"nmda_alpha/{layer}"]) == pytest.approx(saved[f"{act}.log_alpha"].exp().item(), rel=1e-6)
        assert float(row[f"nmda_beta/{layer}"]) == pytest.approx(saved[f"{act}.beta"].item(), rel=1e-6)
    heads = saved["model.layers.1.attention.stream.values_weight"].flatten().tolist()
    assert float(row["stream_values/1"]) == pytest.approx(sum(heads) / 2, rel=1e-6)
    assert "stream_values/0" not in row  # nothing arrives in the first layer


def test_activation_rms_is_logged_on_request(tiny_config: Config, tmp_path: Path) -> None:
    """That of the blocks of the last checkpoint, for the batch after it."""
    config = tiny_config(trainer__max_steps=3, run__checkpoint_every=2, model__log_activation_rms=True)
    assert fit(config) == 0
    rows = torch.stack([torch.from_numpy(row) for row in data_of(tmp_path / "run").batch(3).tokens])
    model = DecoderForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000002")
    outputs: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, given, result: outputs.append(result[0]))
    model(rows[:, :-1])
    row = next(row for row in metrics(tmp_path / "run") if row["step"] == "3" and row["train_loss"])
    for layer, hidden in enumerate(outputs):
        assert float(row[f"activation_rms/{layer}"]) == pytest.approx(hidden.pow(2).mean().sqrt().item(), rel=1e-5)


def test_a_metric_of_a_new_name_adds_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsFile(tmp_path / "metrics.csv", 0)
    log.log_metrics({"train_loss": 2.0}, 1)
    log.log_metrics({"train_loss": 1.0, "mine": 3.0}, 2)
    log.log_metrics({"mine": 4.0, "other, with a comma": 5.0}, 3)
    rows = metrics(tmp_path)
    assert [row["train_loss"] for row in rows] == ["2.0", "1.0", ""]
    assert [row["mine"] for row in rows] == ["", "3.0", "4.0"]
    assert [row["other, with a comma"] for row in rows] == ["", "", "5.0"]
    resumed = MetricsFile(tmp_path / "metrics.csv", 2)
    resumed.log_metrics({"mine": 6.0}, 3)
    assert [row["mine"] for row in metrics(tmp_path)] == ["", "3.0", "6.0"]
