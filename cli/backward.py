"""``fxq backward``: the graph of a training step, before and after a recipe rewrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fxq.errors import TrainingError

from . import load, show, show_trail

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fxq.trail.snapshot import Snapshot


@dataclass(frozen=True)
class Request:
    """What ``fxq backward`` was asked for; the fields are its options."""

    model: str
    recipe: str
    settings: list[str]
    weights: Path | None
    trained: Path | None
    input_shape: tuple[int, ...] | None
    batch_size: int
    seed: int


def run(request: Request, *, view: str) -> None:
    """The graph, or what changed in it, has been told."""
    from fxq.trail.delta import compare
    from fxq.trail.joint import joint_snapshot

    subject = load.load_subject(
        request.model,
        weights=request.weights,
        input_shape=request.input_shape,
        seed=request.seed,
    )
    batch = _batch(subject, request)
    before = joint_snapshot(subject.model.module, *batch)
    if view == "float":
        show_trail.graph(before, digests=False)
        return
    after = joint_snapshot(_rewritten(subject, request), *batch)
    if view == "full":
        show_trail.graph(after, digests=False)
        return
    delta = compare(before, after)
    show.line(f"a training step of {request.model}, float and {request.recipe}: {delta.summary()}")
    for change in delta.changes:
        for line in show_trail.change_lines(change, digests=False):
            show.line(line)
    show.line(_widths(after))


def _batch(subject: load.Subject, request: Request) -> tuple[torch.Tensor, ...]:
    """As many copies of the example as make a batch, with noise where they are no tokens."""
    import torch

    generator = torch.Generator().manual_seed(request.seed)
    made = []
    for value in subject.model.example_inputs:
        batch = value[:1].expand(request.batch_size, *value.shape[1:]).contiguous()
        noise = torch.randn(batch.shape, generator=generator)
        made.append(batch + noise if batch.is_floating_point() else batch)
    return tuple(made)


def _rewritten(subject: load.Subject, request: Request) -> nn.Module:
    """The module that a recipe gives, with the widths of a training where one is given."""
    import fxq

    from .train import check_recipe

    check_recipe(request.recipe)
    made = fxq.compile(
        subject.model.module,
        subject.model.example_inputs,
        request.recipe,
        calibration=[subject.model.example_inputs],
        settings=request.settings,
        check=False,
    )
    if request.trained is not None:
        _restore(made.module, request.trained)
    return made.module


def _restore(module: nn.Module, folder: Path) -> None:
    from fxq.training.checkpoint import FILE, FOLDER, Checkpoint

    runs = (folder, folder.with_name(f"{folder.name}.partial"))
    files = (run / FOLDER / FILE for run in runs)
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise TrainingError(
            "there is no checkpoint of a training",
            where=str(folder),
            hint="give a run of fxq train",
        )
    state = Checkpoint.load(found).model
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise TrainingError(
            "the checkpoint is of another network or recipe",
            where=str(found),
            hint="give the model and the recipe that were trained",
        ) from error


def _widths(step: Snapshot) -> str:
    """How many quantizers have how many bits.

    Example:
        >>> from fxq.trail.snapshot import NodeRecord, Snapshot
        >>> node = NodeRecord("q", "fxq.quantize", ("x",), "8 bits of 2**-3")
        >>> _widths(Snapshot((node,)))
        '1 quantizer of 8 bits'
    """
    bits = [int(n.arguments.split()[0]) for n in step.nodes if n.op == "fxq.quantize"]
    counts = {width: bits.count(width) for width in sorted(set(bits))}
    return ", ".join(
        f"{show.plural(n, 'quantizer')} of {width} bits" for width, n in counts.items()
    )
