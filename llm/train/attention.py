"""The attention that a run is trained with, by its name in transformers, and where each can be taken."""

from __future__ import annotations

from collections.abc import Callable

from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

FLASH: dict[str, tuple[str, Callable[[], bool]]] = {  # name -> its package, and whether it and a GPU for it are here
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
}
NAMES = ("sdpa", "eager", "flex_attention", *FLASH)


def attention_problems(
    name: str, *, on_gpu: bool, half: bool, masked: bool, dropout: float = 0.0, training: bool = True
) -> list[str]:
    """Why a run cannot be trained, or validated, with it: each a sentence with the fix.

    Args:
        half: matrix products in bfloat16.
        masked: rows hold documents that do not see each other. transformers' flash attention takes them apart in
            batches of one row alone, and would let them leak in others.
    """
    if name not in NAMES:
        return [f"model.attention {name!r} is unknown: give one of {', '.join(NAMES)}"]
    wrong: dict[str, bool] = {}
    if name in FLASH:
        package, is_here = FLASH[name]
        wrong = {
            "needs a GPU": not on_gpu,
            f"is not installed here (pip install {package})": on_gpu and not is_here(),
            "knows no dropout (decoder.attention_dropout)": name == "flash_attention_3" and dropout > 0 and training,
            "works in half precision alone (trainer.precision bf16-mixed)": not half,
            "lets the documents of a row see each other (data.mask_documents)": masked,
        }
    if name == "flex_attention":
        wrong = {
            "has no backward pass on CPUs": not on_gpu and training,
            "knows no dropout (decoder.attention_dropout)": dropout > 0 and training,
        }
    reasons = [reason for reason, is_so in wrong.items() if is_so]
    return [f"model.attention {name} {' and '.join(reasons)}: set sdpa"] if reasons else []
