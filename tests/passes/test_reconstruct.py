"""reconstruct: what is trained, what stays as it is, and that the result is integers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.backends.eager import EagerModule
from fxq.backends.onnx import OnnxBackend
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.numerics.allocation import Allocation
from fxq.numerics.saturation import largest_pair_sum, pair_limit
from fxq.passes import QuantizeMinmax, Reconstruct
from fxq.passes.reconstruct import Augmentation, Scope
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer, rows
from fxq.recipe import Recipe

from .conftest import IMAGES, Deep
from .test_correct_bias import BEFORE
from .test_settling import disputes

COARSE = QuantizeMinmax(weight_bits=3, activation_bits=4)
RATES = ("learning_rate", "scale_learning_rate", "weight_scale_learning_rate", "bias_learning_rate")
STILL = dict.fromkeys(RATES, 0.0)
VECTORS = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv": tiny_conv,
    "residual": tiny_residual,
    "depthwise": tiny_depthwise,
    "concat": tiny_concat,
    "mlp": tiny_mlp,
    "deep": Deep,
}


def short(**options: Any) -> Reconstruct:
    """A training of a second, at large steps."""
    chosen = {
        "iterations": 40,
        "batch_size": 16,
        "learning_rate": 0.03,
        "scale_learning_rate": 0.005,
        "weight_scale_learning_rate": 0.005,
        "bias_learning_rate": 0.003,
        "augmentation": Augmentation.NONE,
    }
    return Reconstruct(**{**chosen, **options})


def state(ran: Any) -> dict[str, Tensor]:
    """All codes, scales, zero points and shifts of biases."""
    found = {}
    for name, module in ran.program.module.named_modules():
        if isinstance(module, QuantizedLayer | ActivationQuantizer):
            found |= {f"{name}.{key}": one for key, one in module.named_buffers(recurse=False)}
    return found


def changed(before: Any, after: Any) -> set[str]:
    """What kinds of numbers differ."""
    old, new = state(before), state(after)
    assert old.keys() == new.keys()
    return {name.rpartition(".")[2] for name, one in old.items() if not torch.equal(one, new[name])}


def error(ran: Any, x: Tensor) -> float:
    """The divergence of the classes' probabilities."""
    with torch.no_grad():
        want, have = ran.model.eval()(x).softmax(1), ran.program.module(x).softmax(1)
    return float((want * (want / have).log()).sum(1).mean())


def layers(ran: Any) -> list[QuantizedLayer]:
    return [one for one in ran.program.module.modules() if isinstance(one, QuantizedLayer)]


def inputs(name: str) -> Tensor:
    return VECTORS if name == "mlp" else IMAGES


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_falls(name: str, scope: Scope, trained: Any) -> None:
    x = inputs(name)
    ran = trained(short(scope=scope), NETWORKS[name](), x)
    (note,) = [text for text in ran.step.notes if text.startswith("loss")]
    found = re.fullmatch(r"loss (\S+) -> (\S+) in 40 steps", note)
    assert found is not None
    assert float(found[2]) < 0.9 * float(found[1])
    assert not ran.step.misses
    assert set(ran.step.hits) == {
        node.name
        for node in ran.program.nodes()
        if isinstance(ran.program.submodule(node), QuantizedLayer)
    }


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"depthwise"}))  # it needs more steps
def test_the_output_is_nearer(name: str, trained: Any) -> None:
    x = inputs(name)
    plain, ran = (trained(one, NETWORKS[name](), x) for one in (None, short()))
    assert error(ran, x) < 0.8 * error(plain, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_steps_everything_is_as_it_was(name: str, trained: Any) -> None:
    x = inputs(name)
    plain = trained(None, NETWORKS[name](), x)
    ran = trained(short(**STILL, iterations=3), NETWORKS[name](), x)
    assert changed(plain, ran) == set()
    assert torch.equal(plain.program.run(x), ran.program.run(x))


@pytest.mark.parametrize(
    ("rate", "kinds"),
    [
        ("learning_rate", {"codes"}),
        ("weight_scale_learning_rate", {"scale"}),
        ("scale_learning_rate", {"scale"}),
        ("bias_learning_rate", {"bias_shift"}),
    ],
)
def test_each_rate_moves_its_own(rate: str, kinds: set[str], trained: Any) -> None:
    plain = trained(None, Deep())
    ran = trained(short(**(STILL | {rate: 0.1}), iterations=10), Deep())
    assert changed(plain, ran) == kinds
    before, after = state(plain), state(ran)
    moved = {name for name, one in before.items() if not torch.equal(one, after[name])}
    if rate == "scale_learning_rate":  # 8-bit scales stay
        assert moved == {"relu_quantizer.scale", "body_1_quantizer.scale"}
    if rate == "weight_scale_learning_rate":
        assert moved == {"first.scale", "body.0.scale", "body.2.scale", "head.scale"}


def test_the_seed_decides(trained: Any) -> None:
    first, again, other = (trained(short(seed=seed, batch_size=4), Deep()) for seed in (1, 1, 2))
    assert changed(first, again) == set()
    assert "codes" in changed(first, other)


@pytest.mark.parametrize(
    "option",
    [
        {"augmentation": Augmentation.FLIP},
        {"augmentation": Augmentation.FLIP_SHIFT},
        {"images": 3},
        {"batch_size": 2},
        {"temperature": 1.0},
        {"feature_weight": 0.0},
        {"scope": Scope.BLOCK},
    ],
    ids=str,
)
def test_every_option_does_something(option: dict[str, Any], trained: Any) -> None:
    assert changed(trained(short(), Deep()), trained(short(**option), Deep()))


def test_only_the_first_images_count(trained: Any) -> None:
    same = torch.cat([IMAGES[:4], IMAGES[:12] * 0.5])  # calibrated alike: inside of the ranges
    other = torch.cat([IMAGES[:4], IMAGES[:12] * 0.4])
    assert changed(*(trained(None, Deep(), x) for x in (same, other))) == set()
    assert changed(*(trained(short(images=4), Deep(), x) for x in (same, other))) == set()
    assert changed(*(trained(short(images=5), Deep(), x) for x in (same, other))) != set()


@pytest.mark.parametrize("scope", list(Scope))
def test_a_block_does_not_learn_from_what_is_behind_it(scope: Scope, trained: Any) -> None:
    """Another last layer changes no layer before, unless the network is trained as one."""
    other = Deep()
    with torch.no_grad():
        other.head.weight.copy_(other.head.weight.flip(0) * 2)
    one, two = (state(trained(short(scope=scope), model)) for model in (Deep(), other))
    inner = ("first.codes", "body.0.codes", "body.2.codes", "first.scale", "relu_quantizer.scale")
    assert all(torch.equal(one[name], two[name]) for name in inner) is (scope is Scope.BLOCK)
    assert not torch.equal(one["head.scale"], two["head.scale"])


def test_progress_and_the_model_that_was_given(trained: Any) -> None:
    model = Deep()
    before = copy.deepcopy(model.state_dict())
    trained(short(), model)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in model.parameters())


