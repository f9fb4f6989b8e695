"""Rows of the matrix: quantization, compilation, and programs that run without the model's Python."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .kinds import KINDS, ROWS, TOKENS, Load, row, tokens

ELSEWHERE = """
import sys, torch
for folder in sys.argv[1:]:
    ids = torch.load(f"{folder}/ids")
    with torch.no_grad():
        program = torch.export.load(f"{folder}/program.pt2").module()(ids)
        traced = torch.jit.load(f"{folder}/traced.pt")(ids)
    torch.save([program, traced], f"{folder}/found")
assert "transformers" not in sys.modules
"""


class Logits(nn.Module):
    """input_ids (B, T) -> logits (B, T, V), tensors alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(scope="session")
def program(loaded: dict[str, PreTrainedModel]) -> Callable[[str], torch.export.ExportedProgram]:
    """What torch.export makes of a kind of model; once for both of its uses."""

    @cache
    def exported(kind: str) -> torch.export.ExportedProgram:
        with torch.no_grad():
            return torch.export.export(Logits(deepcopy(loaded[kind])).eval(), (tokens(),), strict=False)

    return exported


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found[..., :TOKENS], expected[..., :TOKENS], rtol=1e-4, atol=1e-4)
    assert found.argmax(-1).max() < TOKENS


def check_quantized(model: PreTrainedModel, expected: Tensor, most: float) -> None:
    """Logits are off by less than `most` of their spread, and by something."""
    with torch.no_grad():
        found = model(tokens()).logits
    error = (found - expected)[..., :TOKENS].std() / expected[..., :TOKENS].std()
    assert 0 < error < most and found.argmax(-1).max() < TOKENS
    assert model.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 16)


@torch.no_grad()
@row("torchao: int8 weights")
def test_torchao(load: Load, kind: str, torchao: object) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(kind)
    expected = model(tokens()).logits
    quantize_(model, Int8WeightOnlyConfig())
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(type(layer.weight).__module__.startswith("torchao.") for layer in layers)
    check_quantized(model, expected, 0.05)


@torch.no_grad()
@row("torch: `quantize_dynamic`")
def test_quantize_dynamic(load: Load, kind: str) -> None:
    model = load(kind)
    expected = model(tokens()).logits
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert layers == sum(isinstance(m, torch.ao.nn.quantized.dynamic.Linear) for m in quantized.modules())
    check_quantized(quantized, expected, 0.3)  # activations have eight bits too


@torch.no_grad()
@row("`torch.compile(fullgraph=True)` with `attention_mask` and `position_ids`")
def test_a_graph_without_a_break(load: Load, kind: str) -> None:
    model, ids, mask = load(kind), tokens(), torch.ones(2, 12, dtype=torch.long)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for padding in (3, 0):
        mask[0, :padding] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        real = mask.bool()  # what comes out at padding is nobody's
        assert_close(compiled(ids, **inputs).logits[real], model(ids, **inputs).logits[real])


@torch.no_grad()
@row("ONNX: `torch.onnx.export(dynamo=True)` runs in onnxruntime")
def test_onnx(load: Load, program: Callable, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program(kind), (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    ids = tokens(seed=1)
    (found,) = session.run(None, {"input_ids": ids.numpy()})
    assert_close(torch.from_numpy(found), load(kind)(ids).logits)


ROWS["`torch.export` and `torch.jit.trace`: what they save runs in a process that has torch alone"] = (
    "test_saved_programs"
)


@torch.no_grad()
def test_saved_programs(load: Load, program: Callable, tmp_path: Path) -> None:
    """All kinds in one process, since importing torch takes longer than all of them."""
    ids, expected = tokens(seed=1), {}
    for kind in KINDS:
        model, folder = Logits(load(kind)).eval(), tmp_path / kind
        folder.mkdir()
        expected[kind] = model(ids)
        torch.export.save(program(kind), folder / "program.pt2")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(model, (tokens(),)), folder / "traced.pt")
        torch.save(ids, folder / "ids")
    command = [sys.executable, "-I", "-c", ELSEWHERE, *(str(tmp_path / kind) for kind in KINDS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        for found in torch.load(tmp_path / kind / "found"):
            assert_close(found, expected[kind])
