"""The onnx backend: an integer program as a QDQ model, and an ``nn.Module`` that runs it.

The model is standard ONNX, opset 21 or later: QuantizeLinear and DequantizeLinear around float
operators, on the very integers of the program. `emitter` knows registers, `layers`, `weights` and
`moves` emit instructions, `islands` has torch.onnx export the float ones, `model` puts it together,
`session` runs it in ONNX Runtime, `file` writes it.
"""

from __future__ import annotations

from .backend import OnnxBackend
from .module import OnnxModule

__all__ = ["OnnxBackend", "OnnxModule"]
