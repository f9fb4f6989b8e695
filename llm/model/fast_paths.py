"""Faster modules for the same numbers, off until `enable_fast_paths` is called, as `fit`, `bench` and `evals` do:

    matmul      float32 products on x86 CPUs by oneDNN, bfloat16 products by float32 where the CPU has no bfloat16
                (`fast_linear.py`); plain: torch's own choice
    attention   bfloat16 causal attention on CPUs by blocks of queries (`fast_attention.py`); plain: sdpa
    dropout     dropout on CPUs by bits, and attention with it (`fast_dropout.py`); plain: torch's
    rotary      rotary positions and their gradient in two passes (`fast_rotary.py`); plain: autograd's form
    norm        RMSNorm on CPUs in few passes (`fast_norm.py`); plain: torch's
    loss        head and cross-entropy by chunks (`fast_loss.py`); plain: all logits at once

Each is a subclass of a plain module with the same parameters; switching changes the class of the modules in place. They
differ from the plain modules by rounding alone, dropout in the elements that a seed draws. Each has one derivative, by
autograd: second ones and `torch.func` need the plain modules.
"""

from collections.abc import Iterable

from torch import nn

from .attention import Attention

FAST_PATHS = ("matmul", "attention", "dropout", "rotary", "norm", "loss")


def enable_fast_paths(model: nn.Module, names: Iterable[str] = FAST_PATHS) -> None:
    """Switch these fast paths on in all modules of a model, and all others off. Call it before compiling blocks.

    Raises:
        ValueError: no fast path has this name.
    """
    from .fast_attention import FastAttention
    from .fast_dropout import FastDropout
    from .fast_linear import FastLinear
    from .fast_loss import FastOutputHead
    from .fast_norm import FastRMSNorm

    names = frozenset(names)
    if unknown := names.difference(FAST_PATHS):
        raise ValueError(f"no fast path is called {', '.join(sorted(unknown))}: give any of {', '.join(FAST_PATHS)}")
    kinds: list[tuple[type[nn.Module], type[nn.Module], set[str]]] = [  # plain, fast, the paths that it has
        (nn.Linear, FastLinear, {"matmul"}),
        (nn.Dropout, FastDropout, {"dropout"}),
        (nn.RMSNorm, FastRMSNorm, {"norm"}),
        (Attention, FastAttention, {"attention", "dropout", "rotary"}),
    ]
    heads = [module.lm_head for module in model.modules() if hasattr(module, "lm_head")]
    for module in model.modules():
        if any(module is head for head in heads) and type(module) in (nn.Linear, FastLinear, FastOutputHead):
            module.__class__ = FastOutputHead if "loss" in names else nn.Linear
        if isinstance(module, FastOutputHead):
            module.fast_paths = names & {"matmul", "loss"}
            continue
        for plain, fast, paths in kinds:
            if type(module) in (plain, fast) and _is_usual(module):
                module.fast_paths = names & paths  # type: ignore[assignment]
                module.__class__ = fast if names & paths else plain


def _is_usual(module: nn.Module) -> bool:
    """Whether a module has a form that the fast one knows: all of this package's do."""
    if isinstance(module, nn.RMSNorm):
        return module.eps is not None and module.weight is not None and len(module.normalized_shape) == 1
    return not (isinstance(module, nn.Dropout) and module.inplace)
