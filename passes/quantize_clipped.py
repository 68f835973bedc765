"""quantize-clipped: activations over ranges found by search, by percentile, or from batch norms.

Papers: Migacz, "8-bit inference with TensorRT", GTC 2017 (``kl``); Nagel, van Baalen, Blankevoort,
Welling, "Data-free quantization through weight equalization and bias correction", ICCV 2019,
arXiv:1906.04721, Sec. 5 (``batch-norm``); Nagel et al., "A white paper on neural network
quantization", 2021, arXiv:2106.08295, Sec. 3.1 (``mse``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch

from fxq.errors import SpecError
from fxq.numerics.clipping import mse_clip_from_histogram, percentile_range
from fxq.numerics.divergence import kl_range
from fxq.numerics.normal import normal_range
from fxq.quant.observers import Observer

from .norm_statistics import norm_statistics
from .places import Place
from .post_training import PostTrainingQuantization
from .quantization import histogram_of


class Clip(StrEnum):
    """How the range of a value is chosen."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    KL = "kl"
    BATCH_NORM = "batch-norm"


@dataclass(frozen=True)
class QuantizeClipped(PostTrainingQuantization):
    """Activations are clipped to a range that assumes no law, weights as their options say.

    ``percentile``, ``mse`` and ``kl`` need histograms. Values of 8 bits keep their whole range at
    the network's ends and where only adds and pools read them. ``batch-norm`` needs no data where
    a folded batch norm tells mean and deviation of a value, or of all that it is made of by adds,
    ReLUs and pools; other values, the network's input first, take the range that was observed.

    Args:
        clip: How ranges are chosen: all that was seen, a share of it, the least squared error, the
            least Kullback-Leibler divergence, or deviations around the means of batch norms.
        percentile: For ``percentile``: the share of values that are kept, in (0, 1].
        deviations: For ``batch-norm``: how many.

    Raises:
        SpecError: An option is out of range, or the observers hold no distribution.
        CalibrationError: A value has neither been observed nor have batch norms told its range.
    """

    name: ClassVar[str] = "quantize-clipped"
    after: ClassVar[tuple[str, ...]] = ("insert-observers",)

    clip: Clip = Clip.MSE
    percentile: float = 0.9999
    deviations: float = 6.0

    def check_options(self, where: str = "") -> None:
        """As every quantize pass, and the share and deviations are possible."""
        super().check_options(where)
        if not 0 < self.percentile <= 1:
            raise SpecError(
                f"percentile is a share in (0, 1], not {self.percentile}", where=where or self.name
            )
        if not self.deviations > 0:
            raise SpecError(
                f"deviations must be positive, not {self.deviations}", where=where or self.name
            )

    def needs_data(self, place: Place) -> bool:
        """Not where batch norms tell the range."""
        return self._from_batch_norms(place) is None

    def activation_range(self, observer: Observer, place: Place) -> tuple[Any, Any]:
        """The range of the chosen rule."""
        known = self._from_batch_norms(place)
        if known is not None:
            return known
        if self.clip in (Clip.MINMAX, Clip.BATCH_NORM) or place.keeps_range:
            return observer.range()
        seen = histogram_of(observer, f"clip = {self.clip}")
        if self.clip is Clip.PERCENTILE:
            return percentile_range(seen, self.percentile, fused_relu=place.relu)
        search = mse_clip_from_histogram if self.clip is Clip.MSE else kl_range
        return search(seen, place.bits, fused_relu=place.relu)

    def _from_batch_norms(self, place: Place) -> tuple[Any, Any] | None:
        """The range that batch norms tell of all values that share a scale, if they do."""
        if self.clip is not Clip.BATCH_NORM:
            return None
        found = [norm_statistics(carrier) for carrier in place.sharing]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        mean, std = torch.cat([one.mean for one in known]), torch.cat([one.std for one in known])
        return normal_range(mean, std, self.deviations)
