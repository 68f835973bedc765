"""Which layers are proven exact on kernels that sum pairs of products in 16 bits."""

from __future__ import annotations

import itertools

import pytest
import torch

import fxq
from fxq.integer.saturation import is_depthwise, unproven
from fxq.models_zoo import tiny_depthwise, tiny_residual

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def saturates(weight: torch.Tensor, top: int, *, depthwise: bool) -> bool:
    """Brute force: whether some two codes make the sum of some two products leave int16."""
    taps = weight.flatten(1).int()
    for row in taps:
        pairs = (
            zip(row[::2], row[1::2], strict=False) if depthwise else itertools.combinations(row, 2)
        )
        for one, two in pairs:
            largest = int(one.clamp(min=0) + two.clamp(min=0)) * top
            smallest = int(one.clamp(max=0) + two.clamp(max=0)) * top
            if largest > 32767 or smallest < -32767:
                return True
    return False


@pytest.mark.parametrize("factory", [tiny_residual, tiny_depthwise])
@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-4bit"])
def test_what_is_unproven_is_what_can_saturate(factory: object, recipe: str) -> None:
    result = fxq.compile(factory(), X, recipe, calibration=[X])  # type: ignore[operator]
    program = result.artifact.integers
    grids = program.grids()
    wanted = set()
    for step in program:
        if step.op in ("conv", "linear"):
            source = grids[step.inputs[0]]
            assert source is not None
            depthwise = is_depthwise(program, step)
            top = 255 if depthwise else source.top
            if saturates(program.tensor(step, "weight"), top, depthwise=depthwise):
                wanted.add(step.name)
    assert set(unproven(program)) == wanted
    assert wanted if recipe == "minmax-int8" else True


def test_seven_bits_are_proven() -> None:
    bits = ["layer:*.weight_bits=7"]
    result = fxq.compile(tiny_residual(), X, "minmax-int8", calibration=[X], settings=bits)
    assert result.artifact.unproven == {}


def test_the_artifact_records_it(tmp_path: object) -> None:
    result = fxq.compile(tiny_residual(), X, "minmax-int8", calibration=[X])
    folder = result.artifact.save(tmp_path / "run")  # type: ignore[operator]
    loaded = fxq.load(folder)
    assert loaded.metadata["unproven"] == result.artifact.unproven
    assert all("weight_bits = 7" in why for why in loaded.unproven.values())
