"""equalize: channels that share a scale get ranges that suit it; the network computes the same.

A positive factor per channel passes through ReLU, pooling, zero padding, addition and flattening.
So for every channel space (see `fxq.graph.channels`), with factors ``t``::

    rows:    W1[c] / t[c],  b1[c] / t[c]        of every layer that makes it
    columns: W2[:, c] * t[c]                    of every layer that reads it

Rows cost nothing: each output channel of a weight has a scale of its own. Nor do the columns of a
depthwise convolution, which are rows of it: there every channel of its input can be given the same
range, which is per-channel quantization of the activations with one scale for the integers.

A bounded ReLU stays as it is. With ``t <= 1`` it then cuts channel ``c`` at ``t[c]`` times the old
bound, which `Bounded.CLIP` keeps at or above all that was seen.

Papers:
    Nagel, van Baalen, Blankevoort, Welling, "Data-free quantization through weight equalization and
    bias correction", ICCV 2019, arXiv:1906.04721, Sec. 4.1.
    Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant", ICML 2023, arXiv:2211.10438, Sec. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxq.calibration import pieces
from fxq.contracts import Contract
from fxq.errors import CalibrationError, SpecError
from fxq.graph.channels import ChannelSpace, channel_spaces
from fxq.graph.ops import ANCHORS, Kind, describe
from fxq.graph.program import Program, facts, write_facts
from fxq.graph.rewrite import Editor
from fxq.numerics.equalization import (
    activation_scale,
    check_strength,
    column_ranges,
    cross_layer_scale,
    keep_within,
    row_ranges,
    scale_columns,
)
from fxq.pipeline import Pass
from fxq.quant.quantizers import channel_view

from .calibrate import PIECE_ELEMENTS
from .images import calibration_images

_ROUNDS = 100
_SETTLED = 1e-3
_READS_CODES = ANCHORS | {Kind.ADD, Kind.AVG_POOL, Kind.GLOBAL_AVG_POOL}


class By(StrEnum):
    """What the scales make equal."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"


class Bounded(StrEnum):
    """What becomes of channels that pass a ReLU with an upper bound."""

    KEEP = "keep"
    CLIP = "clip"


@dataclass(frozen=True)
class Equalize(Pass):
    """Every channel space is scaled so that its channels, or the weights around it, are alike.

    A space is refused with the reason where the network's input or output is in it, where an
    operator does not commute with a factor per channel, or where weights are shared.

    Args:
        by: ``weights``: each channel's row and column get the same range (DFQ, no data needed);
            ``activations``: ranges seen on calibration images are evened out (SmoothQuant).
        strength: For activations: 1 gives every channel the same range, 0 every column. Where only
            depthwise convolutions read the channels it is 1, since their columns cost nothing.
        free_only: Whether only those are scaled, and nothing is traded for anything.
        bounded: ``keep`` refuses spaces with a bounded ReLU (ReLU6); ``clip`` scales them for
            activations, so that a channel is cut at no less than the largest value seen.
        images: For activations: how many calibration images to look at.

    Raises:
        SpecError: Strength outside 0 to 1, or ``clip`` without activations.
        CalibrationError: Images are needed and there are none, or they do not fit the model.
    """

    name: ClassVar[str] = "equalize"
    contract: ClassVar[Contract] = Contract.SAME_NUMBERS

    by: By = By.ACTIVATIONS
    strength: float = 0.5
    free_only: bool = False
    bounded: Bounded = Bounded.KEEP
    images: int = 64

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.images < 1:
            raise SpecError(f"images must be at least 1, not {self.images!r}")
        if self.bounded is Bounded.CLIP and self.by is By.WEIGHTS:
            raise SpecError(
                "weights do not say where a bounded ReLU may cut a channel",
                hint='set by = "activations", or bounded = "keep"',
            )

    @property
    def promise(self) -> Contract:
        """A bounded ReLU that is clipped changes values larger than all that were seen."""
        kept = self.bounded is Bounded.KEEP
        return Contract.SAME_NUMBERS if kept else Contract.CHANGES_NUMBERS

    @property
    def wants_images(self) -> int:
        """None for weights."""
        return self.images if self.by is By.ACTIVATIONS else 0

    def apply(self, program: Program, edit: Editor) -> None:
        """Weights and biases around every space are rescaled."""
        spaces = [
            space for space in channel_spaces(program) if not self._refuses(program, space, edit)
        ]
        if not spaces:
            return
        if self.by is By.WEIGHTS:
            _even_weights(program, spaces)
        else:
            self._even_activations(program, edit, spaces)
        for node in dict.fromkeys(n for space in spaces for n in space.producers):
            edit.hit(node)

    def _refuses(self, program: Program, space: ChannelSpace, edit: Editor) -> bool:
        why = space.obstacle
        if why is None and not (space.producers and space.consumers):
            why = f"no layer {'reads' if space.producers else 'makes'} its channels"
        if why is None and space.upper is not None and self.bounded is Bounded.KEEP:
            why = f"a ReLU bounds it at {space.upper:g}, which a factor per channel would move"
        if why is None and self.free_only and not _costs_nothing(program, space):
            why = "its columns would change, which free_only leaves alone"
        if why is not None:
            edit.miss(space.values[0], why)
        return why is not None

    def _even_activations(self, program: Program, edit: Editor, spaces: list[ChannelSpace]) -> None:
        seen = _observed(program, spaces, self.images)
        before, after = [], []
        for space, ranges in zip(spaces, seen, strict=True):
            strength = 1.0 if _costs_nothing(program, space) else self.strength
            scale = activation_scale(ranges, _columns(program, space), strength)
            if space.upper is not None:
                scale = keep_within(scale, ranges, space.upper)
            _rescale(program, space, scale)
            before.append(_unevenness(ranges))
            after.append(_unevenness(ranges / scale))
        edit.note(
            f"{len(spaces)} channel spaces: the largest channel was {_mean(before):.3g} times the "
            f"median channel, and is {_mean(after):.3g} times"
        )


