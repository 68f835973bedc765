"""adapt-backward: what it rewrites, that it trains, and what is deployed afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.errors import SpecError
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.passes import AdaptBackward, InsertObservers, JoinBatchNorm, MarkRelu
from fxq.quant.fixed_point_layers import FixedPointLayer, FixedPointProduct, FusedRelu, Product
from fxq.quant.learned_values import FollowedRange
from fxq.quant.quantizers import QuantizedLayer

RECIPES = ["adaptive-fixed-point", "adaptive-mode1", "adaptive-int4", "static-int8", "static-int16"]
NETWORKS = [tiny_conv, tiny_residual, tiny_depthwise, tiny_concat, tiny_mlp]
networks = pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 4


def inputs(build: Callable[[], nn.Module]) -> Tensor:
    return IMAGES.flatten(1)[:, :16] if build is tiny_mlp else IMAGES


def training(
    build: Callable[[], nn.Module] = tiny_conv, recipe: str = "adaptive-fixed-point"
) -> Any:
    """A training module, compiled without data."""
    return fxq.compile(build(), inputs(build)[:2], recipe).module


def steps(module: nn.Module, x: Tensor, count: int, lr: float = 0.05) -> list[float]:
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def layers(module: nn.Module) -> dict[str, FixedPointLayer]:
    return {n: m for n, m in module.named_modules() if isinstance(m, FixedPointLayer)}


@pytest.fixture
def adapted(run_passes: Any) -> Callable[..., Any]:
    """Call it as ``adapted(model, x)``: what went through the passes of the recipe."""

    def run(model: nn.Module, x: Any, layers: Any = None, **options: Any) -> Any:
        every = [JoinBatchNorm(), MarkRelu(), InsertObservers(), AdaptBackward(**options)]
        return run_passes(every, model.eval(), x, layers=layers, check=False)

    return run


def kinds(ran: Any) -> dict[str, str]:
    """What each module node of the program calls."""
    found = ran.program.nodes()
    return {n.name: type(ran.program.submodule(n)).__name__ for n in found if n.op == "call_module"}


# ---- what is rewritten -----------------------------------------------------------------------


def test_every_layer_and_value_of_a_residual_network(adapted: Any) -> None:
    ran = adapted(tiny_residual(), IMAGES[:2])
    found = kinds(ran)
    names = [name for name, kind in found.items() if kind == "FixedPointLayer"]
    assert names == ["stem", "conv1", "conv2", "fc"]
    assert "FusedRelu" not in found.values()  # all layers before a ReLU have a norm
    followed = [name for name, kind in found.items() if kind == "FollowedRange"]
    assert "x_quantizer" in followed
    assert "stem_relu_quantizer" in followed
    own = ran.program.submodule(ran.program.node("stem_relu_quantizer"))
    assert (own.bits, own.nonneg, own.upper) == (8, True, None)
    assert all(ran.program.submodule(ran.program.node(n)).norm is not None for n in names[:3])


def test_a_relu_that_alone_reads_a_layer_is_fused(adapted: Any) -> None:
    ran = adapted(tiny_mlp(), inputs(tiny_mlp)[:2])
    assert kinds(ran)["relu2"] == "FusedRelu"
    assert kinds(ran)["relu1"] == "ReLU"
    fused = {name: m.relu for name, m in layers(ran.program.module).items()}
    assert fused == {"fc1": False, "fc2": True, "fc3": False}


class Twice(nn.Module):
    """A ReLU of a function, one whose layer is read twice, and one with a bound."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 6) for _ in range(3))
        self.bounded, self.last = nn.ReLU6(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = self.two(x)
        x = torch.relu(x) + x
        return self.last(self.bounded(self.three(x)))


def test_which_relus_are_fused(adapted: Any) -> None:
    ran = adapted(Twice(), torch.randn(4, 6))
    fused = {name for name, module in layers(ran.program.module).items() if module.relu}
    assert fused == {"one"}
    assert list(kinds(ran).values()).count("FusedRelu") == 1


def test_fusing_changes_no_number(adapted: Any) -> None:
    ran = adapted(tiny_mlp(), inputs(tiny_mlp)[:2])
    fused, plain = ran.program.module.train(), copy.deepcopy(ran.program.module).train()
    for name, module in layers(plain).items():
        if module.relu:
            module.relu = False
            plain.get_submodule("relu2").forward = torch.relu  # type: ignore[union-attr,assignment]
            assert name == "fc2"
    x = inputs(tiny_mlp)
    assert torch.equal(fused(x), plain(x))


class Attention(nn.Module):
    """A product of two values, called three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        weights = torch.softmax(q @ k.transpose(1, 2), -1)
        return self.head(torch.matmul(weights, torch.bmm(weights, x)).mean(1))


@pytest.mark.parametrize("attention", [False, True])
def test_products_of_values_are_an_option(adapted: Any, attention: bool) -> None:
    x = torch.randn(4, 5, 6)
    ran = adapted(Attention(), x, attention=attention)
    found = list(kinds(ran).values())
    assert found.count("FixedPointProduct") == 3 * attention
    module = ran.program.module.train()
    module(x).square().mean().backward()
    assert all(value.grad is not None for value in module.parameters())
    products = [m for m in module.modules() if isinstance(m, FixedPointProduct)]
    assert all(isinstance(m.frozen(), Product) for m in products)
    assert {m.gradients.adaptation().step for m in products} <= {1}


class Others(nn.Module):
    """A volume, and a layer that has no integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.cube, self.up = nn.Conv3d(1, 2, 3, padding=1), nn.ConvTranspose1d(2, 3, 2, stride=2)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.cube(x).flatten(3).mean(3)).mean(2))


