"""Contracts: what counts as the same numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fxq.contracts import Contract, check_contract, output_sqnr, relative_error, tensors_of
from fxq.errors import ContractError

ONE = torch.tensor([1.0, -2.0])
NAN, INF = torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])


def test_tensors_are_found_wherever_they_are() -> None:
    nested = {"a": ONE, "b": [ONE, (ONE, 3, None)], "c": torch.tensor([1])}
    assert len(list(tensors_of(nested))) == 3
    assert list(tensors_of(None)) == []


@pytest.mark.parametrize(
    ("reference", "actual", "error"),
    [
        (ONE, ONE.clone(), 0.0),
        (ONE, ONE + 0.02, 0.01),
        ((ONE, 10 * ONE), (ONE + 0.2, 10 * ONE), 0.01),
        (ONE, torch.ones(3), math.inf),
        (ONE, NAN, math.inf),
        (ONE, INF, math.inf),
        (NAN, NAN.clone(), 0.0),
        (INF, INF.clone(), 0.0),
        (INF, -INF, math.inf),
        (INF, torch.tensor([1.5, math.inf]), 0.5),
        (torch.zeros(2), torch.zeros(2), 0.0),
        (torch.zeros(2), ONE, math.inf),
        (torch.zeros(0), torch.zeros(0), 0.0),
        ([], [], 0.0),
    ],
)
def test_relative_error(reference: Any, actual: Any, error: float) -> None:
    assert relative_error(reference, actual) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("reference", "actual", "ratio"),
    [
        (ONE, ONE.clone(), math.inf),
        (ONE, 1.1 * ONE, 20.0),
        (ONE, NAN, -math.inf),
        (ONE, INF, -math.inf),
        (NAN, NAN.clone(), math.inf),
        (torch.zeros(2), ONE, -math.inf),
        (torch.zeros(2), torch.zeros(2), math.inf),
    ],
)
def test_output_sqnr(reference: Any, actual: Any, ratio: float) -> None:
    assert output_sqnr(reference, actual) == pytest.approx(ratio, abs=0.01)


def test_other_outputs_are_a_broken_contract() -> None:
    for measure in (relative_error, output_sqnr):
        with pytest.raises(ContractError, match="the output had 1 tensors and has 2"):
            measure(ONE, (ONE, ONE))


@pytest.mark.parametrize(
    ("contract", "factor", "kept"),
    [
        (Contract.SAME_NUMBERS, 1 + 5e-5, True),
        (Contract.SAME_NUMBERS, 1 + 5e-4, False),
        (Contract.ANNOTATES_ONLY, 1.0, True),
        (Contract.ANNOTATES_ONLY, 1 + 1e-6, False),
        (Contract.OBSERVES_ONLY, 1.0, True),
        (Contract.OBSERVES_ONLY, 1 + 1e-6, False),
        (Contract.CHANGES_NUMBERS, 3.0, True),
    ],
)
def test_promises(contract: Contract, factor: float, kept: bool) -> None:
    if kept:
        check_contract("mine", contract, ONE, ONE * factor)
        return
    with pytest.raises(ContractError, match=f"mine promised {contract.value} but moved") as caught:
        check_contract("mine", contract, ONE, ONE * factor)
    assert caught.value.where == "mine"


def test_narrow_dtypes_may_round() -> None:
    for dtype, moved, allowed in [
        (torch.bfloat16, 0.03, True),
        (torch.bfloat16, 0.2, False),
        (torch.float16, 0.004, True),
        (torch.float16, 0.1, False),
        (torch.float64, 0.001, False),
    ]:
        before, after = ONE.to(dtype), (ONE * (1 + moved)).to(dtype)
        if allowed:
            check_contract("mine", Contract.SAME_NUMBERS, before, after)
        else:
            with pytest.raises(ContractError):
                check_contract("mine", Contract.SAME_NUMBERS, before, after)
