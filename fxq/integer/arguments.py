"""The arguments of instructions: plain data with registers in it, as Python values and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Register:
    """A reference to the value of an instruction or input, inside an argument list."""

    name: str


def registers_in(value: Any) -> Iterator[str]:
    """The registers named anywhere inside an argument."""
    if isinstance(value, Register):
        yield value.name
    elif isinstance(value, dict):
        for item in value.values():
            yield from registers_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from registers_in(item)
    elif isinstance(value, slice):
        yield from registers_in((value.start, value.stop, value.step))


def substitute(value: Any, environment: dict[str, Any]) -> Any:
    """An argument with every register replaced by its value."""
    if isinstance(value, Register):
        return environment[value.name]
    if isinstance(value, dict):
        return {key: substitute(item, environment) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(substitute(item, environment) for item in value)
    if isinstance(value, slice):
        return slice(*substitute((value.start, value.stop, value.step), environment))
    return value


# ---- JSON ------------------------------------------------------------------------------------

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve_format": torch.preserve_format,
}


def encode(value: Any) -> Any:
    """An argument as JSON-ready data.

    Raises:
        TypeError: It is of a kind that cannot be stored.

    Example:
        >>> encode((Register("x"), slice(0, 2), torch.float32))
        {'tuple': [{'register': 'x'}, {'slice': [0, 2, None]}, {'dtype': 'float32'}]}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else {"float": str(value)}
    for kind, test in _ENCODERS:
        if isinstance(value, kind):
            return test(value)
    raise TypeError(f"a {type(value).__name__} cannot be stored")


def _encode_dict(value: dict[Any, Any]) -> Any:
    return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}


_ENCODERS: tuple[tuple[Any, Any], ...] = (
    (Register, lambda value: {"register": value.name}),
    (torch.Size, lambda value: {"tuple": [int(item) for item in value]}),
    (tuple, lambda value: {"tuple": [encode(item) for item in value]}),
    (list, lambda value: [encode(item) for item in value]),
    (dict, _encode_dict),
    (slice, lambda value: {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}),
    (torch.dtype, lambda value: {"dtype": str(value).removeprefix("torch.")}),
    (torch.device, lambda value: {"device": str(value)}),
    (torch.memory_format, lambda value: {"memory_format": str(value).removeprefix("torch.")}),
    (type(Ellipsis), lambda value: {"ellipsis": True}),
)


def decode(value: Any) -> Any:
    """The argument that `encode` wrote.

    Raises:
        ValueError: The data is not an encoded argument.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"not an encoded argument: {value!r}")
    ((kind, content),) = value.items()
    if kind not in _DECODERS:
        raise ValueError(f"not an encoded argument: {kind!r}")
    return _DECODERS[kind](content)


_DECODERS: dict[str, Any] = {
    "register": lambda content: Register(str(content)),
    "float": float,
    "tuple": lambda content: tuple(decode(item) for item in content),
    "dict": lambda content: {decode(key): decode(item) for key, item in content},
    "slice": lambda content: slice(*(decode(item) for item in content)),
    "dtype": lambda content: _DTYPES[content],
    "device": torch.device,
    "memory_format": lambda content: _FORMATS[content],
    "ellipsis": lambda content: Ellipsis,
}
