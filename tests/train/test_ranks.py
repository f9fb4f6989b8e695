"""Two real processes, DDP, DeepSpeed's ZeRO and FSDP2 over gloo, against one process."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from llm.cli import main
from llm.model import DecoderConfig, DecoderForCausalLM
from llm.train import checkpoint as checkpoints

from .pairs import Command, together
from .preloaded import LLM, Python
from .runs import Config, assert_same_weights, events, fit, losses, measured, metrics, weights

STRATEGIES = {
    "ddp": ["--strategy.name", "ddp"],
    **{f"zero{stage}": ["--strategy.name", "deepspeed", "--strategy.stage", str(stage)] for stage in (1, 2, 3)},
    **{f"fsdp2-{stage}": ["--strategy.name", "fsdp2", "--strategy.stage", str(stage)] for stage in (1, 2, 3)},
    "offload2": ["--strategy.name", "deepspeed", "--strategy.stage", "2", "--strategy.offload_optimizer", "true"],
    "offload3": ["--strategy.name", "deepspeed", "--strategy.stage", "3", "--strategy.offload_optimizer", "true"],
}
VARIANTS: dict[str, dict] = {
    "classic": {"decoder__stream": []},
    "queries and keys": {"decoder__stream": ["queries", "keys"]},
    "values": {"decoder__stream": ["values"]},
    "learned": {  # weights of one number, and of an odd number of them
        "decoder__stream": ["queries", "keys", "values"],
        "decoder__stream_weight": "layer",
        "decoder__num_hidden_layers": 3,
        "decoder__hidden_act": "nmda",
        "decoder__nmda_learnable": True,
        "decoder__parametrization": "completep",  # more groups, with an eps of their own
        "decoder__base_hidden_size": 16,
        "decoder__base_num_hidden_layers": 2,
        "decoder__base_head_dim": 4,
    },
    "rivals": {"decoder__value_embedding": "values", "decoder__residual": "hyper-manifold"},
    "muon": {"model__optimizer": {"name": "muon", "lr": 3e-3, "muon_lr": 6e-3}},
}
REPEATS = ("queries and keys", "learned", "rivals")  # marked slow
RARE = ("offload2", "offload3", "fsdp2-2", "fsdp2-3")  # not for every stream
MUON = ("ddp", "zero1", "zero2", "fsdp2-1")  # the others are refused
PRECISIONS = ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)]
COMMON = {
    "decoder__tie_word_embeddings": True,
    "data__micro_batch_size": 2,  # two micro-batches on each of two devices, four on one
    "data__validation_rows": 15,  # of which the two ranks have 8 and 7
    "trainer__max_steps": 12,
    "run__loggers": ["csv"],
}


def curve(run: Path) -> list[float]:
    return [float(loss) for loss in losses(run).values()]


def validated(run: Path) -> list[float]:
    return [float(row["validation_loss"]) for row in metrics(run) if row["validation_loss"]]


# What rank zero puts together, from pieces smaller than most parameters, is what DeepSpeed and FSDP2 themselves put
# together.
GATHERED = """
import torch
from llm.train import checkpoint, gathering
from llm.train.checkpointing import Checkpoints
from llm.train.state import state_of
piece, begin = gathering.PIECE, Checkpoints._begin
gathering.PIECE = 1000
def compared(self, trainer, module):
    told = begin(self, trainer, module)
    self.writer.done()
    state, found = state_of(module.model, trainer.strategy, trainer.optimizers[0]), None
    if rank == 0:
        found = checkpoint.find(self.run.path, trainer.global_step)
        weights, moments = found.weights(), found.optimizer_state()
    zero = hasattr(state, "_link_moments")
    if zero:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
        state._link_moments()
    for name, parameter in state.parameters.items():
        whole = safe_get_full_fp32_param(parameter) if zero else parameter.full_tensor()
        if zero:
            kinds = [kind for kind in state._by_parameter()[name].state_names if kind != "step"]
            halves = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in kinds}
        else:
            held = trainer.optimizers[0].state[parameter]
            halves = {kind: tensor.full_tensor() for kind, tensor in held.items() if kind != "step"}
        if found:
            assert torch.equal(weights[name], whole.cpu()), name
            assert all(torch.equal(moments[f"{kind}/{name}"], half.cpu()) for kind, half in halves.items()), name
    return told
