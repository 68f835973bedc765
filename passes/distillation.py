"""A float network and its quantized copy on the same images, the one teaching the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from fxq.contracts import tensors_of
from fxq.errors import SpecError
from fxq.graph.cuts import cut_points
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor
from fxq.numerics.saturation import largest_pair_sum, pair_limit
from fxq.quant.dynamic import DynamicAciqQuantizer
from fxq.quant.quantizers import (
    ActivationQuantizer,
    QuantizedLayer,
    float_counterpart,
    rows,
)
from fxq.quant.trainable import TrainableLayer, TrainableQuantizer

from .adaround import is_rounding
from .post_training import is_depthwise

_SMALLEST = 1e-6  # a dead channel's bias still needs a unit


class TeacherAndStudent:
    """The float network, and the quantized one with parameters in place of codes and scales.

    Roundings to 8 bits are left out of the student: they cost time and teach nothing.

    Args:
        program: A program after a quantize pass; it is not changed before `freeze`.
        edit: Where layers that cannot be trained are named.
        blocks: Whether gradients stop at the cut points, so that each block learns by itself.

    Attributes:
        layers: What is trained of the layers, by the name of the module.
        quantizers: What is trained of the activations' quantizers, by the name of the module.

    Raises:
        SpecError: Values are quantized per channel or with ranges found at run time.
    """

    def __init__(self, program: Program, edit: Editor, *, blocks: bool) -> None:
        self.layers: dict[str, TrainableLayer] = {}
        self.quantizers: dict[str, TrainableQuantizer] = {}
        self._teacher = copy.deepcopy(program.module)
        self._student = copy.deepcopy(program.module).requires_grad_(False)  # what stays in float
        for name in dict.fromkeys(str(n.target) for n in program.nodes() if n.op == "call_module"):
            self._replace(name)
        for node in program.nodes():
            if str(node.target) not in self.layers and _is_layer(program, node):
                edit.miss(node, "its codes are no rounding of its weights to a uniform grid")
        places = list(_taps(program))
        self._taps = [
            (_tap(self._teacher, name), _tap(self._student, name, detaches=blocks))
            for name in places
        ]
        self._blocks = blocks
        self._teacher.requires_grad_(False)
        for network in (self._teacher, self._student):
            network.recompile()

    def _replace(self, name: str) -> None:
        """The module of that name is float in the teacher and trainable in the student."""
        module = self._student.get_submodule(name)
        in_float = float_counterpart(module)
        if in_float is not None:
            self._teacher.set_submodule(name, in_float)
        if isinstance(module, QuantizedLayer) and is_rounding(module):
            self.layers[name] = TrainableLayer(module, torch.ones_like(module.scale))
            self._student.set_submodule(name, self.layers[name])
        if isinstance(module, ActivationQuantizer):
            self._student.set_submodule(name, self._trainable(name, module))
        if isinstance(module, DynamicAciqQuantizer):
            raise _per_tensor_only(name)

    def _trainable(self, name: str, module: ActivationQuantizer) -> nn.Module:
        if module.per_channel:
            raise _per_tensor_only(name)
        if module.bits >= 8:
            return nn.Identity()
        self.quantizers[name] = TrainableQuantizer(module)
        return self.quantizers[name]

    @torch.no_grad()
    def measure_units(self, inputs: tuple[Any, ...]) -> None:
        """A step of each bias is now worth the standard deviation of its channel's output."""
        handles = [one.register_forward_hook(_set_unit) for one in self.layers.values()]
        self._student(*inputs)
        _remove(handles)

    def loss(self, inputs: tuple[Any, ...], temperature: float, feature_weight: float) -> Tensor:
        """How far the student is from its teacher on these inputs.

        The divergence of the outputs where they are those of a classifier, else their error as a
        share of their power; and ``feature_weight`` times the mean of the blocks' errors.
        """
        with torch.no_grad():
            wanted = self._teacher(*inputs)
        outputs = list(zip(tensors_of(wanted), tensors_of(self._student(*inputs)), strict=True))
        if not outputs:
            raise SpecError(
                "the network has no float output that a copy could follow",
                hint="leave reconstruct out, or let the model return its logits",
            )
        loss = torch.stack([_output_loss(w, given, temperature) for w, given in outputs]).mean()
        if not self._taps:
            return loss
        features = torch.stack([_relative(t.value, s.value) for t, s in self._taps])
        if self._blocks:  # no parameter has a part in two of them
            return loss + feature_weight * features.sum()
        return loss + feature_weight * features.mean()

    def freeze(self, program: Program, edit: Editor) -> None:
        """What was learned is in the program."""
        for name, layer in self.layers.items():
            program.module.set_submodule(name, _safe(layer, edit))
        for name, quantizer in self.quantizers.items():
            program.module.set_submodule(name, quantizer.frozen())
        for node in program.nodes():
            if str(node.target) in self.layers:
                edit.hit(node)


