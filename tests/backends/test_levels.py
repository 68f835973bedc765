"""Activations on levels: fbgemm and ONNX Runtime equal the reference, and that the exact levels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxq
from fxq.artifact import Artifact
from fxq.backends.eager import EagerBackend
from fxq.graph.program import Program
from fxq.integer.arguments import Register
from fxq.integer.program import Example, Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.numerics.affine import short_scale
from fxq.numerics.levels import LevelSet, levels_of, mse_level_scale, nearest_level
from fxq.quant.quantizers import (
    ActivationQuantizer,
    LevelQuantizer,
    QuantizedLayer,
    channel_view,
    rows,
)
from fxq.registry import find_backend


class Net(nn.Module):
    """Layers, and a forward over them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, width, 1)
        self.wide = nn.Conv2d(2 * width, width, 3, stride=2)
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc, self.head = nn.Linear(width, 24), nn.Linear(24, 10)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self, x)
        return self.head(F.relu(self.fc(y.mean((2, 3)))))


def _residual(n: Any, x: Tensor) -> Tensor:
    y = F.relu(n.a(x))
    y = F.relu(n.b(y) + y)
    return F.relu(n.b(n.c(y)) + y)


NETS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda n, x: F.relu(n.c(F.relu(n.b(F.relu(n.a(x)))))),
    "relu6": lambda n, x: F.relu(n.c(F.relu6(n.a(x)))),
    "signed": lambda n, x: n.c(n.b(n.a(x))),
    "pooled": lambda n, x: F.relu(n.b(F.max_pool2d(F.relu(n.a(x)), 2))),
    "averaged": lambda n, x: F.relu(n.b(F.avg_pool2d(F.relu(n.a(x)), 2))),
    "depthwise": lambda n, x: F.relu(n.c(F.relu(n.deep(F.relu(n.a(x)))))),
    "residual": _residual,
    "cat": lambda n, x: F.relu(n.wide(torch.cat([F.relu(n.b(y := F.relu(n.a(x)))), y], 1))),
    "float between": lambda n, x: F.relu(n.c(torch.sigmoid(n.a(x)))),
}


def with_levels(program: Program, bits: int, keep: Callable[[str], bool]) -> Program:
    """APoT levels for weights and activations, but for the quantizers to keep."""
    made: dict[ActivationQuantizer, LevelQuantizer] = {}
    for node in list(program.nodes()):
        module, name = program.submodule(node), str(node.target)
        if isinstance(module, ActivationQuantizer) and not keep(name):
            made.setdefault(module, _levels_for(module, bits))
            program.module.set_submodule(name, made[module])
        elif isinstance(module, QuantizedLayer):
            program.module.set_submodule(name, _weights_on_levels(module, bits))
    return program


def _levels_for(module: ActivationQuantizer, bits: int) -> LevelQuantizer:
    signed = int(module.zero_point) > 0
    levels = levels_of(LevelSet.APOT, bits if signed else bits + 1)
    scale = short_scale(float(module.scale) * 160 / int(levels[-1]))
    return LevelQuantizer(torch.tensor(scale), levels, signed, bits)


def _weights_on_levels(module: QuantizedLayer, bits: int) -> QuantizedLayer:
    levels, weight = levels_of(LevelSet.APOT, bits), module.layer.weight.detach()
    scale = mse_level_scale(rows(module.layer, weight), levels)
    codes = nearest_level(weight / channel_view(module.layer, scale), levels).to(torch.int8)
    return QuantizedLayer(module.layer, codes, scale, torch.full_like(module.bits, bits))


@pytest.fixture
def levelled(integers) -> Callable[..., tuple[Program, Artifact, Tensor]]:
    """Call it as ``levelled(net, bits)``: the program, its artifact, and inputs."""

    def build(
        function: Callable[[Any, Tensor], Tensor],
        bits: int,
        keep: Callable[[str], bool] = lambda name: name.startswith("x_"),
        size: int = 12,
        **options: Any,
    ) -> tuple[Program, Artifact, Tensor]:
        x = torch.randn(8, 3, size, size)
        result = integers(Net(function, **options), x)
        program = with_levels(result.program, bits, keep)
        artifact = EagerBackend().lower(program, engine="fbgemm", journal=result.journal)
        return program, artifact, x * 1.3

    return build


