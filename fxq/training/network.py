"""What a training asks of a network: its device, its state, eval mode, and torch.compile."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fxq.errors import TrainingError


def device_of(module: nn.Module) -> torch.device:
    """Where a network is."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        return tensor.device
    return torch.device("cpu")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state of a network.

    Raises:
        TrainingError: A part of it is no tensor.
    """
    state = module.state_dict()
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise TrainingError(
            "a part of the network's state is no tensor", where=other[0], hint="make it a buffer"
        )
    return dict(state)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The network is in eval mode; its training flags are as before afterwards."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def compiler_trouble(device: torch.device) -> str:
    """Why `torch.compile` does not work on this machine; nothing where it does."""
    try:
        torch.compile(lambda value: value * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, for each part of the tool chain
        return str(error).strip().partition("\n")[0]
    return ""
