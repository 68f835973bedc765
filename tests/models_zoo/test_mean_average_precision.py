import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxq.errors import DataError
from fxq.models_zoo import evaluate_iou, evaluate_map, open_coco, open_voc
from fxq.zoo_entry import IMAGENET

Write = Callable[..., Path]
Found = list[tuple[float, ...]]
"""Boxes ``x1, y1, x2, y2`` with score and category."""


class Answers(nn.Module):
    """Finds what it was told to, image after image, whatever it sees."""

    def __init__(self, *answers: Found) -> None:
        super().__init__()
        self.answers: Iterator[Found] = iter(answers)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.answer(next(self.answers)) for _ in images]

    def answer(self, found: Found) -> dict[str, Tensor]:
        table = torch.tensor(found).reshape(-1, 6)
        return {
            "boxes": table[:, :4],
            "scores": table[:, 4],
            "labels": table[:, 5].to(torch.int64),
            "masks": torch.zeros(len(table), 1, 4, 4),  # mask networks have some
        }


RIGHT = (10.0, 10.0, 20.0, 20.0, 0.5, 7.0)
OTHER = (30.0, 30.0, 40.0, 40.0)


@pytest.mark.parametrize(
    ("found", "precision", "at_50"),
    [
        ([[RIGHT], []], 100, 100),
        ([[], []], 0, 0),
        ([[(10, 10, 20, 16.2, 0.5, 7)], []], 30, 100),  # 0.62 of it: at 0.5, 0.55 and 0.6
        ([[(10, 10, 20, 14, 0.5, 7)], []], 0, 0),  # 0.4 of it
        ([[RIGHT, (*OTHER, 0.9, 7)], []], 50, 50),  # something else comes first
        ([[RIGHT, (*OTHER, 0.1, 7)], []], 100, 100),  # last, when all has been found
        ([[RIGHT], [(*OTHER, 0.9, 7)]], 50, 50),  # on an image without objects
        ([[RIGHT, (10, 10, 20, 20, 0.9, 8)], []], 100, 100),  # of a category without objects
        ([[(*RIGHT[:5], 8)], []], 0, 0),  # only of the wrong category
        ([[RIGHT, (*RIGHT[:4], 0.4, 7)], []], 100, 100),  # twice the same, after the first
        ([[RIGHT, (*RIGHT[:4], 0.6, 7)], []], 100, 100),
    ],
)
def test_answers_that_can_be_counted(
    write_coco: Write, found: list[Found], precision: float, at_50: float
) -> None:
    data = open_coco(write_coco([[(10, 10, 10, 10, 7)], []]))
    measured = evaluate_map(Answers(*found), data)
    assert measured == pytest.approx({"mAP": precision, "mAP50": at_50}, abs=1e-3)


def test_categories_count_the_same(write_coco: Write) -> None:
    data = open_coco(write_coco([[(10, 10, 10, 10, 7)], [(1, 1, 9, 9, 8)], [(2, 2, 9, 9, 8)]]))
    measured = evaluate_map(Answers([RIGHT], [], []), data, 2)
    assert measured == pytest.approx({"mAP": 50, "mAP50": 50}, abs=1e-3)


def test_a_crowd_is_neither_right_nor_wrong(write_coco: Write) -> None:
    data = open_coco(write_coco([[(10, 10, 10, 10, 7), (30, 30, 10, 10, 7, 1)]]))
    inside = (31.0, 31.0, 36.0, 36.0, 0.9, 7.0)
    assert evaluate_map(Answers([inside, RIGHT]), data)["mAP"] == pytest.approx(100)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_answers_against_the_definition(write_coco: Write, batch_size: int) -> None:
    random = np.random.default_rng(5)
    objects = [
        [(*random.integers(0, 30, 2), *random.integers(5, 20, 2), int(random.integers(1, 4)))]
        * int(i > 0)
        for i in range(8)
    ]
    objects[3].append((20, 2, 9, 9, 1))
    plain = [[tuple(map(int, one)) for one in image] for image in objects]
    found = [
        [
            (x, y, x + w, y + h + 0.37, float(random.random()), float(label))
            for (x0, y0, w, h, label) in image
            for x, y in [(x0 + s, y0 + t) for s, t in random.integers(-3, 4, (4, 2))]
        ]
        for image in plain
    ]
    data = open_coco(write_coco(plain))
    seen: list[tuple[int, int]] = []
    measured = evaluate_map(
        Answers(*found), data, batch_size, lambda done, total: seen.append((done, total))
    )
    at = np.linspace(0.5, 0.95, 10)
    table = np.array([[average_precision(plain, found, c, t) for c in (1, 2, 3)] for t in at])
    assert measured["mAP"] == pytest.approx(100 * table.mean(), abs=0.01)
    assert measured["mAP50"] == pytest.approx(100 * table[0].mean(), abs=0.01)
    assert 5 < measured["mAP"] < measured["mAP50"] < 100
    assert seen[-1] == (8, 8)


def average_precision(objects: Any, found: list[Found], category: int, least: float) -> float:
    """The mean, over 101 recalls, of the best precision at that recall or a higher one."""
    wanted = {
        i: [(x, y, x + w, y + h) for x, y, w, h, label in image if label == category]
        for i, image in enumerate(objects)
    }
    answers = [(one[4], i, one[:4]) for i, image in enumerate(found) for one in image
               if one[5] == category]  # fmt: skip
    hits = []
    total = sum(map(len, wanted.values()))
    for _, image, box in sorted(answers, reverse=True):
        left = wanted[image]
        best = max(left, key=lambda one: overlap(one, box), default=None)
        hits.append(best is not None and overlap(best, box) >= least)
        if hits[-1]:
            left.remove(best)
    right = np.cumsum(hits)
    recall, precision = right / total, right / np.arange(1, len(hits) + 1)
    return float(np.mean([max([0, *precision[recall >= r]]) for r in np.linspace(0, 1, 101)]))


def overlap(one: Any, other: Any) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return shared / (sum(areas) - shared)


def test_what_cannot_be_measured(write_coco: Write) -> None:
    with pytest.raises(DataError, match="no object in these images"):
        evaluate_map(Answers([RIGHT]), open_coco(write_coco([[]], folder="empty")))
    data = open_coco(write_coco([[(10, 10, 10, 10, 7)], []]))
    assert evaluate_map(Answers([RIGHT]), data, limit=1)["mAP"] == pytest.approx(100)

    class Tensors(nn.Module):
        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return images

    with pytest.raises(DataError, match="not one dictionary of boxes, scores and labels"):
        evaluate_map(Tensors(), data)


@pytest.mark.parametrize("package", ["torchmetrics.detection", "pycocotools"])
def test_without_the_packages(
    write_coco: Write, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    data = open_coco(write_coco([[(10, 10, 10, 10, 7)]]))
    with pytest.raises(DataError, match="is not installed") as caught:
        evaluate_map(Answers([RIGHT]), data)
    assert caught.value.hint == "pip install fxq[metrics]"


def test_masks_need_torchmetrics_only(write_voc: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_voc(write_voc({"a": np.full((4, 4), 2)}), normalization=IMAGENET, size=4)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert evaluate_iou(nn.Identity(), data) == {"mIoU": pytest.approx(100)}
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(DataError, match="torchmetrics is not installed"):
        evaluate_iou(nn.Identity(), data)
