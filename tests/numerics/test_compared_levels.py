"""Levels by comparisons, as compilers take them, are levels by table."""

from __future__ import annotations

import pytest
import torch

from fxq.numerics.learned_clip import _compared, project
from fxq.numerics.levels import LevelSet, level_table, magnitudes


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [LevelSet.APOT, LevelSet.UNIFORM, LevelSet.POT])
@pytest.mark.parametrize("signed", [False, True])
def test_every_half_step_and_what_lies_between(kind: LevelSet, bits: int, signed: bool) -> None:
    levels = magnitudes(kind, bits)
    top = int(levels[-1])
    ends = torch.arange(-2 * top if signed else 0, 2 * top + 1, dtype=torch.float32)
    scaled = torch.cat((ends, ends[:-1] + 0.25, ends[:-1] + 0.999))
    table = level_table(levels, signed=signed)
    index = scaled.to(torch.int32).long() + (2 * top if signed else 0)
    found = _compared(scaled, tuple(levels.tolist()), 2 * top)
    assert torch.equal(found, table[index].float())


def test_what_is_no_number_stays_so() -> None:
    assert _compared(torch.tensor([9.0]), (0, 1, 2, 4), 8).isnan().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_projection_gives_the_same_values_and_gradients() -> None:
    levels = magnitudes(LevelSet.APOT, 3)
    table = level_table(levels, signed=True).float()

    def run(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return project(x, alpha, table, signed=True, levels=tuple(levels.tolist()))

    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * 3
    outcomes = []
    try:
        contenders = (run, torch.compile(run, fullgraph=True))
        for function in contenders:
            own, alpha = x.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
            y = function(own, alpha)
            y.square().sum().backward()
            outcomes.append((y.detach(), own.grad, alpha.grad))
    except RuntimeError as error:
        pytest.skip(f"no compiler works here: {str(error)[:80]}")
    (y, grad, to_alpha), (same, same_grad, near) = outcomes
    assert torch.equal(y, same)
    assert torch.equal(grad, same_grad)
    assert torch.allclose(to_alpha, near, rtol=1e-5)
