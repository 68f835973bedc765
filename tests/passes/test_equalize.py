"""equalize: the output stays, the channels become alike, and every refusal says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxq
from fxq.contracts import Contract
from fxq.errors import CalibrationError, SpecError
from fxq.graph.capture import capture
from fxq.graph.program import facts
from fxq.integer.reference import Reference
from fxq.passes import Calibrate, Equalize, FoldBatchNorm, InsertObservers, MarkRelu, QuantizeMinmax
from fxq.passes.equalize import Bounded, By
from fxq.pipeline import Pipeline

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
UNEVEN = torch.logspace(-2, 2, 8)
WEIGHTS = Equalize(by=By.WEIGHTS)
ACTIVATIONS = Equalize()
CLIP = Equalize(bounded=Bounded.CLIP)

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Layers whose channels differ in range by four decades."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.twin = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.mid = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.deep = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.split = nn.Conv2d(8, 8, 1, groups=2)
        self.merge, self.last = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)
        self.wide, self.head = nn.Linear(512, 8), nn.Linear(8, 5)
        self.relu, self.relu6 = nn.ReLU(), nn.ReLU6()
        for layer in (self.first, self.twin, self.mid, self.split):
            layer.weight.data *= UNEVEN.view(-1, 1, 1, 1)
            if layer.bias is not None:
                layer.bias.data *= UNEVEN
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


STRUCTURES: dict[str, tuple[Forward, int]] = {
    "plain": (lambda n, x: n.last(n.relu(n.mid(n.relu(n.first(x))))), 2),
    "residual": (
        lambda n, x: n.last(n.relu((y := n.relu(n.first(x))) + n.split(n.relu(n.mid(y))))),
        3,
    ),
    "twins": (lambda n, x: n.last(n.relu(n.first(x) + n.twin(x))), 2),
    "depthwise": (lambda n, x: n.last(n.merge(n.relu(n.deep(n.relu(n.first(x)))))), 3),
    "grouped": (lambda n, x: n.last(F.max_pool2d(n.relu(n.split(n.relu(n.first(x)))), 2)), 2),
    "padded and pooled": (lambda n, x: n.last(F.avg_pool2d(F.pad(n.first(x), (1, 1, 1, 1)), 2)), 1),
    "flattened": (lambda n, x: n.head(n.relu(n.wide(n.relu(n.first(x)).flatten(1)))), 2),
    "global pool": (lambda n, x: n.head(n.relu(n.first(x)).mean((2, 3))), 1),
    "concatenated": (lambda n, x: n.last(n.merge(torch.cat([n.first(x), n.twin(x)], 1))), 1),
}


def weights_of(ran: Any, name: str) -> tuple[Tensor, Tensor | None]:
    layer = ran.program.module.get_submodule(name)
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def run(one: Equalize, forward: Forward, run_passes: Any, *before: Any) -> Any:
    model = Net(forward).eval()
    return run_passes([*before, one], model, IMAGES[:2], calibration=[IMAGES[:16], IMAGES[16:]])


@pytest.mark.parametrize(
    "one", [WEIGHTS, ACTIVATIONS, CLIP], ids=["weights", "activations", "clip"]
)
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_output_stays(name: str, one: Equalize, run_passes: Any) -> None:
    forward, layers = STRUCTURES[name]
    ran = run(one, forward, run_passes)
    assert ran.error(torch.randn(4, 3, 8, 8)) < 1e-5
    assert len(ran.step.hits) == layers
    assert set(ran.step.delta.counts()) == {"retuned"}
    for node in ran.step.hits:
        before = ran.model.get_submodule(node).weight
        assert not torch.allclose(weights_of(ran, node)[0], before)


@given(st.lists(st.floats(-3, 3), min_size=8, max_size=8), st.sampled_from(list(STRUCTURES)))
def test_no_scale_of_a_channel_matters(exponents: list[float], name: str) -> None:
    model = Net(STRUCTURES[name][0]).eval()
    factor = 10.0 ** torch.tensor(exponents)
    model.first.weight.data *= factor.view(-1, 1, 1, 1)
    program = capture(model, IMAGES[:2])
    program.calibration = [IMAGES]
    for one in (ACTIVATIONS, WEIGHTS):
        Pipeline(one).run(program)  # its contract is same-numbers, checked on the probe


def test_rows_equal_columns_after_weights(run_passes: Any) -> None:
    ran = run(WEIGHTS, STRUCTURES["depthwise"][0], run_passes)
    (first, _), (deep, _), (merge, _) = (weights_of(ran, n) for n in ("first", "deep", "merge"))
    rows, columns = first.flatten(1).abs().amax(1), deep.reshape(8, -1).abs().amax(1)
    assert torch.allclose(rows, columns, rtol=5e-3)
    rows, columns = deep.flatten(1).abs().amax(1), merge.abs().amax((0, 2, 3))
    assert torch.allclose(rows, columns, rtol=5e-3)


def test_all_channels_reach_a_depthwise_layer_alike(run_passes: Any) -> None:
    ran = run(Equalize(strength=0.2), STRUCTURES["depthwise"][0], run_passes)
    weight, bias = weights_of(ran, "first")
    ranges = F.relu(F.conv2d(IMAGES, weight, bias, padding=1)).amax((0, 2, 3))
    assert torch.allclose(ranges, ranges.max().expand(8), rtol=1e-4)
    before = F.relu(ran.model.first(IMAGES)).detach().amax((0, 2, 3))
    assert float(ranges.max()) == pytest.approx(float(before.max()))
    assert float(before.max() / before.min()) > 1000


def test_free_only_scales_what_depthwise_layers_read_and_nothing_else(run_passes: Any) -> None:
    forward = STRUCTURES["depthwise"][0]
    plain = run_passes([FoldBatchNorm()], Net(forward).eval(), IMAGES[:2]).program
    ran = run(Equalize(free_only=True), forward, run_passes)
    assert any("free_only" in miss.why for miss in ran.step.misses)
    assert ran.step.hits
    for node in plain.nodes():
        before, after = plain.submodule(node), ran.program.submodule(ran.program.node(node.name))
        if isinstance(before, nn.Linear):
            assert torch.equal(before.weight, after.weight)


def test_strength_is_shared_between_activations_and_columns(run_passes: Any) -> None:
    forward = STRUCTURES["plain"][0]

    def spread(strength: float) -> tuple[float, float]:
        ran = run(Equalize(strength=strength), forward, run_passes)
        (weight, bias), (mid, _) = weights_of(ran, "first"), weights_of(ran, "mid")
        ranges = F.relu(F.conv2d(IMAGES, weight, bias, padding=1)).amax((0, 2, 3))
        columns = mid.abs().amax((0, 2, 3))
        return float(ranges.max() / ranges.min()), float(columns.max() / columns.min())

    assert spread(1.0)[0] == pytest.approx(1, abs=1e-3)
    assert spread(0.0)[1] == pytest.approx(1, abs=1e-3)
    ranges, columns = spread(0.5)
    assert ranges > 1.5
    assert columns > 1.5


def test_dead_channels_are_left_alone(run_passes: Any) -> None:
    model = Net(STRUCTURES["plain"][0]).eval()
    model.first.weight.data[2], model.first.bias.data[2] = 0, -1
    model.mid.weight.data[:, 5] = 0
    for one in (WEIGHTS, ACTIVATIONS):
        ran = run_passes([one], model, IMAGES[:2], calibration=[IMAGES])
        assert float(weights_of(ran, "first")[1][2]) == -1
        assert ran.error(IMAGES) < 1e-5


def test_batch_norms_are_folded_first(run_passes: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model[1].running_var.copy_(UNEVEN)
    options = {"calibration": [IMAGES]}
    assert not run_passes([WEIGHTS], model, IMAGES[:2], **options).step.hits
    folded = run_passes([FoldBatchNorm(), MarkRelu(), WEIGHTS], model, IMAGES[:2], **options)
    assert folded.step.hits == ("_0",)


# ---- bounded ReLUs ---------------------------------------------------------------------------


def test_what_a_batch_norm_said_still_holds(run_passes: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()
    ).eval()
    model[1].bias.data.uniform_(0.5, 2)
    plain, even = (
        run_passes([FoldBatchNorm(), *more], model, IMAGES[:2], calibration=[IMAGES]).program
        for more in ((), (ACTIVATIONS,))
    )
    known = [facts(program.node("_0")) for program in (plain, even)]
    ratio = torch.tensor(known[1].norm_mean) / torch.tensor(known[0].norm_mean)
    weights = [program.module.get_submodule("0").weight for program in (plain, even)]
    assert not torch.allclose(ratio, torch.ones(8))
    torch.testing.assert_close(ratio, (weights[1] / weights[0])[:, 0, 0, 0])
    spread = torch.tensor(known[1].norm_std) / torch.tensor(known[0].norm_std)
    torch.testing.assert_close(spread, ratio)


def bounded(n: Any, x: Tensor) -> Tensor:
    return n.last(n.relu6(n.first(x)))  # type: ignore[no-any-return]


def test_a_bound_is_kept_unless_told(run_passes: Any) -> None:
    ran = run(ACTIVATIONS, bounded, run_passes)
    assert not ran.step.hits
    why = "a ReLU bounds it at 6, which a factor per channel would move"
    assert ran.why("first") == [why]
    assert ran.error(IMAGES) == 0


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_clipped_bound_cuts_nothing_seen(strength: float, run_passes: Any) -> None:
    ran = run(Equalize(strength=strength, bounded=Bounded.CLIP), bounded, run_passes)
    assert ran.step.hits == ("first",)
    assert ran.error(IMAGES) < 1e-5
    weight, bias = weights_of(ran, "first")
    before = ran.model.first.weight.detach()
    scale = before.flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
    seen = ran.model.relu6(ran.model.first(IMAGES)).amax((0, 2, 3))
    assert bool((scale <= 1 + 1e-6).all())
    assert bool((6 * scale >= seen * (1 - 1e-6)).all())
    assert float(scale.min()) < (0.1 if strength else 0.9)
    assert torch.allclose(bias * scale, ran.model.first.bias.detach())


def test_a_clipped_bound_cuts_what_was_never_seen(run_passes: Any) -> None:
    one = Equalize(strength=1.0, bounded=Bounded.CLIP)
    assert one.promise is Contract.CHANGES_NUMBERS
    assert Equalize().promise is WEIGHTS.promise is Contract.SAME_NUMBERS
    assert run(one, bounded, run_passes).error(50 * IMAGES) > 1e-3


# ---- refusals and errors ---------------------------------------------------------------------


def test_refusals_are_told(run_passes: Any) -> None:
    ran = run(ACTIVATIONS, STRUCTURES["concatenated"][0], run_passes)
    why = "%cat (cat): it does not keep channels in place"
    assert ran.why("first") == ran.why("twin") == ran.why("cat") == [why]
    assert ran.why("x") == ["%x is an input of the network"]
    assert ran.why("last") == ["it is an output of the network"]


def test_a_note_says_how_uneven_channels_were(run_passes: Any) -> None:
    (note,) = run(Equalize(strength=1.0), STRUCTURES["plain"][0], run_passes).step.notes
    assert note.startswith("2 channel spaces: the largest channel was ")
    assert note.endswith(" times the median channel, and is 1 times")


def test_weights_need_no_images(run_one: Any) -> None:
    assert WEIGHTS.wants_images == 0
    assert ACTIVATIONS.wants_images == 64
    model = Net(STRUCTURES["plain"][0]).eval()
    assert run_one(WEIGHTS, model, IMAGES[:2]).step.hits
    with pytest.raises(CalibrationError, match="no calibration data"):
        run_one(ACTIVATIONS, model, IMAGES[:2])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 3, 8, 8), float("nan")), "NaN or infinite"),
        (torch.zeros(2, 4, 8, 8), "fails on a calibration batch"),
    ],
)
def test_unusable_images(images: Tensor, message: str, run_one: Any) -> None:
    model = Net(STRUCTURES["plain"][0]).eval()
    with pytest.raises(CalibrationError, match=message):
        run_one(ACTIVATIONS, model, IMAGES[:2], calibration=[images])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "strength must be 0 to 1"),
        ({"images": 0}, "images must be at least 1"),
        ({"by": By.WEIGHTS, "bounded": Bounded.CLIP}, "where a bounded ReLU may cut"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Equalize(**options)


# ---- integers --------------------------------------------------------------------------------


def test_integers_stay_exact_and_lose_less() -> None:
    model = Net(STRUCTURES["depthwise"][0]).eval()
    passes = (FoldBatchNorm(), MarkRelu(), InsertObservers(), Calibrate(), QuantizeMinmax())
    plain, even = (
        fxq.compile(model, IMAGES[:2], Pipeline(*front, *passes), calibration=[IMAGES])
        for front in ((), (ACTIVATIONS,))
    )
    assert torch.equal(even.module(IMAGES), Reference(even.artifact.integers)(IMAGES))
    with torch.no_grad():
        want = model(IMAGES)
    errors = [float((r.module(IMAGES) - want).norm() / want.norm()) for r in (plain, even)]
    assert errors[1] < errors[0]
