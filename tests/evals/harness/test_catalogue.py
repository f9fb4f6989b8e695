"""Which tasks a name stands for, against lm-eval's own index; YAML of the user's, texts and token stores."""

import shutil
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks._index import Kind, TaskIndex

from evals.harness import catalogue
from evals.harness.catalogue import Group, find
from evals.harness.suites import DECISION_ACCURACY, SUITES, TITLES, is_local
from llm.data.store import TokenStore

CHOICE = {
    "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}",
    "doc_to_choice": "choices", "doc_to_target": "answer",
}  # fmt: skip


def write_yaml(path: Path, **content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def test_names_are_those_of_lm_eval():
    """In folders with tasks, groups of groups, tags, quoted keys and names that are not the file's."""
    folders = [catalogue.OFFICIAL / name for name in ("aclue", "arc", "blimp", "leaderboard", "mmlu/default", "paloma")]
    index = TaskIndex.build(folders)
    expected = {name for name, entry in index.items() if entry.kind is not Kind.TAG}
    ours = {name for name, path in catalogue.official_names().items() if any(path.is_relative_to(f) for f in folders)}
    assert expected - ours == set() and len(expected) > 200


def test_groups_and_tags_are_taken_apart():
    found = find(["blimp", "mmlu_stem", "paloma", "piqa"])
    written = yaml.safe_load((catalogue.OFFICIAL / "blimp/_blimp.yaml").read_text())
    assert found.groups["blimp"] == Group(tuple(written["task"]), by_size=False)
    assert len(found.groups["mmlu_stem"].tasks) == 19 and found.groups["mmlu_stem"].by_size
    assert set(found.groups) == {"blimp", "mmlu_stem"}  # a tag has no mean of its own
    paloma = {name for name in found.tasks if name.startswith("paloma_")}
    assert paloma == set(TaskIndex.build([catalogue.OFFICIAL / "paloma"])["paloma"].tags) and len(paloma) == 16
    assert found.missing == {} and len(found.tasks) == 67 + 19 + 16 + 1
    blimp = found.tasks["blimp_adjunct_island"]
    assert (blimp.evaluated, blimp.config["dataset_name"], blimp.shots((0, 5))) == ("train", "adjunct_island", (0,))
    assert found.tasks["mmlu_abstract_algebra"].examples == "dev"
    assert blimp.digest is None


def test_every_task_of_a_suite_is_there():
    names = {name for suite in SUITES.values() for name in suite.tasks}
    assert find(sorted(names | {*TITLES, *DECISION_ACCURACY})).missing == {}


def test_how_many_examples():
    tasks = find(["gsm8k", "wikitext", "piqa"]).tasks
    assert [tasks[name].shots(None) for name in ("gsm8k", "wikitext", "piqa")] == [(5,), (0,), (0,)]
    assert [tasks[name].shots((0, 1)) for name in ("gsm8k", "wikitext", "piqa")] == [(0, 1), (0,), (0, 1)]


def test_yaml_of_the_users(tmp_path, monkeypatch):
    """A file, a folder with a group whose settings overrule, a member that is defined where it stands."""
    monkeypatch.chdir(tmp_path)
    base = write_yaml(tmp_path / "mine/base.yaml", task="mine", **CHOICE)
    members = ["mine", {"task": "piqa", "num_fewshot": 3}, {"task": "other", "include": "base.yaml", "num_fewshot": 2}]
    mean = [{"metric": "acc", "weight_by_size": True}]
    write_yaml(tmp_path / "mine/group.yaml", group="all", task=members, aggregate_metric_list=mean, description="Hm. ")
    one = find(["mine/base.yaml"]).tasks["mine"]
    assert one.yaml == {"include": str(base), "task": "mine"} and one.config["doc_to_target"] == "answer"
    found = find(["mine/group.yaml"])
    assert found.groups == {"all": Group(("mine", "piqa", "all::other"), by_size=True)}
    assert {name: task.config.get("num_fewshot") for name, task in found.tasks.items()} == {
        "mine": None, "piqa": 3, "all::other": 2
    }  # fmt: skip
    assert {task.config["description"] for task in found.tasks.values()} == {"Hm. "}
    assert found.tasks["all::other"].config["doc_to_choice"] == "choices"
    assert found.tasks["piqa"].yaml == {
        "include": str(catalogue.OFFICIAL / "piqa/piqa.yaml"), "task": "piqa", "num_fewshot": 3, "description": "Hm. "
    }  # fmt: skip
    before = one.digest
    write_yaml(base, task="mine", **CHOICE | {"doc_to_text": "{{question}}?"})
    changed = find(["mine/base.yaml"]).tasks["mine"].digest
    (tmp_path / "mine/code.py").write_text("x = 1")
    assert len({before, changed, find(["mine/base.yaml"]).tasks["mine"].digest}) == 3


def test_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "a/one.yaml", task="same", **CHOICE)
    write_yaml(tmp_path / "b/two.yaml", task="same", **CHOICE)
    write_yaml(tmp_path / "slash.yaml", task="a/b", **CHOICE)
    write_yaml(tmp_path / "group.yaml", group="g", task=["nowhere"])
    (tmp_path / "broken.yaml").write_text("task: [")
    found = find(["no_such_task", "a/one.yaml", "b", "slash.yaml", "group.yaml", "broken.yaml", "piqa"])
    assert set(found.tasks) == {"same", "piqa"}
    assert {name: reason[:25] for name, reason in found.missing.items()} == {
        "no_such_task": "there is no task no_such_",
        "b": "two tasks are called same",
        "slash.yaml": "the task a/b has a / in i",
        "group.yaml": f"{tmp_path}/group.yaml names"[:25],
        "broken.yaml": f"{tmp_path}/broken.yaml is"[:25],
    }


def test_texts_and_stores(tmp_path, story_store):
    text = tmp_path / "two.txt"
    text.write_text("One.\n<|endoftext|>\nTwo,\nin two lines.\n<|endoftext|>\n\n")
    store = tmp_path / "copy/store"
    shutil.copytree(story_store, store)
    found = find([str(text), str(store)])
    assert list(found.tasks) == ["two.txt", "copy-store"]
    assert found.tasks["two.txt"].rows(None) == {"test": [{"text": "One."}, {"text": "Two,\nin two lines."}]}
    assert found.tasks["two.txt"].rows(1) == {"test": [{"text": "One."}]}
    split = TokenStore.open(store, "validation")
    rows = found.tasks["copy-store"].rows(3)["test"]
    for index, row in enumerate(rows):
        ids = split.tokenizer().encode(row["text"], add_special_tokens=False)
        assert ids == [t for t in split.document_tokens(index) if t not in (split.end_of_document,)]
    assert len(rows) == 3
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(Exception, match="holds no document with any text"):
        find([str(tmp_path / "empty.jsonl")]).tasks["empty.jsonl"].rows(None)


def test_what_needs_no_network(tmp_path, monkeypatch, story_store):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "deep/er/one.yaml", task="one", **CHOICE)
    (tmp_path / "piqa").mkdir()  # lm-eval's task is meant
    (tmp_path / "a.txt").write_text("text")
    local = {"stories": True, "a.txt": True, str(story_store): True, "deep/er": False, "deep/er/one.yaml": False}
    for name, expected in (local | {"deep": False, "piqa": False, "b.txt": False}).items():
        assert is_local(name) == expected, name
