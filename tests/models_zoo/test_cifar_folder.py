import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fxq.errors import DataError
from fxq.models_zoo import open_images
from fxq.zoo_entry import IMAGENET, Normalization

RAW = Normalization((0.0,) * 3, (1 / 255,) * 3)


def batch(seed: int, count: int = 6) -> tuple[np.ndarray, list[int]]:
    random = np.random.Generator(np.random.PCG64(seed))
    labels = random.integers(0, 10, count).tolist()
    return random.integers(0, 256, (count, 3072), dtype=np.uint8), labels


def names() -> list[str]:
    return ["test_batch", *(f"data_batch_{index}" for index in range(1, 6))]


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for seed, name in enumerate(names()):
        images, labels = batch(seed)
        records = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], images], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name in enumerate(names()):
        images, labels = batch(seed)
        content = {b"batch_label": b"some", b"labels": labels, b"data": images}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


@pytest.mark.parametrize("layout", ["binary", "pickled"])
def test_both_layouts(layout: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(layout)
    images, labels = batch(0)
    test = open_images(folder, normalization=RAW, size=32)
    assert test.labels.tolist() == labels
    torch.testing.assert_close(test[5][0].flatten(), torch.from_numpy(images[5]).float())
    train = open_images(folder.parent, normalization=RAW, size=32, split="train")
    assert len(train) == 30
    assert train.labels[6:12].tolist() == batch(2)[1]
    torch.testing.assert_close(train[29][0].flatten(), torch.from_numpy(batch(5)[0][5]).float())


def test_single_files(binary: Path, pickled: Path) -> None:
    for path in (binary / "data_batch_3.bin", pickled / "data_batch_3"):
        assert open_images(path, normalization=RAW, size=32).labels.tolist() == batch(3)[1]


def test_missing_batch(binary: Path) -> None:
    (binary / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match="batch file is missing"):
        open_images(binary, normalization=RAW, size=32, split="train")
    assert len(open_images(binary, normalization=RAW, size=32)) == 6


def test_cut_binary(binary: Path) -> None:
    path = binary / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="no multiple of 3073"):
        open_images(binary, normalization=RAW, size=32)


def test_label_beyond_nine(binary: Path) -> None:
    path = binary / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(DataError, match="label 10"):
        open_images(binary, normalization=RAW, size=32)


def test_other_input_size(binary: Path) -> None:
    with pytest.raises(DataError, match="are 3x32x32, the network takes 3x224x224"):
        open_images(binary, normalization=IMAGENET, size=224)


class Attack:
    """Would run a command when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.target}",)


def test_pickle_runs_no_code(pickled: Path, tmp_path: Path) -> None:
    target = tmp_path / "attacked"
    (pickled / "test_batch").write_bytes(pickle.dumps({b"data": Attack(target)}))
    with pytest.raises(DataError, match=r"asks for \w+\.system") as caught:
        open_images(pickled, normalization=RAW, size=32)
    assert "test_batch" in str(caught.value.where)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02garbage", "damaged"),
        (b"", "damaged"),
        (pickle.dumps([1, 2]), "no data array"),
        (pickle.dumps({b"data": batch(0)[0]}), "no label list"),
        (pickle.dumps({b"data": batch(0)[0][:, :5], b"labels": [1] * 6}), "must be uint8"),
        (pickle.dumps({b"data": batch(0)[0], b"labels": [1] * 5}), "6 images but 5 labels"),
        (pickle.dumps({b"data": batch(0)[0], b"labels": ["a"] * 6}), "list of integers"),
    ],
)
def test_wrong_pickles(pickled: Path, content: bytes, message: str) -> None:
    (pickled / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_images(pickled, normalization=RAW, size=32)
