"""Snapshots: the text, and digests that change when and only when numbers change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.graph.capture import capture
from fxq.graph.program import Program, write_facts
from fxq.trail.snapshot import NodeRecord, Snapshot, module_digest, snapshot, tensor_digest


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.ones(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)) + self.shift
        return torch.cat([x.relu().flatten(2, 3), x.flatten(2)], dim=1).transpose(1, 2)


@pytest.fixture
def program() -> Program:
    return capture(Net(), torch.zeros(2, 3, 8, 8))


TEXT = """\
%x = Input:f32[2,3,8,8]()
%conv = Conv2d:f32[2,4,6,6](%x)
%bn = BatchNorm2d:f32[2,4,6,6](%conv)
%shift = Constant:f32[4,6,6]()
%add = add:f32[2,4,6,6](%bn, %shift)
%relu = .relu:f32[2,4,6,6](%add)
%flatten = .flatten:f32[2,4,36](%relu, 2, 3)
%flatten_1 = .flatten:f32[2,4,36](%add, 2)
%cat = cat:f32[2,8,36](%flatten, %flatten_1, dim=1)
%transpose = .transpose:f32[2,36,8](%cat, 1, 2)
%output = Output:f32[2,36,8](%transpose)"""


def test_text(program: Program) -> None:
    assert snapshot(program).text(digests=False) == TEXT
    lines = snapshot(program).text().splitlines()
    assert [line.split("  #")[0] for line in lines] == TEXT.splitlines()
    holders = [line for line in lines if "  #" in line]
    assert [line.split(" ")[0] for line in holders] == ["%conv", "%bn", "%shift"]
    assert all(len(line.split("#")[1]) == 6 for line in holders)


def test_facts_are_short_words(program: Program) -> None:
    node = program.node("conv")
    write_facts(node, nonneg=True, upper=6.0, fused_relu="relu", skip="why", note="w4")
    line = snapshot(program).by_name()["conv"].text(digests=False)
    assert line.endswith("(%x)  [nonneg, <=6, fused_relu=relu, skip=why, w4]")


def test_census_and_names(program: Program) -> None:
    taken = snapshot(program)
    assert taken.census()[".flatten"] == 2
    assert sum(taken.census().values()) == len(taken.nodes)
    assert list(taken.by_name()) == [node.name for node in program.nodes()]


def test_a_snapshot_does_not_change_with_the_program(program: Program) -> None:
    before = snapshot(program)
    text = before.text()
    with torch.no_grad():
        program.module.conv.weight.zero_()
    write_facts(program.node("conv"), nonneg=True)
    assert before.text() == text
    assert snapshot(program).text() != text


def test_json_round_trip(program: Program) -> None:
    taken = snapshot(program)
    assert Snapshot.from_json(taken.to_json()) == taken


@pytest.mark.parametrize(
    ("dtype", "short"),
    [
        (torch.float64, "f64"),
        (torch.bfloat16, "bf16"),
        (torch.float16, "f16"),
        (torch.int64, "i64"),
        (torch.uint8, "u8"),
        (torch.bool, "bool"),
        (torch.complex64, "complex64"),
    ],
)
def test_dtypes(dtype: torch.dtype, short: str) -> None:
    program = capture(nn.Identity(), torch.zeros(2, dtype=dtype))
    assert snapshot(program).nodes[0].value == f"{short}[2]"


def test_paths_and_code(program: Program) -> None:
    taken = snapshot(program)
    assert taken.by_name()["conv"].path == "conv"
    assert "conv = self.conv(x)" in taken.code
    assert Snapshot.from_json(taken.to_json(), taken.code).code == taken.code
    assert Snapshot(taken.nodes) == taken


def test_a_record_without_anything() -> None:
    assert NodeRecord("x", "Input").text() == "%x = Input()"


# ---- digests ---------------------------------------------------------------------------------

EDITS: dict[str, Any] = {
    "in place": lambda m: m.conv.weight.mul_(2),
    "one element": lambda m: m.conv.weight[0, 0, 0].fill_(7),
    "bias": lambda m: m.conv.bias.add_(1),
    "through data": lambda m: m.conv.weight.data.add_(1),
    "through a view": lambda m: m.conv.weight.view(-1)[5:6].add_(1),
    "through numpy": lambda m: m.conv.weight.data.numpy().__iadd__(1),
    "replaced": lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight + 1)),
    "data replaced": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data + 1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_digest_changes_with_the_numbers(edit: str, program: Program) -> None:
    before = snapshot(program).by_name()
    with torch.no_grad():
        EDITS[edit](program.module)
    after = snapshot(program).by_name()
    assert {name for name in after if after[name].digest != before[name].digest} == {"conv"}


def test_buffers_and_constants_count(program: Program) -> None:
    before = snapshot(program).by_name()
    program.module.bn.running_mean.add_(1)
    program.module.shift.add_(1)
    after = snapshot(program).by_name()
    changed = {name for name in after if after[name].digest != before[name].digest}
    assert changed == {"bn", "shift"}


def test_a_digest_stays_with_the_numbers(program: Program) -> None:
    before = snapshot(program)
    program.run(torch.ones(2, 3, 8, 8))
    program.module.conv.weight.requires_grad_(False)
    program.module.conv.weight.grad = torch.ones_like(program.module.conv.weight)
    with torch.no_grad():
        program.module.conv.weight.add_(0)
    same = program.module.conv.weight.detach().clone()
    program.module.conv.weight = nn.Parameter(same)
    assert snapshot(program) == before
    assert module_digest(copy.deepcopy(program.module.conv)) == module_digest(program.module.conv)


def test_names_and_dtypes_count() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        one.weight.zero_(), one.bias.fill_(1)
        other.weight.fill_(1), other.bias.zero_()
    assert module_digest(one) != module_digest(other)
    assert module_digest(one) != module_digest(copy.deepcopy(one).to(torch.float16))
    assert module_digest(nn.ReLU()) == ""


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2).expand(3, 2),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}",
)
def test_every_tensor_has_a_digest(tensor: Tensor) -> None:
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())


def test_inference_tensors_have_digests_that_change() -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
        before = tensor_digest(tensor)
        tensor.add_(1)
        assert tensor_digest(tensor) != before


def test_shape_counts() -> None:
    flat = torch.arange(6.0)
    assert tensor_digest(flat) != tensor_digest(flat.reshape(2, 3))
