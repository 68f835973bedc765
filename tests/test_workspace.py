"""The workspace: who finds which state, whose folder it is, and what a damaged file does."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor, nn

import fxq.workspace
from fxq.errors import ArtifactError
from fxq.graph.capture import capture
from fxq.graph.program import Program, write_facts
from fxq.graph.rewrite import Editor
from fxq.models_zoo import tiny_conv
from fxq.workspace import (
    MARKER,
    Checkpoint,
    digest,
    holds_state,
    is_workspace,
    open_workspace,
    remove_workspace,
)

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {"steps": 3, "seed": 0}
IMAGES = (torch.ones(2, 3, 8, 8),)
STATE = {
    "codes": torch.arange(6, dtype=torch.int8).view(2, 3).T,
    "loss": torch.tensor(0.1, dtype=torch.float64),
    "none": torch.empty(0),
    "a": torch.ones(3),
}


@pytest.fixture
def program(tmp_path: Path) -> Program:
    found = capture(tiny_conv(), torch.zeros(1, 3, 8, 8))
    found.workspace = tmp_path / "kept"
    return found


def checkpoint(
    program: Program, options: dict[str, Any] = OPTIONS, images: Any = IMAGES
) -> Checkpoint:
    return Checkpoint(program, Editor(program, "train"), options, images)


def keep(program: Program, state: dict[str, Tensor] = STATE) -> Path:
    """The file the state is in."""
    with checkpoint(program).keeping(lambda: state):
        pass
    assert program.workspace is not None
    (file,) = program.workspace.glob("*.safetensors")
    return file


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    equal = (torch.equal(a, other[n]) and a.dtype == other[n].dtype for n, a in one.items())
    return one.keys() == other.keys() and all(equal)


# ---- who finds what ----------------------------------------------------------------------------


def test_what_was_kept_is_found(program: Program) -> None:
    assert checkpoint(program).load() == {}
    file = keep(program)
    assert same(checkpoint(program).load(), STATE)
    assert {path.name for path in file.parent.iterdir()} == {file.name, MARKER}
    newer = {"codes": torch.zeros(2)}
    keep(program, newer)
    assert same(checkpoint(program).load(), newer)


def test_without_a_workspace_nothing_is_kept(program: Program, tmp_path: Path) -> None:
    program.workspace = None
    with checkpoint(program).keeping(lambda: STATE) as keep_if_due:
        keep_if_due()
    assert checkpoint(program).load() == {}
    assert list(tmp_path.iterdir()) == []


def test_other_options_images_or_passes_find_nothing(program: Program) -> None:
    keep(program)
    assert checkpoint(program, {**OPTIONS, "seed": 1}).load() == {}
    changed = IMAGES[0].clone()
    changed[1, 2, 7, 7] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert checkpoint(program, images=(changed,)).load() == {}
    assert Checkpoint(program, Editor(program, "tune"), OPTIONS, IMAGES).load() == {}
    assert checkpoint(program, images=(IMAGES[0].clone(),)).load() != {}


def test_another_program_finds_nothing(program: Program) -> None:
    keep(program)
    node = next(node for node in program.nodes() if node.op == "call_module")
    write_facts(node, upper=6.0)
    assert checkpoint(program).load() == {}
    write_facts(node, upper=None)
    assert checkpoint(program).load() != {}
    parameter = next(program.module.parameters())
    with torch.no_grad():
        parameter.flatten()[-1].mul_(1 + 2**-22)
    assert checkpoint(program).load() == {}


class Scaled(nn.Module):
    """Holds a number that no listing of the module shows."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_what_only_the_users_code_knows_counts(tmp_path: Path) -> None:
    def scaled(factor: float) -> Checkpoint:
        x = torch.ones(1, 3, 8, 8)
        found = capture(nn.Sequential(Scaled(factor)), x, leaf_modules=[Scaled])
        found.workspace = tmp_path
        return checkpoint(found)

    with scaled(2.0).keeping(lambda: STATE):
        pass
    assert scaled(2.0).load() != {}
    assert scaled(3.0).load() == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, [2, 3]], [1, 2, [3]]),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
        (["ab", "c"], ["a", "bc"]),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.eye(2)[0], torch.eye(2)[1]),
    ],
)
def test_digests_differ(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)


def test_digests_do_not_see_the_layout_in_memory() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert digest(x) == digest(x.contiguous(memory_format=torch.channels_last))


# ---- when it is kept ---------------------------------------------------------------------------


