"""What a float instruction may name: pure functions and torch.nn, nothing that could do harm."""

from __future__ import annotations

import operator
import os
import subprocess
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.errors import ArtifactError
from fxq.integer.arguments import decode, encode
from fxq.integer.float_ops import (
    build_module,
    call_method,
    class_of,
    describe_module,
    method_allowed,
    resolve,
    target_of,
)

# ---- operators ---------------------------------------------------------------------------------

ALLOWED = [
    torch.add,
    torch.matmul,
    torch.cat,
    torch.einsum,
    torch.sigmoid,
    torch.softmax,
    torch.nn.functional.gelu,
    F.silu,
    F.layer_norm,
    F.scaled_dot_product_attention,
    F.max_pool2d,
    F.adaptive_max_pool2d,
    F.interpolate,
    F.normalize,
    F.softmax,
    F.hardswish,
    operator.add,
    operator.getitem,
    operator.mul,
]


@pytest.mark.parametrize("function", ALLOWED, ids=lambda one: str(target_of(one)))
def test_operators_are_found_again_by_name(function: Any) -> None:
    target = target_of(function)
    assert target is not None
    assert resolve(target) is function


REFUSED = [
    "torch.load",
    "torch.save",
    "torch.from_file",
    "torch.compile",
    "torch.hub.load",
    "torch.ops.load_library",
    "torch.set_num_threads",
    "torch.manual_seed",
    "torch.classes.load_library",
    "torch.jit.load",
    "torch.os.system",
    "torch._C._jit_pass_inline",
    "torch.serialization.load",
    "functional.boolean_dispatch",
    "functional.torch",
    "functional.importlib",
    "functional.Tensor",
    "functional.warnings.warn",
    "functional.__builtins__",
    "functional._verify_batch_size",
    "operator.attrgetter",
    "operator.methodcaller",
    "operator.itemgetter",
    "operator.call",
    "operator.setitem",
    "operator.__builtins__",
    "builtin.eval",
    "builtin.exec",
    "builtin.open",
    "builtin.__import__",
    "builtins.eval",
    "os.system",
    "os.path.exists",
    "posix.system",
    "subprocess.Popen",
    "subprocess.check_output",
    "shutil.rmtree",
    "eval",
    "",
    ".",
    "method.",
    "method.apply_",
    "method.map_",
    "method.register_hook",
    "method.backward",
    "method.set_",
    "method.storage",
    "method.numpy",
    "method.share_memory_",
    "method.__reduce_ex__",
    "method.__class__",
    "method.__setattr__",
    "method._make_subclass",
    "method.no_such_method",
    "method.shape",
    "method.a b",
    "torchvision.models.swin_transformer.swin_t",
    "torchvision.io.read_file",
    "fxq.artifact.load",
]


@pytest.mark.parametrize("target", REFUSED)
def test_other_names_are_refused(target: str) -> None:
    with pytest.raises(ArtifactError, match="not an operator it may use"):
        resolve(target)


@pytest.mark.parametrize(
    "function", [eval, open, os.system, subprocess.run, torch.load, torch.save, print, 3]
)
def test_other_functions_have_no_name(function: Any) -> None:
    assert target_of(function) is None


def test_the_list_holds_functions_only() -> None:
    """Nothing on the list is a class, a module, or lives outside torch and operator."""
    homes = ("torch.", "torch", "_operator", "builtins", "None")
    for prefix, owner in (("torch", torch), ("functional", F), ("operator", operator)):
        for name in dir(owner):
            try:
                found = resolve(f"{prefix}.{name}")
            except ArtifactError:
                continue
            assert isinstance(
                found, (types.FunctionType, types.BuiltinFunctionType, torch._ops.OpOverloadPacket)
            ), name
            assert str(getattr(found, "__module__", None)).startswith(homes), name


def test_attributes_are_read_from_a_short_list() -> None:
    read = resolve("builtin.getattr")
    x = torch.zeros(2, 3)
    assert read(x, "shape") == (2, 3)
    assert read(x, "T").shape == (3, 2)
    for name in ("__class__", "__dict__", "grad_fn", "storage", "_base", "numpy"):
        with pytest.raises(ArtifactError, match="reads the attribute"):
            read(x, name)


def test_methods_are_called_on_tensors_only() -> None:
    assert call_method("sum", torch.ones(3)).item() == 3
    assert call_method("numel", torch.Size([2, 3])) == 6
    with pytest.raises(ArtifactError, match="not a method it may use"):
        call_method("sum", ["not", "a", "tensor"])
    with pytest.raises(ArtifactError):
        call_method("apply_", torch.ones(3), abs)
    assert method_allowed("softmax")
    assert not any(method_allowed(name) for name in dir(torch.Tensor) if name.startswith("_"))


# ---- modules -----------------------------------------------------------------------------------

Sized = tuple[nn.Module, tuple[torch.Tensor, ...]]


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


