"""Learning from a teacher: the divergence and its gradient, and a teacher that is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fxq.errors import SpecError, TrainingError
from fxq.quant.augment import Augmentation
from fxq.training import TrainingOptions, Watch, fit
from fxq.training.checkpoint import FILE
from fxq.training.distill import divergence

# ---- the divergence ----------------------------------------------------------------------------


@given(
    st.integers(1, 4), st.integers(2, 6), st.floats(0.5, 20), st.booleans(), st.integers(0, 2**16)
)
def test_the_divergence_and_its_gradient(
    count: int, classes: int, temperature: float, dense: bool, seed: int
) -> None:
    """Against the sum written out, and ``T (softmax(z / T) - softmax(t / T)) / rows``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, classes, 2, 3) if dense else (count, classes)
    logits, wanted = (5 * torch.randn(shape, generator=generator).double() for _ in range(2))
    logits.requires_grad_()
    found = divergence(logits, wanted, temperature)
    p, q = (torch.exp(one / temperature) for one in (wanted, logits.detach()))
    p, q = (one / one.sum(1, keepdim=True) for one in (p, q))
    rows = logits.numel() / classes
    by_hand = temperature**2 * float((p * (p / q).log()).sum()) / rows
    assert found.item() == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, temperature * (q - p) / rows)


def test_hot_logits_are_compared_by_their_differences() -> None:
    """Eq. 4 of the paper: the gradient tends to ``(z - t) / classes`` for centred logits."""
    logits, wanted = (torch.randn(1, 5).double() for _ in range(2))
    logits, wanted = (one - one.mean() for one in (logits, wanted))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(logits, wanted, 1e4), logits)
    torch.testing.assert_close(gradient, (logits - wanted).detach() / 5, rtol=1e-3, atol=1e-5)


def test_classes_without_a_chance_do_no_harm() -> None:
    logits = torch.tensor([[0.0, -200.0, 3e4]], requires_grad=True)
    found = divergence(logits, torch.tensor([[200.0, 0.0, -3e4]]), 1.0)
    found.backward()
    assert logits.grad is not None
    assert bool(torch.cat((found.reshape(1), logits.grad.flatten())).isfinite().all())


# ---- the loss ----------------------------------------------------------------------------------


@pytest.fixture
def teacher(net: Callable[..., nn.Module]) -> nn.Module:
    """Another network of the same classes, in train mode, with a part in eval mode."""
    made = net()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
        made.norm.running_mean.fill_(0.1)
    made.train().clip.eval()
    return made


