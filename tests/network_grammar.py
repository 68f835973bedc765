"""A grammar of layers: blocks that write a network line by line, as Python source.

Every line is run on an example as it is written, so that the next block knows the shape it
continues from.
"""

from __future__ import annotations

import re
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 32
"""Channels, and pixels of a side, beyond which nothing grows."""

RECTIFIERS = (
    *("self.{nn.ReLU()}(x)", "self.{nn.ReLU(inplace=True)}(x)", "F.relu(x)", "x.relu()"),
    *("torch.relu(x)", "x.clamp(min=0)", "x.relu_()", "self.{nn.ReLU6()}(x)", "F.relu6(x)"),
    *("self.{nn.Hardtanh(0.0, 3.0)}(x)", "x.clamp(0, 6)", "torch.clamp(x, min=0.0)"),
)
ACTIVATIONS = (
    *("self.{nn.Hardtanh()}(x)", "F.hardtanh(x, -0.5, 2.0)", "self.{nn.SiLU()}(x)", "F.silu(x)"),
    *("self.{nn.Sigmoid()}(x)", "torch.sigmoid(x)", "x.tanh()", "self.{nn.GELU()}(x)"),
    *("F.gelu(x)", "self.{nn.Hardswish()}(x)", "self.{nn.Hardsigmoid()}(x)", "x.abs()"),
    *("self.{nn.LeakyReLU(0.1)}(x)", "self.{nn.ELU()}(x)", "self.{nn.PReLU()}(x)", "F.mish(x)"),
    *("x * torch.sigmoid(x)", "x * F.relu6(x + 3) / 6", "F.softplus(x)"),
)
ARITHMETIC = (
    *("x * 0.5", "x + 1.0", "1.5 - x", "x / 3", "-x", "x.float()", "self.{nn.Identity()}(x)"),
    *("x - x.mean(1, keepdim=True)", "self.{nn.Dropout(0.2)}(x)", "F.dropout(x, 0.1, False)"),
    *("F.dropout(x, training=self.training)", "x.contiguous()", "x.reshape(x.shape)"),
    *("torch.flip(x, (1,))", "x.clone()", "x.masked_fill(x > 2, 1.0)", "x.softmax(1)"),
)


_X = r"(?<![\w.])x(?!\w)"