def test_now_and_then(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fxq.workspace.time.monotonic", lambda: now[0])
    begun = checkpoint(program)
    steps = torch.zeros(1)
    with begun.keeping(lambda: {"steps": steps}) as keep_if_due:
        keep_if_due()
        assert checkpoint(program).load() == {}
        for moment, known in [(19.0, None), (21.0, 21.0), (40.0, 21.0), (42.0, 42.0)]:
            now[0] = moment
            steps.fill_(moment)
            keep_if_due()
            assert checkpoint(program).load().get("steps", torch.tensor([0])) == (known or 0)


def test_slow_disks_are_written_less_often(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, writes = [0.0], []

    def slow(*_: object) -> None:
        now[0] += 3
        writes.append(now[0])

    monkeypatch.setattr("fxq.workspace.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fxq.workspace._write", slow)
    with checkpoint(program).keeping(lambda: STATE) as keep_if_due:
        while now[0] < 1000:
            now[0] += 1
            keep_if_due()
    assert 6 <= len(writes) <= 8  # 3 s each, 150 s apart, and once at the end


@pytest.mark.parametrize(("error", "kept"), [(KeyboardInterrupt, True), (RuntimeError, False)])
def test_interruptions_keep_it_and_failures_do_not(
    program: Program, error: type[BaseException], kept: bool
) -> None:
    with pytest.raises(error), checkpoint(program).keeping(lambda: STATE):
        raise error
    assert bool(checkpoint(program).load()) is kept


def test_an_empty_state_is_none(program: Program) -> None:
    with checkpoint(program).keeping(dict):
        pass
    assert program.workspace is not None
    assert not program.workspace.exists()


# ---- damage and full disks ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path, bytes]:
    program = capture(tiny_conv(), torch.zeros(1, 3, 8, 8))
    program.workspace = tmp_path_factory.mktemp("workspace")
    file = keep(program)
    return checkpoint(program), file, file.read_bytes()


@given(st.data())
def test_damage_is_no_state(kept: tuple[Checkpoint, Path, bytes], data: st.DataObject) -> None:
    found, file, whole = kept
    position = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.integers(0, 255).filter(lambda value: value != whole[position]))
    file.write_bytes(whole[:position] + bytes([damage]) + whole[position + 1 :])
    loaded = found.load()
    assert loaded == {} or same(loaded, STATE)  # blanks of the header may be anything


@given(st.data())
def test_a_short_file_is_no_state(
    kept: tuple[Checkpoint, Path, bytes], data: st.DataObject
) -> None:
    found, file, whole = kept
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert found.load() == {}


def test_a_folder_in_its_place_is_no_state(program: Program) -> None:
    file = keep(program)
    file.unlink()
    file.mkdir()
    found = checkpoint(program)
    assert found.load() == {}
    with found.keeping(lambda: STATE):
        pass
    assert len(found._edit.notes) == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")]
)
def test_a_full_disk_is_told_once_and_work_goes_on(
    program: Program, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    file = keep(program)

    def full(tensors: Any, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(fxq.workspace, "INTERVAL", 0.0)
    begun, calls = checkpoint(program), []
    with begun.keeping(lambda: {"other": torch.zeros(1)}) as keep_if_due:
        for call in range(3):
            keep_if_due()
            calls.append(call)
    assert calls == [0, 1, 2]
    (note,) = begun._edit.notes
    assert note.endswith(getattr(error, "strerror", None) or str(error))
    assert {path.name for path in file.parent.iterdir()} == {file.name, MARKER}
    assert same(checkpoint(program).load(), STATE)


def test_an_interruption_while_writing_leaves_the_last_state(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = keep(program)

    def interrupted(tensors: Any, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt), checkpoint(program).keeping(lambda: STATE):
        pass
    assert {path.name for path in file.parent.iterdir()} == {file.name, MARKER}
    assert same(checkpoint(program).load(), STATE)


# ---- whose folder it is ------------------------------------------------------------------------


def test_folders_that_may_be_used(program: Program, tmp_path: Path) -> None:
    assert open_workspace(tmp_path / "new") == tmp_path / "new"
    assert list(tmp_path.iterdir()) == []
    assert open_workspace(str(tmp_path)) == tmp_path
    ours = keep(program).parent
    assert open_workspace(ours) == ours


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("mine")])
def test_places_that_are_taken(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    place = tmp_path / "mine"
    make(place)
    if place.is_dir():
        (place / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="fxq did not write") as caught:
        open_workspace(place)
    assert caught.value.where == str(place)
    remove_workspace(place)
    assert place.exists()


def test_only_our_files_are_removed(program: Program) -> None:
    file = keep(program)
    half = file.with_name(f"{file.name}.123")
    half.write_bytes(b"left by a kill")
    own = file.parent / "mine.safetensors"
    own.write_bytes(b"mine")
    assert holds_state(file.parent)
    remove_workspace(file.parent)
    assert list(file.parent.iterdir()) == [own]
    assert not is_workspace(file.parent)


def test_a_folder_of_ours_is_gone_when_removed(program: Program) -> None:
    folder = keep(program).parent
    remove_workspace(folder)
    assert not folder.exists()
    remove_workspace(folder)
