"""How much a network's output suffers from changing one part of it.

The network is run in float once and every value is kept. To try a change, only the nodes that
depend on it are computed again. The losses of single changes are a guide to their loss together:
small independent errors add up to second order.

Papers:
    Dong, Yao, Arfeen, Gholami, Mahoney, Keutzer, "HAWQ-V2: Hessian aware trace-weighted
        quantization of neural networks", NeurIPS 2020, arXiv:1911.03852 (losses of layers add up).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxq.contracts import tensors_of
from fxq.errors import CalibrationError
from fxq.graph.program import Program
from fxq.quant.quantizers import float_counterpart

Change = Callable[..., Any]
"""What a node computes instead, from its arguments."""


class KeptRun(fx.Interpreter):
    """A network run in float, with the value of every node.

    A network that is quantized already is run as if it were not: its layers compute with their
    float weights, its quantizers pass values on.

    Args:
        program: The network.
        inputs: Its arguments, laid out for it.
    """

    def __init__(self, program: Program, inputs: tuple[Any, ...]) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self._program = program
        with torch.no_grad():
            self._reference = self.run(*inputs)
        self._values = dict(self.env)

    def run_node(self, n: fx.Node) -> Any:
        """The float value of a node, from the values it reads."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return self.compute(n, *args, **kwargs)

    def compute(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        """What a node computes in float from these arguments."""
        module = float_counterpart(self._program.submodule(node))
        if module is not None:
            return module(*args, **kwargs)
        return getattr(self, node.op)(node.target, args, kwargs)

    def value(self, wanted: fx.Node, changes: Mapping[fx.Node, Change]) -> Any:
        """The value of a node when these nodes compute something else."""
        self.env = dict(self._values)
        moved: set[fx.Node] = set()
        for node in self._program.graph.nodes:
            if node in changes or not moved.isdisjoint(node.all_input_nodes):
                args, kwargs = self.fetch_args_kwargs_from_env(node)
                compute = changes.get(node) or functools.partial(self.compute, node)
                with torch.no_grad():
                    self.env[node] = compute(*args, **kwargs)
                moved.add(node)
            if node is wanted:
                break
        return self.env[wanted]

    def damage(self, changes: Mapping[fx.Node, Change]) -> float:
        """By how much the output is worse when these nodes compute something else.

        Returns:
            `output_loss` against the float output.

        Raises:
            CalibrationError: The loss is not finite.
        """
        output = next(iter(reversed(self._program.graph.nodes)))
        value = self.value(output, changes)
        loss = 0.0 if value is self._values[output] else output_loss(self._reference, value)
        if not math.isfinite(loss):
            raise CalibrationError(
                "the network's output is not finite on the calibration images",
                where=", ".join(f"%{node.name}" for node in changes),
                hint="look for an overflow in the float model",
            )
        return loss


def output_loss(reference: Any, actual: Any) -> float:
    """How much worse an output is than the reference.

    Of logits ``[n, classes]``: the mean Kullback-Leibler divergence of the class probabilities, in
    nats. Of anything else: the squared error of all its tensors over their squared magnitude.

    Args:
        reference: A tensor, or tensors nested in tuples, lists and dicts.
        actual: The same structure.

    Example:
        >>> round(output_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])), 4)
        0.1201
        >>> round(output_loss(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 4)
        0.01
    """
    if isinstance(reference, torch.Tensor) and reference.dim() == 2 and reference.shape[1] > 1:
        return _divergence(reference.double(), actual.double())
    error = signal = 0.0
    for want, have in zip(tensors_of(reference), tensors_of(actual), strict=True):
        error += float((want.double() - have.double()).square().sum())
        signal += float(want.double().square().sum())
    return error / signal if signal else error


def _divergence(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """The mean over rows of ``sum p * (log p - log q)``, ``p`` and ``q`` the softmaxes."""
    want, have = reference.log_softmax(1), actual.log_softmax(1)
    terms = torch.where(want > -math.inf, want.exp() * (want - have), 0.0)
    return float(terms.sum(1).mean())
