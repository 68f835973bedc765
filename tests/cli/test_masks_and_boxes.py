"""``fxq compile`` and ``fxq eval`` on images with masks, and on images with boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxq.model_file import load_model

Fxq = Callable[..., Any]
Write = Callable[..., Path]

MASKS = """
    import torch
    from torch import nn

    class Bright(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Conv2d(4, 3, 1)
            with torch.no_grad():
                nn.init.dirac_(self.conv.weight)
                self.conv.bias.zero_()
                self.head.weight.zero_()
                self.head.weight[1:, :3] = torch.tensor([1 / 3, 2 / 3]).view(2, 1, 1, 1)
                self.head.bias.copy_(torch.tensor([0, -20 / 255, -80 / 255]))

        def forward(self, x):
            return {"out": self.head(self.conv(x))}

    model = Bright
    example_inputs = torch.zeros(1, 3, 16, 16)
"""
BOXES = """
    import torch
    from torch import nn

    class Finder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1)
            with torch.no_grad():
                self.conv.weight.fill_(1 / 3)
                self.conv.bias.fill_(-0.5)

        def forward(self, images):
            return [self.found(self.conv(image[None])[0, 0] > 0) for image in images]

        def found(self, bright):
            rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
            boxes = torch.zeros(0, 4)
            if len(rows):
                boxes = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).T.float()
            labels = torch.full((len(boxes),), 90)
            return {"boxes": boxes, "scores": torch.ones(len(boxes)), "labels": labels}

    model = Finder
    example_inputs = ([torch.rand(3, 24, 24)],)
"""
RAW = ("--mean", "0,0,0", "--std", "1,1,1")


def mask(label: int) -> np.ndarray:
    found = np.zeros((16, 16))
    found[8:] = label
    found[0] = 255
    return found


@pytest.fixture
def boxes(write_coco: Write) -> Path:
    """A folder as COCO's: three images, one of them without objects."""
    return write_coco(
        [[(8, 4, 20, 10, 90)], [], [(1, 2, 9, 12, 90)]], sizes=[(64, 48), (30, 40), (20, 20)]
    )


def test_masks(fxq: Fxq, write: Write, write_voc: Write) -> None:
    model = str(write("net.py", MASKS))
    data = str(write_voc({"a": mask(1), "b": mask(2)}))
    arguments = ("-r", "minmax-int8", "-c", data, "-e", data, *RAW)
    done = fxq("compile", model, *arguments, "-o", "run")
    assert done.code == 0, done.err
    assert "calibrating on 2 images of voc val" in done.out
    assert "float        mIoU 100.00 %" in done.out
    assert "compiled     mIoU 100.00 %, mIoU +0.00 points" in done.out
    about = json.loads(Path("run/metadata.json").read_text())
    assert about["accuracy"]["compiled"] == {"mIoU": 100}
    for more in ((), ("--data", data)):
        found = fxq("eval", "run", *more)
        assert (found.code, "mIoU 100.00 % on 2 images of voc val" in found.out) == (0, True)
    assert fxq("verify", "run", "--data", data).code == 0


def test_a_mask_the_network_does_not_answer(fxq: Fxq, write: Write, write_voc: Write) -> None:
    model = str(write("net.py", MASKS))
    fine = str(write_voc({"a": mask(1)}, folder="fine"))
    half = np.array(mask(1))
    half[8:, :8] = 2  # its pixels are as bright as told; the labels are not
    wrong = write_voc({"a": half}, folder="wrong")
    (wrong / "JPEGImages" / "a.jpg").write_bytes(Path(fine, "JPEGImages", "a.jpg").read_bytes())
    done = fxq("compile", model, "-r", "minmax-int8", "-c", fine, *RAW, "-o", "run")
    assert done.code == 0, done.err
    found = fxq("eval", "run", "--data", str(wrong))
    # class 0: all 112 of 112; class 1: 64 of 128; class 2: 0 of 64
    assert "mIoU 50.00 %" in found.out


