"""``fxq verify``: the integer reference, the eager module and ONNX Runtime on the same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fxq.errors import DataError, FxqError, LoweringError, MismatchError

from .options import Engine, Flavor
from .verify_data import images_in, inputs_of, part
from .verify_runtimes import EXACT, RUNTIMES, Runtime, eager_module, open_run, own_engine, runtime

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fxq.artifact import Artifact
    from fxq.integer.comparison import Comparison
    from fxq.integer.differences import Agreement, Layer
    from fxq.integer.program import IntegerProgram
    from fxq.zoo_entry import Normalization

    from .verify_data import Inputs

LAYER_IMAGES = 8
"""Images whose every layer is compared, if not given."""
LAYER_BATCH = 4
"""Images whose registers are in memory at once."""


@dataclass(frozen=True)
class Request:
    """What ``fxq verify`` was asked for; the fields are its options."""

    run: str
    data: str | None = None
    images: int = 256
    layer_images: int | None = None
    batch_size: int = 64
    engine: Engine = EXACT
    flavor: Flavor | None = None
    runtimes: tuple[str, ...] = RUNTIMES
    normalization: Normalization | None = None
    everything: bool = False
    worst: int = 10
    as_json: bool = False

    @property
    def wanted(self) -> tuple[int, int]:
        """On how many images layers are compared, and on how many outputs."""
        layers = self.layer_images or min(LAYER_IMAGES, self.images)
        return layers, max(self.images, layers)


@dataclass
class Report:
    """What was found.

    Attributes:
        run: The run folder.
        source: What it was compared on.
        stand_in: The runtime that outputs are compared with, in place of the slow reference; empty
            where this build of torch does not have it, and outputs are not compared.
        layer_images: Images on which layers were compared.
        images: Images on which outputs were compared.
        layers: The layers of each runtime against the reference.
        outputs: The outputs of each runtime, over all images, by name.
        problems: What must not be, in sentences.
    """

    run: str
    source: str
    stand_in: str = ""
    layer_images: int = 0
    images: int = 0
    layers: list[tuple[Runtime, Comparison]] = field(default_factory=list)
    outputs: dict[str, Agreement] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def run(request: Request) -> None:
    """The runtimes are compared, and what was found is printed.

    Raises:
        MismatchError: A runtime differs where it must not.
    """
    from . import show, show_verify
    from .show_compile import Meter
    from .trail import run_folder

    folder = run_folder(request.run)
    artifact = open_run(folder, request.runtimes)
    inputs = inputs_of(
        artifact,
        request.data,
        limit=request.wanted[1],
        batch_size=request.batch_size,
        normalization=request.normalization,
    )
    if inputs.for_want:
        show.notice(
            "this run comes without data, so the inputs are random: its arithmetic can be "
            "verified on them, how often argmaxes agree on real images cannot; pass --data"
        )
    runtimes = [
        runtime(name, artifact, folder, request.engine, request.flavor) for name in request.runtimes
    ]
    with Meter() as meter:
        report = _compared(artifact, runtimes, inputs, request, meter)
    if request.as_json:
        show_verify.as_json(report)
    else:
        show_verify.report(report, everything=request.everything, worst=request.worst)
    if report.problems:
        raise MismatchError(
            "something differs from the integer reference that must not",
            where="\n        ".join(report.problems),
            hint="see above which layers introduce it, or --all; please report it with your CPU "
            "and the versions of torch and onnxruntime, and run what is exact here until then",
        )


# ---- comparing -------------------------------------------------------------------------------


def _compared(
    artifact: Artifact, runtimes: list[Runtime], inputs: Inputs, request: Request, meter: Any
) -> Report:
    report = Report(request.run, inputs.source)
    layers = _Layers(artifact.integers, runtimes, request)
    outputs = _Outputs(artifact, runtimes)
    for batch in inputs:
        layers.add(batch, meter)
        outputs.add(batch)
        report.images += images_in(batch)
        meter("outputs", report.images, inputs.limit)
    if not report.images:
        raise DataError("the data holds nothing to compare on", where=inputs.source)
    report.layer_images = layers.images
    report.layers = layers.found
    report.stand_in, report.outputs = outputs.stand_in, outputs.found
    report.problems = [text for one, found in layers.found for text in _wrong_layers(one, found)]
    report.problems += _disagreements(report)
    return report


@contextlib.contextmanager
def _explained(batch: tuple[Any, ...]) -> Iterator[None]:
    """What kernels raise on inputs that do not fit is told as that."""
    try:
        yield
    except FxqError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        if "not enough memory" in str(error):
            raise
        shapes = ", ".join(str(list(value.shape)) for value in batch)
        raise DataError(
            f"the program fails on these inputs: {str(error).partition(chr(10))[0]}",
            where=f"inputs of shape {shapes}",
            hint="give inputs of the example's shape; --batch-size 1 where the network's batch "
            "size was fixed when it was captured",
        ) from error


class _Layers:
    """Every layer of the runtimes against the reference, on the first images."""

    def __init__(self, program: IntegerProgram, runtimes: list[Runtime], request: Request) -> None:
        from fxq.integer.comparison import Comparison
        from fxq.integer.reference import Reference

        self.found = [(one, Comparison(program)) for one in runtimes]
        self.images = 0
        self._reference = Reference(program)
        self._wanted = request.wanted[0]
        self._batch_size = min(request.batch_size, LAYER_BATCH)

    def add(self, batch: tuple[Any, ...], meter: Any) -> None:
        """The images of a batch that are still wanted are compared, a few at a time."""
        count = min(images_in(batch), self._wanted - self.images)
        for start in range(0, count, self._batch_size):
            piece = part(batch, start, min(start + self._batch_size, count))
            with _explained(piece):
                _, expected = self._reference.run(*piece)
            for one, comparison in self.found:
                with _explained(piece):
                    registers = one.module.registers(*piece)
                comparison.add(piece, expected, registers)
            self.images += images_in(piece)
            meter("layers", self.images, self._wanted)


class _Outputs:
    """The outputs of all runtimes against those of the exact engine, on all images."""

    def __init__(self, artifact: Artifact, runtimes: list[Runtime]) -> None:
        from fxq.integer.differences import Agreement

        self.stand_in = f"eager {EXACT.value}"
        self._modules = {one.name: one.module for one in runtimes if one.name != self.stand_in}
        own = own_engine(artifact)
        if own not in (None, EXACT) and f"eager {own}" not in self._modules:
            self._modules[f"eager {own}, as compiled"] = artifact.module
        self.found = {name: Agreement() for name in self._modules}
        try:
            self._exact = eager_module(artifact, EXACT)
        except LoweringError:  # this build of torch has other engines only
            self._modules, self.found, self.stand_in = {}, {}, ""

    def add(self, batch: tuple[Any, ...]) -> None:
        """One more batch is compared."""
        import torch

        from fxq.integer.comparison import agreement

        if not self._modules:
            return
        with torch.no_grad(), _explained(batch):
            want = self._exact(*batch)
            have = {name: module(*batch) for name, module in self._modules.items()}
        for name, output in have.items():
            self.found[name] = self.found[name].merged(agreement(want, output))


# ---- the verdict -----------------------------------------------------------------------------


def _wrong_layers(one: Runtime, comparison: Comparison) -> list[str]:
    """What is wrong with the layers of a runtime that must be exact."""
    from . import show

    bound = [layer for layer in comparison.layers.values() if layer.kind in one.exact]
    wrong = worst_first(layer for layer in bound if layer.introduced)
    unseen = [layer for layer in bound if not layer.seen and layer.op in ("conv", "linear")]
    problems = []
    if wrong:
        count = sum(layer.introduced for layer in wrong)
        named = ", ".join(f"%{layer.name} ({layer.introduced})" for layer in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        problems.append(
            f"{one.name}: {count} elements differ from the reference in layers that must be "
            f"exact: {named}{more}"
        )
    if unseen:
        named = ", ".join(f"%{layer.name}" for layer in unseen[:3])
        problems.append(
            f"{one.name}: {show.plural(len(unseen), 'layer')} cannot be seen, such as {named}"
        )
    return problems


def worst_first(layers: Iterable[Layer]) -> list[Layer]:
    """Layers by what they introduced, then by what differs in them."""
    return sorted(layers, key=lambda layer: (-layer.introduced, -layer.differing))


def _disagreements(report: Report) -> list[str]:
    """Runtimes whose argmaxes agree with the reference less often than they must."""
    problems = []
    for one, comparison in report.layers:
        found = report.outputs.get(one.name, comparison.output)
        if one.threshold is None or found.share is None or found.share >= one.threshold:
            continue
        problems.append(
            f"{one.name}: {found.agreeing} of {found.decisions} argmaxes agree with the reference, "
            f"{100 * found.share:.2f} % where {100 * one.threshold:.1f} % must"
        )
    return problems
