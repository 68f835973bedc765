from __future__ import annotations

import copy
import doctest
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, fx, nn

from fxq.errors import CalibrationError, SpecError
from fxq.quant.observers import HistogramObserver, Observer, RangeObserver


def batches(count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 4, 4, generator=generator) * (i + 1) for i in range(count)]


def fed(observer: Observer, data: list[Tensor]) -> Observer:
    for x in data:
        observer(x)
    return observer


KINDS = [
    pytest.param(lambda: RangeObserver(), id="range"),
    pytest.param(lambda: RangeObserver(3), id="range-per-channel"),
    pytest.param(lambda: HistogramObserver(), id="histogram"),
    pytest.param(lambda: HistogramObserver(3), id="histogram-per-channel"),
]


def assert_equal_buffers(one: Observer, other: Observer) -> None:
    for name, tensor in one.named_buffers():
        if tensor.dtype == torch.float64:  # sums: the order may show in the last bits
            torch.testing.assert_close(tensor, other.get_buffer(name), rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(tensor, other.get_buffer(name)), name


def test_examples() -> None:
    result = doctest.testmod(importlib.import_module("fxq.quant.observers"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("build", KINDS)
def test_forward_is_the_identity_and_enabled_decides(build: Any) -> None:
    observer = build()
    x = batches(1)[0].requires_grad_()
    assert observer(x) is x
    assert int(observer.batches) == 1
    assert int(observer.values) == x.numel()
    before = copy.deepcopy(observer.state_dict())
    observer.enabled = False
    assert observer(x * 100) is not None
    assert all(torch.equal(before[name], t) for name, t in observer.state_dict().items())
    assert not any(buffer.requires_grad for buffer in observer.buffers())


@pytest.mark.parametrize("build", KINDS)
def test_merge_equals_seeing_everything(build: Any) -> None:
    data = batches(5)
    whole = fed(build(), data)
    parts = [fed(build(), data[:2]), fed(build(), data[2:]), build()]
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        merged = build()
        for index in order:
            assert merged.merge_(parts[index]) is merged
        assert_equal_buffers(merged, whole)


@pytest.mark.parametrize("build", KINDS)
def test_range_is_exact(build: Any) -> None:
    data = batches()
    observer = fed(build(), data)
    everything = torch.cat(data)
    low, high = observer.range()
    if observer.channels is None:
        assert (low, high) == (everything.min(), everything.max())
    else:
        assert torch.equal(low, everything.amin((0, 2, 3)))
        assert torch.equal(high, everything.amax((0, 2, 3)))


@pytest.mark.parametrize("channels", [None, 3])
def test_histogram_statistics(channels: int | None) -> None:
    data = batches()
    observer = HistogramObserver(channels)
    fed(observer, data)
    x = torch.cat(data).double()
    rows = x.movedim(1, 0).flatten(1) if channels else x.reshape(1, -1)
    mean = rows.mean(1)
    shape = (channels,) if channels else ()
    for got, wanted in (
        (observer.mean(), mean),
        (observer.std(), rows.std(1)),
        (observer.abs_deviation(), (rows - mean.unsqueeze(1)).abs().mean(1)),
        (observer.quantile(1.0), rows.amax(1)),
    ):
        assert got.shape == shape
        torch.testing.assert_close(got, wanted.view(shape), atol=0.01, rtol=0.005)


def test_momentum_weights_the_old_range() -> None:
    observer = RangeObserver(momentum=0.9)
    for low, high in ((-1.0, 1.0), (-2.0, 3.0)):
        observer(torch.tensor([low, high]))
    assert [end.item() for end in observer.range()] == pytest.approx([-1.1, 1.2])
    other = RangeObserver(momentum=0.9)
    other(torch.tensor([-4.4, 4.8]))
    observer.merge_(other)  # two batches against one
    assert [end.item() for end in observer.range()] == pytest.approx([-2.2, 2.4])
    assert observer.merge_(RangeObserver(momentum=0.9)).range()[0].item() == pytest.approx(-2.2)


@pytest.mark.parametrize("build", KINDS)
def test_state_dict_copy_and_pickle_keep_everything(build: Any) -> None:
    data = batches()
    observer = fed(build(), data[:2])
    restored = build()
    restored.load_state_dict(observer.state_dict())
    twins = [restored, copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))]
    for twin in twins:
        fed(twin, data[2:])
    fed(observer, data[2:])
    for twin in twins:
        assert_equal_buffers(twin, observer)


def test_inference_mode_and_outside_mix() -> None:
    observer = HistogramObserver()
    with torch.inference_mode():
        observer(torch.ones(3))
    observer(torch.zeros(3))
    with torch.inference_mode():
        observer(torch.ones(3) * 100)
    assert observer.mean().item() == pytest.approx(303 / 9, abs=1e-3)


def test_misuse() -> None:
    for observer in (RangeObserver(), HistogramObserver()):
        assert observer.is_empty
        with pytest.raises(CalibrationError):
            observer.range()
        for bad in (torch.zeros(0), torch.tensor([torch.nan]), torch.tensor([torch.inf])):
            with pytest.raises(CalibrationError):
                observer(bad)
        assert observer.is_empty
    for per_channel in (RangeObserver(3), HistogramObserver(3)):
        with pytest.raises(CalibrationError, match="3 channels"):
            per_channel(torch.zeros(2, 4))
    with pytest.raises(CalibrationError, match="cannot merge"):
        HistogramObserver().merge_(RangeObserver())
    with pytest.raises(CalibrationError, match="cannot merge"):
        fed(RangeObserver(), batches(1)).merge_(fed(RangeObserver(momentum=0.5), batches(1)))
    for statistic in ("mean", "std", "abs_deviation"):
        with pytest.raises(CalibrationError, match="HistogramObserver"):
            getattr(RangeObserver(), statistic)()
    for momentum in (-0.1, 1.0):
        with pytest.raises(SpecError):
            RangeObserver(momentum=momentum)


def test_repr_is_short() -> None:
    observer = HistogramObserver(3)
    assert repr(observer) == "HistogramObserver(per-channel(3), batches=0)"
    observer.enabled = False
    assert repr(observer) == "HistogramObserver(per-channel(3), batches=0, off)"
    assert repr(RangeObserver(momentum=0.9)) == (
        "RangeObserver(per-tensor, batches=0, momentum=0.9)"
    )


def test_is_a_leaf_when_the_tracer_says_so() -> None:
    class Leafy(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Observer) or super().is_leaf_module(module, name)

    graph = Leafy().trace(nn.Sequential(nn.ReLU(), HistogramObserver()))
    assert [node.op for node in graph.nodes] == [
        "placeholder", "call_module", "call_module", "output",
    ]  # fmt: skip


def test_all_reduce_alone_changes_nothing() -> None:
    observer = fed(HistogramObserver(), batches(1))
    before = copy.deepcopy(observer)
    assert observer.all_reduce_() is observer
    assert_equal_buffers(observer, before)


def reduce_on(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = batches()
    observers = [HistogramObserver(), RangeObserver(3)]
    for observer in observers:
        fed(observer, data[rank::2]).all_reduce_()
    torch.save([observer.state_dict() for observer in observers], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_reduce_over_two_processes(tmp_path: Path) -> None:
    mp.start_processes(reduce_on, args=(str(tmp_path),), nprocs=2, start_method="fork")
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for index, observer in enumerate((HistogramObserver(), RangeObserver(3))):
        fed(observer, batches())
        for name, tensor in states[0][index].items():
            assert torch.equal(tensor, states[1][index][name]), name
        restored = copy.deepcopy(observer)
        restored.load_state_dict(states[0][index])
        assert_equal_buffers(restored, observer)
