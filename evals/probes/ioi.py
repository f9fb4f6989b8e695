"""The indirect-object task of Burns et al. 2025, Section 4.2: its Table 2, and a generated set of sentences.

exported folders -> prompts -> probability of the right and the wrong name -> mean, deviation over models

Each of the paper's four sentences is told twice, with either person as the giver. At the end of the prompt the
model's probability of the other person's name (correct) and of the giver's (incorrect) is read off a softmax over the
full vocabulary, in fp32. A name of several tokens counts with the probability of the whole name: the product over its
tokens, each given the ones before it. One model's value for a sentence is the mean over its two variants; the table
shows mean and standard deviation over the models of a group. The paper does not say which deviation over its three
models it prints; here it is the population's (divided by n), and a single model has none.

Eight prompts say little, so each model also reads those of `evals.probes.ioi_sentences`, the same for all models of a
call.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from evals.exports import (
    ROUNDING,
    Export,
    LoadedModel,
    called,
    check_numbers,
    check_tokenizer,
    facts,
    load_model,
    open_export,
)
from evals.probes import ioi_sentences
from evals.probes.ioi_sentences import Sentence
from llm.common.errors import UserError
from llm.common.exported import trained_context
from llm.common.files import write_json
from llm.common.processes import progress_bar
from llm.common.tables import text_table

# Section 4.2: {} is the giver, one of the two names; the other is the correct completion.
SENTENCES = (
    ("When John and Mary went to the shops, {} gave the bag to", "John", "Mary"),
    ("When Tom and James went to the park, {} gave the ball to", "Tom", "James"),
    ("When Dan and Emily went to the shops, {} gave an apple to", "Dan", "Emily"),
    ("After Sam and Amy went to the park, {} gave a drink to", "Sam", "Amy"),
)
OUTCOMES = ("correct", "incorrect")
AS_PUBLISHED = "As published: models without a stream inside the one with the stream, dropout on."

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


def ioi_probabilities(model: Any, tokenizer: Any, context: int | None = None, dropout: bool = False) -> list[Record]:
    """The probability of the right and of the wrong name after each of the eight prompts.

    Returns one record a prompt: sentence, variant, prompt; and for `correct` and `incorrect` the name, its
    `probability_*` in [0, 1], and its `tokens_*` under this tokenizer. The model's training mode is left as it was;
    `dropout`: on, as in training.
    UserError: the tokenizer joins prompt and name, or the prompt is longer than the model's context.
    """
    prompts = ioi_prompts()
    values, names = log_probabilities(model, tokenizer, prompts, batch_size=1, context=context, dropout=dropout)
    records = []
    for prompt, value, of_prompt in zip(prompts, values, names, strict=True):
        record: Record = {"sentence": prompt.sentence, "variant": prompt.variant, "prompt": prompt.text}
        for outcome, log_probability, name_ids in zip(OUTCOMES, value, of_prompt, strict=True):
            record[outcome] = getattr(prompt, outcome)
            record[f"probability_{outcome}"] = float(np.exp(log_probability))
            record[f"tokens_{outcome}"] = [tokenizer.decode([token]) for token in name_ids]
        records.append(record)
    return records


def log_probabilities(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt | Sentence],
    batch_size: int,
    progress: str | None = None,
    context: int | None = None,
    dropout: bool = False,
) -> tuple[np.ndarray, list[list[list[int]]]]:
    """The log-probability of each prompt's right and wrong name [n, 2], in nats, and the names' tokens.

    A batch holds inputs of one length, so that none is padded and a position never moves. `progress` names the bar;
    `context` is what the model was trained with, its positions where None.
    UserError: as `ioi_probabilities`; also where the model's probabilities are not numbers.
    """
    rows: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = {}  # one for both names, where they are one token
    names = []
    for index, prompt in enumerate(prompts):
        encoded = [_encode(tokenizer, prompt.text, getattr(prompt, outcome)) for outcome in OUTCOMES]
        for column, (prompt_ids, name_ids) in enumerate(encoded):
            rows.setdefault((*prompt_ids, *name_ids[:-1]), []).append((index, column, name_ids))
        names.append([name_ids for _, name_ids in encoded])
    _check_context(model, max(map(len, rows)), context)
    values = np.full((len(prompts), len(OUTCOMES)), np.nan)
    was_training = model.training
    model.train(dropout)
    try:
        with progress_bar(
            len(rows), 0, progress or "", "prompt", disable=progress is None, leave=False, delay=1
        ) as bar:
            for batch in _batches(list(rows), batch_size):
                wanted = [rows[row] for row in batch]
                cells = [(index, column) for names_of_row in wanted for index, column, _ in names_of_row]
                values[tuple(zip(*cells, strict=True))] = _score(model, batch, wanted)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    check_numbers(values, f"log-probabilities of names by {called(model)}", most=ROUNDING)
    return values, names


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


def _check_context(model: Any, tokens: int, context: int | None) -> None:
    context = trained_context(model.config, {"context": context})
    if context is not None and tokens > context:
        raise UserError(
            f"a prompt of {tokens} tokens does not fit the model's context of {context}; give a model with a longer one"
        )


def _batches(rows: Sequence[tuple[int, ...]], batch_size: int) -> list[list[tuple[int, ...]]]:
    """At most `batch_size` rows of one length each, the longest first: what does not fit into memory fails at once."""
    batches = []
    for length in sorted({len(row) for row in rows}, reverse=True):
        alike = [row for row in rows if len(row) == length]
        batches += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return batches


@torch.inference_mode()
def _score(
    model: Any, batch: Sequence[tuple[int, ...]], wanted: Sequence[Sequence[tuple[int, int, list[int]]]]
) -> list[float]:
    """The log-probability of every name wanted after each row, teacher-forced, from one forward pass; softmax in fp32.

    A row ends where the last token of its names is to be said, so that n tokens are read off its last n positions.
    """
    most = max(len(name_ids) for names in wanted for _, _, name_ids in names)
    # The head alone is most of a small model's work: spared at all other positions, where the model can.
    spared = {"logits_to_keep": most} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=torch.tensor(batch, device=model.device), **spared).logits[:, -most:]  # [B, most, V]
    log_softmax = logits.float().log_softmax(dim=-1)
    sums = [
        of_row[-len(name_ids) :].gather(1, torch.tensor(name_ids, device=of_row.device)[:, None]).sum()
        for of_row, names in zip(log_softmax, wanted, strict=True)
        for _, _, name_ids in names
    ]
    return torch.stack(sums).tolist()


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
    """What `run` returns as text: Table 2, in percent, and a line on names of several tokens where there are any; then
    the generated set, where there is one.
    """
    records = [r for models in outcome["models"].values() for result in models for r in result["prompts"]]
    lines = [format_summary(outcome["table"])]
    if names := split_names(records):
        lines.append(f"{', '.join(names)}: more than one token for some model; the probability is the whole name's.")
    if outcome.get("as_published"):
        lines += ["", AS_PUBLISHED, format_summary(outcome["as_published"]["table"])]
    if outcome.get("generated"):
        lines += ["", ioi_sentences.format_generated(outcome["generated"])]
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
    records = ioi_probabilities(loaded.model, loaded.tokenizer, loaded.export.info.get("context"))
    means = sentence_means(records)
    return {
        **facts(loaded),
        "names_of_several_tokens": split_names(records),
        "sentences": means,
        "mean": {outcome: float(np.mean(means[outcome])) for outcome in OUTCOMES},
        "prompts": records,
    }


def evaluate_generated(
    loaded: LoadedModel, sentences: Sequence[Sentence], seed: int, batch_size: int
) -> dict[str, Any]:
    """What `ioi_generated.json` holds for one model: means, every sentence's values, and what they were measured on."""
    bar = f"IOI, {loaded.export.folder.name}"
    context = loaded.export.info.get("context")
    values, names = log_probabilities(loaded.model, loaded.tokenizer, sentences, batch_size, bar, context)
    items = ioi_sentences.collect(sentences, values)
    several = {s.correct.strip() for s, (right, _) in zip(sentences, names, strict=True) if len(right) > 1}
    return {
        **facts(loaded),
        "batch_size": batch_size,
        "seed": seed,
        "sentences": len(sentences),
        "sentences_sha256": ioi_sentences.fingerprint(sentences),
        "names_of_several_tokens": sorted(several),
        "ties": items["logit_difference"].count(0.0),
        "mean": ioi_sentences.means(items),
        "accuracy_by_order": ioi_sentences.accuracy_by_order(items),
        "templates": list(ioi_sentences.TEMPLATES),
        "items": items,
    }


