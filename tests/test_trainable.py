"""Training modules: an ordinary module to train, which computes what is deployed in eval mode."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.compiler import Result
from fxq.errors import FxqError, LoweringError, RecipeError
from fxq.models_zoo import tiny_conv, tiny_residual
from fxq.recipe import Recipe
from fxq.trainable import TrainingModule
from fxq.training.network import compiler_trouble

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 4


def compiled(recipe: Any = "apot-4bit", model: nn.Module | None = None, **options: Any) -> Result:
    model = tiny_residual() if model is None else model
    return fxq.compile(model, IMAGES[:2], recipe, calibration=[IMAGES], **options)


def trainable(recipe: Any = "apot-4bit", **options: Any) -> Any:
    return compiled(recipe, **options).module


def steps(
    module: nn.Module, count: int = 1, *, of: nn.Module | None = None, lr: float = 0.02
) -> list[float]:
    """The losses of some steps, of a module or of what wraps it; it is in training mode then."""
    called = module if of is None else of
    called.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(called(IMAGES), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def answers(module: nn.Module, x: Tensor = IMAGES) -> Tensor:
    return module.eval()(x)


def deployed(module: nn.Module) -> Tensor:
    return fxq.lower(module).module(IMAGES)


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- training --------------------------------------------------------------------------------


def test_it_trains() -> None:
    module = trainable()
    assert module.training
    before = state(module)
    losses = steps(module, 30)
    assert losses[-1] < 0.7 * losses[0]
    names = dict(module.named_parameters())
    assert all(value.grad is not None for value in names.values())
    assert all(value.grad.isfinite().all() for value in names.values())
    assert sum("alpha" in name for name in names) == 4
    changed = {name for name, value in module.state_dict().items() if (value != before[name]).any()}
    assert {name for name in names if "alpha" in name} <= changed
    assert {name for name in changed if name.endswith("running_mean")}
    assert {name for name in changed if name.endswith("quantizer.low")}
    assert not [name for name in changed if name.endswith("gain")]


def test_every_parameter_gets_a_gradient_that_counts() -> None:
    module = trainable("apot-2bit")
    steps(module)
    silent = [n for n, value in module.named_parameters() if not bool(value.grad.abs().sum() > 0)]
    assert silent == []


def test_the_float_model_is_not_touched() -> None:
    model = tiny_residual()
    before, answer = state(model), answers(model)
    module = trainable(model=model)
    steps(module, 3)
    fxq.lower(module)
    assert same_state(state(model), before)
    assert torch.equal(answers(model), answer)
    assert not model.training
    assert all(value.grad is None for value in model.parameters())


def test_bfloat16_autocast() -> None:
    module = trainable()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    before = answers(module)
    module.train()
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(module(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(value.dtype is torch.float32 for value in module.parameters())
    assert all(bool(value.grad.isfinite().all()) for value in module.parameters())
    found = answers(module)
    assert not torch.equal(found, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(answers(module), found)  # integers do not care


# ---- eval mode -------------------------------------------------------------------------------


def test_eval_is_what_is_deployed() -> None:
    module = trainable()
    assert torch.equal(answers(module), deployed(module))
    steps(module, 5)
    found = answers(module)
    assert torch.equal(found, deployed(module))
    with torch.inference_mode():
        assert torch.equal(module(IMAGES), found)


def test_eval_follows_every_change() -> None:
    module = trainable()
    seen = [answers(module)]

    def differs() -> bool:
        seen.append(answers(module))
        assert torch.equal(seen[-1], deployed(module))
        return not torch.equal(seen[-1], seen[-2])

    steps(module, 3)
    assert differs()
    kept = state(module)
    steps(module, 3)
    assert differs()
    module.load_state_dict(kept)
    assert differs()
    assert torch.equal(seen[-1], seen[1])
    with torch.no_grad():  # in eval mode all along
        module.network.fc.layer.weight.mul_(0.5)
    assert differs()
    module.network.fc.layer.weight.data.mul_(0.5)  # which no version tells; answers() calls eval()
    assert differs()
    assert not differs()


def test_eval_is_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = trainable(), []
    lower = module._lower
    monkeypatch.setattr(module, "_lower", lambda one: calls.append(1) or lower(one))
    module.eval()
    with torch.no_grad():
        for images in IMAGES.split(4):
            module(images)
    assert len(calls) == 1


def test_eval_with_gradients_is_differentiable() -> None:
    module = trainable().eval()
    x = IMAGES.clone().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)
    assert torch.equal(module(x).detach(), module.network(x).detach())


def test_float_rounding_on_request() -> None:
    module = trainable()
    exact = answers(module)
    module.exact = False
    found = answers(module)
    with torch.no_grad():
        assert torch.equal(found, module.network(IMAGES))
    assert not torch.equal(found, exact)
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_eval_where_nothing_can_be_deployed() -> None:
    """Placement as published has layers that read float values."""
    module = trainable(settings=["placement=paper"])
    with torch.no_grad():
        assert torch.equal(answers(module), module.network(IMAGES))
    with pytest.raises(LoweringError, match="cannot run"):
        fxq.lower(module)
    steps(module, 2)


# ---- an ordinary module ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file", "copy"])
def test_copies(how: str, tmp_path: Path) -> None:
    module = trainable()
    steps(module, 3)
    found = answers(module)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif how == "copy":
        other = copy.copy(module)
    else:
        torch.save(module, tmp_path / "module.pt")
        other = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(answers(other), found)
    assert torch.equal(deployed(other), found)
    assert [name for name, _ in other.named_parameters()] == [
        name for name, _ in module.named_parameters()
    ]
    text = [(node.name, node.meta) for node in module.network.graph.nodes]
    assert [(node.name, node.meta) for node in other.network.graph.nodes] == text
    if how != "copy":  # which shares its parameters
        assert steps(other) == steps(copy.deepcopy(module))
        assert torch.equal(answers(module), found)


def test_a_model_averaged_over_the_steps() -> None:
    """It copies the module, and pairs parameters in their order."""
    module = trainable()
    average = torch.optim.swa_utils.AveragedModel(module)
    steps(module, 2)
    average.update_parameters(module)
    for name, value in module.named_parameters():
        assert torch.equal(average.module.get_parameter(name), value)
    assert torch.equal(answers(average.module), deployed(average.module))


def test_the_state_of_one_module_fits_another() -> None:
    one, other = trainable(), trainable()
    steps(one, 3)
    assert not torch.equal(answers(one), answers(other))
    other.load_state_dict(one.state_dict())
    assert torch.equal(answers(one), answers(other))
    assert steps(one) == steps(other)


def test_training_flags() -> None:
    module = trainable()
    assert module.eval() is module
    assert not any(child.training for child in module.modules())
    assert module.train() is module
    assert module.network.conv1.norm.training


# ---- lowering --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_lowering_touches_nothing(training: bool) -> None:
    module = trainable()
    steps(module, 2)
    module.train(training)
    before = state(module)
    flags = [child.training for child in module.modules()]
    rng = torch.random.get_rng_state()
    grads = [value.grad.clone() for value in module.parameters()]
    fxq.lower(module)
    assert same_state(state(module), before)
    assert [child.training for child in module.modules()] == flags
    assert all(torch.equal(a, b.grad) for a, b in zip(grads, module.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_the_record() -> None:
    result = compiled(settings=["weight_bits=3"])
    artifact = fxq.lower(result.module)
    names = [step.name for step in artifact.journal.steps]
    assert names == [step.name for step in result.journal.steps] + ["freeze-trained"]
    assert names[-2:] == ["quantize-apot", "freeze-trained"]
    recipe = Recipe.from_toml(artifact.recipe_toml, "recipe.toml")
    assert recipe.training
    assert recipe.passes == result.recipe.passes
    assert artifact.ledger.coverage() == 1.0
    assert len(result.journal.steps) == 5  # not the one of lowering


@contextlib.contextmanager
def one_process(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_data_parallel(tmp_path: Path) -> None:
    module, alone = trainable(), trainable()
    with one_process(tmp_path):
        parallel = nn.parallel.DistributedDataParallel(module)
        assert steps(module, 3, of=parallel) == steps(alone, 3)
        found = answers(parallel)
        assert torch.equal(found, deployed(parallel))
    assert torch.equal(found, deployed(alone))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns about itself
def test_torch_compile() -> None:
    if trouble := compiler_trouble(torch.device("cpu")):
        pytest.skip(trouble)
    module, alone = trainable(), trainable()
    fast: Any = torch.compile(module)
    losses, wanted = steps(module, 3, of=fast), steps(alone, 3)
    assert losses[0] == pytest.approx(wanted[0], rel=0.01)  # a value may round the other way
    assert losses[-1] < losses[0]
    found = answers(fast)
    assert torch.equal(found, deployed(fast))
    assert torch.equal(found, deployed(module))
    torch.compiler.reset()


def test_what_cannot_be_lowered() -> None:
    with pytest.raises(FxqError, match="Linear is no module that fxq made to be trained") as caught:
        fxq.lower(nn.Linear(2, 3))
    assert "training = true" in str(caught.value)
    with pytest.raises(LoweringError, match="meant to be trained and then frozen"):
        fxq.lower(compiled().program)


# ---- recipes ---------------------------------------------------------------------------------


def test_there_is_no_artifact_before_training() -> None:
    result = compiled()
    assert isinstance(result.module, TrainingModule)
    with pytest.raises(RecipeError, match="apot-4bit gives a module to be trained") as caught:
        _ = result.artifact
    assert "fxq.lower(result.module)" in str(caught.value)


def test_a_recipe_that_forgot_to_say_so() -> None:
    recipe = Recipe("mine", Recipe.load("apot-4bit").passes)
    with pytest.raises(LoweringError, match="meant to be trained") as caught:
        compiled(recipe)
    assert "training = true" in str(caught.value)


def test_a_recipe_that_has_nothing_to_train() -> None:
    recipe = Recipe("mine", Recipe.load("minmax-int8").passes, training=True)
    module = trainable(recipe, model=tiny_conv())
    assert torch.equal(answers(module), compiled("minmax-int8", tiny_conv()).module(IMAGES))


@pytest.mark.parametrize("training", [True, False])
def test_training_survives_toml(training: bool) -> None:
    recipe = Recipe("mine", Recipe.load("apot-2bit").passes, training=training)
    again = Recipe.from_toml(recipe.to_toml(), "mine.toml")
    assert again.training is training
    assert again.passes == recipe.passes
    assert ("training = true" in recipe.to_toml()) is training


def test_training_is_true_or_false() -> None:
    text = Recipe.load("apot-2bit").to_toml().replace("training = true", 'training = "yes"')
    with pytest.raises(RecipeError, match="training"):
        Recipe.from_toml(text, "mine.toml")
