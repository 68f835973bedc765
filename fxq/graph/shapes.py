"""Running the example once: every node's facts carry the shape and dtype of its value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxq.errors import CaptureError
from fxq.graph.program import Program, layer_path, write_facts


class ShapeRun(fx.Interpreter):
    """Runs the example and writes each value's shape and dtype into its facts.

    Attributes:
        program: The program that is run.
        current: The node being run.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.extra_traceback = False
        self.program = program
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        self.current = n
        value = super().run_node(n)
        is_tensor = isinstance(value, torch.Tensor)
        write_facts(
            n,
            shape=tuple(value.shape) if is_tensor else None,
            dtype=value.dtype if is_tensor else None,
        )
        return value

    def run_example(self) -> None:
        """The example has been run, on copies of its tensors.

        Raises:
            CaptureError: The model fails on the example; the error names the node that failed.
        """
        inputs = self.program.example_inputs
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        try:
            with torch.no_grad():
                self.run(*copies)
        except CaptureError:
            raise
        except Exception as error:
            raise capture_error(
                f"the model fails on the example input: {_first_line(error)}",
                self.current,
                hint=f"the example has shapes {_shapes(inputs)}; give one batch of the shape and "
                "dtype the model expects",
            ) from error


def propagate_shapes(program: Program) -> None:
    """Every node's facts carry the shape and dtype of its value on the example input.

    Raises:
        CaptureError: The model fails on the example; the error names the node that failed.
    """
    ShapeRun(program).run_example()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def capture_error(what: str, node: fx.Node | None, hint: str) -> CaptureError:
    """A `CaptureError` about a node."""
    if node is None:
        return CaptureError(what, hint=hint)
    path = layer_path(node)
    place = f"%{node.name}" + (f" in {path}" if path != node.name else "")
    error = CaptureError(what, where=place, hint=hint)
    error.node = node.name
    return error


def _shapes(inputs: tuple[Any, ...]) -> str:
    shown = [
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else type(value).__name__
        for value in inputs
    ]
    return ", ".join(shown) or "none"
