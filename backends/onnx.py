"""The onnx backend: an integer program as a QDQ model, and an ``nn.Module`` that runs it.

The model is standard ONNX, opset 21 or later: QuantizeLinear and DequantizeLinear around float
operators, on the very integers of the program. `_onnx_model` builds it, `_onnx_session` runs it in
ONNX Runtime.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxq.backend import Obstacle
from fxq.errors import ArtifactError, FxqError, LoweringError, UnknownNameError
from fxq.integer.arguments import substitute
from fxq.integer.lowering import lower_to_integers
from fxq.integer.obstacles import obstacles
from fxq.integer.program import IntegerProgram

from ._onnx_emitter import Flavor
from ._onnx_file import read_model, save_model, write_model
from ._onnx_model import OLDEST_OPSET, check_opset, onnx_model, output_names, weights_digest
from ._onnx_session import Session

if TYPE_CHECKING:
    import onnx

    from fxq.artifact import Artifact
    from fxq.graph.program import Program


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
        return Flavor(_properties(self.model).get("fxq.flavor", Flavor.FAST.value))

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


def _properties(model: onnx.ModelProto) -> dict[str, str]:
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


class OnnxBackend:
    """A quantized ONNX model, run by ONNX Runtime."""

    name = "onnx"
    summary = "A standard QDQ model for ONNX Runtime (flavors fast, packed, compact)"

    def obstacles(self, program: Program) -> list[Obstacle]:
        """Everything in the program that has no integer form, or no ONNX form."""
        found = obstacles(program, per_channel=True)
        if found:
            return found
        try:
            onnx_model(lower_to_integers(program)[0])
        except LoweringError as error:
            return [one for one in error.obstacles if isinstance(one, Obstacle)]
        return []

    def lower(self, program: Program, **options: Any) -> Artifact:
        """The program as an `OnnxModule` with its ledger.

        Args:
            program: A program after a quantize pass.
            options: ``flavor`` (fast, packed, compact), ``opset`` (21 or later), ``dynamic``
                (whether the batch has any size); and ``journal`` for the ledger.

        Raises:
            LoweringError: There are obstacles.
            FxqError: The opset is too old, or newer than the installed onnx.
        """
        from fxq.artifact import Artifact

        journal = options.pop("journal", None)
        chosen = _options(options)
        found = obstacles(program, per_channel=True)
        if found:
            raise LoweringError(f"the onnx backend cannot express {len(found)} nodes", found)
        integers, ledger = lower_to_integers(program, journal)
        return Artifact(
            integers=integers,
            ledger=ledger,
            module=OnnxModule(integers, onnx_model(integers, **chosen)),
            backend=self.name,
            journal=journal,
            metadata={"flavor": chosen["flavor"].value, "opset": chosen["opset"]},
        )

    def load(self, integers: IntegerProgram, **options: Any) -> nn.Module:
        """The module of a stored program: of the model file in ``folder``, or made anew.

        Raises:
            ArtifactError: The model is damaged, or belongs to another program.
        """
        folder = options.pop("folder", None)
        if "engine" in options:
            raise FxqError("the onnx backend has no engines", hint="leave --engine out")
        if folder is None:
            return OnnxModule(integers, onnx_model(integers, **_options(options)))
        path = Path(folder) / self.file_name(str(options.get("flavor", Flavor.FAST)))
        model = read_model(path)
        if _properties(model).get("fxq.weights_sha256") != weights_digest(integers):
            raise ArtifactError(
                "the ONNX model does not belong to the weights of this run",
                where=str(path),
                hint="it was replaced; export or compile again",
            )
        return OnnxModule(integers, model)

    def write(self, artifact: Artifact, folder: Path) -> None:
        """The model file of an artifact is in a folder, and says how accurate it is."""
        module = artifact.module
        assert isinstance(module, OnnxModule)
        path = folder / self.file_name(module.flavor)
        write_model(_described(module.model, artifact), path)

    def file_name(self, flavor: str) -> str:
        """The file in a run folder that holds a flavour: ``model.onnx``, ``model-FLAVOR.onnx``."""
        return "model.onnx" if flavor == Flavor.FAST else f"model-{flavor}.onnx"

    def export(
        self, artifact: Artifact, path: str | Path, *, force: bool = False, **options: Any
    ) -> OnnxModule:
        """An artifact of any backend is an ONNX file.

        Args:
            artifact: What `fxq.compile` or `fxq.load` gave.
            path: The file.
            force: Whether an existing file is replaced.
            options: As for `lower`.

        Raises:
            LoweringError: Something has no ONNX form; all of it is listed.
            ArtifactError: The file exists and force is off, or it cannot be written.
        """
        model = _described(onnx_model(artifact.integers, **_options(options)), artifact)
        save_model(model, Path(path), force=force)
        return OnnxModule(artifact.integers, model)


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `onnx_model`, checked."""
    known = {"flavor": Flavor.FAST, "opset": OLDEST_OPSET, "dynamic": True}
    for name in options:
        if name not in known:
            raise UnknownNameError("option of the onnx backend", name, known)
    chosen: dict[str, Any] = {**known, **options}
    if chosen["flavor"] not in list(Flavor):
        raise UnknownNameError("flavor", str(chosen["flavor"]), [one.value for one in Flavor])
    chosen["flavor"] = Flavor(chosen["flavor"])
    check_opset(chosen["opset"])
    return chosen


def _described(model: onnx.ModelProto, artifact: Artifact) -> onnx.ModelProto:
    """The model with what the artifact knows of itself: recipe, network, accuracy."""
    from onnx import helper

    facts = {"fxq.recipe": _recipe_name(artifact)}
    network = artifact.metadata.get("model")
    if isinstance(network, dict):
        facts["fxq.network"] = str(network.get("spec", ""))
    accuracy = artifact.metadata.get("accuracy")
    if accuracy:
        facts["fxq.accuracy"] = json.dumps(accuracy, sort_keys=True)
    known = {name: value for name, value in facts.items() if value}
    helper.set_model_props(model, dict(sorted({**_properties(model), **known}.items())))
    return model


def _recipe_name(artifact: Artifact) -> str:
    import tomllib

    return str(tomllib.loads(artifact.recipe_toml).get("name", "")) if artifact.recipe_toml else ""
