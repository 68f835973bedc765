"""``fxq ablate``: every combination of settings on a network, measured side by side.

Finished runs are kept in ``ablation.json``, with what they depend on; a run that is found there is
not computed again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import ArtifactError, DataError, FxqError, RecipeError

from .compile import calibration_for, compiled
from .max_drop import Quiet
from .options import default_folder, names
from .show_compile import Meter

if TYPE_CHECKING:
    from fxq.recipe import Recipe
    from fxq.zoo_entry import Normalization

    from .load import Subject
    from .score import Evaluation, Score

TABLE3 = (
    "quantize-aciq.clip=false,true",
    "quantize-aciq.activation_allocation=none,mean-bits",
    "quantize-aciq.allocation=none,mean-bits",
    "quantize-aciq.bias_correction=none,mean",
)
"""Banner, Nahshan, Soudry, NeurIPS 2019, arXiv:1810.05723, Table 3, in the order of its rows."""

TABLE3_RECIPE, OWN_RECIPE = "aciq-paper-4w4a", "aciq-4bit"
FILE = "ablation.json"

Settings = tuple[str, ...]
"""One combination, as `Recipe.with_settings` takes it."""


@dataclass(frozen=True)
class Request:
    """What ``fxq ablate`` was asked for; the fields are its options."""

    model: str
    recipe: str | None = None
    options: list[str] = field(default_factory=list)
    table3: bool = False
    settings: list[str] = field(default_factory=list)
    weights: Path | None = None
    input_shape: tuple[int, ...] | None = None
    calibration: str | None = None
    images: int | None = None
    evaluation: str | None = None
    eval_images: int | None = None
    batch_size: int = 64
    normalization: Normalization | None = None
    seeds: tuple[int, ...] = (0,)
    output: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Row:
    """A combination and what was measured.

    Attributes:
        settings: The combination.
        scores: One per seed, in the order of the seeds.
    """

    settings: Settings
    scores: tuple[Score, ...]

    @property
    def figures(self) -> list[float]:
        """The scores as numbers."""
        return [figure(score) for score in self.scores]


@dataclass(frozen=True)
class Outcome:
    """An ablation.

    Attributes:
        rows: The combinations.
        reference: What the float network scored.
        model: The network.
        source: What was measured with.
        seeds: The seeds of the scores of each row.
    """

    rows: list[Row]
    reference: Score
    model: str
    source: str
    seeds: tuple[int, ...]


def figure(score: Score) -> float:
    """A score as one number: per cent of right answers, else the first thing that was measured."""
    if score.total:
        return 100 * score.correct / score.total
    return next(iter(score.values.values()))


def run(request: Request) -> None:
    """Every combination has been measured, told and written."""
    from . import show, show_ablate

    combinations = combinations_of(_options(request))
    subject, recipe, evaluation = _opened(request)
    recipes = {one: recipe.with_settings(one) for one in combinations}  # all are checked first
    folder = Path(request.output or _default_folder(subject, recipe))
    record = _Record.opened(folder, _inputs(request, subject, recipe, evaluation), request.force)
    todo = [(one, seed) for one in combinations for seed in request.seeds]
    missing = [job for job in todo if not record.has(*job)]
    known = f", {len(todo) - len(missing)} of them known from {folder}"
    show.line(
        f"{subject.model.spec}, recipe {recipe.name}: {show.plural(len(todo), 'run')}"
        f"{known if len(missing) < len(todo) else ''}"
    )
    with Meter() as meter:
        if not record.has((), None):
            record.add((), None, evaluation.measure(subject.model.module, meter))
        for done, (one, seed) in enumerate(missing, 1):
            record.add(
                one, seed, _measured(request, subject, recipes[one], evaluation, seed, meter)
            )
            meter("combinations", done, len(missing))
    rows = [Row(one, tuple(record.score(one, s) for s in request.seeds)) for one in combinations]
    reference = record.score((), None)
    outcome = Outcome(rows, reference, subject.model.spec, evaluation.source, request.seeds)
    show_ablate.write(outcome, folder)
    show_ablate.tell(outcome, folder)


# ---- what to run -------------------------------------------------------------------------------


def combinations_of(options: Sequence[str]) -> list[Settings]:
    """Every combination of the values of the options; the last option varies fastest.

    Raises:
        RecipeError: An option has no values, or is given twice.

    Example:
        >>> combinations_of(["weight_bits=3,4", "guard=true"])
        [('weight_bits=3', 'guard=true'), ('weight_bits=4', 'guard=true')]
    """
    values: dict[str, list[str]] = {}
    for option in options:
        name, _, text = option.partition("=")
        found = names(text)
        if not name.strip() or not found or len(set(found)) < len(found):
            raise RecipeError(
                f"--option takes an option and different values, not {option!r}",
                hint="for example --option quantize-aciq.weight_bits=3,4",
            )
        if name.strip() in values:
            raise RecipeError(
                f"--option {name} is given twice", hint="give all its values at once: A,B,C"
            )
        values[name.strip()] = found
    settings = [[f"{name}={value}" for value in found] for name, found in values.items()]
    return list(itertools.product(*settings))


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds of ``--seeds``.

    Raises:
        FxqError: They are not different whole numbers.

    Example:
        >>> seeds_of("0,7")
        (0, 7)
    """
    found = names(text)
    if not found or len(set(found)) < len(found) or not all(map(str.isdecimal, found)):
        raise FxqError(f"--seeds takes different whole numbers, not {text!r}", hint="--seeds 0,1,2")
    return tuple(int(one) for one in found)


