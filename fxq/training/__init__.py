"""A complete training loop for any network: `fit`. Nothing in fxq requires it."""

from fxq.training.checkpoint import initialize
from fxq.training.loop import fit
from fxq.training.options import Schedule, TrainingOptions
from fxq.training.watch import Training, Watch

__all__ = ["Schedule", "Training", "TrainingOptions", "Watch", "fit", "initialize"]