MODULES: list[Sized] = [
    (nn.Sigmoid(), (image(2, 3),)),
    (nn.SiLU(), (image(2, 3),)),
    (nn.GELU("tanh"), (image(2, 3),)),
    (nn.Hardswish(), (image(2, 3),)),
    (nn.Hardsigmoid(), (image(2, 3),)),
    (nn.LeakyReLU(0.3), (image(2, 3),)),
    (nn.ELU(0.5), (image(2, 3),)),
    (nn.PReLU(3), (image(2, 3),)),
    (nn.Softplus(), (image(2, 3),)),
    (nn.Softmax(1), (image(2, 3),)),
    (nn.LogSoftmax(-1), (image(2, 3),)),
    (nn.Tanh(), (image(2, 3),)),
    (nn.Mish(), (image(2, 3),)),
    (nn.GLU(1), (image(2, 4),)),
    (nn.LayerNorm(4), (image(2, 4),)),
    (nn.RMSNorm(4), (image(2, 4),)),
    (nn.LayerNorm(4, elementwise_affine=False), (image(2, 4),)),
    (nn.GroupNorm(2, 4), (image(2, 4, 3),)),
    (nn.BatchNorm2d(3), (image(2, 3, 4, 4),)),
    (nn.BatchNorm1d(3, affine=False), (image(2, 3),)),
    (nn.InstanceNorm2d(3), (image(2, 3, 4, 4),)),
    (nn.LocalResponseNorm(2), (image(2, 3, 4, 4),)),
    (nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1), (image(2, 3, 4, 4),)),
    (nn.Conv2d(3, 4, 3, bias=False), (image(2, 3, 4, 4),)),
    (nn.ConvTranspose2d(3, 4, 2, stride=2), (image(2, 3, 4, 4),)),
    (nn.Linear(3, 2), (image(2, 3),)),
    (nn.Bilinear(3, 2, 2), (image(2, 3), image(2, 2))),
    (nn.Embedding(5, 2), (torch.tensor([1, 4]),)),
    (nn.AdaptiveAvgPool2d((3, 2)), (image(2, 3, 7, 7),)),
    (nn.AdaptiveMaxPool2d(2), (image(2, 3, 7, 7),)),
    (nn.AvgPool2d(3, ceil_mode=True), (image(2, 3, 7, 7),)),
    (nn.MaxPool1d(2), (image(2, 3, 7),)),
    (nn.LPPool2d(2, 3), (image(2, 3, 7, 7),)),
    (nn.Upsample(scale_factor=2, mode="bilinear"), (image(1, 2, 3, 3),)),
    (nn.PixelShuffle(2), (image(1, 4, 3, 3),)),
    (nn.ReflectionPad2d(1), (image(1, 2, 3, 3),)),
    (nn.Unfold(2), (image(1, 2, 3, 3),)),
    (nn.Dropout(0.5), (image(2, 3),)),
    (nn.Identity(), (image(2, 3),)),
    (nn.Flatten(), (image(2, 3, 4),)),
    (nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3)), (image(2, 3),)),
    (nn.MultiheadAttention(4, 2, batch_first=True), (image(2, 5, 4),) * 3),
    (nn.MultiheadAttention(4, 2, kdim=3, vdim=3), (image(5, 2, 4), image(5, 2, 3), image(5, 2, 3))),
    (nn.LSTM(3, 4, 2, bidirectional=True), (image(5, 2, 3),)),
    (nn.GRU(3, 4, batch_first=True), (image(5, 2, 3),)),
    (nn.CosineSimilarity(), (image(2, 3), image(2, 3) + 1)),
]


@pytest.mark.parametrize(("module", "inputs"), MODULES, ids=lambda one: type(one).__name__)
def test_modules_are_rebuilt_from_plain_data(
    module: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    module.eval()
    described = describe_module(module)
    assert described is not None
    description, tensors = described
    stored = decode(encode(description))
    rebuilt = build_module(stored, {name: value.clone() for name, value in tensors.items()})
    assert type(rebuilt) is type(module)
    assert not any(child.training for child in rebuilt.modules())
    with torch.no_grad():
        expected, found = module(*inputs), rebuilt(*inputs)
    for one, other in zip(_tensors(expected), _tensors(found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value or () for tensor in _tensors(item)]


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Louder(nn.GELU):
    pass


def hooked() -> nn.Module:
    module = nn.GELU()
    module.register_forward_hook(lambda *_: None)
    return module


def patched() -> nn.Module:
    module = nn.GELU()
    module.forward = lambda x: -x  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "module",
    [
        Own(),
        Louder(),
        nn.Sequential(nn.ReLU(), Own()),
        hooked(),
        patched(),
        nn.TransformerEncoderLayer(4, 2, 8),
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ],
    ids=["own", "subclass", "own inside", "hooks", "own forward", "function", "parametrized"],
)
def test_what_is_more_than_data_is_not_described(module: nn.Module) -> None:
    assert describe_module(module) is None


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "torch.nn.Linear",
        "torch.nn.modules.linear.torch",
        "torch.nn.modules.linear.init",
        "torch.nn.modules.no_such.Linear",
        "torch.nn.modules..linear.Linear",
        "torch.nn.modules.linear.Linear.forward",
        "torch.nn.modules.linear.__builtins__",
        "torch.nn.modules.conv.Tensor",
        "torch.nn.utils.parametrize.ParametrizationList",
        "tests.own.Own",
        "",
    ],
)
def test_other_classes_are_refused(path: str) -> None:
    assert class_of(path) is None
    with pytest.raises(ArtifactError, match="names the module"):
        build_module({"class": path, "attributes": {}, "empty": [], "children": {}}, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("__class__", 1),
        ("__dict__", 1),
        ("forward", "x"),
        ("_parameters", None),
        ("_forward_hooks", None),
        ("training", False),
        ("a b", 1),
        ("fine", object()),
        ("fine", [print]),
    ],
)
def test_other_attributes_are_refused(name: str, value: Any) -> None:
    path = "torch.nn.modules.activation.GELU"
    description = {"class": path, "attributes": {name: value}, "empty": [], "children": {}}
    with pytest.raises(ArtifactError, match="sets the attribute"):
        build_module(description, {})
