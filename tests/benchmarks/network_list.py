"""The networks of the table of networks: how each is built, and what it takes.

Weights are random, and the statistics of batch norms such that values keep their size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxq.registry import find_network
from fxq.torchvision_import import import_torchvision

Inputs = Callable[[int, torch.Generator], tuple[Any, ...]]
TOKENS = 50


@dataclass(frozen=True)
class Network:
    """A network of the table.

    Attributes:
        name: Its name in the table; before the slash its family.
        build: Gives the module.
        inputs: Gives a batch of so many, as arguments of ``forward``.
        size: What one input is, for people.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    size: str

    def module(self) -> nn.Module:
        """The network in eval mode, always with the same weights."""
        torch.manual_seed(0)
        model = self.build().eval()
        settle(model, self.inputs(2, torch.Generator().manual_seed(3)))
        return model


def settle(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Every batch norm divides by the size of what it reads, and no layer's weights are all zero.

    Thus nothing vanishes or explodes. Batch norms subtract nothing: that would turn networks of
    random weights into amplifiers of noise.
    """

    def rescale(norm: Any, arguments: tuple[Tensor]) -> None:
        norm.running_mean.zero_()
        norm.running_var.fill_(arguments[0].square().mean())

    for name, weight in model.named_parameters():
        if name.endswith("weight") and not weight.any():
            nn.init.normal_(weight, std=0.1)
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(rescale) for norm in norms]
    if norms:
        with torch.no_grad():
            model(*inputs)
    for handle in handles:
        handle.remove()


# ---- inputs --------------------------------------------------------------------------------------


def normal(shape: tuple[int, ...], number: int = 1) -> tuple[Inputs, str]:
    """So many tensors from N(0, 1)."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn(count, *shape, generator=generator) for _ in range(number))

    return draw, (f"{number} of " if number > 1 else "") + "x".join(map(str, shape))


def tokens(shape: tuple[int, ...], number: int = 1, bound: int = TOKENS) -> tuple[Inputs, str]:
    """So many tensors of whole numbers."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        sizes = (count, *shape)
        return tuple(torch.randint(bound, sizes, generator=generator) for _ in range(number))

    return draw, (f"{number} of " if number > 1 else "") + f"{'x'.join(map(str, shape))} tokens"


def lists(side: int) -> tuple[Inputs, str]:
    """A list of images, as detectors take them."""

    def draw(count: int, generator: torch.Generator) -> tuple[list[Tensor]]:
        return ([torch.rand(3, side, side, generator=generator) for _ in range(count)],)

    return draw, f"[3x{side}x{side}]"


# ---- networks written here -----------------------------------------------------------------------


class Audio(nn.Sequential):
    """Conv1d on a waveform, after M5 (Dai et al., arXiv:1610.00087)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        shapes = [(1, 32, 80, 4), (32, 32, 3, 1), (32, 64, 3, 1), (64, 64, 3, 1)]
        for inputs, outputs, kernel, stride in shapes:
            layers += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs)]
            layers += [nn.ReLU(), nn.MaxPool1d(4)]
        layers += [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 35)]
        super().__init__(*layers)


class Recurrent(nn.Module):
    """Tokens to a class per token, through a recurrent layer of torch."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 32)
        self.project = nn.Linear(32, 64)
        self.recurrent = kind(64, 64, batch_first=True, **options)
        self.head = nn.Linear(128 if options.get("bidirectional") else 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(torch.relu(self.project(self.embedding(x))))
        return self.head(states).transpose(1, 2)


class Encoder(nn.Module):
    """Tokens to a class, through torch's Transformer encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


