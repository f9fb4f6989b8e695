"""Training of one Vision Transformer; the test accuracy after every epoch.

Where the settings are from is in `settings`; initial weights, what decays and augmentation are ours. Stages:

    images on the device -> an epoch's order -> normalised and augmented batch -> AdamW, warm-up and cosine -> top-1
    accuracy on the test images -> checkpoint

Everything that is drawn in an epoch is a function of (seed, epoch), on one kind of device, whatever the activation. A
killed training resumes from its last epoch with the same command and, on a CPU with as many threads, ends with the
same bits.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.common.errors import UserError

from ..draws import seed_number
from ..experiment.runs import RECORD, start_moments, training_state
from ..variants import enable_fast_parts
from .augmentation import augmentation
from .datasets import Images
from .model import VisionTransformer
from .runs import Row, VisionSpec, folder_of

TESTED = 1000  # images at once


def rate(step: int, warmup: int, steps: int) -> float:
    """Return the factor of the peak learning rate at `step` (from 0): linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Run:
    """One transformer with its images and optimizer.

    Args:
        images: of training and test.
        spec: sizes, variant and settings.
        device: "cpu" or "cuda".
    """

    def __init__(self, images: Images, spec: VisionSpec, device: str = "cpu") -> None:
        settings = spec.settings
        self.steps = len(images.train.labels) // settings.batch  # of an epoch
        self.settings, self.device = settings, torch.device(device)
        self.train_images, self.test_images = (
            tuple(part.to(self.device) for part in split) for split in (images.train, images.test)
        )
        self.mean, self.deviation = (each.to(self.device) for each in images.statistics)
        self.augment = augmentation(settings.augmentation, images.side, fill=self.mean.mean().item())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._number("weights"))
            model = VisionTransformer(spec.sizes, spec.variant)
        self.model = model.to(self.device)
        enable_fast_parts(self.model)
        decayed = [weight for weight in self.model.parameters() if weight.ndim == 2]
        others = [weight for weight in self.model.parameters() if weight.ndim != 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
        start_moments(self.optimizer)
        self.right = torch.zeros(len(images.test.labels), dtype=torch.bool, device=self.device)  # when evaluated

    def _number(self, purpose: str, index: int = 0) -> int:
        """Return a seed for torch."""
        return seed_number(self.settings.seed, purpose, index)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all that the training resumes from, and which test images were classified correctly."""
        yield from training_state(self.model, self.optimizer)
        yield "test.right", self.right

    def order(self, epoch: int) -> Tensor:
        """Numbers of the images of each step, (steps, batch)."""
        generator = torch.Generator().manual_seed(self._number("order", epoch))
        drawn = torch.randperm(len(self.train_images[1]), generator=generator)
        return drawn[: self.steps * self.settings.batch].view(self.steps, -1).to(self.device)

    def train(self, epoch: int, bar: Any = None) -> float:
        """Train one epoch, numbered from 1, and return the mean loss. Each step advances `bar`.

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
        """Make one gradient step, numbered from 0, and return its loss."""
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
        """Return the mean loss of the test images, and the accuracy; `right` says which are correct."""
        self.model.eval()
        losses, right = [], []
        for pixels, labels in zip(*(part.split(TESTED) for part in self.test_images), strict=True):
            logits = self._logits(pixels.float() / 255)
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            right.append(logits.argmax(-1) == labels)
        self.right.copy_(torch.cat(right))
        return torch.stack(losses).sum().item() / len(self.right), self.right.float().mean().item()


def check(path: Path, images: Images, spec: VisionSpec) -> None:
    """Raise UserError if this run cannot be trained in the folder `path`, as far as that shows before."""
    _check_batch(images, spec)
    if (path / RECORD).is_file():
        with folder_of(path, spec):
            pass


def _check_batch(images: Images, spec: VisionSpec) -> None:
    if spec.settings.batch > len(images.train.labels):
        raise UserError(f"batch {spec.settings.batch} must be at most the {len(images.train.labels)} training images")


def train(
    path: Path, images: Images, spec: VisionSpec, device: str = "cpu", command: str = "", quiet: bool = False
) -> Sequence[Row]:
    """Train one transformer in the folder `path`, or resume it; returns every row. `quiet` has no progress bar.

    Raises:
        UserError: the folder holds another run, is in use, or what it holds is damaged; there are fewer images than a
            batch has; the loss is not finite.
    """
    _check_batch(images, spec)
    epochs = spec.settings.epochs
    with folder_of(path, spec) as folder:
        if folder.done() == epochs:
            return folder.read()
        run = Run(images, spec, device)
        with folder.resumed(run.tensors(), command, device, epochs, "steps", quiet, run.steps) as (done, bar):
            for epoch in range(done + 1, epochs + 1):
                row = Row(epoch, run.train(epoch, bar), *run.evaluate())
                bar.set_postfix_str(f"epoch {epoch}: loss {row.loss:.3f}, test accuracy {row.accuracy:.1%}")
                folder.keep(row, epoch, run.tensors())
        return folder.rows
