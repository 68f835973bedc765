"""Products of convolutions against the definition, in int64: no output may differ by anything."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxq.numerics.fixed_point import largest_code, limbs, smallest_code
from fxq.products import elementwise, operators

pytestmark = pytest.mark.usefixtures("one_thread")

EXPONENT = -20


@dataclass(frozen=True)
class Case:
    """A convolution, of channels per group and per spatial axis."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    inner: int = 3
    outer: int = 4
    images: int = 2

    @property
    def output(self) -> list[int]:
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of input, weights and gradient."""
        ins, outs = self.groups * self.inner, self.groups * self.outer
        return (
            (self.images, ins, *self.size),
            (outs, self.inner, *self.kernel),
            (self.images, outs, *self.output),
        )


def image(size: int, kernel: int, stride: int, padding: int, dilation: int, **more: int) -> Case:
    return Case((size, size + 2), *((n, n) for n in (kernel, stride, padding, dilation)), **more)


# ---- the definition --------------------------------------------------------------------------


def windows(case: Case) -> Tensor:
    """``[taps, places]``: which value each tap of each window reads; one past the last: padding."""
    count = torch.Size(case.size).numel()
    around = [p for axis in reversed(case.padding) for p in (axis, axis)]
    index = F.pad(torch.arange(count).view(case.size), around, value=count)
    rows = []
    for tap in itertools.product(*map(range, case.kernel)):
        axes = zip(tap, case.dilation, case.stride, case.output, strict=True)
        rows.append(index[tuple(slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in axes)])
    return torch.stack([row.reshape(-1) for row in rows])


def by_definition(case: Case, x: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, gradient of the input and gradient of the weights, all int64."""
    index, count = windows(case), torch.Size(case.size).numel()
    images, groups = len(x), case.groups
    flat = torch.cat((x.flatten(2), x.new_zeros(*x.shape[:2], 1)), 2)
    columns = flat[:, :, index].view(images, groups, -1, index.shape[1])
    rows = weight.reshape(groups, case.outer, -1)
    flow = gradient.reshape(images, groups, case.outer, -1)
    spread = (rows.transpose(1, 2) @ flow).view(images, x.shape[1], -1)
    back = torch.zeros_like(flat).index_add_(2, index.reshape(-1), spread)
    return [
        (rows @ columns).view(gradient.shape),
        back[:, :, :count].view(x.shape),
        (flow @ columns.transpose(2, 3)).sum(0).view(weight.shape),
    ]


# ---- operands and mismatches -----------------------------------------------------------------


def codes(shape: tuple[int, ...], bits: int, kind: str = "random") -> Tensor:
    """``[...]`` int64."""
    top, low = largest_code(bits), smallest_code(bits)
    if kind == "random":
        return torch.randint(low, top + 1, shape)
    found = torch.full(shape, low if kind == "lowest" else top)
    if kind == "alternating":
        found.view(-1)[::2] = low
    return found


def operand(exact: Tensor, bits: int, *, channels_last: bool = False) -> Tensor:
    """``[limbs, ...]`` int8, each limb in the layout asked for."""
    found = torch.stack(limbs(exact.int(), bits))
    if not channels_last:
        return found
    return found.movedim(2, -1).contiguous().movedim(-1, 2)


def mismatches(
    case: Case,
    bits: tuple[int, int, int],
    kinds: tuple[str, str, str] = ("random",) * 3,
    *,
    channels_last: bool = False,
) -> dict[str, int]:
    """How many outputs of each product differ from the definition; bits of x, weight, gradient."""
    exact = [codes(*one) for one in zip(case.shapes, bits, kinds, strict=True)]
    last = (channels_last, False, channels_last)
    x, weight, gradient = (
        operand(*one, channels_last=lies) for *one, lies in zip(exact, bits, last, strict=True)
    )
    size, kernel = list(case.size), list(case.kernel)
    found = (
        operators.conv_fprop(x, weight, None, *case.arguments, EXPONENT),
        operators.conv_bprop(gradient, weight, size, *case.arguments, EXPONENT),
        operators.conv_wtgrad(x, gradient, kernel, *case.arguments, EXPONENT),
    )
    wanted = [whole.float() * 2.0**EXPONENT for whole in by_definition(case, *exact)]
    assert [one.shape for one in found] == [one.shape for one in wanted]
    assert {one.dtype for one in found} == {torch.float32}
    names = ("fprop", "bprop", "wtgrad")
    return {
        name: int((one != other).sum())
        for name, one, other in zip(names, found, wanted, strict=True)
    }