Checkpoints._begin = compared
def after():
    gathering.PIECE, Checkpoints._begin = piece, begin
"""


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name in REPEATS)) for name in VARIANTS]
)
def test_two_processes_train_as_one(tiny_config: Config, tmp_path: Path, variant: str) -> None:
    """fp32, every strategy and stream: losses within 1e-5 of one process, same data, tied embeddings still tied."""
    common, alone = COMMON | VARIANTS[variant], tmp_path / "alone"
    assert fit(tiny_config(**common, run__folder=str(alone))) == 0
    commands, runs = [], {}
    for strategy, words in STRATEGIES.items():
        if strategy in MUON if variant == "muon" else variant in ("values", "learned") or strategy not in RARE:
            runs[strategy] = tmp_path / strategy
            config = tiny_config(**common, run__folder=str(runs[strategy]))
            before = "" if strategy == "ddp" else GATHERED
            commands.append(Command(["fit", "--config", str(config), *words], before))
    if variant == "values":
        for strategy in ("zero2", "fsdp2-3"):
            runs[f"compiled-{strategy}"] = tmp_path / f"compiled-{strategy}"
            config = tiny_config(**common, run__folder=str(runs[f"compiled-{strategy}"]), model__compile=True)
            commands.append(Command(["fit", "--config", str(config), *STRATEGIES[strategy]], TRACED))
    assert set(together(tmp_path / "pair", commands)) == {(0, 0)}
    near = 1e-3 if variant == "muon" else 1e-5  # torch's Muon multiplies in bf16
    for strategy, run in runs.items():
        assert curve(run) == pytest.approx(curve(alone), abs=near), strategy
        assert validated(run) == pytest.approx(validated(alone), abs=near), strategy
        for name in ("data_digest", "tokens", "learning_rate"):
            assert [row[name] for row in metrics(run)] == [row[name] for row in metrics(alone)]
        norms = [[float(row["gradient_norm"]) for row in metrics(r) if row["gradient_norm"]] for r in (run, alone)]
        assert norms[0] == pytest.approx(norms[1], rel=10 * near), strategy
        saved, expected = checkpoints.find(run), checkpoints.find(alone)
        for which in ("weights", "optimizer_state"):
            ours, theirs = getattr(saved, which)(), getattr(expected, which)()
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(
                    ours[name], theirs[name], rtol=1e-3, atol=10 * near, msg=f"{strategy} {name}"
                )
        assert "lm_head.weight" not in saved.weights()
        for name in ("nmda_alpha/1", "nmda_beta/0", "stream_values/2") if variant == "learned" else ():
            learned = [[float(row[name]) for row in metrics(r) if row[name]] for r in (run, alone)]
            assert learned[0] == pytest.approx(learned[1], abs=near), strategy
            assert len(set(learned[0])) == 12
    if variant == "values":
        out = tmp_path / "out"
        assert main(["export", str(runs["zero3"]), str(out)]) == 0  # which compares logits
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_muon_resumes_exactly_and_refuses_what_cuts_matrices(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit under each strategy that it has; on one device after ZeRO 1, within rounding."""
    common = {**COMMON, **VARIANTS["muon"], "run__checkpoint_every": 6}
    commands = []
    for strategy in MUON:
        whole, resumed = (tiny_config(**common, run__folder=str(tmp_path / f"{strategy}{n}")) for n in (1, 2))
        start = str(tmp_path / f"{strategy}1" / "checkpoints" / "step-00000006")
        commands.append(Command(["fit", "--config", str(whole), *STRATEGIES[strategy]]))
        commands.append(Command(["fit", "--config", str(resumed), *STRATEGIES[strategy], "--resume", start]))
    assert set(together(tmp_path / "pair", commands)) == {(0, 0)}
    for strategy in MUON:
        assert_same_weights(tmp_path / f"{strategy}1", tmp_path / f"{strategy}2", 12)
    alone = tiny_config(**common, run__folder=str(tmp_path / "alone"))
    start = str(tmp_path / "zero11" / "checkpoints" / "step-00000006")
    assert fit(alone, "--resume", start) == 0
    assert curve(tmp_path / "alone") == pytest.approx(curve(tmp_path / "zero11")[6:], abs=1e-3)
    assert fit(alone, *STRATEGIES["zero3"], "--trainer.devices", "1") == 2
    assert "model.optimizer.name muon updates whole matrices" in capsys.readouterr().err


