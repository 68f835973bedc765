"""`compile_parts`: what of a model can be traced on integer kernels, the rest as it was written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxq.artifact import Artifact
from fxq.compiler import Result, compile, recipe_of
from fxq.errors import CaptureError, FxqError, RecipeError
from fxq.graph.capture import ExampleInputs
from fxq.graph.program import Progress
from fxq.parts.composition import Part, composed
from fxq.parts.folder import save_parts
from fxq.parts.inputs import PartInputs
from fxq.parts.survey import Survey, find_parts, leaves_below
from fxq.pipeline import Pipeline
from fxq.recipe import Recipe
from fxq.trail.journal import Step

Listener = Callable[[Part, int, int], None]
"""Called as ``listener(part, index, total)`` before a part is compiled."""


@dataclass(frozen=True)
class PartialResult:
    """What the compilation of a model's parts gives.

    Attributes:
        module: A copy of the model that runs its parts on what they were compiled to.
        results: The compilation of each part, by path.
        survey: What was found to be traceable, and what not.
        recipe: The recipe that was run.
        seconds: How long it took.
    """

    module: nn.Module
    results: dict[str, Result]
    survey: Survey
    recipe: Recipe
    seconds: float

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """The lowered parts, by path."""
        return {path: result.artifact for path, result in self.results.items()}

    def coverage(self) -> float:
        """The share of the model's convolutions and linears that run on integers."""
        return coverage(self.artifacts, len(self.survey.left))

    def save(
        self, path: str | Path, *, force: bool = False, metadata: Mapping[str, Any] | None = None
    ) -> Path:
        """The parts are a folder at this path: each an artifact of its own, below ``parts``.

        The model's own code is not saved; `fxq.load_parts` needs the model.

        Raises:
            ArtifactError: The folder holds something and force is off, or cannot be written.
        """
        return save_parts(Path(path), self.artifacts, self.survey, metadata or {}, force=force)


def coverage(artifacts: Mapping[str, Artifact], left: int) -> float:
    """The share of layers on integers, with so many layers outside of all parts.

    Example:
        >>> coverage({}, left=0)
        1.0
    """
    layers = [
        one for artifact in artifacts.values() for one in artifact.ledger.entries if one.layer
    ]
    total = len(layers) + left
    return sum(one.where == "int8" for one in layers) / total if total else 1.0


def compile_parts(
    model: nn.Module,
    example_inputs: ExampleInputs,
    recipe: str | Path | Recipe | Pipeline = "aciq-4bit",
    *,
    backend: str = "eager",
    calibration: Iterable[Any] | None = None,
    settings: Sequence[str] = (),
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    check: bool = True,
    on_part: Listener | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: Progress | None = None,
    workspace: str | Path | None = None,
    **backend_options: Any,
) -> PartialResult:
    """The largest traceable parts of a model on integer kernels, the rest as it was written.

    Each part goes through the recipe on its own: a policy for first and last layers holds for the
    first and last layer of each part. It is calibrated on what the model, in float, calls it with;
    a part that is called several times, on all of its calls.

    Args:
        model: The model; it is not touched.
        example_inputs: One batch: a tensor, or a tuple with one entry per argument of ``forward``.
        recipe: A built-in name, a path to a TOML file, a `Recipe` or a `Pipeline`.
        backend: What to lower to.
        calibration: Batches of the model's inputs, like the example; all are kept of a generator.
        settings: ``pass.option=value``, applied to the recipe.
        leaf_modules: Module classes or names that stay one node each.
        check: Whether to run a probe batch after every pass.
        on_part: Called before each part.
        on_step: Called after every pass.
        progress: Called as ``progress(label, done, total)`` during long steps.
        workspace: A folder where long passes keep how far they are, as for `fxq.compile`.
        backend_options: As for `fxq.compile`.

    Raises:
        CaptureError: Nothing of the model can be traced; the error says why, and where.
        RecipeError: The recipe gives a module to be trained.
        FxqError: As `fxq.compile`; ``where`` names the part.

    Example:
        >>> class Halves(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
        ...         return self.left(x) if x.sum() > 0 else self.right(x)
        >>> import torch
        >>> data = [torch.rand(8, 4)]
        >>> result = compile_parts(Halves(), data[0], "minmax-int8", calibration=data)
        >>> list(result.results), result.coverage()
        (['left'], 0.5)
    """
    start = time.perf_counter()
    chosen = recipe_of(recipe).with_settings(settings)
    if chosen.training:
        raise RecipeError(
            f"{chosen.name} gives a module to be trained, and parts of models are only compiled",
            hint="use a recipe that does not train, or make the model traceable as a whole",
        )
    survey = find_parts(model, example_inputs, leaf_modules=leaf_modules)
    if not survey.parts:
        raise _nothing(survey)
    data = None
    if calibration is not None:
        data = PartInputs(survey.model, survey.parts, calibration, len(survey.inputs))
    results: dict[str, Result] = {}
    for index, (path, part) in enumerate(survey.parts.items()):
        if on_part is not None:
            on_part(part, index, len(survey.parts))
        try:
            results[path] = compile(
                survey.model.get_submodule(path),
                part.example,
                chosen,
                backend=backend,
                calibration=None if data is None else data.of(path),
                leaf_modules=leaves_below(path, leaf_modules),
                concrete_args=part.arguments.fixed,
                check=check,
                on_step=on_step,
                progress=progress,
                workspace=workspace,
                **backend_options,
            )
        except FxqError as error:
            error.where = f"{path or 'the whole model'}: {error.where or part.kind}"
            raise
        if data is not None:
            data.forget(path)
    modules = {path: result.module for path, result in results.items()}
    arguments = {path: part.arguments for path, part in survey.parts.items()}
    module = composed(survey.model, modules, arguments)
    return PartialResult(module, results, survey, chosen, time.perf_counter() - start)


def _nothing(survey: Survey) -> CaptureError:
    if not survey.gaps:
        return CaptureError(
            f"{type(survey.model).__name__} has no convolution or linear that the example reaches"
        )
    first = survey.gaps[0]
    return CaptureError(
        f"nothing of {first.kind} can be traced: {first.why}", where=first.where, hint=first.hint
    )
