import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxq.errors import DataError
from fxq.models_zoo import open_coco, task_of

Write = Callable[..., Path]


def change(root: Path, **lists: Any) -> None:
    """The annotations say something else from now on."""
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **lists}))


def test_images_with_their_objects(write_coco: Write) -> None:
    root = write_coco(
        [[(8, 4, 20, 10, 90)], [], [(0, 0, 5, 5, 1), (10, 10, 6, 7, 3, 1)]],
        sizes=[(64, 48), (30, 40), (20, 20)],
    )
    data = open_coco(root)
    assert (data.name, len(data), data.unit) == ("val2017", 3, "images")
    (images, objects), (last, others) = data.batches(2)
    assert [image.shape for image in (*images, *last)] == [(3, 48, 64), (3, 40, 30), (3, 20, 20)]
    assert images[0].dtype == torch.float32
    assert float(images[0].max()) == pytest.approx(250 / 255)
    assert float(images[0][0, 4:14, 8:28].min()) == pytest.approx(250 / 255)  # what the box holds
    assert objects[0]["boxes"].tolist() == [[8, 4, 28, 14]]
    assert objects[0]["labels"].tolist() == [90]  # ids as in the file
    assert (objects[1]["boxes"].shape, len(objects[1]["labels"])) == ((0, 4), 0)
    assert others[0]["labels"].tolist() == [3, 1]  # as they stand in the file
    assert others[0]["iscrowd"].tolist() == [1, 0]


def test_a_draw_is_the_same_each_time(write_coco: Write) -> None:
    data = open_coco(write_coco([[(1, 1, 4, 4, i)] for i in range(1, 8)]))
    first, second = (
        [one["labels"].item() for _, found in data.batches(2, limit=5, seed=2) for one in found]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 5


def test_splits_and_years(write_coco: Write) -> None:
    root = write_coco([[(1, 1, 4, 4, 1)]], "train2014")
    assert task_of(root) == "detection"
    assert open_coco(root).name == "train2014"  # there is no other
    write_coco([[], []], "val2014")
    assert open_coco(root).name == "val2014"
    assert open_coco(root, split="train").name == "train2014"
    write_coco([[]], "val2017")
    with pytest.raises(DataError, match=r"instances_val2014\.json, instances_val2017\.json"):
        open_coco(root)
    file = root / "annotations" / "instances_val2014.json"
    assert (task_of(file), len(open_coco(file))) == ("detection", 2)


def test_images_are_read_when_they_are_asked_for(write_coco: Write) -> None:
    root = write_coco([[(1, 1, 4, 4, 1)], []])
    (root / "val2017" / "1.png").unlink()
    (root / "val2017" / "0.png").write_bytes(b"nothing")
    data = open_coco(root)
    with pytest.raises(DataError, match="cannot be decoded"):
        next(data.batches(1))
    with pytest.raises(DataError, match="no such image") as caught:
        next(data.batches(1, start=1))
    assert str(caught.value.where).endswith("1.png")


OBJECT = {"image_id": 1000, "category_id": 1, "bbox": [0, 0, 4, 4]}


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ({"images": None}, "no list of images"),
        ({"annotations": {}}, "no list of annotations"),
        ({"images": []}, "lists no images"),
        ({"images": [{"id": 1}]}, "image 0 is not whole"),
        ({"images": ["a"]}, "image 0 is not whole"),
        ({"images": [{"id": 1, "file_name": "../../secret.png"}]}, "outside of its folder"),
        ({"images": [{"id": 1, "file_name": "/secret.png"}]}, "outside of its folder"),
        ({"images": [{"id": 1, "file_name": name} for name in "ab"]}, "the same id"),
        ({"annotations": [7]}, "annotation 0 is not whole"),
        ({"annotations": [{**OBJECT, "image_id": 3}]}, "annotation 0 is not whole"),
        ({"annotations": [OBJECT, {"image_id": 1000}]}, "annotation 1 is not whole"),
        ({"annotations": [{**OBJECT, "bbox": [0, 0, 4]}]}, "annotation 0 is not whole"),
        ({"annotations": [{**OBJECT, "iscrowd": float("inf")}]}, "annotation 0 is not whole"),
        ({"annotations": [{**OBJECT, "bbox": [0, 0, 4, float("nan")]}]}, "annotation 0 has"),
        ({"annotations": [{**OBJECT, "bbox": [0, 0, 1e30, 4]}]}, "annotation 0 has"),
        ({"annotations": [{**OBJECT, "bbox": [0, 0, -4, 4]}]}, "annotation 0 has"),
        ({"annotations": [{**OBJECT, "category_id": 10**30}]}, "annotation 0 has"),
    ],
)
def test_annotations_that_are_wrong(write_coco: Write, lists: dict[str, Any], words: str) -> None:
    root = write_coco([[(1, 1, 4, 4, 1)]])
    change(root, **lists)
    with pytest.raises(DataError, match=words) as caught:
        open_coco(root)
    assert "instances_val2017.json" in str(caught.value.where)


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "[]", "3", "[" * 100_000, "\xff"])
def test_a_file_that_is_broken(write_coco: Write, text: str) -> None:
    root = write_coco([[]])
    (root / "annotations" / "instances_val2017.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError):
        open_coco(root)


def test_what_is_missing(write_coco: Write, tmp_path: Path) -> None:
    root = write_coco([[]])
    (root / "val2017").rename(root / "elsewhere")
    with pytest.raises(DataError, match="folder of the images is missing"):
        open_coco(root)
    file = root / "annotations" / "instances_val2017.json"
    file.rename(file.with_name("captions_val2017.json"))
    assert task_of(root) == "detection"
    with pytest.raises(DataError, match=r"no instances_train\*\.json"):
        open_coco(root)
    with pytest.raises(DataError, match="no such file"):
        open_coco(tmp_path / "instances_val.json")
    assert task_of(tmp_path / "elsewhere") == "classification"
