"""Simulations: what no kernel runs computes its dequantized integers in float, and says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.backends.onnx import OnnxBackend
from fxq.compiler import Result
from fxq.errors import ArtifactError, LoweringError
from fxq.integer.arguments import Register
from fxq.integer.comparison import Comparison
from fxq.integer.program import Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.quant.dynamic import DynamicAciqQuantizer
from fxq.recipe import Recipe

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
PAPER = "aciq-paper-4w4a"
PER_TENSOR = ("insert-observers.per_channel=false", "quantize-aciq.activation_allocation=none")
DYNAMIC = ("quantize-aciq.dynamic=true",)
SETTINGS = {
    "paper": (),
    "per tensor": PER_TENSOR,
    "dynamic": DYNAMIC,
    "dynamic integers": (*PER_TENSOR, *DYNAMIC, "insert-observers.placement=integer"),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv": tiny_conv,
    "residual": tiny_residual,
    "depthwise": tiny_depthwise,
    "concat": tiny_concat,
    "mlp": tiny_mlp,
}


def compiled(name: str, recipe: str | Recipe = PAPER, settings: Any = (), **options: Any) -> Result:
    x = VECTORS if name == "mlp" else X
    return fxq.compile(
        NETWORKS[name](), x[:1], recipe, calibration=[x], settings=settings, check=False, **options
    )


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_module_computes_what_the_passes_simulated(
    name: str, settings: str, tmp_path: Path
) -> None:
    x = VECTORS if name == "mlp" else X
    result = compiled(name, settings=SETTINGS[settings])
    artifact = result.artifact
    artifact.integers.check()
    expected, simulated = Reference(artifact.integers)(x), result.program.run(x)
    assert torch.equal(artifact.module(x), expected)
    # Where a layer runs on integers its bias is rounded, so a code may differ.
    assert (expected - simulated).abs().max() <= 0.02 * simulated.abs().max()
    loaded = fxq.load(artifact.save(tmp_path / "run"))
    assert torch.equal(loaded.module(x), expected)
    assert loaded.warnings == artifact.warnings
    assert artifact.simulation is loaded.simulation is True


def test_weights_are_those_that_were_quantized() -> None:
    """The first layer reads the network's input, which the paper leaves in float."""
    result = compiled("conv")
    program = result.artifact.integers
    first = next(step for step in program if step.op == "conv")
    assert first.inputs == program.inputs
    module: Any = result.program.submodule(result.program.node("conv1"))
    assert torch.equal(program.tensor(first, "weight"), module.codes)
    assert not any(step.tensors for step in program if step.op == "module")  # no float weights


def test_what_computes_in_float_is_told() -> None:
    result = compiled("residual")
    (sentence,) = result.artifact.warnings
    assert sentence == (
        "3 of 4 layers compute in float (1: its input is not quantized; 1: its output is quantized "
        "per channel, which no integer kernel rounds to; 1: its input is quantized per channel, "
        "which no integer kernel multiplies); accuracy means something, speed does not"
    )
    assert Recipe.from_toml(result.artifact.recipe_toml).simulation
    integers = (*PER_TENSOR, "insert-observers.placement=integer")
    assert compiled("residual", settings=integers).artifact.warnings == []


@pytest.mark.parametrize(
    ("settings", "node", "what", "remedy"),
    [
        (PER_TENSOR, "stem", "by an input that is not quantized", "placement = integer"),
        (SETTINGS["dynamic integers"], "stem_quantizer", "found at run time", "dynamic = false"),
        ((), "relu1_quantizer", "activations per channel", "per_channel = false"),
    ],
    ids=["input", "dynamic", "per channel"],
)
def test_without_the_key_it_is_refused(settings: Any, node: str, what: str, remedy: str) -> None:
    recipe = replace(Recipe.load(PAPER), simulation=False)
    with pytest.raises(LoweringError, match="cannot run") as caught:
        compiled("residual", recipe, settings)
    found = {one.node: one.why for one in caught.value.obstacles}
    assert what in found[node]
    assert remedy in found[node]
    assert "simulation = true in the recipe" in found[node]