def logits_of(teacher: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(teacher).eval()(images)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_loss_is_the_share_of_both(
    net: Callable, stripes: TensorDataset, teacher: nn.Module, share: float
) -> None:
    options = TrainingOptions(
        epochs=1, batch_size=90, distill=share, temperature=3.0, augmentation=Augmentation.NONE
    )
    model, other = net(), net().train()
    model.drop.p = other.drop.p = 0.0
    found = fit(model, stripes, options, teacher=teacher).losses[0]
    images, labels = stripes.tensors
    logits = other(images)
    ours, theirs = (F.softmax(one / 3, 1) for one in (logits, logits_of(teacher, images)))
    kl = 9 * (theirs * (theirs.log() - ours.log())).sum(1).mean()
    wanted = (1 - share) * F.cross_entropy(logits, labels) + share * kl
    assert found == pytest.approx(wanted.item(), rel=1e-5)


def test_with_the_whole_loss_labels_do_not_matter(
    net: Callable, stripes: TensorDataset, options: TrainingOptions, teacher: nn.Module
) -> None:
    images, labels = stripes.tensors
    other = TensorDataset(images, (labels + 1) % 3)
    for share, matters in ((1.0, False), (0.5, True)):
        chosen = replace(options, distill=share, label_smoothing=0.1)
        one, two = (fit(net(), data, chosen, teacher=teacher).losses for data in (stripes, other))
        assert (one != two) is matters


def test_it_learns_what_the_teacher_answers(net: Callable, stripes: TensorDataset) -> None:
    """The labels are of one class; the teacher knows better."""
    calm = TrainingOptions(epochs=8, batch_size=16, lr=0.05, augmentation=Augmentation.NONE)
    teacher = fit(net(), stripes, calm).module
    images, labels = stripes.tensors
    blind = TensorDataset(images, torch.zeros_like(labels))
    model = net()
    fit(model, blind, replace(calm, distill=1.0), teacher=teacher)
    assert float((model.eval()(images).argmax(1) == labels).float().mean()) > 0.9


def test_without_a_share_the_teacher_is_not_asked(
    net: Callable, stripes: TensorDataset, options: TrainingOptions
) -> None:
    class Silent(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            raise AssertionError

    plain = fit(net(), stripes, options).losses
    assert fit(net(), stripes, options, teacher=Silent()).losses == plain


# ---- the teacher -------------------------------------------------------------------------------


def test_the_teacher_stays_as_it_was(
    net: Callable, stripes: TensorDataset, options: TrainingOptions, teacher: nn.Module
) -> None:
    before = copy.deepcopy(teacher)
    flags = [child.training for child in teacher.modules()]
    assert len(set(flags)) == 2
    fit(net(), stripes, replace(options, distill=0.5), teacher=teacher)
    assert [child.training for child in teacher.modules()] == flags
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    assert all(one.grad is None and one.requires_grad for one in teacher.parameters())


def test_it_runs_in_eval_mode_without_gradients(
    net: Callable, stripes: TensorDataset, options: TrainingOptions
) -> None:
    seen = set()

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((self.training, torch.is_grad_enabled(), x.dtype))
            return super().forward(x.flatten(1))

    chosen = replace(options, distill=0.5, amp=True)
    fit(net(), stripes, chosen, teacher=Noting(64, 3).train())
    assert seen == {(False, False, torch.float32)}


def test_a_network_can_follow_what_it_was(
    net: Callable, stripes: TensorDataset, options: TrainingOptions
) -> None:
    model, other = net(), net()
    chosen = replace(options, distill=0.5)
    itself = fit(model, stripes, chosen, teacher=model).losses
    assert itself == fit(other, stripes, chosen, teacher=net()).losses


def test_a_teacher_on_another_device(
    net: Callable, stripes: TensorDataset, options: TrainingOptions
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    teacher = net().cuda()
    losses = fit(net(), stripes, replace(options, distill=0.5), teacher=teacher).losses
    assert losses == fit(net(), stripes, replace(options, distill=0.5), teacher=net()).losses
    assert next(teacher.parameters()).device.type == "cuda"


def test_options_that_need_a_teacher(
    net: Callable, stripes: TensorDataset, options: TrainingOptions, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="no teacher to distill from"):
        fit(net(), stripes, replace(options, distill=0.1), folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_teacher_of_other_classes(
    net: Callable, stripes: TensorDataset, options: TrainingOptions
) -> None:
    with pytest.raises(TrainingError, match=r"the teacher gives \[16, 4\], and .* \[16, 3\]"):
        fit(net(), stripes, replace(options, distill=0.1), teacher=net(classes=4))


# ---- continuing --------------------------------------------------------------------------------


def test_it_continues_with_the_same_teacher_only(
    net: Callable,
    stripes: TensorDataset,
    options: TrainingOptions,
    teacher: nn.Module,
    tmp_path: Path,
) -> None:
    chosen = replace(options, distill=0.5, temperature=2.0)
    whole = fit(net(), stripes, chosen, teacher=teacher).losses

    def stop(moment: object) -> None:
        if (tmp_path / FILE).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(net(), stripes, chosen, teacher=teacher, folder=tmp_path, watch=Watch(on_step=stop))
    wrong = (
        ({"distill": 0.75}, teacher, r"another distill \(0.5, now 0.75\)"),
        ({"distill": 0.0}, teacher, "another teacher, distill"),
        ({"temperature": 4.0}, teacher, r"another temperature \(2.0, now 4.0\)"),
        ({}, net(), "another teacher"),
    )
    for change, other, told in wrong:
        with pytest.raises(TrainingError, match=told):
            fit(net(), stripes, replace(chosen, **change), teacher=other, folder=tmp_path)
    again = fit(net(), stripes, chosen, teacher=teacher, folder=tmp_path)
    assert (again.continued_at, again.losses) == (6, whole)
