"""The networks fxq knows by name. Reading the list imports no torch."""

from __future__ import annotations

from fxq.zoo_entry import IMAGENET, Normalization, ZooEntry

_HE = "He et al., Deep residual learning for image recognition, arXiv:1512.03385"
_APOT = "Li, Dong, Wang, Additive powers-of-two quantization, arXiv:1909.13144"
_MLPERF = "Banbury et al., MLPerf Tiny benchmark, arXiv:2106.07597"
_V1 = "Howard et al., MobileNets, arXiv:1704.04861"
_ALEXNET = "Krizhevsky, One weird trick for parallelizing CNNs, arXiv:1404.5997"
_VGG = "Simonyan, Zisserman, Very deep convolutional networks, arXiv:1409.1556"
_ATTENTION = "Vaswani et al., Attention is all you need, arXiv:1706.03762"
_SEQ2SEQ = "Sutskever, Vinyals, Le, Sequence to sequence learning, arXiv:1409.3215"
_LUONG = "Luong, Pham, Manning, Attention-based machine translation, arXiv:1508.04025"
_V2 = "Sandler et al., MobileNetV2, arXiv:1801.04381"

_APOT_CIFAR = Normalization((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
_RAW = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
_SYMMETRIC = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DIGITS = Normalization((0.305,), (0.376,))

VOCABULARY = 16
SEQUENCE_LENGTH = 12

_DEPTHS = (20, 32, 44, 56, 110)


def _entry(
    name: str,
    function: str,
    input_shape: tuple[int, ...],
    summary: str,
    papers: tuple[str, ...] = (),
    normalization: Normalization | None = None,
    arguments: tuple[str | int | float | bool, ...] = (),
) -> ZooEntry:
    return ZooEntry(
        name=name,
        factory=f"fxq.models_zoo.{function}",
        input_shape=input_shape,
        summary=summary,
        papers=papers,
        normalization=normalization,
        arguments=arguments,
    )


def _cifar_resnet(depth: int) -> ZooEntry:
    return _entry(
        f"cifar/resnet{depth}",
        f"cifar_resnet:resnet{depth}",
        (1, 3, 32, 32),
        f"ResNet-{depth} for CIFAR-10, projection shortcuts (option B), head fc",
        (_HE, _APOT),
        _APOT_CIFAR,
    )


def _cifar_resnet_a(depth: int) -> ZooEntry:
    return _entry(
        f"cifar/resnet{depth}-a",
        f"cifar_resnet:resnet{depth}_a",
        (1, 3, 32, 32),
        f"ResNet-{depth} for CIFAR-10, padded shortcuts (option A), head linear",
        (_HE,),
        IMAGENET,
    )


def _sequence(name: str, function: str, summary: str, papers: tuple[str, ...]) -> ZooEntry:
    return ZooEntry(
        name=f"sequence/{name}",
        factory=f"fxq.models_zoo.{function}",
        input_shape=(1, 2, SEQUENCE_LENGTH),
        summary=summary,
        papers=papers,
        data="rewriting",
        tokens=VOCABULARY + 1,
    )


def _mobilenet_v1(width: str) -> ZooEntry:
    return _entry(
        f"imagenet/mobilenetv1-{width}",
        "mobilenet:mobilenet_v1",
        (1, 3, 224, 224),
        f"MobileNetV1 of width {width} as in Keras, batch norm and ReLU6",
        (_V1,),
        _SYMMETRIC,
        (float(width),),
    )


CATALOG: tuple[ZooEntry, ...] = (
    ZooEntry(
        name="digits/convnet",
        factory="fxq.models_zoo.digits:digits_convnet",
        input_shape=(1, 1, 8, 8),
        summary="Small residual network with trained weights and images of handwritten digits",
        papers=("Alpaydin, Kaynak, Optical recognition of handwritten digits, UCI 1998",),
        data="digits",
        weights="embedded",
        normalization=DIGITS,
    ),
    _entry("tiny/conv", "tiny:tiny_conv", (1, 3, 8, 8), "Two convolutions with batch norm"),
    _entry("tiny/residual", "tiny:tiny_residual", (1, 3, 8, 8), "One residual block"),
    _entry("tiny/depthwise", "tiny:tiny_depthwise", (1, 3, 8, 8), "Depthwise separable, ReLU6"),
    _entry("tiny/concat", "tiny:tiny_concat", (1, 3, 8, 8), "Two branches, concatenated"),
    _entry("tiny/mlp", "tiny:tiny_mlp", (1, 16), "Three linear layers, no convolution"),
    *(_cifar_resnet(depth) for depth in _DEPTHS),
    *(_cifar_resnet_a(depth) for depth in _DEPTHS),
    _entry(
        "cifar/resnet8",
        "mlperf_tiny:resnet8",
        (1, 3, 32, 32),
        "ResNet-8 of MLPerf Tiny for CIFAR-10, raw pixels in",
        (_MLPERF,),
        _RAW,
    ),
    _entry(
        "cifar/alexnet",
        "cifar_alexnet:alexnet",
        (1, 3, 32, 32),
        "AlexNet for CIFAR-10, half as wide, with dropout",
        (_ALEXNET,),
        _APOT_CIFAR,
    ),
    _entry(
        "cifar/vgg11",
        "cifar_vgg:vgg11",
        (1, 3, 32, 32),
        "VGG-11 with batch norm for CIFAR-10, half as wide",
        (_VGG,),
        _APOT_CIFAR,
    ),
    _sequence(
        "transformer",
        "sequence_transformer:transformer",
        "Encoder and decoder with attention, which learns to rewrite short sequences",
        (_ATTENTION,),
    ),
    _sequence(
        "lstm",
        "sequence_recurrent:lstm",
        "LSTM encoder and decoder with attention, unrolled; learns the same",
        (_SEQ2SEQ, _LUONG),
    ),
    _sequence(
        "gru",
        "sequence_recurrent:gru",
        "GRU encoder and decoder with attention, unrolled; learns the same",
        (_SEQ2SEQ, _LUONG),
    ),
    *(_mobilenet_v1(width) for width in ("0.25", "0.5", "0.75", "1.0")),
    _entry(
        "imagenet/mobilenetv2",
        "mobilenet:mobilenet_v2",
        (1, 3, 224, 224),
        "MobileNetV2 with batch norm already folded, ReLU6",
        (_V2,),
        _SYMMETRIC,
    ),
)
