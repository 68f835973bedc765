"""``fxq bench``: networks side by side, in one process, in interleaved rounds.

Each round runs every contender in turn, so that whatever else the machine does falls on all of
them. Ratios are taken within a round; their median and range over the rounds are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import ArtifactError, FxqError

from .options import Engine

if TYPE_CHECKING:
    from torch import nn

    from .load import Subject

FLOAT, TORCH_AO, ONNXRUNTIME = "float", "torch.ao", "onnxruntime"
WARM_UP = 3
MINIMUM_SECONDS = 0.02
"""A contender runs as often per round as fills this time, so that the clock does not show."""


@dataclass(frozen=True)
class Request:
    """What ``fxq bench`` was asked for; the fields are its options."""

    name: str
    recipes: list[str]
    against: list[str]
    batch: int = 8
    threads: int | None = None
    rounds: int = 15
    engine: Engine | None = None
    weights: Path | None = None
    input_shape: tuple[int, ...] | None = None
    calibration: str | None = None
    images: int = 32
    model: str | None = None
    seed: int = 0
    backends: list[str] = field(default_factory=lambda: ["eager"])
    plugins: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Contender:
    """A network that is timed.

    Attributes:
        name: For people.
        module: The network.
        peer: Whether it is what the others are compared with.
    """

    name: str
    module: nn.Module
    peer: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds per batch of one contender, round by round."""

    name: str
    seconds: tuple[float, ...]
    peer: bool = False

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contender is than another, within the same rounds."""

    median: float
    low: float
    high: float


def ratio(of: Timing, to: Timing) -> Ratio:
    """How many times faster ``of`` is than ``to``.

    Example:
        >>> ratio(Timing("a", (1.0, 1.0)), Timing("b", (2.0, 3.0)))
        Ratio(median=2.5, low=2.0, high=3.0)
    """
    each = [theirs / ours for ours, theirs in zip(of.seconds, to.seconds, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def run(request: Request) -> None:
    """The contenders are timed and compared."""
    import torch

    from . import show_bench
    from .load import load_plugins, set_threads
    from .show_compile import Meter

    load_plugins(request.plugins)
    set_threads(request.threads)
    shape, contenders = _contenders(request)
    batch = torch.randn(
        request.batch, *shape[1:], generator=torch.Generator().manual_seed(request.seed)
    )
    with Meter() as meter:
        timings = interleaved(contenders, batch, request.rounds, meter)
    show_bench.timings(timings, shape=tuple(batch.shape), rounds=request.rounds)


def interleaved(
    contenders: list[Contender],
    batch: Any,
    rounds: int,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> list[Timing]:
    """The contenders' timings: a warm-up, then rounds in the order A B C A B C."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        repeats = [_repeats(one.module, batch) for one in contenders]
        measured: list[list[float]] = [[] for _ in contenders]
        for position in range(rounds):
            for one, count, seconds in zip(contenders, repeats, measured, strict=True):
                seconds.append(_seconds(one.module, batch, count))
            if progress is not None:
                progress("bench", position + 1, rounds)
    pairs = zip(contenders, measured, strict=True)
    return [Timing(one.name, tuple(seconds), one.peer) for one, seconds in pairs]


def _repeats(module: nn.Module, batch: Any) -> int:
    _seconds(module, batch, WARM_UP)
    once = _seconds(module, batch, 1)
    return max(1, round(MINIMUM_SECONDS / max(once, 1e-6)))


