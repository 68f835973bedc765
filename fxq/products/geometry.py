"""Where the windows of a two-dimensional convolution lie."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation, each for height and width, and the number of groups."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def reach(self, kernel: Pair) -> Pair:
        """How many values a window spans, beyond its first."""
        height, width = (d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True))
        return height, width

    def output_size(self, size: Pair, kernel: Pair) -> Pair:
        """Height and width of the output for an input of this size."""
        spans = zip(size, self.padding, self.reach(kernel), self.stride, strict=True)
        height, width = ((n + 2 * p - reach - 1) // s + 1 for n, p, reach, s in spans)
        return height, width
