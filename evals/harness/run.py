"""Tasks through lm-eval, on their own prompts and metrics.

tasks checked -> for each model what is not kept already -> model -> lm-eval -> EXPORT/evals

`evals.harness.tasks` says what is asked, `evals.harness.results` what is kept and when it need not be asked again. A
task that fails is left out with the reason, and the others go on.
"""

import copy
import platform
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import lm_eval
import lm_eval.evaluator
import numpy as np
import torch
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from evals.exports import (
    ROUNDING,
    Export,
    LoadedModel,
    NotNumbersError,
    called,
    check_numbers,
    check_tokenizer,
    load_model,
)
from evals.harness import metrics, results
from evals.harness.results import Evaluation, Key, Result
from evals.harness.tasks import Prepared, Protocol, prepare_tasks, quiet
from llm.common.devices import resolve_device
from llm.common.errors import UserError
from llm.common.exported import trained_context
from llm.common.files import first_line
from llm.common.processes import progress_bar

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


class Outcome(NamedTuple):
    """Every model's results, then the means of its groups; and what was asked for and is lacking -> why."""

    results: list[tuple[Export, Result]]
    missing: dict[str, str]


class Plan(NamedTuple):
    """What is to be done for one model: the conditions of every result, and those results that are kept already."""

    export: Export
    label: str
    conditions: dict[Key, dict[str, Any]]
    kept: dict[Key, Result]

    @property
    def missing(self) -> list[Key]:
        return [key for key in self.conditions if key not in self.kept]


def run(
    exports: Sequence[Export],
    protocol: Protocol,
    data: Path | None,
    device: str = "auto",
    dtype: str = "auto",
    again: bool = False,
) -> Outcome:
    """Evaluate every model on every task and number of shots; each model's results, kept as `results.save` says.

    What is kept and was measured under the same conditions is taken from there, unless `again`; a model that has all
    of it is not loaded. `data`: a folder of local files, or None for the hub. `device`, `dtype`: see `load_model`. All
    that can be refused without a model is refused before the first is loaded, and nothing is done if that is all.
    """
    target = str(torch.empty(0, device=resolve_device(device)).device)  # as results name it: cuda:0, not cuda
    if protocol.batch_size == "auto" and target == "cpu":  # too large a batch ends the process there, it is no error
        protocol = replace(protocol, batch_size=16)
    with TemporaryDirectory() as work:
        prepared = prepare_tasks(protocol, data, Path(work))
        plans = [_plan(export, prepared, protocol, target, dtype, again) for export in exports]
        for plan in plans:
            if plan.missing:
                check_tokenizer(plan.export)
        for export in exports:
            results.save_groups(export, prepared.groups)
        made = [
            (plan.export, result)
            for plan, found in _evaluate_all(plans, prepared, protocol, target, dtype)
            for result in [*found, *results.of_groups(found, prepared.groups)]
        ]
    return Outcome(made, prepared.missing)


def label(export: Export) -> str:
    """The model's name, with the step where its folder is that of a step."""
    return f"{export.name}, step {export.info.get('step')}" if export.folder.name.startswith("step-") else export.name


def conditions(protocol: Protocol, prepared: Prepared, task: str, shots: int, device: str) -> dict[str, Any]:
    """All that a result rests on beside the model: what was asked, on which rows, by which software and device."""
    return {
        "task": task,
        "shots": shots,
        "limit": protocol.limit,
        "batch_size": protocol.batch_size,
        "device": device,
        "task_version": prepared.versions[task],
        "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch")}
        | {"python": platform.python_version()},
        "rows": prepared.rows[task].used(shots),
    } | ({"definition": prepared.digests[task]} if task in prepared.digests else {})


def _plan(export: Export, prepared: Prepared, protocol: Protocol, device: str, dtype: str, again: bool) -> Plan:
    """What one model lacks; says on stderr what it has."""
    kept, model = results.read(export), results.fingerprint(export)
    asked = {
        (task, shots): conditions(protocol, prepared, task, shots, device) | model for task, shots in prepared.keys
    }
    found = {
        key: kept[key] for key, wanted in asked.items() if not again and results.reusable(export, kept, wanted, dtype)
    }
    for (task, shots), result in kept.items() if not again else ():
        mine = result.get("weights") == model["weights"]  # what is of other weights is of no use any more
        if (task, shots) in asked and mine and protocol.limit and protocol.limit < result["n"]:
            raise UserError(
                f"{export.folder} keeps {task}, {shots}-shot, of {result['n']} items, and --limit {protocol.limit} "
                "would replace it; give --overwrite if that is meant"
            )
    if found:
        print(
            f"{label(export)}: {len(found)} of {len(asked)} results are kept from before; --overwrite reruns them",
            file=sys.stderr,
        )
    return Plan(export, label(export), asked, found)


