"""Training modules: what a recipe that trains gives, for any training loop and then for `lower`.

In training a `TrainingModule` rounds weights and values in float, with gradients. In eval mode,
without gradients and on the CPU, it computes what will be deployed: the same integers on the same
kernels. Low-bit networks amplify the smallest difference (one value that is rounded the other way
becomes dozens some layers on), so nothing less says what the deployed network will answer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from fxq.errors import FxqError
from fxq.graph.plain import PlainGraph
from fxq.graph.program import Program
from fxq.quant.uncompiled import uncompiled
from fxq.recipe import Recipe
from fxq.trail.journal import Journal

Lower = Callable[["TrainingModule"], nn.Module]


@dataclass(frozen=True)
class Origin:
    """Where a training module comes from.

    Attributes:
        program: What its program knows beside the module, by name.
        journal: What the passes did that made it.
        recipe: The recipe they are of.
    """

    program: dict[str, Any]
    journal: Journal
    recipe: Recipe


class TrainingModule(nn.Module):
    """A network that is trained to be quantized.

    Args:
        program: What a recipe that trains gave.
        journal: What its passes did.
        recipe: The recipe.
        lower: Gives the module on integer kernels that this one becomes.

    Attributes:
        network: The graph, whose parameters are trained.
        origin: Where it comes from.
        exact: Whether eval mode computes what is deployed; if not, it rounds in float as training
            does.
    """

    def __init__(self, program: Program, journal: Journal, recipe: Recipe, lower: Lower) -> None:
        super().__init__()
        known = {item.name: getattr(program, item.name) for item in fields(program)}
        del known["module"]
        self.network = PlainGraph.of(program.module).module()
        self.origin = Origin(known | {"progress": None, "workspace": None}, journal, recipe)
        self.exact = True
        self._lower = lower
        self._deployed: tuple[Any, nn.Module] | None = None
        self.train()

    def forward(self, *inputs: Any) -> Any:
        """The output of the network."""
        if self.training or not self.exact or torch.is_grad_enabled():
            return self.network(*inputs)
        return self._evaluated(*inputs)

    def train(self, mode: bool = True) -> TrainingModule:
        """In training or, with False, in eval mode."""
        self._deployed = None  # writes to ``.data`` since then cannot be seen
        return super().train(mode)

    @uncompiled
    def _evaluated(self, *inputs: Any) -> Any:
        """What the deployed module computes; the network itself where it cannot be deployed."""
        state = list(chain(self.parameters(), self.buffers()))
        if any(tensor.device.type != "cpu" for tensor in state):
            return self.network(*inputs)
        versions = [(id(tensor), tensor._version) for tensor in state]
        if self._deployed is None or self._deployed[0] != versions:
            self._deployed = (versions, self._lowered())
        with torch.autocast("cpu", enabled=False):
            return self._deployed[1](*inputs)

    def _lowered(self) -> nn.Module:
        try:
            return self._lower(self)
        except FxqError:  # which `fxq.lower` explains
            return self.network

    def __getstate__(self) -> dict[str, Any]:
        children = {name: child for name, child in self._modules.items() if name != "network"}
        plain = {"network": PlainGraph.of(self.network), "_modules": children, "_deployed": None}
        return self.__dict__ | plain

    def __setstate__(self, state: dict[str, Any]) -> None:
        plain = state.pop("network")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.network = plain.module()


def program_of(module: nn.Module) -> Program:
    """The program of a training module, which is not touched: a copy on the CPU, in eval mode.

    Args:
        module: The module, or what DDP or `torch.compile` made of it.

    Raises:
        FxqError: It is no training module.
    """
    found = unwrapped(module)
    network: fx.GraphModule = copy.deepcopy(found.network).cpu().eval()
    known = found.origin.program
    program = replace(Program(network, known["example_inputs"]), **known)
    program.passes_run = list(program.passes_run)
    return program


def unwrapped(module: nn.Module) -> TrainingModule:
    """The training module inside wrappers of data parallelism and `torch.compile`.

    Raises:
        FxqError: There is none.
    """
    inner: Any = module
    while not isinstance(inner, TrainingModule):
        is_parallel = isinstance(inner, nn.parallel.DistributedDataParallel)
        inner = inner.module if is_parallel else getattr(inner, "_orig_mod", None)
        if inner is None:
            raise FxqError(
                f"{type(module).__name__} is no module that fxq made to be trained",
                hint="give the module of a recipe with training = true; fxq.compile float models",
            )
    return inner
