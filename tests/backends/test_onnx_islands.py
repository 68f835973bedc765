"""Float islands as ONNX nodes: each register equals the reference's, for any batch size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from fxq.backends.onnx.island_module import ISLANDS
from fxq.backends.onnx.islands import IslandGraph, export_islands
from fxq.backends.onnx.session import Session
from fxq.errors import LoweringError
from fxq.integer.program import IntegerProgram
from fxq.integer.reference import Reference
from fxq.integer.shapes import register_values
from fxq.torchvision_import import import_torchvision

OPSET = 21


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A convolution, a function with parts of its own, and a convolution."""

    def __init__(self, between: Callable[..., object], head: bool = True, **parts: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)
        self.ends = head
        for name, part in parts.items():
            setattr(self, name, part)
        self.between = between

    def forward(self, x: Tensor) -> object:
        found = self.between(self, self.stem(x), x)
        return self.head(found) if self.ends else found


def exported(program: IntegerProgram, dynamic: bool = True, opset: int = OPSET) -> IslandGraph:
    values = register_values(program, dynamic=dynamic)
    return export_islands(program, values, opset=opset, dynamic=dynamic)


def written(graph: IslandGraph) -> list[str]:
    """Every tensor of a graph."""
    outputs = [name for node in graph.nodes for name in node.output if name]
    return [*outputs, *(one.name for one in graph.initializers)]


def read(graph: IslandGraph) -> list[str]:
    """The tensors that come from elsewhere."""
    own = {"", *written(graph)}
    return list(dict.fromkeys(i for node in graph.nodes for i in node.input if i not in own))


def run(graph: IslandGraph, registers: dict[str, Any], opset: int = OPSET) -> dict[str, Tensor]:
    """The registers that a graph writes, computed by ONNX Runtime from those that it reads."""
    given = {name: _item(registers, name) for name in read(graph)}
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.numpy().dtype), [None] * value.dim()
        )
        for name, value in given.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in written(graph) if name in registers]
    made = helper.make_graph(graph.nodes, "islands", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(opsets)
    return Session(helper.make_model(made, opset_imports=opsets, ir_version=version)).run(
        given.values()
    )


def _item(registers: dict[str, Any], name: str) -> Tensor:
    register, *indices = name.split(".")
    found = registers[register]
    for index in indices:
        found = found[int(index)]
    return found


def check(program: IntegerProgram, graph: IslandGraph, *inputs: Tensor, opset: int = OPSET) -> None:
    """Every register the graph writes, and all that are read elsewhere, are the reference's."""
    _, registers = Reference(program).run(*inputs)
    floats = {step.name for step in program if step.op in ISLANDS}
    elsewhere = [i for step in program if step.name not in floats for i in step.inputs]
    wanted = {name for name in elsewhere if name in floats and isinstance(registers[name], Tensor)}
    assert wanted <= set(written(graph))
    assert not set(read(graph)) & {name for name, grid in program.grids().items() if grid}
    found = run(graph, registers, opset)
    assert found
    for name, value in found.items():
        expected = registers[name]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), name
        scale = max(1.0, float(expected.double().abs().max()))
        assert float((value - expected).abs().max()) < 1e-4 * scale, name


def _attention(m: Any, y: Tensor, x: Tensor) -> Tensor:
    tokens = y.flatten(2).transpose(1, 2)
    tokens = m.norm(tokens + m.position)
    tokens = tokens + m.attention(tokens, tokens, tokens, need_weights=False)[0]
    return tokens.transpose(1, 2).reshape(y.shape)


