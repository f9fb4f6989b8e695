"""`python -m llm generate OUT --prompt "..."`: continue a prompt with an exported folder or any transformers model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from .common.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m llm generate`."""
    parser.add_argument("model", type=Path, help="exported folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="tokens to add (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.epilog = 'example: python -m llm generate runs/stories/export/values --prompt "Mary and John were"'


def run(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation as it is made.

    Raises:
        UserError: no exported folder, an empty prompt, or one that leaves no room in the context.
    """
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model} is no exported folder (it has no config.json): make one with llm export")
    if args.temperature < 0 or args.max_new_tokens < 1 or args.top_k < 1:
        raise UserError("give --temperature >= 0, --max-new-tokens >= 1 and --top-k >= 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype="auto")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{args.model} does not load ({reason}): make it again with llm export") from error
    model.to(device).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    length, limit = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if not length:
        raise UserError("the prompt holds no token: give --prompt some text")
    if length >= limit:
        raise UserError(f"the prompt's {length} tokens leave no room in the context of {limit}: shorten it")
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    set_seed(args.seed)
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(args.max_new_tokens, limit - length),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **(sampling if args.temperature else {"do_sample": False}),
    )
