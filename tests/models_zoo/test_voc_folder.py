from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fxq.errors import DataError
from fxq.models_zoo import SegmentationData, evaluate_iou, open_voc, task_of
from fxq.zoo_entry import Normalization

PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
Write = Callable[..., Path]


def opened(root: Path, size: int = 4, **options: str) -> SegmentationData:
    return open_voc(root, normalization=PLAIN, size=size, **options)


def halves(top: int, bottom: int, size: int = 4) -> np.ndarray:
    mask = np.full((size, size), bottom)
    mask[: size // 2] = top
    return mask


class Grey(nn.Module):
    """Tells the class from the grey that the images of the tests have."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.greys = 40 * torch.arange(classes).view(-1, 1, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": -(255 * x[:, :1] - self.greys).abs(), "aux": x}


class Always(nn.Module):
    """Says what it was told to, whatever it sees."""

    def __init__(self, *logits: torch.Tensor) -> None:
        super().__init__()
        self.logits: Iterator[torch.Tensor] = iter(logits)
        self.dropout = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.logits)


def says(answers: np.ndarray, classes: int = 2) -> torch.Tensor:
    found = nn.functional.one_hot(torch.from_numpy(answers), classes)
    return found.movedim(-1, 1).float()


# ---- images and masks ------------------------------------------------------------------------


def test_images_and_masks(write_voc: Write) -> None:
    data = opened(write_voc({"a": halves(1, 2), "b": halves(255, 0), "c": halves(0, 0)}))
    assert (data.name, len(data), data.unit) == ("voc val", 3, "images")
    (images, masks), (last, _) = data.batches(2)
    assert (images.shape, images.dtype, masks.dtype) == ((2, 3, 4, 4), torch.float32, torch.int64)
    assert len(last) == 1
    assert np.array_equal(masks[0], halves(1, 2))
    assert np.array_equal(masks[1], halves(255, 0))
    torch.testing.assert_close(images[0, :, 0, 0], torch.full((3,), 40 / 255), atol=0.02, rtol=0)


def test_scaling_takes_the_nearest_class(write_voc: Write) -> None:
    mask = np.zeros((40, 20))  # taller than wide: all of it is seen
    mask[20:] = 3
    ((images, masks),) = opened(write_voc({"a": mask}), size=8).batches(1)
    assert images.shape == (1, 3, 8, 8)
    assert np.array_equal(masks[0], halves(0, 3, 8))


def test_splits(write_voc: Write) -> None:
    root = write_voc({"a": halves(0, 1)}, "train")
    assert opened(root).name == "voc train"  # there is no other
    write_voc({"b": halves(0, 1), "c": halves(1, 1)}, "val")
    assert (len(opened(root)), len(opened(root, split="train"))) == (2, 1)


def test_the_usual_places(write_voc: Write, tmp_path: Path) -> None:
    write_voc({"a": halves(0, 1)}, folder="data/VOCdevkit/VOC2012")
    assert {task_of(tmp_path / "data"), task_of(tmp_path / "data/VOCdevkit")} == {"segmentation"}
    assert opened(tmp_path / "data").name == "VOC2012 val"
    assert opened(tmp_path / "data/VOCdevkit").name == "VOC2012 val"
    write_voc({"a": halves(0, 1)}, folder="data/VOCdevkit/VOC2007")
    with pytest.raises(DataError, match="several: VOC2007, VOC2012"):
        opened(tmp_path / "data")


def test_a_draw_is_the_same_each_time(write_voc: Write) -> None:
    data = opened(write_voc({str(i): halves(i, i) for i in range(6)}))
    drawn = [masks[:, 0, 0].tolist() for _, masks in data.batches(2, limit=4, seed=1)]
    assert drawn == [masks[:, 0, 0].tolist() for _, masks in data.batches(2, limit=4, seed=1)]
    assert len({*drawn[0], *drawn[1]}) == 4


def test_what_is_wrong_with_a_folder(write_voc: Write, tmp_path: Path) -> None:
    root = write_voc({"a": halves(0, 1), "b": halves(0, 1)})
    list_file = root / "ImageSets" / "Segmentation" / "val.txt"
    list_file.write_text("../../a\n")
    with pytest.raises(DataError, match="not the name of an image"):
        opened(root)
    list_file.write_text("\n")
    with pytest.raises(DataError, match="names no images"):
        opened(root)
    list_file.unlink()
    with pytest.raises(DataError, match=r"neither train\.txt nor val\.txt"):
        opened(root)
    (root / "SegmentationClass").rename(root / "elsewhere")
    with pytest.raises(DataError, match="no SegmentationClass beside"):
        opened(root)
    with pytest.raises(DataError, match="it has no SegmentationClass"):
        opened(tmp_path / "nothing")


def test_what_is_wrong_with_a_file(write_voc: Write) -> None:
    root = write_voc({"a": halves(0, 1), "b": halves(0, 1)})
    data, mask = opened(root), root / "SegmentationClass" / "a.png"
    Image.new("RGB", (4, 4)).save(mask)
    with pytest.raises(DataError, match="mode RGB"):
        next(data.batches(1))
    Image.new("L", (4, 5)).save(mask)
    with pytest.raises(DataError, match="4x5 pixels, the image 4x4"):
        next(data.batches(1))
    mask.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be decoded"):
        next(data.batches(1))
    (root / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(DataError, match="no such image") as caught:
        next(data.batches(1, start=1))
    assert str(caught.value.where).endswith("b.jpg")


# ---- mean intersection over union ------------------------------------------------------------


def test_all_right_is_100_per_cent(write_voc: Write) -> None:
    data = opened(write_voc({"a": halves(1, 2), "b": halves(255, 0), "c": halves(0, 1)}))
    assert evaluate_iou(Grey(), data, 2) == {"mIoU": 100}


def test_a_known_mistake(write_voc: Write) -> None:
    data = opened(write_voc({"a": halves(1, 0)}))
    answers = says(np.zeros((1, 4, 4), dtype=np.int64))
    assert evaluate_iou(Always(answers), data)["mIoU"] == pytest.approx(25)  # 8 of 16, 0 of 8
    wider = torch.cat([answers, torch.zeros(1, 19, 4, 4)], dim=1)  # classes that do not occur
    assert evaluate_iou(Always(wider), data)["mIoU"] == pytest.approx(25)


def test_pixels_without_a_label_do_not_count(write_voc: Write) -> None:
    mask = halves(1, 0)
    mask[0] = 255
    answers = says(np.zeros((1, 4, 4), dtype=np.int64))
    found = evaluate_iou(Always(answers), opened(write_voc({"a": mask})))
    assert found["mIoU"] == pytest.approx(100 * (8 / 12 + 0) / 2)


def test_logits_are_resized_to_the_mask(write_voc: Write) -> None:
    data = opened(write_voc({"a": halves(1, 0)}))
    coarse = says(np.array([[[1], [0]]]))
    assert coarse.shape == (1, 2, 2, 1)
    assert evaluate_iou(Always(coarse), data)["mIoU"] == pytest.approx(100)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_any_answers_against_sets_of_pixels(write_voc: Write, batch_size: int) -> None:
    random = np.random.default_rng(3)
    masks = random.choice([0, 1, 2, 255], (5, 8, 8))
    answers = random.integers(0, 4, (5, 8, 8))  # a class that no mask has
    data = opened(write_voc({f"{i}": mask for i, mask in enumerate(masks)}), 8)
    parts = (says(answers[i : i + batch_size], 4) for i in range(0, 5, batch_size))
    seen: list[tuple[int, int]] = []
    found = evaluate_iou(
        Always(*parts), data, batch_size, lambda done, total: seen.append((done, total))
    )

    def pixels(values: np.ndarray, label: int) -> set[int]:
        return {*np.flatnonzero((values == label) & (masks != 255)).tolist()}

    shares = [
        len(pixels(masks, label) & pixels(answers, label))
        / len(pixels(masks, label) | pixels(answers, label))
        for label in range(4)
    ]
    assert found["mIoU"] == pytest.approx(100 * sum(shares) / 4, abs=1e-4)
    assert seen[-1] == (5, 5)


def test_limit_and_training(write_voc: Write) -> None:
    data = opened(write_voc({"a": halves(0, 0), "b": halves(1, 1)}))
    answers = says(np.zeros((1, 4, 4), dtype=np.int64))
    module = Always(answers).train()
    assert evaluate_iou(module, data, limit=1) == {"mIoU": 100}
    assert module.training
    assert module.dropout.training


def test_a_network_or_labels_that_do_not_fit(write_voc: Write) -> None:
    data = opened(write_voc({"a": halves(7, 0)}))
    with pytest.raises(DataError, match="a label is 7, but the network has 3 classes"):
        evaluate_iou(Grey(3), data)
    for output in (torch.zeros(1, 3), torch.zeros(2, 3, 4, 4), [torch.zeros(1)]):
        with pytest.raises(DataError, match="not logits"):
            evaluate_iou(Always(output), data)
    blank = opened(write_voc({"a": halves(255, 255)}, folder="blank"))
    with pytest.raises(DataError, match="no pixel"):
        evaluate_iou(Grey(), blank)
