"""`Pass` and `Pipeline`: passes in order over a program, each recorded, verified and measured."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import fx

from fxq.contracts import Contract, check_contract, output_drift, output_sqnr
from fxq.errors import (
    CalibrationError,
    ContractError,
    FxqError,
    PassError,
    RecipeError,
    RequirementError,
    VerifyError,
)
from fxq.graph.program import Program, recompile
from fxq.graph.rewrite import Editor, Miss, neighbourhood
from fxq.graph.verify import verify
from fxq.trail.drift import Drift
from fxq.trail.journal import Journal, Step
from fxq.trail.probe import ProbeValues
from fxq.trail.snapshot import snapshot

__all__ = ["Contract", "Miss", "Pass", "Pipeline", "RulePass"]


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation of a program; its dataclass fields are its options.

    Attributes:
        name: The name recipes use; the file and class are the same name in other casings.
        after: Names of passes that must have run.
        contract: What it promises about the numbers.
        resumable: Whether it keeps how far it is in the program's workspace, and continues there.
    """

    name: ClassVar[str] = ""
    after: ClassVar[tuple[str, ...]] = ()
    contract: ClassVar[Contract] = Contract.CHANGES_NUMBERS
    resumable: ClassVar[bool] = False

    @abstractmethod
    def apply(self, program: Program, edit: Editor) -> None:
        """The program is transformed in place, through the editor."""

    def check_options(self, where: str = "") -> None:  # noqa: B027
        """The options go together; asked before any pass of a pipeline runs.

        Args:
            where: What the error names; by default the pass.

        Raises:
            SpecError: They do not.
        """

    def options(self) -> dict[str, Any]:
        """The options as JSON-ready values, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: v.value if isinstance(v, Enum) else v for name, v in values.items()}

    @property
    def promise(self) -> Contract:
        """The contract of this pass with these options."""
        return self.contract

    @property
    def wants_images(self) -> int:
        """How many calibration images this pass reads on its own: its option ``images``."""
        return int(getattr(self, "images", 0))


@dataclass(frozen=True)
class RulePass(Pass):
    """A pass made of rules, each tried on every node: a hit, a refusal with a reason, or neither.

    Attributes:
        rules: Functions ``(program, edit, node) -> bool | Miss | None``: True for a hit, `Miss`
            for a refusal, None for "not my kind of node".
    """

    rules: ClassVar[tuple[Callable[[Program, Editor, fx.Node], bool | Miss | None], ...]] = ()

    def apply(self, program: Program, edit: Editor) -> None:
        """Every rule has been tried on every node; a node's first answer counts."""
        for node in edit.visit():
            for rule in self.rules:
                answer = rule(program, edit, node)
                if isinstance(answer, Miss):
                    edit.misses.append(answer)
                elif answer:
                    edit.hit(node)
                if answer is not None:
                    break


