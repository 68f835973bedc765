"""mark-relu: every ReLU is known, fused where it can be; no number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.graph.program import facts
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.passes import FoldBatchNorm, MarkRelu

TINY = {
    "tiny-conv": (tiny_conv, (2, 3, 8, 8)),
    "tiny-residual": (tiny_residual, (2, 3, 8, 8)),
    "tiny-depthwise": (tiny_depthwise, (2, 3, 8, 8)),
    "tiny-concat": (tiny_concat, (2, 3, 8, 8)),
    "tiny-mlp": (tiny_mlp, (2, 16)),
}


class Net(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 4)
        self.bn = nn.BatchNorm2d(4)
        self.relu, self.again = nn.ReLU(), nn.ReLU()
        self.relu6, self.inplace = nn.ReLU6(), nn.ReLU(inplace=True)
        self.tanh = nn.Hardtanh(0.0, 2.0)
        self.max_pool, self.avg_pool = nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.drop, self.pad = nn.Dropout(), nn.ZeroPad2d(1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def marked(function: Any, run_one: Any) -> Any:
    x = torch.randn(2, 3, 6, 6)
    ran = run_one(MarkRelu(), Net(function).eval(), x)
    assert ran.step.sqnr == float("inf")
    assert ran.error(torch.randn(2, 3, 6, 6)) == 0
    assert set(ran.step.delta.counts()) <= {"noted"}
    assert not ran.step.census
    return ran


@pytest.mark.parametrize("name", TINY)
def test_tiny_networks(name: str, run_passes: Any, golden: Any) -> None:
    build, shape = TINY[name]
    x = torch.randn(shape)
    ran = run_passes([FoldBatchNorm(), MarkRelu()], build(), x)
    golden(f"mark-relu--{name}", ran.text())
    assert not ran.step.census
    assert set(ran.step.delta.counts()) == {"noted"}
    assert ran.step.sqnr == float("inf")
    assert not ran.step.misses


SPELLINGS = [
    ("module", lambda n, x: n.relu(n.conv(x)), None),
    ("in-place module", lambda n, x: n.inplace(n.conv(x)), None),
    ("function", lambda n, x: F.relu(n.conv(x)), None),
    ("in-place function", lambda n, x: F.relu(n.conv(x), inplace=True), None),
    ("torch function", lambda n, x: torch.relu(n.conv(x)), None),
    ("method", lambda n, x: n.conv(x).relu(), None),
    ("in-place method", lambda n, x: n.conv(x).relu_(), None),
    ("clamp from below", lambda n, x: n.conv(x).clamp(min=0), None),
    ("ReLU6 module", lambda n, x: n.relu6(n.conv(x)), 6.0),
    ("ReLU6 function", lambda n, x: F.relu6(n.conv(x)), 6.0),
    ("clamp", lambda n, x: n.conv(x).clamp(0, 3), 3.0),
    ("clamp function", lambda n, x: torch.clamp(n.conv(x), 0, 3.5), 3.5),
    ("hardtanh module", lambda n, x: n.tanh(n.conv(x)), 2.0),
    ("hardtanh function", lambda n, x: F.hardtanh(n.conv(x), 0.0, 4.0), 4.0),
]


@pytest.mark.parametrize(("name", "function", "upper"), SPELLINGS, ids=[s[0] for s in SPELLINGS])
def test_every_spelling_fuses(name: str, function: Any, upper: float | None, run_one: Any) -> None:
    program = marked(function, run_one).program
    _, conv, relu, _ = program.nodes()
    assert facts(conv).fused_relu == relu.name
    assert facts(relu).fused_into == conv.name
    assert facts(relu).nonneg
    assert facts(relu).upper == upper
    assert not facts(conv).nonneg


HOSTS = [
    ("linear", lambda n, x: n.relu(n.linear(n.conv(x).mean((2, 3)))), "linear"),
    ("add", lambda n, x: n.relu(n.conv(x) + n.second(n.conv(x))), "add"),
    ("functional add", lambda n, x: torch.add(n.conv(x), n.conv(x)).relu(), "add"),
    ("in-place add", lambda n, x: n.relu(n.conv(x).add_(n.conv(x))), "add_"),
]


@pytest.mark.parametrize(("name", "function", "host"), HOSTS, ids=[h[0] for h in HOSTS])
def test_linear_and_add_take_a_relu(name: str, function: Any, host: str, run_one: Any) -> None:
    ran = marked(function, run_one)
    assert facts(ran.program.node(host)).fused_relu == ran.step.hits[-1]


NOT_FUSED = [
    (
        "several users",
        lambda n, x: n.relu(y := n.conv(x)) + y,
        {"relu": "%conv also feeds %add, which needs its negative values"},
    ),
    (
        "several ReLUs",
        lambda n, x: n.relu(y := n.conv(x)) - n.relu6(y),
        {
            "relu": "%conv also feeds %relu6, which needs its negative values",
            "relu6": "%conv also feeds %relu, which needs its negative values",
        },
    ),
    (
        "batch norm",
        lambda n, x: n.relu(n.bn(n.conv(x))),
        {"relu": "it reads %bn (batch_norm), which has no fused ReLU"},
    ),
    (
        "input",
        lambda n, x: n.relu(x),
        {"relu": "it reads %x (input), which has no fused ReLU"},
    ),
    (
        "ReLU of a ReLU",
        lambda n, x: n.again(n.relu(n.conv(x))),
        {"again": "it reads %relu (relu), which has no fused ReLU"},
    ),
    (
        "pool between",
        lambda n, x: n.relu(n.max_pool(n.conv(x))),
        {"relu": "it reads %max_pool (max_pool), which has no fused ReLU"},
    ),
    (
        "add that broadcasts",
        lambda n, x: n.relu(n.conv(x) + n.conv(x).mean((2, 3), keepdim=True)),
        {"relu": "it reads %add (other), which has no fused ReLU"},
    ),
]


@pytest.mark.parametrize(("name", "function", "misses"), NOT_FUSED, ids=[n[0] for n in NOT_FUSED])
def test_not_fused_but_nonnegative(name: str, function: Any, misses: Any, run_one: Any) -> None:
    ran = marked(function, run_one)
    assert {miss.node: miss.why for miss in ran.step.misses} == misses
    for relu in misses:
        known = facts(ran.program.node(relu))
        assert known.nonneg
        assert known.fused_into is None


@pytest.mark.parametrize(
    "function",
    [lambda n, x: F.leaky_relu(n.conv(x)), lambda n, x: n.conv(x).clamp(-1, 1), F.gelu],
)
def test_what_is_no_relu_is_left_alone(function: Any, run_one: Any) -> None:
    whole = function if function is not F.gelu else (lambda n, x: F.gelu(n.conv(x)))
    ran = marked(whole, run_one)
    assert not ran.step.delta
    assert not ran.step.misses


CARRIED = [
    ("max pool", lambda n, x: n.max_pool(x)),
    ("average pool", lambda n, x: n.avg_pool(x)),
    ("global pool", lambda n, x: x.mean((2, 3))),
    ("flatten", lambda n, x: x.flatten(1)),
    ("dropout", lambda n, x: n.drop(x)),
    ("padding", lambda n, x: n.pad(x)),
    ("slice", lambda n, x: x[:, 1:]),
    ("several", lambda n, x: n.pad(n.drop(n.max_pool(x))).flatten(2)),
]


@pytest.mark.parametrize(("name", "follow"), CARRIED, ids=[c[0] for c in CARRIED])
def test_sign_and_bound_are_carried(name: str, follow: Any, run_one: Any) -> None:
    program = marked(lambda n, x: follow(n, n.relu6(n.conv(x))), run_one).program
    *_, last, _ = program.nodes()
    assert facts(last).nonneg
    assert facts(last).upper == 6.0


def test_sign_ends_at_the_next_layer(run_one: Any) -> None:
    program = marked(lambda n, x: n.second(n.relu(n.conv(x))), run_one).program
    assert not facts(program.node("second")).nonneg
