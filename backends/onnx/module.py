"""`OnnxModule`: an ``nn.Module`` that runs an integer program as an ONNX model in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxq.errors import FxqError
from fxq.integer.arguments import substitute
from fxq.integer.program import IntegerProgram

from .emitter import Flavor
from .model import output_names
from .session import Session

if TYPE_CHECKING:
    import onnx


class OnnxModule(nn.Module):
    """Runs an integer program as an ONNX model in ONNX Runtime.

    Args:
        program: The program.
        model: The model made of it.
    """

    def __init__(self, program: IntegerProgram, model: onnx.ModelProto) -> None:
        super().__init__()
        self.program = program
        self.model = model
        self._session: Session | None = None
        self._tapped: Session | None = None

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The output of the program.

        Raises:
            FxqError: ONNX Runtime refuses the model or the inputs.
        """
        self._check(inputs)
        if self._session is None:
            self._session = Session(self.model)
        found = self._session.run(inputs)
        names = output_names(self.program)
        registers = {
            name: found[one]
            for (name, _), one in zip(names.items(), self._session.outputs, strict=True)
        }
        return substitute(self.program.output, registers)

    def registers(self, *inputs: torch.Tensor) -> dict[str, Any]:
        """Every register that is a tensor of the model: codes, and the floats of islands."""
        self._check(inputs)
        tensors = self._tensors()
        if not tensors:  # the output is the input
            return dict(zip(self.program.inputs, inputs, strict=True))
        if self._tapped is None:
            self._tapped = Session(*_tapped(self.model, list(tensors.values())))
        found = self._tapped.run(inputs)
        given = dict(zip(self.program.inputs, inputs, strict=True))
        observed = zip(tensors, self._tapped.outputs, strict=True)
        return given | {name: found[tensor] for name, tensor in observed}

    def _tensors(self) -> dict[str, str]:
        """The tensor of the model that holds each register, where one does."""
        known = {name for node in self.model.graph.node for name in node.output}
        shown = output_names(self.program)
        found = {}
        for step in self.program:
            names = (step.name, shown.get(step.name, ""))
            tensors = names if step.grid is None else (f"{step.name}.codes",)
            present = [tensor for tensor in tensors if tensor in known]
            if present:
                found[step.name] = present[0]
        return found

    def _check(self, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs) != len(self.program.inputs):
            raise FxqError(
                f"the network takes {len(self.program.inputs)} inputs, not {len(inputs)}"
            )

    @property
    def flavor(self) -> Flavor:
        """What the integers are stored in."""
        return Flavor(properties(self.model).get("fxq.flavor", Flavor.FAST.value))

    @property
    def opset(self) -> int:
        """The opset of the model."""
        return int(self.model.opset_import[0].version)

    def extra_repr(self) -> str:
        """Flavour, opset and number of nodes."""
        nodes = len(self.model.graph.node)
        return f"flavor={self.flavor}, opset={self.opset}, {nodes} nodes"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModule:
        model = type(self.model)()
        model.CopyFrom(self.model)
        return OnnxModule(copy.deepcopy(self.program, memo), model)


def properties(model: onnx.ModelProto) -> dict[str, str]:
    """What a model says about itself."""
    return {entry.key: entry.value for entry in model.metadata_props}


def _tapped(model: onnx.ModelProto, tensors: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a model that also returns inner tensors, packed ones as bytes; and their names."""
    from onnx import TensorProto, ValueInfoProto, helper

    tapped = type(model)()
    tapped.CopyFrom(model)
    types = {one.name: one.data_type for one in model.graph.initializer}
    present = {one.name for one in model.graph.output}
    names = []
    for tensor in tensors:
        zero_point = f"{tensor.removesuffix('.codes')}.zero_point"
        name = tensor
        if types.get(zero_point, TensorProto.UINT8) != TensorProto.UINT8:
            name = f"{tensor}.bytes"
            tapped.graph.node.append(
                helper.make_node("Cast", [tensor], [name], to=TensorProto.UINT8)
            )
        names.append(name)
        if name not in present:
            tapped.graph.output.append(ValueInfoProto(name=name))
            present.add(name)
    return tapped, names
