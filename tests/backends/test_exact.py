"""Engine fbgemm equals the integer reference in every element of every register."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.contracts import output_sqnr
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual

TINY = {
    "conv": (tiny_conv, (3, 8, 8)),
    "residual": (tiny_residual, (3, 8, 8)),
    "depthwise": (tiny_depthwise, (3, 8, 8)),
    "concat": (tiny_concat, (3, 8, 8)),
    "mlp": (tiny_mlp, (16,)),
}
BITS = range(2, 9)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build().eval()


class Lambda(nn.Module):
    """Layers, and a forward over them."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# ---- the zoo ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-8bit", "aciq-4bit"])
@pytest.mark.parametrize("name", TINY)
def test_tiny_networks(name: str, recipe: str, integers, mismatches) -> None:
    build, shape = TINY[name]
    x = images(4, *shape)
    program = integers(build(), x, recipe).artifact.integers
    assert mismatches(program, x * 1.5) == {}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-4bit"])
@pytest.mark.parametrize("name", TINY)
def test_all_bits(name: str, recipe: str, bits: int, integers, mismatches) -> None:
    build, shape = TINY[name]
    x = images(3, *shape)
    use = "quantize-minmax" if recipe == "minmax-int8" else "quantize-aciq"
    settings = [f"{use}.weight_bits={bits}", f"{use}.activation_bits={10 - bits}"]
    settings += [f"{use}.first_last_bits=0", f"{use}.addend_bits={bits}"]
    program = integers(build(), x, recipe, tuple(settings)).artifact.integers
    assert mismatches(program, x * 1.5) == {}
    for step in program:
        assert step.grid is None or step.grid.bits in (bits, 10 - bits, max(bits, 10 - bits))


# ---- every layer -----------------------------------------------------------------------------

_CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 8, 3, padding=1), (3, 20)),
    "1d-stride-dilation": (lambda: nn.Conv1d(4, 6, 3, 2, 2, 2), (4, 21)),
    "1d-grouped": (lambda: nn.Conv1d(4, 8, 5, groups=2), (4, 21)),
    "1d-depthwise": (lambda: nn.Conv1d(8, 8, 3, padding=1, groups=8), (8, 21)),
    "2d-pointwise": (lambda: nn.Conv2d(5, 7, 1), (5, 6, 7)),
    "2d-3x3": (lambda: nn.Conv2d(3, 16, 3, padding=1), (3, 9, 9)),
    "2d-5x3": (lambda: nn.Conv2d(3, 9, (5, 3), (2, 1), (2, 1)), (3, 11, 9)),
    "2d-dilated": (lambda: nn.Conv2d(3, 8, 3, padding=2, dilation=2), (3, 9, 9)),
    "2d-stride": (lambda: nn.Conv2d(3, 8, 3, stride=3, padding=1), (3, 10, 10)),
    "2d-grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (8, 7, 7)),
    "2d-groups-of-4": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=8), (32, 7, 7)),
    "2d-groups-of-16": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=4), (64, 5, 5)),
    "2d-depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (16, 7, 7)),
    "2d-depthwise-odd": (lambda: nn.Conv2d(13, 13, 3, padding=1, groups=13), (13, 7, 7)),
    "2d-depthwise-5x5": (lambda: nn.Conv2d(16, 16, 5, 2, 2, groups=16), (16, 9, 9)),
    "2d-depthwise-dilated": (lambda: nn.Conv2d(8, 8, 3, 1, 2, 2, groups=8), (8, 9, 9)),
    "2d-depthwise-multiplied": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8), (8, 9, 9)),
    "2d-same-even": (lambda: nn.Conv2d(3, 8, 4, padding="same"), (3, 9, 9)),
    "2d-same-even-odd": (lambda: nn.Conv2d(3, 8, (2, 3), padding="same"), (3, 9, 9)),
    "2d-same-dilated": (lambda: nn.Conv2d(3, 8, 2, padding="same", dilation=3), (3, 9, 9)),
    "2d-valid": (lambda: nn.Conv2d(3, 8, 3, padding="valid"), (3, 9, 9)),
    "2d-no-bias": (lambda: nn.Conv2d(3, 8, 3, bias=False), (3, 9, 9)),
    "2d-one-channel": (lambda: nn.Conv2d(1, 1, 3), (1, 9, 9)),
    "2d-1x1-image": (lambda: nn.Conv2d(6, 5, 1), (6, 1, 1)),
    "2d-3x3-on-1x1": (lambda: nn.Conv2d(6, 5, 3, padding=1), (6, 1, 1)),
    "3d": (lambda: nn.Conv3d(2, 6, 3, padding=1), (2, 5, 6, 7)),
    "3d-stride": (lambda: nn.Conv3d(3, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1)), (3, 4, 7, 7)),
    "3d-depthwise": (lambda: nn.Conv3d(8, 8, 3, padding=1, groups=8), (8, 4, 5, 5)),
    "linear": (lambda: nn.Linear(13, 7), (13,)),
    "linear-no-bias": (lambda: nn.Linear(13, 7, bias=False), (13,)),
    "linear-3d": (lambda: nn.Linear(13, 7), (5, 13)),
    "linear-4d": (lambda: nn.Linear(13, 7), (2, 5, 13)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("relu", [nn.Identity, nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("layer", _CONVS)
def test_layers(layer: str, relu: type[nn.Module], bits: int, integers, mismatches) -> None:
    """A layer whose output is quantized, between two others so that both its grids are coarse."""
    build, shape = _CONVS[layer]
    net = seeded(lambda: nn.Sequential(build(), relu()))
    channels = len(shape) > 1 and "linear" not in layer
    middle = net(torch.zeros(1, *shape)).shape[1 if channels else -1]
    kind = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}.get(len(shape)) if channels else None
    last = seeded(lambda: nn.Linear(middle, 4) if kind is None else kind(middle, 4, 1))
    x = images(2, *shape)
    settings = [f"quantize-minmax.{name}_bits={bits}" for name in ("weight", "activation")]
    settings.append("quantize-minmax.first_last_bits=0")
    model = nn.Sequential(net, last)
    result = integers(model, x, "minmax-int8", tuple(settings))
    assert mismatches(result.artifact.integers, x * 1.5) == {}
    assert mismatches(result.artifact.integers, x[:1]) == {}
    assert result.artifact.ledger.coverage() == 1.0


_NETS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], tuple[int, ...]]] = {
    "add": (lambda m, x: m.last(m.a(x) + m.b(x)), (8, 6, 6)),
    "add-relu": (lambda m, x: m.last(torch.relu(m.a(x) + m.b(x))), (8, 6, 6)),
    "add-relu6": (lambda m, x: m.last(F.relu6(m.a(x) + m.b(x))), (8, 6, 6)),
    "add-itself": (lambda m, x: m.last((y := m.a(x)) + y), (8, 6, 6)),
    "unfused-relu": (lambda m, x: m.last(torch.relu(y := m.a(x)) + m.b(y)), (8, 6, 6)),
    "unfused-relu6": (lambda m, x: m.last(F.relu6(y := m.a(x)) + m.b(y)), (8, 6, 6)),
    "cat-shared": (lambda m, x: m.wide(torch.cat([m.a(x), torch.relu(m.b(x))], 1)), (8, 6, 6)),
    "cat-requantized": (
        lambda m, x: m.wide(torch.cat([y := m.a(x), m.b(torch.relu(y))], 1)),
        (8, 6, 6),
    ),
    "cat-twice": (lambda m, x: m.wide(torch.cat([y := m.a(x), y], 1)), (8, 6, 6)),
    "cat-rows": (lambda m, x: m.last(torch.cat([m.a(x), m.b(x)], dim=-1)), (8, 6, 6)),
    "max-pool": (lambda m, x: m.last(F.max_pool2d(m.a(x), 3, 2, 1)), (8, 7, 7)),
    "max-pool-ceil": (lambda m, x: m.last(F.max_pool2d(m.a(x), 2, ceil_mode=True)), (8, 7, 7)),
    "max-pool-dilated": (lambda m, x: m.last(F.max_pool2d(m.a(x), 2, 1, 0, 2)), (8, 7, 7)),
    "avg-pool": (lambda m, x: m.last(F.avg_pool2d(m.a(x), 2)), (8, 6, 6)),
    "avg-pool-padded": (lambda m, x: m.last(F.avg_pool2d(m.a(x), 3, 2, 1)), (8, 7, 7)),
    "avg-pool-relu": (lambda m, x: m.last(torch.relu(F.avg_pool2d(m.a(x), 2))), (8, 6, 6)),
    "adaptive-even": (lambda m, x: m.last(F.adaptive_avg_pool2d(m.a(x), (3, 2))), (8, 6, 6)),
    "global-pool": (lambda m, x: m.last(F.adaptive_avg_pool2d(m.a(x), 1)), (8, 6, 5)),
    "mean": (lambda m, x: m.fc(m.a(x).mean((2, 3))), (8, 6, 5)),
    "mean-keep": (lambda m, x: m.last(torch.mean(m.a(x), (-1, -2), keepdim=True)), (8, 6, 5)),
    "flatten": (lambda m, x: m.fc(torch.flatten(m.a(x), 1)), (8, 1, 1)),
    "reshape": (lambda m, x: m.fc(m.a(x).reshape(-1, 8)), (8, 3, 2)),
    "view-of-size": (lambda m, x: m.fc(m.a(x).view(x.size(0), -1)), (8, 1, 1)),
    "permute": (lambda m, x: m.fc(m.a(x).permute(0, 2, 3, 1)), (8, 3, 2)),
    "transpose": (lambda m, x: m.last(m.a(x).transpose(2, 3)), (8, 3, 2)),
    "tokens": (lambda m, x: m.fc(m.a(x).flatten(2).transpose(1, 2)), (8, 3, 2)),
    "chunk": (lambda m, x: m.last(torch.cat([(y := m.a(x).chunk(2, 1))[1], y[0]], 1)), (8, 4, 4)),
    "chunk-in-float": (lambda m, x: m.last(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), (8, 4, 4)),
    "split": (lambda m, x: m.thin(m.a(x).split(4, dim=1)[1]), (8, 4, 4)),
    "getitem": (lambda m, x: m.last(m.a(x)[:, :, ::2, 1:]), (8, 5, 5)),
    "shuffle": (lambda m, x: m.last(_shuffle(m.a(x))), (8, 4, 4)),
    "pixel-shuffle": (lambda m, x: m.quarter(F.pixel_shuffle(m.a(x), 2)), (8, 4, 4)),
    "pad": (lambda m, x: m.last(F.pad(m.a(x), (1, 2, 0, 3))), (8, 4, 4)),
    "crop": (lambda m, x: m.last(F.pad(m.a(x), (-1, 0, 0, -1))), (8, 4, 4)),
    "pad-pool": (lambda m, x: m.last(F.max_pool2d(F.pad(m.a(x), (0, 1, 0, 1)), 2)), (8, 5, 5)),
    "relu-pad-pool": (
        lambda m, x: m.last(F.max_pool2d(F.pad(torch.relu(m.a(x)), (0, 1, 0, 1)), 2)),
        (8, 5, 5),
    ),
    "two-outputs": (lambda m, x: (m.a(y := m.b(x)), m.last(y)), (8, 4, 4)),
    "output-is-codes": (lambda m, x: torch.relu(m.a(x)), (8, 4, 4)),
    "linear-relu6": (lambda m, x: F.relu6(m.fc(m.a(x).mean((2, 3)))), (8, 4, 4)),
}


