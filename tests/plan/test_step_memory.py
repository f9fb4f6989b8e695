"""The memory model against what PyTorch keeps, allocates and sends: saved tensors, the profiler, collectives."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm.bench.contenders import random_store
from llm.model import DecoderConfig, DecoderForCausalLM
from llm.plan.activation_memory import Formats, Work, block_terms, outer_terms, weight_copies
from llm.plan.communication import bytes_sent, collectives
from llm.plan.parameters import parameters
from llm.plan.state_memory import Layout, formats, state
from llm.plan.step_memory import Step, largest_micro_batch
from llm.train.module import LanguageModule
from llm.train.optim import OPTIMIZERS, Optimizer

from ..train.preloaded import Python
from ..train.runs import Config, fit
from . import allocations

SIZES: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
LLAMA: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 1024}
ONE = Layout(0, 1, 50_000_000, overlap=False)
VALUES = {"stream": ["values"]}
DROPOUTS = {"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}


def llama(**settings: Any) -> DecoderConfig:
    return DecoderConfig.llama(**(LLAMA | settings))


def gpt2(**settings: Any) -> DecoderConfig:
    return DecoderConfig.gpt2(**(SIZES | settings))


MODELS = {
    "llama": llama(),
    "llama values": llama(**VALUES, tie_word_embeddings=True, unpadded_vocab_size=2000),
    "llama streams, nmda": llama(stream=["queries", "values"], stream_weight="head", hidden_act="nmda"),
    "llama relu": llama(hidden_act="relu", intermediate_size=512),
    "gpt2": gpt2(),
    "gpt2 values": gpt2(**VALUES, **DROPOUTS),
    "gpt2 learned": gpt2(stream=["keys"], stream_weight="layer", hidden_act="nmda", nmda_learnable=True),
    "gpt2 first": gpt2(stream=["queries", "values"], stream_weight="head", stream_source="first"),
    "llama accumulated": llama(stream=["keys", "values"], stream_weight="layer", stream_source="accumulated"),
    "llama mix": llama(
        stream=["values"], stream_source="first", stream_weight="mix", stream_own=0.5, hidden_act="relu2"
    ),
    "llama svformer": llama(**VALUES, stream_source="first", stream_own=0.0, hidden_act="xielu"),
    "gpt2 dense": gpt2(stream=["values"], stream_source="dense", stream_weight="layer", hidden_act="polynorm"),
    "gpt2 by token": gpt2(stream=["keys"], stream_source="dense_by_token", stream_weight="head", hidden_act="swish"),
    "llama qk_norm": llama(qk_norm=True, stream=["queries"], stream_weight="layer"),
    "llama value embedding": llama(value_embedding="values", value_embedding_layers=[1, 4], qk_norm=True),
    "gpt2 value embedding, input": gpt2(value_embedding="input", stream=["values"]),
    "llama dense residual": llama(residual="dense"),
    "llama hyper": llama(residual="hyper", stream=["values"]),
    "gpt2 hyper-manifold": gpt2(residual="hyper-manifold", residual_expansion=3),
    "gpt2 without biases": gpt2(attention_bias=False, mlp_bias=False, hidden_act="identity"),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_counts_the_parameters(config: DecoderConfig) -> None:
    with torch.device("meta"):
        assert parameters(config) == DecoderForCausalLM(config).num_parameters()


def loss(model: DecoderForCausalLM, rows: int, context: int, half: bool, documents: bool = False) -> torch.Tensor:
    ids = torch.randint(model.config.unpadded_vocab_size, (rows, context))
    inputs = {"position_ids": (torch.arange(context) % (context // 2)).expand(rows, -1)} if documents else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):  # as Lightning's plugin
        return model(input_ids=ids, shift_labels=ids.clone(), num_items_in_batch=ids.numel(), **inputs).loss


FORMATS = {"fp32": Formats(4, 4, 4), "autocast": Formats(4, 4, 2, autocast=True), "bf16": Formats(2, 2, 2)}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_counts_what_autograd_keeps(config: DecoderConfig, form: Formats, masked: bool) -> None:
    if masked and config.attention_dropout and form.w == 2:
        pytest.skip("attention with a mask and dropout in half precision: not modelled")
    model = DecoderForCausalLM(config).train().to(torch.bfloat16 if form.weights == 2 else torch.float32)
    model.enable_fast_paths()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model, 2, 64, form.autocast, masked)
    work = Work(config, 2, 64, form, "cpu", masked)
    terms = [outer_terms(work), *(block_terms(work, index) for index in range(config.num_hidden_layers))]
    head = 4 * config.vocab_size * config.hidden_size + work.entering  # what the loss keeps: its two gradients
    labels = 8 * work.tokens + (work.tokens * 64 if masked else 0)  # held by the batch, not by autograd; the mask too
    expected = sum(sum(each.values()) for each in terms) + head - labels
    expected += sum(weight_copies(work, index) for index in range(config.num_hidden_layers))
    assert expected == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.001)


STEPS = {  # model, precision, recomputed blocks, micro-batches
    "llama fp32": ("llama", "32-true", 0, 1),
    "llama bf16": ("llama", "bf16-mixed", 0, 2),
    "llama values fp32, every block again": ("llama values", "32-true", 1, 2),
    "llama values bf16, every third again": ("llama values", "bf16-mixed", 3, 1),
    "llama nmda bf16": ("llama streams, nmda", "bf16-mixed", 0, 1),
    "gpt2 fp32, every second again": ("gpt2", "32-true", 2, 1),
    "gpt2 bf16-true": ("gpt2", "bf16-true", 0, 1),
    "gpt2 values fp32": ("gpt2 values", "32-true", 0, 1),
    "gpt2 values bf16": ("gpt2 values", "bf16-mixed", 0, 1),
}


@pytest.mark.parametrize(("name", "precision", "recompute", "micro_batches"), STEPS.values(), ids=STEPS)
def test_peak_of_steps_in_one_process(name: str, precision: str, recompute: int, micro_batches: int) -> None:
    config, rows, context = MODELS[name], 2, 256
    with allocations.recorded() as recording:
        model = DecoderForCausalLM(config).train().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
        model.enable_fast_paths()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for index, block in enumerate(model.model.layers):
                block.gradient_checkpointing = index % recompute == 0
        optimizer = Optimizer().build(model)
        for _ in range(2):
            for _ in range(micro_batches):
                loss(model, rows, context, precision == "bf16-mixed").backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del model, optimizer
    work = Work(config, rows, context, formats(precision, 0), "cpu")
    assert Step(work, ONE, micro_batches, recompute).peak().total == pytest.approx(recording.peak(), rel=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_that_of_torch(name: str) -> None:
    config = MODELS["llama streams, nmda"]
    model = DecoderForCausalLM(config)
    optimizer = Optimizer(name).build(model)
    loss(model, 1, 8, False).backward()
    optimizer.step()
    tensors = [tensor for kept in optimizer.state.values() for kind, tensor in kept.items() if kind != "step"]
    held = state(config, 4, Layout(0, 1, 1, optimizer=name), 1).held
    assert held["optimizer"] == sum(tensor.nbytes for tensor in tensors)


RUNS = {  # stage, precision, recomputed blocks, off-load
    "fsdp2-1": (1, "bf16-mixed", 0, False),
    "fsdp2-3": (3, "bf16-mixed", 0, False),
    "ddp": (0, "bf16-mixed", 0, False),
    "1": (1, "bf16-mixed", 0, False),
    "2": (2, "bf16-mixed", 0, False),
    "3": (3, "bf16-mixed", 0, False),
    "2-offload": (2, "bf16-mixed", 2, True),
    "2-fp32": (2, "32-true", 0, False),
}
ROWS, MICRO_BATCHES, CONTEXT = 2, 2, 128
FITTED = {"hidden_size": 128}  # small: a processor without bfloat16 multiplies in it twenty times as slowly


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real `fit` in two processes under each strategy: allocations and collectives of its second step."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    random_store(folder / "store", SIZES["vocab_size"], 8192)
    (folder / "store" / "tokenizer").mkdir()
    config = {
        "seed_everything": 1,
        "decoder": LLAMA | VALUES | FITTED,
        "data": {
            "store": str(folder / "store"),
            "context": CONTEXT,
            "batch_size": 2 * ROWS * MICRO_BATCHES,
            "micro_batch_size": ROWS,
            "validation_rows": 4,
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 2},
        "run": {"folder": "", "loggers": ["csv"]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    commands = {}
    for name, (stage, precision, recompute, offload) in RUNS.items():
        words = ["--run.folder", f"{folder}/run-{name}", "--model.activation_checkpointing", str(recompute)]
        words += ["--trainer.precision", precision]
        if stage:
            words += ["--strategy.name", "fsdp2" if "fsdp2" in name else "deepspeed", "--strategy.stage", str(stage)]
            words += ["--strategy.offload_optimizer", str(offload).lower()]
        commands[name] = ["fit", "--config", f"{folder}/config.yaml", *words]
    (folder / "commands.json").write_text(json.dumps(commands))
    in_two_processes(allocations.__file__, str(folder))
    return folder


def in_two_processes(script: str, *words: str) -> None:
    """Run a script as ranks 0 and 1, as torchrun starts them."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "GROUP_RANK": "0"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    code = "import runpy, sys\ndel sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    processes = [Python(code, [script, *words], shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


def step_of(name: str) -> Step:
    stage, precision, recompute, offload = RUNS[name]
    layout = Layout(stage, 2, 50_000_000, offload, overlap=False, fsdp="fsdp2" in name)
    work = Work(llama(**VALUES, **FITTED), ROWS, CONTEXT, formats(precision, stage), "cpu")
    return Step(work, layout, MICRO_BATCHES, recompute)


def recorded_run(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((runs / f"{name}-rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_peak_of_fit_in_two_processes(runs: Path, name: str) -> None:
    peak = max(moment.total + moment.host for moment in step_of(name).moments())  # a CPU is its own host
    for rank in recorded_run(runs, name):
        assert rank["status"] == 0
        assert peak == pytest.approx(rank["peak"], rel=0.1)


@pytest.mark.parametrize("name", ["1", "2", "3", "2-offload", "2-fp32", "fsdp2-1", "fsdp2-3"])
def test_what_sharded_runs_send(runs: Path, name: str) -> None:
    step = step_of(name)
    expected = {"all-reduce": 0, "all-gather": 0, "reduce-scatter": 0}
    for each in collectives(step.work.config, step.work.formats.weights, step.layout, MICRO_BATCHES):
        expected[each.operation] += each.payload * each.times
    for rank in recorded_run(runs, name):
        sent = dict.fromkeys(expected, 0) | rank["payloads"]
        assert sent == pytest.approx(expected, rel=0.001, abs=1000)  # norms and flags are a few numbers


def test_sent_bytes_by_hand() -> None:
    """Rajbhandari et al. 2020, Section 7: all-reduce 2 P, stage 3 3 P, here in bytes, N = 8, P of the 1B model."""
    config = llama()
    p = parameters(config)
    ring = 7 / 8
    assert bytes_sent(config, 4, Layout(0, 1, 10**6), 4) == 0
    assert bytes_sent(config, 4, Layout(0, 8, 10**6), 4) == ring * 2 * 4 * p
    assert bytes_sent(config, 2, Layout(1, 8, 10**6), 4) == ring * (2 * 4 * p + 2 * p)
    assert bytes_sent(config, 2, Layout(2, 8, 10**6), 4) == ring * (4 * 2 * 4 * p + 2 * p)


def test_zero_by_hand() -> None:
    """Rajbhandari et al. 2020, Figure 1, at the update, P = 5.3 million on 4 devices, without any buckets: bf16 weights
    2 P, fp32 master weight and moments 12 P; their gradients are bf16, DeepSpeed's sums fp32."""
    config = llama()
    p = parameters(config)
    expected = {1: 2 + 6 + 12 / 4, 2: 2 + 4 / 4 + 12 / 4}
    for stage, each in expected.items():
        work = Work(config, 1, 16, formats("bf16-mixed", stage))
        update = Step(work, Layout(stage, 4, 1)).moments()[-1]
        assert update.total == pytest.approx(each * p, rel=1e-4)


def test_the_largest_micro_batch_is_a_divisor() -> None:
    assert largest_micro_batch(64, lambda size: size <= 20) == 16
    assert largest_micro_batch(12, lambda size: True) == 12
    assert largest_micro_batch(7, lambda size: size < 7) == 1
    assert largest_micro_batch(8, lambda size: False) is None


def test_gradients_are_gone_when_the_next_forward_pass_begins(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But between the micro-batches of a step they are there."""
    held: list[bool] = []
    before = LanguageModule.training_step

    def step(self: LanguageModule, *batch: Any) -> torch.Tensor:
        held.append(any(parameter.grad is not None for parameter in self.parameters()))
        return before(self, *batch)

    monkeypatch.setattr(LanguageModule, "training_step", step)
    assert fit(tiny_config(data__micro_batch_size=4, trainer__max_steps=3)) == 0
    assert held == [False, True] * 3
