"""Learning from a teacher: the divergence between the classes two networks see.

Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, arXiv:1503.02531.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.errors import SpecError, TrainingError
from fxq.training.options import TrainingOptions


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """``[]``: the Kullback-Leibler divergence from a teacher, in units that keep gradients alike.

    Args:
        logits: ``[N, classes, …]``.
        wanted: The teacher's, of the same shape.
        temperature: What both are divided by; its square multiplies the result.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0]])
        >>> divergence(teacher, teacher, 4.0).item()
        0.0
    """
    own, other = (F.log_softmax(one / temperature, 1) for one in (logits, wanted))
    per_class = F.kl_div(own, other, reduction="none", log_target=True).sum(1)
    return per_class.mean() * temperature**2


def own_teacher(
    teacher: nn.Module | None, options: TrainingOptions, device: torch.device
) -> nn.Module | None:
    """A copy of the teacher in eval mode on the device; None where the options ask for none.

    Raises:
        SpecError: They ask for one, and there is none.
    """
    if not options.distill:
        return None
    if teacher is None:
        raise SpecError(
            "there is no teacher to distill from",
            where="training option distill",
            hint="pass teacher=float_model to fit, or distill=0",
        )
    return copy.deepcopy(teacher).to(device).eval()


def wanted_logits(teacher: nn.Module, inputs: Sequence[Tensor], logits: Tensor) -> Tensor:
    """``[N, classes, …]`` float: what the teacher gives for inputs, without a gradient.

    Args:
        teacher: The teacher.
        inputs: As the network took them.
        logits: What the network gave.

    Raises:
        TrainingError: It gives something of another shape.
    """
    with torch.no_grad():
        wanted = teacher(*inputs)
    if not isinstance(wanted, Tensor) or wanted.shape != logits.shape:
        found = list(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
        raise TrainingError(
            f"the teacher gives {found}, and the network {list(logits.shape)}",
            hint="a teacher gives logits of the same classes",
        )
    return wanted.float()
