"""Graph modules as plain data: pickled and put together anew, nothing is lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.graph.capture import capture
from fxq.graph.plain import PlainGraph
from fxq.graph.program import facts
from fxq.models_zoo import tiny_concat, tiny_depthwise, tiny_residual
from fxq.passes import FoldBatchNorm, MarkRelu
from fxq.pipeline import Pipeline
from fxq.trail.snapshot import snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """Nested modules, a parameter and a buffer of its own, slices, dtypes and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Dropout(0.5)))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)[:, 1:, ::2].to(dtype=torch.float64) * self.scale + self.shift
        left, right = torch.split(x, [1, 2], dim=1)
        return left.flatten(1).sum(-1, keepdim=True), torch.cat([right, left], dim=1)


def program(model: nn.Module) -> Any:
    found = capture(model, IMAGES)
    Pipeline(FoldBatchNorm(), MarkRelu()).run(found)
    return found


def again(module: Any) -> Any:
    return pickle.loads(pickle.dumps(PlainGraph.of(module))).module()


@pytest.mark.parametrize("build", [tiny_residual, tiny_concat, tiny_depthwise, Calls])
def test_nothing_is_lost(build: Callable[[], nn.Module]) -> None:
    before = program(build())
    after = copy.copy(before)
    after.module = again(before.module)
    assert snapshot(after).text() == snapshot(before).text()
    assert [facts(n) for n in after.nodes()] == [facts(n) for n in before.nodes()]
    assert str(after.module(IMAGES)) == str(before.module(IMAGES))
    assert type(after.module).__name__ == type(before.module).__name__
    state = before.module.state_dict()
    found = after.module.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    kinds = {name for name, _ in before.module.named_parameters()}
    assert {name for name, _ in after.module.named_parameters()} == kinds


def test_it_keeps_the_mode() -> None:
    module = program(Calls()).module
    assert not again(module).training
    assert again(module.train()).training


def test_without_pickling_modules_are_shared() -> None:
    module = program(tiny_residual()).module
    other = PlainGraph.of(module).module()
    assert other is not module
    assert other.get_submodule("conv1") is module.get_submodule("conv1")
    other.graph.erase_node(next(iter(reversed(other.graph.nodes))))
    module.graph.lint()
    assert module(IMAGES).shape == (2, 10)


def test_submodules_come_in_the_order_of_the_nodes() -> None:
    """So that optimizers of two copies pair the same parameters."""
    module = program(tiny_residual()).module
    module.add_submodule("stem", module._modules.pop("stem"))  # as a pass that inserts may do
    names = [name for name, _ in PlainGraph.of(module).module().named_children()]
    assert names == [node.target for node in module.graph.nodes if node.op == "call_module"]
    assert names == [name for name, _ in again(module).named_children()]
