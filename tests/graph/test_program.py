"""Programs, editors, regions and the invariants of a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxq.errors import VerifyError
from fxq.graph.capture import capture
from fxq.graph.ops import Kind
from fxq.graph.program import (
    FACTS_KEY,
    Facts,
    LayerOverride,
    Program,
    facts,
    layer_path,
    recompile,
    write_facts,
)
from fxq.graph.regions import Regions
from fxq.graph.rewrite import Editor, Miss, neighbourhood
from fxq.graph.verify import RULES, verify
from fxq.quant.observers import RangeObserver

X = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.left(x) + self.right(x)
        return self.fc(self.pool(x).mean((2, 3)))


@pytest.fixture
def program() -> Program:
    return capture(Net(), X)


# ---- program ---------------------------------------------------------------------------------


def test_nodes_by_name(program: Program) -> None:
    assert program.node("left").target == "left"
    with pytest.raises(KeyError):
        program.node("nothing")


def test_facts_of_a_bare_node_are_empty() -> None:
    graph = fx.Graph()
    assert facts(graph.placeholder("x")) == Facts()


def test_layer_path(program: Program) -> None:
    assert layer_path(program.node("stem_0")) == "stem.0"
    assert layer_path(program.node("add")) == "add"


def test_overrides_apply_in_order_by_path_or_node_name(program: Program) -> None:
    program.overrides = (
        LayerOverride("stem.*", {"bits": 4, "skip": True}),
        LayerOverride("*", {"bits": 5}),
        LayerOverride("stem_0", {"bits": 6}),
        LayerOverride("STEM.0", {"bits": 7}),
    )
    assert program.layer_options(program.node("stem_0")) == {"bits": 6, "skip": True}
    assert program.layer_options(program.node("add")) == {"bits": 5}


def test_the_probe_is_the_example_unless_given() -> None:
    captured = capture(nn.ReLU(), X)
    assert captured.probe is captured.example_inputs
    assert Program(captured.module, (X,), probe=(2 * X,)).probe[0] is not X


def test_recompile_drops_what_is_not_used_but_keeps_inputs(program: Program) -> None:
    with program.graph.inserting_after(program.node("stem_1")):
        program.graph.call_module("pool", (program.node("stem_1"),))
    program.module.add_submodule("orphan", nn.Linear(2, 2))
    recompile(program)
    assert not hasattr(program.module, "orphan")
    assert [n.target for n in program.nodes()].count("pool") == 1


# ---- editor ----------------------------------------------------------------------------------


def test_insert_module_copies_facts_and_finds_free_names(program: Program) -> None:
    edit = Editor(program, "mine")
    node = program.node("left")
    first = edit.insert_module("left_extra", nn.ReLU(), after=node)
    other = edit.insert_module("left_extra", nn.ReLU(), after=node)
    assert [first.name, other.name] == ["left_extra", "left_extra_1"]
    known = facts(first)
    assert (known.origin, known.shape, known.dtype) == ("mine", (2, 4, 6, 6), torch.float32)
    assert known.path == "left"
    assert not first.users


def test_a_module_inserted_twice_is_one_module(program: Program) -> None:
    edit, module = Editor(program, "mine"), nn.ReLU()
    one = edit.insert_module("extra", module, after=program.node("left"))
    two = edit.insert_module("other", module, after=program.node("right"))
    assert one.target == two.target == "extra"


def test_reroute_all_or_some(program: Program) -> None:
    edit = Editor(program, "mine")
    stem = program.node("stem_1")
    new = edit.insert_module("extra", nn.ReLU(), after=stem)
    edit.reroute(stem, new, lambda user: user.name == "left")
    assert program.node("left").args == (new,)
    assert program.node("right").args == (stem,)
    edit.reroute(stem, new)
    assert list(stem.users) == [new]


def test_replace_module_inside_a_container(program: Program) -> None:
    edit = Editor(program, "mine")
    replacement = nn.Conv2d(3, 4, 1)
    edit.replace_module(program.node("stem_0"), replacement)
    assert program.module.get_submodule("stem.0") is replacement


def test_remove(program: Program) -> None:
    Editor(program, "mine").remove(program.node("pool"))
    recompile(program)
    assert program.run(X).shape == (2, 2)
    assert "pool" not in [node.name for node in program.nodes()]


def test_visit_leaves_out_what_was_erased(program: Program) -> None:
    edit = Editor(program, "mine")
    seen = []
    for node in edit.visit():
        assert edit.current is node
        seen.append(node.name)
        if node.name == "stem_0":
            edit.remove(program.node("stem_1"))
    assert "stem_1" not in seen
    assert edit.current is None


def test_hits_misses_notes(program: Program) -> None:
    edit = Editor(program, "mine")
    edit.hit(program.node("left"))
    edit.miss(program.node("right"), "because")
    edit.note("a sentence")
    assert edit.hits == ["left"]
    assert edit.misses == [Miss("right", "because")]
    assert str(edit.misses[0]) == "%right: because"
    assert edit.notes == ["a sentence"]


def test_neighbourhood(program: Program) -> None:
    lines = neighbourhood(program.node("add")).splitlines()
    assert [line.split("=")[0].strip() for line in lines] == ["%left", "%right", ">  %add", "%pool"]


# ---- regions ---------------------------------------------------------------------------------


def names(nodes: Any) -> set[str]:
    return {node.name for node in nodes}


def test_what_runs_on_integers(program: Program) -> None:
    regions = Regions(program)
    assert names(regions.anchors()) == {"stem_0", "left", "right", "fc"}
    integer = names(node for node in program.nodes() if regions.is_integer(node))
    assert integer == {"stem_0", "stem_1", "left", "right", "add", "pool", "mean"}
    first, last = regions.first_and_last()
    assert (names(first), names(last)) == ({"stem_0"}, {"fc"})


def test_readers_and_carriers(program: Program) -> None:
    regions = Regions(program)
    assert names(regions.consumers(program.node("stem_0"))) == {"left", "right"}
    assert names(regions.consumers(program.node("add"))) == {"mean"}
    assert regions.carrier(program.node("pool")).name == "add"
    assert regions.kind(program.node("pool")) is Kind.MAX_POOL
    assert regions.leads_to_anchor(program.node("pool"))
    assert not regions.leads_to_anchor(program.node("fc"))


def test_a_skipped_layer_breaks_the_chain(program: Program) -> None:
    program.overrides = (LayerOverride("left", {"skip": True}),)
    regions = Regions(program)
    assert regions.reasons == {program.node("left"): "the recipe skips it"}
    assert not regions.is_integer(program.node("add"))


# ---- invariants ------------------------------------------------------------------------------


def test_a_captured_program_keeps_every_rule(program: Program) -> None:
    verify(program)
    assert all(rule.__doc__ for rule in RULES)


def loose_facts(program: Program) -> None:
    program.node("left").meta[FACTS_KEY] = {"nonneg": True}


def missing_target(program: Program) -> None:
    program.node("left").target = "nothing"


def used_before_defined(program: Program) -> None:
    program.node("stem_0").prepend(program.node("pool"))


def names_nobody(program: Program) -> None:
    write_facts(program.node("left"), fused_relu="ghost")


def one_sided_host(program: Program) -> None:
    write_facts(program.node("stem_0"), fused_relu="stem_1")


def one_sided_relu(program: Program) -> None:
    write_facts(program.node("stem_1"), fused_into="stem_0")


def parameter_is_nan(program: Program) -> None:
    program.module.left.weight.data[0, 0] = float("nan")


def buffer_is_infinite(program: Program) -> None:
    program.module.left.register_buffer("scale", torch.tensor(float("inf")))


def second_output(program: Program) -> None:
    program.graph.create_node("output", "output", (program.node("left"),), name="more")


BROKEN = [
    (loose_facts, "facts-are-typed: its facts are a dict", "%left"),
    (missing_target, "graph-lints: ", None),
    (used_before_defined, "graph-lints: ", None),
    (names_nobody, "facts-name-nodes: fused_relu names %ghost, which is not in the graph", "%left"),
    (one_sided_host, "fusions-agree: it runs %stem_1, which says otherwise", "%stem_0"),
    (one_sided_relu, "fusions-agree: it runs inside %stem_0, which says otherwise", "%stem_1"),
    (parameter_is_nan, "parameters-are-finite: its weight is not finite", "%left"),
    (buffer_is_infinite, "parameters-are-finite: its scale is not finite", "%left"),
    (second_output, "one-output: there are 2 outputs", None),
]


@pytest.mark.parametrize(("spoil", "what", "where"), BROKEN, ids=[b[0].__name__ for b in BROKEN])
def test_a_broken_rule_names_itself_and_the_node(
    spoil: Any, what: str, where: str | None, program: Program
) -> None:
    spoil(program)
    with pytest.raises(VerifyError) as caught:
        verify(program)
    assert caught.value.what.startswith(what)
    assert caught.value.where == where
    assert caught.value.hint.startswith("rule: ")


def test_an_empty_observer_is_finite_enough(program: Program) -> None:
    edit = Editor(program, "mine")
    node = edit.insert_module("seen", RangeObserver(), after=program.node("left"))
    edit.reroute(program.node("left"), node)
    verify(program)


# ---- running ---------------------------------------------------------------------------------


def test_run_gives_the_models_numbers_without_gradients(program: Program) -> None:
    want = Net().eval()(X)
    got = program.run(X)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad
    assert X.is_contiguous()


def test_a_model_that_views_gets_the_layout_it_was_written_for() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).view(x.size(0), -1)

    model = Views().eval()
    torch.testing.assert_close(capture(model, X).run(X), model(X))


class Viewing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


def test_a_leaf_of_the_users_gets_the_layout_it_was_written_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Viewing()).eval()
    program = capture(model, X, leaf_modules=[Viewing])
    torch.testing.assert_close(program.run(X), model(X))
