"""What a Vision Transformer is asked to be: sizes and training. Imports no torch.

The paper names neither its transformer nor its settings (Kim et al. 2023, Appendix A.9.2). Sizes, epochs, batch,
AdamW's learning rate and weight decay, warm-up, cosine and smoothing are those with which Lee et al. (2021, "Vision
Transformer for Small-Size Datasets") trained a ViT, as their public code has them.
"""

from dataclasses import dataclass

from llm.common.limits import BELOW_ONE, NOT_NEGATIVE, POSITIVE, at_least

from ..experiment.options import option, problems, raise_problems

PRESETS = {"paper": {"seeds": 3}}
PRODUCTS = ("float32", "bfloat16")
AUGMENTATIONS = ("none", "basic", "strong")


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of the transformer; `side` and `patch` are in pixels, and the patch is an eighth of the side by default.

    Dropout is that of the embedded tokens, and of what attention and feed-forward network add.
    """

    side: int = option(32, limit=at_least(1))
    classes: int = option(100, limit=at_least(2))
    patch: int | None = option(
        None, "side of a patch in pixels (default: 1/8 of the image's)", at_least(1), kind=int
    )  # fmt: skip
    width: int = option(192, "token width", at_least(1))
    heads: int = option(12, "number of attention heads", at_least(1))
    neurons: int = option(384, "feed-forward neurons per layer", at_least(1))
    layers: int = option(9, "number of transformer layers", at_least(1))
    dropout: float = option(0.0, "dropout probability", BELOW_ONE)

    def __post_init__(self) -> None:
        if self.patch is None:
            object.__setattr__(self, "patch", max(1, self.side // 8))
        found = problems(self)
        if not found and self.side % self.patch_side:
            found.append(f"patch {self.patch} must divide the images' side of {self.side} pixels")
        if not found and self.width % self.heads:
            found.append(f"width {self.width} must be a multiple of heads {self.heads}")
        raise_problems(found)

    @property
    def patch_side(self) -> int:
        """P."""
        assert self.patch is not None
        return self.patch

    @property
    def tokens(self) -> int:
        """T."""
        return 1 + (self.side // self.patch_side) ** 2


@dataclass(frozen=True)
class VisionSettings:
    """Training of one transformer.

    The seed is that of initial weights, order, augmentation and dropout. Images that do not fill a last batch are left
    out of an epoch. AdamW has betas 0.9 and 0.999; after the warm-up, its rate falls to 0 as a cosine. With bfloat16,
    weights, their updates and softmax stay float32.
    """

    seed: int = option(0, limit=at_least(0))
    epochs: int = option(100, "number of training epochs", at_least(1))
    batch: int = option(128, "images per step", at_least(1))
    lr: float = option(1e-3, "peak learning rate of AdamW", POSITIVE)
    weight_decay: float = option(0.05, "weight decay of matrices", NOT_NEGATIVE)
    warmup: int = option(10, "warm-up epochs", at_least(0))
    smoothing: float = option(0.1, "label smoothing", BELOW_ONE)
    augmentation: str = option(
        "strong",
        "augmentation of training images: none, crops and mirror images (basic), or also colours, rotation, shear and "
        "erasing (strong)",
        choices=AUGMENTATIONS,
    )
    products: str = option(
        "float32", "dtype of matrix products; bfloat16 uses autocast", choices=PRODUCTS, name="dtype"
    )  # fmt: skip

    def __post_init__(self) -> None:
        found = problems(self)
        if self.warmup >= self.epochs:
            found.append(f"warmup {self.warmup} must be below epochs {self.epochs}")
        raise_problems(found)
