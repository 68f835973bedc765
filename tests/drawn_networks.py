"""Random small networks: ``draw(seed)`` writes one in the grammar of layers, and makes it.

The first blocks of a network are the same however many follow: fewer blocks of the same seed are a
smaller network to look at.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from network_grammar import Writer, affine, block
from torch import Tensor, nn

SIZES = {
    2: ((1, 1), (1, 1), (1, 7), (4, 4), (5, 5), (8, 8), (9, 6)),
    1: ((1,), (7,), (12,), (16,)),
    0: ((),),
}
"""Spatial sizes, by how many dimensions there are."""


@dataclass(frozen=True)
class Network:
    """A drawn network.

    Attributes:
        source: Its class, ``Network``, in a module that knows ``torch``, ``nn`` and ``F``.
        model: One of it, in eval mode.
        calibration: Batches of its input.
        images: One more.
    """

    source: str
    model: nn.Module
    calibration: list[Tensor]
    images: Tensor


def draw(seed: int, blocks: int | None = None) -> Network:
    """The network of a seed; of its blocks only the first, where their number is given."""
    random = Random(f"network {seed}")
    dims = random.choice((2, 2, 2, 2, 1, 0))
    sizes, channels = random.choice(SIZES[dims]), random.choice((1, 2, 3, 4, 6, 8))
    batch, is_last, count = random.choice((1, 2, 4)), random.random() < 0.2, random.randint(1, 5)
    generator = torch.Generator().manual_seed(seed)
    shift = random.choice((0.0, 0.0, 1.0))
    batches = [torch.randn(batch, channels, *sizes, generator=generator) + shift for _ in range(3)]
    if dims == 2 and is_last:
        batches = [one.contiguous(memory_format=torch.channels_last) for one in batches]
    writer = Writer(random, batches[0].clone())
    for _ in range(count if blocks is None else min(blocks, count)):
        block(writer)
    if not any("Conv" in text or "Linear" in text for text in writer.layers.values()):
        affine(writer)
    source = _source(writer, head(writer))
    return Network(source, build(source, seed), batches[:2], batches[2])


def head(w: Writer) -> str:
    """What the network returns, as source."""
    kind = w.one_of("none", "both", "dict", *["classes"] * 6)
    middle = w.x
    if kind == "none":
        return middle
    if w.dims:
        axes = tuple(range(2, 2 + w.dims))
        w.say(w.one_of(f"x.mean({axes})", f"F.adaptive_avg_pool{w.dims}d(x, 1)", "x.flatten(1)"))
        if len(w.shape) > 2:
            w.say(w.one_of("x.flatten(1)", "torch.flatten(x, 1)", "x.view(x.size(0), -1)"))
    w.say(f"self.{{nn.Linear({w.channels}, 5)}}(x)")
    if w.maybe(0.15):
        w.say(w.one_of("x.softmax(1)", "F.log_softmax(x, dim=1)", "torch.relu(x)"))
    answers = {"classes": w.x, "both": f"{w.x}, {middle}"}
    return answers.get(kind, f"{{'out': {w.x}, 'features': {middle}}}")


def _source(w: Writer, answer: str) -> str:
    layers = [f"        self.{name} = {text}\n" for name, text in w.layers.items()]
    lines = [f"        {line}\n" for line in w.lines]
    return (
        "class Network(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"{''.join(layers)}\n    def forward(self, images):\n"
        f"{''.join(lines)}        return {answer}\n"
    )


def build(source: str, seed: int) -> nn.Module:
    """The network, in eval mode, with weights of this seed: some channels are zero, some large."""
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "__name__": "drawn"}
    exec(source, scope)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = scope["Network"]()
        for module in model.modules():
            _set_up(module)
    return model.eval()


def _set_up(module: Any) -> None:
    """Batch norms have statistics as after training; one channel of a layer may be special."""
    with torch.no_grad():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.1, 2.0)
            if module.affine:
                module.weight.normal_(1, 0.5)
                module.bias.normal_(0, 0.3)
        elif isinstance(getattr(module, "weight", None), Tensor) and torch.rand(()) < 0.3:
            module.weight.flatten(0, -1)[: module.weight[0].numel()] *= float(
                torch.tensor([0.0, 20.0])[torch.randint(2, ())]
            )