def _even_weights(program: Program, spaces: list[ChannelSpace]) -> None:
    """Every channel's row is as large as its column, in all spaces at once (DFQ, Sec. 4.1.2)."""
    for done in range(_ROUNDS):
        change = 0.0
        for space in spaces:
            scale = cross_layer_scale(_rows(program, space), _columns(program, space))
            _rescale(program, space, scale)
            change = max(change, float(scale.log().abs().max()))
        program.report_progress("equalize", done + 1, None)
        if change < _SETTLED:
            return


def _rescale(program: Program, space: ChannelSpace, scale: torch.Tensor) -> None:
    """The channels of a space are divided by ``scale: [channels]``."""
    for node in space.producers:
        layer = _layer(program, node)
        factor = _spread(1 / scale, len(layer.weight))
        _set(layer, "weight", layer.weight.double() * channel_view(layer, factor))
        if layer.bias is not None:
            _set(layer, "bias", layer.bias.double() * factor)
        _rescale_statistics(node, factor)
    for node in space.consumers:
        layer = _layer(program, node)
        groups = _groups(layer)
        factor = _spread(scale, groups * layer.weight.shape[1])
        _set(layer, "weight", scale_columns(layer.weight, factor, groups))


def _rescale_statistics(node: fx.Node, factor: torch.Tensor) -> None:
    """What a folded batch norm said about a layer's output still holds."""
    known = facts(node)
    if known.norm_mean is None or known.norm_std is None:
        return
    scaled = [
        torch.tensor(v, dtype=torch.float64) * factor for v in (known.norm_mean, known.norm_std)
    ]
    write_facts(node, norm_mean=tuple(scaled[0].tolist()), norm_std=tuple(scaled[1].tolist()))


def _rows(program: Program, space: ChannelSpace) -> torch.Tensor:
    """``[channels]``: the largest weight that makes each channel."""
    layers = [_layer(program, node) for node in space.producers]
    return _largest([row_ranges(layer.weight) for layer in layers], space)


def _columns(program: Program, space: ChannelSpace) -> torch.Tensor:
    """``[channels]``: the largest weight that reads each channel."""
    layers = [_layer(program, node) for node in space.consumers]
    return _largest([column_ranges(layer.weight, _groups(layer)) for layer in layers], space)


def _largest(ranges: list[torch.Tensor], space: ChannelSpace) -> torch.Tensor:
    """``[channels]``: the largest of ranges that are as wide as the space or whole times wider."""
    return torch.stack([values.reshape(space.channels, -1).amax(1) for values in ranges]).amax(0)


def _spread(values: torch.Tensor, width: int) -> torch.Tensor:
    """``[channels]`` values, repeated for the flattened elements of each channel."""
    return values.repeat_interleave(width // len(values))


def _set(layer: Any, name: str, value: torch.Tensor) -> None:
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def _layer(program: Program, node: fx.Node) -> Any:
    return program.submodule(node)


def _groups(layer: Any) -> int:
    return int(getattr(layer, "groups", 1))


def _costs_nothing(program: Program, space: ChannelSpace) -> bool:
    """Whether only depthwise convolutions read the channels."""
    return all(_reads_one_channel(_layer(program, node)) for node in space.consumers)


def _reads_one_channel(layer: Any) -> bool:
    """Whether every weight of an output channel reads the same input channel."""
    return bool(layer.weight.shape[1] == 1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _unevenness(ranges: torch.Tensor) -> float:
    """The largest range over the median of those that are not zero."""
    live = ranges[ranges > 0]
    return float(live.max() / live.median()) if len(live) else 1.0


# ---- ranges of activations -------------------------------------------------------------------


def _observed(program: Program, spaces: list[ChannelSpace], images: int) -> list[torch.Tensor]:
    """``[channels]`` for each space: the largest magnitude of what integers are computed with."""
    watched = {node: space for space in spaces for node in space.values if _is_read(program, node)}
    ranges = _Ranges(program, watched)
    inputs = calibration_images(program, images)
    parts = list(pieces(inputs, PIECE_ELEMENTS))
    for done, piece in enumerate(parts, start=1):
        try:
            ranges.run(*piece)
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise CalibrationError(
                f"the model fails on a calibration batch: {str(error).splitlines()[0]}",
                hint="batches must look like the example input, batch size apart",
            ) from error
        program.report_progress("equalize", done, len(parts))
    return [_checked(ranges.found[space]) for space in spaces]


class _Ranges(fx.Interpreter):
    """Runs a program and keeps the largest magnitude of each channel of some values."""

    def __init__(self, program: Program, watched: dict[fx.Node, ChannelSpace]) -> None:
        super().__init__(program.module)
        self._watched = watched
        self.found: dict[ChannelSpace, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, having been looked at."""
        value = super().run_node(n)
        space = self._watched.get(n)
        if space is not None:
            others = [dim for dim in range(value.dim()) if dim != 1]
            largest = value.abs().amax(others).reshape(space.channels, -1).amax(1).double()
            held = self.found.get(space)
            self.found[space] = largest if held is None else torch.maximum(held, largest)
        return value


def _is_read(program: Program, node: fx.Node) -> bool:
    """Whether integers are computed with a value, so that it has a scale."""
    return any(describe(user, program.module).kind in _READS_CODES for user in node.users)


def _checked(ranges: torch.Tensor) -> torch.Tensor:
    if not bool(ranges.isfinite().all()):
        raise CalibrationError(
            "an activation is NaN or infinite on the calibration images",
            hint="check the images and their normalization",
        )
    return ranges
