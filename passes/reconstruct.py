"""reconstruct: weights, scales and biases are trained until the integers do what the floats did.

No labels are needed: the float network is the teacher. Everything that integer kernels leave free
is trained together by gradient descent with straight-through rounding: which code each weight has,
the scale of every output channel, every bias, and the scales of the activations of fewer than 8
bits. What comes out is again codes and scales, nothing that integers could not express.

With ``scope = "network"`` the whole network follows its teacher's outputs, and its values at the
cut points (the outputs of blocks) on the way. With ``scope = "block"`` each block follows its own
output alone, with the quantized blocks before it as they are.

Papers:
    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv:1503.02531.
    Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu, "BRECQ: pushing the limit of post-training
        quantization by block reconstruction", ICLR 2021, arXiv:2102.05426 (blocks).
    Finkelstein, Fuchs, Tal, Grobman, Vosco, Meller, "QFT: post-training quantization via fast joint
        finetuning of all degrees of freedom", arXiv:2212.02634 (training them together).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxq.calibration import is_batch_of
from fxq.contracts import Contract
from fxq.errors import SpecError
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor
from fxq.pipeline import Pass
from fxq.quant.augment import Augmentation, augmented
from fxq.workspace import Checkpoint

from .distillation import TeacherAndStudent
from .images import calibration_images
from .settling import settle_sums

BATCH_ELEMENTS = 16 * 3 * 224 * 224
"""Input elements per batch at most: 16 photographs of 224 x 224 pixels."""

WARM_UP = 20
"""Iterations over which the learning rates rise; Adam's first steps are as long as its largest."""


class Scope(StrEnum):
    """What follows the teacher as one: each block its own output, or the network all of them."""

    BLOCK = "block"
    NETWORK = "network"


