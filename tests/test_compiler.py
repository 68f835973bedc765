"""`fxq.compile`: what users write, what they may give it, and what it promises not to touch."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.compiler import Result
from fxq.contracts import output_sqnr
from fxq.errors import CaptureError, FxqError, RecipeError, UnknownNameError
from fxq.models_zoo import tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.passes import Calibrate, FoldBatchNorm, InsertObservers, MarkRelu, QuantizeMinmax
from fxq.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = images(8, 3, 8, 8)
EXAMPLE = X[:1]


def quick(
    model: nn.Module, calibration: Any, recipe: Any = "minmax-int8", **options: Any
) -> Result:
    return fxq.compile(model, EXAMPLE, recipe, calibration=calibration, **options)


def state(result: Result) -> dict[str, Tensor]:
    return result.artifact.integers.tensors


def same(one: Result, other: Result) -> bool:
    a, b = one.artifact.integers, other.artifact.integers
    names = a.tensors.keys() == b.tensors.keys()
    return (
        names
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        and a.instructions == b.instructions
    )


# ---- ten lines -----------------------------------------------------------------------------------


def test_ten_lines_of_user_code(tmp_path: Path) -> None:
    loader = [X[:4], X[4:]]
    result = fxq.compile(tiny_residual(), EXAMPLE, recipe="aciq-4bit", calibration=loader)
    lines = str(result.journal).splitlines()
    assert len(lines) == len(result.recipe.passes)
    assert "fold-batch-norm" in lines[0]
    assert "removed" in str(result.journal["fold-batch-norm"].delta.summary())
    result.artifact.save(tmp_path / "run")
    assert torch.equal(fxq.load(tmp_path / "run").module(X), result.module(X))
    assert result.module is result.artifact.module
    assert result.seconds > 0
    assert output_sqnr(result.program.run(X), result.module(X)) > 20


def test_the_file_of_the_documentation_runs(tmp_path: Path) -> None:
    """Importing fxq and compiling needs nothing else, in a fresh process."""
    script = (
        "import torch, fxq\n"
        "torch.set_num_threads(1)\n"
        "from fxq.models_zoo import tiny_conv\n"
        "x = torch.randn(4, 3, 8, 8)\n"
        "result = fxq.compile(tiny_conv(), x[:1], 'aciq-8bit', calibration=[x])\n"
        "print(result.artifact.ledger.coverage(), result.artifact.save('out'))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1.0 out"), done.stderr


# ---- the model is not touched --------------------------------------------------------------------


def test_the_model_is_not_touched() -> None:
    model = tiny_residual()
    model.train()
    model.bn1.eval()
    calls: list[str] = []
    model.relu1.register_forward_hook(lambda *_: calls.append("hook"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    quick(model, [X], "aciq-4bit")
    assert {n: (id(m), m.training) for n, m in model.named_modules()} == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and bool((p.grad == 1).all()) for p in model.parameters())
    assert len(model.relu1._forward_hooks) == 1
    calls.clear()
    model(X)
    assert calls == ["hook"]


def test_calibration_data_is_not_touched() -> None:
    batches = [X.clone(), X.clone() * 2]
    before = [batch.clone() for batch in batches]
    quick(tiny_conv(), batches, "aciq-4bit")
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))


def test_random_numbers_are_left_alone() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    quick(tiny_conv(), [X], "aciq-4bit")
    assert torch.equal(torch.rand(3), expected)


def test_gradients_stay_on() -> None:
    with torch.enable_grad():
        quick(tiny_conv(), [X])
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-8bit", "aciq-4bit"])
def test_two_compilations_are_the_same(recipe: str) -> None:
    one, other = (quick(tiny_residual(), [X[:4], X[4:]], recipe) for _ in range(2))
    assert same(one, other)
    assert torch.equal(one.module(X), other.module(X))


# ---- recipes, settings, overrides ----------------------------------------------------------------


def test_recipes_may_come_as(tmp_path: Path) -> None:
    by_name = quick(tiny_conv(), [X], "minmax-int8")
    recipe = Recipe.load("minmax-int8")
    path = tmp_path / "own.toml"
    path.write_text(recipe.to_toml())
    for other in (recipe, recipe.pipeline(), path, str(path)):
        assert same(quick(tiny_conv(), [X], other), by_name)


def test_pipelines_of_ones_own() -> None:
    pipeline = fxq.Pipeline(
        FoldBatchNorm(), MarkRelu(), InsertObservers(), Calibrate(), QuantizeMinmax(weight_bits=6)
    )
    result = quick(tiny_conv(), [X], pipeline)
    assert result.recipe.name == "pipeline"
    assert [step.name for step in result.journal] == list(pipeline.names)
    assert Recipe.load("minmax-int8").to_toml() != result.artifact.recipe_toml != ""


def test_settings() -> None:
    settings = ["quantize-minmax.weight_bits=3", "quantize-minmax.first_last_bits=0"]
    result = quick(tiny_conv(), [X], settings=settings)
    bits = {name: set(t.tolist()) for name, t in state(result).items() if name.endswith(".bits")}
    assert bits == {"conv1.bits": {3}, "conv2.bits": {3}, "fc.bits": {3}}
    assert "weight_bits = 3" in result.artifact.recipe_toml
    for wrong in ("quantize-minmax.bits=3", "nothing.weight_bits=3"):
        with pytest.raises(FxqError):
            quick(tiny_conv(), [X], settings=[wrong])
    with pytest.raises(FxqError, match="2 to 8"):
        quick(tiny_conv(), [X], settings=["quantize-minmax.weight_bits=9"])


def test_layer_overrides(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    text = Recipe.load("aciq-4bit").to_toml()
    path.write_text(text + '\n[layer."conv1"]\nweight_bits = 6\n[layer."conv2"]\nskip = true\n')
    result = quick(tiny_residual(), [X], path)
    assert set(state(result)["conv1.bits"].tolist()) == {6}
    assert [entry.path for entry in result.artifact.ledger.in_float() if entry.layer] == ["conv2"]
    assert any("conv2 stays in float" in line for line in result.artifact.warnings)
    path.write_text(text + '\n[layer."conv1"]\nwieght_bits = 6\n')
    with pytest.raises(RecipeError, match="wieght_bits"):
        quick(tiny_residual(), [X], path)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        quick(tiny_conv(), [X], "minmax-in8")
    assert caught.value.hint == "did you mean 'minmax-int8'?"
    with pytest.raises(UnknownNameError, match="no backend named 'egaer'"):
        quick(tiny_conv(), [X], backend="egaer")
    with pytest.raises(FxqError, match="has no option 'colour'"):
        quick(tiny_conv(), [X], colour="red")


def test_errors_of_capture() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError):
        quick(Branching(), [X])
    with pytest.raises(CaptureError):
        fxq.compile(tiny_conv(), X[:, :2], "minmax-int8", calibration=[X])


def test_concrete_arguments() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_conv()

        def forward(self, x: Tensor, double: bool = False) -> Tensor:
            return self.inner(x) * 2 if double else self.inner(x)

    plain = quick(Optional(), [X])
    twice = quick(Optional(), [X], concrete_args={"double": True})
    assert output_sqnr(plain.module(X) * 2, twice.module(X)) > 40


# ---- what is heard meanwhile ---------------------------------------------------------------------


def test_steps_are_told_as_they_happen() -> None:
    steps: list[str] = []
    result = quick(tiny_conv(), [X], "aciq-4bit", on_step=lambda step: steps.append(step.name))
    assert steps == [step.name for step in result.journal] == list(result.recipe.pipeline().names)


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int | None]] = []

    def progress(label: str, done: int, total: int | None) -> None:
        told.append((label, done, total))

    quick(tiny_conv(), [X[:4], X[4:]], "aciq-4bit", progress=progress)
    assert [item for item in told if item[0] == "calibrate"] == [
        ("calibrate", 1, 2),
        ("calibrate", 2, 2),
    ]
    for label in ("quantize-aciq", "correct-bias"):
        counts = [(done, total) for name, done, total in told if name == label]
        assert counts == [(1, 3), (2, 3), (3, 3)], label
    told.clear()
    quick(tiny_conv(), (batch for batch in (X[:4], X[4:])), progress=progress)
    assert ("calibrate", 2, None) in told


def test_checks_can_be_left_out() -> None:
    checked, unchecked = (quick(tiny_conv(), [X], check=check) for check in (True, False))
    assert same(checked, unchecked)
    assert checked.journal[-1].total_sqnr is not None
    assert unchecked.journal[-1].total_sqnr is None


def test_checks_teach_training_nothing() -> None:
    """Ranges that follow the batches of a training do not follow the probe batch."""
    checked, unchecked = (
        quick(tiny_conv(), [X], "apot-4bit", check=check).module.state_dict()
        for check in (True, False)
    )
    assert checked.keys() == unchecked.keys()
    assert all(torch.equal(value, unchecked[name]) for name, value in checked.items())


@pytest.mark.parametrize("build", [tiny_conv, tiny_depthwise])
def test_eight_bits_are_close_to_float(build: Callable[[], nn.Module]) -> None:
    model = build()
    for recipe in ("minmax-int8", "aciq-8bit"):
        result = quick(model, [X], recipe)
        assert output_sqnr(model(X).detach(), result.module(X)) > 22


def test_models_without_images() -> None:
    x = images(8, 16)
    result = fxq.compile(tiny_mlp(), x[:1], "aciq-8bit", calibration=[x])
    assert output_sqnr(tiny_mlp()(x).detach(), result.module(x)) > 25


def test_lowering_by_hand() -> None:
    result = quick(tiny_conv(), [X])
    again = fxq.lower(result.program, engine="fbgemm")
    assert again.journal is None
    assert again.integers.instructions == result.artifact.integers.instructions
