"""Importing networks that APoT's authors trained: their checkpoints, ready to train on or to lower.

Li, Dong, Wang, "Additive Powers-of-Two Quantization", ICLR 2020, arXiv:1909.13144, publish state
dicts of the float network with two clips more for each quantized layer: of its weights, in
deviations of the layer's weights, and of its input.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxq.compiler import Result, compile
from fxq.errors import DataError
from fxq.graph.capture import ExampleInputs
from fxq.numerics.learned_clip import normalized_weight
from fxq.recipe import Recipe
from fxq.registry import find_pass
from fxq.weight_file import check_fit, read_weights

WEIGHT_CLIP, VALUE_CLIP = ".weight_quant.wgt_alpha", ".act_alpha"

AS_PUBLISHED = "quantize-apot.placement=paper"
"""The setting that quantizes what the authors do; it can be measured, but not lowered."""


def import_apot(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    recipe: str | Path | Recipe = "apot-4bit",
    *,
    calibration: Iterable[Any],
    settings: Sequence[str] = (),
    **options: Any,
) -> Result:
    """A training module with the weights and clips of a checkpoint; `fxq.lower` deploys it.

    The authors leave the network's input, its last layer's input and residual sums in float. Their
    8-bit ranges, which integer kernels need, come from the calibration data.

    Args:
        model: The float network; it is not touched.
        checkpoint: The file, ``.safetensors``, ``.pt``, ``.pth`` or ``.pth.tar``.
        example_inputs: As for `fxq.compile`.
        recipe: One of the bits that the checkpoint was trained with.
        calibration: Batches of the model's input.
        settings: As for `fxq.compile`.
        options: As for `fxq.compile`.

    Raises:
        DataError: The file is damaged, holds no clips, or is of another network.
        SpecError: Its clips are not those of this network.
    """
    file, float_model = Path(checkpoint), copy.deepcopy(model)
    weights = read_weights(file)
    check_clips(weights, file)
    check_fit(float_model.state_dict(), _without_clips(weights), file)
    float_model.load_state_dict(float_state(weights), strict=False)  # batch counters may be missing
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    clips = find_pass("load-clips")(checkpoint=str(checkpoint))  # type: ignore[call-arg]
    chosen = replace(chosen, passes=(*chosen.passes, clips)).with_settings(settings)
    return compile(float_model, example_inputs, chosen, calibration=calibration, **options)


def has_clips(weights: Mapping[str, Tensor]) -> bool:
    """Whether a layer has a clip, so that the file is of the authors' kind."""
    return any(name.endswith(WEIGHT_CLIP) for name in weights)


def check_clips(weights: Mapping[str, Tensor], file: Path) -> None:
    """Some layer has a clip.

    Raises:
        DataError: None has.
    """
    if not has_clips(weights):
        raise DataError(
            "the checkpoint has no clips, so it is not one of APoT's authors",
            where=str(file),
            hint=f"clips are named LAYER{WEIGHT_CLIP} and LAYER{VALUE_CLIP}; float weights go "
            "through fxq compile MODEL --weights FILE, or fxq train",
        )


def float_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the float network: no clips, and weights as their batch norms know them.

    Args:
        weights: All tensors of a checkpoint, by name. Weights with a clip are centred and divided
            by their deviation over the layer, as the authors' forward does.
    """
    levelled = {
        f"{name.removesuffix(WEIGHT_CLIP)}.weight" for name in weights if name.endswith(WEIGHT_CLIP)
    }
    with torch.no_grad():
        return {
            name: normalized_weight(tensor, detached=True) if name in levelled else tensor
            for name, tensor in _without_clips(weights).items()
        }


def _without_clips(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    clips = (WEIGHT_CLIP, VALUE_CLIP)
    return {name: tensor for name, tensor in weights.items() if not name.endswith(clips)}
