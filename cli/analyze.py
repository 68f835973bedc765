"""``fxq analyze``: which passes and which layers cost a network how much, ranked.

What is finished is kept in ``analysis.json``, with what it depends on; a layer that is found there
is not measured again.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import ArtifactError, RecipeError

from .compile import calibration_for, compiled
from .max_drop import Quiet
from .options import default_folder
from .show_compile import Meter

if TYPE_CHECKING:
    from fxq.analysis import QuantLayer
    from fxq.compiler import Result
    from fxq.graph.program import Progress
    from fxq.measure import Metric
    from fxq.recipe import Recipe
    from fxq.zoo_entry import Normalization

    from .load import Subject
    from .score import Evaluation

FILE, ATTRIBUTION = "analysis.json", "attribution.json"

Figures = dict[str, Any]
"""What was measured of one layer."""


@dataclass(frozen=True)
class Request:
    """What ``fxq analyze`` was asked for; the fields are its options."""

    name: str
    recipe: str = "aciq-4bit"
    settings: list[str] = field(default_factory=list)
    weights: Path | None = None
    input_shape: tuple[int, ...] | None = None
    plugins: list[Path] = field(default_factory=list)
    leaves: list[str] = field(default_factory=list)
    calibration: str | None = None
    images: int | None = None
    evaluation: str | None = None
    eval_images: int | None = None
    batch_size: int = 64
    normalization: Normalization | None = None
    seed: int = 0
    sample: int = 32
    output: Path | None = None
    force: bool = False
    processes: int = 1
    threads: int | None = None


@dataclass(frozen=True)
class Lab:
    """A network that was compiled, and what it is measured with.

    Attributes:
        subject: The float network.
        result: Its compilation.
        batches: The inputs that SQNRs and errors are measured on.
        evaluation: How accuracy is measured; None where there is nothing to measure it with.
    """

    subject: Subject
    result: Result
    batches: list[Any]
    evaluation: Evaluation | None

    def metrics(self, progress: Progress) -> dict[str, Metric]:
        """What a layer is judged by."""
        from fxq.measure import OutputSqnr

        found: dict[str, Metric] = {"sqnr": OutputSqnr(self.subject.model.module, self.batches)}
        evaluation = self.evaluation
        if evaluation is not None:
            from .ablate import figure

            found["score"] = lambda module: figure(evaluation.measure(module, progress))
        return found


def run(request: Request) -> None:
    """Every pass and layer has been measured, told and written."""
    from fxq.analysis import quantized_layers
    from fxq.attribution import attribute, attribution_json

    from . import show, show_analyze

    request = of_run(request) if Path(request.name).is_dir() else request
    folder = request.output or _default_folder(request)
    with Meter() as meter:
        lab = opened(request, meter)
        record = Record.opened(folder / FILE, _inputs(request, lab), force=request.force)
        layers = quantized_layers(lab.result.program)
        missing = [layer for layer in layers if not record.has(layer.node)]
        known = (
            f", {len(layers) - len(missing)} of them known" if len(missing) < len(layers) else ""
        )
        show.line(
            f"{request.name}, recipe {request.recipe}: {show.plural(len(layers), 'layer')}{known}"
        )
        for done, (node, figures) in enumerate(_measured(request, lab, missing, meter), 1):
            record.add(node, figures)
            meter("layers", done, len(missing))
        errors = attribute(lab.result.program, lab.batches)
    attribution = attribution_json(lab.result.journal, errors)
    _write(folder / ATTRIBUTION, attribution)
    rows = show_analyze.rows_of(layers, record.runs, errors)
    show_analyze.write(rows, folder)
    source = None if lab.evaluation is None else lab.evaluation.source
    show_analyze.tell(rows, attribution["waterfall"], folder, request.sample, source)


# ---- what is measured --------------------------------------------------------------------------


def opened(request: Request, meter: Meter) -> Lab:
    """The network is compiled, and its data read.

    Raises:
        RecipeError: The recipe trains, or does not calibrate.
    """
    from . import score

    recipe = recipe_of(request)
    if recipe.training:
        raise RecipeError(
            f"{recipe.name} gives a network to be trained",
            hint="analyze a recipe without training, for example aciq-4bit",
        )
    subject = subject_of(request)
    evaluation = score.evaluation_of(
        subject, request.evaluation, limit=request.eval_images, batch_size=request.batch_size
    )
    data = calibration_data(request, recipe, subject)
    if data is None:
        raise RecipeError(f"{recipe.name} does not calibrate, so there is nothing to measure on")
    result = compiled(subject, recipe, data, leaves=request.leaves, reporter=Quiet(meter))
    count = len(subject.model.example_inputs)
    return Lab(subject, result, sample_of(data, count, request.sample), evaluation)


def recipe_of(request: Request) -> Recipe:
    """The recipe as asked for; plugins are loaded and threads set."""
    from fxq.recipe import Recipe

    from . import load

    load.load_plugins(request.plugins)
    load.set_threads(request.threads)
    return Recipe.load(request.recipe).with_settings(request.settings)


def subject_of(request: Request) -> Subject:
    """The network as asked for."""
    from .load import load_subject

    return load_subject(
        request.name,
        weights=request.weights,
        input_shape=request.input_shape,
        normalization=request.normalization,
        seed=request.seed,
    )


def calibration_data(request: Request, recipe: Recipe, subject: Subject) -> Iterable[Any] | None:
    """The batches a recipe calibrates on, to be read repeatedly; None where it does not."""
    found = calibration_for(
        recipe,
        subject,
        request.calibration,
        images=request.images,
        batch_size=request.batch_size,
        seed=request.seed,
    )
    if found is None:
        return None
    return found.data if isinstance(found.data, Sized) else list(found.data)


def sample_of(data: Iterable[Any], arguments: int, limit: int) -> list[Any]:
    """The first inputs of calibration data, in batches small enough to keep every value of.

    Args:
        data: Batches.
        arguments: How many inputs the network takes.
        limit: How many samples are taken.
    """
    import torch

    from fxq.compiler import PROBE_ELEMENTS

    found: list[Any] = []
    left = limit
    for batch in data:
        inputs = tuple(batch[:arguments]) if isinstance(batch, (tuple, list)) else (batch,)
        tensors = [one for one in inputs if isinstance(one, torch.Tensor) and one.dim()]
        size = len(tensors[0]) if tensors else 1
        step = max(1, PROBE_ELEMENTS * size // max(1, sum(one.numel() for one in tensors)))
        for start in range(0, min(size, left), step):
            end = min(size, left, start + step)
            found.append(tuple(_cut(one, start, end, size) for one in inputs))
        left -= size
        if left <= 0:
            break
    return found


def _cut(value: Any, start: int, end: int, size: int) -> Any:
    whole = getattr(value, "shape", ())[:1] != (size,)
    return value if whole else value[start:end]


def _measured(
    request: Request, lab: Lab, layers: Sequence[QuantLayer], meter: Meter
) -> Iterator[tuple[str, Figures]]:
    """The figures of layers, as they come."""
    if request.processes == 1 or len(layers) < 2:
        yield from figures_of(lab, [layer.node for layer in layers], Quiet(meter))
        return
    count = min(request.processes, len(layers))
    shares = [[layer.node for layer in layers[place::count]] for place in range(count)]
    request = replace(request, threads=request.threads or 1)
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's thread pools
    with context.Pool(count) as pool:
        jobs = zip(itertools.repeat(request), shares, strict=False)
        for found in pool.imap_unordered(_work, jobs):
            yield from found


def _work(job: tuple[Request, list[str]]) -> list[tuple[str, Figures]]:
    """What a worker does: it compiles anew, which gives the same bits, and measures its share."""
    request, nodes = job
    with Meter() as meter:
        return list(figures_of(opened(request, meter), nodes, Quiet(meter)))


def figures_of(lab: Lab, nodes: Sequence[str], progress: Progress) -> Iterator[tuple[str, Figures]]:
    """The figures of layers, one by one."""
    from fxq.analysis import distribution_errors, plain, quantized_layers, sensitivity
    from fxq.sensitivity import KeptRun

    program = lab.result.program
    metrics = lab.metrics(progress)
    kept = KeptRun(program, program.laid_out(lab.batches[0]))
    for layer in quantized_layers(program):
        if layer.node in nodes:
            found = sensitivity(program, layer, metrics)
            found |= distribution_errors(program, layer, kept)
            about = {"path": layer.path, "bits": layer.bits}
            yield layer.node, {"layer": about, **plain(found)}


# ---- runs --------------------------------------------------------------------------------------


def of_run(request: Request) -> Request:
    """The request for the network and recipe of a run, whose folder the results go to.

    Raises:
        ArtifactError: The folder is no run, or does not say what network it is of.
    """
    from fxq.zoo_entry import Normalization

    from .trail import run_folder

    folder = run_folder(request.name)
    try:
        about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["model"]
        weights = Path(about["weights"])
        known = Normalization(tuple(about["mean"]), tuple(about["std"])) if about["mean"] else None
        shape = tuple(int(size) for size in about["input_shape"]) or None
        return replace(
            request,
            name=str(about["spec"]),
            recipe=str(folder / "recipe.toml"),
            weights=request.weights or (weights if weights.is_file() else None),
            input_shape=request.input_shape or shape,
            calibration=request.calibration or _given(about.get("calibrated")),
            images=request.images or about.get("images"),
            evaluation=request.evaluation or _given(about["data"]),
            normalization=request.normalization or known,
            seed=int(about["seed"]),
            output=request.output or folder,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            "the run does not say what network it is of",
            where=str(folder),
            hint="name the network instead: fxq analyze MODEL --recipe RUN/recipe.toml",
        ) from error


def _given(name: str | None) -> str | None:
    """Data that a run names, where it is to be had by that name; else a network brings its own."""
    return name if name and (name == "random" or Path(name).exists()) else None


def _default_folder(request: Request) -> Path:
    path, _, name = request.name.partition(":")
    short = f"{Path(path).stem}-{name}".strip("-") if path.endswith(".py") else name or path
    return Path("analyses") / default_folder(short, Path(request.recipe).stem).name


# ---- what is known already ---------------------------------------------------------------------


def _inputs(request: Request, lab: Lab) -> dict[str, Any]:
    """What every figure depends on."""
    from fxq.workspace import digest

    evaluation = lab.evaluation
    return {
        "fxq": version("fxq"),
        "model": request.name,
        "weights": digest(lab.subject.model.module.state_dict()),
        "recipe": lab.result.recipe.to_toml(),
        "calibration": digest(lab.batches, request.images, request.batch_size, request.seed),
        "evaluation": evaluation and [evaluation.source, request.eval_images],
    }


class Record:
    """The layers that are finished, in a file that is whole at every moment.

    Attributes:
        runs: What was measured, by layer.
    """

    def __init__(self, path: Path, inputs: dict[str, Any], runs: dict[str, Figures]) -> None:
        self._path, self._inputs, self.runs = path, inputs, runs

    @classmethod
    def opened(cls, path: Path, inputs: dict[str, Any], *, force: bool) -> Record:
        """The record at a path; empty where there is none, or it is to be replaced.

        Raises:
            ArtifactError: It is of something else, or damaged.
        """
        if force or not path.exists():
            return cls(path, inputs, {})
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            runs = {str(key): dict(value) for key, value in data["layers"].items()}
            differing = [name for name in inputs if inputs[name] != data["inputs"].get(name)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"the analysis cannot be read: {error}",
                where=str(path),
                hint="begin anew with --force",
            ) from error
        if differing:
            raise ArtifactError(
                f"the folder holds an analysis with another {', '.join(differing)}",
                where=str(path.parent),
                hint="choose another folder with --output, or begin anew with --force",
            )
        return cls(path, inputs, runs)

    def has(self, node: str) -> bool:
        """Whether a layer is finished."""
        return node in self.runs

    def add(self, node: str, figures: Figures) -> None:
        """A layer is finished, and the file says so."""
        self.runs[node] = figures
        _write(self._path, {"inputs": self._inputs, "layers": self.runs})


def _write(path: Path, data: Any) -> None:
    """The file holds the data, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
