"""`compile`: a model, a recipe and data in; a module on integer kernels and its record out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxq.artifact import Artifact
from fxq.calibration import CalibrationData, on_cpu
from fxq.contracts import output_drift
from fxq.errors import FxqError, LoweringError, RecipeError
from fxq.graph.capture import ExampleInputs, as_inputs, capture
from fxq.graph.program import Program, Progress
from fxq.pipeline import Pass, Pipeline
from fxq.quant.learned import Learned
from fxq.recipe import Recipe
from fxq.registry import find_backend, find_pass
from fxq.trail.drift import Drift
from fxq.trail.journal import Journal, Step
from fxq.trainable import TrainingModule, program_of, unwrapped
from fxq.workspace import open_workspace
from fxq.world import World

PROBE_SIZE = 4
"""How many calibration images the probe batch holds at most."""

PROBE_ELEMENTS = 2**18
"""How many elements: one photograph of 224 x 224 pixels, four small images."""


@dataclass(frozen=True)
class Result:
    """What a compilation gives.

    Attributes:
        program: The program after the last pass; running it simulates the integers in float.
        journal: What each pass did.
        recipe: The recipe that was run, with its settings.
        seconds: How long it took.
        lowered: The lowered module; None where it is to be trained first.
        trainable: What is to be trained, where the recipe trains.
    """

    program: Program
    journal: Journal
    recipe: Recipe
    seconds: float
    lowered: Artifact | None = None
    trainable: TrainingModule | None = None

    @property
    def module(self) -> nn.Module:
        """The module that runs on integer kernels; that to be trained, if the recipe trains."""
        return self.artifact.module if self.trainable is None else self.trainable

    @property
    def artifact(self) -> Artifact:
        """The lowered module, which can be saved.

        Raises:
            RecipeError: The recipe gives a module to be trained, which is lowered afterwards.
        """
        if self.lowered is None:
            raise RecipeError(
                f"{self.recipe.name} gives a module to be trained, not an artifact",
                hint="train result.module, then lower it: fxq.lower(result.module)",
            )
        return self.lowered


def compile(
    model: nn.Module,
    example_inputs: ExampleInputs,
    recipe: str | Path | Recipe | Pipeline = "aciq-4bit",
    *,
    backend: str = "eager",
    calibration: Iterable[Any] | None = None,
    settings: Sequence[str] = (),
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    concrete_args: Mapping[str, Any] | None = None,
    check: bool = True,
    on_step: Callable[[Step], None] | None = None,
    progress: Progress | None = None,
    workspace: str | Path | None = None,
    **backend_options: Any,
) -> Result:
    """A model on integer kernels, with the record of how it got there; the model is not touched.

    A recipe that trains gives an ordinary module instead: train ``result.module`` in any loop, then
    ``fxq.lower(result.module)``.

    Args:
        model: The model.
        example_inputs: One batch: a tensor, or a tuple with one entry per argument.
        recipe: A built-in name, a path to a TOML file, a `Recipe` or a `Pipeline`.
        backend: What to lower to.
        calibration: Batches of the model's input; labels and other extras are left out. Where
            several processes compile together (``torchrun``), each gives its share, and all end
            with the same bits.
        settings: ``pass.option=value``, applied to the recipe.
        leaf_modules: Module classes or names that stay one node each.
        concrete_args: Arguments of ``forward`` fixed to these values.
        check: Whether to run the probe batch after every pass.
        on_step: Called after every pass.
        progress: Called as ``progress(label, done, total)`` during long steps.
        workspace: A folder where long passes keep how far they are; after an interruption or a
            kill, the same call continues there, and ends with the same bits. It may be deleted.
        backend_options: For ``eager``: ``engine``; for ``onnx``: ``flavor``, ``opset``,
            ``dynamic``.

    Raises:
        FxqError: Something is wrong; see the subclasses in `fxq.errors`.

    Example:
        >>> from fxq.models_zoo import tiny_conv
        >>> images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> result = compile(tiny_conv(), images[:1], "minmax-int8", calibration=[images])
        >>> result.artifact.ledger.coverage()
        1.0
    """
    start = time.perf_counter()
    chosen = recipe_of(recipe).with_settings(settings)
    check_options = getattr(find_backend(backend), "check_options", None)
    if check_options is not None:  # before the passes run
        check_options(**backend_options)
    unfinished = None if workspace is None else open_workspace(workspace)
    program = opened(
        model,
        example_inputs,
        chosen,
        calibration,
        leaf_modules=leaf_modules,
        concrete_args=concrete_args,
    )
    program.progress = progress
    program.workspace = unfinished
    journal = chosen.pipeline(check=check).run(program, on_step)
    program.calibration = None
    if chosen.training:
        trainable = TrainingModule(program, journal, chosen, _lowered_module)
        seconds = time.perf_counter() - start
        return Result(program, journal, chosen, seconds, trainable=trainable)
    artifact = _of_recipe(chosen, lower(program, backend, journal=journal, **backend_options))
    if check:
        journal.integers = _drift(journal.reference, artifact.module, program)
    return Result(program, journal, chosen, time.perf_counter() - start, artifact)


def opened(
    model: nn.Module,
    example_inputs: ExampleInputs,
    recipe: Recipe,
    calibration: Iterable[Any] | None,
    *,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    concrete_args: Mapping[str, Any] | None = None,
) -> Program:
    """A model as the first pass of a recipe finds it; the arguments are those of `compile`."""
    program = capture(
        model,
        on_cpu(as_inputs(example_inputs)),
        leaf_modules=leaf_modules,
        concrete_args=concrete_args,
    )
    program.recipe = recipe.name
    program.overrides = recipe.layers
    program.simulation = recipe.simulation
    program.calibration = _calibration(program, calibration, recipe.passes)
    return program


def _drift(reference: Any, module: nn.Module, program: Program) -> Drift | None:
    """How far the lowered module is from the model; None where its runtime is not at hand."""
    try:
        with torch.no_grad():
            return output_drift(reference, module(*program.probe))
    except FxqError:
        return None


def lower(program: Program | nn.Module, backend: str = "eager", **options: Any) -> Artifact:
    """A quantized program, or a module that was trained, as an artifact of a backend.

    A trained module is not touched: a copy of it is frozen. It may be wrapped in DDP or compiled.

    Args:
        program: A program after a quantize pass, or the module of a recipe that trains.
        backend: Its name.
        options: Options of the backend.

    Raises:
        UnknownNameError: There is no such backend.
        LoweringError: The backend cannot express the program; every obstacle is listed.
        FxqError: The module is not one that fxq made to be trained.
    """
    if isinstance(program, Program):
        _check_frozen(program)
        return find_backend(backend).lower(program, **options)
    origin, frozen = unwrapped(program).origin, program_of(program)
    step = Pipeline(find_pass("freeze-trained")()).run(frozen)
    values = origin.journal.values.joined(step.values)
    journal = Journal([*origin.journal.steps, *step.steps], values=values)
    artifact = find_backend(backend).lower(frozen, journal=journal, **options)
    return _of_recipe(origin.recipe, artifact)


def _check_frozen(program: Program) -> None:
    """Nothing of the program is still to be trained.

    Raises:
        LoweringError: Something is.
    """
    found = [n for n in program.nodes() if isinstance(program.submodule(n), Learned)]
    if found:
        raise LoweringError(
            f"{len(found)} modules are meant to be trained and then frozen",
            [f"%{found[0].name}"],
            hint="write training = true in the recipe, and lower result.module",
        )


def _lowered_module(module: TrainingModule) -> nn.Module:
    return lower(module).module


def _of_recipe(recipe: Recipe, artifact: Artifact) -> Artifact:
    """The artifact, which says what recipe made it."""
    artifact.recipe_toml = recipe.to_toml()
    artifact.promised_coverage = recipe.coverage
    artifact.simulation = recipe.simulation
    return artifact


def recipe_of(recipe: str | Path | Recipe | Pipeline) -> Recipe:
    """The recipe of that name or file; a pipeline's is called ``pipeline``.

    Raises:
        RecipeError: There is no such recipe, or it is wrong.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Pipeline):
        return Recipe("pipeline", recipe.passes)
    return Recipe.load(recipe)