def onnx_differences(program: IntegerProgram, x: Tensor, flavor: str = "fast") -> dict[str, int]:
    """In how many codes each register of ONNX Runtime differs from the reference."""
    module: Any = find_backend("onnx").load(program, flavor=flavor)  # type: ignore[attr-defined]
    _, expected = Reference(program).run(x)
    found = module.registers(x)
    grids = program.grids()
    seen = [name for name in found if grids.get(name) is not None]
    assert {step.name for step in program if step.op == "lookup"} <= set(seen)
    counts = {name: int((found[name] != expected[name]).sum()) for name in seen}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("name", NETS)
def test_runtimes_are_the_reference(name: str, bits: int, levelled, mismatches) -> None:
    _, artifact, x = levelled(NETS[name], bits)
    program = artifact.integers
    assert artifact.ledger.coverage() == 1.0
    assert "lookup" in {step.op for step in program}
    assert mismatches(program, x) == {}
    assert onnx_differences(program, x) == {}
    assert onnx_differences(program, x, "packed") == {}


def test_a_sum_is_looked_up_for_each_of_its_readers(levelled, mismatches) -> None:
    """The sum stays on 8 bits for the skip; layers read levels of it, of two scales."""

    def two(n: Any, x: Tensor) -> Tensor:
        y = F.relu(n.a(x))
        y = F.relu(n.b(y) + y)
        return F.relu(n.wide(torch.cat([F.relu(n.c(y)), F.relu(n.deep(y))], 1)))

    program, _, x = levelled(two, 4, keep=lambda name: True)
    module, graph = program.module, program.module.graph
    for reader, factor in (("c", 2.0), ("deep", 3.5)):
        (total,) = program.node(reader).all_input_nodes
        scale = short_scale(float(program.submodule(total).scale) * factor)
        levels = LevelQuantizer(torch.tensor(scale), levels_of(LevelSet.APOT, 5), False, 4)
        module.add_submodule(f"levels_of_{reader}", levels)
        with graph.inserting_after(total):
            found = graph.call_module(f"levels_of_{reader}", (total,))
        found.meta = dict(total.meta)
        program.node(reader).replace_input_with(total, found)
    module.recompile()
    integers = EagerBackend().lower(program).integers
    assert [step.op for step in integers if step.inputs == ("add",)] == ["lookup", "lookup"]
    assert mismatches(integers, x) == {}
    assert onnx_differences(integers, x) == {}


@pytest.mark.parametrize(("bits", "allowed"), [(2, 0), (3, 0), (4, 80)])
def test_levels_are_those_of_exact_arithmetic(bits: int, allowed: int, levelled) -> None:
    """Of a million codes: levels of the layers' exact sums, found in float64.

    With 4 bits, weights have a factor of 12 to spare, behind inputs of 8 bits only 6, and one
    threshold in a hundred cannot be placed right together with the others of its channel.
    """
    program, artifact, x = levelled(NETS["plain"], bits, size=64, width=16)
    integers = artifact.integers
    _, found = Reference(integers).run(x)
    grids, wrong, count = integers.grids(), 0, 0
    for step in integers:
        if step.op != "conv":
            continue
        layer: Any = program.submodule(program.node(step.sources[0]))
        (table,) = integers.readers()[step.name]
        levels: Any = program.submodule(program.node(table.name))
        source = grids[step.inputs[0]]
        codes = found[step.inputs[0]].double() - source.zero_point
        total = F.conv2d(codes, layer.codes.double(), padding=step.attributes["padding"])
        unit = source.scale * layer.scale.double()
        value = total * unit[:, None, None] + layer.bias.double()[:, None, None]
        level = nearest_level(value.clamp(min=0) / float(levels.scale), levels.levels)
        wrong += int((level != found[table.name]).sum())
        count += level.numel()
    assert count > 1_000_000
    assert wrong <= allowed