def generate_for(exports: Sequence[Export], count: int, seed: int) -> list[Sentence]:
    """The generated set of a call: of names that are one token under every model's tokenizer, if there are enough.

    Reads tokenizers alone. None of the paper's eight prompts is among the sentences.
    """
    several: set[str] = set()
    probe = ioi_prompts()[0].text
    for export in exports:
        check_tokenizer(export)
        tokenizer = export.tokenizer()
        several |= {name for name in ioi_sentences.NAMES if len(_encode(tokenizer, probe, f" {name}")[1]) > 1}
    names = ioi_sentences.usable_names(several)
    return ioi_sentences.generate(count, seed, names, [prompt.text for prompt in ioi_prompts()])


def parse_groups(arguments: Sequence[str], trusted: bool = False) -> dict[str, list[Export]]:
    """Groups of exported folders from the command line: `NAME=FOLDER,FOLDER` names one, a bare folder is a group of its
    own under its run's or its folder's name (or its whole path, where that name is taken).

    UserError: no folder, or one given twice.
    """
    groups: dict[str, list[Export]] = {}
    for argument in arguments:
        name, equals, folders = argument.partition("=")
        if Path(argument).is_dir() or not equals:
            export = open_export(argument, trusted)
            name = export.name if export.info else export.folder.resolve().name
            groups[name if name not in groups else argument] = [export]
        else:
            groups.setdefault(name, []).extend(open_export(folder, trusted) for folder in folders.split(","))
    folders_given = [export.folder.resolve() for exports in groups.values() for export in exports]
    if twice := [folder for folder in folders_given if folders_given.count(folder) > 1]:
        raise UserError(f"{twice[0]} is given twice; give each model once, or its deviation over models is too small")
    return groups


