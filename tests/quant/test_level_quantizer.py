"""Activations on sets of integer levels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import SpecError
from fxq.quant.quantizers import LevelQuantizer

APOT = torch.tensor([0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48])


def quantizer(scale: float = 0.25, levels: Tensor = APOT, **options: Any) -> LevelQuantizer:
    return LevelQuantizer(torch.tensor(scale), levels, **{"signed": False, "bits": 4, **options})


@given(
    st.lists(st.integers(1, 63), min_size=1, max_size=20, unique=True),
    st.booleans(),
    st.lists(st.integers(-300, 300), min_size=1, max_size=30),
)
def test_values_are_the_nearest(levels: list[int], signed: bool, quarters: list[int]) -> None:
    """By brute force, over multiples of a quarter of a level."""
    magnitudes = sorted({0, *levels})
    values = torch.tensor(quarters) / 4
    found = quantizer(1.0, torch.tensor(magnitudes), signed=signed, bits=8)(values)
    allowed = [*([-one for one in magnitudes] if signed else []), *magnitudes]
    for value, level in zip(values.tolist(), found.tolist(), strict=True):
        nearest = min(abs(value - one) for one in allowed)
        ties = [one for one in allowed if abs(value - one) == nearest]
        assert level == max(ties, key=abs)


def test_codes_fit_the_bits_it_says() -> None:
    plain, signed = quantizer(), quantizer(signed=True)
    assert (plain.zero_point, plain.grid_bits) == (0, 6)
    assert (signed.zero_point, signed.grid_bits) == (48, 7)
    assert quantizer(levels=torch.tensor([0, 127])).grid_bits == 7
    assert quantizer(levels=torch.tensor([0, 1]), signed=True, bits=2).grid_bits == 2
    assert not plain.per_channel


def test_it_is_described() -> None:
    assert quantizer().describe() == "4-bit 16 levels to 48 scale 0.25"
    assert "31 levels to +-48" in repr(quantizer(signed=True))


def test_it_is_a_module() -> None:
    module = quantizer()
    other = quantizer(0.5)
    other.load_state_dict(module.state_dict())
    x = torch.randn(50) * 10
    assert torch.equal(copy.deepcopy(other)(x), module(x))
    assert module(x.double()).dtype is torch.float64


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scale": 0.0}, "positive and finite"),
        ({"scale": -1.0}, "positive and finite"),
        ({"scale": float("nan")}, "positive and finite"),
        ({"scale": [0.1, 0.2]}, "one number"),
        ({"bits": 0}, "bits must be 1 to 8"),
        ({"levels": APOT.float()}, "are no levels"),
        ({"levels": APOT.reshape(4, 4)}, "are no levels"),
        ({"levels": torch.tensor([0])}, "are no levels"),
        ({"levels": torch.tensor([1, 2])}, "ascend from 0"),
        ({"levels": torch.tensor([0, 2, 2])}, "ascend from 0"),
        ({"levels": torch.tensor([0, 128])}, "levels of activations go to 127"),
        ({"levels": torch.tensor([0, 64]), "signed": True}, "signed levels .* go to 63"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        quantizer(**options)


def test_any_layout_is_rounded_without_a_warning() -> None:
    x = torch.randn(2, 3, 4, 5) * 10
    assert torch.equal(quantizer()(x.contiguous(memory_format=torch.channels_last)), quantizer()(x))