def test_onnx_runtime_fuses_the_layers_around_tables(levelled, tmp_path: Path) -> None:
    _, artifact, _ = levelled(NETS["plain"], 4)
    backend: Any = find_backend("onnx")
    model = backend.load(artifact.integers, flavor="fast").model
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    found = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert found["QLinearConv"] == 3
    assert found["GatherElements"] == 5
    assert not {"Conv", "Gemm", "MatMul"} & set(found)


@pytest.mark.parametrize("flavor", ["fast", "packed", "compact"])
def test_tables_in_every_flavour(flavor: str, levelled) -> None:
    _, artifact, x = levelled(NETS["residual"], 3)
    backend: Any = find_backend("onnx")
    module = backend.load(artifact.integers, flavor=flavor)
    onnx.checker.check_model(module.model, full_check=True)
    onnx.shape_inference.infer_shapes(module.model, strict_mode=True, data_prop=True)
    want, have = artifact.module(x), module(x)
    assert float((want - have).norm() / want.norm()) < (0.05 if flavor == "compact" else 1e-6)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 255), min_size=256, max_size=256),
    st.sampled_from([Grid(0.0625, 0, 8), Grid(0.125, 7, 4), Grid(0.25, 0, 3)]),
    st.sampled_from([(2, 3, 4, 5), (2, 7), (2, 3, 5)]),
    st.booleans(),
)
def test_any_table(table: list[int], grid: Grid, shape: tuple[int, ...], shifted: bool) -> None:
    """Of codes as they come and of codes kept at the top of their byte; in every layout."""
    source: tuple[Instruction, ...] = (Instruction("q", "quantize", ("x",), grid=grid),)
    if shifted:  # a ReLU bounds the codes of a sum
        source += (Instruction("s", "add", ("q", "q"), {"relu": True}, grid=grid),)
    last = source[-1].name
    step = Instruction("y", "lookup", (last,), {}, {"table": "t"}, Grid(0.5, 3, 8))
    end = Instruction("d", "dequantize", ("y",))
    tensors = {"t": torch.tensor(table, dtype=torch.uint8)}
    program = IntegerProgram(
        ("x",), [*source, step, end], Register("d"), tensors, {}, (Example(shape),)
    )
    program.check()
    x = torch.randn(shape)
    expected, registers = Reference(program).run(x)
    backends = [find_backend(name).load(program) for name in ("eager", "onnx")]  # type: ignore[attr-defined]
    for module in backends:
        assert torch.equal(module(x), expected)
        assert torch.equal(module.registers(x)["y"].int(), registers["y"])
        if len(shape) == 4:
            assert torch.equal(module(x.contiguous(memory_format=torch.channels_last)), expected)


def test_engine_x86_reads_tables(levelled, mismatches) -> None:
    """Residual adds inside convolutions, whose addends tables read too."""
    _, artifact, x = levelled(NETS["residual"], 4)
    found = mismatches(artifact.integers, x, engine="x86")
    assert sum(found.values()) < 0.02 * x.numel() * len(artifact.integers.instructions)


def test_a_saved_artifact_is_the_same(levelled, tmp_path: Path) -> None:
    _, artifact, x = levelled(NETS["residual"], 4)
    loaded = fxq.load(artifact.save(tmp_path / "run"))
    assert loaded.integers.to_json() == artifact.integers.to_json()
    for name, tensor in artifact.integers.tensors.items():
        assert torch.equal(loaded.integers.tensors[name], tensor)
    assert torch.equal(loaded.module(x), artifact.module(x))


def test_fxq_verify_compares_tables(levelled, tmp_path: Path) -> None:
    from fxq.cli.verify import Request, run

    _, artifact, _ = levelled(NETS["residual"], 4)
    artifact.save(tmp_path / "run")
    run(Request(str(tmp_path / "run"), images=8))
