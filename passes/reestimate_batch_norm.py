"""reestimate-batch-norm: each layer's output has the float layer's mean and standard deviation.

A folded batch norm goes on normalizing with the statistics of the float network, though the values
it gets are those of the quantized one. Its statistics are taken anew, layer by layer, and folded
again: a factor per output channel goes into the scale of the weights, the rest into the bias. So
the codes stay as they are, and the layer runs on the same integers.

Papers: Hubara, Nahshan, Hanani, Banner, Soudry, "Improving Post Training Neural Quantization:
Layer-wise Calibration and Integer Programming", 2020, arXiv:2006.10518 ("batch normalization
tuning"); Sun et al., "Hybrid 8-bit floating point training and inference for deep neural networks",
NeurIPS 2019 (re-estimation of batch norm for inference).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fxq.contracts import Contract
from fxq.errors import SpecError
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor
from fxq.numerics.affine import short_scale
from fxq.pipeline import Pass

from .correct_bias import ELEMENTS
from .side_by_side import Meeting, fitting_images, run_side_by_side

DEAD = 1e-6
"""A channel that varies less than this share of the largest is constant but for rounding."""


@dataclass(frozen=True)
class ReestimateBatchNorm(Pass):
    """Mean and standard deviation of every integer layer's output are the float layer's.

    Layers that have no batch norm are treated alike. A constant channel keeps its scale, and only
    its mean is restored. A layer that several calls share is refused. What correct-bias does is
    part of this, so it need not run as well.

    Args:
        images: How many calibration images to use at most; of photographs, 32.
        largest_factor: A channel's scale changes by this factor at most, up or down; what would
            need more has lost its signal, and a larger factor would amplify noise.

    Raises:
        SpecError: The largest factor is below 1.
        CalibrationError: There is no calibration data.
    """

    name: ClassVar[str] = "reestimate-batch-norm"
    after: ClassVar[tuple[str, ...]] = ("calibrate",)
    contract: ClassVar[Contract] = Contract.CHANGES_NUMBERS

    images: int = 256
    largest_factor: float = 2.0

    def apply(self, program: Program, edit: Editor) -> None:
        """The layers have been visited in order."""
        if not self.largest_factor >= 1:
            raise SpecError(f"largest_factor must be at least 1, not {self.largest_factor!r}")

        def visit(at: Meeting) -> None:
            _match(at, self.largest_factor)
            edit.hit(at.node)

        inputs = fitting_images(program, self.images, elements=ELEMENTS)
        run_side_by_side(program, edit, visit, inputs)


def _match(at: Meeting, largest_factor: float) -> None:
    """The layer's output has the mean and the standard deviation it has in float."""
    layer = at.layer
    wanted_mean, wanted_std = _statistics(at, [layer.layer(x) for x in at.references])
    mean, std = _statistics(at, [layer(x) for x in at.inputs])
    alive = torch.minimum(std / std.max(), wanted_std / wanted_std.max()) > DEAD
    factor = torch.where(alive, wanted_std / std, 1).clamp(1 / largest_factor, largest_factor)
    scale = torch.where(alive, short_scale(layer.scale * factor), layer.scale.double())
    rescaled = layer.bias + (mean - layer.bias) * (scale / layer.scale)
    layer.bias_shift.add_(wanted_mean - rescaled)
    layer.scale.copy_(scale)


def _statistics(at: Meeting, outputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``[out]`` float64, twice: mean and standard deviation over all images and positions."""
    rows = [y.movedim(at.channel_dim, 0).flatten(1).double() for y in outputs]
    values = sum(row.shape[1] for row in rows)
    mean = torch.stack([row.sum(1) for row in rows]).sum(0) / values
    squares = [(row - mean.unsqueeze(1)).square().sum(1) for row in rows]
    return mean, (torch.stack(squares).sum(0) / values).sqrt()
