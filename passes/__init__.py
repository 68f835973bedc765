"""The passes fxq brings along, one file each."""

from __future__ import annotations

from .calibrate import Calibrate
from .correct_bias import CorrectBias
from .fold_batch_norm import FoldBatchNorm
from .insert_observers import InsertObservers
from .mark_relu import MarkRelu
from .quantize_aciq import QuantizeAciq
from .quantize_minmax import QuantizeMinmax

CATALOG = (
    FoldBatchNorm,
    MarkRelu,
    InsertObservers,
    Calibrate,
    QuantizeMinmax,
    QuantizeAciq,
    CorrectBias,
)

__all__ = [
    "CATALOG",
    "Calibrate",
    "CorrectBias",
    "FoldBatchNorm",
    "InsertObservers",
    "MarkRelu",
    "QuantizeAciq",
    "QuantizeMinmax",
]
