"""What a quantized network costs: multiply-adds, FixOPs, shift-adds and bytes, layer by layer.

One *FixOP* is one product of an 8-bit weight and an 8-bit activation: 64 binary operations. With
``m`` bits per activation and ``l`` bits per weight,

* on multipliers a layer takes ``MACs * m * l / 64`` FixOPs, whatever its levels;
* by shifts and adds it takes ``MACs * m * n / 64``, where the magnitude of every weight is a sum
  of at most ``n`` powers of two, each of which shifts the activation once. The sign costs nothing:
  the sum is subtracted. So ``n`` is ``l - 1`` with uniform levels, ``ceil((l - 1) / 2)`` with APoT
  and 1 with powers of two.

A layer in float counts as 32 by 32 bits in both. Convolutions and linears are counted, for one
image; their biases, and all other operators, are not.

Papers:
    Li, Dong, Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization
        for Neural Networks", ICLR 2020, arXiv:1909.13144, Sec. 4.1. The first formula gives the
        columns of its Table 1 for uniform levels, the second is that of its text, ``l = k * n``
        plus a sign. The APoT columns of the table follow another rule (about 0.75 of the uniform
        cost of all layers but the first and the last), which the paper does not state.
    Zhou, Wu, Ni, Zhou, Wen, Zou, "DoReFa-Net", 2016, arXiv:1606.06160 (``m * l`` operations).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxq.errors import SpecError
from fxq.graph.ops import ANCHORS, PASS_THROUGH, Kind, Op, describe
from fxq.graph.program import Program, facts, layer_path
from fxq.numerics.levels import MOST_BITS, LevelSet, levels_of
from fxq.quant.quantizers import is_transposed, output_channels

FLOAT = "float"
"""The levels of a layer that is not quantized."""

FLOAT_BITS = 32
BINARY_OPERATIONS = 64
"""Binary operations of a FixOP."""

_ANY_CODE = 7
"""The most powers of two that a code of int8 is a sum of."""

_NOTE = re.compile(r"w[\d.]+(?: (\w+))?")
"""What quantize passes note of a layer: ``w4``, or ``w4 apot``."""


@dataclass(frozen=True)
class LayerCost:
    """What one call of a layer costs, for one image.

    Attributes:
        layer: The module path users know it by.
        kind: ``conv`` or ``linear``.
        shape: Shape of its output, without the batch.
        macs: Multiply-adds.
        weight_bits: Bits per weight; the mean, where channels differ.
        activation_bits: Bits of the value it reads; the mean, where channels differ.
        levels: What weights are chosen from: ``uniform``, ``apot``, …, or ``float``.
        powers: The most powers of two that a weight is a sum of; the mean over channels.
        weights: How many weights it has; 0 where an earlier call of it counted them.
        fixops: FixOPs on multipliers.
        shift_adds: FixOPs by shifts and adds.
        bytes: Bytes of the weights, each in its bits.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    weight_bits: float
    activation_bits: float
    levels: str
    powers: float
    weights: int
    fixops: float
    shift_adds: float
    bytes: int

    @classmethod
    def counted(
        cls,
        layer: str,
        kind: str,
        shape: tuple[int, ...],
        macs: int,
        *,
        levels: str,
        bits: Tensor,
        powers: Tensor,
        values: Tensor,
        groups: int,
        weights: int,
    ) -> LayerCost:
        """The cost of a call, by the formulas above; what is not here is as the attribute.

        ``bits: [out] or [1]`` and ``powers: [out] or [1]`` are those of each weight, ``values: [in]
        or [1]`` the bits of what it reads. Channels of different groups do not meet.
        """
        mean = float(bits.double().mean())
        return cls(
            layer=layer,
            kind=kind,
            shape=shape,
            macs=macs,
            weight_bits=mean,
            activation_bits=float(values.double().mean()),
            levels=levels,
            powers=float(powers.double().mean()),
            weights=weights,
            fixops=macs * _mean_product(bits, values, groups) / BINARY_OPERATIONS,
            shift_adds=macs * _mean_product(powers, values, groups) / BINARY_OPERATIONS,
            bytes=-(-int(bits.sum()) * (weights // len(bits)) // 8),
        )


@dataclass(frozen=True)
class Cost:
    """What a network costs, for one image.

    Attributes:
        layers: Its convolutions and linears, in order.
        deployed_bytes: Weights in their bits, a float32 scale and an int32 bias per output channel
            of quantized layers, and whatever else is left in float.
        trained_bytes: Weights in their bits; biases, the four vectors of each batch norm and all
            else of the float network as float32, as Table 1 of the APoT paper counts (in MiB).
            None where the float network is not known.
        float_bytes: The float network; None where it is not known.
    """

    layers: tuple[LayerCost, ...]
    deployed_bytes: int
    trained_bytes: int | None = None
    float_bytes: int | None = None

    @property
    def macs(self) -> int:
        """Multiply-adds of all layers."""
        return sum(one.macs for one in self.layers)

    @property
    def weights(self) -> int:
        """Weights of all layers."""
        return sum(one.weights for one in self.layers)

    @property
    def fixops(self) -> float:
        """FixOPs of all layers on multipliers."""
        return math.fsum(one.fixops for one in self.layers)

    @property
    def shift_adds(self) -> float:
        """FixOPs of all layers by shifts and adds."""
        return math.fsum(one.shift_adds for one in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all layers."""
        return sum(one.bytes for one in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The layers and totals as JSON-ready data."""
        names = ("macs", "weights", "fixops", "shift_adds", "weight_bytes")
        sizes = ("deployed_bytes", "trained_bytes", "float_bytes")
        return {
            "layers": [asdict(one) for one in self.layers],
            "total": {name: getattr(self, name) for name in names + sizes},
        }


def cost_of(program: Program, float_values: int | None = None) -> Cost:
    """What a program costs after its quantize pass; before one, all of it is in float.

    Args:
        program: The program.
        float_values: What `count_values` said of it before any pass.

    Raises:
        SpecError: The shape of a layer's output is unknown.

    Example:
        >>> import fxq
        >>> from fxq.models_zoo import tiny_conv
        >>> images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> program = fxq.compile(tiny_conv(), images, "aciq-4bit", calibration=[images]).program
        >>> [(one.layer, one.macs, one.fixops) for one in cost_of(program).layers]
        [('conv1', 13824, 13824.0), ('conv2', 18432, 4608.0), ('fc', 160, 160.0)]
    """
    ops = {node: describe(node, program.module) for node in program.nodes()}
    modules: dict[str, nn.Module] = {}
    layers: list[LayerCost] = []
    for node, op in ops.items():
        if op.kind in ANCHORS and op.module is not None:
            first = str(node.target) not in modules
            modules[str(node.target)] = op.module
            layers.append(_layer_cost(program, ops, node, op.module, first=first))
    stored = sum(one.bytes for one in layers)
    kept = None if float_values is None else 4 * (float_values - sum(one.weights for one in layers))
    return Cost(
        layers=tuple(layers),
        deployed_bytes=stored + _beside_weights(program, ops, modules),
        trained_bytes=None if kept is None else kept + stored,
        float_bytes=None if float_values is None else 4 * float_values,
    )


def count_values(program: Program) -> int:
    """How many parameters and floating-point buffers a program has."""
    return _values_outside(program, ())


def powers_of_two(levels: str, bits: int) -> int:
    """The most powers of two that a level of a set is a sum of: the ones of its binary digits.

    Args:
        levels: Name of the set; where its levels do not fit int8, the uniform one is meant. Of a
            set that is not known, any code of int8 may be a level.
        bits: Bits per signed weight, 2 to 8.

    Example:
        >>> [powers_of_two("apot", bits) for bits in (2, 3, 4, 5, 6)]
        [1, 1, 2, 2, 3]
        >>> [powers_of_two("uniform", bits) for bits in (2, 3, 4, 5, 8)]
        [1, 2, 3, 4, 7]
    """
    kind = next((one for one in MOST_BITS if one == levels), None)
    if kind is None:
        return _ANY_CODE
    return _most_ones(levels_of(kind if bits <= MOST_BITS[kind] else LevelSet.UNIFORM, bits))


def _most_ones(levels: Tensor) -> int:
    return max(int(level).bit_count() for level in levels)


def noted_levels(note: str) -> str | None:
    """The levels that a quantize pass noted of a layer; None of another note.

    Example:
        >>> noted_levels("w4 apot"), noted_levels("w2..5"), noted_levels("w4 loses 1e-3")
        ('apot', 'uniform', None)
    """
    found = _NOTE.fullmatch(note)
    return None if found is None else found[1] or LevelSet.UNIFORM.value


# ---- one layer ---------------------------------------------------------------------------------


def _layer_cost(
    program: Program, ops: dict[fx.Node, Op], node: fx.Node, module: nn.Module, *, first: bool
) -> LayerCost:
    """What a call costs; its weights count at the first call of its module."""
    layer = _float_layer(module)
    weight: Any = layer.weight
    shape, macs = _shape_and_macs(program, node, layer)
    bits, levels = _weight_bits(node, module)
    powers = bits
    values = torch.tensor([FLOAT_BITS])
    if levels != FLOAT:
        values = _value_bits(ops, ops[node].inputs[0])
        powers = torch.tensor([_powers(module, levels, int(width)) for width in bits])
    return LayerCost.counted(
        layer_path(node),
        ops[node].kind.value,
        shape,
        macs,
        levels=levels,
        bits=bits,
        powers=powers,
        values=values,
        groups=int(getattr(layer, "groups", 1)),
        weights=weight.numel() if first else 0,
    )


def _float_layer(module: nn.Module) -> nn.Module:
    """The convolution or linear inside what passes made of it."""
    while isinstance(inner := getattr(module, "layer", None), nn.Module):
        module = inner
    return module


def _shape_and_macs(
    program: Program, node: fx.Node, layer: nn.Module
) -> tuple[tuple[int, ...], int]:
    """The shape of a layer's output without the batch, and its multiply-adds per image."""
    weight: Any = layer.weight
    read, made = facts(node.all_input_nodes[0]).shape, facts(node).shape
    if read is None or made is None:
        raise SpecError("the shapes of what the layer reads and makes are unknown", where=node.name)
    if is_transposed(layer):  # each input element meets the weights of one input channel
        macs = math.prod(read) * weight[0].numel()
    else:
        macs = math.prod(made) * (weight.numel() // output_channels(layer))
    example = next((x for x in program.example_inputs if isinstance(x, Tensor)), None)
    images = len(example) if example is not None and example.dim() > 1 else 1
    return made[1:] if len(made) > 1 else made, macs // max(1, images)


def _weight_bits(node: fx.Node, module: nn.Module) -> tuple[Tensor, str]:
    """``[out]`` or ``[1]``: the bits of a layer's weights; and what they are chosen from."""
    bits = _bits_of(module)
    if bits is None:
        return torch.tensor([FLOAT_BITS]), FLOAT
    levels = getattr(module, "level_set", None) or noted_levels(facts(node).note)
    return bits, str(levels or LevelSet.UNIFORM)


def _bits_of(module: nn.Module) -> Tensor | None:
    """``[out]``: the bits of a layer's weights; None where it is in float."""
    bits: Any = getattr(module, "bits", None)
    return None if bits is None else torch.as_tensor(bits).reshape(-1)


def _powers(module: Any, levels: str, bits: int) -> int:
    """As `powers_of_two`, of the very levels where a layer is trained on its own."""
    own = getattr(getattr(module, "weights", None), "levels", None)
    return powers_of_two(levels, bits) if own is None else _most_ones(own)


def _value_bits(ops: dict[fx.Node, Op], node: fx.Node) -> Tensor:
    """``[channels]`` or ``[1]``: the bits of a value, as the quantizer before it left them."""
    op = ops[node]
    if op.kind is Kind.QUANTIZER:
        each = getattr(op.module, "channel_bits", None)
        bits: Any = getattr(op.module, "bits", FLOAT_BITS) if each is None else each
        return torch.as_tensor(bits).reshape(-1)
    if op.kind in PASS_THROUGH:
        return _value_bits(ops, op.inputs[0])
    if op.kind is Kind.CAT:
        sizes = torch.tensor([float(math.prod(facts(one).shape or ())) for one in op.inputs])
        means = torch.stack([_value_bits(ops, one).float().mean() for one in op.inputs])
        return ((means * sizes).sum() / sizes.sum()).reshape(1)
    return torch.tensor([FLOAT_BITS])


def _mean_product(weights: Tensor, values: Tensor, groups: int) -> float:
    """The mean of the products of all weights and the values they meet.

    Args:
        weights: ``[out]`` or ``[1]``; something of each output channel.
        values: ``[in]`` or ``[1]``; something of each channel of the input.
        groups: Channels of one group meet only each other.
    """
    sides = [one.expand(groups) if one.numel() == 1 else one for one in (weights, values)]
    means = [one.reshape(groups, -1).double().mean(1) for one in sides]
    return float((means[0] * means[1]).mean())


# ---- sizes -------------------------------------------------------------------------------------


def _beside_weights(program: Program, ops: dict[fx.Node, Op], layers: dict[str, nn.Module]) -> int:
    """Bytes of all that is deployed but the weights of layers, and the grids of quantizers."""
    quantized = {path: one for path, one in layers.items() if _bits_of(one) is not None}
    left: list[Any] = [
        _float_layer(one).weight for path, one in layers.items() if path not in quantized
    ]
    quantizers = {str(node.target) for node, op in ops.items() if op.kind is Kind.QUANTIZER}
    channels = sum(output_channels(_float_layer(one)) for one in quantized.values())
    others = _values_outside(program, {*quantized, *quantizers})
    return 8 * channels + 4 * (others - sum(int(one.numel()) for one in left))


def _values_outside(program: Program, paths: Iterable[str]) -> int:
    """How many floating-point values a program stores, but for those of some submodules."""
    inside = {
        tensor.data_ptr()
        for path in paths
        for tensor in _tensors(program.module.get_submodule(path))
    }
    return sum(one.numel() for one in _tensors(program.module) if one.data_ptr() not in inside)


def _tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and floating-point buffers of a module, each once."""
    every = {id(one): one for one in (*module.parameters(), *module.buffers())}
    return [one for one in every.values() if one.is_floating_point()]
