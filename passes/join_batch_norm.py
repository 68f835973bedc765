"""join-batch-norm: a layer and the batch norm behind it become one node, and stay trainable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxq.contracts import Contract
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor, Miss
from fxq.pipeline import RulePass
from fxq.quant.normalized import NormalizedLayer

from .fold_batch_norm import norm_after_layer


def join_after_layer(program: Program, edit: Editor, node: fx.Node) -> bool | Miss | None:
    """A batch norm that reads a convolution or linear is joined with it."""
    found = norm_after_layer(program, node)
    if found is None or isinstance(found, Miss):
        return found
    norm, source = found
    layer = program.submodule(source)
    assert layer is not None
    edit.replace_module(source, NormalizedLayer(layer, norm))
    edit.remove(node)
    return True


@dataclass(frozen=True)
class JoinBatchNorm(RulePass):
    """Every batch norm that alone reads a convolution or linear is one node with it.

    What fold-batch-norm is to networks that are only run, this is to networks that are trained: the
    later passes see one layer, whose batch norm goes on learning. What cannot be joined is refused
    for the reasons that fold-batch-norm has.

    Example:
        >>> from torch import nn, zeros
        >>> from fxq.graph.capture import capture
        >>> from fxq.pipeline import Pipeline
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> journal = Pipeline(JoinBatchNorm()).run(capture(net, zeros(1, 3, 8, 8)))
        >>> journal["join-batch-norm"].census
        {'BatchNorm2d': -1, 'Conv2d': -1, 'Conv2d+BatchNorm2d': 1}
    """

    name: ClassVar[str] = "join-batch-norm"
    contract: ClassVar[Contract] = Contract.SAME_NUMBERS
    rules = (join_after_layer,)
