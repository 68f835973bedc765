"""Random variants of images: each is its own image, mirrored or shifted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.quant.augment import Augmentation, augmented

FLIPS = (Augmentation.FLIP, Augmentation.FLIP_SHIFT)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int) -> Tensor:
    """No value is zero, so that zeros are what a shift uncovered."""
    return torch.rand(shape, generator=generator(9)) + 1


def variants(image: Tensor, most: tuple[int, int]) -> list[Tensor]:
    """All that an image may become: it and its mirror image, moved down and right by so much."""
    height, width = image.shape[1:]
    found = []
    for start in (image, image.flip(-1)):
        wide = F.pad(start, (width, width, height, height))
        for down in range(-most[0], most[0] + 1):
            for right in range(-most[1], most[1] + 1):
                top, left = height - down, width - right
                found.append(wide[:, top : top + height, left : left + width])
    return found


@pytest.mark.parametrize(
    ("size", "most"), [((8, 8), (1, 1)), ((16, 24), (2, 3)), ((7, 16), (0, 2)), ((5, 5), (0, 0))]
)
def test_every_variant_and_no_other(size: tuple[int, int], most: tuple[int, int]) -> None:
    """By up to an eighth of the image; all of that range, on many copies of an image."""
    image = images(1, 3, *size)
    expected = variants(image[0], most)
    seen = set()
    for one in augmented(image.expand(1000, -1, -1, -1), Augmentation.FLIP_SHIFT, generator()):
        (which,) = [n for n, variant in enumerate(expected) if torch.equal(one, variant)]
        seen.add(which)
    assert seen == set(range(len(expected)))


def test_about_half_of_the_images_are_mirrored_and_none_is_mixed_with_another() -> None:
    batch = images(400, 2, 4, 5)
    found = augmented(batch, Augmentation.FLIP, generator())
    mirrored = (found == batch.flip(-1)).flatten(1).all(1)
    kept = (found == batch).flatten(1).all(1)
    assert bool((mirrored ^ kept).all())
    assert 160 < int(mirrored.sum()) < 240


@pytest.mark.parametrize("how", FLIPS)
def test_the_seed_decides(how: Augmentation) -> None:
    batch = images(16, 3, 8, 8)
    before = batch.clone()
    first = augmented(batch, how, generator(1))
    assert torch.equal(first, augmented(batch, how, generator(1)))
    assert not torch.equal(first, augmented(batch, how, generator(2)))
    assert torch.equal(batch, before)


def test_a_generator_goes_on() -> None:
    one, batch = generator(), images(16, 3, 8, 8)
    drawn = [augmented(batch, Augmentation.FLIP_SHIFT, one) for _ in range(2)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("how", list(Augmentation))
@pytest.mark.parametrize("shape", [(), (4,), (4, 8), (4, 8, 8), (4, 3, 2, 8, 8)], ids=len)
def test_what_is_no_batch_of_images_stays(shape: tuple[int, ...], how: Augmentation) -> None:
    value = images(*shape)
    assert augmented(value, how, generator()) is value


def test_nothing_is_done_where_nothing_is_asked_for() -> None:
    batch, one = images(4, 3, 8, 8), generator(3)
    assert augmented(batch, Augmentation.NONE, one) is batch
    assert torch.equal(one.get_state(), generator(3).get_state())


@pytest.mark.parametrize("how", FLIPS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_stays(layout: torch.memory_format, how: Augmentation) -> None:
    batch = images(4, 3, 16, 8).contiguous(memory_format=layout)
    found = augmented(batch, how, generator())
    assert found.stride() == batch.stride()
    assert torch.equal(found, augmented(images(4, 3, 16, 8), how, generator()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_the_type_stays(dtype: torch.dtype) -> None:
    batch = (images(4, 3, 8, 8) * 100).to(dtype)
    found = augmented(batch, Augmentation.FLIP_SHIFT, generator())
    assert (found.dtype, found.shape) == (dtype, batch.shape)


def test_an_empty_batch() -> None:
    assert augmented(images(0, 3, 8, 8), Augmentation.FLIP_SHIFT, generator()).shape[0] == 0


def test_shifts_are_those_that_are_drawn_one_by_one() -> None:
    """Earlier versions drew top and left image by image; the same seed gives the same images."""
    batch, drawn = images(9, 2, 16, 40), generator(5)
    found = augmented(batch, Augmentation.FLIP_SHIFT, generator(5))
    mirrored = torch.rand(9, generator=drawn) < 0.5
    for image, flip, result in zip(batch, mirrored, found, strict=True):
        top, left = (int(torch.randint(span, (), generator=drawn)) for span in (5, 11))
        padded = F.pad(image.flip(-1) if flip else image, (5, 5, 2, 2))
        assert torch.equal(result, padded[:, top : top + 16, left : left + 40])
