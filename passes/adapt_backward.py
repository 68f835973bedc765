"""adapt-backward: layers compute on fixed-point numbers, forward and backward, as wide as needed.

Of every convolution and linear the three products of a training step (FPROP, BPROP and WTGRAD) take
fixed-point operands: weights, inputs, and gradients of outputs. Each has a controller that measures
what rounding does to the mean of its magnitudes and widens it where that is too much. The products
run on integer kernels.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from fxq.errors import SpecError
from fxq.graph.program import Program, facts
from fxq.graph.rewrite import Editor
from fxq.numerics.adaptive import AdaptationOptions, Mode
from fxq.quant.fixed_point_layers import FixedPointLayer, FixedPointProduct, FusedRelu
from fxq.quant.learned_values import FollowedRange
from fxq.quant.normalized import NormalizedLayer
from fxq.quant.observers import Observer

from .places import Place
from .quantization import Quantization

_MATMULS = (torch.matmul, torch.bmm, operator.matmul)


@dataclass(frozen=True)
class AdaptBackward(Quantization):
    """Layers multiply fixed-point numbers in training; the program is to be trained, then lowered.

    Residual sums and pools are not rounded in training; their range is followed, for deployment.

    Args:
        weight_bits: With how many bits weights begin.
        activation_bits: With how many inputs of layers begin.
        gradient_bits: With how many the gradients of outputs begin.
        first_last_bits: As those of every quantize pass; the paper makes no exception.
        adaptive: Whether widths grow; if not, only the resolution follows the values.
        mode: ``mode2``: widths never shrink. ``mode1``: the search begins anew each time.
        top_bits: The last fixed-point width of gradients and weights; beyond, they stay in float.
        threshold: By how much rounding may change the mean magnitude: ``log2(1 + change)``.
        alpha: Weight of the newest range in the moving one (Eq. 3).
        beta: Steps between choices, times the change they answer to.
        delta: Weight of the squared error in that change.
        gamma: Steps taken off.
        longest_interval: Steps between two choices at most.
        attention: Whether products of two values are rounded as well.

    Raises:
        SpecError: An option is out of its range.
    """

    name: ClassVar[str] = "adapt-backward"
    after: ClassVar[tuple[str, ...]] = ("insert-observers",)

    gradient_bits: int = 8
    first_last_bits: int = 0
    adaptive: bool = True
    mode: Mode = Mode.MONOTONE
    top_bits: int = 24
    threshold: float = 0.03
    alpha: float = 0.04
    beta: float = 0.1
    delta: float = 100.0
    gamma: float = 2.0
    longest_interval: int = 1000
    attention: bool = False

    def check_options(self, where: str = "") -> None:
        """Every option is within its range."""
        try:
            for bits in (self.weight_bits, self.activation_bits, self.gradient_bits):
                self.adaptation(bits)
        except SpecError as error:
            error.where = f"{where or self.name}: {error.where}".removesuffix(": ")
            raise

    def adaptation(self, bits: int) -> AdaptationOptions:
        """How a controller chooses that begins with so many bits."""
        if not self.adaptive:
            return AdaptationOptions.static(bits)
        return AdaptationOptions(
            mode=self.mode,
            start_bits=bits,
            top_bits=self.top_bits,
            alpha=self.alpha,
            beta=self.beta,
            delta=self.delta,
            gamma=self.gamma,
            threshold=self.threshold,
            longest_interval=self.longest_interval,
        )

    def quantizer(self, observer: Observer, place: Place) -> nn.Module:
        """What follows the range of a value."""
        return FollowedRange(8, nonneg=place.relu, upper=place.upper).eval()

    def quantized_layer(self, layer: nn.Module, options: Self) -> tuple[nn.Module, str]:
        """The layer on fixed-point operands."""
        module = options._layer(layer, is_deployed=True)
        return module, f"begins with {module.describe()}"

    def finish(self, program: Program, edit: Editor) -> None:
        """Layers without an integer kernel, and products of values, are rewritten as well."""
        for node in edit.visit():
            self._fuse_relu(program, edit, node)
        for node in edit.visit():
            module = program.submodule(node)
            if isinstance(module, (_ConvNd, nn.Linear, NormalizedLayer)):
                if not program.layer_options(node).get("skip"):
                    edit.replace_module(node, self._layer(module, is_deployed=False))
                    edit.note(f"%{node.name} is trained on integers, and deployed in float")
                    edit.hit(node)
            elif self.attention and node.op == "call_function" and node.target in _MATMULS:
                self._rewrite_product(edit, node)

    def _fuse_relu(self, program: Program, edit: Editor, node: fx.Node) -> None:
        """A ReLU that alone reads a layer without a norm is computed by the layer's kernels."""
        layer, relu = program.submodule(node), facts(node).fused_relu
        if not isinstance(layer, FixedPointLayer) or layer.norm is not None or relu is None:
            return
        calls = sum(other.target == node.target for other in program.nodes())
        reader = program.node(relu)
        if calls == 1 and len(node.users) == 1 and _is_plain_relu(program, reader):
            layer.relu = True
            if reader.op == "call_module":
                edit.replace_module(reader, FusedRelu())
            else:
                call = edit.call_instead(reader, f"{reader.name}_fused", FusedRelu())
                edit.write_facts(call, fused_into=node.name, nonneg=True)
                edit.write_facts(node, fused_relu=call.name)

    def _bits_for(self, program: Program, layers: list[fx.Node], edges: set[fx.Node]) -> int:
        return 8  # of what is deployed

    def _layer(self, layer: Any, *, is_deployed: bool) -> FixedPointLayer:
        inner = layer.layer if isinstance(layer, NormalizedLayer) else layer
        norm = layer.norm if isinstance(layer, NormalizedLayer) else None
        made = FixedPointLayer(
            inner,
            norm,
            self.adaptation(self.weight_bits),
            self.adaptation(self.activation_bits),
            self.adaptation(self.gradient_bits),
            is_deployed=is_deployed,
        )
        return made.eval()  # the probe batch teaches controllers nothing

    def _rewrite_product(self, edit: Editor, node: fx.Node) -> None:
        options = (self.adaptation(self.activation_bits),) * 2
        product = FixedPointProduct(*options, self.adaptation(self.gradient_bits)).eval()
        edit.hit(edit.call_instead(node, f"{node.name}_product", product))


def _is_plain_relu(program: Program, node: fx.Node) -> bool:
    """Whether a node is a ReLU without a bound, a module that nothing else calls or a function."""
    if facts(node).upper is not None:
        return False
    same = sum(other.op == node.op and other.target == node.target for other in program.nodes())
    return node.op == "call_function" or (node.op == "call_module" and same == 1)