def _evaluate_all(
    plans: Sequence[Plan], prepared: Prepared, protocol: Protocol, device: str, dtype: str
) -> Iterator[tuple[Plan, list[Result]]]:
    """Every plan with its results, those kept and those made, in the order asked; each is kept as soon as it is there.

    Why a result cannot be made goes to `prepared.missing`, and the others are made.
    The bar counts the results of all models; lm-eval shows its own below.
    """
    total = sum(len(plan.conditions) for plan in plans)
    missing = sum(len(plan.missing) for plan in plans)
    with progress_bar(total, total - missing, "", "result", disable=not missing) as bar:
        for plan in plans:
            made: dict[Key, Result] = {}
            loaded = load_model(plan.export, device, dtype) if plan.missing else None
            for task, shots in plan.missing:
                assert loaded is not None
                bar.set_description(f"{plan.label}: {task}, {shots}-shot")
                try:
                    found = evaluate_task(loaded, prepared.manager, task, shots, protocol)
                except NotNumbersError as error:  # so would all others be
                    prepared.missing[plan.label] = str(error)
                    break
                except UserError as error:
                    prepared.missing[f"{task}, {shots}-shot, of {plan.label}"] = str(error)
                    continue
                facts = plan.conditions[task, shots] | {"dtype_given": dtype}
                made[task, shots] = results.save(plan.export, found._replace(result=found.result | facts))
                bar.update()
            done = plan.kept | made
            yield plan, [done[key] for key in plan.conditions if key in done]


# ---- Evaluation ------------------------------------------------------------------------------------------------------


class CountingHFLM(HFLM):
    """lm-eval's own model; it also counts what lm-eval cuts silently, and says what lm-eval only asserts."""

    truncated = 0  # requests whose beginning did not fit into the model's context

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As lm-eval has it: (log-likelihood, greedy) of each request.

        A context without tokens of its own is read as an empty one. UserError: a choice without any, or one that is
        longer than the model's context.
        """
        encoded = []
        for request in requests:
            context, choice = request.args
            prompt_ids, choice_ids = self._split(context, choice)
            if problem := self._problem(choice_ids):
                raise UserError(
                    f"{request.task_name}, item {request.doc_id + 1}: the choice {choice[:60]!r} {problem}; leave this "
                    "task out for this model"
                )
            self.truncated += len(prompt_ids) + len(choice_ids) > self.max_length + 1
            encoded.append(((context, choice), prompt_ids, choice_ids))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _split(self, context: str, choice: str) -> tuple[list[int], list[int]]:
        """The ids of the context, at least one, and those that the choice adds to them."""
        prompt_ids, choice_ids = self._encode_pair(context, choice) if context else ([], [])
        if prompt_ids:
            return prompt_ids, choice_ids
        choice_ids = self.tok_encode(choice, add_special_tokens=False)
        if choice_ids[:1] == [self.prefix_token_id]:
            return choice_ids[:1], choice_ids[1:]
        return [self.prefix_token_id], choice_ids

    def _problem(self, choice_ids: list[int]) -> str:
        """Why a choice has no log-likelihood; "" where it has one."""
        if not choice_ids:
            return "has no token of its own with this model's tokenizer"
        if len(choice_ids) > self.max_length:
            return f"has {len(choice_ids)} tokens and the model's context {self.max_length}"
        return ""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for prompt, settings in (request.args for request in requests):
            new = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            if new >= self.max_length:
                raise UserError(
                    f"the task asks for up to {new} new tokens and the model's context is {self.max_length}; include "
                    "the task in a YAML of your own with generation_kwargs.max_gen_toks below that"
                )
            self.truncated += len(self.tok_encode(prompt)) > self.max_length - new
        return super().generate_until(requests, disable_tqdm)


def evaluate_task(loaded: LoadedModel, manager: "TaskManager", task: str, shots: int, protocol: Protocol) -> Evaluation:
    """One task at one number of shots, on a loaded model, through `lm_eval.simple_evaluate`.

    The model's training mode and the global random states (Python, numpy, torch) are afterwards what they were.
    UserError: whatever lm-eval or the task's own code cannot do with this model or these rows.
    """
    half = loaded.model.dtype in (torch.bfloat16, torch.float16)
    # lm-eval describes the machine with every result, by `pip list`, git and others: seconds each; we record our own.
    alone = patch.multiple(
        lm_eval.evaluator, create=True, add_env_info=lambda *_: None, get_git_commit_hash=lambda: None
    )
    with _preserved(loaded.model), quiet(), alone, redirect_stdout(sys.stderr), _as_user_errors(task):
        lm = CountingHFLM(
            pretrained=loaded.model,
            tokenizer=copy.deepcopy(loaded.tokenizer),  # lm-eval gives it a padding token
            batch_size=protocol.batch_size,
            softmax_dtype="float32" if half else None,  # a log-softmax in bf16 has two digits
            max_length=trained_context(loaded.model.config, loaded.export.info),
            prefix_token_id=_prefix(loaded),
        )
        ready = manager.load([task])["tasks"][task]
        output = lm_eval.simple_evaluate(
            lm, tasks=[ready], num_fewshot=shots, limit=protocol.limit, task_manager=manager, bootstrap_iters=0
        )
        assert output is not None  # None is for ranks other than 0
        samples = _by_item(output["samples"][task])
        scores = _scores(ready, output, samples)
    result = {
        "task": task,
        "shots": shots,
        **scores,
        "n": len(samples),
        "chance": _chance(ready, samples),
        "limit": protocol.limit,
        "dtype": loaded.dtype,
        "device": loaded.device,
        "batch_size": protocol.batch_size,
        "context": lm.max_length,
        "truncated": lm.truncated,
    }
    kept = [_sample(sample, scores["metrics"]) for sample in samples]
    values = [value for item in kept for value in item.get("loglikelihoods", ())]
    check_numbers(values, f"log-likelihoods of {called(loaded.model)}", most=ROUNDING)
    return Evaluation(result, kept)


@contextmanager
def _as_user_errors(task: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU has too little memory ({first_line(error)}); lower --batch-size") from error
    except Exception as error:  # lm-eval and a task's own code raise kinds of their own
        raise UserError(f"lm-eval cannot do {task}: {type(error).__name__}: {first_line(error)}") from error


def _prefix(loaded: LoadedModel) -> int | None:
    """The id that stands for an empty context: what came before a document in training; lm-eval's for other models.

    That is the begin-of-sequence id where the exported tokenizer puts it in front of a text, else the end of another
    document.
    """
    tokenizer = loaded.tokenizer
    if not loaded.export.info:
        return None
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token_id if begins or tokenizer.eos_token_id is None else tokenizer.eos_token_id


# ---- Scores and items ------------------------------------------------------------------------------------------------


def _by_item(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval's records with the scores under "scores", by the names it gives them, those of several filters in one."""
    items: dict[int, dict[str, Any]] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        item = items.setdefault(sample["doc_id"], sample | {"scores": {}})
        item["scores"] |= {f"{name}{suffix}": sample[name] for name in sample["metrics"]}
    return list(items.values())