class Pipeline:
    """Passes in order.

    Args:
        passes: The passes.
        check: Whether to run the probe batch after every pass, which checks contracts and measures
            what each pass costs.

    Example:
        >>> from fxq.passes import FoldBatchNorm, MarkRelu
        >>> Pipeline(FoldBatchNorm(), MarkRelu()).names
        ('fold-batch-norm', 'mark-relu')
    """

    def __init__(self, *passes: Pass, check: bool = True) -> None:
        for one in passes:
            if not isinstance(one, Pass):
                raise RecipeError(
                    f"a pipeline takes passes, not {one!r}",
                    hint=f"write {one.__name__}()" if isinstance(one, type) else None,
                )
        self.passes = passes
        self.check = check

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the passes, in order."""
        return tuple(one.name for one in self.passes)

    def run(self, program: Program, on_step: Callable[[Step], None] | None = None) -> Journal:
        """The program has been through every pass; the journal says what each did.

        Args:
            program: Edited in place.
            on_step: Called after every pass.

        Raises:
            RequirementError: A pass comes before one it needs.
            SpecError: The options of a pass do not go together.
            CalibrationError: The model fails on the probe batch.
            ContractError: A pass broke its promise.
            VerifyError: A pass broke an invariant of the graph.
            PassError: A pass failed; the error names the node and the passes that had run.
        """
        self._check_order(program)
        for one in self.passes:
            one.check_options()
        journal = Journal()
        previous = self._probe(None, program)
        journal.reference = None if previous is None else previous.output
        for one in self.passes:
            step, previous = self._run_one(one, program, journal, previous)
            journal.steps.append(step)
            program.passes_run.append(one.name)
            if self.check:
                journal.values.observe(program)
            if on_step is not None:
                on_step(step)
        if self.check:
            journal.values.finish(program)
        return journal

    def _check_order(self, program: Program) -> None:
        done = list(program.passes_run)
        for one in self.passes:
            missing = [name for name in one.after if name not in done]
            if missing:
                raise RequirementError(
                    f"{one.name} needs {', '.join(missing)} to run before it",
                    where=f"pipeline: {', '.join(self.names)}",
                    hint=f"put {missing[0]} before {one.name}",
                    passes_run=done,
                )
            done.append(one.name)

    def _run_one(
        self, one: Pass, program: Program, journal: Journal, previous: ProbeValues | None
    ) -> tuple[Step, ProbeValues | None]:
        before = journal.steps[-1].after if journal.steps else snapshot(program)
        edit = Editor(program, one.name)
        start = time.perf_counter()
        self._apply(one, program, edit)
        seconds = time.perf_counter() - start
        self._check_graph(one, program)
        probed = self._probe(one, program)
        cost = _Cost()
        if probed is not None and previous is not None:
            cost = _cost(one, program, journal.reference, previous, probed)
        step = Step(
            name=one.name,
            options=one.options(),
            contract=one.promise.value,
            before=before,
            after=snapshot(program),
            hits=tuple(edit.hits),
            misses=tuple(edit.misses),
            seconds=seconds,
            sqnr=cost.sqnr,
            total_sqnr=None if cost.drift is None else cost.drift.sqnr,
            notes=tuple(edit.notes),
            drift=cost.drift,
            moved=cost.moved,
        )
        return step, probed

    def _apply(self, one: Pass, program: Program, edit: Editor) -> None:
        try:
            with torch.no_grad():
                one.apply(program, edit)
        except FxqError as error:
            if edit.current is not None and error.where is None:
                error.where = f"{one.name} at %{edit.current.name}"
            raise
        except Exception as error:
            node = edit.current
            place = one.name if node is None else f"{one.name} at %{node.name}"
            context = "" if node is None else f"\n{neighbourhood(node)}"
            ran = ", ".join(program.passes_run) or "no pass"
            raise PassError(
                f"{one.name} failed: {type(error).__name__}: {error}",
                where=f"{place}, after {ran}{context}",
                hint="this is a defect of the pass; fxq explain shows the graph it met",
                passes_run=program.passes_run,
            ) from error

    def _check_graph(self, one: Pass, program: Program) -> None:
        try:
            recompile(program)
            verify(program)
        except VerifyError as error:
            error.where = f"{one.name}, {error.where}" if error.where else one.name
            raise
        except (RuntimeError, ValueError, AttributeError) as error:
            raise VerifyError(
                f"graph-lints: {error}", where=one.name, hint="this is a defect of the pass"
            ) from error

    def _probe(self, one: Pass | None, program: Program) -> ProbeValues | None:
        if not self.check:
            return None
        try:
            return ProbeValues.of(program)
        except FxqError:
            raise
        except Exception as error:
            if one is None:
                raise CalibrationError(
                    f"the model fails on the probe batch: {error}",
                    where=f"shapes {[list(getattr(x, 'shape', ())) for x in program.probe]}",
                    hint="calibration batches must look like the example, batch size apart",
                ) from error
            raise PassError(
                f"{one.name} left a graph that fails on the probe batch: {error}",
                where=f"{one.name}, after {', '.join(program.passes_run) or 'no pass'}",
                hint="this is a defect of the pass; leave it out of the recipe and report it",
                passes_run=program.passes_run,
            ) from error


@dataclass(frozen=True)
class _Cost:
    """What a pass did to the numbers; see `Step`."""

    sqnr: float | None = None
    drift: Drift | None = None
    moved: dict[str, Drift] = field(default_factory=dict)


def _cost(
    one: Pass, program: Program, original: Any, before: ProbeValues, after: ProbeValues
) -> _Cost:
    """How far a pass moved the output and the values, and how far the output is from the model's.

    Raises:
        ContractError: The pass did not keep its contract.
    """
    try:
        check_contract(one.name, one.promise, before.output, after.output)
        return _Cost(
            output_sqnr(before.output, after.output),
            output_drift(original, after.output),
            after.moved_from(before),
        )
    except ContractError as error:
        error.where = error.where or one.name
        error.passes_run = tuple(program.passes_run)
        raise
