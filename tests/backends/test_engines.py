"""Engines x86 and onednn, and the module itself: fused adds, threads, copies, sizes and errors."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxq.backends import _kernels as kernels
from fxq.backends._builder import Builder
from fxq.backends._fusion import may_overwrite
from fxq.backends.eager import EagerModule
from fxq.contracts import output_sqnr
from fxq.errors import FxqError, UnknownNameError
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual

ENGINES = ("x86", "fbgemm", "onednn")
needs_exact_onednn = pytest.mark.skipif(
    not kernels.is_exact("onednn"), reason="this CPU's onednn saturates in 16 bits"
)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Two convolutions and a residual sum that a given function reads."""

    def __init__(self, after: Callable[..., object], stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.conv = nn.Conv2d(8, 8, 3, stride, padding=1, groups=groups)
            self.skip = nn.Conv2d(8, 8, 1, stride)
            self.head = nn.Conv2d(8, 4, 1)
        self.after = after

    def forward(self, x: Tensor) -> object:
        return self.after(self, torch.relu(self.stem(x)))


RESIDUALS: dict[str, Callable[..., object]] = {
    "plain": lambda m, x: m.head(torch.relu(m.conv(x) + x)),
    "without relu": lambda m, x: m.head(m.conv(x) + x),
    "addend first": lambda m, x: m.head(torch.relu(x + m.conv(x))),
    "skip read again": lambda m, x: (m.head(torch.relu(m.conv(x) + x)), m.head(x)),
    "skip is an output": lambda m, x: (m.head(torch.relu(m.conv(x) + x)), x),
    "skip is reshaped": lambda m, x: m.head(m.conv(x) + x.reshape(x.shape)),
    "alias of the skip read later": lambda m, x: _alias(m, x),
    "twice": lambda m, x: m.head(torch.relu(m.conv(y := torch.relu(m.conv(x) + x)) + y)),
    "same skip twice": lambda m, x: m.head((m.conv(x) + x) + (m.skip(x) + x)),
    "both are convolutions": lambda m, x: m.head(torch.relu(m.conv(x) + m.skip(x))),
    "pooled skip": lambda m, x: m.head(m.conv(x) + torch.max_pool2d(x, 3, 1, 1)),
    "sum is an output": lambda m, x: (y := torch.relu(m.conv(x) + x), m.head(y)),
    "addend is the input of the convolution": lambda m, x: m.head(m.skip(x) + x),
}


def _alias(m: nn.Module, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    total = m.head(torch.relu(m.conv(x) + x))
    return total.flatten(2) + m.head(flat.unflatten(2, x.shape[2:])).flatten(2)


@needs_exact_onednn
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", RESIDUALS)
def test_fused_adds_keep_what_is_read_later(name: str, bits: int, integers) -> None:
    x = images(3, 3, 8, 8)
    settings = (f"quantize-minmax.addend_bits={bits}", f"quantize-minmax.activation_bits={bits}")
    program = integers(Block(RESIDUALS[name]), x, "minmax-int8", settings).artifact.integers
    module = EagerModule(program, "x86")
    first = module(x)
    assert output_sqnr(Reference(program)(x), first) > (33 if bits == 8 else 10)
    again = module(x)
    for one, other in zip(_tensors(first), _tensors(again), strict=True):
        assert torch.equal(one, other)


def _tensors(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)  # type: ignore[call-overload]


@needs_exact_onednn
def test_adds_are_fused(integers) -> None:
    program = integers(Block(RESIDUALS["twice"]), images(2, 3, 8, 8)).artifact.integers
    for engine, expected in (("x86", 2), ("onednn", 2), ("fbgemm", 0)):
        fused = [step for step in Builder(program, engine).program if step.op == "conv_add"]
        assert len(fused) == expected


@needs_exact_onednn
def test_only_memory_nobody_needs_is_overwritten(integers) -> None:
    """Not what the convolution itself reads, an output, or an alias of something read later."""
    expected = {"plain": [False], "skip read again": [False], "skip is an output": [False]}
    expected |= {"same skip twice": [False, False], "alias of the skip read later": [False]}
    expected |= {"pooled skip": [True], "both are convolutions": [True]}
    for name, answers in expected.items():
        program = integers(Block(RESIDUALS[name]), images(2, 3, 8, 8)).artifact.integers
        fused = Builder(program, "x86").program
        found = [may_overwrite(fused, step) for step in fused if step.op == "conv_add"]
        assert found == answers, name


@needs_exact_onednn
@pytest.mark.parametrize("engine", ["x86", "onednn"])
@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-8bit"])
@pytest.mark.parametrize("build", [tiny_conv, tiny_residual, tiny_depthwise, tiny_concat, tiny_mlp])
def test_engines_are_close_to_the_reference(
    build: Callable[[], nn.Module], recipe: str, engine: str, integers
) -> None:
    x = images(4, 16) if build is tiny_mlp else images(4, 3, 8, 8)
    program = integers(build(), x, recipe).artifact.integers
    assert output_sqnr(Reference(program)(x), EagerModule(program, engine)(x)) > 25


@needs_exact_onednn
@pytest.mark.parametrize("engine", ["x86", "onednn"])
@pytest.mark.parametrize("build", [tiny_conv, tiny_depthwise, tiny_concat])
def test_each_instruction_is_within_one_code(
    build: Callable[[], nn.Module], engine: str, integers
) -> None:
    """Every instruction gets the reference's registers, so that errors do not add up."""
    x = images(4, 3, 8, 8)
    program = integers(build(), x, "aciq-4bit").artifact.integers
    grids = program.grids()
    _, expected = Reference(program).run(x)
    builder = Builder(program, engine)
    for name, run, _ in builder.steps():
        values = {"x": x, **_labelled(builder, expected)}
        if grids[name] is not None:
            codes = kernels.unwrap(run(values)).int() - builder.offsets[name]
            assert int((codes - expected[name]).abs().max()) <= 1


def _labelled(builder: Builder, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: kernels.wrap(
            (expected[name] + builder.offsets[name]).to(torch.uint8), *builder.label(name)
        )
        for name, grid in builder.grids.items()
        if grid is not None
    }


@needs_exact_onednn
def test_a_fused_add_of_one_column(integers) -> None:
    """The residual sum of a tall image one pixel wide."""
    x = images(2, 3, 9, 1)
    program = integers(Block(RESIDUALS["plain"]), x).artifact.integers
    assert any(step.op == "conv_add" for step in Builder(program, "x86").program)
    assert output_sqnr(Reference(program)(x), EagerModule(program, "x86")(x)) > 33


# ---- the module --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_are_not_modified(engine: str, integers) -> None:
    x = images(2, 3, 8, 8)
    module = integers(tiny_residual(), x, engine=engine).module
    before = x.clone()
    module(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_layout_makes_no_difference(engine: str, integers) -> None:
    x = images(2, 3, 8, 8)
    module = integers(tiny_residual(), x, engine=engine).module
    expected = module(x)
    wide = torch.stack([x, x], -1)
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        wide[..., 0],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(module(same), expected)
    constant = x[:1, :, :1, :1].expand(2, 3, 8, 8)
    assert torch.equal(module(constant), module(constant.contiguous()))


@pytest.mark.parametrize("engine", ENGINES)
def test_any_batch_size_and_image_size(engine: str, integers) -> None:
    x = images(4, 3, 8, 8)
    module = integers(tiny_residual(), x, engine=engine).module
    expected = module(x)
    for position in range(4):
        assert torch.equal(module(x[position : position + 1]), expected[position : position + 1])
    for size in ((0, 3, 8, 8), (1, 3, 5, 11), (2, 3, 33, 7), (3, 3, 1, 1), (7, 3, 16, 16)):
        assert module(images(*size)).shape == (size[0], 10)


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_compute_the_same(engine: str, integers) -> None:
    x = images(2, 3, 8, 8)
    module = integers(tiny_residual(), x, "aciq-4bit", engine=engine).module
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other is not module
        assert other.engine == engine
        assert torch.equal(other(x), expected)
    inside = nn.Sequential(module, nn.Softmax(1))
    assert torch.equal(copy.deepcopy(inside)(x), inside(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_eight_threads_give_the_same_answers(engine: str, integers) -> None:
    """While others also pack weights for another engine."""
    batches = [images(2, 3, 8, 8, seed=seed) for seed in range(8)]
    program = integers(tiny_residual(), batches[0]).artifact.integers
    module = EagerModule(program, engine)
    expected = [module(batch) for batch in batches]
    wrong: list[int] = []
    before = torch.backends.quantized.engine

    def work(position: int) -> None:
        for _ in range(10):
            if not torch.equal(module(batches[position]), expected[position]):
                wrong.append(position)
        EagerModule(program, ENGINES[position % 3])

    threads = [threading.Thread(target=work, args=(position,)) for position in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("engine", ENGINES)
def test_the_global_engine_is_left_alone(engine: str, integers) -> None:
    x = images(2, 3, 8, 8)
    before = torch.backends.quantized.engine
    other = next(name for name in kernels.supported_engines() if name != "onednn")
    try:
        torch.backends.quantized.engine = other
        module = integers(tiny_residual(), x, engine=engine).module
        assert torch.backends.quantized.engine == other
        module(x)
        assert torch.backends.quantized.engine == other
        with pytest.raises(FxqError):
            module(images(2, 4, 8, 8))
        assert torch.backends.quantized.engine == other
    finally:
        torch.backends.quantized.engine = before


def test_the_engine_is_restored_after_a_failing_add() -> None:
    before = torch.backends.quantized.engine

    def fail() -> None:
        with kernels.engine_setting.set_to("onednn"):
            assert torch.backends.quantized.engine == "onednn"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "wrong",
    [
        images(2, 4, 8, 8),
        images(3, 8, 8),
        images(2, 3, 8),
        images(2, 3, 8, 8).double(),
        images(2, 3, 8, 8).to(torch.uint8),
    ],
    ids=["channels", "no batch", "no width", "double", "bytes"],
)
def test_wrong_inputs_are_explained(engine: str, wrong: Tensor, integers) -> None:
    module = integers(tiny_residual(), images(2, 3, 8, 8), engine=engine).module
    with pytest.raises(FxqError, match="cannot run on these inputs") as caught:
        module(wrong)
    assert str(list(wrong.shape)) in str(caught.value.where)


def test_the_number_of_inputs_is_checked(integers) -> None:
    x = images(2, 3, 8, 8)
    module = integers(tiny_conv(), x).module
    with pytest.raises(FxqError, match="takes 1 inputs, not 2"):
        module(x, x)


def test_unknown_engines_are_refused(integers) -> None:
    x = images(2, 16)
    with pytest.raises(UnknownNameError, match="engine named 'onedn'") as caught:
        integers(tiny_mlp(), x, engine="onedn")
    assert caught.value.hint == "did you mean 'onednn'?"
    with pytest.raises(FxqError, match="has no option 'threads'"):
        integers(tiny_mlp(), x, threads=3)


def test_repr_and_training_mode(integers) -> None:
    x = images(2, 16)
    module = integers(tiny_mlp(), x).module
    assert "engine=fbgemm, 4 instructions" in repr(module)
    assert torch.equal(module.train()(x), module.eval()(x))
    assert not list(module.parameters())


def test_gradients_are_not_recorded(integers) -> None:
    x = images(2, 16).requires_grad_()
    assert not integers(tiny_mlp(), x.detach()).module(x).requires_grad