class Writer:
    """A network that is being written.

    Args:
        random: What draws.
        x: The example that its lines are run on.

    Attributes:
        dims: How many spatial dimensions there are.
        x: The name of the value that the next block continues from.
    """

    def __init__(self, random: Random, x: Tensor) -> None:
        self.random = random
        self.dims = x.dim() - 2
        self.x = "images"
        self.layers: dict[str, str] = {}
        self.lines: list[str] = []
        self._modules = SimpleNamespace(training=False)
        self._values: dict[str, Any] = {"images": x}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value that the next block continues from."""
        return tuple(self._values[self.x].shape)

    @property
    def channels(self) -> int:
        return self.shape[1]

    def layer(self, text: str) -> str:
        """The network has a layer of this constructor; its name."""
        name = f"{text.partition('(')[0].rpartition('.')[2].lower()}{len(self.layers)}"
        self.layers[name] = text
        setattr(self._modules, name, eval(text, {"nn": nn, "torch": torch}).eval())
        return name

    def say(self, text: str) -> str:
        """The value of an expression of ``x`` has a name, and is what the next block sees.

        ``self.{nn.ReLU()}(x)`` calls a layer of that constructor.
        """
        if "{" in text:
            before, _, rest = text.partition("{")
            constructor, _, after = rest.rpartition("}")
            text = before + self.layer(constructor) + after
        scope = {"torch": torch, "F": F, "self": self._modules, **self._values}
        scope |= {"x": self._values[self.x]}
        with torch.no_grad():
            value = eval(text, scope)
        name = f"x{len(self._values)}"
        self.lines.append(f"{name} = {re.sub(_X, self.x, text)}")
        self._values[name] = value
        self.x = name
        return name

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def maybe(self, share: float = 0.5) -> bool:
        return self.random.random() < share


# ---- layers --------------------------------------------------------------------------------------


def affine(w: Writer, out: int | None = None, *, keep: bool = False) -> None:
    """A linear layer or a convolution; with ``keep`` the shape stays."""
    inside = w.channels
    out = inside if keep else out or w.one_of(1, 3, 4, 6, 8, 12)
    bias = w.maybe(0.6)
    if not w.dims:
        w.say(f"self.{{nn.Linear({inside}, {out}, bias={bias})}}(x)")
        return
    groups = w.one_of(1, 1, 1, *(g for g in (2, 3, 4, inside) if inside % g == 0 == out % g))
    stride = 1 if keep else w.one_of(1, 1, 1, 2, 3)
    padding = "same" if keep or (stride == 1 and w.maybe(0.2)) else w.one_of(0, 1, 2)
    dilation = w.one_of(1, 1, 2) if padding == "same" else 1
    kernel = tuple(_kernel(w, size, padding) for size in w.shape[2:])
    modes = ["zeros"] * 6 + ["replicate"]
    if padding != 0 and dilation * max(kernel) < 2 * min(w.shape[2:]) and min(w.shape[2:]) > 2:
        modes += ["reflect", "circular"]
    w.say(
        f"self.{{nn.Conv{w.dims}d({inside}, {out}, {kernel}, stride={stride}, "
        f"padding={padding!r}, dilation={dilation}, groups={groups}, bias={bias}, "
        f"padding_mode={w.one_of(*modes)!r})}}(x)"
    )


def _kernel(w: Writer, size: int, padding: Any) -> int:
    if padding == "same":
        return int(w.one_of(*(k for k in (1, 3, 5) if k <= 2 * size - 1)))
    return int(w.one_of(*(k for k in (1, 1, 2, 3, 3, 4, 5) if k <= size + 2 * padding)))


def norm(w: Writer) -> None:
    w.say(f"self.{{nn.BatchNorm{w.dims or 1}d({w.channels}, affine={w.maybe(0.9)})}}(x)")


def activation(w: Writer) -> None:
    w.say(w.one_of(*(RECTIFIERS if w.maybe(0.7) else ACTIVATIONS)))


def layer(w: Writer, *, keep: bool = False) -> None:
    """A convolution or linear layer, with or without batch norm and activation, in any order."""
    for part in w.one_of("l", "la", "lna", "lna", "lna", "lan", "ln", "nal", "aln", "nl"):
        if part == "l":
            affine(w, keep=keep)
        else:
            {"n": norm, "a": activation}[part](w)


# ---- blocks --------------------------------------------------------------------------------------


def depthwise(w: Writer) -> None:
    """A depthwise convolution, perhaps with a multiplier, and a pointwise one."""
    c, d = w.channels, w.dims
    stride, bias, out = w.one_of(1, 2), w.maybe(), c * w.one_of(1, 1, 2)
    w.say(f"self.{{nn.Conv{d}d({c}, {out}, 3, {stride}, padding=1, groups={c}, bias={bias})}}(x)")
    norm(w)
    activation(w)
    w.say(f"self.{{nn.Conv{d}d({out}, {w.one_of(4, 8)}, 1)}}(x)")


def transposed(w: Writer) -> None:
    c, stride = w.channels, w.one_of(1, 2)
    groups = w.one_of(1, *(g for g in (2, c) if c % g == 0))
    out, kernel = groups * w.one_of(1, 2), w.one_of(2, 3)
    w.say(f"self.{{nn.ConvTranspose{w.dims}d({c}, {out}, {kernel}, {stride}, groups={groups})}}(x)")


def pool(w: Writer) -> None:
    d, small = w.dims, min(w.shape[2:])
    size = w.one_of(1, *(k for k in (2, 3) if k <= small))
    stride, padding, ceil = w.one_of(1, 2, 3), w.one_of(0, size // 2), w.maybe(0.3)
    choices = [
        f"F.max_pool{d}d(x, {size}, {stride}, {padding}, ceil_mode={ceil})",
        f"self.{{nn.MaxPool{d}d({size}, {stride}, {padding}, ceil_mode={ceil})}}(x)",
        f"self.{{nn.AvgPool{d}d({size}, {stride}, {padding}, {ceil}, {w.maybe()})}}(x)",
        f"self.{{nn.AdaptiveAvgPool{d}d({w.one_of(1, 2, 3)})}}(x)",
        f"F.adaptive_max_pool{d}d(x, {w.one_of(1, 2)})",
        f"F.avg_pool{d}d(x, {size})",
    ]
    w.say(w.one_of(*choices))


def resize(w: Writer) -> None:
    mode = w.one_of("nearest", "bilinear" if w.dims == 2 else "linear")
    w.say(
        w.one_of(
            f"F.interpolate(x, scale_factor=2, mode={mode!r})",
            f"self.{{nn.Upsample(scale_factor=2, mode={mode!r})}}(x)",
            f"F.interpolate(x, size={w.one_of(3, 5)}, mode={mode!r})",
            f"F.pad(x, ({w.one_of(0, 1)}, {w.one_of(1, 2)}))",
            "x[:, :, ::2]",
        )
    )


def residual(w: Writer) -> None:
    """One or two layers, whose result the input is added to."""
    start = w.x
    for _ in range(w.one_of(1, 2)):
        layer(w, keep=True)
    end = w.x
    if w.maybe(0.2):
        w.x = start
        affine(w, keep=True)
        start = w.x
    w.x = end
    w.say(w.one_of("x + {0}", "{0} + x", "torch.add(x, {0})", "x.add({0})").format(start))
    if w.maybe(0.6):
        activation(w)


def concat(w: Writer) -> None:
    """Two or three branches of the same value, side by side."""
    start, ends = w.x, []
    for index in range(w.one_of(2, 2, 3)):
        w.x = start
        if index == 0 or w.maybe(0.8):
            layer(w, keep=True)
        ends.append(w.x)
    w.say(f"torch.cat([{', '.join(ends)}], {w.one_of(1, 1 - len(w.shape))})")


def shared(w: Writer) -> None:
    """One layer that is called twice, perhaps with something between."""
    c, d = w.channels, w.dims
    text = f"nn.Conv{d}d({c}, {c}, 3, padding=1)" if d else f"nn.Linear({c}, {c})"
    name = w.layer(text)
    start = w.say(f"self.{name}(x)")
    if w.maybe():
        activation(w)
    w.say(f"self.{name}(x)")
    if w.maybe():
        w.say(f"x + {start}")


def split(w: Writer) -> None:
    """Two halves, one of which is changed; together again, perhaps crosswise."""
    half = w.channels // 2
    w.say(w.one_of("x.chunk(2, 1)", f"x.split([{half}, {w.channels - half}], 1)"))
    both = w.x
    w.say("x[0]")
    layer(w, keep=True)
    left = w.x
    w.x = both
    w.say("x[1]")
    w.say(w.one_of(f"torch.cat([x, {left}], 1)", f"torch.cat([{left}, x], dim=1)"))


def gate(w: Writer) -> None:
    """Squeeze and excitation: channels weighed by what their means say."""
    start, c, axes = w.x, w.channels, tuple(range(2, 2 + w.dims))
    w.say(w.one_of(f"x.mean({axes}, keepdim=True)", f"F.adaptive_avg_pool{w.dims}d(x, 1)"))
    for inside, out in ((c, 4), (4, c)):
        w.say(f"self.{{nn.Conv{w.dims}d({inside}, {out}, 1)}}(x)")
        if out == 4:
            activation(w)
    w.say(w.one_of("torch.sigmoid(x)", "self.{nn.Hardsigmoid()}(x)"))
    w.say(f"{start} * x")


def channels_last(w: Writer) -> None:
    """Linear layers along the channels, and channels in front again."""
    c = w.channels
    there, back = ("(0, 2, 3, 1)", "(0, 3, 1, 2)") if w.dims == 2 else ("(0, 2, 1)", "(0, 2, 1)")
    w.say(f"x.permute{there}")
    if w.maybe():
        w.say(f"self.{{nn.LayerNorm({c})}}(x)")
    w.say(f"self.{{nn.Linear({c}, {c})}}(x)")
    activation(w)
    w.say(f"self.{{nn.Linear({c}, {c})}}(x)")
    w.say(f"x.permute{back}")


def arithmetic(w: Writer) -> None:
    w.say(w.one_of(*ARITHMETIC))


def dead(w: Writer) -> None:
    """A branch that nothing reads."""
    start = w.x
    layer(w)
    w.x = start


def other_norm(w: Writer) -> None:
    if max(w.shape[1:]) == 1:  # torch has no norm of one value
        return
    groups = 1 if max(w.shape[2:]) == 1 else w.one_of(1, w.channels)
    w.say(f"self.{{nn.GroupNorm({groups}, {w.channels})}}(x)")


EVERYWHERE = (layer, layer, layer, residual, residual, concat, shared, arithmetic, dead, activation)
SPATIAL = (depthwise, transposed, pool, pool, resize, gate, channels_last, other_norm)


def block(w: Writer) -> None:
    """One more block that fits."""
    choices = [*EVERYWHERE, *(SPATIAL if w.dims else ())]
    if w.channels > 1:
        choices.append(split)
    too_large = max(w.shape[1:]) > LARGEST
    (affine if too_large and not w.dims else pool if too_large else w.one_of(*choices))(w)
