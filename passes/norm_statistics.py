"""What batch norms tell about values without any data, after they have been folded.

A batch norm's output has mean beta and deviation gamma in every channel. fold-batch-norm notes both
on the layer it folds into; here they are carried on, as those of normal distributions: through
ReLUs, to sums of values taken as independent, and unchanged through pools and reshapes, whose
values lie in the range of what they read.

Papers: Nagel, van Baalen, Blankevoort, Welling, "Data-free quantization through weight equalization
and bias correction", ICCV 2019, arXiv:1906.04721, Sec. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxq.graph.ops import FOLLOWERS, Kind, describe
from fxq.graph.program import facts
from fxq.numerics.normal import rectified_normal

_CARRIES = frozenset({*FOLLOWERS, Kind.OBSERVER, Kind.QUANTIZER})


@dataclass(frozen=True)
class NormStatistics:
    """Mean and deviation of a value.

    Attributes:
        mean: ``[channels]`` float64.
        std: ``[channels]`` float64.
    """

    mean: torch.Tensor
    std: torch.Tensor


def norm_statistics(node: fx.Node) -> NormStatistics | None:
    """Mean and deviation of a node's value per channel; None where no batch norms tell them.

    Args:
        node: Of a graph module, after fold-batch-norm. A ReLU fused into it is a node of its own.
    """
    known = facts(node)
    if known.norm_mean is not None and known.norm_std is not None:
        return NormStatistics(
            torch.tensor(known.norm_mean, dtype=torch.float64),
            torch.tensor(known.norm_std, dtype=torch.float64),
        )
    root = node.graph.owning_module
    op = describe(node, root) if root is not None else None
    if op is None or op.kind not in _CARRIES:
        return None
    read = [norm_statistics(source) for source in op.inputs]
    inputs = [one for one in read if one is not None]
    if not inputs or len(inputs) < len(read):
        return None
    means, stds = [one.mean for one in inputs], [one.std for one in inputs]
    if op.kind is Kind.RELU:
        return NormStatistics(*rectified_normal(means[0], stds[0]))
    if op.kind is Kind.CAT:
        return NormStatistics(torch.cat(means), torch.cat(stds))
    if op.kind is not Kind.ADD:
        return inputs[0]
    if len({one.shape for one in means}) > 1:  # a vector spread over channels
        return None
    return NormStatistics(torch.stack(means).sum(0), torch.stack(stds).square().sum(0).sqrt())
