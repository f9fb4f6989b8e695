"""Floating-point operations of a training step, and the peak of known devices."""

from __future__ import annotations

import torch

from ..model import DecoderConfig
from ..model.residual import CONNECTIONS, copies
from ..model.streams import lacks_projections

# Dense peaks in FLOP/s (bf16 on tensor cores; fp32 outside them, what fp32 training uses unless TF32 is allowed), from
# the vendor's data sheets; where those count sparsity, as for Hopper and Blackwell in bf16, half of their figure. Names
# as the driver gives them, whole: a variant has another peak. A device that is not named here has no peak, and then no
# utilisation is reported.
PEAKS: dict[str, tuple[float, float]] = {
    "NVIDIA B200": (2250e12, 75e12),  # Blackwell data sheet, HGX B200: 4,500e12 sparse bf16
    "NVIDIA GH200 480GB": (989e12, 67e12),  # GH200 Grace Hopper Superchip, 480 GB LPDDR5X and 96 GB HBM3
    "NVIDIA H200": (989e12, 67e12),
    "NVIDIA H100 80GB HBM3": (989e12, 67e12),  # SXM
    "NVIDIA H100 NVL": (835e12, 60e12),  # H100 data sheet: 1,671e12 sparse bf16, of one of the two cards
    "NVIDIA H100 PCIe": (756e12, 51e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 19.5e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 19.5e12),
    "NVIDIA A100-PCIE-40GB": (312e12, 19.5e12),
    "NVIDIA A100 80GB PCIe": (312e12, 19.5e12),
    "NVIDIA L40S": (362e12, 91.6e12),
    "NVIDIA RTX A4000": (76.7e12, 19.2e12),
    "AMD Instinct MI300X": (1307.4e12, 163.4e12),  # its data sheet, which counts sparsity apart
}


def flops_per_token(config: DecoderConfig, context: int) -> float:
    """Model FLOPs of a forward and a backward pass for one token (Chowdhery et al. 2022, PaLM, Appendix B).

    6 for each weight that a token is multiplied with (2 forward, 4 backward), and 12 K for each (layer, head, key)
    of the attention, all `context` keys counted as PaLM does although half of them are masked. The embedding is a
    look-up and counts nothing; the output head counts, tied or not.
    """
    c = config
    heads = {"queries": c.num_attention_heads, "keys": c.num_key_value_heads, "values": c.num_key_value_heads}
    attention = 0
    for index in range(c.num_hidden_layers):
        lacking = lacks_projections(c, index)
        projected = sum(count for name, count in heads.items() if name not in lacking) + c.num_attention_heads
        attention += c.hidden_size * c.head_dim * projected
    matrices = 3 if c.feedforward == "gated" else 2
    feedforward = c.num_hidden_layers * matrices * c.hidden_size * c.intermediate_size
    weights = attention + feedforward + c.hidden_size * c.unpadded_vocab_size + _of_residual_form(c)
    return 6.0 * weights + 12.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * context


def _of_residual_form(config: DecoderConfig) -> int:
    """Multiplications of a token in its residual connections beyond the plain form's: numbers of hidden states times
    weights of depth averages, or the coefficients of hyper-connections and what they weigh."""
    c, n = config, copies(config)
    if c.residual == "dense":
        return c.hidden_size * sum(index + 2 for index in range(c.num_hidden_layers))
    if c.residual not in CONNECTIONS:
        return 0
    rows, columns = CONNECTIONS[c.residual].sizes(n, c.hidden_size)[1]
    projection = rows * columns * (n if c.residual == "hyper" else 1)  # of each copy, or of all at once
    return 2 * c.num_hidden_layers * (projection + n * (n + 2) * c.hidden_size)


def device_peak(device: torch.device, half_precision: bool) -> float | None:
    """The device's peak in FLOP/s from the table above; None where it is not named, CPUs among them."""
    if device.type != "cuda":
        return None
    bf16, fp32 = PEAKS.get(torch.cuda.get_device_name(device), (None, None))
    return bf16 if half_precision else fp32
