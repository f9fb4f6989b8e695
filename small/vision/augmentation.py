"""What a training image may look like: kornia's transformations, drawn for each image, on the images' device."""

from torch import nn

PADDING = 4  # pixels around an image before a crop, as is usual for CIFAR (He et al. 2016)


def augmentation(name: str, side: int, fill: float) -> nn.Module:
    """Images (B, 3, S, S) in [0, 1] -> the same shape and range, with the numbers that torch's own generator draws.

    Args:
        name: "none"; "basic", a crop of the padded image, and its mirror image half of the time; "strong", also colours
            (brightness, contrast and saturation times 0.6 to 1.4, of four images in five, in an order that kornia draws
            for a batch), rotation by up to 15 and
            shear by up to 10 degrees (of one in two), and a patch that is painted over (Zhong et al. 2020; of one in
            four, with the numbers of Lee et al. 2021).
        side: S.
        fill: of such a patch.
    """
    if name == "none":
        return nn.Identity()
    import kornia.augmentation as k  # takes a second

    parts: list[nn.Module] = [k.RandomCrop((side, side), padding=PADDING), k.RandomHorizontalFlip()]
    if name == "strong":
        parts += [
            k.ColorJitter(0.4, 0.4, 0.4, p=0.8),
            k.RandomAffine(15.0, shear=10.0, p=0.5),
            k.RandomErasing(scale=(0.02, 0.4), ratio=(0.3, 1 / 0.3), value=fill, p=0.25),
        ]
    return nn.Sequential(*parts)
