"""`Recipe`: a named pipeline as TOML, with its options and per-layer overrides."""

from __future__ import annotations

import importlib.resources
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from fxq.errors import RecipeError, UnknownNameError, nearest_hint
from fxq.graph.program import LayerOverride
from fxq.pipeline import Pass, Pipeline
from fxq.registry import find_pass

_KEYS = {"name", "summary", "papers", "coverage", "simulation", "training", "pass", "layer"}


@dataclass(frozen=True)
class Recipe:
    """A pipeline with a name.

    Attributes:
        name: Its name.
        summary: One line for ``fxq recipes``.
        papers: What it implements.
        passes: The passes with their options, in order.
        layers: Per-layer overrides, in the order they apply.
        coverage: Share of the convolutions and linears it promises to run on integers.
        simulation: Whether quantized layers that no integer kernel runs compute in float, with
            their dequantized integers; else they are an error.
        training: Whether it gives a module to be trained, before it is lowered.
    """

    name: str
    passes: tuple[Pass, ...]
    summary: str = ""
    papers: tuple[str, ...] = ()
    layers: tuple[LayerOverride, ...] = ()
    coverage: float = 1.0
    simulation: bool = False
    training: bool = False
    source: str = field(default="", compare=False)

    def pipeline(self, *, check: bool = True) -> Pipeline:
        """The pipeline of the recipe."""
        return Pipeline(*self.passes, check=check)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """The built-in recipe of that name, or the recipe in that file.

        Raises:
            UnknownNameError: There is no built-in recipe of that name.
            RecipeError: The file is missing, is not TOML, or asks for what does not exist.

        Example:
            >>> Recipe.load("minmax-int8").passes[0].name
            'fold-batch-norm'
        """
        text = str(name_or_path)
        if text.endswith(".toml") or "/" in text or "\\" in text:
            return cls.from_toml(_read(Path(text)), where=text)
        files = builtin_files()
        if text not in files:
            raise UnknownNameError("recipe", text, files)
        return cls.from_toml(files[text].read_text(encoding="utf-8"), where=text)

    @classmethod
    def from_toml(cls, text: str, where: str = "recipe") -> Recipe:
        """The recipe a TOML text describes."""
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # too many digits or brackets are others
            raise RecipeError(f"not valid TOML: {error}", where=where) from error
        _reject_unknown(data, _KEYS, where, "key")
        entries = data.get("pass")
        if not isinstance(entries, list) or not entries:
            raise RecipeError("a recipe needs at least one [[pass]]", where=where)
        passes = tuple(_pass_from(entry, where) for entry in entries)
        return cls(
            name=_typed(data, "name", str, where, Path(where).stem),
            summary=_typed(data, "summary", str, where, ""),
            papers=tuple(_typed(data, "papers", list, where, [])),
            passes=passes,
            layers=_layers_from(data.get("layer", {}), passes, where),
            coverage=_share(_typed(data, "coverage", (int, float), where, 1.0), where),
            simulation=_typed(data, "simulation", bool, where, False),
            training=_typed(data, "training", bool, where, False),
            source=where,
        )

    def to_toml(self) -> str:
        """The recipe as TOML; `from_toml` reads it back to an equal recipe."""
        lines = [f"name = {_toml(self.name)}", f"summary = {_toml(self.summary)}"]
        lines.append(f"papers = {_toml(list(self.papers))}")
        lines.append(f"coverage = {_toml(self.coverage)}")
        lines += ["simulation = true"] if self.simulation else []
        lines += ["training = true"] if self.training else []
        for one in self.passes:
            lines += ["", "[[pass]]", f"use = {_toml(one.name)}"]
            lines += [f"{name} = {_toml(v)}" for name, v in one.options().items() if v is not None]
        for override in self.layers:
            lines += ["", f"[layer.{_toml(override.pattern)}]"]
            lines += [f"{name} = {_toml(value)}" for name, value in override.options.items()]
        return "\n".join(lines) + "\n"

    def with_settings(self, settings: Sequence[str]) -> Recipe:
        """The recipe with ``pass.option=value`` settings applied.

        Args:
            settings: For example ``["quantize-aciq.weight_bits=5"]``; ``option=value`` without a
                pass sets the option on every pass that has it; ``layer:GLOB.option=value`` adds a
                per-layer override.

        Raises:
            RecipeError: A setting names an unknown pass or option, or a value of the wrong type.

        Example:
            >>> recipe = Recipe.load("minmax-int8").with_settings(["quantize-minmax.weight_bits=5"])
            >>> [one.weight_bits for one in recipe.passes if one.name == "quantize-minmax"]
            [5]
        """
        recipe = self
        for setting in settings:
            recipe = recipe._with_setting(setting)
        return recipe

    def _with_setting(self, setting: str) -> Recipe:
        where = f"--set {setting}"
        key, equals, text = setting.partition("=")
        if not equals:
            raise RecipeError("a setting is pass.option=value", where=where)
        target, _, option = key.strip().rpartition(".")
        option = option.replace("-", "_")
        if target.startswith("layer:"):
            override = {target.removeprefix("layer:"): {option: _parse(text)}}
            added = _layers_from(override, self.passes, where)
            return replace(self, layers=(*self.layers, *added))
        chosen = [one for one in self.passes if not target or one.name == target]
        if not chosen:
            raise UnknownNameError("pass", target, [one.name for one in self.passes], where=where)
        having = [one for one in chosen if option in option_types(type(one))]
        if not having:
            known = sorted({name for one in chosen for name in option_types(type(one))})
            raise RecipeError(
                f"{target or self.name} has no option {option!r}",
                where=where,
                hint=nearest_hint(option, known),
            )
        updated = tuple(
            _configured(type(one), {**one.options(), option: _parse(text)}, where)
            if one in having
            else one
            for one in self.passes
        )
        return replace(self, passes=updated)


