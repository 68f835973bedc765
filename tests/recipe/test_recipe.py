"""Recipes: TOML in, dataclasses inside, and every mistake answered with a suggestion."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxq.errors import RecipeError, UnknownNameError
from fxq.graph.program import LayerOverride, Program
from fxq.graph.rewrite import Editor
from fxq.numerics.aciq import Prior
from fxq.passes import CATALOG, FoldBatchNorm, InsertObservers, MarkRelu, QuantizeAciq
from fxq.passes.insert_observers import Statistics
from fxq.pipeline import Pass
from fxq.recipe import (
    Recipe,
    builtin_files,
    convert_option,
    option_defaults,
    option_types,
)

BASE = """
name = "mine"
[[pass]]
use = "fold-batch-norm"
[[pass]]
use = "insert-observers"
statistics = "histogram"
[[pass]]
use = "calibrate"
[[pass]]
use = "quantize-aciq"
weight_bits = 5
prior = "gauss"
"""


@dataclass(frozen=True)
class Everything(Pass):
    """A pass with an option of every type."""

    name: ClassVar[str] = "everything"

    whole: int = 1
    share: float = 0.5
    flag: bool = False
    word: str = "w"
    kind: Statistics = Statistics.RANGE
    limit: int | None = None
    other: Optional[float] = None  # noqa: UP045
    dims: tuple[int, ...] = (1, 2)

    def apply(self, program: Program, edit: Editor) -> None:
        pass


# ---- built in --------------------------------------------------------------------------------


def test_there_are_built_in_recipes() -> None:
    assert {"aciq-4bit", "aciq-8bit", "minmax-int8"} <= set(builtin_files())


@pytest.mark.parametrize("name", builtin_files())
def test_every_built_in_recipe_loads_and_round_trips(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.papers
    assert 0 < recipe.coverage <= 1
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.pipeline().names == tuple(one.name for one in recipe.passes)
    written = tomllib.loads(builtin_files()[name].read_text())
    for entry, one in zip(written["pass"], recipe.passes, strict=True):
        options = {key: value for key, value in entry.items() if key != "use"}
        assert {key: one.options()[key] for key in options} == options


@pytest.mark.parametrize("name", builtin_files())
def test_every_built_in_recipe_is_in_order(name: str) -> None:
    done: list[str] = []
    for one in Recipe.load(name).passes:
        assert set(one.after) <= set(done)
        done.append(one.name)


# ---- reading ---------------------------------------------------------------------------------


def test_options_become_fields() -> None:
    recipe = Recipe.from_toml(BASE)
    assert recipe.passes[0] == FoldBatchNorm()
    assert recipe.passes[1] == InsertObservers(statistics=Statistics.HISTOGRAM)
    assert recipe.passes[3] == QuantizeAciq(weight_bits=5, prior=Prior.GAUSS)
    assert recipe.coverage == 1.0
    assert recipe.simulation is False
    assert recipe.pipeline(check=False).check is False


def test_a_path(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(BASE.replace('name = "mine"\n', ""))
    assert Recipe.load(path).name == "own"
    assert Recipe.load(str(path)).passes == Recipe.from_toml(BASE).passes
    assert Recipe.load(path).source == str(path)


def test_layer_overrides() -> None:
    text = BASE + '[layer."layer4.*"]\nweight_bits = 8\n[layer."*.conv1"]\nskip = true\n'
    recipe = Recipe.from_toml(text)
    assert recipe.layers == (
        LayerOverride("layer4.*", {"weight_bits": 8}),
        LayerOverride("*.conv1", {"skip": True}),
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe


WRONG = [
    ("name = ", "not valid TOML", None),
    ("", "a recipe needs at least one [[pass]]", None),
    ("pass = 3", "a recipe needs at least one [[pass]]", None),
    ("pass = [3]", 'each [[pass]] needs use = "pass-name"', None),
    ("[[pass]]\nname = 'x'", 'each [[pass]] needs use = "pass-name"', None),
    ("passs = []\n" + BASE, "there is no key 'passs'", "did you mean 'pass'?"),
    ("sumary = ''\n" + BASE, "there is no key 'sumary'", "did you mean 'summary'?"),
    (
        BASE.replace("fold-batch-norm", "fold-batchnorm"),
        "there is no pass named 'fold-batchnorm'",
        "did you mean 'fold-batch-norm'?",
    ),
    (
        BASE.replace("weight_bits", "weigth_bits"),
        "quantize-aciq has no option 'weigth_bits'",
        "did you mean 'weight_bits'?",
    ),
    (
        BASE.replace('"gauss"', '"gaus"'),
        "quantize-aciq.prior must be Prior, not 'gaus'",
        "did you mean 'gauss'?",
    ),
    (
        BASE.replace('"gauss"', '"?"'),
        "quantize-aciq.prior must be Prior, not '?'",
        "known: laplace, gauss, fit",
    ),
    (BASE.replace("= 5", '= "5"'), "quantize-aciq.weight_bits must be int, not '5'", None),
    (BASE.replace("= 5", "= 5.0"), "quantize-aciq.weight_bits must be int, not 5.0", None),
    (BASE.replace("= 5", "= true"), "quantize-aciq.weight_bits must be int, not True", None),
    (BASE.replace('"mine"', "3"), "name has the wrong type: 3", None),
    ("papers = 'x'\n" + BASE, "papers has the wrong type: 'x'", None),
    ("simulation = 1\n" + BASE, "simulation has the wrong type: 1", None),
    ("simulations = true\n" + BASE, "there is no key 'simulations'", "did you mean 'simulation'?"),
    ("coverage = 'all'\n" + BASE, "coverage has the wrong type: 'all'", None),
    (
        BASE + "[layer.'a']\nweights = 8",
        "there is no option 'weights'",
        "did you mean 'weight_bits'?",
    ),
    (BASE + "[layer.'a']\nskip = 1", "skip must be bool, not 1", None),
    (BASE + "[layer]\na = 1", "[layer.'a'] must hold options", None),
    ("layer = 3\n" + BASE, 'overrides are written [layer."GLOB"]', None),
]


@pytest.mark.parametrize(("text", "what", "hint"), WRONG, ids=[what for _, what, _ in WRONG])
def test_mistakes(text: str, what: str, hint: str | None) -> None:
    with pytest.raises((RecipeError, UnknownNameError)) as caught:
        Recipe.from_toml(text, where="own.toml")
    assert caught.value.what.startswith(what)
    assert caught.value.where == "own.toml"
    assert hint is None or caught.value.hint == hint


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="no recipe named 'aciq-4bits'") as caught:
        Recipe.load("aciq-4bits")
    assert caught.value.hint == "did you mean 'aciq-4bit'?"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such recipe file") as caught:
        Recipe.load(tmp_path / "none.toml")
    assert "minmax-int8" in caught.value.hint
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.toml").mkdir()
    for name in ("bytes.toml", "folder.toml"):
        with pytest.raises(RecipeError, match="the recipe cannot be read"):
            Recipe.load(tmp_path / name)


# ---- settings --------------------------------------------------------------------------------


def settled(*settings: str) -> Recipe:
    return Recipe.from_toml(BASE).with_settings(settings)


@pytest.mark.parametrize(
    ("setting", "option", "value"),
    [
        ("quantize-aciq.weight_bits=6", "weight_bits", 6),
        ("weight_bits=6", "weight_bits", 6),
        ("weight-bits=6", "weight_bits", 6),
        (" quantize-aciq.weight_bits = 6 ", "weight_bits", 6),
        ("quantize-aciq.mean_aware=false", "mean_aware", False),
        ("quantize-aciq.prior=laplace", "prior", Prior.LAPLACE),
        ('quantize-aciq.prior="laplace"', "prior", Prior.LAPLACE),
    ],
)
def test_settings(setting: str, option: str, value: Any) -> None:
    recipe = settled(setting)
    assert getattr(recipe.passes[-1], option) == value
    assert recipe.passes[:-1] == Recipe.from_toml(BASE).passes[:-1]


def test_settings_apply_in_order_and_leave_the_recipe_alone() -> None:
    recipe = Recipe.from_toml(BASE)
    assert recipe.with_settings(["weight_bits=6", "weight_bits=7"]).passes[-1].weight_bits == 7
    assert recipe.passes[-1].weight_bits == 5
    assert recipe.with_settings([]) == recipe


def test_a_setting_for_layers() -> None:
    recipe = settled("layer:layer4.*.weight_bits=8", "layer:head.skip=true")
    assert recipe.layers == (
        LayerOverride("layer4.*", {"weight_bits": 8}),
        LayerOverride("head", {"skip": True}),
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe


SETTINGS = [
    ("weight_bits", "a setting is pass.option=value", None),
    ("weigth_bits=4", "mine has no option 'weigth_bits'", "did you mean 'weight_bits'?"),
    (
        "quantize-aciq.weigth_bits=4",
        "quantize-aciq has no option 'weigth_bits'",
        "did you mean 'weight_bits'?",
    ),
    ("mark-relu.a=4", "there is no pass named 'mark-relu'", None),
    (
        "quantise-aciq.weight_bits=4",
        "there is no pass named 'quantise-aciq'",
        "did you mean 'quantize-aciq'?",
    ),
    ("weight_bits=four", "quantize-aciq.weight_bits must be int, not 'four'", None),
    ("weight_bits=", "quantize-aciq.weight_bits must be int, not ''", None),
    ("=4", "mine has no option ''", None),
    ("fold-batch-norm.x=1", "fold-batch-norm has no option 'x'", "nothing is registered"),
    ("layer:a.skip=maybe", "skip must be bool, not 'maybe'", None),
    ("layer:a.bits=3", "there is no option 'bits'", None),
]


@pytest.mark.parametrize(("setting", "what", "hint"), SETTINGS, ids=[s[0] for s in SETTINGS])
def test_wrong_settings(setting: str, what: str, hint: str | None) -> None:
    with pytest.raises((RecipeError, UnknownNameError)) as caught:
        settled(setting)
    assert caught.value.what == what
    assert caught.value.where == f"--set {setting}"
    assert hint is None or caught.value.hint == hint


# ---- types -----------------------------------------------------------------------------------


def test_types_and_defaults_are_read_from_the_fields() -> None:
    assert option_types(QuantizeAciq)["prior"] is Prior
    assert option_defaults(QuantizeAciq)["weight_bits"] == 4
    assert option_types(MarkRelu) == {}
    for one in CATALOG:
        assert option_types(one).keys() == option_defaults(one).keys()


@pytest.mark.parametrize(
    ("option", "value", "want"),
    [
        ("whole", 3, 3),
        ("share", 2, 2.0),
        ("share", 0.25, 0.25),
        ("flag", True, True),
        ("word", "x", "x"),
        ("kind", "histogram", Statistics.HISTOGRAM),
        ("kind", Statistics.HISTOGRAM, Statistics.HISTOGRAM),
        ("limit", 4, 4),
        ("limit", None, None),
        ("other", 4, 4.0),
        ("other", None, None),
        ("dims", [3, 4], (3, 4)),
    ],
)
def test_conversion(option: str, value: Any, want: Any) -> None:
    got = convert_option(value, option_types(Everything)[option], option, "here")
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("whole", 3.0, "whole must be int, not 3.0"),
        ("whole", False, "whole must be int, not False"),
        ("share", "x", "share must be float, not 'x'"),
        ("share", True, "share must be float, not True"),
        ("flag", 1, "flag must be bool, not 1"),
        ("word", 1, "word must be str, not 1"),
        ("limit", "x", "limit must be int or NoneType, not 'x'"),
        ("other", "x", "other must be float or NoneType, not 'x'"),
        ("dims", 3, "dims must be tuple, not 3"),
    ],
)
def test_conversion_refuses(option: str, value: Any, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        convert_option(value, option_types(Everything)[option], option, "here")
    assert caught.value.what == what
    assert caught.value.where == "here"


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    name=words.filter(bool),
    summary=words,
    papers=st.lists(words, max_size=2),
    bits=st.integers(2, 8),
    momentum=st.floats(0, 0.999),
    pattern=words.filter(bool),
    skip=st.booleans(),
    coverage=st.floats(0.1, 1),
    simulation=st.booleans(),
)
def test_any_recipe_round_trips(
    name: str,
    summary: str,
    papers: list[str],
    bits: int,
    momentum: float,
    pattern: str,
    skip: bool,
    coverage: float,
    simulation: bool,
) -> None:
    recipe = Recipe(
        name,
        (InsertObservers(momentum=momentum), QuantizeAciq(weight_bits=bits, mean_aware=skip)),
        summary=summary,
        papers=tuple(papers),
        layers=(LayerOverride(pattern, {"weight_bits": bits, "skip": skip}),),
        coverage=coverage,
        simulation=simulation,
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe
