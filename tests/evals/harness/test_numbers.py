"""What is no number is no result, and an item without a token of its own ends its task alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evals.__main__ import main
from evals.exports import NotNumbersError, check_numbers, load_model, open_export
from evals.harness import results
from evals.harness import run as harness

from ...exported import write_export
from ..rows import piqa_rows, rows_of, write_rows

NAN, INF = float("nan"), float("inf")


def break_weights(folder: Path, value: float) -> Path:
    """Put `value` into the norm before the output head."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("ln_f.weight", "model.norm.weight")))
    weights[name][3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_model_whose_outputs_are_no_numbers_has_no_result(make_export, data, story_store, capsys, value):
    """Every measure; and a sound model of the same command has its own."""
    sound, broken = make_export("sound"), break_weights(make_export("broken"), value)
    words = [*map(str, (broken, sound)), "--data", str(data), "--tasks", "piqa", "arc_easy", "--device", "cpu"]
    assert main(["run", *words]) == 2
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.out.splitlines()[-2:]] == [["sound", "piqa"], ["sound", "arc_easy"]]
    assert "broken" not in said.out
    assert f"error: log-likelihoods of {broken} in float32" in said.err and said.err.count("impossible") == 1
    assert results.read(open_export(broken)) == {} and not (broken / "evals/samples").exists()
    assert main(["ioi", str(broken), "--device", "cpu"]) == 2
    assert "impossible" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["losses", "incontext"])
def test_measures_on_a_store(tmp_path, story_store, capsys, command):
    from llm.data.store import TokenStore

    tokenizer = TokenStore.open(story_store).tokenizer()
    folder = break_weights(write_export(tmp_path / "model", tokenizer=tokenizer), NAN)
    assert main([command, str(folder), "--store", str(story_store), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "impossible (the first is nan)" in said and not list((folder / "evals").glob("*[st].json"))


@pytest.mark.parametrize(
    ("values", "most"), [([0.0, NAN], INF), ([INF], INF), ([[-INF], [0.0]], INF), ([-3.0, 0.1], 1e-3)]
)
def test_the_one_check(values, most):
    with pytest.raises(NotNumbersError, match="scores: 1 of"):
        check_numbers(values, "scores", most)
    check_numbers([], "scores", most)
    check_numbers([-5.0, 0.0, most if most < 1 else 7.0], "scores", most)


def test_samples_of_an_earlier_version_are_checked_too(tmp_path):
    from evals.verdict.measurements import read_samples

    folder = write_export(tmp_path / "model")
    row = {"doc_id": 0, "doc_hash": "h", "prompt_hash": "p", "loglikelihoods": [-1.0, NAN], "acc": 1.0, "acc_norm": 0.0}
    path = folder / "evals/samples/piqa-0shot.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(NotNumbersError, match=r"piqa-0shot\.jsonl"):
        read_samples(open_export(folder), "piqa", 0, "acc")


# ---- Items without tokens --------------------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A model whose tokenizer knows small letters and nothing else: other characters leave no trace."""
    vocabulary = {"</s>": 0} | {letter: n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz", start=1)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    return write_export(
        tmp_path / "letters",
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"),
        max_position_embeddings=256,
    )


def change_item(data: Path, **columns: str) -> None:
    """Change the third evaluated row of PIQA."""
    rows = rows_of(data / "piqa/validation.jsonl")
    write_rows(data / "piqa", "validation", [*rows[:2], rows[2] | columns, *rows[3:]])


@pytest.mark.parametrize("text", ["", "12 + 3", " "])
def test_a_choice_without_a_token(letters, data, capsys, text):
    change_item(data, sol2=text)
    words = ["run", str(letters), "--data", str(data), "--tasks", "piqa", "arc_easy", "--device", "cpu"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].split()[1] == "arc_easy" and "piqa" not in said.out
    assert "piqa, item 3: the choice" in said.err and "has no token of its own" in said.err
    assert list(results.read(open_export(letters))) == [("arc_easy", 0)]


def test_a_context_without_a_token_is_an_empty_one(letters, tmp_path):
    loaded = load_model(open_export(letters), "cpu")
    lm = harness.CountingHFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)

    class Request:
        task_name, doc_id = "task", 0

        def __init__(self, *args: str) -> None:
            self.args = args

    values = lm.loglikelihood([Request("", "abc"), Request("1, 2", "abc"), Request("  ", "abc")], disable_tqdm=True)
    ids = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad():
        logs = loaded.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
    assert [value for value, _ in values] == pytest.approx([logs] * 3, abs=1e-4)


# ---- The context of training, and of a document ----------------------------------------------------------------------


def test_items_are_cut_at_the_context_of_training(tmp_path, data):
    """Positions beyond it were never trained: a model of 48 of 512 gives the numbers of one that has 48."""
    rows = [row | {"goal": "a long item " * 4} for row in piqa_rows("item", 4)]
    write_rows(data / "piqa", "validation", rows)
    loglikelihoods = {}
    for name, settings in (
        ("trained", {"card": {"run": "r", "context": 48}, "max_position_embeddings": 512}),
        ("short", {"card": {"run": "r"}, "max_position_embeddings": 48}),
        ("unknown", {"card": {"run": "r"}, "max_position_embeddings": 512}),
    ):
        folder = write_export(tmp_path / name, **settings)
        words = ["--data", str(data), "--tasks", "piqa", "--device", "cpu"]
        assert main(["run", str(folder), *words]) == 0
        (result,) = json.loads((folder / "evals/lm_eval.json").read_text())
        assert (result["context"], result["truncated"]) == ((512, 0) if name == "unknown" else (48, 8))
        loglikelihoods[name] = [row["loglikelihoods"] for row in rows_of(folder / "evals/samples/piqa-0shot.jsonl")]
    assert loglikelihoods["trained"] == loglikelihoods["short"] != loglikelihoods["unknown"]


# ---- Examples --------------------------------------------------------------------------------------------------------


def test_evaluated_items_under_another_name_are_no_examples(make_export, data, capsys):
    """Other ids, the same questions."""
    rows = rows_of(data / "arc_easy/test.jsonl")
    write_rows(data / "arc_easy", "train", [row | {"id": f"other-{n}"} for n, row in enumerate(rows)])
    words = ["run", str(make_export(context=1024)), "--data", str(data), "--tasks", "arc_easy", "--device", "cpu"]
    assert main([*words, "--shots", "2"]) == 2
    assert "6 of 6 evaluated items are among its examples too (the train split)" in capsys.readouterr().err
    assert main([*words, "--shots", "0"]) == 0


def test_a_few_repeated_rows_are_said(make_export, data, capsys):
    rows = piqa_rows("item", 120)
    write_rows(data / "piqa", "validation", rows)
    write_rows(data / "piqa", "train", [*piqa_rows("example", 12), rows[7]])
    words = ["run", str(make_export(context=1024)), "--data", str(data), "--tasks", "piqa", "--shots", "1"]
    assert main([*words, "--device", "cpu"]) == 0
    assert "piqa: 1 of 120 evaluated items are among its examples" in capsys.readouterr().err
