"""Training against a plain loop, resume after a kill, and what augmentation may do."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm.common.errors import UserError
from small.experiment.runs import read_rows
from small.variants import Variant
from small.vision import train as trainer
from small.vision.augmentation import augmentation
from small.vision.datasets import Images, Split
from small.vision.model import VisionTransformer
from small.vision.runs import Row, VisionSpec, read_right
from small.vision.settings import VisionSettings, VisionSizes
from small.vision.train import Run, train

from .files import pictures

SIZES = VisionSizes(side=16, classes=5, width=16, heads=2, neurons=24, layers=2, dropout=0.1)
SETTINGS = VisionSettings(epochs=3, batch=8, warmup=1, lr=3e-3)
ACT = Variant("nmda:10")


def images(train: int = 30, test: int = 12, side: int = 16) -> Images:
    splits = (
        Split(torch.from_numpy(pixels), torch.from_numpy(labels))
        for pixels, labels in (pictures(train, side, 0), pictures(test, side, 1))
    )
    return Images("cifar100", tuple("abcde"), *splits)


def asked(sizes: VisionSizes, variant: Variant, settings: VisionSettings, of: Images | None = None) -> VisionSpec:
    """The run of these images, without any those of `images()`."""
    return VisionSpec((of or images()).record, sizes, variant, settings)


def test_a_training_is_adamw_with_warm_up_and_cosine_on_smoothed_labels(monkeypatch) -> None:
    """Against a loop in plain torch: one optimizer per rule, the cosine and the smoothing written out."""
    data, settings = images(), replace(SETTINGS, augmentation="none", smoothing=0.2, weight_decay=0.3)
    sizes = replace(SIZES, dropout=0.0)
    run = Run(data, asked(sizes, ACT, settings))
    model = VisionTransformer(sizes, ACT)
    model.load_state_dict(run.model.state_dict())
    orders = [run.order(epoch) for epoch in (1, 2, 3)]
    losses = [run.train(epoch) for epoch in (1, 2, 3)]

    x = data.train.pixels.double() / 255
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)
    matrices = torch.optim.AdamW([p for p in model.parameters() if p.ndim == 2], betas=(0.9, 0.999), weight_decay=0.3)
    others = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], betas=(0.9, 0.999), weight_decay=0.0)
    steps, step = 30 // 8, 0
    for epoch, order in enumerate(orders):
        mean = 0.0
        for chosen in order:
            progress = (step - steps) / (2 * steps)
            lr = 3e-3 * ((step + 1) / steps if step < steps else (1 + math.cos(math.pi * progress)) / 2)
            targets = 0.2 / 5 + 0.8 * F.one_hot(data.train.labels[chosen], 5)
            loss = -(targets * model(x[chosen].float()).log_softmax(-1)).sum(-1).mean()
            loss.backward()
            for optimizer in (matrices, others):
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            mean, step = mean + loss.item() / steps, step + 1
        assert losses[epoch] == pytest.approx(mean, rel=1e-4)
    for (name, ours), plain in zip(run.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4, msg=name)
    monkeypatch.setattr(trainer, "TESTED", 5)
    loss, accuracy = run.evaluate()
    t = (data.test.pixels.double() / 255 - (data.train.pixels / 255).double().mean((0, 2, 3))[:, None, None]) / (
        (data.train.pixels / 255).double().std((0, 2, 3), correction=0)[:, None, None]
    )
    logits = model(t.float())
    assert loss == pytest.approx(F.cross_entropy(logits, data.test.labels).item(), rel=1e-3)
    told_right = logits.argmax(-1) == data.test.labels
    assert accuracy == pytest.approx(told_right.float().mean().item(), abs=1e-6)
    assert torch.equal(run.right, told_right) and 0 < told_right.sum() < 12


def test_an_epoch_shows_every_image_at_most_once_in_an_order_of_its_own() -> None:
    run, other = Run(images(), asked(SIZES, ACT, SETTINGS)), Run(images(), asked(SIZES, Variant("gelu"), SETTINGS))
    first, second = run.order(1), run.order(2)
    assert first.shape == (3, 8) and len(first.unique()) == 24 and not torch.equal(first, second)
    assert torch.equal(first, other.order(1))
    another = Run(images(), asked(SIZES, ACT, replace(SETTINGS, seed=1)))
    assert not torch.equal(first, another.order(1))
    assert not torch.equal(run.model.patches.weight, another.model.patches.weight)
    for (name, left), (_, right) in zip(run.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_model_learns_what_can_be_learned(tmp_path: Path) -> None:
    rows = train(
        tmp_path / "run",
        images(400, 100),
        asked(SIZES, ACT, replace(SETTINGS, epochs=12, augmentation="none")),
        quiet=True,
    )
    assert rows[-1].accuracy > 0.9 and rows[-1].loss < rows[0].loss
    right = read_right(tmp_path / "run", 100)
    assert right.float().mean().item() == pytest.approx(rows[-1].accuracy)


def test_first_weights_leave_the_generator_of_others_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Run(images(), asked(SIZES, ACT, SETTINGS)).train(1)
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_products_learn_the_same() -> None:
    exact, rounded = (Run(images(), asked(SIZES, ACT, replace(SETTINGS, products=p))) for p in ("float32", "bfloat16"))
    first, second = exact.train(1), rounded.train(1)
    assert first != second and first == pytest.approx(second, rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in rounded.model.parameters())


# ---- Augmentation ----------------------------------------------------------------------------------------------------


def crops(image: torch.Tensor, original: torch.Tensor) -> list[tuple[int, int, bool]]:
    """Which crops of the padded original, mirrored or not, the image is."""
    side = original.shape[-1]
    wide = F.pad(original, (4, 4, 4, 4))
    return [
        (y, x, flip)
        for y in range(9)
        for x in range(9)
        for flip in (False, True)
        if torch.allclose(image.flip(-1) if flip else image, wide[:, y : y + side, x : x + side], atol=1e-5)
    ]


def test_basic_augmentation_crops_a_padded_image_and_mirrors_half() -> None:
    torch.manual_seed(0)
    originals = torch.rand(500, 3, 16, 16)
    found = [crops(*both) for both in zip(augmentation("basic", 16, 0.5)(originals), originals, strict=True)]
    assert all(len(each) == 1 for each in found)
    assert len({each[0][:2] for each in found}) == 81 and 200 < sum(each[0][2] for each in found) < 300


def test_strong_augmentation_changes_colours_turns_and_paints_over_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    strong = augmentation("strong", 16, fill=0.3)
    grey = torch.full((2000, 3, 16, 16), 0.5)
    middle = strong[2](grey)[:, 0, 8, 8]  # brightness, contrast and saturation of a grey image: one factor
    assert 0.17 < (middle == 0.5).float().mean() < 0.23 and 0.29 < middle.min() < 0.32 and 0.68 < middle.max() < 0.71
    edges = torch.zeros(2000, 3, 16, 16)
    edges[..., 8] = 1
    turned = (strong[3](edges)[:, 0, 0, 8] < 0.99).float().mean()
    assert 0.4 < turned < 0.55
    painted = (strong[4](torch.zeros(2000, 3, 16, 16)) == 0.3).float().mean((1, 2, 3))
    assert 0.2 < (painted > 0).float().mean() < 0.3 and painted.max() < 0.5
    every = strong(torch.rand(500, 3, 16, 16))
    assert every.shape == (500, 3, 16, 16) and every.min() >= 0 and every.max() <= 1


def test_a_training_paints_over_with_the_images_mean() -> None:
    data = images()
    painted = Run(data, asked(SIZES, ACT, SETTINGS)).augment[4](torch.zeros(200, 3, 16, 16))
    mean = (data.train.pixels / 255).mean().item()
    assert painted.max().item() == pytest.approx(mean, rel=1e-4)


def test_augmentation_is_of_the_generator_alone_and_none_is_none() -> None:
    strong, originals = augmentation("strong", 16, 0.5), torch.rand(32, 3, 16, 16)

    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return strong(originals)

    assert torch.equal(seeded(1), seeded(1)) and not torch.equal(seeded(1), seeded(2))
    assert torch.equal(augmentation("none", 16, 0.5)(originals), originals)


def test_a_training_sees_augmented_images_others_in_each_epoch_and_of_each_seed(monkeypatch) -> None:
    data = images()

    def seen(seed: int, epoch: int, act: Variant = ACT) -> torch.Tensor:
        run = Run(data, asked(SIZES, act, replace(SETTINGS, seed=seed, augmentation="basic")))
        found: list[torch.Tensor] = []
        monkeypatch.setattr(run, "_step", lambda _, batch, labels: found.append(batch) or torch.zeros(()))
        run.train(epoch)
        for image, number in zip(torch.cat(found), run.order(epoch).flatten(), strict=True):
            assert crops(image, data.train.pixels[number] / 255)
        return torch.cat(found)[run.order(epoch).flatten().argsort()][:20]

    assert torch.equal(seen(0, 1), seen(0, 1)) and torch.equal(seen(0, 1), seen(0, 1, Variant("gelu")))
    assert not torch.equal(seen(0, 1), seen(0, 2)) and not torch.equal(seen(0, 1), seen(1, 1))


# ---- Folder ----------------------------------------------------------------------------------------------------------


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("accuracy.csv", "checkpoint.safetensors")}


def test_a_killed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings, killed = replace(SETTINGS, epochs=5), tmp_path / "killed"
    train(tmp_path / "whole", images(), asked(SIZES, ACT, settings), quiet=True)
    ask = (
        "import sys, time; from pathlib import Path\n"
        "from tests.small.vision.test_train import *\n"
        "from small.experiment.runs import TableFolder\n"
        "keep = TableFolder.keep\n"
        "def slow(self, row, epoch, tensors):\n"
        "    keep(self, row, epoch, tensors); print(epoch, flush=True); time.sleep(0.3)\n"
        "TableFolder.keep = slow\n"
        f"train(Path(sys.argv[1]), images(), asked(SIZES, ACT, {settings!r}), quiet=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", ask, str(killed)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 2:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [row.epoch for row in read_rows(killed / "accuracy.csv", Row)] == [1, 2]
    rows = train(killed, images(), asked(SIZES, ACT, settings), quiet=True)
    assert results(killed) == results(tmp_path / "whole") and [row.epoch for row in rows] == [1, 2, 3, 4, 5]
    attempts = json.loads((killed / "run.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, 2]
    kept = results(killed)
    assert train(killed, images(), asked(SIZES, ACT, settings), quiet=True) == rows
    assert results(killed) == kept and json.loads((killed / "run.json").read_text())["attempts"] == attempts


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"of": images(test=13)}, "data.test"),
        ({"of": replace(images(), train=Split(images().train.pixels + 1, images().train.labels))}, "data.crc32"),
        ({"sizes": replace(SIZES, neurons=8)}, "sizes.neurons"),
        ({"variant": Variant("gelu")}, "variant.act"),
        ({"settings": replace(SETTINGS, epochs=4)}, "settings.epochs"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(other: dict, sentence: str, tmp_path: Path) -> None:
    same = {"of": images(), "sizes": SIZES, "variant": ACT, "settings": SETTINGS}
    train(tmp_path / "run", images(), asked(**same), quiet=True)
    before = results(tmp_path / "run")
    with pytest.raises(UserError, match=rf"different settings \({sentence}"):
        train(tmp_path / "run", (same | other)["of"], asked(**(same | other)), quiet=True)
    assert results(tmp_path / "run") == before


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(tmp_path / "run", images(), asked(SIZES, ACT, SETTINGS), quiet=True)
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        train(tmp_path / "run", images(), asked(SIZES, ACT, SETTINGS), quiet=True)


def test_a_diverged_training_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss of epoch 1 is nan.*give an lr below"):
        train(tmp_path / "run", images(), asked(SIZES, ACT, replace(SETTINGS, lr=1e30)), quiet=True)
    with pytest.raises(UserError, match=r"has no rows|cannot be read"):
        read_rows(tmp_path / "run" / "accuracy.csv", Row)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"warmup": 100}, "warmup 100 must be below epochs 100"),
        ({"weight_decay": math.nan}, "weight-decay nan must be a finite number of at least 0"),
        ({"lr": 0.0, "smoothing": 1.0}, "lr 0.0 must be a finite number above 0; smoothing 1.0"),
        ({"augmentation": "mixup"}, "augmentation 'mixup' is unknown: give none, basic or strong"),
        ({"products": "float16"}, "dtype 'float16' is unknown"),
        ({"epochs": 0}, "epochs 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        VisionSettings(**changes)


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch 31 must be at most the 30 training images"):
        train(tmp_path / "run", images(), asked(SIZES, ACT, replace(SETTINGS, batch=31)))
    assert not (tmp_path / "run").exists()
    assert Row._fields == ("epoch", "loss", "test_loss", "accuracy")
