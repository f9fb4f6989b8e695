"""The plan of `plan.py` as text: what the run is, a table for each number of devices, the formulas, the days."""

from __future__ import annotations

from itertools import groupby
from textwrap import fill
from typing import Any

from .step_memory import CATEGORIES

GIB = 2**30
WIDTH = 100
HEADS = ("weights", "grads", "optim.", "activ.", "logits", "buffers")  # of CATEGORIES

LEGEND = (
    "Formulas. P parameters, N devices, T context, B micro-batch, n = B T, m micro-batches a step, b bucket, D width, "
    "F FFN width, H heads, G key-value heads, K head width, V vocabulary, L layers; w bytes of a number in a matrix "
    "product and h of one in the residual stream: fp32 4 and 4, autocast 2 and 4, bf16 weights 2 and 2."
)
FORMULAS = {
    "weights": "FSDP2 4P/N and w P (stage 3: w of two blocks and what is outside blocks). DDP 4P, under autocast "
    "also 2 bytes for each number in the blocks' matrices. ZeRO in bf16: 2P + 4P/N (masters); stage 3 6P/N and what "
    "is gathered, 2 min(P, 5e8 + V D). ZeRO in fp32: 4P for each 2P. Off-load: without the masters.",
    "gradients": "FSDP2 4P/N; stage 1 4P if m > 1, gone as they are summed. One device 4P. DDP 4P, 8P if m > 1 (its "
    "buckets, and the sum so far). ZeRO 1 in bf16 4P + 2P; ZeRO 2 and 3 4P/N, and what is not summed yet.",
    "optimizer": "AdamW's moments: 8P; ZeRO 8P/N (Rajbhandari et al. 2020, Section 3.1). Muon: 4 for a number of the "
    "blocks' matrices.",
    "activations": "a block: norms 2 (h n D + 4n); inputs of q, k, v w n D and of the FFN w n D (under autocast 3 "
    "and 2 copies); q, k, v and the result w n K (2H + 2G) + 4 n H; FFN 4 w n F, a plain one 2 w n F. Outside: ids "
    "16 n, angles 2 h T K, last norm. Backward pass: h n D + 2 w n F, with NMDA in bf16 26 n F. A recomputed block: "
    "its inputs, and one block at a time whole. Counted from llm/model as in Korthikanti et al. 2022, Section 4, "
    "with flash attention.",
    "logits": "the head's fp32 gradient 4 V D, in bf16 a chunk's product 2 V D; a chunk of logits, the larger of "
    "2^26 bytes and 4 V D; hidden states and their gradients (llm/model/loss.py).",
    "buffers": "FSDP2: what is sent of a block in fp32. ZeRO: two buckets, and one joined in fp32: up to 10 b "
    "(DeepSpeed 0.19.8 as train/strategy.py asks).",
    "sent": "a step, rings (Patarasuk & Yuan 2009), (N - 1) / N of: DDP 2 x 4P; ZeRO 1 2 x 4P + w P; ZeRO 2 m x 2 x "
    "4P + w P; ZeRO 3 m (w P + w (P - kept) + 4P); FSDP2 1 w P + 4P, 2 w P + m 4P, 3 m (2 w P + 4P), where weights "
    "outside blocks are gathered once; 2P for 4P where strategy.communication_dtype is bf16. DeepSpeed's stages 1 "
    "and 2 sum by all-reduce, stage 2 in every micro-batch.",
    "not hidden": "sent bytes / --network, less what runs during a pass: DDP during the last micro-batch's backward "
    "pass, ZeRO 2 and 3 during the passes of each, FSDP2 during those in which it sends; ZeRO 1 in bf16, the weights "
    "of 1 and 2 and all gradients of the embedding during none. A backward pass is two thirds of a micro-batch.",
    "FLOPs": "a token: 6 for each weight it meets + 12 L H K T (PaLM, Chowdhery et al. 2022, Appendix B).",
}
OF_THE_TABLE = (
    "All columns are of the highest moment of a step (loss, each block's backward pass, sum, update). Not in them: the "
    "CUDA context, NCCL, cuBLAS, fragments of the allocator; --headroom leaves room for those."
)


def format_plan(plan: dict[str, Any]) -> str:
    """The whole text."""
    parts = [_run(plan), *_tables(plan), _network(plan), _formulas(), _remarks(plan), _time(plan)]
    return "\n\n".join(part for part in parts if part)


def _run(plan: dict[str, Any]) -> str:
    device, total = plan["device"], plan["flops"]
    share = plan["recomputed_share"]
    recomputed = f" and {share:.1%} more for recomputed blocks" if share else ""
    checkpointing = {0: "no block is recomputed", 1: "every block is recomputed"}
    lines = [
        " ".join([plan["config"], *plan["overrides"]]),
        f"{plan['parameters']:,} parameters; {plan['precision']}; "
        + checkpointing.get(
            plan["activation_checkpointing"], f"every {plan['activation_checkpointing']}th block is recomputed"
        ),
        f"{plan['max_steps']:,} steps x {plan['batch_size']:,} rows x {plan['context']:,} tokens = "
        f"{plan['tokens']:,} tokens",
        f"{plan['flops_per_token']:.3e} FLOPs a token, {total:.3e} in all{recomputed}",
        f"{device['name']}: {device['memory_bytes'] / GIB:.1f} GiB, of which {plan['headroom']:.0%} may be planned",
    ]
    return "\n".join(lines)