class Translator(nn.Module):
    """Tokens to tokens, through torch's Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(TOKENS, 64), nn.Embedding(TOKENS, 64)
        self.transformer = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
        self.head = nn.Linear(64, TOKENS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mixed = self.transformer(self.source(source), self.target(target))
        return self.head(mixed).transpose(1, 2)


# ---- the list ------------------------------------------------------------------------------------

CLASSIFICATION = (
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "googlenet",
    "inception_v3",
    "squeezenet1_0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "shufflenet_v2_x1_0",
    "mnasnet0_5",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "convnext_tiny",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
    "vit_b_16",
)
SEGMENTATION = (
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)
RESIZING = (
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
)
"""Detectors that resize their images to a size that can be chosen."""
REGIONS = {"rpn_post_nms_top_n_test": 100, "box_score_thresh": 0, "box_detections_per_img": 10}
"""Few regions, some of which become detections whatever the weights."""
FIXED = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
VIDEO = {
    "r3d_18": (3, 8, 56, 56),
    "mc3_18": (3, 8, 56, 56),
    "r2plus1d_18": (3, 8, 56, 56),
    "s3d": (3, 16, 224, 224),
    "swin3d_t": (3, 8, 64, 64),
}
TIMM = (
    "resnet18d",
    "efficientnet_lite0",
    "mobilenetv3_large_100",
    "convnext_atto",
    "ghostnet_100",
    "hrnet_w18_small",
    "mixer_s32_224",
    "deit_tiny_patch16_224",
    "repvgg_a0",
    "dla34",
    "tresnet_m",
    "regnetz_b16",
    "nfnet_l0",
    "mobilevit_xxs",
    "poolformer_s12",
)
ZOO = (
    "digits/convnet",
    "tiny/conv",
    "tiny/residual",
    "tiny/depthwise",
    "tiny/concat",
    "tiny/mlp",
    "cifar/resnet8",
    "cifar/resnet20",
    "cifar/resnet20-a",
    "cifar/alexnet",
    "cifar/vgg11",
    "imagenet/mobilenetv1-0.25",
    "imagenet/mobilenetv2",
    "sequence/transformer",
    "sequence/lstm",
    "sequence/gru",
)
SIDES = {"inception_v3": 139, "maxvit_t": 224, "raft_small": 128}
"""Image sides that networks ask for."""


def networks(side: int) -> dict[str, Network]:
    """All networks by name.

    Args:
        side: Of images in pixels, where a network takes any; a multiple of 32.
    """
    listed = [*_torchvision(side), *_zoo(side), *_written(), *_timm(side)]
    return {one.name: one for one in listed}


def _torchvision(side: int) -> list[Network]:
    found = []
    for name in (*CLASSIFICATION, *SEGMENTATION):
        own = SIDES.get(name, side)
        options: dict[str, Any] = {}
        if name == "vit_b_16":
            options["image_size"] = own
        if name in ("googlenet", "inception_v3"):
            options |= {"init_weights": False, "aux_logits": False}
        if name in SEGMENTATION:
            options["weights_backbone"] = None
        kind = "segmentation" if name in SEGMENTATION else "classification"
        build = partial(_model, name, **options)
        found.append(Network(f"{kind}/{name}", build, *normal((3, own, own))))
    for name in RESIZING:
        build = partial(
            _detector, name, min_size=side, max_size=side, **(REGIONS if "rcnn" in name else {})
        )
        found.append(Network(f"detection/{name}", build, *lists(side)))
    for name, own in FIXED.items():
        found.append(Network(f"detection/{name}", partial(_detector, name), *lists(own)))
    for name, shape in VIDEO.items():
        found.append(Network(f"video/{name}", partial(_model, name), *normal(shape)))
    shape = (3, SIDES["raft_small"], SIDES["raft_small"])
    found.append(Network("flow/raft_small", partial(_model, "raft_small"), *normal(shape, 2)))
    return found


def _model(name: str, **options: Any) -> nn.Module:
    module: nn.Module = import_torchvision().models.get_model(name, weights=None, **options)
    return module


def _detector(name: str, **options: Any) -> nn.Module:
    return _model(name, weights_backbone=None, **options)


def _zoo(side: int) -> list[Network]:
    found = []
    for name in ZOO:
        entry = find_network(name)
        shape = (3, side, side) if name.startswith("imagenet") else entry.input_shape[1:]
        drawn = tokens(shape, bound=entry.tokens) if entry.tokens else normal(shape)
        found.append(Network(f"zoo/{name}", entry.build, *drawn))
    return found


def _written() -> list[Network]:
    recurrent = {
        "torch_lstm": partial(Recurrent, nn.LSTM),
        "torch_bilstm": partial(Recurrent, nn.LSTM, num_layers=2, bidirectional=True),
        "torch_gru": partial(Recurrent, nn.GRU),
        "torch_encoder": Encoder,
    }
    sequences = [Network(f"written/{n}", b, *tokens((12,))) for n, b in recurrent.items()]
    both = Network("written/torch_transformer", Translator, *tokens((12,), 2))
    return [*sequences, both, Network("written/audio_conv1d", Audio, *normal((1, 8000)))]


def _timm(side: int) -> list[Network]:
    """Networks of timm; none where it is not installed."""
    import_torchvision()
    if importlib.util.find_spec("timm") is None:
        return []
    found = []
    for name in TIMM:
        sized = {"img_size": side} if name.startswith(("mixer", "deit")) else {}
        build = partial(_timm_model, name, **sized)
        found.append(Network(f"timm/{name}", build, *normal((3, side, side))))
    return found


def _timm_model(name: str, **options: Any) -> nn.Module:
    module: nn.Module = importlib.import_module("timm").create_model(name, **options)
    return module
