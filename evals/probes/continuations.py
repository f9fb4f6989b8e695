"""What a model writes: greedy continuations of the beginnings of validation documents, the same for every model.

store -> the first tokens of a few of its documents -> the likeliest token, again and again -> EXPORT/evals
"""

from pathlib import Path
from typing import Any

import torch

from evals.exports import Export, LoadedModel, load_model
from evals.harness.results import locked
from evals.probes.losses import model_context, open_store, sampled_documents
from llm.common.errors import UserError
from llm.common.files import first_line, write_json
from llm.data.store import TokenStore

NAME = "continuations"  # the results' file in EXPORT/evals
COUNT, PROMPT, LENGTH = 3, 16, 48  # prompts; tokens of each; tokens that are added at most
CANDIDATES = 64  # documents, of which the first that are long enough are taken


def measure_continuations(export: Export, path: Path, device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Return {prompt: continuation} of one export on a store, kept in EXPORT/evals/continuations.json.

    What is kept there is returned at once if it is of the same weights and store.

    Raises:
        UserError: an unfinished store, one of another tokenizer, or a model that cannot generate.
    """
    store, config = open_store(export, path, "validation")
    asked = {"store_fingerprint": store.fingerprint, "weights_sha256": export.weights_sha256()}
    kept = export.result(NAME, {})
    if asked.items() <= kept.items():
        return dict(kept["texts"])
    context = model_context(export, config)
    texts = write_on(load_model(export, device, dtype), prompts(store, min(PROMPT, context // 2)), context)
    with locked(export.results / f".{NAME}.lock"):
        write_json(export.results / f"{NAME}.json", {**asked, "texts": texts})
    return texts


def prompts(store: TokenStore, length: int) -> list[list[int]]:
    """Return the beginnings of up to `COUNT` documents that are longer than `length` tokens."""
    front = [] if store.begin_of_document is not None else [store.end_of_document]
    spans = [store.document(int(index)) for index in sampled_documents(CANDIDATES, store.documents)]
    fitting = [begin for begin, end in spans if end - begin > length]
    return [[*front, *store.read(begin, length).tolist()] for begin in fitting[:COUNT]]


@torch.inference_mode()
def write_on(loaded: LoadedModel, beginnings: list[list[int]], context: int) -> dict[str, str]:
    """Continue each beginning with the likeliest tokens, up to the end of the document or of the context.

    Raises:
        UserError: the model cannot generate.
    """
    found = {}
    for ids in beginnings:
        start = torch.tensor([ids], device=loaded.model.device)
        room = min(LENGTH, context - len(ids))
        try:
            whole = loaded.model.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=loaded.tokenizer.eos_token_id,
            )[0]
        except (RuntimeError, ValueError) as error:  # by which torch and transformers reject a model
            raise UserError(f"{loaded.export.folder} cannot generate: {first_line(error)}") from error
        texts = [loaded.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, whole[len(ids) :])]
        found[texts[0]] = texts[1]
    return found
