"""The indirect-object task of residual-attention-streams, Section 4.2, and its Table 2.

exported folders -> eight prompts each -> probability of the right and the wrong name -> mean, deviation over models

Each of the paper's four sentences is told twice, with either person as the giver. At the end of the prompt the
model's probability of the other person's name (correct) and of the giver's (incorrect) is read off a softmax over the
full vocabulary, in fp32. A name of several tokens counts with the probability of the whole name: the product over its
tokens, each given the ones before it. One model's value for a sentence is the mean over its two variants; the table
shows mean and standard deviation over the models of a group. The paper does not say which deviation over its three
models it prints; here it is the population's (divided by n), and a single model has none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from evals.models import Export, LoadedModel, load_model, open_export, write_json
from evals.plots import text_table
from llm.errors import UserError

# Section 4.2: {} is the giver, one of the two names; the other is the correct completion.
SENTENCES = (
    ("When John and Mary went to the shops, {} gave the bag to", "John", "Mary"),
    ("When Tom and James went to the park, {} gave the ball to", "Tom", "James"),
    ("When Dan and Emily went to the shops, {} gave an apple to", "Dan", "Emily"),
    ("After Sam and Amy went to the park, {} gave a drink to", "Sam", "Amy"),
)
OUTCOMES = ("correct", "incorrect")

Record = dict[str, Any]


class Prompt(NamedTuple):
    """One variant of a sentence. The names carry the leading space that a completion has."""

    sentence: int  # 1 to 4
    variant: int  # 1: the first person gives; 2: the second
    text: str
    correct: str
    incorrect: str


def ioi_prompts() -> list[Prompt]:
    """The paper's eight prompts: four sentences, two variants each."""
    return [
        Prompt(number, variant, template.format(giver), f" {receiver}", f" {giver}")
        for number, (template, first, second) in enumerate(SENTENCES, start=1)
        for variant, (giver, receiver) in enumerate(((first, second), (second, first)), start=1)
    ]


def ioi_probabilities(model: Any, tokenizer: Any) -> list[Record]:
    """The probability of the right and of the wrong name after each of the eight prompts.

    Returns one record a prompt: sentence, variant, prompt; and for `correct` and `incorrect` the name, its
    `probability_*` in [0, 1], and its `tokens_*` under this tokenizer. The model's training mode is left as it was.
    UserError: the tokenizer joins prompt and name, or the prompt is longer than the model's context.
    """
    records = []
    was_training = model.training
    model.eval()
    try:
        for prompt in ioi_prompts():
            record: Record = {"sentence": prompt.sentence, "variant": prompt.variant, "prompt": prompt.text}
            for outcome in OUTCOMES:
                name = getattr(prompt, outcome)
                prompt_ids, name_ids = _encode(tokenizer, prompt.text, name)
                record[outcome] = name
                record[f"probability_{outcome}"] = _probability(model, prompt_ids, name_ids)
                record[f"tokens_{outcome}"] = [tokenizer.decode([token]) for token in name_ids]
            records.append(record)
    finally:
        model.train(was_training)
    return records


