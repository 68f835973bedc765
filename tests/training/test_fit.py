"""Training: it learns, says what happens, and stops with a reason."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fxq.errors import TrainingError
from fxq.quant.augment import Augmentation
from fxq.training import TrainingOptions, Watch, fit
from fxq.training.watch import Moment


def accuracy(data: TensorDataset) -> Callable[[nn.Module], float]:
    def measure(module: nn.Module) -> float:
        images, labels = data.tensors
        assert not module.training
        return float((module(images).argmax(1) == labels).float().mean())

    return measure


def test_it_learns(net: Callable, stripes: TensorDataset, options: TrainingOptions) -> None:
    model, measure = net(), accuracy(stripes)
    calm = replace(options, epochs=8, augmentation=Augmentation.NONE)
    training = fit(model, stripes, calm, evaluate=measure)
    assert sum(training.losses[-5:]) < 0.3 * sum(training.losses[:5])
    assert training.rows[-1]["test_accuracy"] > 0.95
    assert training.rows[-1]["test_accuracy"] == measure(model.eval())
    assert (len(training.rows), len(training.losses)) == (8, 40)


def test_a_step_is_torch_s_own(net: Callable, stripes: TensorDataset) -> None:
    """Against a loop written out: order, decay, momentum, learning rate."""
    options = TrainingOptions(
        epochs=1, batch_size=30, lr=0.1, weight_decay=0.01, augmentation=Augmentation.NONE
    )
    ours, theirs = net(), net()
    for model in (ours, theirs):
        model.drop.p = 0.0
    seen: list[torch.Tensor] = []
    ours.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    training = fit(ours, stripes, options)
    images, labels = stripes.tensors
    theirs.train()
    decaying = {"conv.weight", "fc.weight", "clip.alpha"}
    velocity: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(seen):
        positions = [int((images == one).flatten(1).all(1).nonzero()) for one in batch]
        loss = F.cross_entropy(theirs(images[positions]), labels[positions])
        assert training.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        theirs.zero_grad()
        loss.backward()
        rate = 0.1 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 3))).item()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                push = parameter.grad + (0.01 * parameter if name in decaying else 0)
                velocity[name] = 0.9 * velocity.get(name, torch.zeros_like(push)) + push
                parameter -= rate * velocity[name]
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_each_epoch_has_every_image_once_but_the_last_few(
    net: Callable, stripes: TensorDataset, options: TrainingOptions
) -> None:
    class Noting(Dataset):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def __len__(self) -> int:
            return 90

        def __getitem__(self, index: int) -> tuple:
            self.seen.append(index)
            return stripes[index]

    data = Noting()
    fit(net(), data, options)
    epochs = [data.seen[start : start + 80] for start in (0, 80, 160)]
    assert [len(set(epoch)) for epoch in epochs] == [80, 80, 80]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides(net: Callable, stripes: TensorDataset, options: TrainingOptions) -> None:
    first = fit(net(), stripes, options).losses
    torch.manual_seed(77)
    before = torch.get_rng_state()
    model = net()
    torch.set_rng_state(before)
    assert fit(model, stripes, options).losses == first
    assert torch.equal(torch.get_rng_state(), before)
    assert fit(net(), stripes, replace(options, seed=1)).losses != first


def test_rows_and_files(
    net: Callable, stripes: TensorDataset, options: TrainingOptions, tmp_path: Path
) -> None:
    rows, moments = [], []
    training = fit(
        net(),
        stripes,
        options,
        folder=tmp_path,
        columns=lambda module: {"norm": float(module.fc.weight.norm())},
        watch=Watch(on_step=moments.append, on_epoch=rows.append),
    )
    assert tuple(rows) == training.rows
    with (tmp_path / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert [row["epoch"] for row in log] == ["1", "2", "3"]
    assert [float(row["norm"]) for row in log] == [row["norm"] for row in rows]
    assert float(log[-1]["Clip alpha mean"]) == training.module.clip.alpha.item()
    assert log[0]["test_accuracy"] == ""
    with (tmp_path / "steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in steps] == list(training.losses)
    assert [(row["step"], row["epoch"]) for row in steps[4:6]] == [("5", "1"), ("6", "2")]
    assert float(steps[0]["lr"]) == pytest.approx(0.025)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoint.safetensors", "log.csv", "steps.csv", "curves.png")
    }
    last = moments[-1]
    assert isinstance(last, Moment)
    assert (last.epoch, last.step, last.steps, last.epochs) == (3, 5, 5, 3)
    assert last.loss == pytest.approx(rows[-1]["train_loss"])


def test_parts_in_eval_mode_stay_so(
    net: Callable, stripes: TensorDataset, options: TrainingOptions
) -> None:
    model = net().train()
    model.norm.eval()
    fit(model, stripes, options, evaluate=lambda module: 0.0)
    assert int(model.norm.num_batches_tracked) == 0
    assert model.training
    assert not model.norm.training
    whole = net().eval()
    fit(whole, stripes, options)
    assert int(whole.norm.num_batches_tracked) == 15


def test_frozen_parameters_stay(
    net: Callable, stripes: TensorDataset, options: TrainingOptions
) -> None:
    model = net()
    model.conv.weight.requires_grad_(False)
    before = model.conv.weight.clone()
    fit(model, stripes, options)
    assert torch.equal(model.conv.weight, before)


@pytest.mark.parametrize("change", [{"amp": True}, {"clip_gradients": 0.01}, {"nesterov": True}])
def test_options_change_the_curve(
    net: Callable, stripes: TensorDataset, options: TrainingOptions, change: dict
) -> None:
    plain = fit(net(), stripes, options).losses
    other = fit(net(), stripes, replace(options, **change)).losses
    assert other != plain
    assert other == fit(net(), stripes, replace(options, **change)).losses
    assert other[-1] < 1.5 * plain[0]


def test_clipping_bounds_the_step(net: Callable, stripes: TensorDataset) -> None:
    options = TrainingOptions(
        epochs=1, batch_size=90, lr=1.0, momentum=0, weight_decay=0, clip_gradients=0.25
    )
    model, before = net(), net()
    fit(model, stripes, options)
    moved = [one - two for one, two in zip(model.parameters(), before.parameters(), strict=True)]
    assert torch.cat([one.flatten() for one in moved]).norm().item() == pytest.approx(
        0.25, rel=1e-3
    )


def test_without_a_compiler_it_says_so(
    net: Callable,
    stripes: TensorDataset,
    options: TrainingOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    told: list[str] = []
    training = fit(net(), stripes, replace(options, compile=True), watch=Watch(tell=told.append))
    assert told == ["torch.compile does not work here and is left out: no C++ compiler"]
    assert training.losses == fit(net(), stripes, options).losses


# ---- what is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "told"),
    [([0, 3], "a label is 3, but the network has 3 classes"), ([-1, 2], "is -1")],
)
def test_labels_out_of_range(net: Callable, labels: list[int], told: str) -> None:
    data = TensorDataset(torch.randn(2, 1, 8, 8), torch.tensor(labels))
    with pytest.raises(TrainingError, match=told):
        fit(net(), data, TrainingOptions(batch_size=2))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (TensorDataset(torch.empty(0, 1, 8, 8), torch.empty(0)), "is empty"),
        (TensorDataset(torch.empty(3, 1, 8, 8), torch.empty(3)), "4 is larger .* has 3"),
        (TensorDataset(torch.ones(4, 1, 8, 8), torch.ones(4)), "no whole number"),
        (TensorDataset(torch.ones(4, 1, 8, 8)), "samples are \\(input, label\\)"),
        (iter([]), "must have a length"),
        (TensorDataset(torch.ones(4, 1, 8, 8), torch.ones(4, 2).long()), "for labels of shape"),
    ],
)
def test_data_that_does_not_fit(net: Callable, data: object, told: str) -> None:
    with pytest.raises(TrainingError) as caught:
        fit(net(), data, TrainingOptions(batch_size=4))
    assert re.search(told, str(caught.value))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    net: Callable, stripes: TensorDataset, options: TrainingOptions, tmp_path: Path
) -> None:
    class Failing(TensorDataset):
        calls = 0

        def __getitem__(self, index: int) -> tuple:
            self.calls += 1
            image, label = super().__getitem__(index)
            return (image * float("nan") if self.calls > 16 * 7 else image), label

    with pytest.raises(TrainingError, match="the loss is nan") as caught:
        fit(net(), Failing(*stripes.tensors), options, folder=tmp_path)
    assert caught.value.where == "epoch 2, step 3 of 5"
    assert "the last good checkpoint, of step 5, is kept" in caught.value.what
    whole = fit(net(), stripes, options)
    again = fit(net(), stripes, options, folder=tmp_path)  # the data is repaired
    assert (again.continued_at, again.losses) == (5, whole.losses)


def test_weights_that_are_not_finite_are_not_kept(
    net: Callable, stripes: TensorDataset, options: TrainingOptions, tmp_path: Path
) -> None:
    def spoil(module: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            module.fc.bias[0] = float("inf")
        return {}

    with pytest.raises(TrainingError, match="the weights are not finite any more"):
        fit(net(), stripes, options, columns=spoil, folder=tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()
