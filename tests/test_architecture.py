"""The house rules, read from the source: which file may import what, and how large one may be."""

from __future__ import annotations

import ast
import importlib
import inspect
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("passes", "backends", "cli", "models_zoo")
PACKAGES = ("fxq", *WINGS)
SOURCES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

TERMINAL = {"rich", "typer"}
"""What only the command line may import."""

_TRAIL = {"errors", "numerics", "products", "quant", "graph", "trail"}
ALLOWED_BELOW = {
    "numerics": {"errors", "numerics"},
    "products": {"errors", "numerics", "products"},
    "quant": {"errors", "numerics", "products", "quant"},
    "graph": {"errors", "numerics", "quant", "graph"},
    "trail": _TRAIL,
    "integer": {*_TRAIL, "integer", "backend", "torchvision_import"},
    "report": {*_TRAIL, "integer", "report"},
    "training": {*_TRAIL, "training", "workspace", "picture", "world"},
}
"""Layers of the core: which parts of fxq each may import."""


@dataclass(frozen=True)
class Import:
    """One import statement.

    Attributes:
        path: The file, relative to the repository.
        line: Its line.
        module: What is imported, absolutely; for a relative import the bare name.
        level: The number of dots.
    """

    path: Path
    line: int
    module: str
    level: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {'.' * self.level}{self.module}"

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.module.split("."))


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    place = path.relative_to(ROOT)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(place, node.lineno, alias.name, 0)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:  # `from fxq import graph` imports fxq.graph
                whole = f"{base}.{alias.name}" if base in ("fxq", "") else base
                yield Import(place, node.lineno, whole.strip("."), node.level)


IMPORTS = [one for path in SOURCES for one in imports_of(path)]


def told(wrong: list[Import]) -> str:
    return "\n".join(str(one) for one in wrong)


def test_there_is_something_to_read() -> None:
    assert len(SOURCES) > 50
    assert len(IMPORTS) > 300


# ---- wings -----------------------------------------------------------------------------------


def test_wings_never_import_each_other() -> None:
    wrong = [
        one
        for one in IMPORTS
        if one.path.parts[0] in WINGS and one.level == 0 and one.parts[:1] == ("fxq",)
        if set(one.parts[1:2]) & set(WINGS)
    ]
    assert not wrong, told(wrong)


def test_the_core_finds_wings_by_name_only() -> None:
    wrong = [
        one
        for one in IMPORTS
        if one.path.parts[0] == "fxq" and one.parts[0] == "fxq" and set(one.parts[1:2]) & set(WINGS)
    ]
    assert not wrong, told(wrong)


def test_relative_imports_have_one_dot_and_stay_in_wings() -> None:
    wrong = [one for one in IMPORTS if one.level > 1]
    wrong += [one for one in IMPORTS if one.level == 1 and one.path.parts[0] == "fxq"]
    assert not wrong, told(wrong)


def test_nothing_imports_a_wing_by_its_bare_name() -> None:
    everything = [*IMPORTS, *(one for path in TESTS for one in imports_of(path))]
    wrong = [one for one in everything if one.level == 0 and one.parts[0] in WINGS]
    assert not wrong, told(wrong)


# ---- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ALLOWED_BELOW)
def test_layers_import_downwards_only(layer: str) -> None:
    wrong = [
        one
        for one in IMPORTS
        if one.path.parts[:2] == ("fxq", layer) and one.parts[0] == "fxq"
        if one.parts[1] not in ALLOWED_BELOW[layer]
    ]
    assert not wrong, told(wrong)


def test_numerics_needs_torch_and_the_standard_library_only() -> None:
    foreign = {"numpy", "scipy", "torchvision", "networkx", "safetensors", "PIL", "onnx", "sklearn"}
    wrong = [
        one
        for one in IMPORTS
        if one.path.parts[:2] == ("fxq", "numerics") and one.parts[0] in foreign
    ]
    assert not wrong, told(wrong)


def test_only_the_command_line_imports_the_terminal() -> None:
    wrong = [one for one in IMPORTS if one.parts[0] in TERMINAL and one.path.parts[0] != "cli"]
    assert not wrong, told(wrong)


def test_torch_ao_is_a_peer_to_measure_and_nothing_else() -> None:
    found = [one for one in IMPORTS if one.parts[:2] == ("torch", "ao")]
    wrong = [one for one in found if one.path.parts[0] != "cli"]
    assert not wrong, told(wrong)


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        if not _is_script(path)
    ]
    assert not wrong, "\n".join(wrong)


def _is_script(path: Path) -> bool:
    """Whether a file is also a program of its own, as the one that trains the digits network."""
    return '__name__ == "__main__"' in path.read_text(encoding="utf-8")


# ---- files and names -------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_below_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


def test_every_file_says_what_it_is() -> None:
    silent = [p for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert not silent


def test_one_name_three_casings() -> None:
    for one in importlib.import_module("fxq.passes").CATALOG:
        words = one.name.split("-")
        assert one.__name__ == "".join(word.capitalize() for word in words)
        assert one.__module__ == f"fxq.passes.{'_'.join(words)}"
        assert Path(inspect.getfile(one)).name == f"{'_'.join(words)}.py"


def test_every_pass_is_a_frozen_dataclass_with_documented_options() -> None:
    for one in importlib.import_module("fxq.passes").CATALOG:
        assert is_dataclass(one)
        assert one.__dataclass_params__.frozen
        documentation = " ".join(inspect.getdoc(base) or "" for base in one.__mro__)
        for option in fields(one):
            assert f"{option.name}: " in documentation, f"{one.name}.{option.name}"


def test_every_pass_is_listed() -> None:
    catalog = importlib.import_module("fxq.passes").CATALOG
    for path in (ROOT / "passes").glob("[!_]*.py"):
        module = importlib.import_module(f"fxq.passes.{path.stem}")
        own = [
            one
            for one in vars(module).values()
            if getattr(one, "__module__", "") == module.__name__
        ]
        passes = [
            one
            for one in own
            if isinstance(one, type) and getattr(one, "name", "") and hasattr(one, "contract")
        ]
        assert set(passes) <= set(catalog), path.name


# ---- packaging -------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_folder_with_code_is_packaged() -> None:
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    wanted = {
        ".".join(folder.parts if folder.parts[0] == "fxq" else ("fxq", *folder.parts))
        for folder in folders
    }
    assert wanted <= set(SETUPTOOLS["packages"])


def test_wings_are_mapped_into_the_package() -> None:
    for wing in WINGS:
        assert SETUPTOOLS["package-dir"][f"fxq.{wing}"] == wing


def test_recipes_are_package_data() -> None:
    assert "recipes/*.toml" in SETUPTOOLS["package-data"]["fxq"]
    names = [entry.name for entry in (files("fxq") / "recipes").iterdir()]
    assert {"aciq-4bit.toml", "minmax-int8.toml"} <= set(names)
    assert (ROOT / "fxq" / "py.typed").is_file()


def test_only_known_folders_hold_code() -> None:
    known = {*PACKAGES, "tests"}
    stray = {path.parent.name for path in ROOT.glob("*/*.py")} - known
    assert not stray
