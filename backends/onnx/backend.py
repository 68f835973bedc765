"""`OnnxBackend`: lowering to ONNX, exporting, loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxq.backend import Obstacle
from fxq.errors import ArtifactError, FxqError, LoweringError, UnknownNameError
from fxq.integer.lowering import lower_to_integers
from fxq.integer.obstacles import obstacles
from fxq.integer.program import IntegerProgram

from .emitter import Flavor
from .file import read_model, save_model, write_model
from .model import OLDEST_OPSET, check_opset, onnx_model, weights_digest
from .module import OnnxModule, properties

if TYPE_CHECKING:
    import onnx

    from fxq.artifact import Artifact
    from fxq.graph.program import Program


class OnnxBackend:
    """A quantized ONNX model, run by ONNX Runtime."""

    name = "onnx"
    summary = "A standard QDQ model for ONNX Runtime (flavors fast, packed, compact)"

    def check_options(self, **options: Any) -> None:
        """The options are possible ones.

        Raises:
            FxqError: An option or a flavour is unknown, or the opset impossible.
        """
        _options(options)

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
        if properties(model).get("fxq.weights_sha256") != weights_digest(integers):
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
    helper.set_model_props(model, dict(sorted({**properties(model), **known}.items())))
    return model


def _recipe_name(artifact: Artifact) -> str:
    import tomllib

    return str(tomllib.loads(artifact.recipe_toml).get("name", "")) if artifact.recipe_toml else ""
