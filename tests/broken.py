"""Passes that are wrong in one place, as a plugin would bring them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxq.attribution import read_quantizers
from fxq.graph.program import Program, layer_path
from fxq.graph.rewrite import Editor
from fxq.passes import FoldBatchNorm
from fxq.pipeline import Pass


def node_at(program: Program, path: str) -> Any:
    return next(node for node in program.nodes() if layer_path(node) == path)


@dataclass(frozen=True)
class FoldWithWrongEps(Pass):
    """Folds batch norms as if one of them had another eps.

    Attributes:
        norm: Path of that batch norm.
        eps: What is added to its variance.
    """

    name: ClassVar[str] = "fold-with-wrong-eps"
    norm: str = ""
    eps: float = 0.1

    def apply(self, program: Program, edit: Editor) -> None:
        module: Any = program.submodule(node_at(program, self.norm))
        module.eps = self.eps
        FoldBatchNorm().apply(program, edit)


@dataclass(frozen=True)
class ShrinkClip(Pass):
    """Makes the range of the values that one layer reads eight times too small.

    Attributes:
        layer: Path of the layer.
    """

    name: ClassVar[str] = "shrink-clip"
    layer: str = ""

    def apply(self, program: Program, edit: Editor) -> None:
        quantizer: Any = program.submodule(
            read_quantizers(program, node_at(program, self.layer))[0]
        )
        quantizer.scale /= 8


@dataclass(frozen=True)
class SwapChannels(Pass):
    """Swaps the weights of the first two output channels of one layer.

    Attributes:
        layer: Path of the layer.
    """

    name: ClassVar[str] = "swap-channels"
    layer: str = ""

    def apply(self, program: Program, edit: Editor) -> None:
        module: Any = program.submodule(node_at(program, self.layer))
        order = torch.arange(len(module.scale))
        order[:2] = torch.tensor([1, 0])
        module.codes, module.scale = module.codes[order], module.scale[order]


@dataclass(frozen=True)
class Explode(Pass):
    """Fails with an error of its own."""

    name: ClassVar[str] = "explode"

    def apply(self, program: Program, edit: Editor) -> None:
        for _ in edit.visit():
            raise RuntimeError("the fuse is short")


CATALOG = (FoldWithWrongEps, ShrinkClip, SwapChannels, Explode)