@pytest.mark.slow
def test_bf16_has_fp32_master_weights_in_every_stage(tiny_config: Config, tmp_path: Path) -> None:
    """Against one process, and against fp32; recomputed blocks too."""
    bf16 = {**COMMON, "trainer__precision": "bf16-mixed"}
    kinds = [(strategy, "") for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2-1", "fsdp2-3")]
    kinds += [("zero1", "true"), ("zero3", "true"), ("zero3", "2")]  # recomputed: every block, every second
    kinds += [("fsdp2-1", "true"), ("fsdp2-3", "2")]
    runs = {kind: tmp_path / "-".join(kind) for kind in kinds}
    commands = []
    for (strategy, nth), run in runs.items():
        words = ["fit", "--config", str(tiny_config(**bf16, run__folder=str(run))), *STRATEGIES[strategy]]
        commands.append(Command(words + (["--model.activation_checkpointing", nth] if nth else [])))
    still = {**bf16, "model__optimizer": {"lr": 1e-9}, "trainer__max_steps": 3}
    sharded = ("zero1", "zero2", "zero3", "fsdp2-1")
    for strategy in sharded:  # that hardly move
        config = tiny_config(**still, run__folder=str(tmp_path / f"still-{strategy}"))
        commands.append(Command(["fit", "--config", str(config), *STRATEGIES[strategy]]))
    rounded = tmp_path / "rounded"
    words = [*STRATEGIES["fsdp2-1"], "--strategy.communication_dtype", "bf16"]
    commands.append(Command(["fit", "--config", str(tiny_config(**bf16, run__folder=str(rounded))), *words]))
    assert set(together(tmp_path / "pair", commands)) == {(0, 0)}
    exact = tmp_path / "exact"
    assert fit(tiny_config(**COMMON, run__folder=str(exact))) == 0
    for strategy in ("ddp", "zero2", "fsdp2-1"):
        alone = tmp_path / f"{strategy}-alone"
        assert fit(tiny_config(**bf16, run__folder=str(alone)), *STRATEGIES[strategy]) == 0
        assert curve(runs[strategy, ""]) == pytest.approx(curve(alone), abs=5e-4)
    for (strategy, _), run in runs.items():
        assert curve(run) == pytest.approx(curve(exact), abs=5e-3), run.name
        assert curve(run) == pytest.approx(curve(runs[strategy, ""]), abs=5e-4), run.name
        moved = weights(run, 12)["model.embed_tokens.weight"]
        assert not torch.equal(moved, moved.bfloat16().float())  # finer than bf16
    assert curve(rounded) == pytest.approx(curve(runs["fsdp2-1", ""]), abs=2e-3)
    assert curve(rounded) != curve(runs["fsdp2-1", ""])
    settings = yaml.safe_load(tiny_config(**still).read_text())
    start = DecoderForCausalLM(DecoderConfig(**settings["decoder"], initializer_seed=3))
    for strategy, (name, parameter) in itertools.product(sharded, start.named_parameters()):
        found = weights(tmp_path / f"still-{strategy}", 3)[name]
        torch.testing.assert_close(found, parameter.detach(), rtol=0, atol=1e-7)  # not those of a bf16 copy


# Unless the backend is gloo, Lightning 2.6 validates in `inference_mode` where its loop asks for that: the loop of
# `validate` does, that of a fit does not. Checkpoints are written within validation.
UNDER_NCCL = """
import torch
from types import SimpleNamespace
from lightning.pytorch.loops import utilities
from llm.train.checkpointing import Checkpoints
dist, start, write, seen = utilities.dist, Checkpoints.on_fit_start, Checkpoints._write, []
utilities.dist = SimpleNamespace(get_backend=lambda: "nccl")
def started(self, trainer, module):
    trainer.fit_loop.epoch_loop.val_loop.inference_mode |= forced
    return start(self, trainer, module)
def watched(self, trainer, module):
    seen.append(torch.is_inference_mode_enabled())
    return write(self, trainer, module)
Checkpoints.on_fit_start, Checkpoints._write = started, watched
def after():
    utilities.dist, Checkpoints.on_fit_start, Checkpoints._write = dist, start, write
    assert any(seen) == forced
"""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_validation_and_checkpoints_as_under_nccl_change_nothing(
    tiny_config: Config, tmp_path: Path, precision: str
) -> None:
    """Bit for bit, also where the run goes on from such a checkpoint. In `inference_mode` too, but for ZeRO 3: it would
    train on with weights that it gathered there, which autograd refuses."""
    common = {**COMMON, "trainer__precision": precision, "data__validate_every": 5, "run__keep_checkpoints": 9}
    kinds = {"zero1": STRATEGIES["zero1"], "zero3": STRATEGIES["zero3"], "ddp": STRATEGIES["ddp"]}
    kinds |= {name: STRATEGIES[name] for name in ("fsdp2-1", "fsdp2-3")}
    kinds["compiled"] = [*STRATEGIES["zero1"], "--model.compile", "true", "--model.disable_fast_paths", "[loss]"]
    commands = []
    for kind, words in kinds.items():
        nccl = f"{TRACED}forced = {kind != 'zero3'}{UNDER_NCCL}"
        for where, before in (("gloo", TRACED), ("nccl", nccl)):
            config = str(tiny_config(**common, run__folder=str(tmp_path / f"{kind}-{where}")))
            commands += [Command(["fit", "--config", config, *words], before)]
        config = str(tiny_config(**common, run__folder=str(tmp_path / f"{kind}-resumed")))
        start = ["--resume", str(tmp_path / f"{kind}-nccl" / "checkpoints" / "step-00000005")]
        commands += [Command(["fit", "--config", config, *words, *start], nccl)]
    assert set(together(tmp_path / "pair", commands)) == {(0, 0)}
    for kind in kinds:
        gloo, nccl, resumed = (tmp_path / f"{kind}-{where}" for where in ("gloo", "nccl", "resumed"))
        assert measured(nccl) == measured(gloo), kind
        assert validated(resumed)[-1] == validated(gloo)[-1], kind
        assert_same_weights(gloo, nccl, 12)
        assert_same_weights(gloo, resumed, 12)


# torch traces blocks as ever, and runs what it has traced as it stands.
TRACED = """
from torch import nn
compile_ = getattr(nn.Module, "untraced_compile", nn.Module.compile)
nn.Module.untraced_compile = compile_
nn.Module.compile = lambda self: compile_(self, backend="eager")
"""


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_deepspeed_never_waits_for_the_device(
    tiny_config: Config, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    waited = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waited.append(1))
    config = tiny_config(trainer__precision="bf16-mixed", data__micro_batch_size=4, trainer__max_steps=6)
    assert fit(config, *STRATEGIES[strategy]) == 0
    assert not waited


# Rank zero is asked to end the run, as Slurm does before a time limit, while it writes the row of the step before.
STOP = """
import os, signal
from llm.train.loggers import MetricsFile
log = MetricsFile.log_metrics
def log_metrics(self, row, step=None):
    log(self, row, step)
    if step == {step} - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
MetricsFile.log_metrics = log_metrics
def after():
    MetricsFile.log_metrics = log
"""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_goes_on_with_other_numbers_of_devices_and_stages(
    tiny_config: Config, tmp_path: Path, precision: str
) -> None:
    """Two processes at stage 1, one alone, two at stage 2, under FSDP2, at stage 3, with off-load, under DDP."""
    common = {**COMMON, "trainer__max_steps": 50, "trainer__precision": precision, "run__checkpoint_every": 1000}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert fit(tiny_config(**common, run__folder=str(whole))) == 0
    words = ["fit", "--config", str(tiny_config(**common)), "--resume", "auto"]

    def until(strategy: str, step: int) -> Command:
        return Command([*words, *STRATEGIES[strategy]], STOP.format(step=step))

    # ranks other than zero leave it to it to say how the run ended
    assert together(tmp_path / "first", [until("zero1", 10)]) == [(75, 0)]
    assert checkpoints.find(run).step == 10
    assert Python(f"{STOP.format(step=20)}\n{LLM}", words).wait() == 75
    last = Command([*words, *STRATEGIES["ddp"]])
    others = [until("zero2", 25), until("fsdp2-1", 30), until("zero3", 36), until("fsdp2-3", 38), until("offload2", 40)]
    ended = together(tmp_path / "rest", [*others, last])
    assert ended == [(75, 0)] * 5 + [(0, 0)]
    assert curve(run) == pytest.approx(curve(whole), abs=1e-5 if precision == "32-true" else 2e-3)
    for name in ("data_digest", "tokens", "learning_rate"):
        assert [row[name] for row in metrics(run)] == [row[name] for row in metrics(whole)]
    assert "lm_head.weight" not in checkpoints.find(run).weights()  # still tied
    told = [(line["event"], line["step"], line["why"]) for line in events(run)]
    assert told == [("stopped", step, "SIGUSR1") for step in (10, 20, 25, 30, 36, 38, 40)]
    spread = [attempt["strategy"] for attempt in json.loads((run / "run.json").read_text())["attempts"]]
    assert spread[0] == "deepspeed, stage 1" and spread[3:5] == ["fsdp2, stage 1", "deepspeed, stage 3"]


# One rank alone has a loss that is not finite, with gradients that are: in the first micro-batch of the fifth step.
POISON = """
from llm.model import DecoderForCausalLM
forward, calls = DecoderForCausalLM.forward, []
def poisoned(self, *args, **kwargs):
    output = forward(self, *args, **kwargs)
    if self.training:
        calls.append(1)
        if rank == 1 and len(calls) == 9:
            output.loss = output.loss + float("inf")
    return output
DecoderForCausalLM.forward = poisoned
def after():
    DecoderForCausalLM.forward = forward
"""


def test_all_ranks_skip_what_is_not_finite_on_one(tiny_config: Config, tmp_path: Path) -> None:
    commands, runs = [], {}
    kinds = [(name, words) for name, words in STRATEGIES.items() if name != "fsdp2-2"]
    for precision, (strategy, words) in itertools.product(("32-true", "bf16-mixed"), kinds):
        run = runs[strategy, precision] = tmp_path / f"{strategy}-{precision}"
        config = tiny_config(**COMMON, trainer__precision=precision, run__folder=str(run), run__keep_checkpoints=12)
        commands.append(Command(["fit", "--config", str(config), *words, "--run.checkpoint_every", "1"], POISON))
    assert set(together(tmp_path / "pair", commands)) == {(0, 0)}
    for run in runs.values():
        (skipped,) = events(run)
        assert (skipped["event"], skipped["step"], skipped["loss"]) == ("skipped step", 5, "inf")
        assert [row["skipped_steps"] for row in metrics(run) if row["train_loss"]] == ["0"] * 4 + ["1"] * 8
        four, five, six = (checkpoints.find(run, step) for step in (4, 5, 6))
        counts = [found.optimizer_state()["step/model.norm.weight"].item() for found in (four, five, six)]
        assert counts == [4, 4, 5]  # the step that was skipped is none of AdamW's
        assert four.weights_sha256() == five.weights_sha256() != six.weights_sha256()
        assert all(math.isfinite(loss) for loss in curve(run)[5:])
    for (_, precision), run in runs.items():
        tolerance = 1e-5 if precision == "32-true" else 5e-3
        assert curve(run) == pytest.approx(curve(runs["ddp", precision]), abs=tolerance, nan_ok=True)


def test_the_same_world_repeats_itself_bit_for_bit(tiny_config: Config, tmp_path: Path) -> None:
    """The same again, and from a checkpoint on."""
    common, commands = {**COMMON, "decoder__residual_dropout": 0.1, "run__checkpoint_every": 6}, []
    for strategy, which in itertools.product(("zero2", "fsdp2-1", "fsdp2-3"), "abc"):
        config = str(tiny_config(**common, run__folder=str(tmp_path / f"{strategy}{which}")))
        start = ["--resume", str(tmp_path / f"{strategy}a" / "checkpoints" / "step-00000006")] if which == "c" else []
        commands.append(Command(["fit", "--config", config, *STRATEGIES[strategy], *start]))
    assert set(together(tmp_path / "pair", commands)) == {(0, 0)}
    for strategy in ("zero2", "fsdp2-1", "fsdp2-3"):
        a, b, c = (measured(tmp_path / f"{strategy}{which}") for which in "abc")
        assert a == b and a[6:] == c
        assert_same_weights(tmp_path / f"{strategy}a", tmp_path / f"{strategy}c", 12)
