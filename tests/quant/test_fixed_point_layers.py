"""Layers on fixed-point operands against a simulation in float64, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.errors import TrainingError
from fxq.numerics.adaptive import FLOAT_BITS, AdaptationOptions
from fxq.numerics.fixed_point import fixed_point
from fxq.quant.controller import Controller
from fxq.quant.fixed_point_layers import FixedPointLayer, FixedPointProduct

pytestmark = pytest.mark.usefixtures("one_thread")

STATIC = AdaptationOptions.static
FLOAT = AdaptationOptions(top_bits=8, threshold=1e-12)
"""Finds that no width is enough, in the first step."""

VARIANTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(7, 5), (4, 7)),
    "linear of sequences": (nn.Linear(7, 5, bias=False), (3, 4, 7)),
    "conv": (nn.Conv2d(3, 6, 3, padding=1), (2, 3, 6, 5)),
    "strided, grouped": (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (2, 4, 5, 6)),
    "dilated, same": (nn.Conv2d(3, 4, 3, padding="same", dilation=2), (2, 3, 7, 6)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2, padding=1, groups=2), (2, 2, 3, 4, 3)),
    "transposed1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5)),
    "transposed2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 4, 3),
    ),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), (1, 2, 3, 2, 3)),
}
variants = pytest.mark.parametrize("name", list(VARIANTS))


def layer_of(name: str, *options: AdaptationOptions, **more: Any) -> tuple[FixedPointLayer, Tensor]:
    inner, shape = VARIANTS[name]
    own = copy.deepcopy(inner)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(torch.randn_like(parameter))
    every = options if len(options) == 3 else options * 3
    return FixedPointLayer(own, None, *every, **more), torch.randn(shape, requires_grad=True)


def rounded(x: Tensor, controller: Controller) -> Tensor:
    """``[...]`` float64."""
    known = controller.adaptation()
    exact = x.detach().double()
    return exact if known.bits == FLOAT_BITS else fixed_point(exact, known.exponent, known.bits)


def gradients(layer: FixedPointLayer, x: Tensor, flow: Tensor) -> dict[str, Tensor]:
    """The output, and all gradients by name."""
    output = layer(x)
    names = ["x", *dict(layer.named_parameters())]
    found = torch.autograd.grad(output, [x, *layer.parameters()], flow)
    return {"output": output.detach(), **dict(zip(names, found, strict=True))}


def simulated(layer: FixedPointLayer, x: Tensor, flow: Tensor) -> dict[str, Tensor]:
    """The same of the layer in float64 on rounded operands, by torch's own autograd."""
    exact: Any = copy.deepcopy(layer.layer).double()
    exact.weight.data = rounded(exact.weight, layer.weights)
    bias, exact.bias = exact.bias, None
    values = rounded(x, layer.values).requires_grad_()
    whole = exact(values)
    kept = flow if not layer.relu else flow * (layer(x) > 0)
    to_x, to_weight = torch.autograd.grad(
        whole, (values, exact.weight), rounded(kept, layer.gradients)
    )
    output = whole.detach().float()
    found = {"x": to_x.float(), "layer.weight": to_weight.float()}
    if bias is not None:
        shape = [-1] if isinstance(layer.layer, nn.Linear) else [-1] + [1] * (x.dim() - 2)
        output = output + bias.detach().float().view(shape)
        axes = [axis for axis in range(kept.dim()) if axis != (kept.dim() - 1, 1)[len(shape) > 1]]
        found["layer.bias"] = kept.sum(axes)
    return {"output": output.relu() if layer.relu else output, **found}


def check(layer: FixedPointLayer, x: Tensor) -> None:
    flow = torch.randn_like(layer(x))
    found, wanted = gradients(layer, x, flow), simulated(layer.eval(), x, flow)
    assert found.keys() == wanted.keys()
    for name in found:
        padded = getattr(layer.layer, "padding_mode", "zeros") != "zeros"
        if name == "layer.bias" or (name == "x" and padded):  # summed in float
            torch.testing.assert_close(found[name], wanted[name])
        else:
            assert torch.equal(found[name], wanted[name]), name


