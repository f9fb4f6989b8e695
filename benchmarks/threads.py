"""How fast training is with each OpenMP wait policy, on an idle and on a busy machine: python -m benchmarks.threads.

One child process per policy, since libgomp reads its policy once, when torch is loaded. The children take turns: each
trains every model for a few seconds a round while the others wait for input; the order reverses every round.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm.common.environment import environment, now
from llm.common.threads import WAIT_SETTINGS

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
MODELS = {
    "small language model": {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 1024, "rows": 16, "time": 128},
    "8M language model": {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 50257, "rows": 2, "time": 256},
    "in-context experiment": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "rows": 128, "time": 17},
}


def main() -> None:
    """Measure every policy and print the rates, relative to the default policy on the same machine."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.threads --json benchmarks/results/threads_cpu.json",
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds per load (default: 7)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per policy, model and round (default: 2)")
    parser.add_argument("--busy", type=int, default=2, metavar="N", help="busy loops of the second load (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child()
        return
    with children() as run:
        loads = {}
        for name, count in {"idle": 0, f"{options.busy} busy loops": options.busy}.items():
            with busy_loops(count):
                loads[name] = measure(run, options.rounds, options.seconds)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.threads", *sys.argv[1:]]),
        "date": now(), "rounds": options.rounds, "seconds": options.seconds, "loads": loads, **environment(),
    }  # fmt: skip
    print(report(loads))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(run: Callable[[str, str, float], float], rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Steps per second: model -> policy -> a value per round."""
    rates: dict[str, dict[str, list[float]]] = {model: {policy: [] for policy in POLICIES} for model in MODELS}
    for turn in range(rounds):
        for model in MODELS:
            for policy in list(POLICIES) if turn % 2 == 0 else reversed(POLICIES):
                rates[model][policy].append(run(policy, model, seconds))
    return rates


def report(loads: dict[str, Any]) -> str:
    """Median rates as text, with the median ratio to the default policy."""
    lines = []
    for load, models in loads.items():
        for model, rates in models.items():
            lines.append(f"{model}, {load}:")
            for policy, values in rates.items():
                ratio = statistics.median(a / b for a, b in zip(values, rates["default"], strict=True))
                lines.append(f"  {policy:24} {statistics.median(values):8.2f} steps/s  {ratio:6.3f} x default")
    return "\n".join(lines)


# ---- Processes -------------------------------------------------------------------------------------------------------


@contextmanager
def children() -> Iterator[Callable[[str, str, float], float]]:
    """A process per policy; the function given has one of them train a model for so many seconds."""
    plain = {name: value for name, value in os.environ.items() if name not in WAIT_SETTINGS}
    words = [sys.executable, "-m", "benchmarks.threads", "--child"]
    processes = {
        policy: subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=plain | settings
        )
        for policy, settings in POLICIES.items()
    }

    def run(policy: str, model: str, seconds: float) -> float:
        process = processes[policy]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([model, seconds]) + "\n")
        return float(process.stdout.readline())

    try:
        for policy in POLICIES:  # first steps, one process at a time
            for model in MODELS:
                run(policy, model, 0.5)
        yield run
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """`count` processes that each keep a core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def child() -> None:
    """Train the model that each line of standard input names for so many seconds, and answer with steps per second."""
    import torch

    from llm.model import DecoderConfig, DecoderForCausalLM
    from llm.train.optim import Optimizer

    steps: dict[str, Callable[[], None]] = {}
    for name, sizes in MODELS.items():
        rows, length = sizes["rows"], sizes["time"]
        shape = {key: value for key, value in sizes.items() if key not in ("rows", "time")}
        config = DecoderConfig.llama(
            **shape,
            intermediate_size=4 * sizes["hidden_size"],
            num_attention_heads=4,
            max_position_embeddings=length,
            stream=["values"],
        )
        model = DecoderForCausalLM(config).train()
        optimizer = Optimizer(lr=1e-3).build(model)
        ids = torch.randint(sizes["vocab_size"], (rows, length + 1))

        def step(model=model, optimizer=optimizer, ids=ids) -> None:
            labels = ids[:, 1:].contiguous()
            model(input_ids=ids[:, :-1], shift_labels=labels, num_items_in_batch=labels.numel()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    for line in sys.stdin:
        name, seconds = json.loads(line)
        count, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds or count < 1:
            steps[name]()
            count += 1
        print(count / spent, flush=True)


if __name__ == "__main__":
    main()
