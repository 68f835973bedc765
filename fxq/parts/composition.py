"""A model with some of its parts replaced by compiled ones."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxq.errors import FxqError
from fxq.parts.calls import Arguments, bind


@dataclass(frozen=True)
class Part:
    """A submodule that can be traced.

    Attributes:
        path: Where the model has it; ``""`` is the whole model.
        kind: Name of its class.
        arguments: How it is called.
        calls: How often, when the model ran on the example.
        example: The tensors of its first call.
        graph: It as a graph, in float.
    """

    path: str
    kind: str
    arguments: Arguments
    calls: int
    example: tuple[Tensor, ...]
    graph: fx.GraphModule


class PartMissesError(AttributeError):
    """The model reads an attribute of a part that only the module as written has."""

    def __init__(self, path: str, attribute: str) -> None:
        super().__init__(f"part {path} has no attribute {attribute}")
        self.path = path
        self.attribute = attribute


class CompiledPart(nn.Module):
    """Stands where a submodule stood: takes the same arguments, and runs what was compiled.

    Plain attributes of the submodule, such as the number of its channels, are kept.

    Args:
        path: Where the model has it.
        original: The submodule.
        arguments: How it was called when it was traced.
        compiled: Takes the tensors among the arguments, in order.
    """

    def __init__(
        self, path: str, original: nn.Module, arguments: Arguments, compiled: nn.Module
    ) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.part_path = path
        self.signature = inspect.signature(original.forward)
        self.arguments = arguments
        self.compiled = compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the submodule returned; a dictionary in order.

        Raises:
            FxqError: An argument that is no tensor is another one than it was compiled for.
        """
        bound = bind(self.signature, args, kwargs)
        for name, value in self.arguments.fixed.items():
            if bound[name] != value:
                raise FxqError(
                    f"the part was compiled for {name} = {value!r}, not {bound[name]!r}",
                    where=self.part_path or "the whole model",
                    hint="compile again with an example like this one",
                )
        found = self.compiled(*(bound[name] for name in self.arguments.tensors))
        return OrderedDict(found) if isinstance(found, dict) else found

    def __getattr__(self, name: str) -> Any:
        """Submodules of its own, and nothing of those of the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            path = self.__dict__.get("part_path", "")
            raise PartMissesError(path, name) from None


def composed(
    model: nn.Module, compiled: Mapping[str, nn.Module], arguments: Mapping[str, Arguments]
) -> nn.Module:
    """A copy of the model whose parts at these paths are the compiled ones.

    Args:
        model: The model, in eval mode.
        compiled: What stands in for the parts, by path.
        arguments: How the parts are called, by path.
    """
    stand_ins = {
        path: CompiledPart(path, model.get_submodule(path), arguments[path], module)
        for path, module in compiled.items()
    }
    # A copy that takes a stand-in for every part, wherever it is registered.
    memo: dict[int, Any] = {id(model.get_submodule(path)): one for path, one in stand_ins.items()}
    return copy.deepcopy(model, memo)