def builtin_files() -> dict[str, Any]:
    """The files of the built-in recipes, by name."""
    folder = importlib.resources.files("fxq") / "recipes"
    return {
        entry.name.removesuffix(".toml"): entry
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def option_types(pass_type: type[Pass]) -> dict[str, Any]:
    """The options of a pass and their types, read from its fields."""
    hints = typing.get_type_hints(pass_type)
    return {item.name: hints[item.name] for item in fields(pass_type)}


def option_defaults(pass_type: type[Pass]) -> dict[str, Any]:
    """The options of a pass and their defaults."""
    return {
        item.name: None if item.default is MISSING else item.default for item in fields(pass_type)
    }


def convert_option(value: Any, wanted: Any, name: str, where: str) -> Any:
    """A value from TOML or the command line as the type of a pass option.

    Raises:
        RecipeError: It is not of that type.
    """
    unions = (types.UnionType, typing.Union)
    options = typing.get_args(wanted) if typing.get_origin(wanted) in unions else (wanted,)
    for option in options:
        converted = _converted(value, option)
        if converted is not _WRONG:
            return converted
    shown = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    choices = next((option for option in options if _is_enum(option)), None)
    hint = None
    if choices is not None:
        hint = nearest_hint(str(value), [member.value for member in choices])
    raise RecipeError(f"{name} must be {shown}, not {value!r}", where=where, hint=hint)


_WRONG = object()


def _converted(value: Any, wanted: Any) -> Any:
    if wanted is type(None):
        return None if value is None else _WRONG
    if _is_enum(wanted):
        matching = [member for member in wanted if value in (member, member.value)]
        return matching[0] if matching else _WRONG
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _WRONG if isinstance(value, int) and abs(value) >= 2**1023 else float(value)
    if wanted in (int, bool, str):
        return value if type(value) is wanted else _WRONG
    if typing.get_origin(wanted) is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    return _WRONG


def _is_enum(wanted: Any) -> bool:
    return isinstance(wanted, type) and issubclass(wanted, Enum)


def _configured(pass_type: type[Pass], values: Mapping[str, Any], where: str) -> Pass:
    known = option_types(pass_type)
    for name in values:
        if name not in known:
            raise RecipeError(
                f"{pass_type.name} has no option {name!r}",
                where=where,
                hint=nearest_hint(name, sorted(known)),
            )
    converted = {
        name: convert_option(value, known[name], f"{pass_type.name}.{name}", where)
        for name, value in values.items()
    }
    return pass_type(**converted)


def _pass_from(entry: Any, where: str) -> Pass:
    if not isinstance(entry, dict) or not isinstance(entry.get("use"), str):
        raise RecipeError('each [[pass]] needs use = "pass-name"', where=where)
    options = {name: value for name, value in entry.items() if name != "use"}
    try:
        pass_type = find_pass(entry["use"])
    except UnknownNameError as error:
        error.where = where
        raise
    return _configured(pass_type, options, where)


def _layers_from(data: Any, passes: Sequence[Pass], where: str) -> tuple[LayerOverride, ...]:
    if not isinstance(data, dict):
        raise RecipeError('overrides are written [layer."GLOB"]', where=where)
    types_by_name: dict[str, Any] = {"skip": bool}
    for one in passes:
        types_by_name.update(option_types(type(one)))
    overrides = []
    for pattern, options in data.items():
        if not isinstance(options, dict):
            raise RecipeError(f"[layer.{pattern!r}] must hold options", where=where)
        _reject_unknown(options, set(types_by_name), where, "option")
        converted = {
            name: convert_option(value, types_by_name[name], name, where)
            for name, value in options.items()
        }
        overrides.append(LayerOverride(pattern, converted))
    return tuple(overrides)


def _reject_unknown(data: Mapping[str, Any], known: set[str], where: str, kind: str) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(
                f"there is no {kind} {key!r}", where=where, hint=nearest_hint(key, sorted(known))
            )


def _typed(data: Mapping[str, Any], key: str, wanted: Any, where: str, default: Any) -> Any:
    value = data.get(key, default)
    if not isinstance(value, wanted):
        raise RecipeError(f"{key} has the wrong type: {value!r}", where=where)
    return value


def _share(value: float, where: str) -> float:
    if isinstance(value, bool) or not 0 <= value <= 1:
        raise RecipeError(f"coverage is a share from 0 to 1, not {value!r}", where=where)
    return float(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(
            "there is no such recipe file",
            where=str(path),
            hint=f"built in: {', '.join(builtin_files())}",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=str(path)) from error


def _parse(text: str) -> Any:
    """A command-line value: TOML where it is TOML, else the bare text."""
    try:
        return tomllib.loads(f"v = {text.strip()}")["v"]
    except (ValueError, RecursionError):
        return text.strip()


def _toml(value: Any) -> str:
    if isinstance(value, Enum):
        return _toml(value.value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML bars a raw DEL
