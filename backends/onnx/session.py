"""ONNX Runtime sessions of exported models."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxq.errors import FxqError

from .file import fits_one_file, write_model

if TYPE_CHECKING:
    import onnx


class Session:
    """An ONNX Runtime session on the CPU, with as many threads as PyTorch has.

    Args:
        model: The model.
        outputs: Names of the tensors it returns; the model's outputs if not given.

    Raises:
        FxqError: ONNX Runtime refuses the model.
    """

    def __init__(self, model: onnx.ModelProto, outputs: Sequence[str] | None = None) -> None:
        self._session = _session(model)
        self._inputs = [one.name for one in self._session.get_inputs()]
        self.outputs = list(outputs or (one.name for one in self._session.get_outputs()))

    def run(self, inputs: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name.

        Raises:
            FxqError: The inputs do not fit the model.
        """
        arrays = [value.detach().cpu().contiguous().numpy() for value in inputs]
        try:
            found = self._session.run(self.outputs, dict(zip(self._inputs, arrays, strict=True)))
        except Exception as error:  # onnxruntime's own errors have no common base but this
            raise FxqError(
                f"ONNX Runtime cannot run the model: {str(error).splitlines()[0]}",
                where=f"inputs {[list(array.shape) for array in arrays]}",
                hint="inputs are of the example's shape, the batch size apart",
            ) from error
        return {
            name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)
        }


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 saturate in 16 bits on this CPU.

    Found by running one of the largest operands. Its option for such CPUs costs others more than
    half their speed, so that it must not be set everywhere.
    """
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.full((64, 16), 127, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [16, 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [16, 16])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": np.full((16, 64), 255, np.uint8)})
    return bool((found != 64 * 127 * 255).any())


def _session(model: onnx.ModelProto) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Its threads would go on spinning after a run, in the way of PyTorch's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    try:
        if fits_one_file(model):
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_model(model, path)
            return onnxruntime.InferenceSession(path, options, providers)
    except Exception as error:  # as above
        raise FxqError(
            f"ONNX Runtime refuses the model: {str(error).splitlines()[0]}",
            hint=f"this is onnxruntime {onnxruntime.__version__}; is the opset too new for it?",
        ) from error
