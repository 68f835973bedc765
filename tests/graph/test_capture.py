"""Capture: one spelling for every layer, the user's module untouched, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxq.graph.capture import capture
from fxq.graph.ops import Kind, describe
from fxq.graph.program import Program, facts, layer_path


def run(program: Program, *inputs: Any) -> Any:
    """The output in the layout the inputs have, so that it equals the model's to the last bit."""
    with torch.no_grad():
        return program.module(*inputs)


class Net(nn.Module):
    """Parameters for every functional spelling; its forward is the function under test."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.max_pool = nn.MaxPool2d(3, 2, 1)
        self.avg_pool = nn.AvgPool2d(2, 1)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.depthwise = nn.Parameter(torch.randn(4, 1, 3, 3))
        self.up = nn.Parameter(torch.randn(4, 2, 2, 2))
        self.matrix = nn.Parameter(torch.randn(5, 4))
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.register_buffer("fixed", torch.randn(4, 3, 1, 1))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def captured(function: Callable[..., Any], x: Tensor | None = None) -> tuple[Program, Any]:
    """The program of a function of a network, and what the network gives."""
    x = torch.randn(2, 3, 6, 6) if x is None else x
    model = Net(function).eval()
    with torch.no_grad():
        want = model(x.clone())
    program = capture(model, x)
    assert torch.equal(run(program, x), want)
    return program, want


def kinds(program: Program) -> list[str]:
    return [describe(node, program.module).kind.value for node in program.nodes()]


def layers(program: Program) -> list[nn.Module]:
    return [m for node in program.nodes() if (m := program.submodule(node)) is not None]


# ---- functional layers become modules --------------------------------------------------------

FUNCTIONAL = [
    ("conv2d", lambda n, x: F.conv2d(x, n.weight), nn.Conv2d),
    ("bias", lambda n, x: F.conv2d(x, n.weight, n.bias, 2, 1), nn.Conv2d),
    ("by name", lambda n, x: F.conv2d(input=x, weight=n.weight, bias=n.bias), nn.Conv2d),
    ("same", lambda n, x: F.conv2d(x, n.weight, padding="same"), nn.Conv2d),
    ("options", lambda n, x: F.conv2d(x, n.weight, None, (1, 2), (1, 0), 2), nn.Conv2d),
    ("torch", lambda n, x: torch.conv2d(x, n.weight, n.bias, stride=2), nn.Conv2d),
    ("groups", lambda n, x: F.conv2d(n.conv(x), n.depthwise, groups=4), nn.Conv2d),
    ("buffer", lambda n, x: F.conv2d(x, n.fixed), nn.Conv2d),
    ("1d", lambda n, x: F.conv1d(x.flatten(2), n.weight[:, :, 0]), None),
    ("3d", lambda n, x: F.conv3d(x.unsqueeze(2), n.weight.unsqueeze(2)), None),
    ("up", lambda n, x: F.conv_transpose2d(n.conv(x), n.up, stride=2), nn.ConvTranspose2d),
    (
        "up groups",
        lambda n, x: F.conv_transpose2d(n.conv(x), n.up, None, 2, 0, 1, 2),
        nn.ConvTranspose2d,
    ),
    ("linear", lambda n, x: F.linear(n.conv(x).mean((2, 3)), n.matrix), nn.Linear),
    ("norm", lambda n, x: F.batch_norm(n.conv(x), n.mean, n.var, n.scale, n.bias), nn.BatchNorm2d),
    ("plain norm", lambda n, x: F.batch_norm(n.conv(x), n.mean, n.var, eps=0.1), nn.BatchNorm2d),
    (
        "norm 1d",
        lambda n, x: F.batch_norm(n.conv(x).flatten(2), n.mean, n.var, n.scale),
        nn.BatchNorm1d,
    ),
]


@pytest.mark.parametrize(("name", "function", "layer"), FUNCTIONAL, ids=[f[0] for f in FUNCTIONAL])
def test_functional_layers_become_modules(name: str, function: Any, layer: Any) -> None:
    program, _ = captured(function)
    found = [type(module) for module in layers(program)]
    if layer is None:  # its weight is computed in the graph
        assert not found
    else:
        assert found[-1] is layer
        assert "call_function" not in [n.op for n in program.nodes() if n.target is not torch.mean]


def test_functional_weights_are_shared_with_nothing_of_the_user() -> None:
    model = Net(lambda n, x: F.conv2d(x, n.weight, n.bias))
    program = capture(model, torch.randn(1, 3, 6, 6))
    (layer,) = layers(program)
    with torch.no_grad():
        layer.weight.zero_()
    assert bool(model.weight.any())
    assert layer.weight.requires_grad


def test_computed_weights_stay_functional() -> None:
    program, _ = captured(lambda n, x: F.conv2d(x, n.weight - n.weight.mean()))
    assert "other" in kinds(program)


def test_batch_norm_in_training_mode_stays_functional() -> None:
    program, _ = captured(
        lambda n, x: F.batch_norm(n.conv(x), None, None, training=True), torch.randn(2, 3, 6, 6)
    )
    assert [type(module) for module in layers(program)] == [nn.Conv2d]


def test_two_functional_calls_get_two_names() -> None:
    program, _ = captured(
        lambda n, x: (
            F.conv2d(x, n.weight) + F.conv2d(x, n.weight, n.bias) + n.conv(x)[..., 1:-1, 1:-1]
        )
    )
    assert kinds(program).count("conv") == 3
    assert len({node.target for node in program.nodes() if node.op == "call_module"}) == 3


# ---- spellings of one operator ---------------------------------------------------------------

RELUS = [
    lambda n, x: n.relu(n.conv(x)),
    lambda n, x: F.relu(n.conv(x)),
    lambda n, x: F.relu(n.conv(x), inplace=True),
    lambda n, x: torch.relu(n.conv(x)),
    lambda n, x: n.conv(x).relu(),
    lambda n, x: n.conv(x).relu_(),
    lambda n, x: n.conv(x).clamp(min=0),
    lambda n, x: n.conv(x).clamp(0),
    lambda n, x: n.conv(x).clamp_min(0),
    lambda n, x: torch.clamp(n.conv(x), min=0.0),
    lambda n, x: n.conv(input=x).clip(0),
]
RELU6S = [
    lambda n, x: F.relu6(n.conv(x)),
    lambda n, x: F.hardtanh(n.conv(x), 0, 6),
    lambda n, x: n.conv(x).clamp(0, 6),
    lambda n, x: torch.clamp(n.conv(x), 0.0, 6.0),
    lambda n, x: F.hardtanh(n.conv(x), min_val=0.0, max_val=6.0),
]


@pytest.mark.parametrize("function", RELUS)
def test_relu_spellings(function: Any) -> None:
    program, _ = captured(function)
    assert kinds(program) == ["input", "conv", "relu", "output"]


@pytest.mark.parametrize("function", RELU6S)
def test_relu6_spellings(function: Any) -> None:
    program, _ = captured(function)
    *_, node, _ = program.nodes()
    op = describe(node, program.module)
    assert (op.kind, op.attributes) == (Kind.RELU, {"upper": 6.0})


OTHERS = [
    (lambda n, x: F.hardtanh(n.conv(x)), "hardtanh(-1.0, 1.0) is not a ReLU"),
    (lambda n, x: n.conv(x).clamp(1, 2), "hardtanh(1, 2) is not a ReLU"),
    (lambda n, x: n.conv(x).clamp(max=2), "hardtanh(None, 2) is not a ReLU"),
    (lambda n, x: n.conv(x).clamp(0, x.mean()), "is not a ReLU"),
    (lambda n, x: n.conv(x) + 1, "add of a constant"),
    (lambda n, x: torch.add(x, x, alpha=2), "add with alpha"),
    (lambda n, x: x + x.mean((2, 3), keepdim=True), "add that broadcasts"),
    (lambda n, x: x.mean((1, 2)), "mean over (1, 2)"),
    (lambda n, x: x.flatten(2).mean(-1), "mean over (-1,) of 3 dimensions"),
    (lambda n, x: F.avg_pool2d(x, x.size(2)), "avg_pool of a computed size"),
    (lambda n, x: F.avg_pool2d(x, x.size()[2:]), "avg_pool of a computed size"),
    (lambda n, x: F.avg_pool2d(x, 4, ceil_mode=True), "average pool in ceil mode"),
    (lambda n, x: F.avg_pool2d(x, 2, divisor_override=3), "divisor override"),
    (lambda n, x: F.adaptive_avg_pool2d(x, 4), "has uneven windows"),
    (lambda n, x: F.adaptive_avg_pool2d(x, (x.size(2), 1)), "adaptive average pool to"),
    (lambda n, x: F.pad(x, (1, 1), value=3.0), "padding by constant 3.0"),
    (lambda n, x: F.pad(x, (1, 1, 1, 1), "reflect"), "padding by reflect"),
    (lambda n, x: F.pad(x, (x.size(2), 1)), "padding by a computed size"),
    (lambda n, x: x[x.argmax().clamp(0, 1)], "index that is computed"),
    (lambda n, x: torch.sigmoid(x), "no integer sigmoid"),
]


@pytest.mark.parametrize(("function", "reason"), OTHERS, ids=[reason for _, reason in OTHERS])
def test_what_is_not_a_known_operator_says_why(function: Any, reason: str) -> None:
    program, _ = captured(function)
    *_, node, _ = program.nodes()
    op = describe(node, program.module)
    assert op.kind is Kind.OTHER
    assert reason in op.reason


POOLS = [
    (lambda n, x: F.max_pool2d(x, 2), "max_pool", {"kernel_size": (2, 2), "stride": (2, 2)}),
    (lambda n, x: n.max_pool(x), "max_pool", {"stride": (2, 2), "padding": (1, 1)}),
    (lambda n, x: F.avg_pool2d(x, (2, 3)), "avg_pool", {"kernel_size": (2, 3), "stride": (2, 3)}),
    (lambda n, x: n.avg_pool(x), "avg_pool", {"kernel_size": (2, 2), "stride": (1, 1)}),
    (lambda n, x: F.adaptive_avg_pool2d(x, 1), "global_avg_pool", {"keepdim": True}),
    (lambda n, x: F.adaptive_avg_pool2d(x, (None, 3)), "avg_pool", {"kernel_size": (1, 2)}),
    (lambda n, x: F.adaptive_avg_pool2d(x, 6), "identity", {}),
    (lambda n, x: x.mean((2, 3)), "global_avg_pool", {"keepdim": False}),
    (lambda n, x: x.mean([-1, 2], keepdim=True), "global_avg_pool", {"keepdim": True}),
    (lambda n, x: torch.mean(x, (2, 3), True), "global_avg_pool", {"keepdim": True}),
    (lambda n, x: torch.cat((x, x), dim=1), "cat", {"dim": 1}),
    (lambda n, x: torch.concatenate([x, x], axis=-1), "cat", {"dim": -1}),
    (lambda n, x: F.pad(x, (1, 0, 2, 0)), "pad", {"pad": (1, 0, 2, 0)}),
    (lambda n, x: x[:, 1:], "reshape", {"call": "getitem"}),
    (lambda n, x: F.dropout(x, 0.5, n.training), "identity", {}),
    (lambda n, x: x.size(2) // 2 * x, "other", {}),
]


@pytest.mark.parametrize(("function", "kind", "attributes"), POOLS)
def test_spellings_of_pools_and_joins(function: Any, kind: str, attributes: dict[str, Any]) -> None:
    program, _ = captured(function)
    *_, node, _ = program.nodes()
    op = describe(node, program.module)
    assert op.kind.value == kind
    assert {name: op.attributes[name] for name in attributes} == attributes


def test_dropout_that_forgot_eval_mode_is_not_the_identity() -> None:
    program = capture(Net(lambda n, x: F.dropout(n.conv(x))), torch.randn(1, 3, 6, 6))
    assert kinds(program)[-2] == "other"


# ---- modules ---------------------------------------------------------------------------------


class Mine(nn.Conv2d):
    """A user's subclass, which is traced into."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Odd(nn.Linear):
    """A user's subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


def test_subclasses_of_layers_are_traced_into_and_keep_their_path() -> None:
    model = nn.Sequential(nn.Sequential(Mine(3, 4, 3)), nn.ReLU()).eval()
    x = torch.randn(1, 3, 6, 6)
    program = capture(model, x)
    (conv,) = [n for n in program.nodes() if describe(n, program.module).kind is Kind.CONV]
    assert layer_path(conv) == "0.0"
    assert torch.equal(run(program, x), model(x))


def test_a_leaf_subclass_is_not_taken_for_its_parent() -> None:
    program = capture(nn.Sequential(Odd(3, 4)), torch.randn(2, 3), leaf_modules=[Odd])
    assert kinds(program) == ["input", "other", "output"]


def test_reused_modules_are_one_module_called_twice() -> None:
    model = Net(lambda n, x: n.relu(n.conv(x)) + n.relu(n.conv(x * 2))).eval()
    x = torch.randn(1, 3, 6, 6)
    program = capture(model, x)
    assert [n.target for n in program.nodes() if n.op == "call_module"] == ["conv", "relu"] * 2
    assert torch.equal(run(program, x), model(x))


class Block(nn.Module):
    """Something a user may want to keep whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


