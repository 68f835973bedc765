"""Finding passes, backends, networks and recipes by name; the core reaches the wings only here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import FxqError, UnknownNameError

if TYPE_CHECKING:
    from fxq.backend import Backend
    from fxq.pipeline import Pass
    from fxq.zoo_entry import ZooEntry

WINGS = ("passes", "backends", "models_zoo")

_plugins: dict[str, list[Any]] = {wing: [] for wing in WINGS}


def catalog(wing: str) -> dict[str, Any]:
    """Everything a wing offers, by name: our own, installed plugins', and loaded files'.

    Args:
        wing: ``passes``, ``backends`` or ``models_zoo``.

    Raises:
        FxqError: Two offers have the same name, or a plugin cannot be imported.
    """
    offers: dict[str, Any] = {}
    sources: list[tuple[str, Iterable[Any]]] = [
        ("fxq", importlib.import_module(f"fxq.{wing}").CATALOG),
        *_entry_points(wing),
        ("--plugin", _plugins[wing]),
    ]
    for source, items in sources:
        for item in items:
            if item.name in offers and offers[item.name] is not item:
                raise FxqError(
                    f"two {wing} are named {item.name!r}",
                    where=source,
                    hint="rename one of them",
                )
            offers[item.name] = item
    return offers


def _entry_points(wing: str) -> list[tuple[str, Iterable[Any]]]:
    found: list[tuple[str, Iterable[Any]]] = []
    for point in entry_points(group=f"fxq.{wing}"):
        try:
            loaded = point.load()
        except Exception as error:
            raise FxqError(
                f"the plugin {point.name!r} cannot be imported: {error}",
                where=point.value,
                hint="reinstall or uninstall its package",
            ) from error
        found.append((point.value, loaded if isinstance(loaded, (tuple, list)) else (loaded,)))
    return found


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name."""
    offer: type[Pass] = _find("passes", "pass", name)
    return offer


def find_backend(name: str) -> Backend:
    """The backend of that name."""
    offer: Backend = _find("backends", "backend", name)
    return offer


def find_network(name: str) -> ZooEntry:
    """The network of that name; torchvision's are looked up as they are asked for."""
    zoo = importlib.import_module("fxq.models_zoo")
    if name not in (offers := catalog("models_zoo")) and name.startswith("torchvision/"):
        entry: ZooEntry = zoo.lookup(name)
        return entry
    if name not in offers:
        raise UnknownNameError("network", name, offers)
    found: ZooEntry = offers[name]
    return found


def _find(wing: str, kind: str, name: str) -> Any:
    offers = catalog(wing)
    if name not in offers:
        raise UnknownNameError(kind, name, offers)
    return offers[name]


def load_plugin(path: Path) -> None:
    """The ``CATALOG`` of a Python file is registered: passes, backends and zoo entries by their kind.

    Raises:
        FxqError: The file is missing, fails to import or has no ``CATALOG``.
    """
    if not path.is_file():
        raise FxqError("there is no such plugin file", where=str(path), hint="give a .py file")
    name = f"fxq_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FxqError("a plugin must be a Python file", where=str(path), hint="name it *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FxqError(f"the plugin fails to import: {error}", where=str(path)) from error
    if not isinstance(getattr(module, "CATALOG", None), (tuple, list)):
        raise FxqError(
            "the plugin has no CATALOG tuple",
            where=str(path),
            hint="end the file with CATALOG = (MyPass,)",
        )
    for item in module.CATALOG:
        _plugins[_wing_of(item, path)].append(item)


def _wing_of(item: Any, path: Path) -> str:
    if isinstance(item, type) and hasattr(item, "apply"):
        return "passes"
    if hasattr(item, "lower"):
        return "backends"
    if hasattr(item, "build"):
        return "models_zoo"
    raise FxqError(
        f"{item!r} in CATALOG is neither a pass, a backend nor a network",
        where=str(path),
        hint="passes have apply(), backends lower(), networks build()",
    )
