"""mixed-precision: widths per layer, within the budget, that the quantize pass then follows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.errors import CalibrationError, RequirementError, SpecError
from fxq.models_zoo import tiny_concat, tiny_residual
from fxq.passes import (
    Calibrate,
    FoldBatchNorm,
    InsertObservers,
    MarkRelu,
    MixedPrecision,
    QuantizeAciq,
    QuantizeMinmax,
)
from fxq.passes.insert_observers import Statistics
from fxq.passes.mixed_precision import Budget
from fxq.passes.precision_parts import Cluster, Values, Weights
from fxq.pipeline import Pipeline
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer

BEFORE = (
    FoldBatchNorm(),
    MarkRelu(),
    InsertObservers(statistics=Statistics.HISTOGRAM),
    Calibrate(),
)
BOTH = pytest.mark.parametrize("budget", list(Budget))


class Chain(nn.Module):
    """Layers of very different size and sensitivity between two edges."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 4, 1)
        self.wide = nn.Conv2d(4, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.narrow, self.wide, self.down):
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


INNER = ("narrow", "wide", "down")


class Ran:
    """A network after the pass and a quantize pass."""

    def __init__(self, ran: Any) -> None:
        self.ran, self.program = ran, ran.program
        self.step = ran.journal["mixed-precision"]
        self.modules = {n.name: self.program.submodule(n) for n in self.program.nodes()}

    @property
    def weights(self) -> dict[str, int]:
        """Bits of the weights of every layer."""
        layers = {n: m for n, m in self.modules.items() if isinstance(m, QuantizedLayer)}
        for module in layers.values():
            assert int(module.bits.min()) == int(module.bits.max())
        return {name: int(module.bits.max()) for name, module in layers.items()}

    @property
    def read(self) -> dict[str, int]:
        """Bits of what every layer reads."""
        found = {}
        for name in self.weights:
            (source,) = self.program.node(name).all_input_nodes
            while not isinstance(self.modules[source.name], ActivationQuantizer):
                source = source.all_input_nodes[0]
            found[name] = self.modules[source.name].bits
        return found

    def size(self, name: str) -> int:
        return int(self.modules[name].codes.numel())


@pytest.fixture
def mixed(run_passes: Any, images: Tensor) -> Callable[..., Ran]:
    """Call it as ``mixed(MixedPrecision(…))``."""

    def run(one: MixedPrecision, model: nn.Module | None = None, **options: Any) -> Ran:
        before = options.pop("before", BEFORE)
        after = options.pop("after", QuantizeAciq())
        passes = [*before, one, after]
        calibration = fxq.calibration.CalibrationData([images])
        chosen = model or Chain()
        return Ran(run_passes(passes, chosen, images[:2], calibration=calibration, **options))

    return run


@pytest.mark.parametrize("mean_bits", [3.0, 4.0, 4.5, 6.0, 8.0])
def test_the_size_is_within_the_budget(mixed: Any, mean_bits: float) -> None:
    done = mixed(MixedPrecision(mean_bits=mean_bits))
    spent = sum(done.weights[name] * done.size(name) for name in INNER)
    room = mean_bits * sum(done.size(name) for name in INNER)
    assert spent <= room
    values = {"narrow": 8 * 64, "wide": 4 * 64, "down": 16 * 64}
    assert sum(done.read[n] * values[n] for n in INNER) <= mean_bits * sum(values.values())
    assert (done.weights["first"], done.weights["head"]) == (8, 8)
    assert done.step.hits == INNER


@pytest.mark.parametrize("mean_bits", [3.0, 4.0, 5.5])
def test_bit_operations_are_within_the_budget(mixed: Any, mean_bits: float) -> None:
    done = mixed(MixedPrecision(Budget.BIT_OPERATIONS, mean_bits=mean_bits))
    pixels = {"narrow": 64, "wide": 64, "down": 9}
    macs = {name: done.size(name) * pixels[name] for name in INNER}
    spent = sum(macs[name] * done.weights[name] * done.read[name] for name in INNER)
    uniform = sum(macs.values()) * mean_bits**2
    assert spent <= uniform
    note = next(note for note in done.step.notes if note.startswith("bit operations"))
    assert f"{spent / uniform:.1%}" in note