@pytest.mark.parametrize("leaf", [Block, "Block", "1"])
def test_leaf_modules_by_class_class_name_and_path(leaf: Any) -> None:
    model = nn.Sequential(nn.ReLU(), Block()).eval()
    x = torch.randn(1, 3, 4, 4)
    program = capture(model, x, leaf_modules=[leaf])
    assert [node.target for node in program.nodes()][1:-1] == ["0", "1"]
    assert torch.equal(run(program, -x), model(-x))


def test_facts_hold_path_shape_and_dtype() -> None:
    program = capture(nn.Sequential(Mine(3, 4, 3), nn.Flatten()), torch.randn(2, 3, 5, 5))
    *_, flat, _ = program.nodes()
    assert facts(flat).path == "1"
    assert facts(flat).shape == (2, 100)
    assert facts(flat).dtype is torch.float32
    assert facts(flat).origin == "capture"


def test_a_graph_module_can_be_captured_again() -> None:
    x = torch.randn(1, 3, 6, 6)
    once = capture(Net(lambda n, x: F.conv2d(x, n.weight).relu_()), x)
    twice = capture(once.module, x)
    assert kinds(once) == kinds(twice)
    assert torch.equal(run(once, x), run(twice, x))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights_become_plain(norm: str) -> None:
    from torch.nn.utils import parametrizations

    layer = getattr(parametrizations, norm)(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.randn(1, 3, 6, 6)
    program = capture(model, x)
    assert kinds(program)[1] == "conv"
    assert type(layers(program)[0]) is nn.Conv2d
    torch.testing.assert_close(run(program, x), model(x))
    assert "parametrizations" in dict(layer.named_children())


def test_a_layer_with_hooks_is_not_taken_for_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    x = torch.randn(1, 3, 6, 6)
    program = capture(model.eval(), x)
    assert kinds(program)[1] == "other"
    assert torch.equal(run(program, x), model(x))


# ---- the user's module -----------------------------------------------------------------------


def test_the_users_module_is_untouched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(True))
    model.train()
    before = copy.deepcopy(model.state_dict())
    program = capture(model, torch.randn(2, 3, 6, 6))
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in program.module.parameters())
    assert not any(module.training for module in program.module.modules())


def test_eval_mode_is_what_is_captured() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9)).train()
    x = torch.randn(4, 3)
    program = capture(model, x)
    assert torch.equal(run(program, x), copy.deepcopy(model).eval()(x))


def test_no_gradients_are_recorded_but_parameters_can_be_trained() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 3))
    assert not run(program, torch.randn(1, 3)).requires_grad
    assert all(p.requires_grad for p in program.module.parameters())


def test_outputs_may_be_nested() -> None:
    model = Net(lambda n, x: {"out": n.conv(x), "aux": [x, (n.relu(x),)]}).eval()
    x = torch.randn(1, 3, 6, 6)
    got, want = run(capture(model, x), x), model(x)
    torch.testing.assert_close(got, want)


def test_the_graph_lints() -> None:
    program = capture(Net(RELUS[0]), torch.randn(1, 3, 6, 6))
    assert isinstance(program.module, fx.GraphModule)
    program.graph.lint()
