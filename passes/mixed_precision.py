"""mixed-precision: each layer has the bits it needs, for the price of uniform ones.

Every layer's weights, and every value that layers multiply, are rounded alone to each width, and
the damage to the network's output is measured. The widths with the smallest sum of damages that
the budget pays for are found by integer programming, and written as per-layer options for the
quantize pass that follows.

Papers: Hubara, Nahshan, Hanani, Banner, Soudry, "Improving post training neural quantization:
layer-wise calibration and integer programming", arXiv:2006.10518 (the integer program). Yao, Dong,
Zheng, Gholami et al., "HAWQ-V3: Dyadic neural network quantization", ICML 2021, arXiv:2011.10680
(bit operations as the budget).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import fx

from fxq.contracts import Contract
from fxq.errors import SpecError
from fxq.graph.program import LayerOverride, Program
from fxq.graph.regions import Regions
from fxq.graph.rewrite import Editor
from fxq.numerics.budget import choose
from fxq.pipeline import Pass
from fxq.sensitivity import KeptRun

from .calibrate import SAMPLE_ELEMENTS
from .images import calibration_images
from .precision_parts import Cluster, Values, Weights, clusters_of


class Budget(StrEnum):
    """What is at most as large as with uniform bits."""

    SIZE = "size"
    BIT_OPERATIONS = "bit-operations"


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Layers have widths of their own, which together cost no more than uniform ones.

    The first layer and the last, and layers whose bits the recipe or the user gives, keep them and
    are left out of the budget. Layers that read the same value share its width.

    Args:
        budget: ``size``: weights, and values that layers read, have at most ``mean_bits`` bits on
            average; ``bit-operations``: multiply-adds times the bits of both factors are at most
            what they are with ``mean_bits`` for both.
        mean_bits: The uniform bits to match.
        choices: Widths to choose from, each 2 to 8 bits.
        activations: Whether the widths of values are chosen, too; else they are left as they are.
        images: How many calibration images to measure on at most; of large ones fewer.

    Raises:
        SpecError: Widths that do not exist, or a budget that not even the smallest fit in.
        CalibrationError: There is no calibration data, or the output is not finite on it.
    """

    name: ClassVar[str] = "mixed-precision"
    after: ClassVar[tuple[str, ...]] = ("calibrate",)
    contract: ClassVar[Contract] = Contract.ANNOTATES_ONLY

    budget: Budget = Budget.SIZE
    mean_bits: float = 4.0
    choices: tuple[int, ...] = (3, 4, 5, 6, 8)
    activations: bool = True
    images: int = 128

    def apply(self, program: Program, edit: Editor) -> None:
        """The widths are options of the layers, and have been told."""
        self._check_options()
        free, kept = _free_layers(program)
        if kept:
            edit.note(f"{kept} layers keep their bits: the first, the last, and where they are set")
        clusters = clusters_of(program, free, activations=self.activations)
        if not clusters:
            return
        inputs = calibration_images(program, self.images, elements=SAMPLE_ELEMENTS)
        self._measure(program, edit, KeptRun(program, inputs), clusters)
        self._choose(clusters)
        self._write(program, edit, clusters)
        self._tell(edit, clusters)

    def _check_options(self) -> None:
        widths = [bits for bits in self.choices if type(bits) is int and 2 <= bits <= 8]
        if not widths or len(set(widths)) < len(self.choices):
            raise SpecError(
                f"choices must be different widths of 2 to 8 bits, not {list(self.choices)}",
                where=self.name,
                hint="for example choices = [3, 4, 5, 6, 8]",
            )
        if not self.mean_bits >= min(widths):
            raise SpecError(
                f"no choice of widths is as small as {self.mean_bits:g} bits on average",
                where=f"{self.name}, choices {list(self.choices)}",
                hint=f"the smallest possible mean_bits is {min(widths)}; or add smaller choices",
            )
        if self.images < 1:
            raise SpecError(f"images must be at least 1, not {self.images}", where=self.name)

    def _measure(
        self, program: Program, edit: Editor, run: KeptRun, clusters: list[Cluster]
    ) -> None:
        """The damage of every part at every width is known."""
        parts = [part for cluster in clusters for part in cluster.parts]
        for done, part in enumerate(parts, 1):
            edit.current = part.nodes[0]
            part.losses = [run.damage(part.changes(run, bits)) for bits in self.choices]
            program.report_progress(self.name, done, len(parts))
        edit.current = None

    # ---- choosing ----------------------------------------------------------------------------

    def _choose(self, clusters: list[Cluster]) -> None:
        layers = _layers(clusters)
        if self.budget is Budget.SIZE:
            for layer, bits in zip(layers, self._shared([[one] for one in layers]), strict=True):
                layer.bits = bits
            reading = [cluster for cluster in clusters if cluster.values]
            widths = self._shared([cluster.values for cluster in reading])
            for cluster, bits in zip(reading, widths, strict=True):
                cluster.bits = bits
            return
        deals = [cluster.deals(self.choices, self.mean_bits) for cluster in clusters]
        found = choose(
            [[deal.cost for deal in row] for row in deals],
            [[deal.loss for deal in row] for row in deals],
            sum(layer.operations for layer in layers) * self.mean_bits**2,
        )
        for cluster, row, place in zip(clusters, deals, found, strict=True):
            cluster.take(row[place])

    def _shared(self, groups: Sequence[Sequence[Weights | Values]]) -> list[int]:
        """A width for each group of parts; all parts have `mean_bits` on average."""
        sizes = [sum(part.size for part in group) for group in groups]
        losses = [
            [math.fsum(row) for row in zip(*(part.losses for part in group), strict=True)]
            for group in groups
        ]
        costs = [[size * bits for bits in self.choices] for size in sizes]
        found = choose(costs, losses, sum(sizes) * self.mean_bits)
        return [self.choices[place] for place in found]

    # ---- telling -----------------------------------------------------------------------------

    def _write(self, program: Program, edit: Editor, clusters: list[Cluster]) -> None:
        """Overrides by node name, before those of the recipe and the user, which win."""
        decided = []
        for cluster in clusters:
            for layer in cluster.layers:
                options = {"weight_bits": layer.bits}
                if self.activations:
                    options["activation_bits"] = cluster.bits
                note = " ".join(f"{name[0]}{bits}" for name, bits in options.items())
                least = self.choices.index(min(self.choices))
                for node in layer.nodes:
                    decided.append(LayerOverride(node.name, options))
                    edit.write_facts(node, note=f"{note}, loses {layer.losses[least]:.0e}")
                    edit.hit(node)
        program.overrides = (*decided, *program.overrides)

    def _tell(self, edit: Editor, clusters: list[Cluster]) -> None:
        layers = _layers(clusters)
        edit.note(f"weights: {_told([(layer.bits, layer.size) for layer in layers])}")
        if self.activations:
            values = [(cluster.bits, v.size) for cluster in clusters for v in cluster.values]
            edit.note(f"values: {_told(values)}")
        if self.budget is Budget.BIT_OPERATIONS:
            spent = sum(
                layer.operations * layer.bits * (cluster.bits or self.mean_bits)
                for cluster in clusters
                for layer in cluster.layers
            )
            uniform = sum(layer.operations for layer in layers) * self.mean_bits**2
            edit.note(f"bit operations: {spent / uniform:.1%} of those at {self.mean_bits:g} bits")


def _free_layers(program: Program) -> tuple[list[fx.Node], int]:
    """The layers whose bits may be chosen, and how many keep theirs."""
    regions = Regions(program)
    edges: set[fx.Node] = set().union(*regions.first_and_last())
    anchors = regions.anchors()
    held = {str(node.target) for node in anchors if node in edges or _has_bits(program, node)}
    free = [node for node in anchors if str(node.target) not in held]
    return free, len(held)


def _has_bits(program: Program, node: fx.Node) -> bool:
    """Whether the recipe or the user gives a layer bits of its own."""
    return not {"weight_bits", "activation_bits"}.isdisjoint(program.layer_options(node))


def _layers(clusters: list[Cluster]) -> list[Weights]:
    return [layer for cluster in clusters for layer in cluster.layers]


def _told(bits_and_sizes: list[tuple[int, int]]) -> str:
    """How many parts have each width, and the mean over all they hold."""
    counts = sorted(Counter(bits for bits, _ in bits_and_sizes).items())
    mean = sum(b * size for b, size in bits_and_sizes) / sum(size for _, size in bits_and_sizes)
    widths = ", ".join(f"{count} of {bits} bits" for bits, count in counts)
    return f"{widths}; {mean:.2f} on average"
