"""A training's checkpoint: one safetensors file, whole at every moment, that holds no code.

Tensors are the network's state (``model.NAME``), the momentum (``momentum.NAME``) and the loss of
every step (``losses``); the header holds the rest as JSON, and a checksum of both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxq.errors import TrainingError
from fxq.training.optimizer import is_alpha
from fxq.workspace import digest

FILE = "checkpoint.safetensors"
FOLDER = "training"
"""Where a run keeps the files of its training."""

_FORMAT = "fxq training 1"
_MODEL, _MOMENTUM, _LOSSES = "model.", "momentum.", "losses"

Row = dict[str, float | int | None]
"""What is known of an epoch, by column."""


@dataclass
class Position:
    """How far a training is.

    Attributes:
        losses: The loss of every step that was made.
        rows: What is known of every epoch that is finished.
        correct: Right answers in the unfinished epoch.
        seconds: Time spent in the unfinished epoch.
    """

    losses: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    correct: float = 0.0
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Steps that were made."""
        return len(self.losses)


@dataclass(frozen=True)
class Checkpoint:
    """What a training continues from.

    Attributes:
        identity: What it belongs to: options, network, data.
        position: How far it is.
        model: The state of the network, by name.
        momentum: The momentum of its parameters, by name.
    """

    identity: Mapping[str, Any]
    position: Position
    model: dict[str, Tensor]
    momentum: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """The checkpoint is in the file, or what was there before.

        Raises:
            TrainingError: It cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {
            **{f"{_MODEL}{name}": _own(value) for name, value in self.model.items()},
            **{f"{_MOMENTUM}{name}": _own(value) for name, value in self.momentum.items()},
            _LOSSES: torch.tensor(self.position.losses, dtype=torch.float64),
        }
        about = json.dumps(
            {
                "identity": dict(self.identity),
                "rows": self.position.rows,
                "correct": self.position.correct,
                "seconds": self.position.seconds,
            }
        )
        header = {"format": _FORMAT, "about": about, "checksum": digest(tensors, about)}
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            save_file(tensors, beside, metadata=header)
            beside.chmod(0o644)  # it is made readable by its owner only
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the checkpoint cannot be written: {getattr(error, 'strerror', None) or error}",
                where=str(path),
                hint="check the permissions and the free space; the one before is kept",
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """The checkpoint in the file; no code from it is executed.

        Raises:
            TrainingError: It is damaged, or something else.
        """
        header, tensors = _read(path)
        if header.get("format") != _FORMAT:
            raise TrainingError(
                "the file is no checkpoint of a training",
                where=str(path),
                hint="give a run of fxq train, or its training/checkpoint.safetensors",
            )
        about = header.get("about", "")
        if header.get("checksum") != digest(tensors, about):
            raise _damaged(path, "its checksum is wrong")
        try:
            known = json.loads(about)
            losses = [float(loss) for loss in tensors.pop(_LOSSES)]
            position = Position(losses, known["rows"], known["correct"], known["seconds"])
            identity = dict(known["identity"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(path, f"{type(error).__name__} {error}") from error
        return cls(identity, position, _below(tensors, _MODEL), _below(tensors, _MOMENTUM))

    def check_identity(self, identity: Mapping[str, Any], path: Path) -> None:
        """The checkpoint belongs to this training.

        Raises:
            TrainingError: It belongs to another; says what differs.
        """
        names = [*identity, *(name for name in self.identity if name not in identity)]
        differing = [n for n in names if self.identity.get(n) != identity.get(n)]
        if not differing:
            return
        told = ", ".join(_difference(n, self.identity.get(n), identity.get(n)) for n in differing)
        raise TrainingError(
            f"the checkpoint belongs to a training with another {told}",
            where=str(path),
            hint="begin anew with --fresh, or choose another folder",
        )


def find_checkpoint(place: str | Path) -> Path:
    """The checkpoint file of a run, of an unfinished run, or of that very name.

    Raises:
        TrainingError: There is none.
    """
    path = Path(place)
    for candidate in (path, path / FOLDER / FILE, path / FILE):
        if candidate.is_file():
            return candidate
    raise TrainingError(
        "there is no checkpoint of a training",
        where=str(place),
        hint="give a run of fxq train, or its training/checkpoint.safetensors",
    )


def initialize(module: nn.Module, place: str | Path) -> int:
    """The network begins with the weights, biases and norms of another training of it.

    Parameters named ``alpha``, and buffers of anything but norms, belong to the levels of that
    training and are not taken: thus networks of fewer bits begin where those of more bits ended.

    Args:
        module: The network.
        place: A run of ``fxq train``, or a checkpoint.

    Returns:
        The number of tensors that were taken.

    Raises:
        TrainingError: There is no checkpoint, or it is one of another network.

    Reference:
        Li, Dong, Wang, "Additive powers-of-two quantization", ICLR 2020, arXiv:1909.13144,
        section 4.1: 4, 3 and 2 bits begin with the weights of 5, 4 and 3.
    """
    path = find_checkpoint(place)
    found = Checkpoint.load(path).model
    wanted = _shared(module)
    missing = [
        f"{name} {list(value.shape)}"
        for name, value in wanted.items()
        if name not in found or found[name].shape != value.shape
    ]
    if missing or not wanted:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise TrainingError(
            f"the checkpoint is of another network: it has no {', '.join(missing[:3])}{more}",
            where=str(path),
            hint="begin with a training of the same network",
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(found[name])
    return len(wanted)


def _shared(module: nn.Module) -> dict[str, Tensor]:
    """The state that trainings of one network have in common, whatever their quantizers are."""
    shared: dict[str, Tensor] = {
        name: value for name, value in module.named_parameters() if not is_alpha(name)
    }
    for path, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._NormBase):
            shared |= {f"{path}.{n}".lstrip("."): value for n, value in child.named_buffers()}
    return shared


def _difference(name: str, before: Any, now: Any) -> str:
    """What differs, with the values where they are short.

    Example:
        >>> _difference("batch_size", 8, 16)
        'batch size (8, now 16)'
    """
    shown = name.replace("_", " ")
    texts = [str(before), str(now)]
    if any(len(text) > 24 or "\n" in text for text in texts):
        return shown
    return f"{shown} ({texts[0]}, now {texts[1]})"


def _own(value: Tensor) -> Tensor:
    """The tensor on the CPU, sharing memory with no other; safetensors refuses to share."""
    return value.detach().to("cpu", copy=True).contiguous()


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> TrainingError:
    return TrainingError(
        f"the checkpoint is damaged: {why}",
        where=str(path),
        hint="begin anew with --fresh; a checkpoint cannot be repaired",
    )
