"""The Vision Transformer against transformers' ViT, and its streams against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from llm.common.errors import UserError
from llm.model.fast_paths import enable_fast_paths
from small.variants import Variant
from small.vision.model import EPS, VisionTransformer
from small.vision.settings import VisionSizes

SIZES = VisionSizes(side=16, classes=7, patch=4, width=24, heads=3, neurons=40, layers=3)


def theirs(ours: VisionTransformer, sizes: VisionSizes, act: str) -> ViTForImageClassification:
    """transformers' model with the weights of ours."""
    config = ViTConfig(
        image_size=sizes.side, patch_size=sizes.patch_side, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=sizes.neurons, hidden_act=act, layer_norm_eps=EPS,
        num_labels=sizes.classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    names = {
        "vit.embeddings.cls_token": "class_token", "vit.embeddings.position_embeddings": "positions",
        "vit.embeddings.patch_embeddings.projection": "patches", "vit.layernorm": "norm", "classifier": "read_out",
    }  # fmt: skip
    parts = {
        "layernorm_before": "attention_norm", "layernorm_after": "feedforward_norm",
        "attention.q_proj": "attention.q_proj", "attention.k_proj": "attention.k_proj",
        "attention.v_proj": "attention.v_proj", "attention.o_proj": "attention.o_proj",
        "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "feedforward.up_proj", "output.dense": "feedforward.down_proj",
        "mlp.fc1": "feedforward.up_proj", "mlp.fc2": "feedforward.down_proj",
    }  # fmt: skip
    own = dict(ours.named_parameters())
    taken = set()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            owner, _, kind = name.rpartition(".")
            if name in names:
                mine = names[name]
            elif owner in names:
                mine = f"{names[owner]}.{kind}"
            else:
                layer, part = owner.split("layer", 1)[1].lstrip("s").lstrip(".").split(".", 1)
                mine = f"blocks.{layer}.{parts[part]}.{kind}"
            weight.copy_(own[mine].view(weight.shape))
            taken.add(mine)
    assert taken == own.keys()
    return model


def scattered(sizes: VisionSizes, variant: Variant) -> VisionTransformer:
    """Every weight is drawn, so that none hides behind a zero or a one."""
    torch.manual_seed(0)
    model = VisionTransformer(sizes, variant).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * sizes.width**-0.5)
    return model


@pytest.mark.parametrize("act", ["gelu", "relu", "nmda:1"])
@pytest.mark.parametrize("sizes", [SIZES, VisionSizes(layers=2), VisionSizes(side=64, classes=200, layers=2)])
def test_logits_and_gradients_equal_those_of_transformers(sizes: VisionSizes, act: str) -> None:
    ours = scattered(sizes, Variant(act))
    model = theirs(ours, sizes, {"nmda:1": "silu"}.get(act, act))
    images = torch.randn(4, 3, sizes.side, sizes.side)
    mine, other = ours(images), model(images).logits
    assert mine.shape == (4, sizes.classes)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for logits in (mine, other):
        F.cross_entropy(logits, torch.arange(4)).backward()
    for ours_at, theirs_at in (
        (ours.patches.weight, model.vit.embeddings.patch_embeddings.projection.weight),
        (ours.positions, model.vit.embeddings.position_embeddings),
        (ours.read_out.weight, model.classifier.weight),
    ):
        assert ours_at.grad is not None and theirs_at.grad is not None and ours_at.grad.abs().max() > 0
        torch.testing.assert_close(ours_at.grad, theirs_at.grad.view(ours_at.shape), rtol=1e-4, atol=1e-6)


def plain(
    model: VisionTransformer, images: Tensor, sizes: VisionSizes, alpha: float, streams: tuple[str, ...]
) -> Tensor:
    """The transformer with NMDA and streams of the layer before, written out image by image and head by head."""
    answers = []
    for image in images:
        rows = image.split(sizes.patch_side, dim=1)
        squares = [square.flatten() for row in rows for square in row.split(sizes.patch_side, dim=2)]
        tokens = [model.class_token[0, 0], *(model.patches(square) for square in squares)]
        x = torch.stack(tokens) + model.positions[0]
        before: dict[str, Tensor] = {}
        for block in model.blocks:
            z = block.attention_norm(x)
            own = {name: getattr(block.attention, f"{name[0]}_proj")(z) for name in ("queries", "keys", "values")}
            q, k, v = (own[name] + (before.get(name, 0) if name in streams else 0) for name in own)
            before = own
            heads = []
            for head in range(sizes.heads):
                of = slice(head * sizes.width // sizes.heads, (head + 1) * sizes.width // sizes.heads)
                scores = q[:, of] @ k[:, of].T / (sizes.width / sizes.heads) ** 0.5
                heads.append(scores.softmax(-1) @ v[:, of])
            x = x + block.attention.o_proj(torch.cat(heads, 1))
            inner = block.feedforward.up_proj(block.feedforward_norm(x))
            x = x + block.feedforward.down_proj(inner / (1 + alpha * torch.exp(-inner)))
        answers.append(model.read_out(model.norm(x)[0]))
    return torch.stack(answers)


@pytest.mark.parametrize("streams", [(), ("values",), ("queries", "keys", "values")])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 10.0])
def test_logits_equal_a_plain_transformer_with_nmda_and_streams(alpha: float, streams: tuple[str, ...]) -> None:
    model = scattered(SIZES, Variant(f"nmda:{alpha}", streams))
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(images), plain(model, images, SIZES, alpha, streams), rtol=1e-4, atol=1e-5)


def test_bfloat16_looks_both_ways_too() -> None:
    """The class token comes first: with a causal mask it would see no patch."""
    model, images = scattered(SIZES, Variant()).eval(), torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = model(images).float()
        enable_fast_paths(model, ["attention"])
        half = model(images).float()
    enable_fast_paths(model, ())
    with torch.no_grad():
        exact = model(images)
    assert (half - plain).abs().max() < 0.02 * exact.abs().max()
    assert (half - exact).abs().max() < 0.05 * exact.abs().max() < (half[0] - half[1]).abs().max()


def test_every_patch_reaches_every_other() -> None:
    """No causal mask: a change of the last patch reaches the class token, and one of any patch all others."""
    model = scattered(SIZES, Variant("gelu"))
    images = torch.randn(1, 3, 16, 16)
    changed = images.clone()
    changed[..., 12:, 12:] += 1
    assert (model(images) - model(changed)).abs().max() > 1e-3


def test_dropout_is_of_training_alone() -> None:
    model = scattered(VisionSizes(side=16, width=24, heads=3, neurons=40, layers=1, dropout=0.5), Variant("gelu"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch": 5}, "patch 5 must divide the images' side of 32 pixels"),
        ({"heads": 5}, "width 192 must be a multiple of heads 5"),
        ({"layers": 0, "width": 0}, "width 0 must be at least 1; layers 0 must be at least 1"),
        ({"classes": 1}, "classes 1 must be at least 2"),
        ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and below 1"),
    ],
)
def test_sizes_that_cannot_be(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        VisionSizes(**changes)
    assert (
        VisionSizes().patch_side == 4
        and VisionSizes(side=64).patch_side == 8
        and VisionSizes().tokens == VisionSizes(side=64).tokens == 65
    )