# ---- the simulation --------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("bits", [(8, 8, 8), (4, 8, 16), (16, 16, 16), (8, 4, 24)])
def test_a_step_equals_its_simulation(name: str, bits: tuple[int, int, int]) -> None:
    check(*layer_of(name, *map(STATIC, bits)))


@variants
def test_an_adaptive_step_equals_its_simulation(name: str) -> None:
    layer, x = layer_of(name, AdaptationOptions(start_bits=4, threshold=0.003))
    weight: Any = layer.layer.weight
    weight.data[(0,) * weight.dim()] = 300.0
    check(layer, x)
    assert layer.weights.adaptation().bits > 4


@pytest.mark.parametrize("name", ["conv", "strided, grouped", "depthwise"])
def test_channels_last(name: str) -> None:
    layer, x = layer_of(name, STATIC(8))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    check(layer, last)
    assert torch.equal(layer(x), layer(last))


@pytest.mark.parametrize("name", ["linear", "conv", "depthwise", "conv1d", "conv3d"])
def test_a_fused_relu_equals_one_of_its_own(name: str) -> None:
    fused, x = layer_of(name, STATIC(8), relu=True)
    plain = copy.deepcopy(fused)
    plain.relu = False
    flow = torch.randn_like(plain.eval()(x))
    output = F.relu(plain.train()(x))
    wanted = torch.autograd.grad(output, [x, *plain.parameters()], flow)
    found = gradients(fused, x, flow)
    assert 0 < float((output > 0).float().mean()) < 1
    for one, other in zip(found.values(), [output.detach(), *wanted], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert torch.equal(one, other) or one.dim() == 1  # biases are summed in any order
    check(fused, x)


# ---- float -----------------------------------------------------------------------------------


@variants
def test_operands_that_stay_in_float(name: str) -> None:
    layer, x = layer_of(name, FLOAT)
    flow = torch.randn_like(layer(x))
    found = gradients(layer, x, flow)
    assert layer.describe() == "w32 x32 g32"
    own = copy.deepcopy(layer.layer)
    output = own(x)
    wanted = torch.autograd.grad(output, [x, *own.parameters()], flow)
    for one, other in zip(found.values(), [output.detach(), *wanted], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("name", ["linear", "conv", "transposed2d"])
def test_one_operand_in_float(name: str, which: int) -> None:
    options = [FLOAT if i == which else STATIC(8) for i in range(3)]
    layer, x = layer_of(name, *options)
    flow = torch.randn_like(layer(x))
    found, wanted = gradients(layer, x, flow), simulated(layer.eval(), x, flow)
    assert layer.describe().count("32") == 1
    for key in found:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5, msg=key)


# ---- what gets a gradient --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv", "transposed2d"])
def test_frozen_weights_cost_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("nobody reads it")

    layer, x = layer_of(name, STATIC(8))
    wanted = gradients(copy.deepcopy(layer), x, torch.ones_like(layer(x)))
    layer.layer.requires_grad_(False)
    monkeypatch.setattr("fxq.quant.fixed_point_products.conv_weight", refuse)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, wanted["x"])
    assert all(value.grad is None for value in layer.parameters())


def test_an_input_without_gradient_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxq.quant.fixed_point_products.conv_input", None)
    layer, x = layer_of("conv", STATIC(8))
    layer(x.detach()).sum().backward()
    assert all(value.grad is not None for value in layer.parameters())


@variants
def test_zero_gradients(name: str) -> None:
    layer, x = layer_of(name, AdaptationOptions())
    found = gradients(layer, x, torch.zeros_like(layer(x)))
    del found["output"]
    assert all(not bool(value.any()) for value in found.values())
    assert layer.gradients.adaptation().bits == 8