def _scores(task: Any, output: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each metric with its standard error where it is a mean, and under "metrics" what kind each is."""
    scores: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    reported, better = output["results"][task.task_name], output["higher_is_better"].get(task.task_name, {})
    for name in samples[0]["scores"]:
        metric, _, chosen = name.partition(",")
        items = [sample["scores"][name] for sample in samples if name in sample["scores"]]
        kind = getattr(task.aggregation().get(metric, mean), "__name__", "other")
        if kind in metrics.PAIRED and len(items) < len(samples):
            kind = "some items"
        described = metrics.describe(kind, better.get(metric, True), items)
        scores[name] = float(reported[f"{metric},{chosen or 'none'}"])
        scores[f"{name}_stderr"] = float(mean_stderr(items)) if kind == "mean" and len(items) > 1 else None
        kinds[name] = described._asdict()
    return scores | {"metrics": kinds}


def _chance(task: Any, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """The accuracy of choices drawn blindly; None where there are none to choose from."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    twice = 2 if "acc_mutual_info" in samples[0]["scores"] else 1  # each choice once more, without its prompt
    return float(np.mean([twice / len(sample["resps"]) for sample in samples]))


def _sample(sample: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a paired test needs of one item.

    loglikelihoods: nats, one a choice, summed over the choice's tokens; responses: what was generated. Equal hashes
    mean that two models saw the same item and the same prompt, examples included. Of each metric with a value for each
    item, what lm-eval gave for this one: see `metrics.values`.
    """
    answers = [repeats[0] for repeats in sample["resps"]]  # one a request
    if isinstance(answers[0], str):
        kept: dict[str, Any] = {"responses": answers}
    else:
        kept = {"loglikelihoods": [answer[0] if isinstance(answer, tuple) else answer for answer in answers]}
    target = sample["target"]
    passage = results.passage_of(sample.get("doc") or {})
    return {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        **({} if passage is None else {"passage": passage}),
        "target": target if isinstance(target, str | int | float | list) else str(target),
        **kept,
        **{name: _numbers(sample["scores"][name]) for name in kinds if kinds[name]["kind"] in metrics.PAIRED},
    }


def _numbers(score: Any) -> float | list[float]:
    return [float(part) for part in score] if isinstance(score, tuple | list) else float(score)


@contextmanager
def _preserved(model: torch.nn.Module) -> Iterator[None]:
    """HFLM leaves the model in evaluation mode and simple_evaluate seeds the global generators: undo both."""
    training = [(module, module.training) for module in model.modules()]
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
