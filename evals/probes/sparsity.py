"""How few of a feed-forward network's neurons carry its activity: the Gini index, layer by layer.

Kim et al. 2023, Appendix A.10, Equation S13: 0 where all neurons are equally active, near 1 where a few are.

Dimension letters: B batch, T time, K neurons of a feed-forward network.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evals.exports import called, check_numbers
from evals.probes.heads import evaluating, whole_ticks
from llm.common.errors import UserError
from llm.common.exported import text_config
from llm.common.plots import COLOURS, MARKERS, new_figure, style
from llm.common.processes import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The last projection of a feed-forward network, by the end of its name: ours and Llama's, GPT-2's, GPT-NeoX's.
LAST_PROJECTIONS = (".down_proj", ".mlp.c_proj", ".mlp.dense_4h_to_h")
DASHES = ("-", "--", ":", "-.")
CHUNK = 2**22  # numbers sorted at once: with their order, 48 MiB


def gini(values: Tensor, signed: bool = False) -> Tensor:
    """The Gini index of the last dimension: (..., K) -> (...), at least float32.

        G = sum_ij |x_i - x_j| / (2 K^2 mean(x)) = sum_i (2 i - K - 1) x_(i) / (K sum_i x_(i)),  x_(1) <= ... <= x_(K)

    The second form sorts instead of making K^2 differences. By default x is the magnitude |values|: G lies in
    [0, 1 - 1/K], 0 where all are equal (all zero, too). `signed` takes the values as they are, as the paper's Eq. S13
    does: with negative values, which GELU and NMDA have, G then has no bound, and is infinite where their mean is 0.
    """
    values = values if values.dtype == torch.float64 else values.float()
    ordered = (values if signed else values.abs()).sort(dim=-1).values
    count = values.shape[-1]
    weights = torch.arange(1 - count, count, 2, device=values.device, dtype=values.dtype) / count  # (K,), sum 0
    spread = ((ordered - ordered[..., :1]) * weights).sum(dim=-1)  # from the smallest: exactly 0 where all are equal
    return torch.where(spread == 0, 0.0, spread / ordered.sum(dim=-1))


@torch.inference_mode()
def ffn_gini(model: Any, batches: Iterable[Tensor], signed: bool = False) -> list[float]:
    """The mean over tokens of the Gini index of each layer's feed-forward activity, first layer first.

    batches: token ids (B, T), none of them padding. The activity is what the last projection reads: in a plain network
    the activation function's output, as in the paper; in a gated one that output times the other branch. float32.
    `signed`: see `gini`. The model has no hook left afterwards and every module its own training mode.
    UserError: the model has not one such projection a layer, or there is no batch.
    """
    body = getattr(model, "base_model", model)  # without the output head, which is not asked
    projections = _last_projections(body, text_config(model.config).num_hidden_layers)
    sums, tokens = [0.0] * len(projections), 0

    def measure(layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            activity = inputs[0].flatten(0, -2)  # (B T, K)
            for part in activity.split(max(1, CHUNK // activity.shape[-1])):
                sums[layer] += gini(part, signed).cpu().double().sum().item()

        return hook

    handles = [module.register_forward_pre_hook(measure(layer)) for layer, module in enumerate(projections)]
    try:
        with evaluating(model):
            for ids in progress_bar(None, 0, "sparsity", "batch", iterable=batches, leave=False, delay=1):
                body(input_ids=ids.to(model.device), use_cache=False)
                tokens += ids.numel()
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise UserError("no tokens to measure sparsity on: give at least one batch")
    if not signed:  # which may be infinite by right
        check_numbers(sums, f"sparsity of {called(model)}")
    return [total / tokens for total in sums]


def _last_projections(body: nn.Module, layers: int) -> list[nn.Module]:
    """The last projection of each layer's feed-forward network, in the order of the layers."""
    found = [module for name, module in body.named_modules() if f".{name}".endswith(LAST_PROJECTIONS)]
    if len(found) != layers:
        raise UserError(
            f"{type(body).__name__} has {len(found)} feed-forward projections known here for {layers} layers; "
            f"sparsity needs one a layer, named {', '.join(name[1:] for name in LAST_PROJECTIONS)}: leave it out"
        )
    return found


def draw_gini(gini_by_name: Mapping[str, list[float]]) -> "Figure":
    """The Gini index over layers, counted from 0, one line a model; after every two models the dashes change."""
    with style():
        figure = new_figure()
        axes = figure.subplots()
        for index, (name, values) in enumerate(gini_by_name.items()):
            pair, place = divmod(index, len(COLOURS))
            look: dict[str, Any] = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": DASHES[pair % 4]}
            axes.plot(values, markersize=4.5, label=name, **look)
        axes.set(xlabel="layer", ylabel="Gini index of FFN activity")
        axes.set_xticks(whole_ticks(max(map(len, gini_by_name.values()))))
        axes.grid(axis="y")
        axes.legend()
    return figure
