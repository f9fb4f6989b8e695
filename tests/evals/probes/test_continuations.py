"""What models write: against a loop that takes the likeliest token of the whole text each time."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.exports import open_export
from evals.probes import continuations
from llm.data.store import TokenStore
from tests.data.by_hand import BEGIN, END, write_store

from ..conftest import MakeExport


def test_the_likeliest_token_each_time(make_export: MakeExport, tokenizers, tmp_path: Path) -> None:
    """Of documents that are long enough, up to the end of the context; kept until the weights are others."""
    context = 24
    documents = [[1 + (7 * number + place) % (BEGIN - 1) for place in range(5 + 9 * number)] for number in range(6)]
    path = write_store(tmp_path / "store", [documents[:2]], tokenizer=tokenizers["words"], validation=[documents])
    folder = make_export(style="llama", context=context)
    texts = continuations.measure_continuations(open_export(folder), path)

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = {}
    for document in documents:
        ids = [END, *document[: context // 2]]
        if len(document) > context // 2 and len(expected) < continuations.COUNT:
            while (len(ids) < context and ids[-1] != END) or len(ids) == 1:
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            begun = 1 + context // 2
            expected[tokenizer.decode(ids[:begun], skip_special_tokens=True)] = tokenizer.decode(
                ids[begun:], skip_special_tokens=True
            )
    assert len(expected) == continuations.COUNT
    assert texts == expected
    assert TokenStore.open(path, "validation").fingerprint in (folder / "evals" / "continuations.json").read_text()

    kept = json.loads((folder / "evals" / "continuations.json").read_text())
    kept["texts"] = {"once": "upon"}
    (folder / "evals" / "continuations.json").write_text(json.dumps(kept))
    assert continuations.measure_continuations(open_export(folder), path) == {"once": "upon"}
    (folder / "evals" / "continuations.json").write_text(json.dumps(kept | {"weights_sha256": "0"}))
    assert continuations.measure_continuations(open_export(folder), path) == expected
