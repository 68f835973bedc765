"""What every test may use: golden files, data, and a way to capture a model and run one pass."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fxq.contracts import relative_error
from fxq.graph.capture import capture
from fxq.graph.program import LayerOverride, Program
from fxq.pipeline import Pass, Pipeline
from fxq.trail.journal import Journal, Step

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"

hypothesis.settings.register_profile("fxq", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("fxq")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks are quicker on one thread, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow; give --run-slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


# ---- golden files and data -------------------------------------------------------------------


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Call it as ``golden(name, text)``: the text is that of ``tests/golden/NAME.txt``."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        actual = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(actual, encoding="utf-8")
            return
        if not path.is_file():
            pytest.fail(f"there is no {path}; run pytest --update-golden and review it")
        expected = path.read_text(encoding="utf-8")
        if actual != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), actual.splitlines(), str(path), "now", lineterm=""
            )
            pytest.fail("\n".join(lines) + "\nif it is meant: pytest --update-golden")

    return check


@pytest.fixture
def data() -> Path:
    """The folder of real data: ``FXQ_DATA``, else ``shared/data`` beside the repository."""
    folder = Path(os.environ.get("FXQ_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"there is no data in {folder}; set FXQ_DATA")
    return folder


@pytest.fixture
def write_voc(tmp_path: Path) -> Callable[..., Path]:
    """Call it as ``write_voc({"a": mask})``: images with these masks, in VOC's folders.

    An image has the grey ``40 * class``, and black where the mask says 255.
    """

    def write(masks: Mapping[str, Any], split: str = "val", folder: str = "voc") -> Path:
        root = tmp_path / folder
        images, classes = root / "JPEGImages", root / "SegmentationClass"
        lists = root / "ImageSets" / "Segmentation"
        for place in (images, classes, lists):
            place.mkdir(parents=True, exist_ok=True)
        for name, mask in masks.items():
            stored = Image.fromarray(np.asarray(mask, dtype=np.uint8))
            grey = stored.point(lambda value: 0 if value == 255 else 40 * value)
            grey.convert("RGB").save(images / f"{name}.jpg", quality=100, subsampling=0)
            stored.putpalette(list(range(256)) * 3)
            stored.save(classes / f"{name}.png")
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in masks))
        return root

    return write


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., Path]:
    """Call it as ``write_coco([[(x, y, w, h, category)], …])``: an image per list of boxes.

    A box is bright in an otherwise black image; a sixth number says whether it is around a crowd.
    """

    def write(
        images: Sequence[Sequence[tuple[int, ...]]],
        split: str = "val2017",
        folder: str = "coco",
        sizes: Sequence[tuple[int, int]] = ((64, 48),),
    ) -> Path:
        root = tmp_path / folder
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / split).mkdir()
        found: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        for index, boxes in enumerate(images):
            width, height = sizes[index % len(sizes)]
            pixels = np.zeros((height, width, 3), dtype=np.uint8)
            image = {"id": 1000 - index, "file_name": f"{index}.png"}
            found["images"].append({**image, "width": width, "height": height})
            for x, y, w, h, category, *crowd in boxes:
                pixels[y : y + h, x : x + w] = 250
                item = {"image_id": image["id"], "category_id": category, "bbox": [x, y, w, h]}
                outline = {"segmentation": [[x, y, x + w, y, x + w, y + h]], "area": w * h}
                found["annotations"].append({**item, **outline, "iscrowd": sum(crowd)})
            Image.fromarray(pixels).save(root / split / f"{index}.png")
        found["annotations"].reverse()  # not in the order of the images
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))
        return root

    return write


# ---- one pass --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A model that went through passes.

    Attributes:
        model: The model as it was given.
        program: The program after the passes.
        journal: What they did.
    """

    model: nn.Module
    program: Program
    journal: Journal

    @property
    def step(self) -> Step:
        """What the last pass did."""
        return self.journal.steps[-1]

    def why(self, node: str) -> list[str]:
        """The reasons the last pass gave for refusing a node."""
        return [miss.why for miss in self.step.misses if miss.node == node]

    def text(self) -> str:
        """The graph after the last pass, without machine-dependent digests."""
        return self.step.after.text(digests=False)

    def error(self, *inputs: Any) -> float:
        """The largest difference of the outputs, relative to the model's largest output."""
        with torch.no_grad():
            want, have = self.model.eval()(*inputs), self.program.module(*inputs)
        return relative_error(want, have)


@pytest.fixture
def run_passes() -> Callable[..., Ran]:
    """Call it as ``run_passes([passes], model, example)``; see `_run`."""
    return _run


@pytest.fixture
def run_one() -> Callable[..., Ran]:
    """Call it as ``run_one(pass, model, example)``; see `_run`."""

    def run(one: Pass, model: nn.Module, example: Any, **options: Any) -> Ran:
        return _run([one], model, example, **options)

    return run


def _run(
    passes: Sequence[Pass],
    model: nn.Module,
    example: Any,
    *,
    calibration: Any = None,
    layers: dict[str, dict[str, Any]] | None = None,
    check: bool = True,
    **options: Any,
) -> Ran:
    """The model has been captured on the example and has been through the passes.

    Args:
        passes: The passes, in order.
        model: The model.
        example: One batch.
        calibration: What `calibrate` reads.
        layers: Per-layer overrides: options by glob.
        check: Whether contracts are checked.
        options: Options of `capture`.
    """
    program = capture(model, example, **options)
    program.calibration = calibration
    program.overrides = tuple(LayerOverride(*item) for item in (layers or {}).items())
    journal = Pipeline(*passes, check=check).run(program)
    return Ran(model, program, journal)
