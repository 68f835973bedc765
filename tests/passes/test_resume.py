"""Long passes that were interrupted end as if they had not been."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.compiler import Result
from fxq.passes import (
    CATALOG,
    Adaround,
    Calibrate,
    FoldBatchNorm,
    InsertObservers,
    MarkRelu,
    QuantizeMinmax,
    Reconstruct,
)
from fxq.passes.adaround import Solver
from fxq.passes.reconstruct import Scope

BEFORE = (FoldBatchNorm(), MarkRelu(), InsertObservers(), Calibrate())
COARSE = QuantizeMinmax(weight_bits=3, activation_bits=4)
TRAIN = Reconstruct(iterations=10, batch_size=6, images=16)
BLOCKS = Reconstruct(iterations=10, batch_size=6, images=16, scope=Scope.BLOCK)
ROUND = Adaround(iterations=40)
SAMPLED = Adaround(solver=Solver.DESCENT, refine_iterations=5)

Compile = Callable[..., Result]


class Stop:
    """A progress callback that raises when a pass has come so far; counts what it is told of."""

    def __init__(self, label: str, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.label, self.at, self.error = label, at, error
        self.told: list[int] = []

    def __call__(self, label: str, done: int, total: int | None) -> None:
        if label == self.label:
            self.told.append(done)
            if done == self.at:
                raise self.error


def count(one: Any) -> Stop:
    """Never stops."""
    return Stop(one.name, -1)


@pytest.fixture
def run(deep: nn.Module, images: Tensor, tmp_path: Path) -> Compile:
    """Call it as ``run(pass)``: a compilation with a workspace, unless another is given."""

    def run_pass(one: Any, images: Tensor = images, **options: Any) -> Result:
        given = {"workspace": tmp_path / "kept", "calibration": [images], **options}
        return fxq.compile(deep, images[:1], fxq.Pipeline(*BEFORE, COARSE, one), **given)

    return run_pass


def same(one: Result, other: Result) -> bool:
    """Whether all numbers of two programs, and of what they were lowered to, are the same bits."""
    results = (one, other)
    ours, theirs = (
        {**r.program.module.state_dict(), **r.artifact.integers.tensors} for r in results
    )
    equal = (torch.equal(value, theirs[name]) for name, value in ours.items())
    return ours.keys() == theirs.keys() and all(equal)


def continued(result: Result) -> list[str]:
    return [note for note in result.journal.steps[-1].notes if note.startswith("continued")]


# ---- the same bits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "stops", "note"),
    [
        (TRAIN, (1,), "continued at step 1 of 10"),
        (TRAIN, (3, 7, 9), "continued at step 9 of 10"),
        (BLOCKS, (5,), "continued at step 5 of 10"),
        (TRAIN, (10,), "continued at step 10 of 10"),
        (ROUND, (1,), "continued behind 1 layers that were finished"),
        (ROUND, (1, 3), "continued behind 3 layers that were finished"),
        (SAMPLED, (2,), "continued behind 2 layers that were finished"),
        (ROUND, (4,), "continued behind 4 layers that were finished"),
    ],
)
def test_an_interrupted_pass_ends_with_the_same_bits(
    run: Compile, one: Any, stops: tuple[int, ...], note: str
) -> None:
    whole = run(one, workspace=None)
    for at in stops:
        with pytest.raises(KeyboardInterrupt):
            run(one, progress=Stop(one.name, at))
    progress = count(one)
    resumed = run(one, progress=progress)
    assert same(resumed, whole)
    assert continued(resumed) == [note]
    last, before = resumed.journal.steps[-1], whole.journal.steps[-1]
    assert (last.hits, last.misses) == (before.hits, before.misses)
    assert last.notes[1:] == before.notes  # the losses from the first step on
    if isinstance(one, Reconstruct):
        assert progress.told == list(range(stops[-1] + 1, 11))


def test_the_pass_does_something(run: Compile) -> None:
    """Else the same bits would come out of anything."""
    results = [run(one, workspace=None) for one in (TRAIN, BLOCKS, ROUND, SAMPLED)]
    assert not any(same(a, b) for a, b in itertools.pairwise(results))


def test_a_workspace_changes_nothing(run: Compile) -> None:
    for one in (TRAIN, ROUND):
        assert same(run(one), run(one, workspace=None))


def test_a_channels_last_network_keeps_its_layout(
    run: Compile, images: Tensor, deep: nn.Module
) -> None:
    deep.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    whole = run(TRAIN, workspace=None)
    with pytest.raises(KeyboardInterrupt):
        run(TRAIN, progress=Stop("reconstruct", 5))
    assert same(run(TRAIN), whole)


# ---- kills -------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [TRAIN, ROUND])
def test_a_kill_loses_what_was_done_since_the_last_saving(
    run: Compile, one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxq.workspace.INTERVAL", 0.0)
    monkeypatch.setattr("fxq.workspace._SHARE", 1e9)
    whole = run(one, workspace=None)
    with pytest.raises(SystemExit):  # nothing is saved on its way out
        run(one, progress=Stop(one.name, 3, SystemExit))
    resumed = run(one)
    assert continued(resumed)
    assert same(resumed, whole)


def test_an_interruption_inside_of_a_step_continues_before_it(
    run: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxq.workspace.INTERVAL", 0.0)
    monkeypatch.setattr("fxq.workspace._SHARE", 1e9)
    whole = run(TRAIN, workspace=None)
    original, calls = torch.optim.Adam.step, []

    def half(self: Any, *args: Any) -> Any:
        original(self, *args)
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", half)
    with pytest.raises(KeyboardInterrupt):
        run(TRAIN)
    resumed = run(TRAIN)
    assert continued(resumed) == ["continued at step 3 of 10"]
    assert same(resumed, whole)


def test_an_interruption_between_drawing_and_the_step(
    run: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images were drawn for a step that was not taken: they are drawn again."""
    whole = run(TRAIN, workspace=None)
    original, calls = torch.Tensor.backward, []

    def interrupted(self: Tensor, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(TRAIN)
    resumed = run(TRAIN)
    assert continued(resumed) == ["continued at step 4 of 10"]
    assert same(resumed, whole)


# ---- what is not continued ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TRAIN, Reconstruct(iterations=10, batch_size=6, images=16, seed=1)),
        (TRAIN, Reconstruct(iterations=11, batch_size=6, images=16)),
        (ROUND, Adaround(iterations=41)),
    ],
)
def test_other_options_begin_anew(run: Compile, one: Any, other: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(one, progress=Stop(one.name, 2))
    result = run(other)
    assert not continued(result)
    assert same(result, run(other, workspace=None))
    assert continued(run(one))  # nor is the first one's lost


@pytest.mark.parametrize("one", [TRAIN, ROUND])
def test_other_weights_or_images_begin_anew(
    run: Compile, one: Any, deep: nn.Module, images: Tensor
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(one, progress=Stop(one.name, 2))
    unread = images.clone()
    unread[3, 0, 0, 0] = torch.nextafter(unread[3, 0, 0, 0], torch.tensor(9.0))
    assert not continued(run(one, images=unread))
    head: Any = deep.get_submodule("head")
    with torch.no_grad():
        head.bias[0] += 1e-3
    assert not continued(run(one))


@pytest.mark.parametrize("one", [TRAIN, ROUND])
def test_a_damaged_state_begins_anew(run: Compile, one: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(one, progress=Stop(one.name, 2))
    (file,) = (tmp_path / "kept").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    result = run(one)
    assert not continued(result)
    assert same(result, run(one, workspace=None))


def test_both_passes_of_one_pipeline_continue(
    deep: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    pipeline = fxq.Pipeline(*BEFORE, COARSE, ROUND, TRAIN)

    def both(**options: Any) -> Result:
        return fxq.compile(deep, images[:1], pipeline, calibration=[images], **options)

    whole = both()
    with pytest.raises(KeyboardInterrupt):
        both(workspace=tmp_path, progress=Stop("reconstruct", 5))
    resumed = both(workspace=tmp_path)
    assert resumed.journal["adaround"].notes == ("continued behind 4 layers that were finished",)
    assert continued(resumed) == ["continued at step 5 of 10"]
    assert same(resumed, whole)


def test_who_continues() -> None:
    assert {one.name for one in CATALOG if one.resumable} >= {"adaround", "reconstruct"}
