import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from fxq.errors import DataError
from fxq.models_zoo import Accuracy, ImageData, evaluate_top1, open_images
from fxq.zoo_entry import Normalization

RGB = Normalization((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
GREY = Normalization((0.5,), (0.5,))


def pixels(count: int = 10, channels: int = 3, size: int = 4) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(0))
    return random.integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def archive(path: Path, **arrays: object) -> Path:
    np.savez_compressed(path, **arrays)
    return path


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    path = archive(tmp_path / "a.npz", x=pixels(), y=np.arange(10) % 3)
    return open_images(path, normalization=RGB, size=4)


def jpeg(size: tuple[int, int], colour: tuple[int, int, int] = (200, 100, 50)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def jpeg_archive(path: Path, files: list[bytes]) -> Path:
    offsets = np.cumsum([0, *(len(file) for file in files)])
    joined = np.frombuffer(b"".join(files), dtype=np.uint8)
    return archive(path, jpeg=joined, offsets=offsets, y=np.arange(len(files)))


def test_items_are_normalised(data: ImageData) -> None:
    image, label = data[4]
    mean, std = torch.tensor(RGB.mean).view(3, 1, 1), torch.tensor(RGB.std).view(3, 1, 1)
    torch.testing.assert_close(image, (torch.from_numpy(pixels()[4]) / 255 - mean) / std)
    assert image.dtype == torch.float32
    assert (label, type(label)) == (1, int)
    assert torch.equal(data[-1][0], data[9][0])
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert data.describe() == "a.npz: 10 images 3x4x4, 3 classes"


def test_index_beyond_the_end(data: ImageData) -> None:
    with pytest.raises(IndexError):
        data[10]
    with pytest.raises(IndexError):
        data[-11]
    assert len(list(data)) == 10


def test_batches_cover_everything_once(data: ImageData) -> None:
    batches = list(data.batches(4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([images for images, _ in batches])[7], data[7][0])
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)


def test_start_and_limit(data: ImageData) -> None:
    (images, labels), *rest = data.batches(8, limit=3, start=5)
    assert not rest
    assert torch.equal(images[0], data[5][0])
    assert labels.tolist() == data.labels[5:8].tolist()


def test_seeded_draw_is_fixed(data: ImageData) -> None:
    first, second = (torch.cat([x for x, _ in data.batches(2, limit=6, seed=3)]) for _ in "ab")
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) == 6
    other = torch.cat([x for x, _ in data.batches(2, limit=6, seed=4)])
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"limit": 0}, {"start": 10}])
def test_impossible_batches(data: ImageData, options: dict[str, int]) -> None:
    with pytest.raises(DataError):
        next(data.batches(**{"batch_size": 2, **options}))


def test_works_in_a_data_loader(data: ImageData) -> None:
    images, labels = next(iter(DataLoader(data, batch_size=5)))
    assert images.shape == (5, 3, 4, 4)
    assert labels.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": pixels(), "y": np.arange(9)}, "10 images but 9 labels"),
        ({"x": pixels(), "y": np.arange(10.0)}, "list of integers"),
        ({"x": pixels(), "y": np.arange(10) - 1}, "label -1 of image 0 is negative"),
        ({"x": pixels() / 255, "y": np.arange(10)}, "must be uint8"),
        ({"x": pixels()[:, 0], "y": np.arange(10)}, "must be uint8"),
        ({"x": pixels(size=5), "y": np.arange(10)}, "are 3x5x5, the network takes 3x4x4"),
        ({"x": pixels(channels=1), "y": np.arange(10)}, "are 1x4x4, the network takes 3x4x4"),
        ({"x": pixels(0), "y": np.arange(0)}, "no images"),
        ({"images": pixels()}, "has the arrays images"),
        ({"x": pixels(), "y": np.array([object()] * 10)}, "damaged"),
    ],
)
def test_wrong_archives(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    path = archive(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        open_images(path, normalization=RGB, size=4)
    assert str(path) in str(caught.value)


def test_truncated_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "cut.npz", x=pixels(100), y=np.arange(100))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="damaged"):
        open_images(path, normalization=RGB, size=4)


def test_damaged_pixels(tmp_path: Path) -> None:
    path = archive(tmp_path / "flipped.npz", x=pixels(100), y=np.arange(100))
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged"):
        open_images(path, normalization=RGB, size=4)[0]


def test_opening_reads_no_pixels(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", x=pixels(), y=np.arange(10))
    with zipfile.ZipFile(path) as whole:
        labels, header = whole.read("y.npy"), whole.read("x.npy")[:128]
    with zipfile.ZipFile(tmp_path / "headers.npz", "w") as only:
        only.writestr("y.npy", labels)
        only.writestr("x.npy", header)
    data = open_images(tmp_path / "headers.npz", normalization=RGB, size=4)
    assert len(data) == 10
    with pytest.raises(DataError, match="damaged"):
        data[0]


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (90, 30), (7, 300)])
def test_jpeg_archive(tmp_path: Path, size: tuple[int, int]) -> None:
    path = jpeg_archive(tmp_path / "j.npz", [jpeg(size), jpeg(size)])
    data = open_images(path, normalization=Normalization((0, 0, 0), (1, 1, 1)), size=16)
    image, label = data[1]
    assert image.shape == (3, 16, 16)
    assert label == 1
    colour = torch.tensor([200, 100, 50]).view(3, 1, 1) / 255
    torch.testing.assert_close(image, colour.expand(3, 16, 16), atol=0.02, rtol=0)


