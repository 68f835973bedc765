"""ONNX Runtime's own post-training quantization, as something to be compared with."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxq.errors import FxqError


class SessionModule(nn.Module):
    """An ONNX file run by ONNX Runtime, with as many threads as PyTorch has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # As in fxq's own sessions: threads that go on spinning would slow who is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self._names = [one.name for one in self._session.get_inputs()]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The first output."""
        arrays = [value.contiguous().numpy() for value in inputs]
        feed = dict(zip(self._names, arrays, strict=True))
        return torch.from_numpy(self._session.run(None, feed)[0])


def onnxruntime_int8(
    model: nn.Module, example: tuple[Any, ...], batches: Iterable[Any]
) -> nn.Module:
    """The network through ``torch.onnx.export``, ``quant_pre_process`` and ``quantize_static``.

    QDQ, per-channel int8 weights and uint8 activations: the combination that is fastest on x86;
    the default of int8 activations takes about twice as long.

    Args:
        model: The network.
        example: One batch of arguments.
        batches: Batches to calibrate on.

    Raises:
        FxqError: It cannot be exported or quantized; the reason is given.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _silence():
                return SessionModule(_quantized(model, example, list(batches), Path(folder)))
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise FxqError(
                f"onnxruntime cannot quantize this network: {first}",
                hint="leave onnxruntime out of --against",
            ) from error


def _quantized(
    model: nn.Module, example: tuple[Any, ...], batches: list[Any], folder: Path
) -> Path:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    exported, prepared, quantized = (folder / f"{name}.onnx" for name in ("float", "pre", "int8"))
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in example)
    enough = tuple(torch.cat([value] * 2) if len(value) == 1 else value for value in example)
    torch.onnx.export(
        model.eval(),
        enough,
        str(exported),
        opset_version=21,
        dynamo=True,
        dynamic_shapes=dynamic,
        external_data=False,
        verbose=False,
    )
    quant_pre_process(str(exported), str(prepared))
    names = [one.name for one in onnx.load(prepared).graph.input]
    quantize_static(
        str(prepared),
        str(quantized),
        _reader(names, batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return quantized


def _reader(names: list[str], batches: list[Any]) -> Any:
    """What ``quantize_static`` reads calibration batches from."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            if batch is None:
                return None
            arguments = (batch,) if isinstance(batch, torch.Tensor) else tuple(batch)
            return {
                name: value.contiguous().numpy()
                for name, value in zip(names, arguments, strict=False)
            }

    return Reader()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporter and quantizer say nothing; errors are raised."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
