"""What a training image may look like, by kornia, on the images' device."""

import torch
from torch import Tensor, nn

AUGMENTATIONS = ("none", "basic", "auto")
GROUP = 8  # images that share a sub-policy of AutoAugment: kornia draws one for a batch


class Augmentation:
    """Images in [0, 1] -> images in [0, 1], with the numbers that torch's own generator draws.

    Args:
        name: "none"; "basic", a crop of the image with 4 black pixels (8 at a side of 64) around it, and its mirror
            image half of the time; "auto", these and then AutoAugment (Cubuk et al. 2019).
        side: of an image.
        policy: of AutoAugment: "cifar10" or "imagenet".
    """

    def __init__(self, name: str, side: int, policy: str) -> None:
        self.basic = self.auto = None
        if name == "none":
            return
        import kornia.augmentation as k  # takes a second
        from kornia.augmentation.auto import AutoAugment

        self.basic = nn.Sequential(k.RandomCrop((side, side), padding=side // 8), k.RandomHorizontalFlip())
        if name == "auto":
            self.auto = AutoAugment(policy)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> the same shape."""
        if self.basic is not None:
            images = self.basic(images)
        if self.auto is not None:
            images = torch.cat([self.auto(group) for group in images.split(GROUP)])
        return images