class _Tap(nn.Module):
    """Remembers what passes through."""

    value: Tensor

    def __init__(self, detaches: bool) -> None:
        super().__init__()
        self.detaches = detaches

    def forward(self, x: Tensor) -> Tensor:
        """The same values; gradients end here where blocks learn by themselves."""
        self.value = x
        return x.detach() if self.detaches else x


def _taps(program: Program) -> Iterator[str]:
    """The quantizers at cut points, by node name: where blocks end."""
    for node in cut_points(program.graph):
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is None or source.op == "placeholder":
            continue
        if _is_quantizer(program, node) and not _is_quantizer(program, source):
            yield node.name


def _tap(network: fx.GraphModule, name: str, *, detaches: bool = False) -> _Tap:
    """A tap behind the node of that name."""
    tap = _Tap(detaches)
    node = next(node for node in network.graph.nodes if node.name == name)
    target = f"{name}_tap"
    network.add_submodule(target, tap)
    with network.graph.inserting_after(node):
        inserted = network.graph.call_module(target, (node,))
    node.replace_all_uses_with(inserted, lambda user: user is not inserted)
    return tap


def _is_quantizer(program: Program, node: fx.Node) -> bool:
    return isinstance(program.submodule(node), ActivationQuantizer)


def _is_layer(program: Program, node: fx.Node) -> bool:
    return isinstance(program.submodule(node), QuantizedLayer)


def _set_unit(layer: nn.Module, inputs: Any, output: Tensor) -> None:
    assert isinstance(layer, TrainableLayer)
    channels = output.shape[-1] if layer.source.fxq_kind == "linear" else output.shape[1]
    by_channel = output.movedim(-1 if layer.source.fxq_kind == "linear" else 1, 0)
    flat = by_channel.reshape(channels, -1)
    layer.unit.copy_(flat.std(1, correction=0).clamp(min=_SMALLEST))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _output_loss(wanted: Tensor, given: Tensor, temperature: float) -> Tensor:
    if wanted.dim() != 2 or wanted.shape[1] < 2:
        return _relative(wanted, given)
    target, soft = F.log_softmax(wanted / temperature, 1), F.log_softmax(given / temperature, 1)
    divergence = F.kl_div(soft, target, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _relative(wanted: Tensor, given: Tensor) -> Tensor:
    """The squared error as a share of the power."""
    return F.mse_loss(given, wanted, reduction="sum") / wanted.square().sum().clamp(min=_SMALLEST)


def _safe(layer: TrainableLayer, edit: Editor) -> QuantizedLayer:
    """The trained layer; depthwise channels no kernel adds exactly keep their codes."""
    before = layer.source.codes.clone(), layer.source.scale.clone()
    trained = layer.frozen()
    if is_depthwise(trained.layer):
        over = largest_pair_sum(rows(trained.layer, trained.codes)) > pair_limit(255)
        trained.codes[over], trained.scale[over] = before[0][over], before[1][over]
    return trained


def _per_tensor_only(name: str) -> SpecError:
    return SpecError(
        "reconstruct trains values with one scale per tensor",
        where=name,
        hint="leave per-channel and run-time ranges out of the recipe",
    )
