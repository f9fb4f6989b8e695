"""What torch compiles in a run: whole blocks, as often as is said, and undisturbed by signals."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel

from llm.model import DecoderConfig
from llm.train import checkpoint as checkpoints
from llm.train import compilation
from llm.train.module import LanguageModule

from .preloaded import LLM, Python, two_ranks
from .runs import Config, events, fit


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.usefixtures("one_rank")
def test_a_block_is_one_graph_under_ddp() -> None:
    """DDP's buckets are smaller than a block here, as they are at 1B."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    decoder = DecoderConfig(vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, stream=[])
    module, ids = LanguageModule(decoder, compile=True), torch.zeros(2, 16, dtype=torch.long)
    module.model.lm_head.compiled_loss = False
    for block in module.model.model.layers:
        block.compile(backend=counting)
    parallel = DistributedDataParallel(module.model, bucket_cap_mb=1)
    parallel(input_ids=ids, shift_labels=ids, num_items_in_batch=32).loss.backward()
    assert len(graphs) == 1  # the two blocks are alike


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch traces and counts as ever, and runs what it has traced as it stands."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="eager"))


# 13 validation rows come in batches of 8 and 5.
ODD = {
    "model__compile": True,
    "model__disable_fast_paths": ["loss"],  # whose compilation is another one
    "data__validation_rows": 13,
    "data__validate_every": 2,
    "trainer__max_steps": 4,
}


def test_a_run_says_how_many_variants_were_compiled(
    tiny_config: Config, tmp_path: Path, traced_only: None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**ODD, "model__activation_checkpointing": 2, "decoder__num_hidden_layers": 4}
    assert fit(tiny_config(**settings)) == 0
    said = capsys.readouterr().err
    (compiled,) = events(tmp_path / "run")  # once, and no limit was met
    assert (compiled["event"], compiled["step"], compiled["limit"]) == ("compiled", 2, compilation.RECOMPILE_LIMIT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled["variants"]
    assert 8 < compiled["most"] <= compiled["variants"]  # more than torch's own limit
    assert said.count("compiled: ") == 1
    assert f"at most {compiled['most']} of one (limit {compilation.RECOMPILE_LIMIT})" in said


def test_a_run_warns_where_torch_gives_up(
    tiny_config: Config,
    tmp_path: Path,
    traced_only: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compilation, "RECOMPILE_LIMIT", 2)
    assert fit(tiny_config(**ODD)) == 0
    told = {event["event"]: event for event in events(tmp_path / "run")}
    assert told.keys() == {"recompile limit", "compiled"}
    assert told["compiled"]["most"] == told["compiled"]["limit"] == told["recompile limit"]["limit"] == 2
    assert "in 2 variants and gives up: batches of other shapes run it uncompiled" in capsys.readouterr().err


def members(group: int) -> list[str]:
    """The names of the programs of a process group."""
    names = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        if int(rest.split()[2]) == group:
            names.append(name)
    return names


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_while_it_compiles_saves_and_stops(tiny_config: Config, tmp_path: Path) -> None:
    """Two ranks; the signal goes to all their processes, as Slurm sends it: to the compilers too."""
    config = tiny_config(model__compile=True, decoder__num_hidden_layers=1)
    apart = f"import os\nos.setpgrp()\nos.environ['TORCHINDUCTOR_CACHE_DIR'] = '{tmp_path}/inductor'\n{LLM}"
    ranks = two_ranks(apart, ["fit", "--config", str(config), "--trainer.devices", "2"])
    deadline = time.monotonic() + 600
    while not any("cc1plus" in members(rank.pid) for rank in ranks):
        for rank in ranks:
            assert rank.poll() is None, rank.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGUSR1)
    said = "".join(rank.communicate(timeout=600)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [os.EX_TEMPFAIL, 0], said
    assert checkpoints.find(tmp_path / "run").step == 1


# Triton's pool is there on GPUs alone, so one is started here, as torch would while it compiles for a GPU.
POOL = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch._dynamo.callback import CallbackTrigger, callback_handler
from torch._inductor.async_compile import AsyncCompile
from llm.train.compilation import Compilation
from llm.train.signals import Signals

os.setpgrp()
signals, compilation = Signals(), Compilation(None)
signals.install()
callback_handler.register_start_callback(compilation._begin)
callback_handler.register_end_callback(compilation._end)
with callback_handler.install_callbacks(CallbackTrigger.LAZY_BACKWARD, "0/0"):
    pool = AsyncCompile.process_pool()
    pool.submit(os.getpid).result(timeout=120)
for number in (signal.SIGUSR1, signal.SIGTERM):
    os.killpg(0, number)
while sum(signals.came.values()) < 2:
    time.sleep(0.01)
assert pool.submit(os.getpid).result(timeout=60) != os.getpid()
assert pool.process.poll() is None
pool.shutdown()
"""


def test_torchs_pool_of_compilers_outlives_the_signal_to_stop() -> None:
    process = Python(POOL, [], {"TORCHINDUCTOR_COMPILE_THREADS": "2"})
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