def _tables(plan: dict[str, Any]) -> list[str]:
    """A table for each number of devices."""
    tables = []
    for devices, rows in groupby(plan["layouts"], key=lambda row: row["devices"]):
        of_layout = list(rows)
        each = of_layout[0]["rows_per_device"]
        lines = [
            f"Devices: {devices}. Rows of a step on each: {each}. GiB of one device",
            f"{'':17}{'B x m':>8}"
            + "".join(f"{name:>8}" for name in HEADS)
            + f"{'peak':>8}{'':6}{'host':>6}{'sent':>7}",
            *(_line(row, plan["device"]["memory_bytes"]) for row in of_layout),
        ]
        tables.append("\n".join(lines))
    return tables


def _line(row: dict[str, Any], memory: float) -> str:
    size = f"{row['micro_batch']} x {row['micro_batches']}"
    parts = "".join(f"{row['bytes'][name] / GIB:>8.2f}" for name in CATEGORIES)
    share = f"{row['peak_bytes'] / memory:5.0%}" + (" " if row["fits"] else "!")
    rest = f"{row['host_bytes'] / GIB:>6.1f}{row['sent_bytes'] / GIB:>7.1f}"
    return f"{row['layout']:17}{size:>8}{parts}{row['peak_bytes'] / GIB:>8.2f}{share}{rest}"


def _network(plan: dict[str, Any]) -> str:
    """A table of steps over several nodes."""
    network = plan["network"]
    if network is None:
        return ""
    head = f"Network: {network['gigabits']:g} Gb/s leave each node of {network['devices']} devices. "
    rows = [row for row in plan["layouts"] if row["time"]]
    if not rows:
        return head + "No number of --gpus needs several nodes."
    lines = [
        fill(head + "Seconds of a step, at best: without what is sent inside a node or to host memory", WIDTH),
        f"{'devices':>7}  {'':17}{'compute':>9}{'sent':>9}{'not hidden':>12}{'of step':>9}{'days':>9}{'GPU-hours':>11}",
    ]
    for row in rows:
        time = row["time"]
        start = f"{row['devices']:>7}  {row['layout']:17}"
        if time["compute"] is None:
            lines.append(f"{start}{'?':>9}{time['sent']:>9.3f}{'?':>12}{'?':>9}{'?':>9}{'?':>11}")
            continue
        share = time["not_hidden"] / (time["compute"] + time["not_hidden"])
        lines.append(
            f"{start}{time['compute']:>9.3f}{time['sent']:>9.3f}{time['not_hidden']:>12.3f}{share:>9.1%}"
            f"{time['days']:>9.2f}{time['gpu_hours']:>11,.0f}"
        )
    return "\n".join(lines)


def _formulas() -> str:
    lines = [
        fill(f"{name:13}{text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 15)
        for name, text in FORMULAS.items()
    ]
    return "\n".join([fill(LEGEND, WIDTH), *lines, fill(OF_THE_TABLE, WIDTH)])


def _remarks(plan: dict[str, Any]) -> str:
    remarks = []
    rows = plan["layouts"]
    if any(not row["fits"] for row in rows):
        remarks.append(
            "! does not fit: even one row is too much where no --micro-batch was given; recompute blocks "
            "(--model.activation_checkpointing 1), take a higher ZeRO stage or more devices"
        )
    given = plan["config_micro_batch"]
    if given is not None and any(row["micro_batch"] != given for row in rows):
        remarks.append(f"The config's data.micro_batch_size is {given}: --micro-batch {given} plans with it.")
    moments = sorted({row["peak_moment"] for row in rows})
    remarks.append(f"Highest at: {'; '.join(moments)}.")
    if plan["compiled"]:
        remarks.append("torch.compile fuses and recomputes within blocks: activations are upper bounds.")
    if plan["attention"] == "eager" or plan["plain"]:
        remarks.append(
            "! model.attention eager and model.disable_fast_paths keep more than is counted here, which is for sdpa "
            "and the fast paths: leave them out, or measure with `python -m llm bench --find-micro-batch`"
        )
    if any(row["host_bytes"] for row in rows):
        remarks.append("host: memory of one process outside its device, where the optimizer is off-loaded.")
    return "\n".join(fill(remark, WIDTH) for remark in remarks)


def _time(plan: dict[str, Any]) -> str:
    time = plan["time"]
    if time is None:
        return fill(
            "Days: not known without a throughput; measure one with `python -m llm bench --config C --json F` on this "
            "device and give --bench F, or give --tokens-per-second X for one device.",
            WIDTH,
        )
    days = ", ".join(f"{days:.2f} days on {n}" for n, days in time["days"].items())
    hours = f"{time['gpu_hours']:,.0f} GPU-hours"
    used = time["model_flop_utilisation"]
    share = f", {used:.1%} of the device's peak FLOP/s" if used is not None else ""
    return fill(
        f"Days: {days} devices ({hours}) = tokens / (N x tokens per second of one device), if N devices are N times "
        f"as fast as one; at {time['tokens_per_second_per_device']:,.0f} tokens/s a device ({time['source']}){share}.",
        WIDTH,
    )