def _windows(m: Any, y: Tensor, x: Tensor) -> Tensor:
    """Windows of 2 x 2 become images of their own; the batch is 4 times as large there."""
    batch, channels, height, width = y.shape
    parts = y.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
    parts = F.silu(m.inner(parts.reshape(batch * 4, channels, height // 2, width // 2)))
    parts = parts.reshape(batch, 2, 2, channels, height // 2, width // 2)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels, height, width)


def _chunks(m: Any, y: Tensor, x: Tensor) -> Tensor:
    left, right = y.chunk(2, 1)
    whole = torch.stack(y.chunk(2, 1), 1).flatten(1, 2)
    return torch.cat([torch.sigmoid(left) * right, torch.tanh(right)], 1) + whole


def _squeeze_excite(m: Any, y: Tensor, x: Tensor) -> Tensor:
    pooled = F.adaptive_avg_pool2d(F.silu(y), 1)
    return F.hardswish(y) * m.gate(pooled).sigmoid()


def _resized(m: Any, y: Tensor, x: Tensor) -> Tensor:
    small = F.gelu(F.avg_pool2d(y, 2))
    return F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False) + 1


NETS: dict[str, Callable[[], Net]] = {
    "squeeze and excite": lambda: Net(_squeeze_excite, gate=nn.Conv2d(8, 8, 1)),
    "batch norm after an add": lambda: Net(
        lambda m, y, x: torch.relu(m.norm(F.silu(y) + y)), norm=_used(nn.BatchNorm2d(8))
    ),
    "attention": lambda: Net(
        _attention,
        norm=nn.LayerNorm(8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        position=nn.Parameter(torch.randn(1, 64, 8)),
    ),
    "windows": lambda: Net(_windows, inner=nn.Conv2d(8, 8, 3, padding=1)),
    "resized to the input": lambda: Net(_resized),
    "chunks": lambda: Net(_chunks),
    "size of codes in an island": lambda: Net(
        lambda m, y, x: F.silu(y).view(y.size(0), 8, 4, 16) * (x.new_ones(1) * (y.shape[0] // 2))
    ),
    "roll, einsum, softmax": lambda: Net(
        lambda m, y, x: torch.einsum("bchw,bcvw->bchv", y.roll((1, -1), (2, 3)), y.softmax(-1))
    ),
    "complex numbers": lambda: Net(lambda m, y, x: torch.fft.ifft2(torch.fft.fft2(y)).real),
    "two names": lambda: Net(lambda m, y, x: (m.head(z := F.silu(y)), z.float()), head=False),
}


def _used(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A batch norm with statistics."""
    nn.init.uniform_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


@pytest.fixture(scope="module")
def attention(integers) -> tuple[IntegerProgram, IslandGraph]:
    """A program with attention, and its islands."""
    torch.manual_seed(0)
    program = integers(NETS["attention"](), images(2, 3, 8, 8)).artifact.integers
    return program, exported(program)


def test_attention_and_its_position_embedding(attention) -> None:
    program, graph = attention
    for batch in (5, 1):
        check(program, graph, images(batch, 3, 8, 8, seed=batch))


@pytest.mark.parametrize("name", [name for name in NETS if name != "attention"])
def test_islands_equal_the_reference_at_any_batch_size(name: str, integers) -> None:
    program = integers(NETS[name](), images(2, 3, 8, 8)).artifact.integers
    graph = exported(program)
    for batch in (5, 1):
        check(program, graph, images(batch, 3, 8, 8, seed=batch))


def test_islands_of_a_fixed_batch_know_every_size(attention) -> None:
    program, _ = attention
    graph = exported(program, dynamic=False)
    check(program, graph, images(2, 3, 8, 8, seed=4))
    assert "Shape" not in {node.op_type for node in graph.nodes}


def test_islands_are_written_in_the_opset_that_is_asked_for(attention) -> None:
    program, older = attention
    graph = exported(program, opset=24)
    check(program, graph, images(3, 3, 8, 8), opset=24)
    has_attention = [any(n.op_type == "Attention" for n in one.nodes) for one in (older, graph)]
    assert has_attention == [False, True]  # ONNX has it from 23


def test_inputs_of_other_dtypes_and_outputs_that_islands_only_pass_on(integers) -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.layer = nn.Linear(8, 4)
            self.bias = nn.Parameter(torch.randn(3))

        def forward(self, i: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            return self.layer(self.table(i)) * scale, scale.float(), self.bias

    inputs = (torch.arange(6).reshape(2, 3), images(2, 1, 1))
    program = integers(Indexed(), inputs).artifact.integers
    graph = exported(program)
    check(program, graph, torch.arange(9).reshape(3, 3), images(3, 1, 1))
    assert {"i", "scale"} <= set(read(graph))
    assert "bias" in {one.name for one in graph.initializers}


# ---- names -----------------------------------------------------------------------------------


def test_tensors_have_the_names_of_registers_and_weights(attention) -> None:
    program, graph = attention
    names = written(graph)
    nodes = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    assert len(set(nodes)) == len(nodes)
    registers = {step.name for step in program}
    assert {"norm", "position", "getitem", "reshape"} <= registers & set(names)
    assert {"norm.weight", "norm.bias", "attention.in_proj_bias"} <= set(names)
    inner = {name.partition("/")[0] for name in names if "/" in name}
    assert "attention" in inner
    assert inner <= registers
    assert not any(node.domain or node.doc_string or node.metadata_props for node in graph.nodes)
    used = {name for node in graph.nodes for name in node.input}
    assert {one.name for one in graph.initializers} <= used
    weight = next(one for one in graph.initializers if one.name == "norm.weight")
    expected = program.tensors["norm.weight"].numpy()
    assert np.array_equal(onnx.numpy_helper.to_array(weight), expected)


def test_the_batch_is_read_off_the_input_not_off_dequantized_codes(integers) -> None:
    program = integers(NETS["size of codes in an island"](), images(2, 3, 8, 8)).artifact.integers
    graph = exported(program)
    shapes = [node.input[0] for node in graph.nodes if node.op_type == "Shape"]
    assert set(shapes) == {"x"}


def test_the_same_program_gives_the_same_bytes_and_says_nothing(attention, capfd) -> None:
    program, graph = attention
    assert _bytes(exported(program)) == _bytes(graph)
    assert capfd.readouterr() == ("", "")


def _bytes(graph: IslandGraph) -> list[bytes]:
    return [
        one.SerializeToString(deterministic=True) for one in (*graph.nodes, *graph.initializers)
    ]


# ---- what cannot be exported -----------------------------------------------------------------


class Gate(nn.Module):
    """Code of the user's own that torch.export can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, y: Tensor) -> Tensor:
        return y * self.weight if y.dim() == 4 else y


class Strict(nn.Module):
    """Code that does not run on a symbolic batch size."""

    def forward(self, y: Tensor) -> Tensor:
        if not isinstance(y.shape[0], int):
            raise TypeError("the batch size is no int")
        return y * 2


class Loop(nn.Module):
    """Code that is traced for the batch size it is given."""

    def forward(self, y: Tensor) -> Tensor:
        return torch.stack([y[i] * 2 for i in range(y.shape[0])])


def _own(between: Callable[..., object], integers, **parts: nn.Module) -> IntegerProgram:
    net = Net(between, **parts)
    result = integers(net, images(2, 3, 8, 8), leaf_modules=("Gate", "Strict", "Loop"))
    program: IntegerProgram = result.artifact.integers
    assert program.foreign
    return program


def test_code_of_the_users_own_is_exported(integers) -> None:
    program = _own(lambda m, y, x: m.gate(F.silu(y)), integers, gate=Gate())
    graph = exported(program)
    check(program, graph, images(3, 3, 8, 8))
    assert "gate.weight" in {one.name for one in graph.initializers}


def test_every_instruction_that_fails_is_listed(integers) -> None:
    program = _own(lambda m, y, x: m.b(F.silu(m.a(y))), integers, a=Strict(), b=Strict())
    with pytest.raises(LoweringError) as caught:
        exported(program)
    assert [str(one) for one in caught.value.obstacles] == [
        "%a: TypeError: the batch size is no int",
        "%b: TypeError: the batch size is no int",
    ]
    check(program, exported(program, dynamic=False), images(2, 3, 8, 8))


def test_operators_that_onnx_does_not_have_are_all_named(integers, capfd) -> None:
    net = Net(lambda m, y, x: torch.special.i0e(torch.special.bessel_j0(y)))
    program = integers(net, images(2, 3, 8, 8)).artifact.integers
    with pytest.raises(LoweringError) as caught:
        exported(program)
    assert [str(one) for one in caught.value.obstacles] == [
        "%special_bessel_j0: torch.onnx has no form of prims.bessel_j0",
        "%special_i0e: torch.onnx has no form of prims.bessel_i0e",
    ]
    assert capfd.readouterr() == ("", "")


def test_code_for_one_batch_size_is_refused_unless_the_batch_is_fixed(integers) -> None:
    program = _own(lambda m, y, x: F.silu(m.loop(y)), integers, loop=Loop())
    with pytest.raises(LoweringError, match="%loop: it works for one batch size only"):
        exported(program)
    check(program, exported(program, dynamic=False), images(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (lambda m, y, x: (m.head(F.silu(y)), y.size(0)), "%size: it is an output, and no tensor"),
        (lambda m, y, x: (m.head(y), F.silu(y).chunk(2, 1)), "%chunk: it is an output, and no"),
        (lambda m, y, x: (m.head(y), torch.fft.fft2(y)), "%fft_fft2: .* complex tensor"),
    ],
)
def test_an_output_must_be_a_tensor(output: Callable[..., object], why: str, integers) -> None:
    program = integers(Net(output, head=False), images(2, 3, 8, 8)).artifact.integers
    with pytest.raises(LoweringError, match=why):
        exported(program)


# ---- a real network --------------------------------------------------------------------------

_PRINT_DIGEST = """
import hashlib, torch, fxq
from fxq.backends.onnx.island_module import ISLANDS
from fxq.backends.onnx.islands import export_islands
from fxq.integer.shapes import register_values
torch.manual_seed(0)
layer, x = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), layer, torch.nn.SiLU()).eval()
result = fxq.compile(model, x, "minmax-int8", calibration=[x], check=False)
program = result.artifact.integers
graph = export_islands(program, register_values(program), opset=21)
parts = [one.SerializeToString(deterministic=True) for one in (*graph.nodes, *graph.initializers)]
print(hashlib.sha256(b"".join(parts)).hexdigest())
"""


@pytest.mark.slow
def test_a_swin_transformer(integers) -> None:
    models = import_torchvision().models
    program = integers(models.swin_t(weights=None), images(2, 3, 64, 64)).artifact.integers
    graph = exported(program)
    for batch in (3, 1):
        check(program, graph, images(batch, 3, 64, 64, seed=batch))


@pytest.mark.slow
def test_other_processes_write_the_same_bytes() -> None:
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-W", "ignore", "-c", _PRINT_DIGEST]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1
