"""insert-observers: one observer where each scale is decided, and no number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.graph.program import facts
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.passes import FoldBatchNorm, InsertObservers, MarkRelu
from fxq.passes.insert_observers import Statistics
from fxq.quant.observers import HistogramObserver, Observer, RangeObserver

TINY = {
    "tiny-conv": (tiny_conv, (2, 3, 8, 8), 4),
    "tiny-residual": (tiny_residual, (2, 3, 8, 8), 6),
    "tiny-depthwise": (tiny_depthwise, (2, 3, 8, 8), 5),
    "tiny-concat": (tiny_concat, (2, 3, 8, 8), 5),
    "tiny-mlp": (tiny_mlp, (2, 16), 3),
}


class Net(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.join, self.triple = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.fc = nn.Linear(4, 5)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


X = torch.randn(2, 3, 6, 6)


def observed(function: Any, run_passes: Any, **options: Any) -> Any:
    """The program with observers; fused ReLUs are marked before."""
    layers = options.pop("layers", None)
    passes = [MarkRelu(), InsertObservers(**options)]
    ran = run_passes(passes, Net(function).eval(), X, layers=layers)
    assert ran.step.sqnr == float("inf")
    assert ran.error(X) == 0
    return ran


def watched(ran: Any) -> dict[str, str]:
    """Observer node to the node it watches."""
    nodes = {node.name: facts(node).observes for node in ran.program.nodes()}
    return {name: target for name, target in nodes.items() if target is not None}


def observer_names(ran: Any) -> dict[str, str]:
    """Watched node to the module of its observer."""
    return {target: str(ran.program.node(name).target) for name, target in watched(ran).items()}


@pytest.mark.parametrize("name", TINY)
def test_tiny_networks(name: str, run_passes: Any, golden: Any) -> None:
    build, shape, count = TINY[name]
    x = torch.randn(shape)
    ran = run_passes([FoldBatchNorm(), MarkRelu(), InsertObservers()], build(), x)
    golden(f"insert-observers--{name}", ran.text())
    assert ran.step.census == {"RangeObserver": count}
    assert ran.step.sqnr == float("inf")
    assert set(ran.step.delta.counts()) <= {"added", "rewired"}
    assert len(ran.step.hits) == count


@pytest.mark.parametrize(
    ("statistics", "kind"), [("range", RangeObserver), ("histogram", HistogramObserver)]
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_options(statistics: str, kind: type[Observer], per_channel: bool, run_passes: Any) -> None:
    ran = observed(
        lambda n, x: n.fc(n.conv(x).mean((2, 3))),
        run_passes,
        statistics=Statistics(statistics),
        per_channel=per_channel,
    )
    observers = [m for m in ran.program.module.modules() if isinstance(m, Observer)]
    assert {type(observer) for observer in observers} == {kind}
    assert [o.channels for o in observers] == ([3, 4, None] if per_channel else [None] * 3)


def test_nothing_is_gathered_before_calibrate(run_passes: Any) -> None:
    ran = observed(lambda n, x: n.fc(n.conv(x).mean((2, 3))), run_passes)
    for module in ran.program.module.modules():
        assert not isinstance(module, Observer) or module.is_empty


def test_momentum_reaches_the_observers(run_passes: Any) -> None:
    ran = observed(lambda n, x: n.conv(x), run_passes, momentum=0.9)
    assert {m.momentum for m in ran.program.module.modules() if isinstance(m, Observer)} == {0.9}


def test_a_pool_shares_the_scale_of_what_it_reads(run_passes: Any) -> None:
    ran = observed(lambda n, x: n.left(n.pool(n.relu(n.conv(x)))), run_passes)
    assert set(watched(ran).values()) == {"x", "conv", "left"}


def test_a_float_value_is_observed_only_where_integers_read_it(run_passes: Any) -> None:
    ran = observed(lambda n, x: n.left(torch.sigmoid(y := n.conv(x))) + torch.tanh(y), run_passes)
    assert set(watched(ran).values()) == {"x", "conv", "sigmoid", "left"}
    x = ran.program.node("x")
    assert [user.name for user in x.users] == ["x_observer"]


def test_a_residual_sum_has_its_own_observer(run_passes: Any) -> None:
    ran = observed(
        lambda n, x: n.fc(n.relu(n.left(y := n.relu(n.conv(x))) + y).mean((2, 3))), run_passes
    )
    assert set(watched(ran).values()) == {"x", "conv", "left", "add", "mean"}
    relu = ran.program.node("relu_1")
    assert relu.args[0].name == "add_observer"


def test_an_observer_sits_before_a_fused_relu(run_passes: Any) -> None:
    ran = observed(lambda n, x: n.left(n.relu(n.conv(x))), run_passes)
    assert ran.program.node("relu").args[0].name == "conv_observer"


def test_a_single_linear_at_the_end_is_not_observed(run_passes: Any) -> None:
    ran = observed(lambda n, x: n.fc(n.conv(x).mean((2, 3))), run_passes)
    assert "fc" not in watched(ran).values()


# ---- concatenations --------------------------------------------------------------------------


def test_branches_that_meet_share_one_observer(run_passes: Any) -> None:
    ran = observed(
        lambda n, x: n.join(torch.cat([n.left(y := n.conv(x)), n.relu(n.right(y))], 1)), run_passes
    )
    names = observer_names(ran)
    assert names["left"] == names["right"]
    assert names["conv"] != names["left"]
    assert "cat" not in names


def test_branches_with_statistics_per_channel_keep_their_own(run_passes: Any) -> None:
    ran = observed(
        lambda n, x: n.triple(torch.cat([n.join(torch.cat([y := n.conv(x), y], 1)), y, y], 1)),
        run_passes,
        per_channel=True,
    )
    names = observer_names(ran)
    assert set(names) == {"x", "conv", "join", "triple"}
    assert len(set(names.values())) == 4


def test_a_branch_read_elsewhere_is_requantized_for_the_concatenation(run_passes: Any) -> None:
    ran = observed(lambda n, x: n.join(torch.cat([n.left(y := n.conv(x)), y], 1)), run_passes)
    assert ran.program.node("conv_observer").target == "conv_observer"
    cat = ran.program.node("cat")
    left, branch = cat.all_input_nodes
    assert left.target == branch.target
    assert branch.args[0].name == "conv_observer"
    assert facts(branch).observes == "conv"


def test_a_relu_branch_read_elsewhere_is_requantized_behind_the_relu(run_passes: Any) -> None:
    ran = observed(
        lambda n, x: n.join(torch.cat([n.left(y := n.relu(n.conv(x))), y], 1)), run_passes
    )
    _, branch = ran.program.node("cat").all_input_nodes
    assert branch.args[0].name == "relu"
    assert facts(branch).observes == "relu"


def test_concatenations_of_concatenations_share(run_passes: Any) -> None:
    ran = observed(
        lambda n, x: n.triple(
            torch.cat([torch.cat([n.left(y := n.conv(x)), n.right(y)], 1), n.left(y)], 1)
        ),
        run_passes,
    )
    names = observer_names(ran)
    assert names["left"] == names["right"] == names["left_1"]


@pytest.mark.parametrize(
    "function",
    [
        lambda n, x: n.join(torch.cat([y := n.left(n.conv(x)), y], 1)),
        lambda n, x: (
            n.join(torch.cat([a := n.left(y := n.conv(x)), b := n.right(y)], 1))
            + n.join(torch.cat([b, a], 1))
        ),
        lambda n, x: (
            n.join(torch.cat([a := n.left(y := n.conv(x)), b := n.right(y)], 1))
            + n.join(torch.cat([a, n.conv(x)], 1))
            + n.join(torch.cat([n.pool(b)[:, :, :1, :1], n.pool(a)[:, :, :1, :1]], 1))
        ),
    ],
    ids=["one branch twice", "the same two twice", "overlapping"],
)
def test_branches_that_meet_more_than_once(function: Any, run_passes: Any) -> None:
    ran = observed(function, run_passes)
    names = observer_names(ran)
    assert names["left"] == names.get("right", names["left"])


def test_a_concatenation_with_a_float_branch_is_observed_where_it_enters(run_passes: Any) -> None:
    ran = observed(
        lambda n, x: n.join(torch.cat([torch.sigmoid(y := n.conv(x)), n.left(y)], 1)), run_passes
    )
    assert "cat" in watched(ran).values()


# ---- what stays in float ---------------------------------------------------------------------


def test_a_skipped_layer_stays_in_float_and_says_so(run_passes: Any) -> None:
    ran = observed(
        lambda n, x: n.right(n.left(n.conv(x))), run_passes, layers={"le*": {"skip": True}}
    )
    assert ran.why("left") == ["stays in float: the recipe skips it"]
    assert facts(ran.program.node("left")).skip == "the recipe skips it"
    assert sorted(watched(ran).values()) == ["conv", "left", "right", "x"]
    assert ran.program.node("left").args[0].name == "conv_observer"


@pytest.mark.parametrize(
    ("function", "node", "why"),
    [
        (
            lambda n, x: n.up(n.conv(x)),
            "up",
            "there is no per-channel integer kernel for transposed",
        ),
        (lambda n, x: n.reflect(n.conv(x)), "reflect", "kernels pad with zeros, not by reflect"),
        (lambda n, x: n.conv(x[0]), "conv", "its input has no batch dimension"),
        (
            lambda n, x: n.fc(n.conv(x).mean((2, 3)).double().float().mean(0)),
            "fc",
            "its input has no batch dimension",
        ),
    ],
)
def test_what_has_no_kernel_says_why(function: Any, node: str, why: str, run_passes: Any) -> None:
    ran = observed(function, run_passes)
    assert ran.why(node)[0].startswith(f"stays in float: {why}")


def test_float64_stays_in_float(run_passes: Any) -> None:
    ran = run_passes([InsertObservers()], nn.Sequential(nn.Conv2d(3, 4, 3)).double(), X.double())
    assert ran.why("_0") == ["stays in float: its input is torch.float64, not one float32 tensor"]
    assert not ran.step.delta.of("added")
