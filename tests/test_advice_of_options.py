"""Taking the advice of a refused option works, of every option that has a limit, of every one that has names, of every
trainer option that is decided elsewhere, and of settings that contradict each other. Nothing is trained: what `check`
passes and the classes refuse is tried in tests/train/test_options.py."""

import re
from pathlib import Path

import pytest

from llm.common.errors import UserError
from llm.common.limits import LIMITS
from llm.train import declarations, options

CONFIG = str(Path(__file__).parents[1] / "configs" / "stories_values.yaml")

# words that are refused, what the sentence says of the way out, and words that take it, one way each
CONTRADICTIONS: list[tuple[str, str, list[str]]] = [
    ("decoder.num_attention_heads=3", "give head_dim", ["decoder.num_attention_heads=3 decoder.head_dim=8"]),
    ("decoder.head_dim=5", "give an even head_dim", ["decoder.head_dim=6"]),
    ("decoder.unpadded_vocab_size=2000", "vocab_size counts the padding too", [
        "decoder.unpadded_vocab_size=2000 decoder.vocab_size=2048",
    ]),
    ("decoder.stream_source=dense", "give stream_weight layer, head or mix", [
        f"decoder.stream_source=dense decoder.stream_weight={weight}" for weight in ("layer", "head", "mix")
    ]),
    ("decoder.stream_own=0", "give first, or stream_weight mix", [
        "decoder.stream_own=0 decoder.stream_source=first", "decoder.stream_own=0 decoder.stream_weight=mix",
    ]),
    ("decoder.stream_layers=[0]", "must be layers from 1 to 3", ["decoder.stream_layers=[1,3]"]),
    ("decoder.value_embedding=values decoder.value_embedding_layers=[4]", "layers from 0 to 3, or unset for all", [
        "decoder.value_embedding=values decoder.value_embedding_layers=[0,3]", "decoder.value_embedding=values",
    ]),
    ("decoder.residual=hyper decoder.residual_expansion=1", "must be at least 2", [
        "decoder.residual=hyper decoder.residual_expansion=2",
    ]),
    ("decoder.parametrization=completep", "needs base_hidden_size, base_num_hidden_layers, base_head_dim", [
        "decoder.parametrization=completep decoder.base_hidden_size=64 decoder.base_num_hidden_layers=4 "
        "decoder.base_head_dim=16",
    ]),
    ("decoder.position=learned data.context=999", "beyond decoder.max_position_embeddings", [
        "decoder.position=learned data.context=999 decoder.max_position_embeddings=999",
    ]),
    ("data.packing=per_document data.mask_documents=true", "leave one out", [
        "data.packing=per_document", "data.mask_documents=true",
    ]),
    ("data.store={a: 0}", "must be a finite number above 0", ["data.store={a: 1}"]),
    ("model.schedule.shape=wsd", "set model.schedule.cooldown_steps", [
        "model.schedule.shape=wsd model.schedule.cooldown_steps=460",
    ]),
    ("model.schedule.warmup_steps=5000", "or raise --trainer.max_steps", [
        "model.schedule.warmup_steps=5000 trainer.max_steps=5000", "model.schedule.warmup_steps=2300",
    ]),
    ("strategy.offload_optimizer=true", "needs strategy.name deepspeed", [
        "strategy.offload_optimizer=true strategy.name=deepspeed",
    ]),
    ("strategy.name=fsdp2 trainer.precision=bf16-true", "give bf16-mixed", [
        "strategy.name=fsdp2 trainer.precision=bf16-mixed",
    ]),
    ("strategy.name=deepspeed strategy.stage=3 model.compile=true", "set model.compile false, or strategy.stage 1 or", [
        f"strategy.name=deepspeed {words}"
        for words in ("strategy.stage=3", "strategy.stage=1 model.compile=true", "strategy.stage=2 model.compile=true")
    ]),
    ("strategy.communication_dtype=bf16", "set fp32, or trainer.precision bf16-mixed", [
        "strategy.communication_dtype=fp32", "strategy.communication_dtype=bf16 trainer.precision=bf16-mixed",
    ]),
    ("run.keep_every=7", "must be a multiple of run.checkpoint_every 500", ["run.keep_every=1000"]),
    ("evaluation.every=7", "must be a multiple of run.checkpoint_every 500", ["evaluation.every=500"]),
    ("seed_everything=-1", "must be a number from 0", ["seed_everything=0"]),
    ("trainer.devices=0", "a number of devices, a list of their indices, or auto", [
        "trainer.devices=2", "trainer.devices=[0]", "trainer.devices=auto",
    ]),
]  # fmt: skip


