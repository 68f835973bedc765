"""correct-bias: each layer's mean output on real data is what it was in float.

Rounding and clipping move the mean of a layer's output. For every layer in order, on a sample of
the calibration images, the bias takes up the difference per output channel::

    bias += mean(float output) - mean(quantized output)

where the quantized output is computed from already corrected layers. This is the empirical bias
correction of Nagel et al., not ACIQ's, which restores the mean of each channel's *weights*; the two
work together.

Papers: Nagel, van Baalen, Blankevoort, Welling, "Data-free quantization through weight equalization
and bias correction", ICCV 2019, arXiv:1906.04721, Sec. 4.2 and supplement D (empirical form).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxq.contracts import Contract
from fxq.errors import CalibrationError
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor
from fxq.pipeline import Pass
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer, along_channels

from .images import joined


@dataclass(frozen=True)
class CorrectBias(Pass):
    """The mean output of every integer layer equals the float layer's, channel by channel.

    A layer called more than once with the same weights is refused: its calls would need different
    biases.

    Args:
        images: How many of the kept calibration images to use at most.

    Raises:
        CalibrationError: Calibration kept no images.
    """

    name: ClassVar[str] = "correct-bias"
    after: ClassVar[tuple[str, ...]] = ("calibrate",)
    contract: ClassVar[Contract] = Contract.CHANGES_NUMBERS

    images: int = 256

    def apply(self, program: Program, edit: Editor) -> None:
        """The sample has been run through the float and the integer network side by side."""
        if not program.sample:
            raise CalibrationError(
                "calibration kept no images to compare on", hint="run calibrate before correct-bias"
            )
        inputs = program.laid_out(joined(program.sample, self.images))
        shared = _shared_layers(program, edit)
        _SideBySide(program, edit, shared).run(*(_Pair(value, value) for value in inputs))


@dataclass(frozen=True)
class _Pair:
    """A value in the float network and in the quantized one."""

    float: Any
    quantized: Any


class _SideBySide(fx.Interpreter):
    """Runs both networks node by node and corrects each layer as it is met."""

    def __init__(self, program: Program, edit: Editor, shared: set[str]) -> None:
        super().__init__(program.module)
        self._program = program
        self._edit = edit
        self._shared = shared
        self._layers = sum(isinstance(m, QuantizedLayer) for m in program.module.modules())
        self._done = 0

    def run_node(self, n: fx.Node) -> Any:
        """The pair of values of a node."""
        self._edit.current = n
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        module = self._program.submodule(n)
        reference = (
            _first(_side(args, "float"))
            if isinstance(module, ActivationQuantizer)
            else self._call(
                n,
                module.layer if isinstance(module, QuantizedLayer) else None,
                args,
                kwargs,
                "float",
            )
        )
        quantized = self._call(n, None, args, kwargs, "quantized")
        if isinstance(module, QuantizedLayer) and str(n.target) not in self._shared:
            quantized = self._correct(n, module, reference, quantized)
        return _Pair(reference, quantized)

    def _call(self, n: fx.Node, layer: Any, args: Any, kwargs: Any, side: str) -> Any:
        args, kwargs = _side(args, side), _side(kwargs, side)
        if layer is not None:
            return layer(*args, **kwargs)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _correct(
        self, n: fx.Node, layer: QuantizedLayer, reference: torch.Tensor, quantized: torch.Tensor
    ) -> torch.Tensor:
        dim = quantized.dim() - 1 if layer.fxq_kind == "linear" else 1
        others = [other for other in range(quantized.dim()) if other != dim]
        shift = (reference - quantized).mean(others)
        layer.bias_shift.add_(shift)
        self._edit.hit(n)
        self._done += 1
        self._program.report_progress("correct-bias", self._done, self._layers)
        return quantized + along_channels(layer, shift, quantized)


def _side(value: Any, name: str) -> Any:
    return fx.node.map_aggregate(value, lambda v: getattr(v, name) if isinstance(v, _Pair) else v)


def _first(args: Any) -> Any:
    return args[0]


def _shared_layers(program: Program, edit: Editor) -> set[str]:
    seen: set[str] = set()
    shared: set[str] = set()
    for node in program.nodes():
        if isinstance(program.submodule(node), QuantizedLayer):
            if str(node.target) in seen:
                shared.add(str(node.target))
                edit.miss(node, "its weights are shared by several calls, which differ in bias")
            seen.add(str(node.target))
    return shared
