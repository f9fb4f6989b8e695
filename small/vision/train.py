"""Training of one Vision Transformer; the test accuracy after every epoch.

The paper names neither its transformer nor its settings (Kim et al. 2023, Appendix A.9.2). Epochs, batch, AdamW's
learning rate and weight decay, warm-up, cosine and smoothing are those with which Lee et al. (2021, "Vision Transformer
for Small-Size Datasets") trained a ViT of these sizes, as their public code has them; first weights, what decays and
augmentation are not. Stages:

    images on the device -> an epoch's order -> normalised and augmented batch -> AdamW, warm-up and cosine -> top-1
    accuracy on the test images -> checkpoint

Everything that is drawn in an epoch is a function of (seed, epoch), on one kind of device, whatever the activation. A
killed training goes on from its last epoch with the same command and, on a CPU with as many threads, ends with the
same bits.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llm.common.errors import UserError

from ..checks import below, refuse
from ..draws import seed_number
from ..folder import RECORD, TableFolder, copy_into, read_rows
from ..state import start_moments, training_state
from ..variants import Variant, enable_fast_parts
from .augmentation import AUGMENTATIONS, augmentation
from .datasets import Images
from .model import Sizes, VisionTransformer

PROGRAM, ROWS = "small.vision", "accuracy.csv"
PARTS = ("data", "sizes", "variant", "settings")
PRODUCTS = ("float32", "bfloat16")
TESTED = 1000  # images at once


@dataclass(frozen=True)
class Settings:
    """How one transformer is trained.

    Args:
        seed: of first weights, order, augmentation and dropout.
        epochs: over the training images; the images that do not fill a last batch are left out of an epoch.
        batch: images of a step.
        lr: of AdamW at its peak, betas 0.9 and 0.999.
        weight_decay: of matrices.
        warmup: epochs in which the learning rate rises to its peak; then it falls to 0 as a cosine.
        smoothing: of labels: share of the target that all classes have alike.
        augmentation: "none", "basic" or "strong", see there.
        products: "bfloat16" is autocast to it: weights, their updates and softmax stay float32.
    """

    seed: int = 0
    epochs: int = 100
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 10
    smoothing: float = 0.1
    augmentation: str = "strong"
    products: str = "float32"

    def __post_init__(self) -> None:
        problems = below(self, {"seed": 0, "epochs": 1, "batch": 1, "warmup": 0})
        if self.warmup >= self.epochs:
            problems.append(f"warmup {self.warmup} must be below epochs {self.epochs}")
        if not 0 < self.lr < math.inf:
            problems.append(f"lr {self.lr} must be a finite number above 0")
        if not 0 <= self.weight_decay < math.inf:
            problems.append(f"weight_decay {self.weight_decay} must be a finite number of at least 0")
        if not 0 <= self.smoothing < 1:
            problems.append(f"smoothing {self.smoothing} must be at least 0 and below 1")
        problems += [
            f"{name} {value!r} is unknown: give {', '.join(known)}"
            for name, value, known in (
                ("augmentation", self.augmentation, AUGMENTATIONS), ("dtype", self.products, PRODUCTS)
            )
            if value not in known
        ]  # fmt: skip
        refuse(problems)


def rate(step: int, warmup: int, steps: int) -> float:
    """Factor of the peak learning rate at `step` (from 0): a linear warm-up, then a cosine to 0 at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Row(NamedTuple):
    """What is known after an epoch."""

    epoch: int
    loss: float  # nats, the mean over the epoch's steps, with smoothed labels
    test_loss: float  # nats, without smoothing
    accuracy: float  # top-1, of the test images, 0 to 1