def _options(request: Request) -> list[str]:
    is_table3 = request.table3 or not request.options
    return [*(TABLE3 if is_table3 else ()), *request.options]


def _opened(request: Request) -> tuple[Subject, Recipe, Evaluation]:
    """The network, the recipe that settings change, and how networks are measured."""
    from fxq.recipe import Recipe

    from . import load, score

    is_table3 = request.table3 or not request.options
    name = request.recipe or (TABLE3_RECIPE if is_table3 else OWN_RECIPE)
    recipe = Recipe.load(name).with_settings(request.settings)
    subject = load.load_subject(
        request.model,
        weights=request.weights,
        input_shape=request.input_shape,
        normalization=request.normalization,
        seed=request.seeds[0],
    )
    evaluation = score.evaluation_of(
        subject, request.evaluation, limit=request.eval_images, batch_size=request.batch_size
    )
    if evaluation is None:
        raise DataError(
            "there is nothing to measure with",
            where=request.model,
            hint="pass --eval with an .npz file or a folder of images, or define eval_data or "
            "evaluate in the model file",
        )
    return subject, recipe, evaluation


def _default_folder(subject: Subject, recipe: Recipe) -> Path:
    return Path("ablations") / default_folder(subject.model.name, recipe.name).name


def _measured(
    request: Request,
    subject: Subject,
    recipe: Recipe,
    evaluation: Evaluation,
    seed: int,
    meter: Meter,
) -> Score:
    """The score of one combination with one draw of calibration images."""
    calibration = calibration_for(
        recipe,
        subject,
        request.calibration,
        images=request.images,
        batch_size=request.batch_size,
        seed=seed,
    )
    result = compiled(subject, recipe, calibration and calibration.data, reporter=Quiet(meter))
    return evaluation.measure(result.module, meter)


# ---- what is known already ---------------------------------------------------------------------


def _inputs(
    request: Request, subject: Subject, recipe: Recipe, evaluation: Evaluation
) -> dict[str, Any]:
    """What every run depends on, besides its settings and its seed."""
    known = subject.normalization
    return {
        "fxq": version("fxq"),
        "model": request.model,
        "weights": _digest(subject.model.module),
        "input": [list(subject.shape), known and list(known.mean), known and list(known.std)],
        "recipe": recipe.to_toml(),
        "calibration": [request.calibration, request.images, request.batch_size],
        "evaluation": [request.evaluation, evaluation.source],
    }


def _digest(module: Any) -> str:
    """A digest of the weights."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).numpy().tobytes())
    return found.hexdigest()


class _Record:
    """The runs that are finished, in a file that is whole at every moment."""

    def __init__(self, path: Path, inputs: dict[str, Any], runs: dict[str, Any]) -> None:
        self._path, self._inputs, self._runs = path, inputs, runs

    @classmethod
    def opened(cls, folder: Path, inputs: dict[str, Any], force: bool) -> _Record:
        """The record of a folder; empty where there is none, or it is to be replaced.

        Raises:
            ArtifactError: The folder holds an ablation of something else, or a damaged one.
        """
        path = folder / FILE
        if force or not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            return cls(path, inputs, {})
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found, runs = data["inputs"], {str(key): dict(run) for key, run in data["runs"].items()}
            differing = [name for name in inputs if inputs[name] != found.get(name)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"the ablation cannot be read: {error}",
                where=str(path),
                hint="begin anew with --force",
            ) from error
        if differing:
            raise ArtifactError(
                f"the folder holds an ablation with another {', '.join(differing)}",
                where=str(folder),
                hint="choose another folder with --output, or begin anew with --force",
            )
        return cls(path, inputs, runs)

    def has(self, settings: Settings, seed: int | None) -> bool:
        """Whether a run is finished."""
        return _key(settings, seed) in self._runs

    def score(self, settings: Settings, seed: int | None) -> Score:
        """What a finished run scored."""
        from .score import Score

        run = self._runs[_key(settings, seed)]
        if "total" in run:
            return Score(int(run["correct"]), int(run["total"]))
        return Score(values={str(name): float(value) for name, value in run.items()})

    def add(self, settings: Settings, seed: int | None, score: Score) -> None:
        """A run is finished, and the file says so."""
        self._runs[_key(settings, seed)] = score.to_json()
        text = json.dumps({"inputs": self._inputs, "runs": self._runs}, indent=1)
        beside = self._path.with_suffix(".json.new")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(self._path)


def _key(settings: Settings, seed: int | None) -> str:
    """The name of a run; without a seed it is the float network."""
    return "float" if seed is None else " ".join((*sorted(settings), f"seed={seed}"))