def test_a_layer_that_the_loss_does_not_reach() -> None:
    used, x = layer_of("linear", STATIC(8))
    unused, other = layer_of("linear", STATIC(8))
    unused(other)
    used(x).sum().backward()
    assert all(value.grad is None for value in unused.parameters())
    assert unused.gradients.adaptation().step == 0
    assert unused.values.adaptation().step == 1


def test_gradients_accumulate_and_are_clipped() -> None:
    layer, x = layer_of("conv", STATIC(8))
    weight: Any = layer.layer.weight
    flow = torch.randn_like(layer(x))
    single = gradients(layer, x, flow)["layer.weight"]
    for _ in range(2):
        layer(x).backward(flow)
    assert torch.equal(weight.grad, 2 * single)
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    assert float(norm) > 1
    total = torch.stack([value.grad.norm() for value in layer.parameters()]).norm()
    assert float(total) == pytest.approx(1, rel=1e-4)


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv", "transposed2d"])
def test_a_second_derivative_is_refused(name: str) -> None:
    layer, x = layer_of(name, STATIC(8))
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@variants
def test_autocast_is_refused(name: str) -> None:
    layer, x = layer_of(name, STATIC(8))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TrainingError, match="does not run under autocast"),
    ):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "conv", "transposed1d"])
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(name, STATIC(8))
    with pytest.raises(TrainingError, match=f"inputs are {dtype}"):
        layer(x.to(dtype))
    with pytest.raises(TrainingError, match=f"weights are {dtype}"):
        layer.to(dtype)(x.to(dtype))


@pytest.mark.parametrize("name", ["linear", "conv", "transposed2d"])
@pytest.mark.parametrize("what", ["weights", "inputs", "gradients"])
@pytest.mark.parametrize("seen", [False, True])
def test_values_without_a_fixed_point_number(name: str, what: str, seen: bool) -> None:
    """At a step that chooses anew, and at one that does not."""
    layer, x = layer_of(name, STATIC(8))
    flow = torch.ones_like(layer(x))
    for _ in range(5 * seen):
        gradients(layer, x, flow)
    bad = {"weights": layer.layer.weight, "inputs": x, "gradients": flow}[what]
    bad.detach()[(0,) * bad.dim()] = float("nan")  # type: ignore[operator]
    with pytest.raises(TrainingError, match=f"{what} hold NaN"):
        gradients(layer, x, flow)


# ---- copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv", "transposed2d"])
def test_copies_continue_alike(name: str) -> None:
    layer, x = layer_of(name, AdaptationOptions(start_bits=4), relu=not name.startswith("trans"))
    flow = torch.randn_like(layer(x))
    gradients(layer, x, flow)
    fresh, _ = layer_of(name, AdaptationOptions(start_bits=4), relu=layer.relu)
    fresh.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh]
    wanted = gradients(layer, 2 * x, flow)
    for other in copies:
        found = gradients(other, 2 * x, flow)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert torch.equal(other.gradients.state, layer.gradients.state)


# ---- products of two values ------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [((4, 5), (5, 3)), ((2, 3, 4, 5), (3, 5, 2))])
def test_a_product_of_values_equals_its_simulation(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    """Also of stacks that are broadcast."""
    product = FixedPointProduct(STATIC(8), STATIC(8), STATIC(16))
    one, other = torch.randn(left, requires_grad=True), torch.randn(right, requires_grad=True)
    output = product(one, other)
    flow = torch.randn_like(output)
    found = torch.autograd.grad(output, (one, other), flow)
    exact = [
        rounded(one, product.values).requires_grad_(),
        rounded(other, product.weights).requires_grad_(),
    ]
    whole = exact[0] @ exact[1]
    wanted = torch.autograd.grad(whole, exact, rounded(flow, product.gradients))
    assert torch.equal(output, whole.float())
    assert torch.equal(found[0], wanted[0].float())
    torch.testing.assert_close(found[1], wanted[1].float())  # summed over the stack in float
    assert torch.equal(product.frozen()(one, other), one @ other)
