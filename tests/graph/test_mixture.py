"""Two versions of a network, mixed: the ends are the versions, and blame falls where it belongs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fxq.graph.mixture import Mixture, counterparts
from fxq.models_zoo import tiny_concat, tiny_depthwise, tiny_residual
from fxq.passes import Calibrate, FoldBatchNorm, InsertObservers, MarkRelu, QuantizeMinmax

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FOLDED = [FoldBatchNorm(), MarkRelu()]
QUANTIZED = [*FOLDED, InsertObservers(), Calibrate(), QuantizeMinmax(weight_bits=4)]


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture
def versions(run_passes: Any) -> Any:
    """Call it as ``versions(network, passes)``: the captured graph module, and that after them."""

    def make(network: nn.Module, passes: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        ran = [run_passes(some, network, IMAGES[:1], calibration=[IMAGES]) for some in ([], passes)]
        return ran[0].program.module, ran[1].program.module

    return make


@pytest.mark.parametrize("build", [tiny_residual, tiny_depthwise, tiny_concat])
def test_the_ends_are_the_two_versions(build: Any, versions: Any) -> None:
    before, after = versions(build().eval(), QUANTIZED)
    mixture = Mixture(before, after)
    with torch.no_grad():
        torch.testing.assert_close(mixture(IMAGES), after(IMAGES), rtol=0, atol=0)
        mixture.kept = set()
        torch.testing.assert_close(mixture(IMAGES), before(IMAGES))


def test_what_nodes_stand_for(versions: Any) -> None:
    before, after = versions(tiny_residual().eval(), QUANTIZED)
    found = {a.name: b.name for a, b in counterparts(before.graph, after.graph).items()}
    assert found["stem"] == "stem_bn"  # it was folded in
    quantizers = [node for node in after.graph.nodes if node.name not in before_names(before)]
    assert quantizers
    assert all(node.name in found for node in quantizers)


def before_names(module: Any) -> set[str]:
    return {node.name for node in module.graph.nodes}


def test_one_changed_node_is_the_only_one_blamed(versions: Any) -> None:
    _, after = versions(tiny_residual().eval(), FOLDED)
    earlier = copy.deepcopy(after)
    after.get_submodule("conv1").weight.data[0] *= 2
    mixture = Mixture(earlier, after)
    moved = mixture.introduced(IMAGES)
    assert list(moved) == ["conv1"]
    assert moved["conv1"] > 1e-3
    mixture.kept = {"conv1"}
    with torch.no_grad():
        torch.testing.assert_close(mixture(IMAGES), after(IMAGES), rtol=0, atol=0)
        mixture.kept = {"conv2"}
        torch.testing.assert_close(mixture(IMAGES), earlier(IMAGES), rtol=0, atol=0)


def test_a_fold_moves_nothing_but_roundings(versions: Any) -> None:
    mixture = Mixture(*versions(tiny_residual().eval(), FOLDED))
    assert max(mixture.introduced(IMAGES).values()) < 1e-12


def test_equal_versions(versions: Any) -> None:
    before, after = versions(tiny_residual().eval(), [])
    assert Mixture(before, after).introduced(IMAGES) == {}