def _seconds(module: nn.Module, batch: Any, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        module(batch)
    return (time.perf_counter() - start) / count


# ---- who takes part ----------------------------------------------------------------------------


def _contenders(request: Request) -> tuple[tuple[int, ...], list[Contender]]:
    """The shape of one input batch, and the networks: subjects first, then what they meet."""
    from .trail import is_run

    if is_run(request.name) or Path(request.name).is_dir():
        return _of_run(request)
    return _of_model(request)


def _of_run(request: Request) -> tuple[tuple[int, ...], list[Contender]]:
    artifact = _artifact(request.name, request.engine)
    about = artifact.metadata.get("model") or {}
    shape = request.input_shape or tuple(about.get("input_shape") or ())
    if not shape:
        raise ArtifactError(
            "the run does not say the shape of its input",
            where=request.name,
            hint="pass --input-shape 1,3,224,224",
        )
    subject = None
    if {FLOAT, TORCH_AO, ONNXRUNTIME} & set(request.against):
        subject = _original(request, about)
    engine = request.engine or _engine_of(artifact)
    own = [Contender(_label(request.name), artifact.module)]
    return shape, own + _peers(request, subject, engine)


def _engine_of(artifact: Any) -> Engine:
    """The engine a run was compiled for; the default where its backend has none."""
    name = artifact.metadata.get("engine")
    return Engine(name) if name in list(Engine) else Engine.FBGEMM


def _label(run: str) -> str:
    return Path(run).name or run


def _artifact(name: str, engine: Engine | None) -> Any:
    from fxq.artifact import load

    from .trail import run_folder

    return load(run_folder(name), engine.value if engine else None)


def _original(request: Request, about: dict[str, Any]) -> Subject:
    """The float network a run was compiled from; a file of the user's is loaded only by request."""
    from .load import load_subject

    spec = request.model or str(about.get("spec", ""))
    if request.model is None and (not spec or ":" in spec or spec.endswith(".py")):
        raise FxqError(
            "the float network of this run is in a Python file, which fxq does not run unasked",
            where=spec or request.name,
            hint=f"pass --model {spec or 'model.py'}, or compare with other runs: --against RUN",
        )
    return load_subject(
        spec, weights=request.weights, input_shape=request.input_shape, seed=request.seed
    )


def _of_model(request: Request) -> tuple[tuple[int, ...], list[Contender]]:
    from fxq.recipe import Recipe

    from . import show
    from .compile import backend_options, compiled
    from .load import load_subject

    recipes = [Recipe.load(name) for name in request.recipes]
    subject = load_subject(
        request.name,
        weights=request.weights,
        input_shape=request.input_shape,
        seed=request.seed,
    )
    engine = request.engine or Engine.FBGEMM
    source, batches = calibration_batches(request, subject)
    own = []
    for recipe in recipes:
        show.notice(f"compiling {recipe.name}, calibrated on {source}")
        for backend in request.backends:
            options = backend_options(engine) if backend == "eager" else {}
            result = compiled(subject, recipe, batches, backend=backend, options=options)
            own.append(Contender(_contender_name(request, recipe.name, backend), result.module))
    return subject.shape, own + _peers(request, subject, engine)


def _contender_name(request: Request, recipe: str, backend: str) -> str:
    return recipe if request.backends == ["eager"] else f"{recipe} on {backend}"


def calibration_batches(request: Request, subject: Subject) -> tuple[str, list[Any]]:
    """Where the calibration batches come from, and the batches in memory, the same for everyone."""
    from .load import RANDOM, calibration_of

    if len(subject.model.example_inputs) != 1 or len(subject.shape) < 2:
        raise FxqError(
            "fxq bench needs a network with one tensor as its input", where=subject.model.spec
        )
    brings_own = subject.builtin or subject.model.calibration_data is not None
    data = calibration_of(
        subject,
        request.calibration or (None if brings_own else RANDOM),
        images=request.images,
        batch_size=request.batch,
        seed=request.seed,
    )
    return data.source, list(data)


def _peers(request: Request, subject: Subject | None, engine: Engine) -> list[Contender]:
    """What the subjects are compared with, in the order the user named it."""
    return [_peer(name, request, subject, engine) for name in request.against]


def _peer(name: str, request: Request, subject: Subject | None, engine: Engine) -> Contender:
    from . import show

    if name not in (FLOAT, TORCH_AO, ONNXRUNTIME):
        return Contender(_label(name), _artifact(name, request.engine).module, peer=True)
    if subject is None:
        raise FxqError(f"{name} needs the float network", hint="pass --model")
    if name == FLOAT:
        return Contender(FLOAT, subject.model.module, peer=True)
    from .bench_onnxruntime import onnxruntime_int8
    from .bench_peers import torch_ao_int8

    show.notice(f"quantizing with {name}")
    _, batches = calibration_batches(request, subject)
    network = (subject.model.module, subject.model.example_inputs, batches)
    quantized = (
        onnxruntime_int8(*network) if name == ONNXRUNTIME else torch_ao_int8(*network, engine.value)
    )
    return Contender(name, quantized, peer=True)
