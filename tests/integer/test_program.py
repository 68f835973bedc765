"""Integer programs as plain data, and what is refused before any kernel sees it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import ArtifactError
from fxq.graph import call_ops
from fxq.integer.arguments import Register, decode, encode, registers_in, substitute
from fxq.integer.checks import RESHAPE_CALLS
from fxq.integer.program import FORMAT, Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_residual

# ---- arguments ---------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.builds(slice, inner, inner, inner)
        | st.sampled_from(["a", "b"]).map(Register)
    ),
    max_leaves=8,
)


@given(plain)
def test_arguments_survive_json(value: Any) -> None:
    assert decode(json.loads(json.dumps(encode(value)))) == value


@pytest.mark.parametrize(
    "value",
    [
        torch.float32,
        torch.bool,
        torch.device("cpu"),
        torch.channels_last,
        Ellipsis,
        float("inf"),
        float("-inf"),
    ],
)
def test_torch_values_survive_json(value: Any) -> None:
    assert decode(json.loads(json.dumps(encode(value)))) == value


def test_sizes_become_tuples() -> None:
    assert decode(encode(torch.Size([2, 3]))) == (2, 3)
    assert decode(encode(float("nan"))) != decode(encode(float("nan")))


@pytest.mark.parametrize("value", [object(), 1j, torch.zeros(1), print, {1, 2}])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be stored"):
        encode((1, [value]))


@pytest.mark.parametrize(
    "data", [{"a": 1, "b": 2}, {}, {"call": "os.system"}, {"dtype": "os"}, {"__reduce__": []}]
)
def test_other_json_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, KeyError)):
        decode([data])


def test_registers_are_found_and_replaced_everywhere() -> None:
    value = (Register("a"), {"k": [slice(Register("b"), None, 2)]}, 3)
    assert list(registers_in(value)) == ["a", "b"]
    assert substitute(value, {"a": 1, "b": 2}) == (1, {"k": [slice(2, None, 2)]}, 3)


# ---- programs ----------------------------------------------------------------------------------


def test_programs_survive_json(compiled) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for build in (tiny_conv, tiny_residual, tiny_concat):
        program = compiled(build(), x, "aciq-4bit").artifact.integers
        stored = json.loads(json.dumps(program.to_json()))
        again = IntegerProgram.from_json(stored, program.tensors)
        assert again == program
        assert torch.equal(Reference(again)(x), Reference(program)(x))


def test_sizes_count_nominal_bits() -> None:
    tensors = {
        "a.weight": torch.zeros(4, 10, dtype=torch.int8),
        "a.scale": torch.zeros(4),
        "a.bias": torch.zeros(4, dtype=torch.int32),
        "a.bits": torch.tensor([2, 4, 4, 6], dtype=torch.uint8),
        "c": torch.zeros(3, dtype=torch.float64),
    }
    roles = {name.removeprefix("a."): name for name in tensors if name != "c"}
    steps = [Instruction("a", "linear", ("x",), tensors=roles)]
    program = IntegerProgram(("x",), steps, Register("a"), tensors)
    assert program.weight_bytes() == (2 + 4 + 4 + 6) * 10 // 8 + 4 * 4 + 4 * 4 + 3 * 8


def test_what_nobody_reads_is_dropped() -> None:
    def call(name: str, source: str, **attributes: Any) -> Instruction:
        attributes |= {"arguments": (Register(source),), "keywords": {}}
        return Instruction(name, "float", (source,), attributes)

    steps = [call("a", "x", foreign="f"), call("b", "x", foreign="g"), call("c", "a", target="t")]
    program = IntegerProgram(
        ("x",), steps, Register("c"), {"w": torch.ones(1)}, {"f": abs, "g": abs}
    )
    program.drop_unused()
    assert [step.name for step in program] == ["a", "c"]
    assert program.tensors == {}
    assert program.foreign == {"f": abs}


def test_the_list_of_reshapes_is_that_of_the_graph() -> None:
    assert {*call_ops.RESHAPES, "getitem", "pixel_shuffle", "pixel_unshuffle"} == RESHAPE_CALLS


# ---- damage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(compiled) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A program with one of everything that has a check."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Conv2d(3, 4, 3, padding=1)
            self.b = torch.nn.Conv2d(4, 4, 3, padding=1)
            self.fc = torch.nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = torch.relu(self.b(torch.relu(y)) + y)
            y = torch.nn.functional.pad(torch.max_pool2d(y, 2), (0, 1, 0, 1))
            y = torch.cat([y, y], 1).mean((2, 3))
            return torch.sigmoid(self.fc(y.flatten(1)))

    program = compiled(Net(), x).artifact.integers
    return program.to_json(), program.tensors


def load(data: Any, tensors: dict[str, Tensor]) -> IntegerProgram:
    return IntegerProgram.from_json(data, tensors)


def instruction(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(step for step in data["instructions"] if step["op"] == op)


def test_the_example_has_everything(stored) -> None:
    data, tensors = stored
    ops = {step["op"] for step in data["instructions"]}
    assert ops >= {"quantize", "conv", "relu", "add", "max_pool", "pad", "cat", "global_avg_pool"}
    assert ops >= {"linear", "float"}
    load(data, tensors)


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "unknown instruction": ("conv", lambda s: s.update(op="exec")),
    "own addition": ("conv", lambda s: s.update(op="conv_add")),
    "unknown register": ("conv", lambda s: s.update(inputs=["nowhere"])),
    "own register": ("conv", lambda s: s.update(inputs=[s["name"]])),
    "no input": ("conv", lambda s: s.update(inputs=[])),
    "too many inputs": ("conv", lambda s: s["inputs"].append(s["inputs"][0])),
    "one addend": ("add", lambda s: s["inputs"].pop()),
    "float into a kernel": ("conv", lambda s: s.update(inputs=["x"])),
    "written twice": ("add", lambda s: s.update(name="x_quantizer")),
    "input overwritten": ("add", lambda s: s.update(name="x")),
    "no name": ("add", lambda s: s.pop("name")),
    "no grid": ("conv", lambda s: s.pop("grid")),
    "a grid too many": ("float", lambda s: s.update(grid=[1.0, 0, 8])),
    "half a grid": ("conv", lambda s: s.update(grid=[1.0])),
    "no scale": ("conv", lambda s: s.update(grid=[0.0, 0, 8])),
    "negative scale": ("conv", lambda s: s.update(grid=[-1.0, 0, 8])),
    "infinite scale": ("conv", lambda s: s.update(grid=[float("inf"), 0, 8])),
    "scale that is no number": ("conv", lambda s: s.update(grid=[float("nan"), 0, 8])),
    "too many bits": ("conv", lambda s: s.update(grid=[1.0, 0, 9])),
    "no bits": ("conv", lambda s: s.update(grid=[1.0, 0, 0])),
    "zero point outside": ("conv", lambda s: s.update(grid=[1.0, 16, 4])),
    "another grid": ("max_pool", lambda s: s.update(grid=[1.0, 0, 8])),
    "missing tensor": ("conv", lambda s: s["tensors"].update(weight="nothing")),
    "no weight": ("conv", lambda s: s["tensors"].pop("weight")),
    "swapped tensors": ("conv", lambda s: s["tensors"].update(weight=s["tensors"]["bias"])),
    "another layer's weight": ("linear", lambda s: s["tensors"].update(weight="a.weight")),
    "another layer's scale": ("linear", lambda s: s["tensors"].update(scale="a.scale")),
    "stride of zero": ("conv", lambda s: _set(s, "stride", {"tuple": [0, 0]})),
    "one stride": ("conv", lambda s: _set(s, "stride", {"tuple": [1]})),
    "negative padding": ("conv", lambda s: _set(s, "padding", {"tuple": [-1, -1]})),
    "dilation of text": ("conv", lambda s: _set(s, "dilation", "ab")),
    "no groups": ("conv", lambda s: _set(s, "groups", 0)),
    "uneven groups": ("conv", lambda s: _set(s, "groups", 3)),
    "relu of text": ("conv", lambda s: _set(s, "relu", "yes")),
    "no stride": ("conv", lambda s: s["attributes"].pop("stride")),
    "pool of zero": ("max_pool", lambda s: _set(s, "kernel_size", {"tuple": [0, 0]})),
    "pool with more": ("max_pool", lambda s: _set(s, "return_indices", True)),
    "padding odd": ("pad", lambda s: _set(s, "pad", {"tuple": [1]})),
    "padding of text": ("pad", lambda s: _set(s, "pad", {"tuple": ["1", "1"]})),
    "bound outside": ("relu", lambda s: _set(s, "top", 256)),
    "dim of text": ("cat", lambda s: _set(s, "dim", "x")),
    "flag of text": ("global_avg_pool", lambda s: _set(s, "keepdim", 1)),
    "other reshape": ("reshape", lambda s: _set(s, "call", "__reduce_ex__")),
    "in-place reshape": ("reshape", lambda s: _set(s, "call", "apply_")),
    "reshape by text": ("reshape", lambda s: _set(s, "arguments", "1")),
    "call without arguments": ("float", lambda s: s["attributes"].pop("arguments")),
    "keywords in a list": ("float", lambda s: _set(s, "keywords", [])),
    "unknown encoding": ("float", lambda s: _set(s, "arguments", {"pickle": "gASV"})),
    "a register that is not there": (
        "float",
        lambda s: _set(s, "arguments", {"tuple": [{"register": "nowhere"}]}),
    ),
}


def _set(step: dict[str, Any], name: str, value: Any) -> None:
    step["attributes"][name] = value


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_instructions_are_refused(name: str, stored) -> None:
    data, tensors = copy.deepcopy(stored[0]), dict(stored[1])
    op, damage = DAMAGE[name]
    damage(instruction(data, op))
    with pytest.raises(ArtifactError):
        load(data, tensors)


WRONG_TENSORS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "float weights": lambda t: t.update({"a.weight": t["a.weight"].float()}),
    "wide weights": lambda t: t.update({"a.weight": t["a.weight"].int()}),
    "flat weights": lambda t: t.update({"a.weight": t["a.weight"].flatten()}),
    "empty weights": lambda t: t.update({"a.weight": t["a.weight"][:, :0]}),
    "fewer channels": lambda t: t.update({"a.weight": t["a.weight"][:3]}),
    "short bias": lambda t: t.update({"a.bias": t["a.bias"][:2]}),
    "float bias": lambda t: t.update({"a.bias": t["a.bias"].float()}),
    "long scale": lambda t: t.update({"a.scale": t["a.scale"].repeat(2)}),
    "zero scale": lambda t: t.update({"a.scale": t["a.scale"] * 0}),
    "infinite scale": lambda t: t.update({"a.scale": t["a.scale"] / 0}),
    "double scale": lambda t: t.update({"a.scale": t["a.scale"].double()}),
    "missing": lambda t: t.pop("a.bits"),
    "matrix of volumes": lambda t: t.update({"fc.weight": t["fc.weight"][..., None]}),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_refused(name: str, stored) -> None:
    data, tensors = stored[0], dict(stored[1])
    WRONG_TENSORS[name](tensors)
    with pytest.raises(ArtifactError):
        load(data, tensors)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        "text",
        3,
        {"format": FORMAT},
        {"format": FORMAT, "inputs": ["x"], "examples": [], "output": None, "instructions": [3]},
        {"format": FORMAT, "inputs": 3, "examples": [], "output": None, "instructions": []},
        {
            "format": FORMAT,
            "inputs": [],
            "examples": [],
            "output": {"register": "y"},
            "instructions": [],
        },
        {
            "format": FORMAT,
            "inputs": [],
            "examples": [],
            "output": {"a": 1, "b": 2},
            "instructions": [],
        },
    ],
)
def test_other_data_is_refused(data: Any) -> None:
    with pytest.raises(ArtifactError):
        load(data, {})


def test_newer_formats_are_named() -> None:
    with pytest.raises(ArtifactError, match=f"format {FORMAT + 1} is not the {FORMAT}"):
        load({"format": FORMAT + 1}, {})


def test_code_of_ones_own_is_not_stored() -> None:
    step = Instruction("y", "float", ("x",), {"foreign": "mine"})
    program = IntegerProgram(("x",), [step], Register("y"), {}, {"mine": abs})
    with pytest.raises(ArtifactError, match="mine is code of your own"):
        program.to_json()


def test_arguments_that_are_no_data_are_not_stored() -> None:
    attributes = {"target": "torch.mul", "arguments": (Register("x"), 2j), "keywords": {}}
    program = IntegerProgram(("x",), [Instruction("y", "float", ("x",), attributes)], None, {})
    with pytest.raises(ArtifactError, match="a complex cannot be stored"):
        program.to_json()


def test_grids() -> None:
    grid = Grid(0.5, 2, 3)
    assert grid.top == 7
    assert [grid.code_of(value) for value in (0.0, 1.0, 1.2, 99.0)] == [2, 4, 4, 7]
