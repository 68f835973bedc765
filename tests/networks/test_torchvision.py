"""torchvision's networks: every layer on integers, with floats only at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxq
from fxq.integer.program import IntegerProgram
from fxq.integer.reference import Reference
from fxq.models_zoo import lookup

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("mobilenet_v2", 64),
        ("squeezenet1_1", 64),
        pytest.param("resnet50", 64, marks=slow),
        pytest.param("vgg16_bn", 224, marks=slow),
        pytest.param("inception_v3", 299, marks=slow),
        pytest.param("shufflenet_v2_x1_0", 64, marks=slow),
        pytest.param("resnext50_32x4d", 64, marks=slow),
        pytest.param("mnasnet1_0", 64, marks=slow),
    ],
)
def test_integers_from_end_to_end(name: str, size: int) -> None:
    model = lookup(f"torchvision/{name}").build()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    result = fxq.compile(model, x[:1], "minmax-int8", calibration=[x], engine="fbgemm", check=False)
    program = result.artifact.integers
    program.check()
    assert result.artifact.ledger.coverage() == 1.0
    assert result.artifact.warnings == []
    assert_floats_at_the_edges(program)
    output = result.module(x)
    assert output.shape == (2, 1000)
    if size == 64:
        assert torch.equal(output, Reference(program)(x))


def assert_floats_at_the_edges(program: IntegerProgram) -> None:
    """One quantize at the input; no dequantize before the last layer; no float code between."""
    ops = [step.op for step in program if not _is_size(step)]
    assert ops.count("quantize") == 1
    last = max(i for i, op in enumerate(ops) if op in ("conv", "linear"))
    inside = ops[ops.index("quantize") : last]
    assert not {"dequantize", "float", "module"} & set(inside)


def _is_size(step: Any) -> bool:
    """Whether a float instruction computes with sizes rather than values."""
    target = step.attributes.get("target", "")
    return step.op == "float" and target in (
        "method.size",
        "builtin.getattr",
        "operator.getitem",
        "operator.floordiv",
    )
