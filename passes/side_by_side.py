"""The float network and the quantized one, run layer by layer on the same images.

What passes need that fit one to the other: at each quantized layer, what reaches it in both
networks, with everything before it as it is now. The visitor may change the layer; what follows is
computed with the change. Images run in small chunks, and a value is dropped after its last use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxq.calibration import pieces
from fxq.graph.program import Program, facts
from fxq.graph.rewrite import Editor
from fxq.quant.quantizers import QuantizedLayer, float_counterpart

from .images import calibration_images

LIVE_ELEMENTS = 3 * 2**27
"""How many elements may be alive at once (1.6 GB): 115 photographs in ResNet-18, 60 in others."""

CHUNK_ELEMENTS = 2**18
"""Input elements per chunk: two photographs of 224 x 224 pixels, 85 images of 32 x 32."""


@dataclass(frozen=True)
class Meeting:
    """A quantized layer, and what reaches it.

    Attributes:
        node: The node that calls it.
        layer: The layer; its ``layer`` is the float one.
        references: What the float layer reads in the float network, in chunks of images.
        inputs: What it reads itself, behind layers already changed, in the same chunks.
    """

    node: fx.Node
    layer: QuantizedLayer
    references: list[torch.Tensor]
    inputs: list[torch.Tensor]

    @property
    def channel_dim(self) -> int:
        """The dimension of the output's channels."""
        return -1 if self.layer.fxq_kind == "linear" else 1


def fitting_images(program: Program, images: int, *, elements: int = 0) -> tuple[Any, ...]:
    """Calibration images that both networks fit into memory with.

    Args:
        program: A program after a quantize pass.
        images: How many at most.
        elements: How many input elements at most; 0 for no limit.

    Raises:
        CalibrationError: There is no calibration data.
    """
    fitting = max(1, LIVE_ELEMENTS // max(1, _peak_elements(program)))
    return calibration_images(program, min(images, fitting), elements=elements)


def run_side_by_side(
    program: Program,
    edit: Editor,
    visit: Callable[[Meeting], None],
    inputs: tuple[Any, ...],
) -> None:
    """Every quantized layer has been visited, in the order of the network.

    A layer that several calls share is refused: what fits one call does not fit the others.

    Args:
        program: A program after a quantize pass.
        edit: Where refusals go; its origin labels the progress.
        visit: Called with each layer before its output is computed; it may change the layer.
        inputs: The arguments of the model, as `fitting_images` gives them.
    """
    chunks = list(pieces(inputs, CHUNK_ELEMENTS))
    run = _SideBySide(program, edit, visit, _shared_layers(program, edit), len(chunks))
    run.run(*(_Live([_Pair(v, v) for v in column]) for column in zip(*chunks, strict=True)))


@dataclass(frozen=True)
class _Pair:
    """A value in the float network and in the quantized one."""

    float: Any
    quantized: Any


@dataclass(frozen=True)
class _Live:
    """A value of the graph: one pair per chunk of images."""

    chunks: list[_Pair]

    def side(self, name: str) -> list[Any]:
        """The values of one network."""
        return [getattr(pair, name) for pair in self.chunks]


class _SideBySide(fx.Interpreter):
    """Runs both networks node by node; the interpreter drops values that nobody reads any more."""

    def __init__(
        self,
        program: Program,
        edit: Editor,
        visit: Callable[[Meeting], None],
        shared: set[str],
        chunks: int,
    ) -> None:
        super().__init__(program.module)
        self._program = program
        self._edit = edit
        self._visit = visit
        self._chunks = chunks
        nodes = [n for n in program.nodes() if isinstance(program.submodule(n), QuantizedLayer)]
        self._to_visit = [n for n in nodes if str(n.target) not in shared]
        self._visited = 0

    def run_node(self, n: fx.Node) -> Any:
        """The pairs of values of a node."""
        self._edit.current = n
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n in self._to_visit:
            self._meet(n, (*args, *kwargs.values())[0])
        return _Live([self._pair(n, args, kwargs, chunk) for chunk in range(self._chunks)])

    def _meet(self, n: fx.Node, value: _Live) -> None:
        layer = self._program.submodule(n)
        assert isinstance(layer, QuantizedLayer)
        self._visit(Meeting(n, layer, value.side("float"), value.side("quantized")))
        self._visited += 1
        self._program.report_progress(self._edit.origin, self._visited, len(self._to_visit))

    def _pair(self, n: fx.Node, args: Any, kwargs: Any, chunk: int) -> _Pair:
        ours, theirs = (_of((args, kwargs), side, chunk) for side in ("quantized", "float"))
        quantized = getattr(self, n.op)(n.target, *ours)
        module = float_counterpart(self._program.submodule(n))
        if module is not None:
            return _Pair(module(*theirs[0], **theirs[1]), quantized)
        return _Pair(getattr(self, n.op)(n.target, *theirs), quantized)


def _of(value: Any, side: str, chunk: int) -> Any:
    """Arguments with every live value replaced by one network's value of one chunk."""
    return fx.node.map_aggregate(
        value, lambda v: getattr(v.chunks[chunk], side) if isinstance(v, _Live) else v
    )


def _peak_elements(program: Program) -> int:
    """How many elements per image are alive at once, in both networks together, at most."""
    first = next((facts(n).shape for n in program.nodes() if n.op == "placeholder"), None)
    images = first[0] if first else 1
    last_use = {source: node for node in program.nodes() for source in node.all_input_nodes}
    alive: dict[fx.Node, int] = {}
    peak = 0
    for node in program.nodes():
        shape = facts(node).shape
        alive[node] = 0 if node.op == "get_attr" else torch.Size(shape or ()).numel()
        peak = max(peak, sum(alive.values()))
        for source in [n for n in alive if last_use.get(n) is node]:
            del alive[source]
    return 2 * peak // max(1, images)


def _shared_layers(program: Program, edit: Editor) -> set[str]:
    """The targets of layers that are called more than once, each call but the first a miss."""
    seen: set[str] = set()
    shared: set[str] = set()
    for node in program.nodes():
        if not isinstance(program.submodule(node), QuantizedLayer):
            continue
        if str(node.target) in seen:
            shared.add(str(node.target))
            edit.miss(node, "its weights are shared by several calls, whose inputs differ")
        seen.add(str(node.target))
    return shared
