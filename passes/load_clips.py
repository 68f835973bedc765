"""load-clips: the learned clips of a checkpoint in the form APoT's authors published theirs.

A published checkpoint has, for each quantized layer, ``PATH.weight_quant.wgt_alpha`` and
``PATH.act_alpha``, the clips of its weights and of its input. Where two layers read one value with
different clips, each gets a quantizer of its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxq.calibration import pieces
from fxq.contracts import Contract
from fxq.errors import CalibrationError, SpecError
from fxq.graph.ops import PASS_THROUGH, describe
from fxq.graph.program import Program, layer_path
from fxq.graph.rewrite import Editor
from fxq.pipeline import Pass
from fxq.quant.learned_layers import LearnedLayer, LevelWeights
from fxq.quant.learned_values import LearnedLevels, MovingRange
from fxq.weight_file import read_weights

from .calibrate import NO_DATA, PIECE_ELEMENTS, batches_of

WEIGHT_CLIP, VALUE_CLIP = ".weight_quant.wgt_alpha", ".act_alpha"


@dataclass(frozen=True)
class LoadClips(Pass):
    """Every layer that the checkpoint knows clips of has them, for its weights and its input.

    Args:
        checkpoint: A ``.safetensors`` file with the clips; its other tensors are left out.

    The ranges of what has 8 bits are those of the calibration data with the clips in place.

    Raises:
        CalibrationError: There is no calibration data.
        SpecError: The checkpoint has no clips, clips of layers that the network does not have, or
            not those of every layer with learned levels.
    """

    name: ClassVar[str] = "load-clips"
    after: ClassVar[tuple[str, ...]] = ("quantize-apot",)
    contract: ClassVar[Contract] = Contract.CHANGES_NUMBERS

    checkpoint: str = ""

    def apply(self, program: Program, edit: Editor) -> None:
        """The clips are set, and values split where readers disagree."""
        tensors = read_weights(Path(self.checkpoint))
        layers = _layers_with_levels(program)
        self._check_names(tensors, set(layers))
        given: dict[fx.Node, float] = {}
        for path, node in layers.items():
            edit.current = node
            module = program.submodule(node)
            assert isinstance(module, LearnedLayer)
            assert isinstance(module.weights, LevelWeights)
            module.weights.alpha.fill_(_clip(tensors[path + WEIGHT_CLIP]))
            self._set_input(program, edit, node, _clip(tensors[path + VALUE_CLIP]), given)
            edit.hit(node)
        watch_ranges(program)

    def _check_names(self, tensors: Mapping[str, Tensor], layers: set[str]) -> None:
        for ending in (WEIGHT_CLIP, VALUE_CLIP):
            found = {name.removesuffix(ending) for name in tensors if name.endswith(ending)}
            for names, where in ((found - layers, "network"), (layers - found, "checkpoint")):
                if names:
                    raise SpecError(
                        f"the {where} has no levels or no clip for {min(names)}",
                        where=f"load-clips, {self.checkpoint}",
                        hint="compile the network the checkpoint is of, with a recipe of its bits",
                    )

    def _set_input(
        self,
        program: Program,
        edit: Editor,
        node: fx.Node,
        clip: float,
        given: dict[fx.Node, float],
    ) -> None:
        """A layer's input is rounded below this clip, whatever others do that read the value."""
        reader, point = node, describe(node, program.module).inputs[0]
        is_alone = True
        while describe(point, program.module).kind in PASS_THROUGH:
            is_alone = is_alone and len(point.users) == 1
            reader, point = point, describe(point, program.module).inputs[0]
        quantizer = program.submodule(point)
        if not isinstance(quantizer, LearnedLevels):
            raise SpecError("its input has no learned levels", where=layer_path(node))
        if given.get(point, clip) != clip:
            if not is_alone:
                raise SpecError(f"%{reader.name} hands it to layers with different clips")
            quantizer = copy.deepcopy(quantizer)
            source = describe(point, program.module).inputs[0]
            point = edit.insert_module(f"{point.name}_of_{node.name}", quantizer, after=source)
            reader.replace_input_with(reader.all_input_nodes[0], point)
        given[point] = clip
        quantizer.alpha.fill_(clip)


def watch_ranges(program: Program) -> None:
    """Every moving range is that of the calibration data, as the network computes now.

    Raises:
        CalibrationError: There are such ranges, and no data.
    """
    ranges = [module for module in program.module.modules() if isinstance(module, MovingRange)]
    if not ranges:
        return
    if program.calibration is None:
        raise CalibrationError("there is no calibration data", hint=NO_DATA)
    with contextlib.ExitStack() as stack:
        for one in ranges:
            stack.enter_context(one.watching())
        for inputs in batches_of(program, program.calibration):
            for piece in pieces(inputs, PIECE_ELEMENTS):
                program.run(*piece)


def _layers_with_levels(program: Program) -> dict[str, fx.Node]:
    """The layers whose weights have learned levels, by path."""
    found = {}
    for node in program.nodes():
        module = program.submodule(node)
        if isinstance(module, LearnedLayer) and isinstance(module.weights, LevelWeights):
            found[layer_path(node)] = node
    return found


def _clip(value: Tensor) -> float:
    if value.numel() != 1 or not bool(torch.isfinite(value).all()) or not float(value) > 0:
        raise SpecError(f"a clip must be one positive number, not {value.tolist()}")
    return float(value)
