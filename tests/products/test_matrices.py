"""Products of matrices of codes, and sums longer than an int32 holds, against exact arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from fxq.numerics.fixed_point import largest_code, limbs, smallest_code
from fxq.products import operators
from fxq.products.geometry import Geometry
from fxq.products.gradients import weight_gradient
from fxq.products.kernels import LONGEST_SUM, convolution, largest_sum, product

pytestmark = pytest.mark.usefixtures("one_thread")


def codes(shape: tuple[int, ...], bits: int, kind: str = "random") -> Tensor:
    """``[...]`` int64."""
    top, low = largest_code(bits), smallest_code(bits)
    if kind == "random":
        return torch.randint(low, top + 1, shape)
    return torch.full(shape, {"largest": top, "lowest": low}[kind])


def operand(exact: Tensor, bits: int) -> Tensor:
    """``[limbs, ...]`` int8."""
    return torch.stack(limbs(exact.int(), bits))


def full(*shape: int, value: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.int8)


# ---- the operator ----------------------------------------------------------------------------

kinds = st.sampled_from(["random", "largest", "lowest"])
widths = st.sampled_from([2, 4, 8, 16, 24])


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9)),
    st.tuples(widths, widths),
    st.tuples(kinds, kinds),
    st.integers(-60, 10),
)
def test_stacks_of_matrices(
    stack: list[int],
    sizes: tuple[int, int, int],
    bits: tuple[int, int],
    kinds: tuple[str, str],
    exponent: int,
) -> None:
    m, k, n = sizes
    left = codes((*stack, m, k), bits[0], kinds[0])
    right = codes((*stack, k, n), bits[1], kinds[1])
    found = operators.matmul(operand(left, bits[0]), operand(right, bits[1]), None, exponent)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), (left @ right).float().double() * 2.0**exponent)


@pytest.mark.parametrize("order", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("sizes", [(17, 33, 5), (1, 33, 5), (17, 1, 5), (17, 33, 1), (1, 9, 1)])
def test_transposed_operands(sizes: tuple[int, int, int], order: tuple[bool, bool]) -> None:
    """As gradients read what the forward read; a single row or column, too."""
    m, k, n = sizes
    left, right = codes((m, k), 16), codes((k, n), 8)
    one, other = operand(left, 16), operand(right, 8)
    if order[0]:
        one = operand(left.t().contiguous(), 16).transpose(1, 2)
    if order[1]:
        other = operand(right.t().contiguous(), 8).transpose(1, 2)
    assert torch.equal(operators.matmul(one, other, None, 0), (left @ right).float())


@pytest.mark.parametrize("dims", [2, 3])
def test_bias_and_relu(dims: int) -> None:
    left, right = codes((3,) * (dims - 1) + (12,), 8), codes((3,) * (dims - 2) + (12, 6), 8)
    bias = torch.randn(6) * 2000
    one, other = operand(left, 8), operand(right, 8)
    wanted = (left @ right).float() * 2.0**-3 + bias
    assert torch.equal(operators.matmul(one, other, bias, -3), wanted)
    assert torch.equal(operators.matmul(one, other, bias, -3, True), wanted.relu())


def test_the_fake_kernel_agrees() -> None:
    left, right = operand(codes((2, 3, 12), 24), 24), operand(codes((2, 12, 6), 8), 8)
    checks = ("test_schema", "test_faketensor")
    opcheck(operators.matmul, (left, right, None, -4), test_utils=checks)
    opcheck(operators.quantize, (torch.randn(4, 5), 16, -9), test_utils=checks)


# ---- one kernel, any strides -----------------------------------------------------------------


def laid_out(exact: Tensor, strides: tuple[int, int]) -> Tensor:
    rows, columns = exact.shape
    memory = torch.zeros((rows - 1) * strides[0] + (columns - 1) * strides[1] + 1).to(torch.int8)
    return memory.as_strided(exact.shape, strides).copy_(exact)


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 17), (1, 2, 33), (1, 2, 8))))
def test_every_layout(sizes: tuple[int, int, int]) -> None:
    """Rows with gaps between them, columns, and strides of 1 both ways, as views leave them."""
    m, k, n = sizes
    left, right = codes((m, k), 8), codes((k, n), 8)
    lefts = [(k, 1), (k + 3, 1), (1, m), (1, m + 4), *([(1, 1)] if 1 in (m, k) else [])]
    rights = [(n, 1), (n + 3, 1), (1, k), (1, k + 4), *([(1, 1)] if 1 in (k, n) else [])]
    for one, other in itertools.product(lefts, rights):
        found = product(laid_out(left, one), laid_out(right, other))
        assert torch.equal(found.long(), left @ right), (one, other)


# ---- long sums -------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(127, 127), (-128, -128), (-128, 127)])
@pytest.mark.parametrize("length", [LONGEST_SUM, LONGEST_SUM + 1, 2 * LONGEST_SUM + 5])
def test_products_longer_than_an_int32_holds(length: int, a: int, b: int) -> None:
    left, right = full(3, length, value=a), full(length, 2, value=b)
    assert product(left, right).double().unique().tolist() == [a * b * length]


def test_the_longest_sum_is_the_longest() -> None:
    assert LONGEST_SUM * 128 * 128 < 2**31 <= (LONGEST_SUM + 1) * 128 * 128


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_weight_gradients_of_many_places(images: int, groups: int) -> None:
    """A single large image has more places than one sum may; depthwise layers add them up, too."""
    side = 370 if images == 1 else 220
    assert images * side * side > LONGEST_SUM
    x = full(images, 2, side, side, value=-128)
    gradient = full(1, images, 2, side, side, value=-128)
    (found,) = weight_gradient(x, gradient, (1, 1), Geometry(groups=groups))
    assert found.double().unique().tolist() == [128 * 128 * images * side * side]


@pytest.mark.parametrize(("channels", "a", "b"), [(1032, 127, -128), (1024, -128, -128)])
def test_convolutions_longer_than_an_int32_holds(channels: int, a: int, b: int) -> None:
    """Sums that wrap around to small numbers."""
    x, weight = full(1, channels, 16, 17, value=a), full(1, channels, 16, 16, value=b)
    assert abs((a * b * channels * 256) % 2**32) < 2**24
    found = convolution(x, weight, Geometry())
    assert found.double().unique().tolist() == [a * b * channels * 256]


@pytest.mark.parametrize("value", [-128, -127, -1, 0, 127])
def test_the_largest_sum_is_reached_and_not_passed(value: int) -> None:
    weight = full(2, 3, 2, 2, value=value)
    weight[1] = 0
    assert largest_sum(weight) == 128 * 12 * abs(value)