def test_a_recipe_with_kernels_for_all_is_the_same_with_the_key() -> None:
    recipe = replace(Recipe.load("aciq-4bit"), simulation=True)
    plain, simulation = compiled("residual", "aciq-4bit"), compiled("residual", recipe)
    assert simulation.artifact.integers.instructions == plain.artifact.integers.instructions
    assert simulation.artifact.ledger == plain.artifact.ledger


# ---- ONNX ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "concat", "mlp"])
def test_onnx_runs_it(name: str) -> None:
    x = VECTORS if name == "mlp" else X
    result = compiled(name, backend="onnx")
    assert result.artifact.simulation
    expected = Reference(result.artifact.integers)(x)
    apart = (result.module(x) - expected).abs().max() / expected.abs().max()
    assert apart < 0.02


def test_onnx_has_no_ranges_of_batches() -> None:
    result = compiled("residual", settings=DYNAMIC)
    with pytest.raises(LoweringError, match="cannot express 2 nodes") as caught:
        OnnxBackend().load(result.artifact.integers)
    assert "finds its range in each batch" in str(caught.value)
    assert "dynamic = false" in str(caught.value.hint)


# ---- instructions --------------------------------------------------------------------------------


def with_bits() -> IntegerProgram:
    """A quantizer of three channels with 2, 1 and 0 bits, and one that is dynamic."""
    tensors = {
        "scale": torch.tensor([0.5, 1.0, 2.0]),
        "zero_point": torch.tensor([0, 1, 1], dtype=torch.uint8),
        "top": torch.tensor([3, 1, 0], dtype=torch.uint8),
    }
    attributes = {"bits": 2, "axis": 1}
    names = {role: role for role in tensors}
    static = Instruction("q", "fake_quantize", ("x",), attributes, names)
    options: Any = DynamicAciqQuantizer(3, per_channel=True).options()
    dynamic = Instruction("d", "dynamic_quantize", ("q",), options)
    return IntegerProgram(("x",), [static, dynamic], Register("d"), tensors)


def test_channels_end_at_their_own_codes() -> None:
    x = torch.tensor([[9.0, 9.0, 9.0], [-9.0, -9.0, -9.0], [0.6, 0.4, 0.4]])
    _, values = Reference(with_bits()).run(x)
    assert values["q"].tolist() == [[1.5, 0.0, -2.0], [0.0, -1.0, -2.0], [0.5, 0.0, -2.0]]


def test_programs_survive_json_and_comparison() -> None:
    program, x = with_bits(), torch.randn(6, 3)
    again = IntegerProgram.from_json(program.to_json(), program.tensors)
    assert again == program
    assert again.weight_bytes() == program.weight_bytes()
    _, values = Reference(program).run(x)
    comparison = Comparison(program)
    comparison.add((x,), values, values)
    assert {layer.differing for layer in comparison.layers.values()} == {0}


DAMAGE: dict[str, Callable[[Any, Any, dict[str, Tensor]], Any]] = {
    "wide tops": lambda q, d, t: t.update(top=t["top"].int()),
    "fewer tops": lambda q, d, t: t.update(top=t["top"][:2]),
    "a top beyond the bits": lambda q, d, t: t.update(top=t["top"] + 1),
    "a zero point beyond its top": lambda q, d, t: t.update(zero_point=t["zero_point"] + 1),
    "an unknown law": lambda q, d, t: d["attributes"].update(prior="cauchy"),
    "an unknown rule": lambda q, d, t: d["attributes"].update(allocation="most"),
    "no bits": lambda q, d, t: d["attributes"].update(bits=0),
    "no such option": lambda q, d, t: d["attributes"].update(colour="red"),
    "a flag that is none": lambda q, d, t: d["attributes"].update(fused_relu=1),
    "a grid": lambda q, d, t: d.update(grid=[1.0, 0, 8]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_instructions_are_refused(name: str) -> None:
    program = with_bits()
    data, tensors = copy.deepcopy(program.to_json()), dict(program.tensors)
    DAMAGE[name](*data["instructions"], tensors)
    with pytest.raises(ArtifactError):
        IntegerProgram.from_json(data, tensors)