def test_boxes(fxq: Fxq, write: Write, boxes: Path) -> None:
    model = str(write("net.py", BOXES))
    arguments = ("-r", "minmax-int8", "-c", str(boxes), "-e", str(boxes))
    done = fxq("compile", model, *arguments, "-o", "run")
    assert done.code == 0, done.err
    assert "calibrating on 3 images of val2017" in done.out
    assert "100.0 % of layers, in 1 parts" in done.out
    assert "float        mAP 100.00 %, mAP50 100.00 %" in done.out
    assert "compiled     mAP 100.00 %, mAP50 100.00 %, mAP +0.00 points" in done.out
    for more in ((), ("--data", str(boxes)), ("--limit", "2")):
        found = fxq("eval", "run", "--model", model, *more)
        assert (found.code, "mAP 100.00 %, mAP50 100.00 %" in found.out) == (0, True), found.err
    refused = fxq("verify", "run/parts/conv", "--data", str(boxes))
    assert (refused.code, "these are images for detection" in refused.err) == (2, True)


def test_a_detector_of_the_zoo(fxq: Fxq, write: Write, boxes: Path) -> None:
    name = "torchvision/ssdlite320_mobilenet_v3_large"
    data = ("-c", str(boxes), "-n", "1", "-e", str(boxes), "--eval-images", "1")
    done = fxq("compile", name, "-r", "minmax-int8", *data, "-o", "run")
    assert done.code == 0, done.err
    assert "100.0 % of layers, in 13 parts" in done.out
    assert "measured on  1 of 3 images of val2017" in done.out
    found = fxq("eval", "run", "--limit", "1")
    assert (found.code, "mAP50" in found.out) == (0, True), found.err


def test_random_images_for_a_detector(fxq: Fxq, write: Write) -> None:
    model = str(write("net.py", BOXES))
    done = fxq("compile", model, "-r", "minmax-int8", "-c", "random", "-n", "6", "-o", "run")
    assert done.code == 0, done.err
    assert "calibrating on 6 random inputs" in done.out


def test_detectors_are_listed(fxq: Fxq) -> None:
    done = fxq("models", "torchvision/*ssd*")
    assert "torchvision/ssd300_vgg16" in done.out
    assert "3x320x320" in done.out
    (images,) = load_model("torchvision/ssdlite320_mobilenet_v3_large").example_inputs
    assert [image.shape for image in images] == [(3, 320, 320)]


def test_data_that_does_not_fit_or_is_broken(
    fxq: Fxq, write: Write, write_voc: Write, boxes: Path, tmp_path: Path
) -> None:
    finder, bright = str(write("boxes.py", BOXES)), str(write("masks.py", MASKS))
    masks, recipe = str(write_voc({"a": mask(1)})), ("-r", "minmax-int8", "-o", "run")

    def refused(words: str, *arguments: str) -> None:
        done = fxq(*arguments)
        assert (done.code, words in " ".join(done.err.split())) == (2, True), done.err
        assert not Path("run").exists()

    refused("need a network that takes a list", "compile", bright, *recipe, "-c", str(boxes))
    refused("[N, C, H, H]", "compile", finder, *recipe, "-c", masks)
    refused("pass --mean and --std", "compile", bright, *recipe, "-c", masks)
    refused("where classification is needed", "train", bright, "-d", masks, *RAW)
    refused("where classification is needed", "train", finder, "-d", str(boxes))
    (tmp_path / "other").mkdir()
    refused("no class folders", "compile", bright, *recipe, "-c", "other", *RAW)
    drop = ("--max-drop", "1", *RAW)
    refused("one row of logits per image", "compile", bright, *recipe, "-c", masks, *drop)
    (boxes / "val2017" / "2.png").unlink()
    refused("no such image", "compile", finder, *recipe, "-c", str(boxes), "-e", str(boxes))
    (boxes / "annotations" / "instances_val2017.json").write_text("{")
    refused("the annotations cannot be read", "compile", finder, *recipe, "-c", str(boxes))
