"""Lowering: which instructions a network becomes, its islands of float, and the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.backends.eager import EagerBackend, EagerModule
from fxq.contracts import output_sqnr
from fxq.errors import ArtifactError, FxqError, LoweringError
from fxq.graph.capture import capture
from fxq.integer.ledger import Ledger, LedgerEntry
from fxq.integer.lowering import lower_to_integers
from fxq.integer.program import IntegerProgram
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.passes import Calibrate, InsertObservers, QuantizeMinmax
from fxq.pipeline import Pipeline


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Layers and a function over them."""

    def __init__(self, function: Callable[..., Any], **more: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.b = nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, 8)
            self.head = nn.Linear(8, 5)
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        for name, module in more.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def ops(program: IntegerProgram) -> list[str]:
    return [step.op for step in program]


@pytest.mark.parametrize(
    ("build", "shape", "expected"),
    [
        (
            tiny_conv,
            (3, 8, 8),
            "quantize conv max_pool conv global_avg_pool reshape linear",
        ),
        (tiny_residual, (3, 8, 8), "quantize conv conv conv add global_avg_pool reshape linear"),
        (tiny_depthwise, (3, 8, 8), "quantize conv conv conv global_avg_pool reshape linear"),
        (tiny_concat, (3, 8, 8), "quantize conv conv cat conv global_avg_pool reshape linear"),
        (tiny_mlp, (16,), "quantize linear linear linear"),
    ],
)
def test_tiny_networks_are_all_integers(
    build: Callable[[], nn.Module], shape: tuple[int, ...], expected: str, compiled
) -> None:
    result = compiled(build(), images(2, *shape))
    assert ops(result.artifact.integers) == expected.split()
    assert result.artifact.ledger.coverage() == 1.0
    assert result.artifact.ledger.in_float() == []
    assert result.artifact.warnings == []


ISLANDS: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "sigmoid": (lambda m, x: m.b(torch.sigmoid(m.a(x))), "torch.sigmoid"),
    "silu": (lambda m, x: m.b(F.silu(m.a(x))), "functional.silu"),
    "gelu": (lambda m, x: m.b(F.gelu(m.a(x))), "functional.gelu"),
    "hardswish": (lambda m, x: m.b(F.hardswish(m.a(x))), "functional.hardswish"),
    "method": (lambda m, x: m.b(m.a(x).tanh()), "method.tanh"),
    "product": (lambda m, x: m.b(m.a(x) * 0.5), "operator.mul"),
    "gate": (lambda m, x: m.b((y := m.a(x)) * y.mean((2, 3), keepdim=True)), "operator.mul"),
    "layer norm": (lambda m, x: m.fc(m.norm(_tokens(m, x))), "module"),
    "softmax": (lambda m, x: m.fc(torch.softmax(_tokens(m, x), -1)), "torch.softmax"),
    "matmul": (
        lambda m, x: m.fc(torch.matmul((y := _tokens(m, x)).transpose(1, 2), y)),
        "torch.matmul",
    ),
    "einsum": (
        lambda m, x: m.fc(torch.einsum("nij,nik->njk", y := _tokens(m, x), y)),
        "torch.einsum",
    ),
    "attention": (lambda m, x: m.fc(m.attention(*[_tokens(m, x)] * 3)[0]), "module"),
    "interpolate": (
        lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2.0, mode="nearest")),
        "functional.interpolate",
    ),
    "unequal sizes": (lambda m, x: m.b(m.a(x) + m.a(x)[:, :, :1]), "operator.add"),
}


def _tokens(m: Net, x: Tensor) -> Tensor:
    return m.a(x).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", ISLANDS)
def test_float_islands(name: str, compiled, tmp_path) -> None:
    """Integers, float, integers again; equal to the simulation, and to itself from a file."""
    import fxq

    function, target = ISLANDS[name]
    x = images(2, 3, 6, 6)
    result = compiled(Net(function), x)
    program = result.artifact.integers
    program.check()
    assert target in {step.attributes.get("target", step.op) for step in program}
    assert {"dequantize", "quantize", "conv"} <= set(ops(program))
    assert result.artifact.ledger.coverage() == 1.0
    assert result.artifact.ledger.in_float()
    assert all(entry.why for entry in result.artifact.ledger.in_float())
    assert output_sqnr(result.program.run(x), result.module(x)) > 35
    torch.testing.assert_close(result.module(x), Reference(program)(x), rtol=0, atol=0)
    result.artifact.save(tmp_path / "run")
    torch.testing.assert_close(
        fxq.load(tmp_path / "run").module(x), result.module(x), rtol=0, atol=0
    )


