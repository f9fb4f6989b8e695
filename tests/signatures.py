"""What jsonargparse reads in the source of a class is remembered: for each parser of `fit` it takes 0.2 s, and a
program makes one parser, the tests a thousand."""

from typing import Any

from jsonargparse import _signatures
from lightning.pytorch import Trainer

from llm.data.module import TokenDataModule
from llm.model import DecoderConfig
from llm.train.evaluation import EvaluationSettings
from llm.train.module import LanguageModule
from llm.train.run_folder import RunSettings
from llm.train.strategy import StrategySettings

_CLASSES = (Trainer, LanguageModule, TokenDataModule, DecoderConfig, StrategySettings, RunSettings, EvaluationSettings)
_read = _signatures.get_signature_parameters
_known: dict[Any, list[Any]] = {}


def _remembered(component: Any, method: str | None = None, **logger: Any) -> list[Any]:
    if (component, method) not in _known:
        _known[component, method] = _read(component, method, **logger)
    return list(_known[component, method])


_signatures.get_signature_parameters = _remembered
for kind in _CLASSES:
    _remembered(kind)  # before processes are forked
