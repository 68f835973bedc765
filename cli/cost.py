"""``fxq cost``: what a network costs under a recipe, or a run: multiply-adds, FixOPs and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import ArtifactError, RecipeError
from fxq.zoo_entry import Normalization

if TYPE_CHECKING:
    from fxq.cost import Cost
    from fxq.recipe import Recipe

    from .load import Subject


DEFAULT = "aciq-4bit"
"""The recipe of networks."""


@dataclass(frozen=True)
class Request:
    """What ``fxq cost`` was asked for; the fields are its options."""

    name: str
    recipe: str | None = None
    settings: list[str] = field(default_factory=list)
    weights: Path | None = None
    input_shape: tuple[int, ...] | None = None
    leaves: list[str] = field(default_factory=list)
    calibration: str | None = None
    images: int | None = None
    batch_size: int = 64
    normalization: Normalization | None = None
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What was counted.

    Attributes:
        name: The network or run.
        recipe: The recipe that decided its bits.
        cost: What it costs.
        chosen_on: What bits were chosen on, where they depend on data.
    """

    name: str
    recipe: str
    cost: Cost
    chosen_on: str = ""


def run(request: Request, *, as_json: bool, csv: Path | None) -> None:
    """The cost has been told, and written where that was asked for."""
    from . import show_cost

    if csv is not None:
        _check_file(csv)
    is_folder = Path(request.name).is_dir()
    found = _of_run(request) if is_folder else _of_network(request)
    if csv is not None:
        show_cost.write(found, csv)
    if as_json:
        show_cost.as_json(found)
        return
    show_cost.report(found)
    if csv is not None:
        show_cost.written(csv)


def _check_file(path: Path) -> None:
    """A file can be written at this path.

    Raises:
        ArtifactError: It is a folder, or in none.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "is in no folder that exists"
        raise ArtifactError(f"the --csv file {what}", where=str(path), hint="name a file")


# ---- runs ----------------------------------------------------------------------------------------


def _of_run(request: Request) -> Report:
    """A run, whose bits are decided.

    Raises:
        RecipeError: Options ask for another recipe.
    """
    from fxq.artifact import load
    from fxq.recipe import Recipe
    from fxq.run_cost import cost_of_run

    from .trail import run_folder

    given = [name for name in ("recipe", "settings", "calibration") if getattr(request, name)]
    if given:
        raise RecipeError(
            f"a run was made with a recipe of its own; leave {', '.join(given)} out",
            where=request.name,
        )
    artifact = load(run_folder(request.name))
    recipe = Recipe.from_toml(artifact.recipe_toml).name if artifact.recipe_toml else "unknown"
    return Report(request.name, recipe, cost_of_run(artifact))


# ---- networks ----------------------------------------------------------------------------------


def _of_network(request: Request) -> Report:
    """A network under a recipe."""
    from fxq.recipe import Recipe

    from . import show
    from .load import RANDOM, load_subject

    recipe = deciding(Recipe.load(request.recipe or DEFAULT).with_settings(request.settings))
    subject = load_subject(
        request.name,
        weights=request.weights,
        input_shape=request.input_shape,
        normalization=request.normalization,
        seed=request.seed,
    )
    if subject.weights == RANDOM and depends_on_weights(recipe):
        show.notice("the weights are random, and this recipe chooses bits or levels by them")
    source, batches = _batches(request, recipe, subject)
    cost = _cost(subject, recipe, batches, request.leaves)
    return Report(request.name, recipe.name, cost, source)


def deciding(recipe: Recipe) -> Recipe:
    """The recipe up to the last pass that gives weights their bits; whole where none does."""
    places = [place for place, one in enumerate(recipe.passes) if "weight_bits" in one.options()]
    return replace(recipe, passes=recipe.passes[: places[-1] + 1]) if places else recipe


def depends_on_data(recipe: Recipe) -> bool:
    """Whether the bits of a recipe depend on the values that layers read."""
    return any(
        one.name == "mixed-precision" or _asks(one, "activation_allocation", "none")
        for one in recipe.passes
    )


def depends_on_weights(recipe: Recipe) -> bool:
    """Whether its bits or levels depend on the weights."""
    return depends_on_data(recipe) or any(
        _asks(one, "allocation", "none") or one.options().get("level_set") == "auto"
        for one in recipe.passes
    )


def _asks(one: Any, option: str, otherwise: str) -> bool:
    return bool(one.options().get(option, otherwise) != otherwise)


def _batches(request: Request, recipe: Recipe, subject: Subject) -> tuple[str, Iterable[Any]]:
    """What the recipe is calibrated on, and where that comes from if it matters.

    Raises:
        CalibrationError: Bits depend on data, and there is none.
    """
    from fxq.graph.capture import as_inputs

    from .compile import calibration_for

    if request.calibration is None and not depends_on_data(recipe):
        return "", [as_inputs(subject.model.example_inputs)]
    found = calibration_for(
        recipe,
        subject,
        request.calibration,
        images=request.images,
        batch_size=request.batch_size,
        seed=request.seed,
    )
    return ("", []) if found is None else (found.source, found.data)


def _cost(subject: Subject, recipe: Recipe, batches: Iterable[Any], leaves: list[str]) -> Cost:
    """The network has been through the passes, and is counted."""
    from fxq.calibration import CalibrationData
    from fxq.cost import cost_of, count_values
    from fxq.graph.capture import as_inputs, capture

    model = subject.model
    program = capture(model.module, as_inputs(model.example_inputs), leaf_modules=leaves)
    values = count_values(program)
    program.recipe, program.overrides = recipe.name, recipe.layers
    if any(one.name == "calibrate" for one in recipe.passes):
        wanted = max(one.wants_images for one in recipe.passes)
        program.calibration = CalibrationData(batches, keep=wanted)
    recipe.pipeline(check=False).run(program)
    return cost_of(program, values)
