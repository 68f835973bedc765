"""The pipeline: order, contracts, crashes and broken graphs, each told by pass and node."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fxq.contracts import Contract
from fxq.errors import (
    CalibrationError,
    ContractError,
    FxqError,
    PassError,
    RecipeError,
    RequirementError,
    SpecError,
    VerifyError,
)
from fxq.graph.capture import capture
from fxq.graph.ops import Kind, describe
from fxq.graph.program import Program, write_facts
from fxq.graph.rewrite import Editor, Miss
from fxq.models_zoo import tiny_conv, tiny_residual
from fxq.passes import Calibrate, FoldBatchNorm, InsertObservers, MarkRelu, QuantizeMinmax
from fxq.pipeline import Pass, Pipeline, RulePass
from fxq.trail.journal import Step

X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def program() -> Program:
    return capture(tiny_residual(), X)


# ---- passes that are wrong on purpose --------------------------------------------------------


@dataclass(frozen=True)
class WrongEps(Pass):
    """A fold that forgot eps: it scales by gamma / sqrt(var)."""

    name: ClassVar[str] = "wrong-eps"
    contract: ClassVar[Contract] = Contract.SAME_NUMBERS

    def apply(self, program: Program, edit: Editor) -> None:
        for node in edit.visit():
            op = describe(node, program.module)
            if op.kind is Kind.BATCH_NORM:
                norm: Any = op.module
                norm.weight.mul_(((norm.running_var + norm.eps) / norm.running_var).sqrt())


@dataclass(frozen=True)
class LoudMark(Pass):
    """A mark pass that also changes a number, by one part in a million."""

    name: ClassVar[str] = "loud-mark"
    contract: ClassVar[Contract] = Contract.ANNOTATES_ONLY

    def apply(self, program: Program, edit: Editor) -> None:
        program.module.fc.bias.mul_(1 + 1e-6)


@dataclass(frozen=True)
class MakesNan(Pass):
    """A pass whose result overflows, though all parameters are finite."""

    name: ClassVar[str] = "makes-nan"
    contract: ClassVar[Contract] = Contract.SAME_NUMBERS

    def apply(self, program: Program, edit: Editor) -> None:
        program.module.stem.weight.fill_(3e38)


@dataclass(frozen=True)
class Crashes(Pass):
    """A pass with a defect at one node."""

    name: ClassVar[str] = "crashes"
    at: str = "conv2"
    error: type[Exception] = ZeroDivisionError

    def apply(self, program: Program, edit: Editor) -> None:
        for node in edit.visit():
            if node.name == self.at:
                raise self.error("deep inside")


@dataclass(frozen=True)
class Breaks(Pass):
    """A pass that leaves a graph that is none."""

    name: ClassVar[str] = "breaks"
    how: str = "fact"

    def apply(self, program: Program, edit: Editor) -> None:
        getattr(self, self.how)(program)

    def fact(self, program: Program) -> None:
        write_facts(program.node("conv2"), fused_relu="ghost")

    def order(self, program: Program) -> None:
        program.node("stem").prepend(program.node("conv2"))

    def target(self, program: Program) -> None:
        program.node("conv2").target = "ghost"

    def shape(self, program: Program) -> None:
        program.module.conv2 = nn.Conv2d(7, 8, 3)

    def output(self, program: Program) -> None:
        (output,) = [node for node in program.nodes() if node.op == "output"]
        output.args = ((program.node("fc"), program.node("add")),)


# ---- order -----------------------------------------------------------------------------------


def test_a_missing_pass_is_named_before_anything_runs(program: Program) -> None:
    with pytest.raises(RequirementError) as caught:
        Pipeline(FoldBatchNorm(), Calibrate(), InsertObservers()).run(program)
    assert caught.value.what == "calibrate needs insert-observers to run before it"
    assert caught.value.where == "pipeline: fold-batch-norm, calibrate, insert-observers"
    assert caught.value.hint == "put insert-observers before calibrate"
    assert caught.value.passes_run == ("fold-batch-norm",)
    assert program.passes_run == []


def test_what_ran_in_an_earlier_pipeline_counts(program: Program) -> None:
    Pipeline(InsertObservers()).run(program)
    program.calibration = [X]
    Pipeline(Calibrate(), QuantizeMinmax()).run(program)
    assert program.passes_run == ["insert-observers", "calibrate", "quantize-minmax"]


def test_a_class_instead_of_a_pass() -> None:
    with pytest.raises(RecipeError, match="a pipeline takes passes, not") as caught:
        Pipeline(FoldBatchNorm)
    assert caught.value.hint == "write FoldBatchNorm()"


# ---- what a step holds -----------------------------------------------------------------------


def test_steps(program: Program) -> None:
    seen: list[Step] = []
    journal = Pipeline(FoldBatchNorm(), MarkRelu()).run(program, seen.append)
    assert [step.name for step in seen] == ["fold-batch-norm", "mark-relu"]
    assert journal.steps == seen
    fold, mark = seen
    assert fold.contract == "same-numbers"
    assert fold.sqnr > 100
    assert mark.sqnr == math.inf
    assert mark.total_sqnr == fold.total_sqnr
    assert fold.seconds > 0
    assert fold.after == mark.before


def test_without_checks_nothing_is_measured(program: Program) -> None:
    runs = []
    program.module.register_forward_hook(lambda *_: runs.append(1))
    journal = Pipeline(FoldBatchNorm(), LoudMark(), check=False).run(program)
    assert not runs
    assert all(step.sqnr is None and step.total_sqnr is None for step in journal)


def test_the_first_answer_of_a_rule_counts(program: Program) -> None:
    def refuse(program: Program, edit: Editor, node: fx.Node) -> Miss | None:
        return Miss(node.name, "never") if node.name == "conv1" else None

    def hit(program: Program, edit: Editor, node: fx.Node) -> bool:
        return node.name.startswith("conv")

    @dataclass(frozen=True)
    class Two(RulePass):
        name: ClassVar[str] = "two"
        rules = (refuse, hit)

    (step,) = Pipeline(Two()).run(program)
    assert step.hits == ("conv2",)
    assert step.misses == (Miss("conv1", "never"),)


# ---- contracts -------------------------------------------------------------------------------


def test_a_wrong_fold_is_caught(program: Program) -> None:
    program.module.bn1.eps = 0.1
    with pytest.raises(ContractError) as caught:
        Pipeline(MarkRelu(), WrongEps()).run(program)
    assert caught.value.what.startswith(
        "wrong-eps promised same-numbers but moved the probe output by "
    )
    assert caught.value.what.endswith("of its largest magnitude (allowed: 0.0001)")
    assert caught.value.where == "wrong-eps"
    assert caught.value.passes_run == ("mark-relu",)


def test_a_mark_that_changes_a_number_is_caught(program: Program) -> None:
    with pytest.raises(ContractError, match="loud-mark promised annotates-only but moved"):
        Pipeline(LoudMark()).run(program)


def test_nan_is_caught(program: Program) -> None:
    with pytest.raises(ContractError, match=r"promised same-numbers but moved .* by inf"):
        Pipeline(MakesNan()).run(program)


def test_the_promise_may_depend_on_the_options(program: Program) -> None:
    @dataclass(frozen=True)
    class Honest(LoudMark):
        @property
        def promise(self) -> Contract:
            return Contract.CHANGES_NUMBERS

    (step,) = Pipeline(Honest()).run(program)
    assert step.contract == "changes-numbers"
    assert 60 < step.sqnr < math.inf


def test_a_lost_output_is_caught(program: Program) -> None:
    with pytest.raises(ContractError, match="the output had 1 tensors and has 2") as caught:
        Pipeline(Breaks("output")).run(program)
    assert caught.value.where == "breaks"


# ---- crashes ---------------------------------------------------------------------------------


def test_a_crash_names_pass_node_and_neighbourhood(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        Pipeline(FoldBatchNorm(), MarkRelu(), Crashes()).run(program)
    error = caught.value
    assert error.what == "crashes failed: ZeroDivisionError: deep inside"
    first, *around = error.where.splitlines()
    assert first == "crashes at %conv2, after fold-batch-norm, mark-relu"
    assert [line.split("=")[0].strip() for line in around] == ["%relu1", ">  %conv2", "%add"]
    assert error.passes_run == ("fold-batch-norm", "mark-relu")
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert not isinstance(error, RequirementError | ContractError)


def test_a_crash_outside_any_node(program: Program) -> None:
    @dataclass(frozen=True)
    class Plain(Pass):
        name: ClassVar[str] = "plain"

        def apply(self, program: Program, edit: Editor) -> None:
            raise KeyError("x")

    with pytest.raises(PassError, match="plain failed: KeyError: 'x'") as caught:
        Pipeline(Plain()).run(program)
    assert caught.value.where == "plain, after no pass"


def test_our_own_errors_pass_through_with_the_place(program: Program) -> None:
    with pytest.raises(SpecError) as caught:
        Pipeline(Crashes(error=SpecError)).run(program)
    assert caught.value.where == "crashes at %conv2"


@pytest.mark.parametrize(
    ("how", "what", "where"),
    [
        ("fact", "facts-name-nodes: fused_relu names %ghost", "breaks, %conv2"),
        ("order", "graph-lints: ", "breaks"),
        ("target", "graph-lints: ", "breaks"),
    ],
)
def test_a_broken_graph_names_the_pass(how: str, what: str, where: str, program: Program) -> None:
    with pytest.raises(VerifyError) as caught:
        Pipeline(MarkRelu(), Breaks(how)).run(program)
    assert caught.value.what.startswith(what)
    assert caught.value.where == where
    assert caught.value.hint


def test_a_graph_that_does_not_run_names_the_pass(program: Program) -> None:
    with pytest.raises(PassError, match="breaks left a graph that fails on the probe") as caught:
        Pipeline(MarkRelu(), Breaks("shape")).run(program)
    assert caught.value.where == "breaks, after mark-relu"


def test_a_probe_that_does_not_fit_is_no_defect_of_a_pass(program: Program) -> None:
    program.probe = (torch.zeros(1, 5, 8, 8),)
    with pytest.raises(CalibrationError, match="the model fails on the probe batch") as caught:
        Pipeline(MarkRelu()).run(program)
    assert caught.value.where == "shapes [[1, 5, 8, 8]]"


def test_no_gradients_flow_through_a_pass(program: Program) -> None:
    seen: list[bool] = []

    @dataclass(frozen=True)
    class Looks(Pass):
        name: ClassVar[str] = "looks"

        def apply(self, program: Program, edit: Editor) -> None:
            seen.append(torch.is_grad_enabled())

    Pipeline(Looks()).run(program)
    assert seen == [False]
    assert torch.is_grad_enabled()


def test_every_error_is_an_fxq_error() -> None:
    for kind in (RequirementError, ContractError, VerifyError, PassError, CalibrationError):
        assert issubclass(kind, FxqError)
    assert issubclass(SpecError, ValueError)


def test_a_whole_run_on_a_probe_of_another_batch_size() -> None:
    program = capture(tiny_conv(), X[:1])
    program.probe = (torch.randn(5, 3, 8, 8),)
    program.calibration = [torch.randn(4, 3, 8, 8)]
    passes = [FoldBatchNorm(), MarkRelu(), InsertObservers(), Calibrate(), QuantizeMinmax()]
    assert Pipeline(*passes).run(program)[-1].total_sqnr > 20


def test_outputs_of_every_nesting_are_compared() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.bn(self.conv(x))
            return {"out": (y, [y.argmax(), y.relu()]), "size": x.shape[0]}

    program = capture(Nested(), X)
    (step,) = Pipeline(FoldBatchNorm()).run(program)
    assert step.census == {"BatchNorm2d": -1}
