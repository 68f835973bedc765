"""calibrate: the observers hold exactly the statistics of the batches, however they come."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxq.errors import CalibrationError, RequirementError
from fxq.graph.capture import capture
from fxq.graph.program import facts
from fxq.models_zoo import tiny_conv
from fxq.passes import Calibrate, FoldBatchNorm, InsertObservers, MarkRelu
from fxq.passes.insert_observers import Statistics
from fxq.pipeline import Pipeline
from fxq.quant.observers import Observer

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2
X = torch.randn(2, 3, 8, 8)


def calibrated(source: Any, model: nn.Module | None = None, x: Any = X, **options: Any) -> Any:
    """The program after calibration, and the journal."""
    batches = options.pop("batches", 0)
    program = capture(model or tiny_conv(), x)
    program.calibration = source
    program.progress = options.pop("progress", None)
    passes = [FoldBatchNorm(), MarkRelu(), InsertObservers(**options), Calibrate(batches=batches)]
    return program, Pipeline(*passes).run(program)


def statistics(program: Any) -> dict[str, dict[str, Tensor]]:
    return {
        name: dict(module.named_buffers())
        for name, module in program.module.named_modules()
        if isinstance(module, Observer)
    }


def labelled() -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, 12, 4):
        yield IMAGES[start : start + 4], torch.arange(4)


SOURCES = {
    "list": lambda: list(IMAGES.split(4)),
    "generator": lambda: (batch for batch in IMAGES.split(4)),
    "labelled": labelled,
    "lists of two": lambda: [[batch, torch.zeros(1)] for batch in IMAGES.split(4)],
    "loader": lambda: DataLoader(TensorDataset(IMAGES, torch.arange(12)), batch_size=4),
    "one batch": lambda: [IMAGES],
    "single images": lambda: IMAGES.split(1),
    "uneven": lambda: IMAGES.split(5),
    "shuffled": lambda: [IMAGES[[11, 3, 7]], IMAGES[[0, 1, 2, 4, 5, 6, 8, 9, 10]]],
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", Statistics)
def test_the_same_statistics_from_every_source(source: str, kind: Statistics) -> None:
    want = statistics(calibrated(IMAGES.split(3), statistics=kind)[0])
    got = statistics(calibrated(SOURCES[source](), statistics=kind)[0])
    assert want.keys() == got.keys()
    for name, buffers in want.items():
        for buffer, tensor in buffers.items():
            if buffer != "batches":
                torch.testing.assert_close(got[name][buffer], tensor, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", Statistics)
def test_statistics_are_those_of_the_values(kind: Statistics) -> None:
    program, _ = calibrated(IMAGES.split(4), statistics=kind)
    reference = capture(tiny_conv(), X)
    Pipeline(FoldBatchNorm()).run(reference)
    values: dict[str, Tensor] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Keep(reference.module).run(IMAGES)
    nodes = [node for node in program.nodes() if facts(node).observes]
    assert len(nodes) == 4
    for node in nodes:
        observer = program.submodule(node)
        watched = values[facts(node).observes].detach()
        assert int(observer.values) == watched.numel()
        low, high = observer.range()
        torch.testing.assert_close(low, watched.min(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(high, watched.max(), rtol=1e-6, atol=1e-6)
        if kind is Statistics.HISTOGRAM:
            exact = watched.double()
            torch.testing.assert_close(observer.mean(), exact.mean(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(observer.std(), exact.std(), rtol=1e-5, atol=1e-6)
            deviation = (exact - exact.mean()).abs().mean()
            torch.testing.assert_close(observer.abs_deviation(), deviation, rtol=1e-3, atol=1e-5)


def test_the_probe_batch_is_no_calibration_data() -> None:
    program = capture(tiny_conv(), X * 1000)
    program.calibration = [IMAGES]
    Pipeline(FoldBatchNorm(), InsertObservers(), Calibrate()).run(program)
    observer = program.submodule(program.node("x_observer"))
    assert int(observer.batches) == 1
    assert torch.equal(observer.range()[1], IMAGES.max())


def test_large_batches_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = calibrated([IMAGES], statistics=Statistics.HISTOGRAM)
    average, _ = calibrated([IMAGES], momentum=0.5)
    monkeypatch.setattr("fxq.passes.calibrate.PIECE_ELEMENTS", 3 * 8 * 8 * 5)
    sizes: list[int] = []
    program = capture(tiny_conv(), X)
    program.module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    program.calibration = [IMAGES]
    Pipeline(
        FoldBatchNorm(),
        MarkRelu(),
        InsertObservers(statistics=Statistics.HISTOGRAM),
        Calibrate(),
        check=False,
    ).run(program)
    assert sizes == [5, 5, 2]
    for name, held in statistics(program).items():
        for key in ("counts", "low", "high"):
            assert torch.equal(held[key], statistics(whole)[name][key])
    again, _ = calibrated([IMAGES], momentum=0.5)
    for name, held in statistics(again).items():
        assert torch.equal(held["high"], statistics(average)[name]["high"])


def test_a_moving_average_follows_the_batches() -> None:
    program, _ = calibrated(IMAGES.split(4), momentum=0.5)
    high = [batch.max() for batch in IMAGES.split(4)]
    want = 0.5 * (0.5 * high[0] + 0.5 * high[1]) + 0.5 * high[2]
    torch.testing.assert_close(program.submodule(program.node("x_observer")).range()[1], want)


def test_the_output_is_untouched_and_observers_are_off_afterwards() -> None:
    program, journal = calibrated([IMAGES])
    assert journal["calibrate"].sqnr == float("inf")
    before = statistics(program)["x_observer"]["batches"].clone()
    program.run(X * 9)
    assert statistics(program)["x_observer"]["batches"] == before
    assert journal["calibrate"].notes == ("1 batches, 12 images, 4 observers",)
    assert set(journal["calibrate"].delta.counts()) == {"retuned"}


def test_batches_limits_what_is_read() -> None:
    read = []

    def source() -> Iterator[Tensor]:
        for position, batch in enumerate(IMAGES.split(4)):
            read.append(position)
            yield batch

    program, journal = calibrated(source(), batches=2)
    assert read == [0, 1]
    assert journal["calibrate"].notes[0].startswith("2 batches, 8 images")
    assert torch.equal(statistics(program)["x_observer"]["high"], IMAGES[:8].max())


@pytest.mark.parametrize(
    ("source", "batches", "want"),
    [
        (list(IMAGES.split(4)), 0, [(1, 3), (2, 3), (3, 3)]),
        (list(IMAGES.split(4)), 2, [(1, 2), (2, 2)]),
        (iter(IMAGES.split(6)), 0, [(1, None), (2, None)]),
        (iter(IMAGES.split(6)), 9, [(1, 9), (2, 9)]),
    ],
)
def test_progress_is_reported(source: Any, batches: int, want: list[Any]) -> None:
    seen: list[tuple[str, int, int | None]] = []
    calibrated(source, batches=batches, progress=lambda *call: seen.append(call))
    assert seen == [("calibrate", *pair) for pair in want]


def test_no_batch_is_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def source() -> Iterator[Tensor]:
        for _ in range(6):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            batch = torch.randn(4, 3, 8, 8)
            alive.append(weakref.ref(batch))
            yield batch

    program, _ = calibrated(source())
    gc.collect()
    assert len(alive) == 6
    assert not any(ref() is not None for ref in alive)
    assert program.sample


def test_what_is_kept_for_later_passes_is_small_and_a_copy() -> None:
    buffer = torch.zeros(4, 3, 8, 8)

    def source() -> Iterator[Tensor]:
        for position in range(3):
            yield buffer.fill_(position)  # a loader that uses one buffer again and again

    program, _ = calibrated(source())
    assert [float(batch[0].mean()) for batch in program.sample] == [0.0, 1.0, 2.0]
    for (batch,) in program.sample:
        assert batch.untyped_storage().nbytes() == batch.numel() * 4


def test_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(x + y)

    batches = [(IMAGES[:4], IMAGES[4:8], torch.arange(4))]
    program, _ = calibrated(batches, Two(), (X, X))
    assert torch.equal(
        statistics(program)["add_observer"]["high"], (IMAGES[:4] + IMAGES[4:8]).max()
    )


# ---- errors ----------------------------------------------------------------------------------

NAN = IMAGES.clone()
NAN[3, 0, 0, 0] = float("nan")
WRONG = [
    ("none", None, "there is no calibration data", None),
    ("empty list", [], "0 batches were calibrated", None),
    ("spent generator", iter(()), "0 batches were calibrated", None),
    (
        "empty batch",
        [torch.zeros(0, 3, 8, 8)],
        "a calibration batch is empty",
        "batch 0, shape [0, ",
    ),
    ("NaN", [IMAGES, NAN], "a calibration batch holds NaN or infinity", "batch 1"),
    ("infinity", [IMAGES / 0], "a calibration batch holds NaN or infinity", "batch 0"),
    ("channels", [torch.zeros(1, 4, 8, 8)], "the model fails on a calibration batch: ", "[1, 4, 8"),
    ("dtype", [IMAGES.double()], "the model fails on a calibration batch: ", "calibration batch 0"),
    ("labels only", [3], "a calibration batch is a int; the model takes 1 inputs", None),
    ("a mapping", [{"x": IMAGES}], "a calibration batch is a dict", None),
    ("an empty tuple", [()], "a calibration batch is a tuple", None),
]


@pytest.mark.parametrize(("name", "source", "what", "where"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_data(name: str, source: Any, what: str, where: str | None) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrated(source)
    assert caught.value.what.startswith(what)
    assert where is None or where in caught.value.where
    assert caught.value.hint


def test_a_value_that_overflows_inside_the_network_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    model[0].weight.data *= 1e20
    with pytest.raises(CalibrationError, match="NaN or infinity") as caught:
        calibrated([IMAGES * 1e20], model)
    assert caught.value.where == "calibration batch 0"


def test_observers_are_off_after_a_failure() -> None:
    program = capture(tiny_conv(), X)
    program.calibration = [torch.zeros(1, 4, 8, 8)]
    with pytest.raises(CalibrationError):
        Pipeline(InsertObservers(), Calibrate()).run(program)
    assert not any(m.enabled for m in program.module.modules() if isinstance(m, Observer))


def test_calibrate_needs_observers() -> None:
    with pytest.raises(RequirementError, match="calibrate needs insert-observers"):
        Pipeline(Calibrate()).run(capture(tiny_conv(), X))
