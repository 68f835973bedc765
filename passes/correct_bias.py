"""correct-bias: each layer's mean output on real data is what it was in float.

Rounding and clipping move the mean of a layer's output. For every layer in order, on calibration
images, the bias takes up the difference per output channel. A layer is linear, so its mean output
is its output for the mean input: both are exact, and cost one image per layer.

This is the bias correction of Nagel et al., not ACIQ's, which restores the mean of each channel's
*weights*; the two work together.

Papers: Nagel, van Baalen, Blankevoort, Welling, "Data-free quantization through weight equalization
and bias correction", ICCV 2019, arXiv:1906.04721, Sec. 4.2 and supplement D (empirical form).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch

from fxq.contracts import Contract
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor
from fxq.numerics.bias_correction import bias_shift
from fxq.pipeline import Pass

from .side_by_side import Meeting, fitting_images, run_side_by_side

ELEMENTS = 32 * 3 * 224 * 224
"""32 photographs: differences on the same image vary little from image to image."""


class Method(StrEnum):
    """What the bias makes up for."""

    EMPIRICAL = "empirical"
    ANALYTIC = "analytic"


@dataclass(frozen=True)
class CorrectBias(Pass):
    """The mean output of every integer layer equals the float layer's, channel by channel.

    A layer called more than once with the same weights is refused: its calls would need different
    biases.

    Args:
        images: How many calibration images to use at most; of photographs, 32.
        method: ``empirical``: everything that moved the mean, the errors of earlier layers, too,
            ``bias += mean(W x) - mean(Wq xq)``. ``analytic``: only the rounding of this layer's
            weights, ``bias += (W - Wq) E[xq]`` with one mean per input channel; exact inside
            images, approximate at zero-padded borders, where fewer taps see the image.

    Raises:
        CalibrationError: There is no calibration data.
    """

    name: ClassVar[str] = "correct-bias"
    after: ClassVar[tuple[str, ...]] = ("calibrate",)
    contract: ClassVar[Contract] = Contract.CHANGES_NUMBERS

    images: int = 256
    method: Method = Method.EMPIRICAL

    def apply(self, program: Program, edit: Editor) -> None:
        """The images have been run through the float and the integer network side by side."""

        def visit(at: Meeting) -> None:
            shift = mean_shift(at) if self.method is Method.EMPIRICAL else _analytic(at)
            at.layer.bias_shift.add_(shift)
            edit.hit(at.node)

        inputs = fitting_images(program, self.images, elements=ELEMENTS)
        run_side_by_side(program, edit, visit, inputs)


def mean_shift(at: Meeting) -> torch.Tensor:
    """``[out]``: how far the mean output is below that of the float network."""
    wanted: torch.Tensor = at.layer.layer(_mean(at.references))
    difference = wanted - at.layer(_mean(at.inputs))
    shift: torch.Tensor = difference.movedim(at.channel_dim, 0).flatten(1).mean(1)
    return shift


def _analytic(at: Meeting) -> torch.Tensor:
    """``[out]``: how far rounding the weights lowers the mean output for the mean input."""
    mean = _mean(at.inputs).movedim(at.channel_dim, 0).flatten(1).mean(1)
    groups = int(getattr(at.layer.layer, "groups", 1))
    weight: torch.Tensor = at.layer.layer.weight  # type: ignore[assignment]
    return bias_shift(weight.detach(), at.layer.weight(), mean, groups)


def _mean(chunks: list[torch.Tensor]) -> torch.Tensor:
    """``[1, ...]``: the mean image of chunks ``[images, ...]``."""
    total = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0)
    images = sum(len(chunk) for chunk in chunks)
    return (total / images).to(chunks[0].dtype).unsqueeze(0)
