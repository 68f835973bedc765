"""load-clips: the clips of a published checkpoint, and every way the file can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import fxq
from fxq.errors import CalibrationError, DataError, SpecError
from fxq.models_zoo import tiny_residual
from fxq.passes import LoadClips
from fxq.recipe import Recipe

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WEIGHT, VALUE = ".weight_quant.wgt_alpha", ".act_alpha"
RESIDUAL = {
    f"conv1{WEIGHT}": 1.5,
    f"conv1{VALUE}": 2.25,
    f"conv2{WEIGHT}": 1.75,
    f"conv2{VALUE}": 3.5,
}


class Fork(nn.Module):
    """Two layers that read one value, directly or both behind one pool."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.max_pool2d(x, 2) if self.pooled else x
        return self.head(F.relu(self.a(x) + self.b(x)).mean((2, 3)))


FORK = {f"a{WEIGHT}": 1.0, f"a{VALUE}": 0.75, f"b{WEIGHT}": 2.0, f"b{VALUE}": 1.25}


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., Any]:
    """Call it as ``loaded(model, clips)``: what a recipe with load-clips gives."""

    def run(model: nn.Module, clips: dict[str, Any], **options: Any) -> Any:
        file = tmp_path / "clips.safetensors"
        tensors = {name: torch.as_tensor(value) for name, value in clips.items()}
        save_file({name: value.float() for name, value in tensors.items()}, file)
        recipe = Recipe.load("apot-4bit")
        recipe = Recipe("mine", (*recipe.passes, LoadClips(str(file))), training=True)
        options = {"calibration": [IMAGES], **options}
        return fxq.compile(model.eval(), IMAGES[:2], recipe, **options)

    return run


def alphas(result: Any) -> dict[str, float]:
    return {n: p.item() for n, p in result.program.module.named_parameters() if "alpha" in n}


def test_clips_are_those_of_the_file(loaded: Any) -> None:
    extra = {"conv1.weight": torch.randn(3)}  # other tensors are left out
    assert alphas(loaded(tiny_residual(), RESIDUAL | extra)) == {
        "conv1.weights.alpha": 1.5,
        "stem_relu_quantizer_low.alpha": 2.25,
        "conv2.weights.alpha": 1.75,
        "relu1_quantizer.alpha": 3.5,
    }


def test_ranges_are_those_with_the_clips_in_place(loaded: Any) -> None:
    """Clips of nearly nothing leave the bias of the last norm, which the sum then has."""
    wide, narrow = (
        loaded(tiny_residual(), RESIDUAL | {f"conv2{VALUE}": clip}).program.module
        for clip in (3.5, 1e-4)
    )
    before, after = (one.get_submodule("conv2_quantizer").high.item() for one in (wide, narrow))
    assert after < 0.8 * before
    assert wide.get_submodule("x_quantizer").high.item() == IMAGES.max().item()


def test_readers_with_different_clips_have_quantizers_of_their_own(loaded: Any) -> None:
    result = loaded(Fork(), FORK)
    found = {}
    for layer in ("a", "b"):
        (source,) = result.program.node(layer).all_input_nodes
        found[layer] = result.program.submodule(source).alpha.item()
        assert [node.name for node in source.all_input_nodes] == ["relu"]
    assert found == {"a": 0.75, "b": 1.25}
    module = result.module.eval()
    with torch.no_grad():
        answer = module(IMAGES)
    assert torch.equal(fxq.lower(module).module(IMAGES), answer)


def test_readers_with_one_clip_share_it(loaded: Any) -> None:
    program = loaded(Fork(), FORK | {f"b{VALUE}": 0.75}).program
    sources = {program.node(layer).all_input_nodes[0] for layer in ("a", "b")}
    assert len(sources) == 1


def test_different_clips_behind_one_pool(loaded: Any) -> None:
    with pytest.raises(SpecError, match="hands it to layers with different clips") as caught:
        loaded(Fork(pooled=True), FORK)
    assert caught.value.where == "load-clips at %b"
    same = loaded(Fork(pooled=True), FORK | {f"b{VALUE}": 0.75})
    assert alphas(same)["relu_quantizer.alpha"] == 0.75


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({f"conv2{VALUE}": None}, "the checkpoint has no levels or no clip for conv2"),
        ({f"conv1{WEIGHT}": None}, "the checkpoint has no levels or no clip for conv1"),
        ({f"stem{VALUE}": 1.0}, "the network has no levels or no clip for stem"),
        ({f"layer9{WEIGHT}": 1.0}, "the network has no levels or no clip for layer9"),
    ],
)
def test_names_that_do_not_match(changes: dict[str, Any], match: str, loaded: Any) -> None:
    clips = {name: value for name, value in (RESIDUAL | changes).items() if value is not None}
    with pytest.raises(SpecError, match=match) as caught:
        loaded(tiny_residual(), clips)
    assert "clips.safetensors" in (caught.value.where or "")
    assert caught.value.hint


@pytest.mark.parametrize("ending", [WEIGHT, VALUE])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -2.0, [1.0, 2.0], []])
def test_a_clip_that_is_none(bad: Any, ending: str, loaded: Any) -> None:
    with pytest.raises(SpecError, match="a clip must be one positive number") as caught:
        loaded(tiny_residual(), RESIDUAL | {f"conv2{ending}": bad})
    assert caught.value.where == "load-clips at %conv2"


def test_a_clip_in_a_tensor_of_one(loaded: Any) -> None:
    result = loaded(tiny_residual(), RESIDUAL | {f"conv1{WEIGHT}": [[1.25]]})
    assert alphas(result)["conv1.weights.alpha"] == 1.25


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file at all"])
def test_a_file_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "clips.safetensors"
    if content is not None:
        file.write_bytes(content)
    recipe = Recipe.load("apot-4bit")
    recipe = Recipe("mine", (*recipe.passes, LoadClips(str(file))), training=True)
    with pytest.raises(DataError, match=r"damaged|no such weight file") as caught:
        fxq.compile(tiny_residual(), IMAGES[:2], recipe, calibration=[IMAGES])
    assert str(file) in str(caught.value)


def test_no_calibration_data(loaded: Any) -> None:
    with pytest.raises(CalibrationError, match="no calibration data"):
        loaded(tiny_residual(), RESIDUAL, calibration=None)


def test_ranges_need_data_of_their_own(loaded: Any) -> None:
    result = loaded(tiny_residual(), RESIDUAL)
    (file,) = [one.checkpoint for one in result.recipe.passes if one.name == "load-clips"]
    assert result.program.calibration is None
    with pytest.raises(CalibrationError, match="there is no calibration data"):
        fxq.pipeline.Pipeline(LoadClips(file)).run(result.program)