@BOTH
def test_the_sum_of_the_damages_is_the_smallest(budget: Budget) -> None:
    """Against every combination of widths."""
    torch.manual_seed(0)
    choices = (2, 3, 4)
    layers = []
    for operations in (700, 300, 900):
        layer = Weights([], nn.Linear(operations // 100, 3), operations)
        layer.losses = sorted(torch.rand(3).tolist(), reverse=True)
        layers.append(layer)
    values = [Values([], nn.Identity(), False, None, 40 * n) for n in (1, 2)]  # type: ignore[arg-type]
    for value in values:
        value.losses = sorted(torch.rand(3).tolist(), reverse=True)
    clusters = [Cluster(layers[:2], values[:1]), Cluster(layers[2:], values[1:])]
    one = MixedPrecision(budget, 3.0, choices)
    one._choose(clusters)
    found = [layer.bits for layer in layers] + [cluster.bits for cluster in clusters]

    def cost(bits: tuple[int, ...]) -> tuple[float, float]:
        read = (bits[3], bits[3], bits[4])
        if budget is Budget.BIT_OPERATIONS:
            return 0, sum(x.operations * w * a for x, w, a in zip(layers, bits, read, strict=False))
        stored = sum(v.size * a for v, a in zip(values, bits[3:], strict=True))
        return stored, sum(x.size * w for x, w in zip(layers, bits, strict=False))

    def loss(bits: tuple[int, ...]) -> float:
        return math.fsum(
            part.losses[choices.index(b)] for part, b in zip([*layers, *values], bits, strict=True)
        )

    room = cost((3,) * 5)
    within = [
        bits
        for bits in itertools.product(choices, repeat=5)
        if all(have <= most for have, most in zip(cost(bits), room, strict=True))
    ]
    assert loss(tuple(found)) == pytest.approx(min(map(loss, within)))
    assert tuple(found) in within


def test_sensitive_layers_get_more(mixed: Any) -> None:
    """One layer whose output is all that counts, one whose output hardly does."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.loud = nn.Conv2d(8, 8, 3, padding=1)
            self.quiet = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            x = self.loud(x) + 0.001 * self.quiet(x)
            return 9 * self.head(torch.relu(x).mean((2, 3)))

    done = mixed(MixedPrecision(activations=False), Uneven())
    assert done.weights["loud"] > done.weights["quiet"]
    assert done.weights["loud"] + done.weights["quiet"] <= 8


def test_layers_that_read_one_value_agree(mixed: Any) -> None:
    done = mixed(MixedPrecision(), tiny_residual())
    widths: dict[Any, set[int]] = {}
    for override in done.program.overrides:
        (source,) = done.program.node(override.pattern).all_input_nodes
        widths.setdefault(source, set()).add(override.options["activation_bits"])
    assert all(len(found) == 1 for found in widths.values())


@pytest.mark.parametrize("model", [tiny_residual, tiny_concat], ids=lambda one: one.__name__)
@BOTH
def test_the_quantize_pass_follows(mixed: Any, model: Any, budget: Budget) -> None:
    done = mixed(MixedPrecision(budget), model())
    overrides = {one.pattern: one.options for one in done.program.overrides}
    assert overrides
    for name, options in overrides.items():
        assert done.weights[name] == options["weight_bits"]
        assert done.read[name] == options["activation_bits"]


def test_what_the_user_gives_wins_and_costs_nothing(mixed: Any) -> None:
    done = mixed(MixedPrecision(), layers={"wide": {"weight_bits": 7}, "d*": {"weight_bits": 6}})
    assert (done.weights["wide"], done.weights["down"]) == (7, 6)
    assert done.weights["narrow"] == 4  # alone, it is the average
    assert done.step.hits == ("narrow",)
    assert done.step.notes[0].startswith("4 layers keep their bits")


def test_nothing_to_choose(mixed: Any) -> None:
    done = mixed(MixedPrecision(), layers={"*": {"weight_bits": 5}})
    assert set(done.weights.values()) == {5}
    assert (done.step.hits, len(done.step.notes)) == ((), 1)


def test_values_are_left_alone_on_request(mixed: Any) -> None:
    done = mixed(MixedPrecision(activations=False), after=QuantizeAciq(activation_bits=6))
    assert {done.read[name] for name in INNER} == {6}
    spent = sum(done.weights[name] * done.size(name) for name in INNER)
    assert spent <= 4 * sum(done.size(name) for name in INNER)
    operations = mixed(MixedPrecision(Budget.BIT_OPERATIONS, activations=False))
    assert {operations.read[name] for name in INNER} == {4}
    assert all("activation_bits" not in one.options for one in operations.program.overrides)


def test_ranges_will_do(mixed: Any) -> None:
    before = (FoldBatchNorm(), MarkRelu(), InsertObservers(), Calibrate())
    done = mixed(MixedPrecision(), before=before, after=QuantizeMinmax())
    assert {done.weights[name] for name in INNER} <= {3, 4, 5, 6, 8}


def test_a_layer_that_is_called_twice(mixed: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.shared(torch.relu(self.first(x))))
            return self.head(torch.relu(self.shared(x)).mean((2, 3)))

    done = mixed(MixedPrecision(), Twice())
    first, second = (one.options for one in done.program.overrides)
    assert first == second
    assert len(done.step.hits) == 2


def test_only_annotations_change(run_passes: Any, images: Tensor) -> None:
    data = fxq.calibration.CalibrationData([images])
    ran = run_passes([*BEFORE, MixedPrecision()], Chain(), images[:2], calibration=data)
    assert ran.step.sqnr == math.inf
    assert set(ran.step.delta.counts()) == {"noted"}
    assert "w4 a" in ran.text()
    assert ran.error(images) < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"choices": ()}, "different widths"),
        ({"choices": (4, 9)}, "different widths"),
        ({"choices": (4, 4)}, "different widths"),
        ({"choices": (4.0,)}, "different widths"),
        ({"choices": (True, 4)}, "different widths"),
        ({"mean_bits": 2.5}, "as small as 2.5 bits"),
        ({"mean_bits": math.nan}, "as small as nan bits"),
        ({"images": 0}, "at least 1"),
    ],
    ids=str,
)
def test_options_that_are_impossible(mixed: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        mixed(MixedPrecision(**options))
    assert "mixed-precision" in str(caught.value.where)


def test_the_smallest_budget_is_named(mixed: Any) -> None:
    with pytest.raises(SpecError) as caught:
        mixed(MixedPrecision(mean_bits=2.0))
    assert "smallest possible mean_bits is 3" in str(caught.value.hint)


def test_it_needs_calibration_and_data(run_passes: Any, images: Tensor) -> None:
    with pytest.raises(RequirementError, match="calibrate"):
        Pipeline(*BEFORE[:3], MixedPrecision()).run(fxq.capture(Chain(), images[:2]))
    ran = run_passes(BEFORE, Chain(), images[:2], calibration=[images])
    ran.program.calibration = None
    with pytest.raises(CalibrationError, match="no calibration data"):
        Pipeline(MixedPrecision()).run(ran.program)


def test_the_recipe(images: Tensor) -> None:
    result = fxq.compile(Chain(), images[:2], "mixed-4bit", calibration=[images])
    assert result.artifact.ledger.coverage() == 1.0
    assert torch.isfinite(result.module(images)).all()
    notes = result.journal["mixed-precision"].notes
    assert sum("on average" in note for note in notes) == 2
