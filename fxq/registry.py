"""Finding passes, backends, networks and recipes by name; the core reaches the wings only here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fxq.errors import FxqError, UnknownNameError

if TYPE_CHECKING:
    from fxq.backend import Backend
    from fxq.pipeline import Pass
    from fxq.zoo_entry import ZooEntry

WINGS = ("passes", "backends", "models_zoo")

_plugins: dict[Path, list[tuple[str, Any]]] = {}
"""Wing and offer of everything in the plugin files that were loaded, by file."""


def catalog(wing: str) -> dict[str, Any]:
    """Everything a wing offers, by name: our own, installed plugins', and loaded files'.

    Args:
        wing: ``passes``, ``backends`` or ``models_zoo``.

    Raises:
        FxqError: Two offers have the same name, one has none, or a plugin cannot be imported.
    """
    offers: dict[str, Any] = {}
    files = [
        (str(path), [item for home, item in items if home == wing])
        for path, items in _plugins.items()
    ]
    ours = ("fxq", importlib.import_module(f"fxq.{wing}").CATALOG)
    for source, items in (ours, *_entry_points(wing), *files):
        for item in items:
            name = _name_of(item, source)
            if offers.setdefault(name, item) is not item:
                raise FxqError(
                    f"two {wing} are named {name!r}", where=source, hint="rename one of them"
                )
    return offers


def _name_of(item: Any, source: str) -> str:
    name = getattr(item, "name", None)
    if not isinstance(name, str) or not name:
        raise FxqError(f"{item!r} has no name", where=source, hint='give it name = "my-name"')
    return name


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


def plugin_files() -> tuple[Path, ...]:
    """The files that `load_plugin` has read."""
    return tuple(_plugins)


def load_plugin(path: Path) -> None:
    """The ``CATALOG`` of a Python file is registered: passes, backends and networks by their kind.

    Loading a file again replaces what it offered before.

    Raises:
        FxqError: The file is missing, fails to import, has no ``CATALOG``, or offers something
            without a name or with a name that is taken. Nothing of it is registered then.
    """
    if not path.is_file():
        raise FxqError("there is no such plugin file", where=str(path), hint="give a .py file")
    items = getattr(_executed(path), "CATALOG", None)
    if not isinstance(items, (tuple, list)):
        raise FxqError(
            "the plugin has no CATALOG tuple",
            where=str(path),
            hint="end the file with CATALOG = (MyPass,)",
        )
    offers = [(_wing_of(item, path), item) for item in items]
    before = dict(_plugins)
    _plugins[path.resolve()] = offers
    try:
        for wing in {wing for wing, _ in offers}:
            catalog(wing)
    except FxqError:
        _plugins.clear()
        _plugins.update(before)
        raise


def _executed(path: Path) -> ModuleType:
    """The module of a file, under a name that no other file has."""
    name = f"fxq_plugin_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FxqError("a plugin must be a Python file", where=str(path), hint="name it *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise FxqError(f"the plugin fails to import: {error}", where=str(path)) from error
    return module


def _wing_of(item: Any, path: Path) -> str:
    from fxq.pipeline import Pass

    if isinstance(item, type) and issubclass(item, Pass):
        return "passes"
    if hasattr(item, "lower") and not isinstance(item, (type, str)):
        return "backends"
    if hasattr(item, "build") and not isinstance(item, type):
        return "models_zoo"
    raise FxqError(
        f"{item!r} in CATALOG is neither a pass, a backend nor a network",
        where=str(path),
        hint="list classes derived from fxq.Pass, and objects with lower() or build()",
    )