def _shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def network(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    net = seeded(
        lambda: Lambda(
            forward,
            a=nn.Conv2d(8, 8, 3, padding=1),
            b=nn.Conv2d(8, 8, 1),
            last=nn.Conv2d(8, 5, 1),
            wide=nn.Conv2d(16, 5, 1),
            thin=nn.Conv2d(4, 5, 1),
            quarter=nn.Conv2d(2, 5, 1),
            fc=nn.Linear(8, 4),
        )
    )
    with torch.no_grad():
        net.a.weight *= 12  # beyond the bound of a ReLU6
    return net


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", _NETS)
def test_networks(name: str, bits: int, integers, mismatches) -> None:
    forward, shape = _NETS[name]
    x = images(2, *shape)
    settings = [
        f"quantize-minmax.{kind}_bits={bits}" for kind in ("weight", "activation", "addend")
    ]
    settings.append("quantize-minmax.first_last_bits=0")
    result = integers(network(forward), x, "minmax-int8", tuple(settings))
    program = result.artifact.integers
    assert mismatches(program, x * 1.5) == {}
    assert mismatches(program, images(3, *shape, seed=9)) == {}
    assert mismatches(program, x[:1]) == {}
    simulated, exact = result.program.run(x), Reference(program)(x)
    assert output_sqnr(simulated, exact) > (35 if bits == 8 else 12)


def test_a_bounded_relu_keeps_its_bound_on_a_wider_grid(integers, mismatches) -> None:
    """A concatenation may share a grid that goes beyond the bound of one of its branches."""
    net = network(lambda m, x: m.wide(torch.cat([F.relu6(m.a(x)), torch.relu(m.c(x))], 1)))
    net.c = seeded(lambda: nn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():
        net.c.weight *= 50
    x = images(4, 8, 6, 6)
    result = integers(net, x)
    program = result.artifact.integers
    bounded = next(step for step in program if step.op == "relu")
    codes = Reference(program).run(x)[1][bounded.name]
    assert int(codes.max()) == bounded.attributes["top"] < bounded.grid.top
    assert bounded.grid.scale * int(codes.max()) == pytest.approx(6, abs=bounded.grid.scale)
    assert mismatches(program, x) == {}
    assert output_sqnr(result.program.run(x), result.module(x)) > 30


def test_a_bounded_relu_at_the_output_keeps_its_bound(integers) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU6()))
    with torch.no_grad():
        net[0].weight *= 60
    x = images(8, 8)
    result = integers(net, x)
    assert float(result.module(x).max()) == 6.0
    assert output_sqnr(net(x).detach(), result.module(x)) > 30
