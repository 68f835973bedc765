"""Registers as ONNX tensors: containers, quantizing, dequantizing, clipping.

In both flavours a register of codes is the tensor ``NAME.codes`` and its float value ``NAME``; the
rules in `layers` and `moves` put operators between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.integer.shapes import Size, Value

from .graph import Array, GraphBuilder
from .levels import Levels, Table, levels_of, table_of


class Flavor(StrEnum):
    """What the integers are stored in.

    ``fast``: codes in uint8 and weights in int8 whatever their bits, which ONNX Runtime fuses to
    its integer kernels. ``packed``: the same, but weights of at most 4 bits are stored in 4 and
    unpacked to int8 by the runtime when it loads the model. ``compact``: weights and codes of at
    most 4 bits in INT4 and UINT4 wherever they occur, which ONNX Runtime computes in float. From
    opset 25 at most 2 bits are stored in 2.
    """

    FAST = "fast"
    PACKED = "packed"
    COMPACT = "compact"


class UnexportableError(Exception):
    """An instruction has no ONNX form; the message says why."""


INT2_OPSET = 25
"""The first opset with 2-bit types."""


MOVES = frozenset(["max_pool", "cat", "pad", "relu", "reshape", "requantize", "lookup"])
"""Instructions with operators on codes."""

ISLANDS = frozenset(["float", "module", "constant"])
"""Instructions that torch.onnx exports."""


@dataclass(frozen=True)
class Container:
    """An ONNX type for codes: unsigned, or signed for the levels of weights."""

    bits: int
    dtype: Any

    @classmethod
    def of(cls, bits: int, *, signed: bool = False) -> Container:
        """The type of that many bits: 2, 4 or 8."""
        import ml_dtypes

        name = f"{'' if signed else 'u'}int{bits}"
        return cls(bits, np.dtype(getattr(np if bits == 8 else ml_dtypes, name)))

    @property
    def top(self) -> int:
        """The largest unsigned code it holds."""
        return int(2**self.bits - 1)


@dataclass(frozen=True)
class Packed:
    """How weights are stored: in how many bits, and as what; None is int8 codes."""

    bits: int
    form: Levels | Table | None


@dataclass
class Emitter:
    """Emits registers into a graph.

    Attributes:
        program: The program.
        values: What each register holds.
        flavor: Which containers.
        opset: The opset of the graph.
        graph: Where nodes go.
        codes: The tensors with each quantized register's codes: a name, or a list for a tuple.
        floats: The tensor with each register's float value, once something asked for it.
    """

    program: IntegerProgram
    values: dict[str, Value]
    flavor: Flavor = Flavor.FAST
    opset: int = 21
    graph: GraphBuilder = field(default_factory=GraphBuilder)
    codes: dict[str, Any] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.grids = self.program.grids()
        self.writers = {step.name: step for step in self.program}
        self.readers = self.program.readers()
        self.floats.update({name: name for name in self.program.inputs})
        self._packed: dict[str, Packed] = {}

    # ---- what registers are ------------------------------------------------------------------

    def grid(self, name: str) -> Grid:
        """The grid of a quantized register."""
        found = self.grids[name]
        assert found is not None
        return found

    def shape(self, name: str) -> tuple[Size, ...]:
        """The shape of a register that is one tensor."""
        found = self.values[name].shape
        if found is None:
            raise UnexportableError("its sizes are no multiples of the batch size")
        return found

    def dims(self, name: str) -> list[int]:
        """The shape of a register as Reshape takes it: -1 is the dimension that is dynamic."""
        dims = [-1 if size.is_dynamic else size.constant for size in self.shape(name)]
        if dims.count(-1) > 1:
            raise UnexportableError("two dimensions depend on the batch size")
        return dims

    def container(self, name: str) -> Container:
        """What holds the codes of a register.

        Bytes, where the codes need clipping, where operators move them, which few do to fewer bits,
        and where a layer with int8 weights reads them, which ONNX Runtime multiplies with nothing
        smaller.
        """
        bits = self.grid(name).bits
        may_pack = self.flavor is Flavor.COMPACT and bits in self._sizes()
        return Container.of(bits if may_pack and not self._needs_bytes(name) else 8)

    def _needs_bytes(self, name: str) -> bool:
        writer, readers = self.writers[name], self.readers[name]
        if any(self._moves(step) for step in (writer, *readers)):
            return True
        if writer.attributes.get("relu") and self.grid(name).zero_point:
            return True
        layers = [step for step in readers if "weight" in step.tensors]
        return not all(isinstance(self.packed(step).form, Levels) for step in layers)

    def _moves(self, step: Instruction) -> bool:
        """Whether an instruction is emitted with operators on codes."""
        by_rows = step.op == "linear" and len(self.shape(step.inputs[0])) != 2
        pooled = step.op == "global_avg_pool" and not step.attributes["keepdim"]
        return by_rows or pooled or step.op in MOVES

    def pads_channels(self, step: Instruction) -> bool:
        """Whether a convolution of three channels is given a fourth, of zeros.

        ONNX Runtime copies pixels of four bytes, not of three, which makes the first layer of a
        network of images up to twice as fast; what it computes is the same.
        """
        weight = self.program.tensor(step, "weight")
        is_image = weight.dim() == 4 and weight.shape[1] == 3 and step.attributes["groups"] == 1
        return is_image and self.flavor is not Flavor.COMPACT and step.grid is not None

    def weight_codes(self, step: Instruction) -> Array:
        """The integer weights of a layer, ``[out, in/groups, ...]``, as they are stored."""
        codes: Array = self.program.tensor(step, "weight").numpy()
        if step.op != "conv" or not self.pads_channels(step):
            return codes
        return np.pad(codes, ((0, 0), (0, 1), (0, 0), (0, 0)))

    def packed(self, step: Instruction) -> Packed:
        """How the weights of a layer are stored."""
        if step.name not in self._packed:
            self._packed[step.name] = self._pack(step)
        return self._packed[step.name]

    def _pack(self, step: Instruction) -> Packed:
        codes = self.weight_codes(step)
        for bits in () if self.flavor is Flavor.FAST else self._sizes():
            form = levels_of(codes, bits) or table_of(codes, bits)
            if form is not None:
                return Packed(bits, form)
        return Packed(8, None)

    def _sizes(self) -> tuple[int, ...]:
        """How many bits packed types have, in this opset."""
        return (2, 4) if self.opset >= INT2_OPSET else (4,)

    # ---- from codes to floats and back -------------------------------------------------------

    def float_of(self, name: str) -> str:
        """The tensor with the float value of a register, dequantized where it holds codes."""
        if name not in self.floats:
            self.floats[name] = self.dequantized(self.codes[name], name, name)
        return self.floats[name]

    def dequantized(self, codes: str, register: str, output: str) -> str:
        """The float value of codes on the grid of a register."""
        return self.graph.node("DequantizeLinear", [codes, *self._parameters(register)], output)

    def _parameters(self, register: str) -> tuple[str, str]:
        """Scale and zero point of a register."""
        grid = self.grid(register)
        zero_point = np.array(grid.zero_point).astype(self.container(register).dtype)
        return (
            self.graph.constant(f"{register}.scale", np.array(grid.scale, np.float32)),
            self.graph.constant(f"{register}.zero_point", zero_point),
        )

    def quantize(
        self, step: Instruction, value: str, *, relu: bool = False, output: str = ""
    ) -> str:
        """The tensor with the codes of a float tensor, on the grid of an instruction.

        Saturation ends codes at 0 and at the largest the container holds. That is the grid's own
        end for 8 bits, and a ReLU's where zero is code 0; elsewhere a Clip does it, of the codes,
        so that the layer before still fuses with its QuantizeLinear.
        """
        grid, output = self.grid(step.name), output or f"{step.name}.codes"
        low = grid.zero_point if relu and grid.zero_point else None
        high = grid.top if grid.top < self.container(step.name).top else None
        if (low, high) == (None, None):
            return self._quantized(step, value, output)
        return self.clip(output, self._quantized(step, value, f"{output}.unclipped"), low, high)

    def _quantized(self, step: Instruction, value: str, output: str) -> str:
        return self.graph.node("QuantizeLinear", [value, *self._parameters(step.name)], output)

    def clip(self, output: str, codes: str, low: int | None, high: int | None) -> str:
        """Bytes between two bounds, either of which may be None."""
        ends = ["" if end is None else self.graph.scalar(end, np.uint8) for end in (low, high)]
        return self.graph.node("Clip", [codes, *ends], output)

    def pad(self, output: str, codes: str, pads: list[int], zero_point: int) -> str:
        """Bytes with zeros around them; all amounts before, by dimension, then all behind."""
        zero = self.graph.scalar(zero_point, np.uint8)
        return self.graph.node("Pad", [codes, self.graph.shape(pads), zero], output)

    def move(self, step: Instruction, operator: Callable[[list[str], str], str]) -> None:
        """The register holds the codes that ``operator(tensors, output)`` takes from its inputs."""
        codes = [self.codes[source] for source in step.inputs]
        self.codes[step.name] = operator(codes, f"{step.name}.codes")