def test_damaged_jpeg_is_named(tmp_path: Path) -> None:
    good = jpeg((16, 16))
    path = jpeg_archive(tmp_path / "j.npz", [good, good[: len(good) // 3], b"no image"])
    data = open_images(path, normalization=RGB, size=16)
    for index in (1, 2):
        with pytest.raises(DataError, match=f"j.npz, image {index}"):
            data[index]


@pytest.mark.parametrize("offsets", [[0, 5], [1, 20], [0, 12, 9, 20], [0.0, 20.0], [20]])
def test_wrong_offsets(tmp_path: Path, offsets: list[float]) -> None:
    path = archive(
        tmp_path / "j.npz",
        jpeg=np.zeros(20, dtype=np.uint8),
        offsets=np.array(offsets),
        y=np.arange(len(offsets) - 1),
    )
    with pytest.raises(DataError, match="offsets"):
        open_images(path, normalization=RGB, size=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(["ant", "bee", "cat"]):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(2):
            image = Image.new("RGB", (20 + 10 * number, 24), (60 * index, 0, 0))
            image.save(tmp_path / "val" / name / f"{number}.png")
    return tmp_path


def test_class_folder(folder: Path) -> None:
    plain = Normalization((0, 0, 0), (1, 1, 1))
    data = open_images(folder / "val", normalization=plain, size=8)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data[5][0].shape == (3, 8, 8)
    assert [round(float(data[i][0][0].mean()) * 255) for i in (0, 2, 5)] == [0, 60, 120]
    assert open_images(folder / "val", normalization=GREY, size=8)[0][0].shape == (1, 8, 8)


def test_folder_with_both_splits(folder: Path) -> None:
    (folder / "train" / "ant").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "train" / "ant" / "0.png")
    assert len(open_images(folder, normalization=RGB, size=8)) == 6
    assert len(open_images(folder, normalization=RGB, size=8, split="train")) == 1


def test_resize_and_crop_are_those_of_imagenet(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    source = Image.fromarray(pixels(1, size=300)[0].transpose(1, 2, 0)).resize((400, 300))
    source.save(tmp_path / "class" / "0.png")
    data = open_images(tmp_path, normalization=Normalization((0, 0, 0), (1, 1, 1)), size=224)
    scaled = source.resize((341, 256), Image.Resampling.BILINEAR)
    expected = np.asarray(scaled.crop((58, 16, 282, 240))).transpose(2, 0, 1)
    assert np.array_equal((data[0][0] * 255).round().to(torch.uint8).numpy(), expected)


def test_folder_with_an_empty_class(folder: Path) -> None:
    (folder / "val" / "dog").mkdir()
    with pytest.raises(DataError, match="class folder has no images"):
        open_images(folder / "val", normalization=RGB, size=8)


def test_damaged_image_in_a_folder(folder: Path) -> None:
    (folder / "val" / "bee" / "0.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        open_images(folder / "val", normalization=RGB, size=8)[2]
    assert "bee" in str(caught.value.where)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_images(tmp_path / "none", normalization=RGB, size=8)
    with pytest.raises(DataError, match="no class folders"):
        open_images(tmp_path, normalization=RGB, size=8)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="none of the image layouts"):
        open_images(tmp_path / "notes.txt", normalization=RGB, size=8)


def test_impossible_requests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 or 3 channels"):
        open_images(tmp_path, normalization=Normalization((0, 0), (1, 1)), size=8)
    with pytest.raises(DataError, match="split must be"):
        open_images(tmp_path, normalization=RGB, size=8, split="validation")


class Answer(nn.Module):
    """Says class 1 to everything."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.classes = classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(torch.ones(len(x), dtype=torch.int64), self.classes).float()


def test_accuracy_counts_and_restores_training(data: ImageData) -> None:
    module, seen = Answer().train(), []
    accuracy = evaluate_top1(module, data, 4, lambda done, total: seen.append((done, total)))
    assert accuracy == Accuracy(3, 10)
    assert accuracy.top1 == pytest.approx(0.3)
    assert str(accuracy) == "30.00 % (3 of 10)"
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert module.training
    assert module.dropout.training
    assert evaluate_top1(module, data, limit=2) == Accuracy(1, 2)


def test_accuracy_of_the_wrong_network(data: ImageData) -> None:
    with pytest.raises(DataError, match="a label is 2, but the network has 2 classes"):
        evaluate_top1(Answer(2), data)
    with pytest.raises(DataError, match="one row of logits per image"):
        evaluate_top1(nn.Identity(), data)
