"""The registry: names, plugin files and entry points, and every way they can be wrong."""

from __future__ import annotations

import importlib.metadata
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxq import registry
from fxq.errors import FxqError, UnknownNameError
from fxq.passes import FoldBatchNorm
from fxq.recipe import Recipe, option_types
from fxq.registry import WINGS, catalog, find_backend, find_network, find_pass, load_plugin

PLUGIN = """
from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from fxq.contracts import Contract
from fxq.pipeline import Pass


class Mood(StrEnum):
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True)
class Note(Pass):
    name: ClassVar[str] = "NAME"
    contract: ClassVar[Contract] = Contract.ANNOTATES_ONLY

    mood: Mood = Mood.GOOD

    def apply(self, program, edit):
        for node in edit.visit():
            edit.write_facts(node, note=self.mood.value)


CATALOG = (Note,)
"""


@pytest.fixture(autouse=True)
def no_plugins() -> Iterator[None]:
    """Every test begins and ends without plugins."""
    before = dict(registry._plugins)
    registry._plugins.clear()
    yield
    registry._plugins.clear()
    registry._plugins.update(before)


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., Path]:
    """Call it as ``plugin(text, name)``: the path of a plugin file."""

    def write(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def noting(name: str = "note-mood") -> str:
    return PLUGIN.replace("NAME", name)


# ---- our own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_every_offer_has_its_own_name(wing: str) -> None:
    offers = catalog(wing)
    assert offers
    assert all(item.name == name for name, item in offers.items())


def test_found_by_name() -> None:
    assert find_pass("fold-batch-norm") is FoldBatchNorm
    assert find_backend("eager").name == "eager"
    assert find_network("tiny/conv").input_shape == (1, 3, 8, 8)
    assert find_network("torchvision/resnet18").name == "torchvision/resnet18"


@pytest.mark.parametrize(
    ("find", "name", "what", "hint"),
    [
        (find_pass, "mark-rleu", "there is no pass named 'mark-rleu'", "did you mean 'mark-relu'?"),
        (find_backend, "eagre", "there is no backend named 'eagre'", "did you mean 'eager'?"),
        (find_network, "tiny/cnv", "there is no network named 'tiny/cnv'", "mean 'tiny/conv'?"),
        (
            find_network,
            "torchvision/resnet19",
            "there is no torchvision network named 'resnet19'",
            "did you mean 'resnet1",
        ),
        (find_pass, "?", "there is no pass named '?'", "known: adapt-backward, adaround, "),
    ],
)
def test_unknown_names(find: Any, name: str, what: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        find(name)
    assert caught.value.what == what
    assert hint in caught.value.hint


# ---- plugin files ----------------------------------------------------------------------------


def test_a_plugin_file(plugin: Any) -> None:
    load_plugin(plugin(noting()))
    found = find_pass("note-mood")
    assert option_types(found)["mood"].__name__ == "Mood"
    recipe = Recipe.from_toml('[[pass]]\nuse = "note-mood"\nmood = "bad"\n')
    assert recipe.passes[0].options() == {"mood": "bad"}
    assert Recipe.from_toml(recipe.to_toml()).passes == recipe.passes


def test_a_plugin_file_with_a_backend_and_a_network(plugin: Any) -> None:
    load_plugin(
        plugin(
            """
            from fxq.zoo_entry import ZooEntry

            class Nothing:
                name, summary = "nothing", "does nothing"

                def lower(self, program, **options):
                    return None

            CATALOG = [Nothing(), ZooEntry("own/net", "torch.nn:Identity", (1, 2), "mine")]
            """
        )
    )
    assert find_backend("nothing").summary == "does nothing"
    assert find_network("own/net").build().training is False


def test_loading_a_file_again_replaces_it(plugin: Any) -> None:
    path = plugin(noting("first"))
    load_plugin(path)
    load_plugin(path)
    assert find_pass("first")
    load_plugin(plugin(noting("second")))
    assert find_pass("second")
    with pytest.raises(UnknownNameError):
        find_pass("first")


def test_two_files_of_one_name_keep_apart(plugin: Any) -> None:
    load_plugin(plugin(noting("first"), "a/mine.py"))
    load_plugin(plugin(noting("second").replace("Mood", "Temper"), "b/mine.py"))
    assert option_types(find_pass("first"))["mood"].__name__ == "Mood"
    assert option_types(find_pass("second"))["mood"].__name__ == "Temper"


WRONG = [
    ("raise ValueError('no')", "the plugin fails to import: no"),
    ("import nothing_like_this", "the plugin fails to import: No module named"),
    ("def broken(:", "the plugin fails to import: invalid syntax"),
    ("x = 1", "the plugin has no CATALOG tuple"),
    ("CATALOG = 3", "the plugin has no CATALOG tuple"),
    ("CATALOG = ('eager',)", "'eager' in CATALOG is neither a pass, a backend nor a network"),
    ("import torch\nCATALOG = (torch.nn.ReLU,)", "in CATALOG is neither a pass, a backend"),
    (noting(""), "has no name"),
    (noting("mark-relu"), "two passes are named 'mark-relu'"),
]


@pytest.mark.parametrize(("text", "what"), WRONG, ids=[what for _, what in WRONG])
def test_wrong_plugin_files_leave_nothing_behind(text: str, what: str, plugin: Any) -> None:
    path = plugin(text)
    with pytest.raises(FxqError) as caught:
        load_plugin(path)
    assert what in caught.value.what
    assert str(path) in caught.value.where
    assert not registry._plugins
    assert find_pass("mark-relu").__module__ == "fxq.passes.mark_relu"


def test_a_duplicate_of_another_file(plugin: Any) -> None:
    load_plugin(plugin(noting(), "a.py"))
    with pytest.raises(FxqError, match="two passes are named 'note-mood'") as caught:
        load_plugin(plugin(noting(), "b.py"))
    assert caught.value.where.endswith("b.py")
    assert caught.value.hint == "rename one of them"
    assert find_pass("note-mood")


def test_what_is_no_plugin_file(tmp_path: Path, plugin: Any) -> None:
    for path, what in (
        (tmp_path / "none.py", "there is no such plugin file"),
        (tmp_path, "there is no such plugin file"),
        (plugin("", "notes.txt"), "a plugin must be a Python file"),
    ):
        with pytest.raises(FxqError, match=what) as caught:
            load_plugin(path)
        assert caught.value.where == str(path)


# ---- entry points ----------------------------------------------------------------------------


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it as ``offer(load)``: an installed package offers passes through that function."""

    def install(load: Callable[[], Any]) -> None:
        point = SimpleNamespace(name="theirs", value="theirs:PASSES", load=load)
        monkeypatch.setattr(
            registry, "entry_points", lambda group: [point] if group == "fxq.passes" else []
        )

    return install


def test_an_entry_point_of_one_or_of_several(offer: Any) -> None:
    theirs = type("Theirs", (FoldBatchNorm,), {"name": "theirs"})
    for load in (lambda: theirs, lambda: (theirs,), lambda: [theirs]):
        offer(load)
        assert find_pass("theirs") is theirs


def fails() -> Any:
    raise ImportError("no such thing")


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (fails, "the plugin 'theirs' cannot be imported: no such thing"),
        (lambda: (type("Twin", (FoldBatchNorm,), {}),), "two passes are named 'fold-batch-norm'"),
        (lambda: (3,), "3 has no name"),
    ],
)
def test_wrong_entry_points(load: Any, what: str, offer: Any) -> None:
    offer(load)
    with pytest.raises(FxqError) as caught:
        catalog("passes")
    assert caught.value.what == what
    assert caught.value.where == "theirs:PASSES"
    assert caught.value.hint


def test_entry_points_are_those_of_the_standard_library() -> None:
    assert registry.entry_points is importlib.metadata.entry_points