def as_options(words: str) -> list[str]:
    """KEY=VALUE words, separated by spaces before a key, as options."""
    return [f"--{word}" for word in re.split(r" (?=[\w.]+=)", words)]


def refusal(words: str) -> str | None:
    """What `check` says of KEY=VALUE words; None if nothing."""
    try:
        options.check("fit", ["--config", CONFIG, *as_options(words)])
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("refused", "advice", "taken"), CONTRADICTIONS)
def test_settings_that_contradict_each_other(refused: str, advice: str, taken: list[str]) -> None:
    assert advice in (refusal(refused) or "")
    assert [refusal(words) for words in taken] == [None] * len(taken)


ABOVE = {"strategy.stage": "4", "evaluation.nice": "20", "data.workers": "1000", "run.keep_steps": "[0]"}


@pytest.mark.parametrize("key", LIMITS)
def test_limits(key: str) -> None:
    """The sentence names a value that passes."""
    listed = key in ("run.keep_steps", "model.optimizer.betas")
    said = refusal(f"{key}={ABOVE.get(key, '[-1, -1]' if listed else '-1')}")
    assert said is not None and LIMITS[key].text in said
    if number := re.search(r"at least ([\d.]+)|^(\d+)(?= to |, )", LIMITS[key].text):
        value = number[1] or number[2]
    else:
        value = "0.5"  # above 0, or between 0 and 1
    related = {"run.keep_every": "500", "evaluation.every": "500"}  # multiples of the checkpoints' interval
    value = related.get(key, f"[{value}, {value}]" if listed else value)
    assert refusal(f"{key}={value}") is None
    if "or null for" in LIMITS[key].text:
        assert refusal(f"{key}=null") is None


@pytest.mark.parametrize("key", declarations.CHOICES)
def test_names(key: str) -> None:
    """Every name that the sentence lists passes, with what else it needs."""
    listed = key in ("decoder.stream", "run.loggers", "model.disable_fast_paths")
    said = refusal(f"{key}={'[papyrus]' if listed else 'papyrus'}") or ""
    assert "give " in said
    needed = {
        "dense": "decoder.stream_weight=mix", "dense_by_token": "decoder.stream_weight=mix",
        "completep": "decoder.base_hidden_size=64 decoder.base_num_hidden_layers=4 decoder.base_head_dim=16",
        "wsd": "model.schedule.cooldown_steps=9", "bf16": "trainer.precision=bf16-mixed",
    }  # fmt: skip
    names = re.split(r", | or ", re.sub(r".*give (one of |any of )?", "", said))
    assert set(names) == set(declarations.choices(key))
    for name in names:
        assert refusal(f"{key}={f'[{name}]' if listed else name} {needed.get(name, '')}".strip()) is None, name


@pytest.mark.parametrize("key", [key for key, fix in options.OURS.items() if re.match(r"give \w+\.\w+", fix)])
def test_options_of_the_trainer_that_are_decided_elsewhere(key: str) -> None:
    """The keys that the sentence names are options of ours, and taken."""
    value = {"max_time": "00:01:00:00", "strategy": "ddp", "enable_checkpointing": "true", "logger": "true"}.get(
        key, "3"
    )
    assert options.OURS[key] in (refusal(f"trainer.{key}={value}") or "")
    values = {"strategy.name": "ddp", "run.loggers": "[csv]", "data.store": "small", "run.folder": "small"}
    for fix in re.findall(r"\b(?:data|model|run|strategy|trainer)\.\w+", options.OURS[key]):
        assert refusal(f"{fix}={values.get(fix, '500')}") is None, fix
