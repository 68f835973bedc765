"""A network to quantize, and what to look at afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.passes import (
    Calibrate,
    FoldBatchNorm,
    InsertObservers,
    JoinBatchNorm,
    MarkRelu,
    QuantizeApot,
    QuantizeMinmax,
)
from fxq.passes.insert_observers import Statistics
from fxq.quant.learned_layers import LearnedLayer
from fxq.quant.learned_values import LearnedLevels, MovingRange
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer, rows

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Deep(nn.Module):
    """Four layers, so that two are neither first nor last; the third is depthwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 5, groups=8))
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.relu(self.first(x)))
        return self.head(self.relu(x).mean((2, 3)))


class Quantized:
    """A network after a quantize pass.

    Attributes:
        ran: What went through the passes.
        layers: Its layers with integer weights, by node.
        quantizers: Its quantizers, by node.
    """

    def __init__(self, ran: Any) -> None:
        self.ran, self.step = ran, ran.step
        modules = {node.name: ran.program.submodule(node) for node in ran.program.nodes()}
        self.layers = {n: m for n, m in modules.items() if isinstance(m, QuantizedLayer)}
        self.quantizers = {n: m for n, m in modules.items() if isinstance(m, ActivationQuantizer)}

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Quantizer to the ends of its grid."""
        ends = {}
        for name, quantizer in self.quantizers.items():
            zero, scale = int(quantizer.zero_point), float(quantizer.scale)
            ends[name] = (-zero * scale, (2**quantizer.bits - 1 - zero) * scale)
        return ends

    def before(self, name: str) -> Tensor:
        """``[out, taps]`` float64: the weights a layer had before."""
        layer: Any = self.ran.model.get_submodule(name.replace("body_", "body."))
        return rows(layer, layer.weight.detach()).double()

    def codes(self, name: str) -> Tensor:
        """``[out, taps]``: the codes of a layer."""
        return rows(self.layers[name].layer, self.layers[name].codes)

    def after(self, name: str) -> Tensor:
        """``[out, taps]`` float64: what the codes of a layer stand for."""
        return self.codes(name).double() * self.layers[name].scale.double().unsqueeze(1)


class Learning:
    """A network after quantize-apot.

    Attributes:
        ran: What went through the passes.
        layers: Its learned layers, by node.
        values: Its quantizers of values, by node.
        levels: Those of few bits.
    """

    def __init__(self, ran: Any) -> None:
        self.ran = ran
        modules = {node.name: ran.program.submodule(node) for node in ran.program.nodes()}
        self.layers = {n: m for n, m in modules.items() if isinstance(m, LearnedLayer)}
        self.levels = {n: m for n, m in modules.items() if isinstance(m, LearnedLevels)}
        kinds = (LearnedLevels, MovingRange)
        self.values = {n: m for n, m in modules.items() if isinstance(m, kinds)}

    def widths(self) -> dict[str, int]:
        """The bits of every value, by node."""
        return {name: module.bits for name, module in self.values.items()}


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture
def deep() -> nn.Module:
    """The network."""
    return Deep()


@pytest.fixture
def images() -> Tensor:
    """What it is calibrated on."""
    return IMAGES


@pytest.fixture
def trained(run_passes: Any) -> Callable[..., Any]:
    """Call it as ``trained(pass, model, x)``: the quantized model after the pass; None for none."""

    def run(one: Any, model: nn.Module, x: Any = IMAGES, **more: Any) -> Any:
        after = more.pop("after", QuantizeMinmax(weight_bits=3, activation_bits=4))
        observers = more.pop("observers", InsertObservers(statistics=Statistics.HISTOGRAM))
        passes = [FoldBatchNorm(), MarkRelu(), observers, Calibrate(), after]
        example = x[:2] if isinstance(x, Tensor) else x
        every = [*passes, one] if one else passes
        return run_passes(every, model, example, calibration=[x], check=False, **more)

    return run


@pytest.fixture
def quantized(run_passes: Any) -> Callable[..., Quantized]:
    """Call it as ``quantized(pass)``: the network after it, on histograms of the images."""

    def run(one: Any, model: Any = None, images: Tensor = IMAGES, **options: Any) -> Quantized:
        observers = options.pop("observers", InsertObservers(statistics=Statistics.HISTOGRAM))
        passes = [FoldBatchNorm(), MarkRelu(), observers, Calibrate(), one]
        return Quantized(
            run_passes(passes, model or Deep(), images[:2], calibration=[images], **options)
        )

    return run


@pytest.fixture
def learning(run_passes: Any) -> Callable[..., Learning]:
    """Call it as ``learning(model, weight_bits=…)``: the model after quantize-apot."""

    def run(model: nn.Module, x: Tensor = IMAGES, **options: Any) -> Learning:
        observers = options.pop("observers", InsertObservers(statistics=Statistics.HISTOGRAM))
        more = {name: options.pop(name) for name in ("layers", "check") if name in options}
        passes = [JoinBatchNorm(), MarkRelu(), observers, Calibrate(), QuantizeApot(**options)]
        return Learning(run_passes(passes, model.eval(), x[:2], calibration=[x], **more))

    return run
