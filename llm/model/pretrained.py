"""The class below both models: what transformers may do with them, and their initial weights."""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from .activations import Parametric
from .config import DecoderConfig
from .fast_paths import FAST_PATHS, enable_fast_paths
from .parametrization import scales
from .residual import DepthAverage, HyperConnection
from .streams import AttentionStream
from .value_embeddings import ValueGate

PACKAGE = __name__.rpartition(".")[0]
STARTS_ITSELF = (AttentionStream, ValueGate, DepthAverage, HyperConnection)  # modules that know their first values


class DecoderPreTrainedModel(PreTrainedModel):
    """What the bare decoder and the one with an output head have in common: what transformers may do, and weights.

    Initial weights depend on `config.initializer_seed` and each parameter's name alone: the two models of a pair
    start equal in every parameter that both have.
    """

    config_class = DecoderConfig
    config: DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers declares it so)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    fast_paths: tuple[str, ...] = ()  # those that are on

    def post_init(self) -> None:
        """As transformers has it; and a saved trace of this model loads, whatever its folder is called."""
        super().post_init()
        for kind in {type(module) for module in self.modules()}:
            if kind.__module__.startswith(PACKAGE):  # TorchScript would take the folder's name for an identifier
                kind._jit_override_qualname = f"__torch__.hippoformer.{kind.__name__}"  # type: ignore[attr-defined]

    def enable_fast_paths(self, names: Iterable[str] = FAST_PATHS) -> None:
        """Switch faster modules on, and all others off: see `fast_paths.py`. A model is plain torch until then."""
        names = tuple(names)
        enable_fast_paths(self, names)
        self.fast_paths = names

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *words: Any, **settings: Any) -> nn.Embedding:
        """As transformers has it; all `new_num_tokens` rows are tokens then, and what pads them further is not."""
        embedding = super().resize_token_embeddings(new_num_tokens, *words, **settings)
        if new_num_tokens is not None:
            self.config.unpadded_vocab_size = new_num_tokens
        base: Any = getattr(self, self.base_model_prefix, self)
        if base.embed_values is not None:
            base.embed_values = self._get_resized_embeddings(base.embed_values, embedding.num_embeddings)
        self.enable_fast_paths(self.fast_paths)  # the new head is a plain one
        return embedding

    def save_pretrained(self, *words: Any, **settings: Any) -> None:
        """As transformers has it. The folder loads through AutoModel too, as the bare decoder."""
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": "decoder.Decoder"}
        super().save_pretrained(*words, **settings)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the module's own parameters; transformers calls this for each module, also for weights that a
        checkpoint lacks."""
        prefix = "" if hasattr(self, "lm_head") else f"{self.base_model_prefix}."
        names = {id(parameter): prefix + name for name, parameter in self.named_parameters()}
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta or getattr(parameter, "_is_hf_initialized", False):
                continue
            if isinstance(module, nn.Linear | nn.Embedding) and own_name == "weight":
                name = names.get(id(parameter), own_name)
                parameter.copy_(seeded_normal(self.config.initializer_seed, name, parameter.shape) * self._std(name))
            elif isinstance(module, Parametric):
                parameter.fill_(module.initial[own_name])
            elif isinstance(module, STARTS_ITSELF):
                module.reset(own_name)
            else:
                parameter.fill_(0.0 if own_name == "bias" else 1.0)  # norms start at 1

    def _std(self, name: str) -> float:
        scale = scales(self.config)
        std = self.config.initializer_range * (scale.block_deviation if ".layers." in name else 1)
        writes_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        if self.config.scale_residual_init and writes_to_residual:
            return std / math.sqrt(2 * self.config.num_hidden_layers / scale.depth)
        return std


def seeded_normal(seed: int, name: str, shape: torch.Size) -> Tensor:
    """Standard normal numbers, float32, that depend on (seed, name, shape) alone: not on the order in which tensors
    are made, nor on the device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(
        int.from_bytes(digest[:8], "little") >> 1
    )  # 63 bits: seeds are signed
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