def run(
    groups: Mapping[str, Sequence[Export]],
    device: str,
    dtype: str,
    sentences: int = ioi_sentences.COUNT,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Measure every model, group by group: {"table": rows of `summarise`, "models": {group: [`evaluate`, ...]}}.

    Where `sentences` is not 0, "generated" holds the same two keys for the generated set of so many sentences.
    """
    exports = [export for of_group in groups.values() for export in of_group]
    generated = generate_for(exports, sentences, seed) if sentences else []
    results: dict[str, list[dict[str, Any]]] = {group: [] for group in groups}
    on_generated: dict[str, list[dict[str, Any]]] = {group: [] for group in groups}
    for group, of_group in groups.items():
        for export in of_group:
            loaded = load_model(export, device, dtype)
            results[group].append(evaluate(loaded))
            if generated:
                on_generated[group].append(evaluate_generated(loaded, generated, seed, batch_size))
    table = summarise({group: [result["prompts"] for result in models] for group, models in results.items()})
    outcome: dict[str, Any] = {"table": table, "models": results}
    if generated:
        items = {group: [result["items"] for result in models] for group, models in on_generated.items()}
        outcome["generated"] = {"table": ioi_sentences.summarise(items), "models": on_generated}
    return outcome


def write_results(groups: Mapping[str, Sequence[Export]], outcome: Mapping[str, Any]) -> None:
    """Keep each model's results in its own folder, as EXPORT/evals/ioi.json and, where there are such results,
    ioi_generated.json and ioi_as_published.json.
    """
    parts: dict[str, Any] = {"ioi.json": outcome}
    for kind in ("generated", "as_published"):
        if outcome.get(kind):
            parts[f"ioi_{kind}.json"] = outcome[kind]
    for file, part in parts.items():
        for group, exports in groups.items():
            for export, result in zip(exports, part["models"][group], strict=True):
                write_json(export.results / file, result)
