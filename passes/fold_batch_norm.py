"""fold-batch-norm: batch norms disappear into the convolutions and linears beside them.

In eval mode a batch norm is the affine map ``y = s * x + t`` per channel, with
``s = gamma / sqrt(var + eps)`` and ``t = beta - s * mean``.

* After a layer: ``s * (W x + b) + t = (s W) x + (s b + t)``; always exact.
* Before a layer: ``W (s x + t) + b = (W s) x + (W t + b)``; exact where the layer pads nothing with
  zeros, or where ``t`` is zero (a padded zero is not ``t``).

``gamma`` may be zero or negative; the fold does not care.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxq.contracts import Contract
from fxq.graph.ops import ANCHORS, Kind, describe
from fxq.graph.program import Program, facts
from fxq.graph.rewrite import Editor, Miss
from fxq.pipeline import RulePass
from fxq.quant.normalized import affine_of, folded, gamma_and_beta, set_weights
from fxq.quant.quantizers import is_transposed, output_channels


def fold_after_layer(program: Program, edit: Editor, node: fx.Node) -> bool | Miss | None:
    """A batch norm that reads a convolution or linear is folded into it."""
    found = norm_after_layer(program, node)
    if found is None or isinstance(found, Miss):
        return found
    norm, source = found
    layer: Any = program.submodule(source)
    set_weights(layer, *folded(layer, norm))
    mean, deviation = _output_of(norm)
    edit.write_facts(source, norm_mean=tuple(mean.tolist()), norm_std=tuple(deviation.tolist()))
    edit.remove(node)
    return True


def fold_before_layer(program: Program, edit: Editor, node: fx.Node) -> bool | Miss | None:
    """A batch norm read only by one convolution or linear is folded into it where that is exact."""
    found = _batch_norm(program, node)
    if found is None:
        return None
    norm, source = found
    users = list(node.users)
    if len(users) != 1 or describe(users[0], program.module).kind not in ANCHORS:
        return Miss(node.name, _why_alone(program, node, source))
    target = users[0]
    refusal = _refuse(program, node, norm, target)
    if refusal is not None:
        return refusal
    layer: Any = program.submodule(target)
    scale, shift = affine_of(norm)
    if not _exact_before(layer, shift):
        return Miss(
            node.name,
            f"%{target.name} pads with zeros, and the batch norm would have shifted them",
        )
    weight = layer.weight.double()
    bias = weight.new_zeros(output_channels(layer)) if layer.bias is None else layer.bias.double()
    bias = bias + _through(layer, weight, shift)
    set_weights(layer, weight * _per_input(layer, scale), bias)
    edit.remove(node)
    return True


@dataclass(frozen=True)
class FoldBatchNorm(RulePass):
    """Every batch norm that can be is folded into the convolution or linear beside it.

    ``weight: [out, in/groups, ...]`` is scaled by ``gamma / sqrt(var + eps)`` and the bias is
    adjusted; see the module's formulas. A batch norm that cannot be folded is refused with the
    reason: a layer called more than once, a layer with other users, zero padding after a shift.

    Example:
        >>> from fxq.graph.capture import capture
        >>> from fxq.pipeline import Pipeline
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> journal = Pipeline(FoldBatchNorm()).run(capture(net, torch.zeros(1, 3, 8, 8)))
        >>> journal["fold-batch-norm"].census
        {'BatchNorm2d': -1}
    """

    name: ClassVar[str] = "fold-batch-norm"
    contract: ClassVar[Contract] = Contract.SAME_NUMBERS
    rules = (fold_after_layer, fold_before_layer)


def norm_after_layer(program: Program, node: fx.Node) -> tuple[nn.Module, fx.Node] | Miss | None:
    """The batch norm a node calls and the layer it alone reads; why it must stay apart; or None."""
    found = _batch_norm(program, node)
    if found is None or found[1].op != "call_module":
        return None
    norm, source = found
    if describe(source, program.module).kind not in ANCHORS:
        return None
    return _refuse(program, node, norm, source) or found


def _output_of(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """``[channels]`` float64, twice: mean and deviation of what a batch norm puts out."""
    module: Any = norm
    gamma, beta = gamma_and_beta(norm)
    shrunk = (module.running_var / (module.running_var + module.eps)).double().sqrt()
    return beta, gamma.abs() * shrunk


def _batch_norm(program: Program, node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """The batch norm a node calls and the node it reads."""
    op = describe(node, program.module)
    if op.kind is not Kind.BATCH_NORM or op.module is None:
        return None
    return op.module, op.inputs[0]


def _refuse(program: Program, node: fx.Node, norm: nn.Module, layer: fx.Node) -> Miss | None:
    if getattr(norm, "running_mean", None) is None:
        return Miss(node.name, "it keeps no running statistics, so it depends on each batch")
    module: Any = program.submodule(layer)
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        return Miss(node.name, f"%{layer.name} is quantized already")
    calls = [other for other in program.nodes() if other.target == layer.target]
    if len(calls) > 1:
        return Miss(
            node.name,
            f"%{layer.name} is called {len(calls)} times with the same weights; folding would "
            "change the other calls",
        )
    reads_layer = node.all_input_nodes[0] is layer
    if reads_layer and len(layer.users) > 1:
        return Miss(
            node.name,
            f"%{layer.name} feeds {len(layer.users)} nodes; folding would change the others",
        )
    shape = facts(node).shape
    if isinstance(module, nn.Linear) and shape is not None and len(shape) != 2:
        return Miss(node.name, f"the channels of a {len(shape)}-d value are not the linear's")
    return None


def _why_alone(program: Program, node: fx.Node, source: fx.Node) -> str:
    kind = describe(source, program.module).kind.value
    users = ", ".join(f"%{user.name}" for user in node.users) or "nothing"
    return (
        f"it reads %{source.name} ({kind}) and feeds {users}: no convolution or linear to fold into"
    )


def _exact_before(layer: Any, shift: torch.Tensor) -> bool:
    if isinstance(layer, nn.Linear) or not bool(shift.any()):
        return True
    if is_transposed(layer):
        return False
    padding = layer.padding
    pads = padding == "same" or (not isinstance(padding, str) and any(padding))
    return not pads or layer.padding_mode != "zeros"


def _per_input(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """``[in]`` values shaped to multiply the weight."""
    weight = layer.weight
    tail = [1] * (weight.dim() - 2)
    if is_transposed(layer):
        return values.reshape(-1, 1, *tail)
    groups = getattr(layer, "groups", 1)
    per_group = values.reshape(groups, 1, weight.shape[1])
    expanded = per_group.expand(groups, weight.shape[0] // groups, -1)
    return expanded.reshape(weight.shape[0], weight.shape[1], *tail)


def _through(layer: Any, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``[out]``: what the layer makes of a constant input ``shift: [in]``, without its bias."""
    if not bool(shift.any()):
        return weight.new_zeros(output_channels(layer))
    return (weight * _per_input(layer, shift)).flatten(1).sum(1)