class Scale(nn.Module):
    """Code of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:  # cannot be traced
            return x
        return x * self.factor


def test_leaf_modules_run_and_are_not_stored(compiled, tmp_path) -> None:
    x = images(2, 3, 6, 6)
    net = Net(lambda m, x: m.head(m.second(m.b(m.first(m.a(x)))).mean((2, 3))))
    net.first, net.second = Scale(), Scale()
    with torch.no_grad():
        net.second.factor.fill_(-3.0)
    result = compiled(net, x, leaf_modules=[Scale])
    assert len(result.artifact.integers.foreign) == 2
    assert output_sqnr(result.program.run(x), result.module(x)) > 35
    with pytest.raises(ArtifactError, match=r"foreign\.first, foreign\.second is code of your own"):
        result.artifact.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


@torch.fx.wrap
def doubled(x: Tensor) -> Tensor:
    return x * 2


@torch.fx.wrap
def halved(x: Tensor) -> Tensor:
    return x / 2


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return doubled(doubled(halved(x)))


def test_two_functions_of_one_module_are_told_apart(compiled) -> None:
    x = images(2, 3, 6, 6)
    net = Net(lambda m, x: m.b(m.twice(m.a(x))), twice=Twice())
    result = compiled(net, x)
    assert len(set(result.artifact.integers.foreign.values())) == 2
    assert output_sqnr(net.eval()(x).detach(), result.module(x)) > 30


def test_methods_an_artifact_may_not_name_still_run(compiled, tmp_path) -> None:
    x = images(2, 3, 6, 6)
    net = Net(lambda m, x: m.b(torch.sigmoid(m.a(x)).requires_grad_(False)))
    result = compiled(net, x)
    assert output_sqnr(result.program.run(x), result.module(x)) > 35
    with pytest.raises(ArtifactError, match="code of your own"):
        result.artifact.save(tmp_path / "run")


def test_modules_with_hooks_keep_them(compiled) -> None:
    x = images(2, 3, 6, 6)
    gelu = nn.GELU()
    gelu.register_forward_hook(lambda module, args, output: output * 10)
    net = Net(lambda m, x: m.b(m.gelu(m.a(x))), gelu=gelu)
    result = compiled(net, x)
    assert output_sqnr(net.eval()(x).detach(), result.module(x)) > 30


# ---- names, sizes and bounds ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_helper_registers_do_not_collide_with_the_users_names(compiled) -> None:
    """A convolution that is padded first, beside modules of the very names fxq would choose."""
    x = images(2, 3, 6, 6)

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 2, padding="same")
            self.conv_pad = nn.ZeroPad2d(1)
            self.conv_float = nn.Sigmoid()
            self.last = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.conv_float(self.conv_pad(x)).mean()
            z = self.conv(x)
            return self.last(self.conv_pad(z)), torch.tanh(z), y

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        result = compiled(Same(), x)
        expected = result.program.run(x)
    names = [step.name for step in result.artifact.integers]
    assert len(set(names)) == len(names)
    result.artifact.integers.check()
    assert output_sqnr(expected, result.module(x)) > 35


def test_a_size_read_by_two(compiled) -> None:
    """A size is still there for a reshape after float code has used it, too."""
    x = images(2, 3, 6, 6)
    net = Net(lambda m, x: _by_size(m, x))
    result = compiled(net, x)
    for batch in (x, images(5, 3, 6, 6)):
        assert result.module(batch).shape == (len(batch) * 36, 8)
    assert output_sqnr(result.program.run(x), result.module(x)) > 35


def _by_size(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    count = y.shape[0]
    y = m.b(torch.sigmoid(y) / (count * 1.0) * count)
    return m.fc(y.permute(0, 2, 3, 1).reshape(count * 36, 8))


def test_dtypes_are_those_of_floats(compiled) -> None:
    x = images(2, 3, 6, 6)
    net = Net(lambda m, x: (y := m.b(m.a(x))) * torch.ones(8, 1, 1).to(y.dtype))
    result = compiled(net, x)
    assert result.module(x).dtype is torch.float32
    assert Reference(result.artifact.integers)(x).dtype is torch.float32


def test_constants_and_parameters_are_stored(compiled, tmp_path) -> None:
    import fxq

    x = images(2, 3, 6, 6)
    net = Net(lambda m, x: m.head((m.b(m.a(x)) + m.shift).mean((2, 3))))
    net.shift = nn.Parameter(torch.full((1, 8, 1, 1), 3.0))
    result = compiled(net, x)
    assert output_sqnr(result.program.run(x), result.module(x)) > 35
    loaded = fxq.load(result.artifact.save(tmp_path / "run"))
    assert torch.equal(loaded.module(x), result.module(x))


def test_sums_that_could_overflow_stay_in_float(compiled) -> None:
    net = nn.Sequential(nn.Linear(70000, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    x = images(2, 70000)
    result = compiled(net, x)
    (entry,) = [entry for entry in result.artifact.ledger.in_float() if entry.layer]
    assert entry.why == "its sums could leave 32 bits"
    assert output_sqnr(net(x).detach(), result.module(x)) > 25


def test_outputs_may_be_containers(compiled) -> None:
    x = images(2, 3, 6, 6)
    net = Net(lambda m, x: {"a": (y := m.a(x)), "rest": [m.b(y), (x, 3)]})
    result = compiled(net, x)
    out = result.module(x)
    assert set(out) == {"a", "rest"}
    assert torch.equal(out["rest"][1][0], x)
    assert out["rest"][1][1] == 3


# ---- what stays in float, and why ----------------------------------------------------------------


REASONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "reflect": (
        lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        (3, 6, 6),
        "kernels pad with zeros, not by reflect",
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(3, 8, 2),
        (3, 6, 6),
        "there is no per-channel integer kernel for transposed convolutions",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str, compiled) -> None:
    build, shape, why = REASONS[name]
    net = nn.Sequential(nn.Conv2d(3, 3, 1), build(), nn.Conv2d(8, 4, 1)).eval()
    x = images(2, *shape)
    result = compiled(net, x)
    (entry,) = result.artifact.ledger.in_float()
    assert (entry.path, entry.where, entry.why, entry.layer) == ("1", "float", why, True)
    assert result.artifact.ledger.coverage() == pytest.approx(2 / 3)
    assert result.artifact.warnings == [
        "2 of 3 convolutions and linears run on integers; the recipe promised 100%",
        f"1 stays in float: {why}",
    ]
    assert output_sqnr(net(x).detach(), result.module(x)) > 30


def test_a_skipped_layer_stays_in_float(compiled) -> None:
    x = images(2, 3, 8, 8)
    result = compiled(tiny_residual(), x, layers={"conv1": {"skip": True}})
    entries = {entry.path: entry for entry in result.artifact.ledger.entries}
    assert entries["conv1"].where == "float"
    assert entries["conv1"].why == "the recipe skips it"
    assert "module" in ops(result.artifact.integers)
    assert result.artifact.ledger.coverage() == 0.75
    assert len(result.artifact.warnings) == 2
    assert output_sqnr(result.program.run(x), result.module(x)) > 35


def test_the_ledger_names_every_captured_node(compiled) -> None:
    x = images(2, 3, 8, 8)
    result = compiled(tiny_residual(), x)
    captured = {record.name for record in result.journal[0].before.nodes}
    named = {entry.node for entry in result.artifact.ledger.entries}
    assert captured - named <= {"x", "output"}
    folded = {e.node: e.why for e in result.artifact.ledger.entries if e.where == "folded"}
    assert folded["bn1"] == "by fold-batch-norm"
    assert folded["relu1"] == "runs in the kernel of %conv1"
    counts = result.artifact.ledger.counts()
    assert counts == Counter(e.where for e in result.artifact.ledger.entries) | {"float": 0}


def test_ledgers_survive_json() -> None:
    ledger = Ledger((LedgerEntry("a", "a", "Conv2d", "float", "why", True),))
    assert Ledger.from_json(ledger.to_json()) == ledger
    assert Ledger(()).coverage() == 1.0
    assert ledger.coverage() == 0.0
    assert ledger.warnings(0.0) == []
    for other in (None, {}, {"a": 1}, "text", 3, [3], [{"node": "a"}], [[1, 2]]):
        with pytest.raises(ArtifactError, match="ledger is damaged"):
            Ledger.from_json(other)


# ---- programs that cannot be lowered -------------------------------------------------------------


def test_observers_are_obstacles() -> None:
    program = capture(tiny_conv(), images(1, 3, 8, 8))
    program.calibration = [images(2, 3, 8, 8)]
    Pipeline(InsertObservers(), Calibrate()).run(program)
    with pytest.raises(LoweringError, match="cannot run") as caught:
        EagerBackend().lower(program)
    assert "run a quantize pass first" in str(caught.value)
    assert len(caught.value.obstacles) > 1


def test_per_channel_activations_are_obstacles() -> None:
    program = capture(tiny_conv(), images(1, 3, 8, 8))
    program.calibration = [images(2, 3, 8, 8)]
    Pipeline(InsertObservers(per_channel=True), Calibrate(), QuantizeMinmax()).run(program)
    with pytest.raises(LoweringError, match="cannot run") as caught:
        EagerBackend().lower(program)
    assert "per_channel = false" in str(caught.value)


def test_a_program_in_float_runs_in_float() -> None:
    """Nothing is quantized, so everything is a float instruction."""
    model = tiny_conv()
    x = images(2, 3, 8, 8)
    program, ledger = lower_to_integers(capture(model, x))
    assert set(ops(program)) <= {"float", "module"}
    assert ledger.coverage() == 0.0
    with torch.no_grad():
        torch.testing.assert_close(EagerModule(program)(x), model(x))


def test_errors_of_float_code_are_left_as_they_are(compiled) -> None:
    net = Net(lambda m, x: m.b(torch.sigmoid(m.a(x)).view(2, 8, 6, 6)))
    result = compiled(net, images(2, 3, 6, 6))
    with pytest.raises(RuntimeError, match="shape") as caught:
        result.module(images(3, 3, 6, 6))
    assert not isinstance(caught.value, FxqError)
