"""Where a runtime leaves the integer reference: the elements that differ, layer by layer.

The reference runs freely on the same inputs, which gives the elements that differ in all. It also
computes each layer from the runtime's *own* registers, which gives the elements that this layer
introduced: a layer is blamed for its own arithmetic, never for what came before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fxq.errors import MismatchError
from fxq.integer.arguments import registers_in, substitute
from fxq.integer.differences import Agreement, Layer, kind_of
from fxq.integer.program import Instruction, IntegerProgram
from fxq.integer.reference import Reference


def agreement(want: Any, have: Any) -> Agreement:
    """How the outputs of two networks on the same batch compare, by the first tensor in each.

    Raises:
        MismatchError: They are of different shapes.

    Example:
        >>> want = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> found = agreement(want, torch.tensor([[3.0, 2.0], [3.0, 2.0]]))
        >>> found.agreeing, found.decisions, found.largest
        (1, 2, 3.0)
    """
    first, second = _first_tensor(want), _first_tensor(have)
    if first is None or second is None:
        return Agreement()
    _check_shape(first, second, "the output")
    _, largest = _difference(first, second)
    images = len(first) if first.dim() else 1
    choices = first.dim() >= 2 and first.shape[1] > 1 and first.numel() > 0
    equal = (first.argmax(1) == second.argmax(1)) if choices else torch.empty(0)
    return Agreement(images, equal.numel(), int(equal.sum()), largest, _magnitude(first))


class Comparison:
    """Compares one runtime with the reference, batch by batch; keeps counts and no tensors.

    Args:
        program: The program that both run.

    Attributes:
        layers: One record per instruction that writes a tensor, by register, in execution order.
        output: How the outputs compare.
    """

    def __init__(self, program: IntegerProgram) -> None:
        self.layers: dict[str, Layer] = {}
        self.output = Agreement()
        self._program = program
        self._grids = program.grids()
        self._reference = Reference(program)
        self._finished = _last_reads(program)

    def add(
        self, inputs: tuple[torch.Tensor, ...], expected: dict[str, Any], registers: dict[str, Any]
    ) -> None:
        """One more batch is counted.

        Args:
            inputs: The inputs of the program.
            expected: Every register of the free-running reference, as `Reference.run` gives them.
            registers: The registers that the runtime shows: codes as integers, floats as floats.
                What it does not show is computed by the reference from what it does.

        Raises:
            MismatchError: A register of the runtime has another shape than the reference's.
        """
        own: dict[str, Any] = dict(zip(self._program.inputs, inputs, strict=True))
        same = set(self._program.inputs)
        output = set(registers_in(self._program.output))
        for step in self._program:
            want = expected[step.name]
            exact = want if same.issuperset(step.reads) else self._reference.step(step, own)
            seen = step.name in registers
            have = _like(want, registers[step.name], step.name) if seen else exact
            self._count(step, want, exact, have, seen=seen)
            if _equal(want, have):
                same.add(step.name)
                have = want  # shares memory, and the layout in which float islands sum
            own[step.name] = have
            for name in self._finished[step.name] - output:
                del own[name]
        found = substitute(self._program.output, own)
        self.output = self.output.merged(
            agreement(substitute(self._program.output, expected), found)
        )

    def _count(self, step: Instruction, want: Any, exact: Any, have: Any, *, seen: bool) -> None:
        if not isinstance(want, torch.Tensor):
            return
        kind = kind_of(step, self._grids)
        blank = Layer(step.name, step.op, kind, step.sources, step.grid is not None, seen)
        found = _measured(blank, want, exact, have) if seen else blank
        known = self.layers.get(step.name)
        self.layers[step.name] = found if known is None else known.merged(found)


def _measured(blank: Layer, want: torch.Tensor, exact: torch.Tensor, have: torch.Tensor) -> Layer:
    differs, largest = _difference(want, have)
    own, largest_own = (differs, largest) if exact is want else _difference(exact, have)
    return replace(
        blank,
        elements=want.numel(),
        differing=int(differs.sum()),
        introduced=int(own.sum()),
        inherited=int((differs & ~own).sum()),
        largest=largest,
        largest_introduced=largest_own,
        magnitude=_magnitude(want),
    )


# ---- tensors ---------------------------------------------------------------------------------


def _difference(want: torch.Tensor, have: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Which elements are not the same number, and by how much at most; NaN is the same as NaN."""
    differs = want != have
    if want.is_floating_point():
        differs &= ~(want.isnan() & have.isnan())
    if not bool(differs.any()):
        return differs, 0.0
    apart = (_wide(want)[differs] - _wide(have)[differs]).abs()
    return differs, float(apart.nan_to_num(nan=torch.inf).max())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_complex() else tensor.double()


def _magnitude(tensor: torch.Tensor) -> float:
    finite = _wide(tensor).abs().nan_to_num(nan=0.0, posinf=0.0)
    return float(finite.max()) if tensor.numel() else 0.0


def _like(want: Any, have: Any, name: str) -> Any:
    """A register of a runtime in the dtype the reference holds it in."""
    if isinstance(want, torch.Tensor):
        _check_shape(want, have, f"%{name}")
        return have.to(want.dtype)
    if isinstance(want, (tuple, list)):
        return type(want)([_like(*pair, name) for pair in zip(want, have, strict=True)])
    return have


def _check_shape(want: torch.Tensor, have: torch.Tensor, what: str) -> None:
    if want.shape != have.shape:
        raise MismatchError(
            f"{what} has the shape {list(have.shape)}, in the reference {list(want.shape)}",
            hint="please report this with the network: it is a defect of the backend",
        )


def _equal(want: Any, have: Any) -> bool:
    if isinstance(want, torch.Tensor):
        return want is have or not bool(_difference(want, have)[0].any())
    if isinstance(want, (tuple, list)):
        return all(_equal(*pair) for pair in zip(want, have, strict=True))
    return bool(want == have)


def _first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    items = value if isinstance(value, (list, tuple)) else ()
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)


def _last_reads(program: IntegerProgram) -> dict[str, set[str]]:
    """The registers that each instruction is the last to need; its own where nothing reads it."""
    last = {name: step.name for step in program for name in (step.name, *step.reads)}
    finished: dict[str, set[str]] = {step.name: set() for step in program}
    for name, reader in last.items():
        finished[reader].add(name)
    return finished