def _encode(tokenizer: Any, prompt: str, name: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the name as it follows the prompt (not as it would stand alone)."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    both = tokenizer(prompt + name)["input_ids"]
    if both[: len(prompt_ids)] != prompt_ids or len(both) == len(prompt_ids):
        raise UserError(
            f"the tokenizer does not keep the tokens of {prompt!r} when {name!r} follows, so a name has no probability "
            "of its own; use one that keeps words apart and adds no end-of-text token"
        )
    return prompt_ids, both[len(prompt_ids) :]


@torch.inference_mode()
def _probability(model: Any, prompt_ids: list[int], name_ids: list[int]) -> float:
    """Probability of the tokens `name_ids` after `prompt_ids`, teacher-forced, from one forward pass in fp32."""
    context = getattr(model.config, "max_position_embeddings", None)
    ids = torch.tensor([prompt_ids + name_ids], device=model.device)  # [1, T]
    if context is not None and ids.shape[1] - 1 > context:
        raise UserError(f"a prompt of {ids.shape[1] - 1} tokens does not fit the model's context of {context}")
    logits = model(input_ids=ids[:, :-1]).logits[0, -len(name_ids) :]  # [n, V], n = tokens of the name
    log_probabilities = logits.float().log_softmax(dim=-1)
    return log_probabilities.gather(1, ids[0, -len(name_ids) :, None]).sum().exp().item()


def sentence_means(records: Sequence[Record]) -> dict[str, list[float]]:
    """For each outcome, the mean over the two variants of each of the four sentences, in [0, 1]."""
    numbers = range(1, len(SENTENCES) + 1)
    return {
        outcome: [
            float(np.mean([r[f"probability_{outcome}"] for r in records if r["sentence"] == number]))
            for number in numbers
        ]
        for outcome in OUTCOMES
    }


def summarise(groups: Mapping[str, Sequence[Sequence[Record]]]) -> list[dict[str, Any]]:
    """Table 2: a row per group and outcome, over the models of the group.

    `mean` and `std` hold five values in [0, 1]: sentences 1 to 4, then the mean over the four sentences (the ~7% and
    ~41% of the paper's text). `std` is the population's, over the models' values; None for a group of one model.
    """
    rows = []
    for group, models in groups.items():
        for outcome in OUTCOMES:
            values = np.array([sentence_means(records)[outcome] for records in models])  # [models, 4]
            values = np.column_stack([values, values.mean(axis=1)])  # [models, 5]
            std = values.std(axis=0).tolist() if len(models) > 1 else None
            rows.append(
                {
                    "group": group,
                    "models": len(models),
                    "outcome": outcome,
                    "mean": values.mean(axis=0).tolist(),
                    "std": std,
                }
            )
    return rows


def format_outcome(outcome: Mapping[str, Any]) -> str:
    """What `run` returns as text: Table 2, in percent, and a line on names of several tokens where there are any."""
    records = [r for models in outcome["models"].values() for result in models for r in result["prompts"]]
    lines = [format_summary(outcome["table"])]
    if names := split_names(records):
        lines.append(f"{', '.join(names)}: more than one token for some model; the probability is the whole name's.")
    return "\n".join(lines)


def format_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `summarise` in percent, laid out as Table 2."""

    def cell(row: Mapping[str, Any], column: int) -> str:
        mean = f"{100 * row['mean'][column]:.2f}"
        return mean if row["std"] is None else f"{mean} ± {100 * row['std'][column]:.2f}"

    header = ["group", "models", "%", *(f"sentence {n}" for n in range(1, len(SENTENCES) + 1)), "mean"]
    return text_table(
        header, [[row["group"], str(row["models"]), row["outcome"], *(cell(row, c) for c in range(5))] for row in rows]
    )


def split_names(records: Sequence[Record]) -> list[str]:
    """The names that are more than one token, whose probability is therefore a product."""
    return sorted({r[o].strip() for r in records for o in OUTCOMES if len(r[f"tokens_{o}"]) > 1})


def evaluate(loaded: LoadedModel) -> dict[str, Any]:
    """What `ioi.json` holds for one model: every prompt's values, their means, and under what they were measured."""
    records = ioi_probabilities(loaded.model, loaded.tokenizer)
    means = sentence_means(records)
    return {
        "model": {"folder": loaded.export.folder.name, **loaded.export.info},
        "device": loaded.device,
        "dtype": loaded.dtype,
        "names_of_several_tokens": split_names(records),
        "sentences": means,
        "mean": {outcome: float(np.mean(means[outcome])) for outcome in OUTCOMES},
        "prompts": records,
    }


def parse_groups(arguments: Sequence[str]) -> dict[str, list[Export]]:
    """Groups of exported folders from the command line: `NAME=FOLDER,FOLDER` names one, a bare folder is a group of its
    own under its folder's name (or its whole path, where that name is taken). UserError: no folder, or one given twice.
    """
    groups: dict[str, list[Export]] = {}
    for argument in arguments:
        name, equals, folders = argument.partition("=")
        if Path(argument).is_dir() or not equals:
            export = open_export(argument)
            name = export.folder.resolve().name
            groups[name if name not in groups else argument] = [export]
        else:
            groups.setdefault(name, []).extend(open_export(folder) for folder in folders.split(","))
    folders_given = [export.folder.resolve() for exports in groups.values() for export in exports]
    if twice := [folder for folder in folders_given if folders_given.count(folder) > 1]:
        raise UserError(f"{twice[0]} is given twice; give each model once, or its deviation over models is too small")
    return groups


def run(groups: Mapping[str, Sequence[Export]], device: str, dtype: str) -> dict[str, Any]:
    """Measure every model, group by group: {"table": rows of `summarise`, "models": {group: [`evaluate`, ...]}}."""
    results: dict[str, list[dict[str, Any]]] = {}
    for group, exports in groups.items():
        results[group] = [evaluate(load_model(export, device, dtype)) for export in exports]
    table = summarise({group: [result["prompts"] for result in models] for group, models in results.items()})
    return {"table": table, "models": results}


def write_results(groups: Mapping[str, Sequence[Export]], outcome: Mapping[str, Any]) -> None:
    """Keep each model's result in its own folder, as EXPORT/evals/ioi.json."""
    for group, exports in groups.items():
        for export, result in zip(exports, outcome["models"][group], strict=True):
            write_json(export.results / "ioi.json", result)