EXACT = {"fprop": 0, "bprop": 0, "wtgrad": 0}


def test_the_definition_is_that_of_torch() -> None:
    case = image(7, 3, 2, 1, 2, groups=2)
    exact = [codes(shape, 8) for shape in case.shapes]
    x, weight = (one.double().requires_grad_() for one in exact[:2])
    output = F.conv2d(x, weight, None, *case.arguments)
    output.backward(exact[2].double())
    wanted = by_definition(case, *exact)
    for one, other in zip((output, x.grad, weight.grad), wanted, strict=True):
        assert one is not None
        assert torch.equal(one.detach(), other.double())


# ---- every variant ---------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_strides_paddings_dilations_and_groups(kernel: int, stride: int) -> None:
    """Kernels larger than the stride and smaller, padding up to beyond the kernel."""
    shapes = ((1, 3, 8), (2, 4, 4), (6, 1, 1), (1, 64, 16))
    for padding, dilation, (groups, inner, outer) in itertools.product((0, 1, 2), (1, 2), shapes):
        if 9 + 2 * padding <= dilation * (kernel - 1):
            continue
        case = image(9, kernel, stride, padding, dilation, groups=groups, inner=inner, outer=outer)
        assert mismatches(case, (8, 8, 8)) == EXACT, case


axes = st.tuples(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.integers(1, 3)
)
channels = st.sampled_from([(1, 3, 5), (1, 8, 16), (2, 4, 3), (5, 1, 1), (3, 1, 2), (1, 1, 1)])
widths = st.sampled_from([2, 4, 8, 16, 24])
kinds = st.sampled_from(["random", "largest", "lowest", "alternating"])


@settings(max_examples=120)
@given(
    st.lists(axes, min_size=1, max_size=3),
    channels,
    st.tuples(widths, widths, widths),
    st.tuples(kinds, kinds, kinds),
    st.booleans(),
)
def test_any_geometry_at_any_width(
    per_axis: list[tuple[int, ...]],
    channels: tuple[int, int, int],
    bits: tuple[int, int, int],
    kinds: tuple[str, str, str],
    channels_last: bool,
) -> None:
    assume(all(n + 2 * p > d * (k - 1) for n, k, _, p, d in per_axis))
    groups, inner, outer = channels
    case = Case(*zip(*per_axis, strict=True), groups=groups, inner=inner, outer=outer)
    assert mismatches(case, bits, kinds, channels_last=channels_last) == EXACT


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("gradient_bits", [8, 16, 24])
def test_layouts_and_widths_of_a_common_layer(gradient_bits: int, last: bool) -> None:
    case = image(13, 3, 1, 1, 1, inner=32, outer=48)
    assert mismatches(case, (8, 8, gradient_bits), channels_last=last) == EXACT


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [1, 3])
def test_one_column_of_outputs(width: int, stride: int) -> None:
    """A shape that onednn's kernel gets wrong."""
    case = Case((9, width), (3, width), (stride, stride), (1, 0), (1, 1), inner=8, outer=16)
    assert case.output[1] == 1
    assert mismatches(case, (8, 8, 8)) == EXACT