@dataclass(frozen=True)
class Reconstruct(Pass):
    """The quantized network has been trained to follow the float network on calibration images.

    Zero points, bits and 8-bit scales of activations stay. Codes of fewer than 8 bits use their
    full range, ``-2**(bits-1) .. 2**(bits-1)-1``. A layer whose codes are no rounding of its
    weights keeps them, and is named.

    Args:
        scope: What follows the teacher as one.
        images: How many calibration images at most.
        iterations: Steps of Adam; the learning rates fall to zero along a cosine.
        batch_size: Images per step; fewer where they are large.
        learning_rate: Of the weights, in codes per step.
        scale_learning_rate: Of the activations' scales, as a share of the scale.
        weight_scale_learning_rate: Of the weights' scales, as a share of the scale.
        bias_learning_rate: Of the biases, in standard deviations of the layer's output.
        temperature: Of the outputs of a classifier.
        feature_weight: Weight of the blocks' outputs, against one for the network's.
        augmentation: What is done to the images at random.
        seed: For batches and augmentation.

    Raises:
        SpecError: An option is out of range.
        CalibrationError: There is no calibration data.
    """

    name: ClassVar[str] = "reconstruct"
    after: ClassVar[tuple[str, ...]] = ("calibrate",)
    contract: ClassVar[Contract] = Contract.CHANGES_NUMBERS
    resumable: ClassVar[bool] = True

    scope: Scope = Scope.NETWORK
    images: int = 1024
    iterations: int = 2400
    batch_size: int = 64
    learning_rate: float = 0.004
    scale_learning_rate: float = 0.002
    weight_scale_learning_rate: float = 0.001
    bias_learning_rate: float = 0.0002
    temperature: float = 4.0
    feature_weight: float = 3.0
    augmentation: Augmentation = Augmentation.FLIP_SHIFT
    seed: int = 0

    def apply(self, program: Program, edit: Editor) -> None:
        """The trained codes and scales are in the program."""
        inputs = calibration_images(program, self.images)
        pair = TeacherAndStudent(program, edit, blocks=self.scope is Scope.BLOCK)
        if not pair.layers:
            edit.note("nothing to train: no layer is quantized")
            return
        losses = self._train(program, edit, pair, inputs)
        pair.freeze(program, edit)
        settle_sums(program, edit)
        few = max(1, min(WARM_UP, len(losses) // 2))
        first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
        edit.note(f"loss {first:.4g} -> {last:.4g} in {self.iterations} steps")

    def _train(
        self, program: Program, edit: Editor, pair: TeacherAndStudent, inputs: tuple[Any, ...]
    ) -> list[float]:
        """The student has learned; returns the loss of every step."""
        checkpoint = Checkpoint(program, edit, self.options(), inputs)
        draw = _Batches(inputs, self.batch_size, self.augmentation, self.seed)
        pair.measure_units(draw())
        training = _Training(torch.optim.Adam(self._groups(pair)), draw.generator)
        training.restore(checkpoint.load())
        begin = len(training.losses)
        if begin:
            edit.note(f"continued at step {begin} of {self.iterations}")
        with checkpoint.keeping(training.state) as keep_if_due:
            for step in range(begin, self.iterations):
                with torch.enable_grad():
                    loss = pair.loss(draw(), self.temperature, self.feature_weight)
                training.descend(loss, self._rate(step))
                program.report_progress(self.name, step + 1, self.iterations)
                keep_if_due()
        return training.losses

    def _groups(self, pair: TeacherAndStudent) -> list[dict[str, Any]]:
        layers, quantizers = pair.layers.values(), pair.quantizers.values()
        return [
            {"params": [one.steps for one in layers], "lr": self.learning_rate},
            {"params": [one.log_scale for one in layers], "lr": self.weight_scale_learning_rate},
            {"params": [one.shift for one in layers], "lr": self.bias_learning_rate},
            {"params": [one.log_scale for one in quantizers], "lr": self.scale_learning_rate},
        ]

    def _rate(self, step: int) -> float:
        """The share of the learning rates that a step takes."""
        rising = min(1.0, (step + 1) / WARM_UP)
        return rising * 0.5 * (1 + math.cos(math.pi * step / self.iterations))

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything runs."""
        for name in ("images", "iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be at least 1", where=self.name)
        rates = [name for name in self.options() if name.endswith("learning_rate")]
        for name in (*rates, "feature_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SpecError(f"{name} must be a number from 0", where=self.name)
        if not 0 < self.temperature < math.inf:
            raise SpecError("temperature must be above 0", where=self.name)


class _Training:
    """Steps of an optimizer, and everything that the next one depends on.

    Args:
        optimizer: Adam, before its first step; its learning rates are the highest.
        generator: What batches are drawn with.

    Attributes:
        losses: The loss of every step that was taken.
    """

    def __init__(self, optimizer: torch.optim.Adam, generator: torch.Generator) -> None:
        self.losses: list[float] = []
        self._optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._parameters = [one for group in optimizer.param_groups for one in group["params"]]
        self._generator = generator
        self._drawn = generator.get_state()  # of the steps taken; the next may have begun to draw
        self._is_whole = True

    def descend(self, loss: Tensor, share: float) -> None:
        """A step has been taken down the gradient, with a share of the learning rates."""
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._is_whole = False
        self._optimizer.step()
        self.losses.append(float(loss.detach()))
        self._drawn = self._generator.get_state()
        self._is_whole = True

    def state(self) -> dict[str, Tensor]:
        """By name; nothing before the first step, or where an interruption came inside of one."""
        if not self._is_whole or not self.losses:
            return {}
        state = {"losses": torch.tensor(self.losses, dtype=torch.float64), "drawn": self._drawn}
        for position, parameter in enumerate(self._parameters):
            state[f"{position}"] = parameter
            for name, value in self._optimizer.state[parameter].items():
                state[f"{position}.{name}"] = value
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The training is where it was when this was its state; nothing, for an empty one."""
        if not state:
            return
        self.losses = state["losses"].tolist()
        self._drawn = state["drawn"]
        self._generator.set_state(self._drawn)
        for position, parameter in enumerate(self._parameters):
            parameter.copy_(state[f"{position}"])
            known = self._optimizer.state[parameter]
            for name in ("step", "exp_avg", "exp_avg_sq"):
                value = state.get(f"{position}.{name}")
                if value is not None:  # in the parameter's layout, as Adam makes it
                    known[name] = torch.empty_like(parameter).copy_(value) if value.dim() else value


class _Batches:
    """Random batches of the calibration images, the same for the same seed."""

    def __init__(
        self, inputs: tuple[Any, ...], batch_size: int, how: Augmentation, seed: int
    ) -> None:
        self._inputs = inputs
        self._how = how
        self.generator = torch.Generator().manual_seed(seed)
        first = inputs[0]
        self._images = len(first)
        room = BATCH_ELEMENTS * self._images // max(1, first.numel())
        self._size = max(1, min(batch_size, room, self._images))

    def __call__(self) -> tuple[Any, ...]:
        """The next batch; what is no batch (a mask for all images) comes as it is."""
        chosen = torch.randint(self._images, (self._size,), generator=self.generator)
        return tuple(self._drawn(value, chosen) for value in self._inputs)

    def _drawn(self, value: Any, chosen: Tensor) -> Any:
        if not is_batch_of(value, self._images):
            return value
        return augmented(value[chosen], self._how, self.generator)
