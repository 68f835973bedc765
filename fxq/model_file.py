"""`load_model`: the network a user names, with the data that its file or zoo entry brings.

A network is named as ``model.py`` or ``model.py:name`` (a Python file), ``package.module:name`` (a
module that can be imported), ``net.pt2`` (an exported program), or by a name of the zoo such as
``cifar/resnet20``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxq.errors import FxqError, UnknownNameError
from fxq.graph.capture import as_inputs
from fxq.graph.exported import as_module, load_exported
from fxq.registry import find_network
from fxq.torchvision_import import prepare_torchvision
from fxq.user_code import failure
from fxq.zoo_entry import ZooEntry

CONVENTION = (
    "a model file defines model (a torch.nn.Module, or a function that returns one) and "
    "example_inputs (a tensor, a tuple, or a function); and, if it likes, calibration_data, "
    "eval_data (batches of inputs and labels), evaluate(module) or train_data (a data set with "
    "positions and a length, of inputs and labels)"
)
_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<name>\w+))?")
_IMPORT = re.compile(r"(?P<path>[A-Za-z_][\w.]*):(?P<name>\w+)")
_BATCH = 64


@dataclass(frozen=True)
class NamedModel:
    """A network and what goes with it.

    Attributes:
        spec: What the user named.
        name: A short name, fit for a folder.
        module: The network, in eval mode.
        example_inputs: One batch of arguments.
        calibration_data: Batches to calibrate on, where its file has them.
        eval_data: Batches of ``(inputs, labels)``, where its file has them; can be read repeatedly.
        evaluate: The file's own measure of a network, where it has one.
        train_data: A map-style data set of ``(input, label)``, where its file has one.
        entry: Its zoo entry, where it comes from the zoo.
    """

    spec: str
    name: str
    module: nn.Module
    example_inputs: tuple[Any, ...]
    calibration_data: Iterable[Any] | None = None
    eval_data: Iterable[Any] | None = None
    evaluate: Callable[[nn.Module], Any] | None = None
    train_data: Any = None
    entry: ZooEntry | None = None


def load_model(spec: str, *, input_shape: Sequence[int] | None = None, seed: int = 0) -> NamedModel:
    """The network of that name.

    Args:
        spec: ``model.py``, ``model.py:name``, ``package.module:name``, the ``.pt2`` file of an
            exported program, or a name of the zoo.
        input_shape: Shape of one input batch; the example is then drawn from N(0, 1), whatever the
            file says.
        seed: Where random weights and examples are drawn from.

    Raises:
        UnknownNameError: No network of the zoo has that name.
        FxqError: The file is missing or fails, or what it defines is of the wrong type; the error
            shows the line and the convention.

    Example:
        >>> load_model("tiny/conv").example_inputs[0].shape
        torch.Size([1, 3, 8, 8])
    """
    example = _random_input(input_shape, seed) if input_shape else None
    if match := _FILE.fullmatch(spec):
        return _from_file(spec, Path(match["path"]), match["name"] or "model", example, seed)
    if spec.endswith(".pt2"):
        return _from_exported(spec, Path(spec), example)
    if match := _IMPORT.fullmatch(spec):
        return _from_import(spec, match["path"], match["name"], example, seed)
    entry = _entry(spec)
    shaped = replace(entry, input_shape=tuple(input_shape)) if input_shape else entry
    return NamedModel(
        spec=spec,
        name=spec,
        module=entry.build(seed),
        example_inputs=(shaped.example(seed),),
        entry=entry,
    )


def _random_input(shape: Sequence[int], seed: int) -> tuple[torch.Tensor]:
    if any(size < 1 for size in shape):
        raise FxqError("an input shape is made of positive sizes", where=str(list(shape)))
    return (torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)),)


def _entry(spec: str) -> ZooEntry:
    try:
        return find_network(spec)
    except UnknownNameError as error:
        place = Path(spec)
        if place.name and place.with_suffix(".py").is_file():
            error.hint = f"did you mean {place.with_suffix('.py')}?"
        elif place.is_dir():
            error.hint = "a folder is no network; name a model.py, or a network of `fxq models`"
        elif error.hint and error.hint.startswith("known:"):
            error.hint += "; `fxq models` lists them; a file is named model.py"
        raise


# ---- files and importable modules --------------------------------------------------------------


def _from_file(
    spec: str, path: Path, name: str, example: tuple[Any, ...] | None, seed: int
) -> NamedModel:
    if not path.is_file():
        raise FxqError(
            "there is no such model file",
            where=str(path),
            hint=f"give a .py file or a network of `fxq models`; {CONVENTION}",
        )
    with _seeded(seed), _importable(path.resolve().parent):
        namespace = _executed(path)
        return _assembled(spec, path.stem, namespace, name, str(path), example)


def _from_exported(spec: str, path: Path, example: tuple[Any, ...] | None) -> NamedModel:
    if not path.is_file():
        raise FxqError("there is no such file", where=spec, hint="torch.export.save writes it")
    module, own = load_exported(path)
    return NamedModel(spec, path.stem, module, example or own)


def _from_import(
    spec: str, module: str, name: str, example: tuple[Any, ...] | None, seed: int
) -> NamedModel:
    prepare_torchvision()
    with _seeded(seed), _importable(Path.cwd()):
        try:
            namespace = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module + ".").startswith(error.name + "."):
                raise failure(error, spec, "cannot be imported") from error
            raise FxqError(
                f"there is no module {error.name!r} to import",
                where=spec,
                hint="a network is named model.py, package.module:name, or as in `fxq models`",
            ) from error
        except (Exception, SystemExit) as error:
            raise failure(error, spec, "cannot be imported") from error
        return _assembled(spec, name, namespace, name, module, example)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The folder's modules can be imported, before any other of the same name."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _executed(path: Path) -> ModuleType:
    prepare_torchvision()
    name = f"fxq_model_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise FxqError("a model file must be Python", where=str(path), hint=CONVENTION)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise failure(error, str(path), "cannot be loaded") from error
    return module


def _assembled(
    spec: str,
    short: str,
    namespace: ModuleType,
    name: str,
    where: str,
    example: tuple[Any, ...] | None,
) -> NamedModel:
    module = _network(namespace, name, where)
    evaluate = getattr(namespace, "evaluate", None)
    if evaluate is not None and not callable(evaluate):
        raise _wrong("evaluate", evaluate, "a function of a module", where)
    return NamedModel(
        spec=spec,
        name=short,
        module=module.eval(),
        example_inputs=example or _example(namespace, where),
        calibration_data=_batches(namespace, "calibration_data", where),
        eval_data=_repeatable(_batches(namespace, "eval_data", where), where),
        evaluate=None if evaluate is None else _measure(evaluate, where),
        train_data=_train_data(namespace, where),
    )


def _train_data(namespace: ModuleType, where: str) -> Any:
    """The data set to train on, or a function that makes it, which is called when it is needed."""
    value = getattr(namespace, "train_data", None)
    if value is None or not callable(value) or hasattr(value, "__getitem__"):
        return value
    return lambda: _called(value, "train_data()", where)


def _measure(evaluate: Callable[[nn.Module], Any], where: str) -> Callable[[nn.Module], Any]:
    def measure(module: nn.Module) -> Any:
        try:
            return evaluate(module)
        except FxqError:
            raise
        except (Exception, SystemExit) as error:
            raise failure(error, where, "evaluate() fails") from error

    return measure


def _network(namespace: ModuleType, name: str, where: str) -> nn.Module:
    if not hasattr(namespace, name):
        networks = [key for key, value in vars(namespace).items() if isinstance(value, nn.Module)]
        hint = f"name one of its networks: {where}:{networks[0]}" if networks else CONVENTION
        raise FxqError(f"it defines no {name!r}", where=where, hint=hint)
    value = as_module(getattr(namespace, name))
    if not isinstance(value, nn.Module) and callable(value):
        value = as_module(_called(value, f"{name}()", where))
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, dict):
        raise _wrong(name, value, "a torch.nn.Module", where, "a state dict is no network; ")
    raise _wrong(name, value, "a torch.nn.Module, or a function that returns one", where)


def _example(namespace: ModuleType, where: str) -> tuple[Any, ...]:
    if not hasattr(namespace, "example_inputs"):
        raise FxqError(
            "it defines no 'example_inputs', so the shape of its input is unknown",
            where=where,
            hint="add example_inputs = torch.zeros(1, 3, 224, 224) with the shape the network "
            "takes, or pass --input-shape 1,3,224,224",
        )
    value = namespace.example_inputs
    if callable(value):
        value = _called(value, "example_inputs()", where)
    try:
        return as_inputs(value)
    except FxqError as error:
        raise _wrong("example_inputs", value, "a tensor or a tuple of arguments", where) from error


def _batches(namespace: ModuleType, name: str, where: str) -> Iterable[Any] | None:
    value = getattr(namespace, name, None)
    if value is None:
        return None
    if callable(value) and not isinstance(value, Iterable):
        return _Batches(lambda: _as_batches(_called(value, f"{name}()", where), name, where), where)
    source = _as_batches(value, name, where)
    if isinstance(source, (list, tuple)) or iter(source) is source:
        return source
    return (_SizedBatches if isinstance(source, Sized) else _Batches)(lambda: source, where)


def _as_batches(value: Any, name: str, where: str) -> Iterable[Any]:
    """Anything that can be iterated; one long tensor is cut into batches."""
    if isinstance(value, torch.Tensor) and value.ndim > 0:
        return list(torch.split(value, _BATCH))
    if isinstance(value, (str, dict)) or not isinstance(value, Iterable):
        raise _wrong(name, value, "batches, or a function that returns them", where)
    return value


def _repeatable(data: Iterable[Any] | None, where: str) -> Iterable[Any] | None:
    if data is not None and iter(data) is data:
        raise FxqError(
            "eval_data can be read only once, but two networks are measured with it",
            where=where,
            hint="make it a list, a DataLoader, or a function that returns the batches",
        )
    return data


class _Batches:
    """The user's batches, whose failures are told as theirs; a function is called each time."""

    def __init__(self, source: Callable[[], Iterable[Any]], where: str) -> None:
        self._source, self._where = source, where

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._source()
        except FxqError:
            raise
        except (Exception, SystemExit) as error:
            raise failure(error, self._where, "reading its batches fails") from error


class _SizedBatches(_Batches):
    """Batches that are counted, so that progress can be shown."""

    def __len__(self) -> int:
        return len(self._source())  # type: ignore[arg-type]


def _called(function: Callable[[], Any], shown: str, where: str) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise FxqError(
            f"{shown} needs arguments: {error}",
            where=where,
            hint="it is called without any; give its arguments defaults, or wrap it",
        ) from error
    except ValueError:
        pass  # a builtin without a signature
    try:
        return function()
    except FxqError:
        raise
    except (Exception, SystemExit) as error:
        raise failure(error, where, f"{shown} fails") from error


# ---- what is wrong, and where ------------------------------------------------------------------


def _wrong(name: str, value: object, wanted: str, where: str, remark: str = "") -> FxqError:
    return FxqError(
        f"{name} is {_article(type(value).__name__)}, not {wanted}",
        where=where,
        hint=f"{remark}{CONVENTION}",
    )


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"
