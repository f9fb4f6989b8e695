"""`python -m llm generate OUT --prompt "..."`: continue a prompt with an exported folder or any transformers model."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer, set_seed

from .common.errors import UserError
from .common.exported import read_card, trained_context
from .common.files import first_line
from .pretrained import load_model, load_tokenizer


def run(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation as it is made.

    Raises:
        UserError: no exported folder, a prompt that is empty, no text, or leaves no room in the context; a model that
            cannot generate, or whose outputs are no numbers.
    """
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model} is not an exported folder (it has no config.json): make one with llm export")
    if any("\ud800" <= character <= "\udfff" for character in args.prompt):  # Python's stand-in for such bytes
        raise UserError("--prompt is not UTF-8: give text in UTF-8")
    card = read_card(args.model)
    tokenizer = load_tokenizer(args.model, args.trusted)
    model = load_model(args.model, args.trusted, dtype="auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    length, limit = inputs["input_ids"].shape[1], trained_context(model.config, card)
    if not length:
        raise UserError("the prompt holds no token: give --prompt some text")
    if int(inputs["input_ids"].max()) >= model.get_input_embeddings().weight.shape[0]:
        raise UserError(f"the tokenizer of {args.model} has ids beyond the model's vocabulary: export it again")
    if limit is not None and length >= limit:
        raise UserError(f"the prompt's {length} tokens leave no room in the context of {limit}: shorten it")
    room = args.max_new_tokens if limit is None else min(args.max_new_tokens, limit - length)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    set_seed(args.seed)
    try:
        model.to(device).generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=room,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            logits_processor=LogitsProcessorList([OnlyNumbers()]),
            **(sampling if args.temperature else {"do_sample": False}),
        )
    except (RuntimeError, ValueError) as error:  # by which torch and transformers reject a model or run out of memory
        raise UserError(f"{args.model} cannot generate: {first_line(error)}") from error


class OnlyNumbers(LogitsProcessor):
    """Ends generation where a logit is NaN or infinite: the likeliest of such is the first id, without a word."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any() or scores.max().isinf():  # -inf is what --top-k leaves out
            raise UserError("the model's outputs are not numbers: export it again")
        return scores
