"""The record by which a network is known to fxq: its name, factory, input and training data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Normalization:
    """How pixels become network input: ``(x / 255 - mean) / std``, channel by channel.

    Attributes:
        mean: One value per channel, in units of ``x / 255``.
        std: One value per channel, in units of ``x / 255``, each positive.

    Raises:
        ValueError: If the two differ in length, or a standard deviation is not positive.

    Example:
        >>> Normalization((0.5,), (0.25,)).channels
        1
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the lengths and signs."""
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError("mean and std need one value per channel each")
        if any(not value > 0 for value in self.std):
            raise ValueError("every std must be positive")

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Channel statistics of the ImageNet training images, as torchvision's networks expect them."""


@dataclass(frozen=True)
class ZooEntry:
    """A network that can be asked for by name.

    Attributes:
        name: Name used by ``fxq compile NAME``, for example ``cifar/resnet20``.
        factory: ``"module:callable"``, imported only when the network is built; called with
            ``arguments``, it returns an ``nn.Module``.
        input_shape: Shape of one example batch, for example ``(1, 3, 32, 32)``.
        summary: One line for ``fxq models``.
        papers: Where the network comes from.
        data: Name of the built-in data source it goes with, or ``""`` where there is none.
        weights: Name of the weights it is built with: ``"embedded"``, or ``"random"``.
        normalization: How image bytes become its input; None where the input is no image.
        arguments: Positional arguments of the factory.
        tokens: Number of tokens, where the input is whole numbers from 0; 0 where it is real.
        takes_list: Whether the input is a list of images ``[C, H, W]`` in 0..1, as of detectors.
    """

    name: str
    factory: str
    input_shape: tuple[int, ...]
    summary: str
    papers: tuple[str, ...] = ()
    data: str = ""
    weights: str = "random"
    normalization: Normalization | None = None
    arguments: tuple[str | int | float | bool, ...] = ()
    tokens: int = 0
    takes_list: bool = False

    @property
    def size(self) -> int:
        """Side of the square input image in pixels; for a vector input, its length."""
        return self.input_shape[-1]

    def example(self, seed: int = 0) -> torch.Tensor | list[torch.Tensor]:
        """One example batch of ``input_shape``: from N(0, 1); tokens or listed images evenly.

        Args:
            seed: Where it is drawn from.
        """
        import torch

        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(self.tokens, self.input_shape, generator=generator)
        if self.takes_list:
            return list(torch.rand(self.input_shape, generator=generator))
        return torch.randn(self.input_shape, generator=generator)

    def build(self, seed: int | None = 0) -> torch.nn.Module:
        """The network, in eval mode.

        Args:
            seed: Where random weights are drawn from, leaving torch's global generator as it was;
                None draws them from the global generator.
        """
        import importlib

        import torch

        module_name, _, attribute = self.factory.partition(":")
        builder: Callable[..., torch.nn.Module] = getattr(
            importlib.import_module(module_name), attribute
        )
        if seed is None:
            return builder(*self.arguments).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return builder(*self.arguments).eval()
