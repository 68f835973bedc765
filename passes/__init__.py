"""The passes fxq brings along, one file each."""

from __future__ import annotations

from .adapt_backward import AdaptBackward
from .adaround import Adaround
from .calibrate import Calibrate
from .correct_bias import CorrectBias
from .equalize import Equalize
from .fold_batch_norm import FoldBatchNorm
from .freeze_trained import FreezeTrained
from .insert_observers import InsertObservers
from .join_batch_norm import JoinBatchNorm
from .load_clips import LoadClips
from .mark_relu import MarkRelu
from .mixed_precision import MixedPrecision
from .quantize_aciq import QuantizeAciq
from .quantize_apot import QuantizeApot
from .quantize_clipped import QuantizeClipped
from .quantize_minmax import QuantizeMinmax
from .reconstruct import Reconstruct
from .reestimate_batch_norm import ReestimateBatchNorm

CATALOG = (
    FoldBatchNorm,
    JoinBatchNorm,
    MarkRelu,
    Equalize,
    InsertObservers,
    Calibrate,
    MixedPrecision,
    QuantizeMinmax,
    QuantizeClipped,
    QuantizeAciq,
    QuantizeApot,
    AdaptBackward,
    LoadClips,
    Adaround,
    Reconstruct,
    CorrectBias,
    ReestimateBatchNorm,
    FreezeTrained,
)

__all__ = [
    "CATALOG",
    "AdaptBackward",
    "Adaround",
    "Calibrate",
    "CorrectBias",
    "Equalize",
    "FoldBatchNorm",
    "FreezeTrained",
    "InsertObservers",
    "JoinBatchNorm",
    "LoadClips",
    "MarkRelu",
    "MixedPrecision",
    "QuantizeAciq",
    "QuantizeApot",
    "QuantizeClipped",
    "QuantizeMinmax",
    "Reconstruct",
    "ReestimateBatchNorm",
]
