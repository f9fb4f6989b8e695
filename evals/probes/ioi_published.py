"""The paper's sentences as the authors' script measures them, which is not how the models were trained.

The script of Burns et al. 2025 builds the model with the stream of values and loads every checkpoint into it: classic
ones fit, because a stream has no parameters, and are measured with a stream that they were never trained with. Dropout
is on. Here a classic export is loaded with the stream of the export it is compared with, each model with its own
dropout, and the probabilities are the mean over `PASSES` passes in place of one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evals.exports import Export, facts, load_model
from evals.probes.ioi import OUTCOMES, Record, ioi_probabilities, sentence_means, split_names, summarise
from llm.common.errors import UserError

PASSES = 16
SEED = 0
DROPOUT = ("attention_dropout", "residual_dropout", "embedding_dropout")


def stream_of(exports: Sequence[Export], wanted: bool = True) -> dict[str, Any]:
    """The configuration of the stream that all models are measured with: that of the first that has one. Nothing where
    it is not `wanted`.

    UserError: no model or all models have one, or it has weights of its own, which a classic checkpoint lacks.
    """
    if not wanted:
        return {}
    configs = [(export, export.config()) for export in exports]
    streamed = [(export, config) for export, config in configs if getattr(config, "stream", None)]
    if not streamed or len(streamed) == len(configs):
        raise UserError(
            "--as-published measures models without a stream inside one with a stream; give exports of both kinds"
        )
    if foreign := [export for export, config in configs if not hasattr(config, "stream")]:
        raise UserError(f"{foreign[0].folder} is not an export of this project, which --as-published takes alone")
    export, config = streamed[0]
    if config.stream_weight != "fixed" or config.stream_own == 0:
        raise UserError(
            f"the stream of {export.folder} has learned weights ({config.stream_weight}) or leaves out projections, so "
            "its weights are not those of the others; give one with stream_weight: fixed and stream_own: 1"
        )
    return {key: value for key, value in config.to_dict().items() if key.startswith("stream")}


def run(groups: Mapping[str, Sequence[Export]], stream: Mapping[str, Any], device: str, dtype: str) -> dict[str, Any]:
    """Measure every model, as `evals.probes.ioi.run`: {"table": rows of `summarise`, "models": {group: [...]}}."""
    results = {group: [_evaluate(export, stream, device, dtype) for export in of] for group, of in groups.items()}
    return {"table": summarise({g: [r["prompts"] for r in of] for g, of in results.items()}), "models": results}


def _evaluate(export: Export, stream: Mapping[str, Any], device: str, dtype: str) -> dict[str, Any]:
    config = export.config()
    changes = {} if config.stream else dict(stream)
    loaded = load_model(export, device, dtype, changes=changes)
    loaded.model.enable_fast_paths(())  # torch's own dropout, which draws the same on any machine
    passes = []
    state = torch.get_rng_state()
    try:
        for number in range(PASSES):
            torch.manual_seed(SEED + number)
            passes.append(ioi_probabilities(loaded.model, loaded.tokenizer, export.info.get("context"), dropout=True))
    finally:
        torch.set_rng_state(state)
    records = _means(passes)
    means = sentence_means(records)
    return {
        **facts(loaded),
        "as_published": {
            "changes": changes,
            **{name: getattr(config, name) for name in DROPOUT},
            "passes": PASSES,
            "seed": SEED,
        },
        "names_of_several_tokens": split_names(records),
        "sentences": means,
        "mean": {outcome: float(np.mean(means[outcome])) for outcome in OUTCOMES},
        "prompts": records,
    }


def _means(passes: Sequence[Sequence[Record]]) -> list[Record]:
    """The records of one pass with the mean probabilities of all."""
    keys = [f"probability_{outcome}" for outcome in OUTCOMES]
    return [{**of[0], **{k: float(np.mean([r[k] for r in of])) for k in keys}} for of in zip(*passes, strict=True)]
