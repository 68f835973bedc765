"""`Picture`: a matplotlib figure that needs no display and no global state.

This module imports matplotlib; import it where something is drawn, not before.
"""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, RED, YELLOW, GREY = "#4c78a8", "#e45756", "#f2cf5b", "#bab0ac"


class Picture(Figure):
    """A figure that pyplot does not know of; notebooks show it all the same.

    Args:
        width: In inches.
        height: In inches.

    Example:
        >>> picture = Picture(4, 3)
        >>> picture.get_size_inches().tolist(), picture._repr_png_()[1:4]
        ([4.0, 3.0], b'PNG')
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=96)
        return buffer.getvalue()