@pytest.mark.parametrize("bits", [2, 8])
def test_one_output_channel(bits: int) -> None:
    """Its weight gradient is a product with one row."""
    for kernel, stride in ((1, 1), (3, 1), (3, 2), (1, 4)):
        case = image(8, kernel, stride, kernel // 2, 1, inner=5, outer=1)
        assert mismatches(case, (8, 8, bits)) == EXACT


# ---- worst operands --------------------------------------------------------------------------

ENDS = list(itertools.product(["largest", "lowest"], repeat=2))


@pytest.mark.parametrize("bits", [8, 16, 24])
@pytest.mark.parametrize(("values", "others"), [*ENDS, ("alternating", "alternating")])
def test_the_largest_codes(values: str, others: str, bits: int) -> None:
    for more in ({"inner": 64, "outer": 8}, {"inner": 1, "outer": 1, "groups": 8}):
        case = image(6, 3, 1, 1, 1, **more)
        assert mismatches(case, (8, 8, bits), (values, others, values)) == EXACT
        assert mismatches(case, (bits, bits, bits), (others, others, values)) == EXACT


@pytest.mark.parametrize("kind", ["largest", "lowest", "random"])
def test_sums_that_float32_rounds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 channels of the largest codes pass 2**24, and so does what their gradients sum to."""
    monkeypatch.setattr(elementwise, "WORTH_COMPILING", 2**40)
    case = image(2, 1, 1, 0, 1, inner=2048, outer=1100, images=1)
    assert mismatches(case, (8, 8, 8), (kind,) * 3) == EXACT


def test_weights_of_the_lowest_code() -> None:
    """Whose magnitude no int8 holds; the sums are odd and beyond 2**24."""
    case = Case((1, 2), (1, 1), (1, 1), (0, 0), (1, 1), inner=1201, outer=2, images=1)
    x, weight, gradient = (codes(shape, 8, "lowest") for shape in case.shapes)
    x[:, 0], weight[:, 0] = 127, 127
    wanted = by_definition(case, x, weight, gradient)[0]
    assert bool((wanted % 2 == 1).all())
    one, other = (operand(value, 8) for value in (x, weight))
    found = operators.conv_fprop(one, other, None, *case.arguments, 0)
    assert torch.equal(found, wanted.float())


# ---- bias, ReLU and exponents ----------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
def test_bias_and_relu(bits: int) -> None:
    case = image(6, 3, 1, 1, 1)
    exact = [codes(shape, bits) for shape in case.shapes]
    bias = torch.randn(case.shapes[1][0]) * 2.0 ** (2 * bits - 18)
    x, weight = (operand(value, bits) for value in exact[:2])
    whole = by_definition(case, *exact)[0].float() * 2.0**EXPONENT
    wanted = whole + bias.view(-1, 1, 1)
    assert 0.1 < float((wanted < 0).float().mean()) < 0.9
    for relu, what in ((False, wanted), (True, wanted.relu())):
        found = operators.conv_fprop(x, weight, bias, *case.arguments, EXPONENT, relu)
        assert torch.equal(found, what)


@pytest.mark.parametrize("exponent", [-149, -126, -101, 90, 110])
@pytest.mark.parametrize("bits", [8, 16])
def test_far_exponents_round_once(bits: int, exponent: int) -> None:
    """Down to denormal results and up to infinite ones, as float64 says."""
    case = image(5, 3, 2, 1, 1)
    exact = [codes(shape, bits) for shape in case.shapes]
    x, weight, gradient = (operand(value, bits) for value in exact)
    found = (
        operators.conv_fprop(x, weight, None, *case.arguments, exponent),
        operators.conv_bprop(gradient, weight, list(case.size), *case.arguments, exponent),
        operators.conv_wtgrad(x, gradient, list(case.kernel), *case.arguments, exponent),
    )
    for one, whole in zip(found, by_definition(case, *exact), strict=True):
        assert torch.equal(one, (whole.double() * 2.0**exponent).float())


# ---- as operators ----------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_fake_kernels_know_shape_and_dtype(axes: int) -> None:
    case = Case((5,) * axes, (3,) * axes, (2,) * axes, (1,) * axes, (1,) * axes)
    with FakeTensorMode():
        x, weight, gradient = (torch.empty(2, *s, dtype=torch.int8) for s in case.shapes)
        found = (
            operators.conv_bprop(gradient, weight, list(case.size), *case.arguments, 0),
            operators.conv_wtgrad(x, gradient, list(case.kernel), *case.arguments, 0),
            operators.conv_fprop(x, weight, None, *case.arguments, 0),
        )
    assert tuple(one.shape for one in found) == case.shapes
    assert {one.dtype for one in found} == {torch.float32}
