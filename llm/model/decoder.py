"""The decoder: embedding, layer loop, logits and loss.

Dimension letters: B batch, T time, D width, V vocabulary, H query heads, G key-value heads, K width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .autocast import product_dtype
from .block import build_block
from .config import DecoderConfig
from .convert import config_from_hf, model_to_hf, weights_from_hf, weights_to_hf
from .loss import IGNORED, next_token_loss, soft_capped
from .norms import norm
from .parametrization import scales
from .positions import inverse_frequencies, rotary_angles
from .pretrained import DecoderPreTrainedModel
from .residual import DepthAverage, copies
from .value_embeddings import InputGates, gated_layers

# Logit of padding of the vocabulary, below the least of the tokens': exp(-1000) is 0 in float32, and at a temperature
# of 30 still is 3e-15.
BELOW = 1000.0


class Decoder(DecoderPreTrainedModel):
    """Token ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.position == "learned" else None
        )
        self.embed_values, self.input_gates = None, None
        if config.value_embedding != "none":
            self.embed_values = nn.Embedding(config.vocab_size, config.num_key_value_heads * config.head_dim)
        if config.value_embedding == "input":
            self.input_gates = InputGates(config.value_embedding_gate, len(gated_layers(config)))
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(build_block(config, index) for index in range(config.num_hidden_layers))
        self.depth_averages = (
            nn.ModuleList(DepthAverage(index + 2) for index in range(config.num_hidden_layers))
            if config.residual == "dense"
            else None
        )
        self.copies = copies(config)
        self.norm = norm(config.norm, config.hidden_size, config.norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """See `DecoderForCausalLM.forward`; further arguments are passed down to the attention function."""
        past_key_values = kwargs.pop("cache", past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        output_hidden_states = output_hidden_states or self.config.output_hidden_states
        output_attentions = output_attentions or self.config.output_attentions
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not torch.compiler.is_compiling():  # a graph has no branch on data
            self._check_positions(hidden.shape[1] + seen, attention_mask, position_ids, seen)
        mask = create_causal_mask(  # before an empty cache is made: with one, packed documents would not be seen
            self.config, hidden, attention_mask, past_key_values, position_ids=position_ids
        )
        if position_ids is None:
            position_ids = self._positions(hidden.shape[1], seen, attention_mask, hidden.device)  # (B or 1, T)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden, carry, angles = self._entering(hidden, input_ids, position_ids)
        every_hidden, every_attention = [], []
        outputs = [hidden] if self.depth_averages is not None else []  # of all blocks so far
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):  # fewer in early-exit drafts
            if output_hidden_states:
                every_hidden.append(self._collapsed(hidden))
            hidden, weights, *carry = layer(
                hidden,
                *carry,
                angles=angles,
                attention_mask=mask,
                past_key_values=past_key_values,
                implementation=self.config._attn_implementation,
                **kwargs,
            )
            if self.depth_averages is not None:
                outputs.append(hidden)
                hidden = self.depth_averages[index](outputs)
            if output_attentions:
                every_attention.append(weights)
        hidden = self.norm(self._collapsed(hidden))
        result = BaseModelOutputWithPast(
            hidden,
            past_key_values,
            (*every_hidden, hidden) if output_hidden_states else None,
            tuple(every_attention) if output_attentions else None,
        )
        return result if return_dict is not False else result.to_tuple()

    def _entering(
        self, hidden: Tensor, input_ids: Tensor | None, position_ids: Tensor
    ) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor] | None]:
        """Embeddings (B, T, D) -> what enters the first block, (B, T, D) or N copies (B, T, N, D); its carry; rotary
        angles, None where positions are learned."""
        hidden, carry = self._with_token_values(hidden, input_ids)
        learned = self.embed_positions
        hidden = self.embedding_dropout(hidden if learned is None else hidden + learned(position_ids))
        angles = self._angles(position_ids, hidden.dtype) if learned is None else None
        if self.copies > 1:
            hidden = hidden.unsqueeze(-2).expand(-1, -1, self.copies, -1)
        return hidden, carry, angles

    def _collapsed(self, hidden: Tensor) -> Tensor:
        """The copies of the residual stream, (B, T, N, D), as one, (B, T, D)."""
        return hidden.mean(-2) if self.copies > 1 else hidden

    def _with_token_values(self, hidden: Tensor, input_ids: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Embeddings (B, T, D) -> the same and the carry of the first block: token values, (B, G, T, K), where it has
        them (`value_embeddings.py`)."""
        if self.embed_values is None:
            return hidden, []
        if input_ids is None:
            raise ValueError("value_embedding looks token ids up: give input_ids, not inputs_embeds")
        token_values = self.embed_values(input_ids)  # (B, T, G K)
        if self.input_gates is not None:
            return self.input_gates(hidden, token_values), []
        token_values = token_values.to(product_dtype(hidden))  # once, not in every block
        return hidden, [token_values.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)]

    def _check_positions(
        self, length: int, attention_mask: Tensor | None, position_ids: Tensor | None, seen: int
    ) -> None:
        if self.embed_positions is not None and length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens are more than the {self.config.max_position_embeddings} learned positions: "
                "cut the input or train with a larger max_position_embeddings"
            )
        if position_ids is None or seen:
            return
        restarts = position_ids.diff(dim=-1) != 1
        if attention_mask is not None and attention_mask.ndim == 2:
            both = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
            if (both & restarts).any():  # documents would leak into each other silently
                raise ValueError("position_ids restart inside a row: packed documents need attention_mask=None")
        elif "flash" in str(self.config._attn_implementation) and restarts.any():
            raise ValueError("flash attention lets packed documents see each other: use sdpa or flex_attention")

    @staticmethod
    def _positions(length: int, seen: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
        """0, 1, 2 ... after `seen` cached tokens; with left padding the first real token has position 0."""
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return torch.arange(seen, seen + length, device=device)[None]

    def _angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary positions, each (B or 1, 1, T, K)."""
        rope = self.config.rope_parameters
        if rope["rope_type"] == "default":
            frequencies = inverse_frequencies(self.config.head_dim, rope["rope_theta"], position_ids.device)
            return rotary_angles(position_ids, frequencies, 1.0, dtype)
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, position_ids.device)
        return rotary_angles(position_ids, frequencies, scaling, dtype)


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The decoder with its output head; a transformers model, so `generate`, lm-eval and any HF tool work."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_scale = 1 / scales(config).width  # of the hidden states that enter it
        self.post_init()

    @classmethod
    def from_hf(cls, hf_model: PreTrainedModel) -> DecoderForCausalLM:
        """The same model as a Llama, Mistral, Qwen2, Qwen3 or GPT-2 of transformers; its weights are copied.

        Raises:
            ValueError: another class, or a setting that this decoder does not have.
        """
        if not isinstance(hf_model, PreTrainedModel):
            raise ValueError(f"from_hf takes a model, not {hf_model!r}: load it with AutoModelForCausalLM first")
        model = cls(config_from_hf(hf_model.config))
        missing, more = model.load_state_dict(weights_from_hf(hf_model), strict=False)
        if unknown := [*more, *(name for name in missing if not name.endswith("o_proj.bias"))]:  # Qwen2 has none: 0
            raise ValueError(
                f"{type(hf_model).__name__} has no counterpart of {unknown[0]} here, or the other way round"
            )
        return model.to(hf_model.dtype).train(hf_model.training)  # type: ignore[arg-type]  # transformers hides overloads

    def to_hf(self) -> PreTrainedModel:
        """The same model as a `LlamaForCausalLM` or `GPT2LMHeadModel`; its weights are copied.

        Raises:
            ValueError: a switch is on that those models do not have; the message names it.
        """
        hf_model = model_to_hf(self.config)
        hf_model.load_state_dict(weights_to_hf(self, hf_model), strict=True)
        return hf_model.to(self.dtype).train(self.training)  # type: ignore[arg-type]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T, V) and, with labels, the next-token loss.

        Args:
            input_ids: (B, T), or `inputs_embeds` (B, T, D).
            attention_mask: (B, S), 1 for tokens and 0 for padding, on either side.
            position_ids: (B, T); restarting at 0 inside a row packs several documents into it, and then none sees
                another (needs attention_mask None).
            past_key_values: key-value cache (`cache` from transformers 5.24 on); made where `use_cache` asks for one.
            labels: (B, T), shifted inside: token t is predicted from those before it; -100 is left out.
            logits_to_keep: compute the logits of the last n positions only (0: all).
            num_items_in_batch: predicted tokens of the whole global batch, by which the summed loss is divided
                (default: those of this micro-batch).
            output_attentions: attention weights of each layer, (B, H, T, S); needs `attn_implementation="eager"`.
            **kwargs: `shift_labels` (B, T), already shifted: entry t is predicted at position t. For training: no
                logits are returned, so that none need be kept. (transformers' Trainer would ask for every named
                argument with labels.) `z_loss`: coefficient of the z-loss, which is in the gradient alone, see
                `loss.py`. The rest goes to `Decoder`.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        z_loss: float = kwargs.pop("z_loss", 0.0)
        past_key_values = kwargs.pop("cache", past_key_values)
        if labels is not None or shift_labels is not None:
            use_cache = use_cache or False
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        if shift_labels is not None:
            loss = self._loss(self._for_head(out.last_hidden_state), shift_labels, num_items_in_batch, z_loss)
            return CausalLMOutputWithPast(loss=loss, hidden_states=out.hidden_states)
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(self._for_head(out.last_hidden_state[:, kept]))
        shifted = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        loss = None if shifted is None else next_token_loss(logits, shifted, num_items_in_batch, z_loss)
        result = CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
        return result if return_dict is not False else result.to_tuple()

    def _for_head(self, hidden: Tensor) -> Tensor:
        return hidden if self.head_scale == 1 else hidden * self.head_scale

    def _loss(self, hidden: Tensor, targets: Tensor, num_items: Tensor | int | None, z_loss: float) -> Tensor:
        """Hidden states (B, T, D) and what is predicted at each position, (B, T) -> the next-token loss."""
        if self.fused_loss:
            how = self.config.unpadded_vocab_size, self.config.final_logit_softcapping, z_loss
            return self.lm_head(hidden, targets, num_items, *how)
        return next_token_loss(self._logits(hidden), targets, num_items, z_loss)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self._without_padding(soft_capped(self.lm_head(hidden), self.config.final_logit_softcapping))

    def _without_padding(self, logits: Tensor) -> Tensor:
        """Logits (..., V) in which padding of the vocabulary is far below the least likely token.

        The distance is finite: a loss that averages over all ids, as with smoothed labels, stays a number.
        """
        real = self.config.unpadded_vocab_size
        if real == logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= real
        return torch.where(padding, logits[..., :real].detach().amin(-1, keepdim=True) - BELOW, logits)

    @property
    def fused_loss(self) -> bool:
        """Whether the output head computes the loss itself, without all logits."""
        return getattr(self.lm_head, "fuses_loss", False)


# transformers' Trainer shifts the labels of a smoothed loss only for classes that are in this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(DecoderConfig.model_type, DecoderForCausalLM.__name__)

# An exported folder names these classes and carries the files of this package.
DecoderConfig.register_for_auto_class()
Decoder.register_for_auto_class("AutoModel")
DecoderForCausalLM.register_for_auto_class("AutoModelForCausalLM")
