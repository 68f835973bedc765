"""What is trained, and then frozen."""

from __future__ import annotations

from fxq.quant.fixed_point_layers import FixedPointLayer, FixedPointProduct, FusedRelu
from fxq.quant.learned_layers import LearnedLayer
from fxq.quant.learned_values import FollowedRange, LearnedLevels, MovingRange
from fxq.quant.normalized import NormalizedLayer

Learned = (
    NormalizedLayer
    | LearnedLayer
    | LearnedLevels
    | MovingRange
    | FollowedRange
    | FixedPointLayer
    | FixedPointProduct
    | FusedRelu
)
"""Modules with a method ``frozen``: what is deployed in their place."""
