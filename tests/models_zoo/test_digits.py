import importlib.resources
import io

import numpy as np
import pytest
import torch

from fxq.errors import DataError, UnknownNameError
from fxq.models_zoo import builtin_data, digits_convnet, evaluate_top1, lookup
from fxq.models_zoo.digits import embedded_file
from fxq.models_zoo.train_digits import images_archive, train


def test_accuracy_on_held_out_images() -> None:
    accuracy = evaluate_top1(digits_convnet(), builtin_data("digits", "test"))
    assert (accuracy.correct, accuracy.total) == (448, 450)


def test_entry_fits_its_data() -> None:
    entry = lookup("digits/convnet")
    data = builtin_data(entry.data, "train")
    assert (1, *data[0][0].shape) == entry.input_shape
    assert data.normalization == entry.normalization
    assert entry.weights == "embedded"


def test_splits_share_no_image_and_all_classes() -> None:
    train_data, test_data = (builtin_data("digits", split) for split in ("train", "test"))
    assert (len(train_data), len(test_data)) == (1347, 450)
    assert test_data.labels.unique().tolist() == list(range(10))
    held_out = {image.numpy().tobytes() for image, _ in test_data}
    assert not held_out & {image.numpy().tobytes() for image, _ in train_data}


def test_training_images_are_normalised() -> None:
    images, _ = next(builtin_data("digits", "train").batches(2000))
    assert images.mean().item() == pytest.approx(0, abs=0.01)
    assert images.std().item() == pytest.approx(1, abs=0.01)


def test_training_is_deterministic() -> None:
    images, labels = next(builtin_data("digits", "train").batches(192))
    before = torch.get_rng_state()
    first, second = (train(images, labels, epochs=1).state_dict() for _ in "ab")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_script_writes_the_embedded_images(tmp_path: object) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn carries the original images")
    # Arrays, not bytes: zip headers differ between versions of Python.
    written, embedded = (
        np.load(io.BytesIO(content)) for content in (images_archive(), embedded_file("digits.npz"))
    )
    assert sorted(written.files) == sorted(embedded.files)
    for name in embedded.files:
        np.testing.assert_array_equal(written[name], embedded[name])


def test_embedded_files_are_small() -> None:
    folder = importlib.resources.files("fxq.models_zoo") / "weights"
    assert sum(len(place.read_bytes()) for place in folder.iterdir()) < 300_000


def test_unknown_sources() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        builtin_data("digit", "train")
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        builtin_data("digits", "trian")
    with pytest.raises(DataError, match="file of the package is missing"):
        embedded_file("none.npz")


def test_images_are_the_original_grey_levels() -> None:
    images, _ = next(builtin_data("digits", "test").batches(450))
    levels = (images * 0.376 + 0.305) * 16
    assert np.allclose(levels.numpy(), levels.round().numpy(), atol=0.04)