def test_layers_without_an_integer_kernel_are_trained_all_the_same(adapted: Any) -> None:
    x = torch.randn(2, 1, 4, 4, 4)
    ran = adapted(Others(), x)
    found = layers(ran.program.module)
    assert {name: module.is_deployed for name, module in found.items()}["up"] is False
    assert any("%up" in note and "deployed in float" in note for note in ran.step.notes)
    module = ran.program.module.train()
    module(x).square().mean().backward()
    assert all(value.grad is not None for value in module.parameters())
    assert isinstance(found["cube"].frozen(), QuantizedLayer)
    assert not isinstance(found["up"].frozen(), QuantizedLayer)


def test_layers_that_are_left_alone(adapted: Any) -> None:
    ran = adapted(tiny_mlp(), inputs(tiny_mlp)[:2], layers={"fc2": {"skip": True}})
    assert set(layers(ran.program.module)) == {"fc1", "fc3"}
    assert isinstance(ran.program.module.get_submodule("fc2"), nn.Linear)


def test_bits_of_one_layer(adapted: Any) -> None:
    ran = adapted(tiny_mlp(), inputs(tiny_mlp)[:2], layers={"fc2": {"gradient_bits": 16}})
    found = {name: module.describe() for name, module in layers(ran.program.module).items()}
    assert found == {"fc1": "w8 x8 g8", "fc2": "w8 x8 g16", "fc3": "w8 x8 g8"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gradient_bits", 1),
        ("weight_bits", 32),
        ("activation_bits", 0),
        ("threshold", 0.0),
        ("alpha", 1.5),
        ("beta", 0.0),
        ("delta", -1.0),
        ("gamma", -1.0),
        ("longest_interval", 0),
        ("top_bits", 17),
        ("top_bits", 32),
        ("mode", "mode3"),
    ],
)
def test_impossible_options_are_named(adapted: Any, option: str, value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        adapted(tiny_mlp(), inputs(tiny_mlp)[:2], **{option: value})
    known = "start_bits" if option.endswith("_bits") and option != "top_bits" else option
    assert known in str(caught.value)
    assert str(value) in str(caught.value)


# ---- training --------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains(build: Any, recipe: str) -> None:
    module, x = training(build, recipe), inputs(build)
    losses = steps(module, x, 12)
    assert losses[-1] < 0.8 * losses[0]
    assert all(value.grad is not None for value in module.parameters())
    widths = {c.adaptation().bits for m in layers(module).values() for c in m.children()
              if hasattr(c, "adaptation")}  # fmt: skip
    assert widths <= {"static-int8": {8}, "static-int16": {16}}.get(recipe, {4, 8, 16, 24})


def test_it_trains_as_float_does() -> None:
    module, model = training(tiny_residual), tiny_residual()
    losses, wanted = steps(module, IMAGES, 12), steps(model, IMAGES, 12)
    assert losses == pytest.approx(wanted, rel=0.2)


@networks
@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_it_is_lowered_without_more_data(build: Any, backend: str) -> None:
    module, x = training(build), inputs(build)
    steps(module, x, 12)
    lowered = fxq.lower(module, backend)
    assert lowered.ledger.coverage() == 1.0
    module.eval()
    module.exact = False
    with torch.no_grad():
        simulated, found = module(x), lowered.module(x)
    assert float((found - simulated).abs().max()) < 0.1 * float(simulated.abs().max())


@networks
def test_eval_mode_answers_as_deployed(build: Any) -> None:
    module, x = training(build), inputs(build)
    steps(module, x, 3)
    with torch.no_grad():
        assert torch.equal(module.eval()(x), fxq.lower(module).module(x))


@pytest.mark.parametrize("recipe", ["adaptive-int4", "adaptive-fixed-point"])
@pytest.mark.parametrize("build", [tiny_conv, tiny_mlp])
def test_deployed_weights_are_those_of_training(build: Any, recipe: str) -> None:
    """Codes times scale, whatever the sign of the batch norm's weight; -128 is left out."""
    module = training(build, recipe)
    steps(module, inputs(build), 3)
    for layer in layers(module).values():
        known, frozen = layer.weights.adaptation(), layer.frozen()
        assert isinstance(frozen, QuantizedLayer)
        own: Any = layer.layer
        wanted = torch.round(own.weight.detach() * 2.0**-known.exponent).clamp(-127, 127)
        gamma = torch.ones(len(own.weight))
        if layer.norm is not None:
            norm: Any = layer.norm
            gamma = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
            assert bool((gamma < 0).any())
        view = (-1, *(1 for _ in own.weight.shape[1:]))
        signs = torch.where(gamma < 0, -1, 1).view(view)
        assert torch.equal(frozen.codes.float(), wanted * signs)
        torch.testing.assert_close(
            frozen.scale, gamma.abs() * 2.0**known.exponent, rtol=1e-3, atol=1e-7
        )


def test_wide_weights_are_deployed_in_8_bits() -> None:
    module = training(tiny_conv, "static-int16")
    steps(module, IMAGES, 3)
    for layer in layers(module).values():
        frozen: Any = layer.frozen()
        assert set(frozen.bits.tolist()) == {8}
        assert int(frozen.codes.abs().max()) > 63


# ---- as a module -----------------------------------------------------------------------------


def test_a_saved_training_continues_exactly() -> None:
    whole, first = training(), training()
    wanted = steps(whole, IMAGES, 4, lr=0.0) + steps(whole, IMAGES, 4, lr=0.0)
    found = steps(first, IMAGES, 4, lr=0.0)
    second = pickle.loads(pickle.dumps(first))
    third = training()
    third.load_state_dict(first.state_dict())
    for other in (second, third):
        assert found + steps(other, IMAGES, 4, lr=0.0) == wanted
        states = zip(other.state_dict().values(), whole.state_dict().values(), strict=True)
        assert all(torch.equal(one, two) for one, two in states)


def test_wrapped_in_data_parallelism(tmp_path: Any) -> None:
    plain, inner = training(), training()
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(inner)
        assert steps(wrapped, IMAGES, 3) == steps(plain, IMAGES, 3)
        assert fxq.lower(wrapped).ledger.coverage() == 1.0
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_wrapped_by_torch_compile() -> None:
    """The layers themselves are no part of its graphs."""
    plain, inner = training(), training()
    wrapped: Any = torch.compile(inner, backend="aot_eager")
    found, wanted = steps(wrapped, IMAGES, 3), steps(plain, IMAGES, 3)
    assert found == pytest.approx(wanted, rel=1e-3)
    torch._dynamo.reset()


def test_modules_of_a_program() -> None:
    module = training(tiny_mlp)
    found = {type(own) for own in module.modules()}
    assert {FixedPointLayer, FollowedRange, FusedRelu} <= found
