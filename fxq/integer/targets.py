"""What becomes of a node: the ReLU its kernel computes, and the quantizer that rounds it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx, nn

from fxq.graph.ops import Kind, describe
from fxq.graph.program import Program, facts
from fxq.integer.levels import finest_grid, half_level_grid
from fxq.integer.program import Grid
from fxq.numerics.residual import Codes, agreeing_scale
from fxq.quant.quantizers import ActivationQuantizer, LevelQuantizer


@dataclass(frozen=True)
class Target:
    """The quantizer that alone reads a node, and what the node's kernel writes for it.

    Attributes:
        node: The quantizer.
        grid: The grid of the codes that the kernel writes.
        levels: The quantizer, where a table has to make levels of those codes.
        floors: Whether the kernel rounds down to those codes.
    """

    node: fx.Node
    grid: Grid
    levels: LevelQuantizer | None = None
    floors: bool = False


def target_after(program: Program, node: fx.Node, *, floors: bool = False) -> Target | None:
    """The quantizer with one scale that alone reads a node, or its fused ReLU.

    Args:
        program: The program.
        node: The node.
        floors: Whether its kernel can round down.
    """
    user = only_quantizer(program, node)
    module = None if user is None else program.submodule(user)
    if user is not None and isinstance(module, LevelQuantizer):
        grid = half_level_grid(module) if floors else finest_grid(module)
        return Target(user, grid, module, floors)
    if user is None or not isinstance(module, ActivationQuantizer) or module.per_channel:
        return None
    return Target(user, grid_of(module))


def grid_of(module: nn.Module | None) -> Grid:
    """The grid of a quantizer with equal steps and one scale."""
    assert isinstance(module, ActivationQuantizer)
    return Grid(float(module.scale), int(module.zero_point), module.bits)


def settled(target: Target, addends: list[Grid], relu: bool) -> Target:
    """The target of a sum, on a grid on which all kernels give the same codes, where one is near.

    Passes do this for quantizers whose own grid a sum is written on.
    """
    if target.levels is None:
        return target
    left, right, total = (
        Codes(one.scale, one.zero_point, one.bits) for one in (*addends, target.grid)
    )
    scale = agreeing_scale(left, right, replace(total, relu=relu))
    return target if scale is None else replace(target, grid=replace(target.grid, scale=scale))


def fused_relu(program: Program, node: fx.Node) -> fx.Node | None:
    """The ReLU that was marked to run with a node."""
    name = facts(node).fused_relu
    return program.node(name) if name is not None else None


def kernel_relu(program: Program, node: fx.Node, grid: Grid | None) -> fx.Node | None:
    """The fused ReLU that a kernel computes; one that is bounded needs a grid to end it."""
    relu = fused_relu(program, node)
    bounded = relu is not None and facts(relu).upper is not None
    return None if grid is None and bounded else relu


def only_quantizer(program: Program, node: fx.Node) -> fx.Node | None:
    """The quantizer that alone reads a node, or its fused ReLU."""
    users = list((fused_relu(program, node) or node).users)
    if len(users) != 1:
        return None
    kind = describe(users[0], program.module).kind
    return users[0] if kind is Kind.QUANTIZER else None
