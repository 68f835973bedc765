"""Reading weight files, with every way they can be wrong said plainly.

Only tensors are read: ``.safetensors`` holds nothing else, and ``.pt`` / ``.pth`` files go through
``torch.load(weights_only=True)``, which refuses any other object.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fxq.errors import DataError

COUNTER = "num_batches_tracked"
"""The end of names that old files do not have, and that eval mode does not use."""

_WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a weight file, by name, on the CPU.

    Raises:
        DataError: If the file is missing or damaged, or holds other objects than tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            "there is no such weight file",
            where=str(file),
            hint="check the path of --weights or CHECKPOINT",
        )
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in (".pt", ".pth") or file.name.endswith(".pth.tar"):
        return _read_torch(file)
    raise DataError(
        f"weight files end in .safetensors, .pt or .pth, not {file.suffix or 'nothing'!r}",
        where=str(file),
    )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"the file is damaged, or no safetensors file: {error}",
            where=str(file),
            hint="download or save it again",
        ) from error


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            "the file holds other objects than tensors, or is damaged; fxq runs no code from it",
            where=str(file),
            hint="save module.state_dict() instead of the module",
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise DataError(
            f"the file is damaged, or no torch file: {error}", where=str(file)
        ) from error
    return _unwrapped(loaded, file)


def _unwrapped(loaded: object, file: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise DataError("the file holds no state dict", where=str(file))
    state = {str(name).removeprefix("module."): value for name, value in loaded.items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise DataError(
                f"{name!r} is a {type(value).__name__}, not a tensor",
                where=str(file),
                hint="save module.state_dict()",
            )
    return state


def check_fit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: Path) -> None:
    """The weights have the names, shapes and kinds of a network's state, and are finite numbers.

    Args:
        expected: The state of the network.
        weights: Those of the file.
        file: Where they come from, for the error.

    Raises:
        DataError: They do not; the first difference is told.
    """
    _check_names(expected, weights, file)
    for name, tensor in weights.items():
        _check_tensor(name, expected[name], tensor, file)


def _check_names(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: Path) -> None:
    missing = [n for n in expected if n not in weights and not n.endswith(COUNTER)]
    unexpected = [name for name in weights if name not in expected]
    if not missing and not unexpected:
        return
    parts = [
        f"{len(names)} {kind} (first: {names[0]})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    raise DataError(f"the weights are of another network: {', '.join(parts)}", where=str(file))


def _check_tensor(name: str, expected: Tensor, tensor: Tensor, file: Path) -> None:
    if tensor.shape != expected.shape:
        raise DataError(
            f"{name} has shape {list(tensor.shape)}, the network's has {list(expected.shape)}",
            where=str(file),
        )
    if tensor.is_floating_point() != expected.is_floating_point():
        raise DataError(
            f"{name} holds {tensor.dtype}, the network's {expected.dtype}",
            where=str(file),
            hint="dequantize the weights before saving them",
        )
    if not tensor.isfinite().all():
        raise DataError(
            f"{name} holds NaN or infinite values",
            where=str(file),
            hint="the training that saved it had diverged, or the file is damaged",
        )
