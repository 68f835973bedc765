"""quantize-minmax: uniform quantization of the whole observed range, every paper's baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fxq.quant.observers import Observer

from .places import Place
from .post_training import PostTrainingQuantization


@dataclass(frozen=True)
class QuantizeMinmax(PostTrainingQuantization):
    """Values are quantized over the calibrated range, weights as their options say.

    A moving average of the range is an option of insert-observers
    (``momentum``), and per-channel ranges of activations are, too (``per_channel``).

    Args:
        symmetric: Whether signed activations have their zero point in the middle of the codes.

    Reference:
        Jacob et al., "Quantization and training of neural networks for efficient
        integer-arithmetic-only inference", CVPR 2018, arXiv:1712.05877.
    """

    name: ClassVar[str] = "quantize-minmax"

    symmetric: bool = False

    def activation_range(self, observer: Observer, place: Place) -> tuple[Any, Any]:
        """The extremes the observer saw."""
        return observer.range()

    def symmetric_activations(self) -> bool:
        """As the option says."""
        return self.symmetric
