"""DecoderConfig: the sizes and switches of a decoder.

Field names are those of the transformers library. The defaults are Llama-style parts; GPT-2-style parts are a choice
of `norm`, `position`, `feedforward` and biases in the same decoder (`DecoderConfig.gpt2`).
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig

from .activations import FIELDS, PARAMETRIC, settings_of
from .activations import NAMES as ACTIVATION_NAMES
from .contradictions import contradictions, fill_sizes
from .feedforward import FEEDFORWARDS
from .norms import NORMS
from .residual import CONNECTIONS, FORMS
from .streams import DENSE, SOURCES, STREAMS, WEIGHTS
from .value_embeddings import PLACES

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "unpadded_vocab_size",
)
PROBABILITIES = ("attention_dropout", "residual_dropout", "embedding_dropout")
POSITIONS = ("rope", "learned")
ROPE_TYPES = ("default", "linear", "llama3")  # those whose frequencies do not depend on the sequence at hand


class DecoderConfig(PretrainedConfig):
    """Sizes and switches of `DecoderForCausalLM`.

    Attributes: Sizes
        vocab_size: rows of the embedding, padding included.
        unpadded_vocab_size: ids that the tokenizer has, where the rows were padded beyond them for speed; the logits of
            the padding can never win. None: no padding.
        hidden_size: width D of the model.
        intermediate_size: width inside the FFN; None is 4 D for a plain FFN and 8/3 D for a gated one (as many
            parameters), rounded up to a multiple of 64.
        num_hidden_layers: blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads; None is as many as query heads.
        head_dim: width of a head; None is hidden_size / num_attention_heads.
        max_position_embeddings: longest context; a hard limit for learned positions.

    Attributes: Parts
        norm: of the blocks' inputs and of the last block's output.
        norm_eps: added to the mean square (rmsnorm) or variance (layernorm).
        position: how positions are told apart.
        rope_parameters: of rope, as in transformers: rope_type, rope_theta, ...
        feedforward: FFN with a gate (SwiGLU) or without.
        attention_bias: biases of the projections of attention.
        mlp_bias: biases of those of the FFN.
        qk_norm: RMSNorm of each head's queries and keys, after streams and before rope.
        tie_word_embeddings: the output head uses the embedding's matrix.

    Attributes: Switches
        hidden_act: activation of the FFN, see `activations.py`.
        nmda_alpha (float): alpha of NMDA, at least 0.
        nmda_beta (float): beta of NMDA.
        nmda_learnable (bool): train alpha and beta of every layer.
        swish_beta (float): beta of Swish.
        swish_bias (float): bias of its gate.
        swish_learned (str): which of them are trained in every layer: none, beta, bias or both.
        xielu_positive (float): first value of xIELU's coefficient above 0.
        xielu_negative (float): first value of the one below 0.
        stream: residual attention streams, see `streams.py`. Empty: none.
        stream_source: what a layer adds of the layers before it.
        stream_weight: factor of what is added: fixed, or learned by layer or head; mix learns that of the layer's own
            projection too, by layer.
        stream_arriving: factor of what is added, or its first value.
        stream_own: factor of the layer's own projection, or its first value. 0 with source first: the layer has none.
        stream_layers: which layers add it, from 1 on. Unset: all.
        value_embedding: where a second table of token embeddings is added, see `value_embeddings.py`: none, values, or
            input, the control with the same parameters.
        value_embedding_layers: which layers add it to their values, from 0 on. Unset: all.
        value_embedding_gate: first value of each layer's gate; 0 leaves a pretrained model unchanged at first.
        residual: form of the residual connection, see `residual.py`: plain, dense, hyper or hyper-manifold.
        residual_expansion: copies of the residual stream in the hyper forms.
        final_logit_softcapping: largest absolute logit, approached as cap tanh(logit / cap); None: no cap.
        softmax_scale: factor of the attention scores; None is head_dim^-0.5.
        attention_dropout: probability that an attention weight is dropped.
        residual_dropout: probability that an element of a block's output is dropped.
        embedding_dropout: probability that an element of an embedding is dropped.

    Attributes: Initial weights
        initializer_range: standard deviation of every matrix.
        initializer_seed: each tensor is drawn from a generator named by (seed, parameter name).
        scale_residual_init: divide the deviation of the projections that write to the residual stream by
            sqrt(2 layers), as GPT-2 does.

    Attributes: Scaling
        parametrization: how settings follow the size, see `parametrization.py`.
        base_hidden_size: under completep, the hidden_size at which the settings were tuned.
        base_num_hidden_layers: under completep, the num_hidden_layers at which the settings were tuned.
        base_head_dim: under completep, the head_dim at which the settings were tuned.

    Attributes: Of transformers
        use_cache: keep keys and values when generating.
        pad_token_id, bos_token_id, eos_token_id: ids that generation uses; an export sets its tokenizer's.

    Raises:
        ValueError: the settings contradict each other; one message names every problem and its fix.
    """

    model_type = "hippoformer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers declares it so)
    base_model_tp_plan = {  # noqa: RUF012 (tensor parallelism by heads; not with a stream weight of each head or value embeddings)
        **{f"layers.*.attention.{name}_proj": "colwise" for name in "qkv"},
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.feedforward.gate_proj": "colwise",
        "layers.*.feedforward.up_proj": "colwise",
        "layers.*.feedforward.down_proj": "rowwise",
    }

    vocab_size: int = 50_257
    unpadded_vocab_size: int | None = None
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048

    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    position: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    feedforward: str = "gated"
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False

    hidden_act: str = "silu"
    __annotations__.update({name: type(value) for name, value in FIELDS.items()})  # nmda_alpha, nmda_beta, ...
    vars().update(FIELDS)
    stream: list[str] | None = None
    stream_source: str = "previous"
    stream_weight: str = "fixed"
    stream_arriving: float = 1.0
    stream_own: float = 1.0
    stream_layers: list[int] | None = None
    value_embedding: str = "none"
    value_embedding_layers: list[int] | None = None
    value_embedding_gate: float = 1.0
    residual: str = "plain"
    residual_expansion: int = 4
    final_logit_softcapping: float | None = None
    softmax_scale: float | None = None
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0

    initializer_range: float = 0.02
    initializer_seed: int = 0
    scale_residual_init: bool = False
    parametrization: str = "standard"
    base_hidden_size: int | None = None
    base_num_hidden_layers: int | None = None
    base_head_dim: int | None = None
    use_cache: bool = True

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.stream = list(self.stream or [])
        fill_sizes(self)
        if self.position == "rope":
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0} | (self.rope_parameters or {})
        super().__post_init__(**kwargs)
        bad = [name for name in SIZES if not getattr(self, name) or getattr(self, name) < 1]
        problems = [f"{', '.join(bad)} must be at least 1"] if bad else contradictions(self, DENSE, CONNECTIONS)
        problems += [*self._name_problems(), *self._number_problems()]
        if problems:
            raise ValueError("; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it; a saved folder's configuration is imported by way of `decoder.py`.

        transformers keeps the class of a folder's model by that of its configuration, and tells one such class from
        another by the folder's name and the files that its module imports: those of `decoder.py` are all.
        """
        content = super().to_dict()
        if "AutoConfig" in (content.get("auto_map") or {}):
            content["auto_map"] = content["auto_map"] | {"AutoConfig": f"decoder.{type(self).__name__}"}
        return content

    @classmethod
    def llama(cls, **settings: Any) -> DecoderConfig:
        """Llama-style parts: RMSNorm, RoPE, SwiGLU, no biases. `settings` overrides any field."""
        return cls(**settings)

    @classmethod
    def gpt2(cls, **settings: Any) -> DecoderConfig:
        """GPT-2-style parts: LayerNorm, learned positions, GELU (tanh form) MLP, biases, tied embeddings."""
        parts: dict[str, Any] = {
            "norm": "layernorm",
            "position": "learned",
            "feedforward": "plain",
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            "max_position_embeddings": 1024,
            "scale_residual_init": True,
        }
        return cls(**(parts | settings))

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Transformers fills `rope_parameters` in here; learned positions have none to fill."""
        return super().convert_rope_params_to_dict(**kwargs) if self.position == "rope" else kwargs

    def _name_problems(self) -> list[str]:
        choices: dict[str, Any] = {
            "norm": NORMS,
            "position": POSITIONS,
            "feedforward": FEEDFORWARDS,
            "hidden_act": ACTIVATION_NAMES,
            "stream_source": SOURCES,
            "stream_weight": WEIGHTS,
            "value_embedding": PLACES,
            "residual": FORMS,
        }
        problems = [
            f"{name} {getattr(self, name)!r} is unknown: give one of {', '.join(known)}"
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]
        if unknown := [name for name in self.stream if name not in STREAMS]:
            problems.append(f"stream {unknown} is unknown: give any of {', '.join(STREAMS)}")
        if len(set(self.stream)) < len(self.stream):
            problems.append(f"stream {self.stream} names one twice")
        if self.position == "rope" and self.rope_parameters["rope_type"] not in ROPE_TYPES:
            problems.append(
                f"rope_type {self.rope_parameters['rope_type']!r} is unknown: give one of {', '.join(ROPE_TYPES)}"
            )
        return problems

    def _number_problems(self) -> list[str]:
        problems = []
        for name in PROBABILITIES:
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} is not a probability below 1")
        if self.final_logit_softcapping is not None and not self.final_logit_softcapping > 0:
            problems.append(
                f"final_logit_softcapping {self.final_logit_softcapping} must be above 0, or null for no cap"
            )
        for name, kind in PARAMETRIC.items():
            problems += kind.problems(**settings_of(name, self))
        return problems
