"""The optimizer: which parameters decay, and which have a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fxq.errors import TrainingError
from fxq.training.options import TrainingOptions

ALPHA = "alpha"
"""The last part of the name of a learned clipping threshold."""

Named = tuple[str, nn.Parameter]


def is_alpha(name: str) -> bool:
    """Whether a parameter of that name is a learned clipping threshold.

    Example:
        >>> [is_alpha(name) for name in ("conv1.weight_quantizer.alpha", "conv1.weight")]
        [True, False]
    """
    return name.rpartition(".")[2] == ALPHA


def parameter_groups(module: nn.Module) -> dict[str, list[Named]]:
    """The trainable parameters of a network, by how they are treated.

    ``weights`` decay; ``plain`` are the parameters of norms, and all that have one dimension or
    none, such as biases; ``alpha`` are the learned clipping thresholds.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> {kind: [name for name, _ in named] for kind, named in parameter_groups(net).items()}
        {'weights': ['0.weight'], 'plain': ['0.bias', '1.weight', '1.bias'], 'alpha': []}
    """
    groups: dict[str, list[Named]] = {"weights": [], "plain": [], ALPHA: []}
    norms = set(_norm_parameters(module))
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_alpha(name):
            groups[ALPHA].append((name, parameter))
        elif parameter.ndim <= 1 or name in norms:
            groups["plain"].append((name, parameter))
        else:
            groups["weights"].append((name, parameter))
    return groups


def _norm_parameters(module: nn.Module) -> Iterator[str]:
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    for path, child in module.named_modules():
        if isinstance(child, norms):
            yield from (f"{path}.{name}".lstrip(".") for name, _ in child.named_parameters())


def make_optimizer(module: nn.Module, options: TrainingOptions) -> torch.optim.SGD:
    """The optimizer of a network; each group knows its rate at the top of the schedule.

    Raises:
        TrainingError: There is nothing to train.
    """
    named = parameter_groups(module)
    if not any(named.values()):
        raise TrainingError(
            "the network has no trainable parameters", hint="set requires_grad on some"
        )
    rates = {"weights": options.lr, "plain": options.lr, ALPHA: options.alpha_rate}
    decays = {"weights": options.weight_decay, "plain": 0.0, ALPHA: options.alpha_decay}
    groups = [
        {
            "params": [parameter for _, parameter in members],
            "top_lr": rates[kind],
            "weight_decay": decays[kind],
        }
        for kind, members in named.items()
        if members
    ]
    return torch.optim.SGD(
        groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group has its top learning rate times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["top_lr"] * factor


def momentum_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The momentum of each parameter that has one, by name."""
    found = {}
    for name, parameter in module.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            found[name] = buffer
    return found


def restore_momentum(
    module: nn.Module, optimizer: torch.optim.Optimizer, momentum: dict[str, Tensor]
) -> None:
    """The optimizer has this momentum."""
    parameters = dict(module.named_parameters())
    for name, buffer in momentum.items():
        parameter = parameters[name]
        optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device)
