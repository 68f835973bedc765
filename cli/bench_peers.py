"""What a compiled network is compared with: its own float module, and torch's FX quantization."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fxq.errors import FxqError


@contextlib.contextmanager
def no_deprecations() -> Iterator[None]:
    """Nothing is said about torch.ao and quantized tensors being deprecated; users know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextlib.contextmanager
def quantized_engine(engine: str) -> Iterator[None]:
    """Torch's quantized operators run on this engine.

    Raises:
        FxqError: This build of torch does not have it.
    """
    supported = torch.backends.quantized.supported_engines
    if engine not in supported:
        raise FxqError(
            f"this build of torch has no {engine} kernels",
            hint=f"it has: {', '.join(name for name in supported if name != 'none')}",
        )
    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


def torch_ao_int8(
    model: nn.Module, example: tuple[Any, ...], batches: Iterable[Any], engine: str
) -> nn.Module:
    """The network through ``prepare_fx``, calibration and ``convert_fx``: 8 bits, default mapping.

    Args:
        model: The network; it is copied.
        example: One batch of arguments.
        batches: Batches to calibrate on.
        engine: ``x86``, ``fbgemm`` or ``onednn``.

    Raises:
        FxqError: torch.ao cannot quantize this network; its reason is given.
    """
    with no_deprecations(), quantized_engine(engine), torch.no_grad():
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        try:
            mapping = get_default_qconfig_mapping(engine)
            prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, example)
            for batch in batches:
                prepared(*_arguments(batch, len(example)))
            converted: nn.Module = convert_fx(prepared)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise FxqError(
                f"torch.ao cannot quantize this network: {first}",
                hint="leave torch.ao out of --against",
            ) from error
    return converted


def _arguments(batch: Any, wanted: int) -> tuple[Any, ...]:
    return (batch,) if isinstance(batch, torch.Tensor) else tuple(batch)[:wanted]
