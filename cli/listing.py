"""``fxq passes``, ``recipes``, ``backends`` and ``models``: what there is, by name.

Recipes and networks are listed without importing torch.
"""

from __future__ import annotations

import fnmatch
import importlib.resources
import inspect
import tomllib
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import RecipeError, UnknownNameError

if TYPE_CHECKING:
    from fxq.pipeline import Pass


def passes(name: str | None) -> None:
    """The passes, or the options of one, are printed."""
    from fxq.registry import catalog, find_pass

    from . import show

    if name is None:
        offers = catalog("passes").values()
        show.columns([(one.name, one.contract.value, first_line(one)) for one in offers])
        return
    one = find_pass(name)
    needs = f"after {', '.join(one.after)}" if one.after else "anywhere in a recipe"
    show.lines([f"{one.name}: {one.contract.value}, {needs}", "", _body(one)])
    rows = option_rows(one)
    if rows:
        show.line()
        show.columns(rows, head=("option", "type", "default", ""))
        option, value = rows[0][0], rows[0][2]
        show.lines(["", f"change one with --set {name}.{option}={value}"])


def option_rows(one: type[Pass]) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each option of a pass."""
    from fxq.recipe import option_defaults, option_types

    meanings = option_meanings(one)
    defaults = option_defaults(one)
    return [
        (name, _type_text(kind), _value_text(defaults[name]), meanings.get(name, ""))
        for name, kind in option_types(one).items()
    ]


def option_meanings(one: type[Pass]) -> dict[str, str]:
    """What the ``Args`` sections of a pass and its bases say of each option."""
    meanings: dict[str, str] = {}
    for base in reversed(one.__mro__):
        meanings.update(_args_section(inspect.cleandoc(base.__doc__ or "")))
    return meanings


def _args_section(doc: str) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    _, _, section = doc.partition("Args:\n")
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        text = line.strip()
        if line.startswith("    ") and not line.startswith("     ") and ":" in text:
            name, _, text = text.partition(":")
        if name:
            found[name] = f"{found.get(name, '')} {text.strip()}".strip()
    return found


def first_line(documented: Any) -> str:
    """The first sentence of a docstring."""
    return inspect.cleandoc(documented.__doc__ or "").partition("\n")[0]


def _body(one: type[Pass]) -> str:
    text = inspect.cleandoc(one.__doc__ or "")
    for heading in ("\n\nArgs:", "\n\nRaises:", "\n\nExample:", "\n\nAttributes:"):
        text = text.partition(heading)[0]
    return text


def _type_text(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(str(member.value) for member in kind)
    return getattr(kind, "__name__", str(kind).replace("typing.", ""))


def _value_text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def recipes(name: str | None) -> None:
    """The recipes, or the TOML of one, are printed."""
    from . import show

    if name is not None:
        show.raw(recipe_text(name))
        return
    rows = []
    for recipe, text in _builtin_recipes().items():
        data = tomllib.loads(text)
        rows.append((recipe, ", ".join(data.get("papers", [])), data.get("summary", "")))
    show.columns(rows)


def recipe_text(name: str) -> str:
    """The TOML of a built-in recipe, or of a file.

    Raises:
        UnknownNameError: There is no recipe of that name.
        RecipeError: The file is missing.
    """
    builtin = _builtin_recipes()
    if name in builtin:
        return builtin[name]
    if not (name.endswith(".toml") or "/" in name):
        raise UnknownNameError("recipe", name, builtin)
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=name) from error


def _builtin_recipes() -> dict[str, str]:
    folder = importlib.resources.files("fxq") / "recipes"
    files = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in files
        if entry.name.endswith(".toml")
    }


def backends() -> None:
    """The backends are printed."""
    from fxq.registry import catalog

    from . import show

    show.columns([(one.name, one.summary) for one in catalog("backends").values()])


def models(pattern: str | None) -> None:
    """The networks are printed, or those whose name matches a glob or contains a text.

    Raises:
        UnknownNameError: None matches.
    """
    from fxq.registry import catalog

    from . import show

    entries = list(catalog("models_zoo").values())
    external = pattern is not None and pattern.startswith("torchvision")
    if external:
        entries += _torchvision_entries()
    chosen = [one for one in entries if pattern is None or _matches(one.name, pattern)]
    if not chosen:
        raise UnknownNameError("network", str(pattern), [one.name for one in entries])
    show.columns(
        [(one.name, _shape(one.input_shape), _weights(one.weights), one.summary) for one in chosen],
        head=("name", "input", "weights", ""),
    )
    if not external:
        show.lines(["", "torchvision's own are named torchvision/NAME: fxq models torchvision"])


def _torchvision_entries() -> list[Any]:
    from fxq.registry import find_network

    from .load import zoo

    return [find_network(f"torchvision/{name}") for name in zoo().torchvision_names()]


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatch.fnmatchcase(name, pattern)


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in sizes[1:])


def _weights(kind: str) -> str:
    return "included" if kind == "embedded" else kind