class Run:
    """One transformer with its images and optimizer.

    Args:
        images: of training and test.
        sizes, variant, settings: see there.
        device: "cpu" or "cuda".
    """

    def __init__(self, images: Images, sizes: Sizes, variant: Variant, settings: Settings, device: str = "cpu") -> None:
        self.steps = len(images.train.labels) // settings.batch  # of an epoch
        self.settings, self.device = settings, torch.device(device)
        self.train_images, self.test_images = (
            tuple(part.to(self.device) for part in split) for split in (images.train, images.test)
        )
        self.mean, self.deviation = (each.to(self.device) for each in images.statistics)
        self.augment = augmentation(settings.augmentation, images.side, fill=self.mean.mean().item())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._number("weights"))
            model = VisionTransformer(sizes, variant)
        self.model = model.to(self.device)
        enable_fast_parts(self.model)
        decayed = [weight for weight in self.model.parameters() if weight.ndim == 2]
        others = [weight for weight in self.model.parameters() if weight.ndim != 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
        start_moments(self.optimizer)
        self.right = torch.zeros(len(images.test.labels), dtype=torch.bool, device=self.device)  # when evaluated

    def _number(self, purpose: str, index: int = 0) -> int:
        """A seed for torch."""
        return seed_number(self.settings.seed, purpose, index)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that the training goes on from, and which test images were told right."""
        yield from training_state(self.model, self.optimizer)
        yield "test.right", self.right

    def order(self, epoch: int) -> Tensor:
        """Numbers of the images of each step, (steps, batch)."""
        generator = torch.Generator().manual_seed(self._number("order", epoch))
        drawn = torch.randperm(len(self.train_images[1]), generator=generator)
        return drawn[: self.steps * self.settings.batch].view(self.steps, -1).to(self.device)

    def train(self, epoch: int, bar: Any = None) -> float:
        """One epoch, numbered from 1; returns the mean loss. `bar` is told of every step.

        Raises:
            UserError: the loss is not finite.
        """
        pixels, labels = self.train_images
        self.model.train()
        losses = torch.zeros((), device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._number("epoch", epoch))
            for step, chosen in enumerate(self.order(epoch)):
                with torch.no_grad():
                    images = self.augment(pixels[chosen].float() / 255)
                losses += self._step((epoch - 1) * self.steps + step, images, labels[chosen])
                if bar is not None:
                    bar.update()
        loss = losses.item() / self.steps
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of epoch {epoch} is {loss}, so the training has diverged: give an lr below "
                f"{self.settings.lr:g}"
            )
        return loss

    def _step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """One gradient step, numbered from 0; returns its loss."""
        factor = rate(step, self.settings.warmup * self.steps, self.settings.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor
        logits = self._logits(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.smoothing)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _logits(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> logits in float32."""
        bf16 = self.settings.products == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            return self.model((images - self.mean) / self.deviation).float()

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss of the test images, and the share that is told right; `right` says which."""
        self.model.eval()
        losses, right = [], []
        for pixels, labels in zip(*(part.split(TESTED) for part in self.test_images), strict=True):
            logits = self._logits(pixels.float() / 255)
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            right.append(logits.argmax(-1) == labels)
        self.right.copy_(torch.cat(right))
        return torch.stack(losses).sum().item() / len(self.right), self.right.float().mean().item()


def folder_of(path: Path, images: Images, sizes: Sizes, variant: Variant, settings: Settings) -> TableFolder[Row]:
    """The folder of one run: accuracy.csv has a row for each epoch."""
    asked = {
        "data": images.record, "sizes": asdict(sizes), "variant": asdict(variant), "settings": asdict(settings)
    }  # fmt: skip
    return TableFolder(path, PROGRAM, asked, ROWS, Row)


def read_table(path: Path) -> list[Row]:
    """Every row of a run, in order; UserError where there is none yet, or the file is damaged."""
    return read_rows(path / ROWS, Row)


def read_right(path: Path, images: int) -> Tensor:
    """Which of the test images the run's last checkpoint told right, (images,) bool; UserError where it is damaged."""
    right = torch.empty(images, dtype=torch.bool)
    copy_into([("test.right", right)], path)
    return right


def check(path: Path, images: Images, sizes: Sizes, variant: Variant, settings: Settings) -> None:
    """UserError where these runs cannot be trained in the folder `path`, as far as that shows before."""
    _check_batch(images, settings)
    if (path / RECORD).is_file():
        with folder_of(path, images, sizes, variant, settings):
            pass


def _check_batch(images: Images, settings: Settings) -> None:
    if settings.batch > len(images.train.labels):
        raise UserError(f"batch {settings.batch} must be at most the {len(images.train.labels)} training images")


def train(
    path: Path,
    images: Images,
    sizes: Sizes,
    variant: Variant,
    settings: Settings,
    device: str = "cpu",
    command: str = "",
    quiet: bool = False,
) -> Sequence[Row]:
    """Train one transformer in the folder `path`, or go on with it; returns every row. `quiet` has no progress bar.

    Raises:
        UserError: the folder holds another run, is in use, or what it holds is damaged; there are fewer images than a
            batch has; the loss is not finite.
    """
    _check_batch(images, settings)
    with folder_of(path, images, sizes, variant, settings) as folder:
        if folder.done() == settings.epochs:
            return folder.read()
        run = Run(images, sizes, variant, settings, device)
        done = folder.restore(run.tensors())
        folder.begin(done, {"command": command, "device": device})
        with tqdm(
            total=settings.epochs * run.steps, initial=done * run.steps, desc=path.name, unit=" steps",
            dynamic_ncols=True, leave=False, disable=quiet,
        ) as bar:  # fmt: skip
            for epoch in range(done + 1, settings.epochs + 1):
                row = Row(epoch, run.train(epoch, bar), *run.evaluate())
                bar.set_postfix_str(f"epoch {epoch}: loss {row.loss:.3f}, test accuracy {row.accuracy:.1%}")
                folder.keep(row, epoch, run.tensors())
        return folder.rows