# ---- codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["conv", "depthwise", "mlp"])
def test_codes_use_the_range_of_their_bits(name: str, bits: int, trained: Any) -> None:
    after = QuantizeMinmax(weight_bits=bits, activation_bits=4, first_last_bits=0)
    ran = trained(short(learning_rate=2.0), NETWORKS[name](), inputs(name), after=after)
    for layer in layers(ran):
        assert -(2 ** (bits - 1)) <= int(layer.codes.min())
        assert int(layer.codes.max()) <= 2 ** (bits - 1) - 1
    assert min(int(layer.codes.min()) for layer in layers(ran)) == -(2 ** (bits - 1))


def test_channels_keep_bits_of_their_own(trained: Any) -> None:
    model = Deep()
    model.body[0].weight.data *= torch.logspace(-2, 1, 8).view(-1, 1, 1, 1)
    after = QuantizeMinmax(weight_bits=4, activation_bits=4, allocation=Allocation.MEAN_BITS)
    ran = trained(short(learning_rate=0.5), model, after=after)
    layer = ran.program.module.get_submodule("body.0")
    assert int(layer.bits.min()) < 4 < int(layer.bits.max())
    top = 2 ** (layer.bits - 1)
    codes = rows(layer.layer, layer.codes)
    assert bool((codes.amax(1) <= top - 1).all())
    assert bool((codes.amin(1) >= -top).all())


def test_depthwise_layers_of_8_bits_stay_safe(trained: Any) -> None:
    plain = trained(None, tiny_depthwise(), after=QuantizeMinmax())
    ran = trained(short(learning_rate=9.0), tiny_depthwise(), after=QuantizeMinmax())
    before, after = (
        one.program.module.get_submodule("depthwise").codes.flatten(1) for one in (plain, ran)
    )
    assert bool((largest_pair_sum(after) <= pair_limit(255)).all())
    kept = (before == after).all(1)
    assert bool(kept.any())  # would have become unsafe
    assert not bool(kept.all())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_backend_computes_the_same_integers(name: str) -> None:
    """Also with codes at -4, which no pass before has."""
    x = inputs(name)
    recipe = Recipe("test", (*BEFORE, COARSE, short(learning_rate=0.3)))
    made = fxq.compile(NETWORKS[name](), x[:2], recipe, calibration=[x], check=False)
    program = made.artifact.integers
    program.check()
    codes = [program.tensor(step, "weight") for step in program if "weight" in step.tensors]
    if name not in ("concat", "depthwise"):
        assert -4 in {int(one.min()) for one in codes}
    if name == "residual":
        assert disputes(program) == [0]
    output, expected = Reference(program).run(x * 1.5)
    found = EagerModule(program, "fbgemm").registers(x * 1.5)
    assert found.keys() == expected.keys()
    assert all(one.double().equal(expected[key].double()) for key, one in found.items())
    for flavor in ("fast", "packed", "compact")[: 3 if name == "residual" else 1]:
        assert torch.equal(OnnxBackend().load(program, flavor=flavor)(x * 1.5), output), flavor


def test_trained_sums_are_settled() -> None:
    """A sum that layers alone read has their bits, so its scale is trained."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.d, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            x = self.a(x) + self.b(x)
            return self.head(self.c(x).relu() + self.d(x))

    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    seven, last = QuantizeMinmax(weight_bits=4, activation_bits=7), {"scale_learning_rate": 0.02}
    found = []
    for seed in range(4):
        one = Reconstruct(iterations=12, batch_size=4, seed=seed, **last)
        recipe = Recipe("test", (*BEFORE, seven, one))
        made = fxq.compile(Sums(), x, recipe, calibration=[x], check=False)
        found.append(disputes(made.artifact.integers))
    assert found == [[0, 0]] * 4
