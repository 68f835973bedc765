"""Calibration data that several passes read, though some sources can be read only once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fxq.calibration import CalibrationData, batch_size, pieces
from fxq.errors import CalibrationError


def batches(count: int = 4) -> list[Tensor]:
    return [torch.full((2, 3), float(i)) for i in range(count)]


def generator() -> Iterator[Tensor]:
    yield from batches()


def test_a_list_is_read_anew_each_time() -> None:
    data = CalibrationData(batches())
    assert data.length() == 4
    for _ in range(3):
        assert [float(batch[0, 0]) for batch in data] == [0, 1, 2, 3]
    assert not data.is_exhausted


def test_a_generator_is_read_once_and_its_first_images_are_kept() -> None:
    data = CalibrationData(generator(), keep=3)
    assert data.length() is None
    assert [float(batch[0, 0]) for batch in data] == [0, 1, 2, 3]
    assert data.is_exhausted
    assert [float(batch[0, 0]) for batch in data] == [0, 1]
    assert data.length() == 2


def test_a_generator_of_which_nothing_is_kept_is_empty_the_second_time() -> None:
    data = CalibrationData(generator())
    assert len(list(data)) == 4
    assert list(data) == []


def test_the_first_batch_can_be_looked_at_before() -> None:
    data = CalibrationData(generator(), keep=2)
    assert float(data.first[0, 0]) == 0
    assert [float(batch[0, 0]) for batch in data] == [0, 1, 2, 3]


@pytest.mark.parametrize("source", [torch.zeros(2, 3), 5, []])
def test_what_is_no_source_of_batches_is_refused(source: object) -> None:
    with pytest.raises(CalibrationError):
        CalibrationData(source)  # type: ignore[arg-type]


def test_the_size_of_a_batch_is_that_of_its_first_tensor() -> None:
    assert batch_size((torch.zeros(5, 2), torch.zeros(5))) == 5
    assert batch_size(torch.zeros(())) == 1


def test_pieces_are_the_batch_in_order_and_a_mask_goes_with_each() -> None:
    images, mask = torch.arange(14.0).reshape(7, 2), torch.ones(1, 2)
    cut = list(pieces((images, mask, "a flag"), 6))
    assert [len(part) for part, _, _ in cut] == [3, 3, 1]
    assert torch.equal(torch.cat([part for part, _, _ in cut]), images)
    assert all(own is mask and flag == "a flag" for _, own, flag in cut)


def test_large_images_come_one_by_one_and_an_empty_batch_as_it_is() -> None:
    assert [len(part) for (part,) in pieces((torch.zeros(3, 100),), 10)] == [1, 1, 1]
    assert [len(part) for (part,) in pieces((torch.zeros(0, 100),), 10)] == [0]
