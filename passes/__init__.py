"""The passes fxq brings along, one file each."""

from __future__ import annotations

from .adaround import Adaround
from .calibrate import Calibrate
from .correct_bias import CorrectBias
from .equalize import Equalize
from .fold_batch_norm import FoldBatchNorm
from .insert_observers import InsertObservers
from .mark_relu import MarkRelu
from .mixed_precision import MixedPrecision
from .quantize_aciq import QuantizeAciq
from .quantize_clipped import QuantizeClipped
from .quantize_minmax import QuantizeMinmax
from .reconstruct import Reconstruct
from .reestimate_batch_norm import ReestimateBatchNorm

CATALOG = (
    FoldBatchNorm,
    MarkRelu,
    Equalize,
    InsertObservers,
    Calibrate,
    MixedPrecision,
    QuantizeMinmax,
    QuantizeClipped,
    QuantizeAciq,
    Adaround,
    Reconstruct,
    CorrectBias,
    ReestimateBatchNorm,
)

__all__ = [
    "CATALOG",
    "Adaround",
    "Calibrate",
    "CorrectBias",
    "Equalize",
    "FoldBatchNorm",
    "InsertObservers",
    "MarkRelu",
    "MixedPrecision",
    "QuantizeAciq",
    "QuantizeClipped",
    "QuantizeMinmax",
    "Reconstruct",
    "ReestimateBatchNorm",
]
