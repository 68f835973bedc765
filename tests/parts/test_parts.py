"""Networks that cannot be traced whole: what becomes a part, what it computes, what is told."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.errors import ArtifactError, CalibrationError, CaptureError, FxqError, RecipeError
from fxq.integer.comparison import Comparison
from fxq.integer.reference import Reference
from fxq.parts.composition import CompiledPart
from fxq.parts.inputs import PartInputs
from fxq.torchvision_import import import_torchvision

Make = Callable[[Any], nn.Module]

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = [torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
LISTS = [(list(batch),) for batch in IMAGES]


def sqnr(found: Tensor, wanted: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


# ---- what is found ---------------------------------------------------------------------------


def test_the_largest_parts_are_found_and_the_rest_is_explained(make: Make) -> None:
    found = fxq.find_parts(make("Router"), IMAGES[0])
    assert {path: part.calls for path, part in found.parts.items()} == {
        "stem": 1,
        "often": 2,
        "heads.0": 1,
        "heads.1": 1,
    }
    assert found.left == ["never.conv"]
    (gap,) = found.gaps
    assert (gap.path, gap.kind) == ("", "Router")
    assert "depends on a tensor value" in gap.why
    assert "conftest.py" in gap.where
    assert "x.mean() > 1000" in gap.where
    assert gap.hint


def test_a_network_that_can_be_traced_is_one_part(make: Make) -> None:
    found = fxq.find_parts(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGES[0])
    assert list(found.parts) == [""]
    assert not found.gaps


def test_a_shared_head_is_called_once_per_level(make: Make) -> None:
    found = fxq.find_parts(make("Pyramid"), LISTS[0])
    calls = {path: part.calls for path, part in found.parts.items()}
    assert calls == {"stem": 1, "head.tower": 3, "head.score": 3}
    assert [gap.path for gap in found.gaps] == ["", "head"]
    assert "levels is a list" in found.gaps[1].why


def test_a_part_whose_weights_are_read_is_left(make: Make) -> None:
    found = fxq.find_parts(make("Reader"), torch.rand(2, 4, 8, 8))
    assert list(found.parts) == ["out", "inner.norm", "inner.conv"][:1]
    assert any("reads its attribute conv" in gap.why for gap in found.gaps)


def test_random_numbers_and_changing_flags_are_gaps(make: Make) -> None:
    found = fxq.find_parts(make("Noisy"), torch.rand(2, 4))
    why = {gap.path: gap.why for gap in found.gaps}
    assert "something else" in why["dice"]
    assert "2 calls differ" in why["flagged"]
    assert list(found.parts) == ["dice.linear", "flagged.linear"]


def test_leaves_are_no_parts(make: Make) -> None:
    found = fxq.find_parts(make("Router"), IMAGES[0], leaf_modules=["often", "Linear"])
    assert list(found.parts) == ["stem"]
    assert found.left == ["often.conv", "never.conv", "heads.0", "heads.1"]
    inside = fxq.find_parts(make("Router"), IMAGES[0], leaf_modules=["often.norm"])
    assert "norm" in {node.target for node in inside.parts["often"].graph.graph.nodes}


def test_nothing_to_trace_is_an_error_that_says_why() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="no convolution or linear"):
        fxq.compile_parts(Sums(), torch.rand(2, 4))


def test_a_network_that_fails_on_the_example(make: Make) -> None:
    with pytest.raises(CaptureError, match="Router fails on its inputs"):
        fxq.find_parts(make("Router"), torch.rand(2, 5, 8, 8))


# ---- what is compiled ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_parts_run_on_integers_and_the_rest_as_written(backend: str, make: Make) -> None:
    model = make("Router")
    before = copy.deepcopy(model.state_dict())
    result = fxq.compile_parts(model, IMAGES[0], "minmax-int8", backend=backend, calibration=IMAGES)
    assert result.coverage() == pytest.approx(4 / 5)
    with torch.no_grad():
        wanted, found = model(IMAGES[1]), result.module(IMAGES[1])
    assert sqnr(found, wanted) > 25
    assert not torch.equal(found, wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_part_equals_the_integer_reference(make: Make) -> None:
    result = fxq.compile_parts(make("Pyramid"), LISTS[0], "aciq-4bit", calibration=LISTS)
    for path, artifact in result.artifacts.items():
        inputs = result.survey.parts[path].example
        comparison = Comparison(artifact.integers)
        _, expected = Reference(artifact.integers).run(*inputs)
        module: Any = artifact.module
        registers = module.registers(*inputs)
        comparison.add(inputs, expected, registers)
        assert comparison.layers
        assert sum(layer.introduced for layer in comparison.layers.values()) == 0, path


def test_a_shared_head_is_calibrated_on_all_of_its_calls(make: Make) -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) if x.sum() < -1e9 else self.head(x) + self.head(100 * x)

    x = torch.rand(8, 4) + 0.5
    result = fxq.compile_parts(make(Levels), x, "minmax-int8", calibration=[x])
    program = result.results["head"].program
    quantizer: Any = next(
        module for module in program.module.modules() if hasattr(module, "zero_point")
    )
    reach = float(quantizer.scale) * (255 - int(quantizer.zero_point))
    assert reach == pytest.approx(100 * float(x.max()), rel=0.05)


def test_a_dictionary_comes_out_in_order(make: Make) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
            return OrderedDict(second=self.two(x), first=self.one(x))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named = Named()

        def forward(self, x: Tensor) -> Tensor:
            found = self.named(x)
            assert isinstance(found, OrderedDict)
            return next(iter(found.values())) if x.sum() > 0 else x

    result = fxq.compile_parts(
        make(Whole), torch.rand(2, 4), "minmax-int8", calibration=[torch.rand(9, 4)]
    )
    assert list(result.module.named(torch.rand(1, 4))) == ["second", "first"]


def test_a_part_called_otherwise_than_compiled_says_so(make: Make) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, times: int) -> Tensor:
            return self.linear(x) * times

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.scaled(x, 2 if x.sum() > 0 else 3)

    result = fxq.compile_parts(
        make(Whole), torch.rand(2, 4), "minmax-int8", calibration=[torch.rand(9, 4)]
    )
    with pytest.raises(FxqError, match="compiled for times = 2, not 3"):
        result.module(-torch.rand(2, 4))


def test_empty_tensors_pass_through_parts(make: Make) -> None:
    result = fxq.compile_parts(make("Router"), IMAGES[0], "minmax-int8", calibration=IMAGES)
    with torch.no_grad():
        assert result.module.heads[0](torch.empty(0, 8)).shape == (0, 4)


def test_recipes_that_train_are_refused(make: Make) -> None:
    with pytest.raises(RecipeError, match="parts of models are only compiled"):
        fxq.compile_parts(make("Router"), IMAGES[0], "apot-4bit", calibration=IMAGES)


def test_no_batch_that_reaches_a_part(make: Make) -> None:
    model = make("Router")
    far = [batch * 1e6 for batch in IMAGES]
    survey = fxq.find_parts(model, far[0])
    assert "never" in survey.parts
    with pytest.raises(CalibrationError, match="no batch") as caught:
        fxq.compile_parts(model, far[0], "minmax-int8", calibration=IMAGES)
    assert str(caught.value.where).startswith("never")


def test_a_generator_serves_all_parts(make: Make) -> None:
    model = make("Router")
    listed = fxq.compile_parts(model, IMAGES[0], "aciq-4bit", calibration=IMAGES)
    once = fxq.compile_parts(model, IMAGES[0], "aciq-4bit", calibration=iter(IMAGES))
    assert torch.equal(listed.module(IMAGES[2]), once.module(IMAGES[2]))


@pytest.mark.parametrize("budget", [0, 20_000, 2**29])
def test_how_much_is_kept_changes_nothing(budget: int, make: Make) -> None:
    survey = fxq.find_parts(make("Router"), IMAGES[0])
    inputs = PartInputs(survey.model, survey.parts, IMAGES, 1, budget)
    wanted = PartInputs(survey.model, survey.parts, IMAGES, 1, 0)
    for path in survey.parts:
        for _ in range(2):
            pairs = list(zip(inputs.of(path), wanted.of(path), strict=True))
            assert len(pairs) == 3 * survey.parts[path].calls
            assert all(
                torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True)
            )
        inputs.forget(path)
    assert inputs._room == budget


def test_the_composition_can_be_copied_and_pickled(make: Make) -> None:
    result = fxq.compile_parts(make("Router"), IMAGES[0], "minmax-int8", calibration=IMAGES)
    wanted = result.module(IMAGES[1])
    assert torch.equal(copy.deepcopy(result.module)(IMAGES[1]), wanted)
    part = result.module.often
    assert isinstance(part, CompiledPart)
    assert part.channels == 8
    assert pickle.loads(pickle.dumps(part.arguments)) == part.arguments


# ---- folders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(make: Make) -> fxq.PartialResult:
    return fxq.compile_parts(make("Router"), IMAGES[0], "aciq-4bit", calibration=IMAGES)


def test_a_folder_of_parts_gives_the_same_bits(
    compiled: fxq.PartialResult, tmp_path: Path, make: Make
) -> None:
    folder = compiled.save(tmp_path / "run")
    loaded = fxq.load_parts(folder, make("Router"))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES[1]), compiled.module(IMAGES[1]))
    assert fxq.load(folder / "parts" / "often").ledger.coverage() == 1
    with pytest.raises(ArtifactError, match="parts of a model"):
        fxq.load(folder)


def test_a_folder_is_not_overwritten(
    compiled: fxq.PartialResult, tmp_path: Path, make: Make
) -> None:
    folder = compiled.save(tmp_path / "run")
    with pytest.raises(ArtifactError, match="not empty"):
        compiled.save(folder)
    compiled.save(folder, force=True)
    fxq.load_parts(folder, make("Router"))


def test_another_model_is_refused(compiled: fxq.PartialResult, tmp_path: Path, make: Make) -> None:
    folder = compiled.save(tmp_path / "run")
    with pytest.raises(ArtifactError, match="has no submodule"):
        fxq.load_parts(folder, make("Noisy"))
    other = make("Router")
    other.often = nn.Identity()
    with pytest.raises(ArtifactError, match="is a Identity, not a Block"):
        fxq.load_parts(folder, other)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("folder", "../../elsewhere", "not the folder of a part"),
        ("folder", ".", "not the folder of a part"),
        ("folder", "a/b", "not the folder of a part"),
        ("tensors", ["nothing"], "no argument nothing"),
        ("tensors", 3, "not described whole"),
        ("path", None, "no submodule None"),
    ],
)
def test_a_damaged_description(
    compiled: fxq.PartialResult, tmp_path: Path, key: str, value: Any, words: str, make: Make
) -> None:
    folder = compiled.save(tmp_path / "run")
    whole = json.loads((folder / "metadata.json").read_text())
    whole["parts"][0][key] = value
    (folder / "metadata.json").write_text(json.dumps(whole))
    with pytest.raises(ArtifactError, match=words):
        fxq.load_parts(folder, make("Router"))


@pytest.mark.parametrize("parts", [None, [], 3, [3], [{}]])
def test_no_parts(compiled: fxq.PartialResult, tmp_path: Path, parts: Any, make: Make) -> None:
    folder = compiled.save(tmp_path / "run")
    (folder / "metadata.json").write_text(json.dumps({"fxq": "0", "parts": parts}))
    with pytest.raises(ArtifactError):
        fxq.load_parts(folder, make("Router"))


# ---- detection -------------------------------------------------------------------------------


def detector(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    build = getattr(import_torchvision().models.detection, name)
    network: nn.Module = build(weights=None, weights_backbone=None, **options)
    return network.eval()


def test_retinanet_has_its_backbone_and_heads_on_integers() -> None:
    model = detector("retinanet_resnet50_fpn", min_size=96, max_size=96, num_classes=5)
    images = [([torch.rand(3, 96, 96)],) for _ in range(2)]
    result = fxq.compile_parts(model, images[0], "minmax-int8", calibration=images)
    assert set(result.results) == {
        "backbone",
        *(f"head.{one}" for one in ("classification_head.conv", "classification_head.cls_logits")),
        *(f"head.{one}" for one in ("regression_head.conv", "regression_head.bbox_reg")),
    }
    assert result.coverage() == 1
    with torch.no_grad():
        (found,) = result.module(*images[1])
    assert set(found) == {"boxes", "scores", "labels"}