def _calibration(
    program: Program, source: Iterable[Any] | None, passes: Sequence[Pass]
) -> CalibrationData | None:
    """The calibration data, with a few of its first images made the probe batch."""
    if source is None:
        return None
    data = CalibrationData(source, keep=max((one.wants_images for one in passes), default=0))
    probe = _probe(program, data.first) or program.probe
    program.probe = World.current().gathered(probe)[0]  # all processes check on the same
    return data


def _probe(program: Program, batch: Any) -> tuple[Any, ...]:
    """The first images of a calibration batch; nothing where it does not look like the example."""
    examples = program.example_inputs
    arguments = (batch,) if isinstance(batch, torch.Tensor) else batch
    if not isinstance(arguments, (tuple, list)) or len(arguments) < len(examples):
        return ()
    pairs = list(zip(arguments, examples, strict=False))
    if not all(_looks_like(value, example) for value, example in pairs):
        return ()
    sizes = [len(value) if isinstance(value, torch.Tensor) else 0 for value, _ in pairs]
    total = sum(value.numel() for value, _ in pairs if isinstance(value, torch.Tensor))
    count = max(1, min(PROBE_SIZE, PROBE_ELEMENTS * sizes[0] // max(1, total)))
    cut = [
        value[:count] if size and size == sizes[0] else value
        for size, (value, _) in zip(sizes, pairs, strict=True)
    ]
    return tuple(on_cpu(cut))


def _looks_like(value: Any, example: Any) -> bool:
    """Whether a value can stand where the example stood: the same but for the sizes."""
    if not isinstance(value, torch.Tensor) or not isinstance(example, torch.Tensor):
        return type(value) is type(example)
    shaped = 0 < value.dim() == example.dim() and value.numel() > 0
    return shaped and value.dtype == example.dtype and value.shape[1:2] == example.shape[1:2]
