"""``fxq show`` and ``explain``, and how all readers of a run find it and its steps."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fxq.errors import ArtifactError, UnknownNameError, nearest_hint
from fxq.run_folder import holds_parts

if TYPE_CHECKING:
    from fxq.graph.program import Program
    from fxq.integer.ledger import Ledger
    from fxq.trail.journal import Journal, Step
    from fxq.trail.snapshot import Snapshot

CAPTURE, LAST = "capture", "last"


def is_run(name: str) -> bool:
    """Whether a folder with a journal has that name."""
    return (Path(name) / "journal.json").is_file()


def names_a_folder(text: str) -> bool:
    """Whether a text can only mean a folder: a path, or the name of one that is there."""
    return "/" in text or Path(text).is_dir()


def run_folder(name: str) -> Path:
    """The run folder of that name.

    Raises:
        ArtifactError: There is none; the hint names the nearest, or says how to make one.
    """
    if is_run(name):
        return Path(name)
    here = sorted(str(path.parent) for path in Path("runs").glob("*/journal.json"))
    inside = sorted(str(path.parent) for path in Path(name).glob("**/journal.json"))
    hint = (
        nearest_hint(name, inside or here)
        if inside or here
        else ("fxq compile writes one, and says its name when it is done")
    )
    if holds_parts(Path(name)):
        hint = f"it holds parts of a model, each a run: {', '.join(inside[:3])}"
    what = "this folder is no run" if Path(name).is_dir() else "there is no such run folder"
    raise ArtifactError(what, where=name, hint=hint)


def load_journal(name: str) -> Journal:
    """The journal of the run of that name."""
    from fxq.trail.journal import Journal

    return Journal.load(run_folder(name))


def load_ledger(folder: Path) -> Ledger | None:
    """The ledger of a run; None where none was written.

    Raises:
        ArtifactError: It is damaged.
    """
    from fxq.integer.ledger import Ledger

    path = folder / "ledger.json"
    try:
        return Ledger.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the ledger cannot be read: {error}", where=str(path)) from error


def find_step(journal: Journal, wanted: str) -> int:
    """The position, from 1, of a pass given by name or position; 0 is the captured graph.

    Of passes of one name, the last is meant. ``capture`` and ``last`` are names, too.

    Raises:
        UnknownNameError: No pass has that name or position.
    """
    names = [step.name for step in journal]
    if wanted == CAPTURE or (wanted.isdigit() and int(wanted) == 0):
        return 0
    if wanted == LAST:
        return len(names)
    if wanted.isdigit() and int(wanted) <= len(names):
        return int(wanted)
    if wanted in names:
        return len(names) - names[::-1].index(wanted)
    known = [CAPTURE, LAST, *names]
    error = UnknownNameError("pass in this run", wanted, known)
    if wanted.isdigit():
        error.hint = f"the run has {len(names)} passes; 0 is the captured graph"
    raise error


def graph_after(journal: Journal, position: int) -> Snapshot:
    """The graph after the pass at a position, from 1; 0 is the captured graph.

    Raises:
        ArtifactError: No pass has run, so that no graph was recorded.
    """
    if not journal.steps:
        raise ArtifactError("no pass has run, so there is no graph", hint="see recipe.toml")
    return journal.steps[position - 1].after if position else journal.steps[0].before


# ---- show --------------------------------------------------------------------------------------


def show_graph(
    name: str, step: str | None, digests: bool, input_shape: tuple[int, ...] | None
) -> None:
    """A graph of a run, or the captured graph of a model, is printed."""
    from . import show_trail

    if is_run(name) or Path(name).is_dir():
        journal = load_journal(name)
        position = find_step(journal, step) if step is not None else len(journal)
        graph = graph_after(journal, position)
    else:
        graph = _journal_of(name, step, input_shape)
    show_trail.graph(graph, digests)


def _journal_of(name: str, step: str | None, input_shape: tuple[int, ...] | None) -> Snapshot:
    from fxq.trail.snapshot import snapshot

    if step is not None and step not in ("0", CAPTURE):
        raise UnknownNameError("step of a network that is not compiled", step, [CAPTURE])
    return snapshot(captured(name, input_shape))


def captured(name: str, input_shape: tuple[int, ...] | None = None) -> Program:
    """The graph of a network by name."""
    from fxq.graph.capture import capture
    from fxq.model_file import load_model

    model = load_model(name, input_shape=input_shape)
    return capture(model.module, model.example_inputs)


# ---- explain -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reasons:
    """What was refused, and why: ``(node, why)`` by pass; what stayed in float, or needs VNNI."""

    by_pass: dict[str, list[tuple[str, str]]]
    in_float: list[tuple[str, str]] | None = None
    nodes: int = 0
    unproven: list[tuple[str, str]] = field(default_factory=list)


def explain(
    name: str,
    only: str | None,
    node: str | None,
    recipe: str,
    input_shape: tuple[int, ...] | None,
) -> None:
    """Every refused match, and every node that stayed in float, is printed with its reason."""
    from . import show_trail

    if is_run(name) or Path(name).is_dir():
        journal = load_journal(name)
        ledger = load_ledger(Path(name))
    else:
        journal, ledger = _structural_journal(name, recipe, input_shape), None
    steps = list(journal)
    if only is not None:
        position = find_step(journal, only)
        steps = journal.steps[position - 1 : position] if position else []
    found = _reasons(steps, None if only is not None else ledger)
    if ledger is not None and only is None:
        found = replace(found, unproven=_unproven(Path(name)))
    show_trail.reasons(_filtered(found, node or "*"), node, only)


def _unproven(folder: Path) -> list[tuple[str, str]]:
    from fxq.run_folder import json_object

    known = json_object(folder / "metadata.json").get("unproven")
    pairs = known.items() if isinstance(known, dict) else ()
    return [(str(name), str(why)) for name, why in pairs]


def _reasons(steps: list[Step], ledger: Ledger | None) -> Reasons:
    by_pass: dict[str, list[tuple[str, str]]] = {}
    for step in steps:
        misses = by_pass.setdefault(step.name, [])
        misses += [(miss.node, miss.why) for miss in step.misses]
    if ledger is None:
        return Reasons(by_pass)
    left = [(entry.node, entry.why) for entry in ledger.in_float()]
    return Reasons(by_pass, left, len(ledger.entries))


def _filtered(reasons: Reasons, glob: str) -> Reasons:
    pattern = glob.removeprefix("%")

    def kept(items: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [item for item in items if fnmatch.fnmatchcase(item[0], pattern)]

    in_float = None if reasons.in_float is None else kept(reasons.in_float)
    by_pass = {name: kept(items) for name, items in reasons.by_pass.items()}
    return Reasons(by_pass, in_float, reasons.nodes, kept(reasons.unproven))


def _structural_journal(name: str, recipe: str, input_shape: tuple[int, ...] | None) -> Journal:
    """What the passes before calibration say about a network; no data is needed for them."""
    from fxq.pipeline import Pipeline
    from fxq.recipe import Recipe

    passes = []
    for one in Recipe.load(recipe).passes:
        if one.name == "calibrate":
            break
        passes.append(one)
    return Pipeline(*passes, check=False).run(captured(name, input_shape))
