import subprocess
import sys

import pytest
import torch
from torch import nn

import fxq.models_zoo as zoo
from fxq.errors import UnknownNameError
from fxq.models_zoo import CATALOG, lookup
from fxq.zoo_entry import Normalization, ZooEntry

NAMES = [entry.name for entry in CATALOG]


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys, fxq.models_zoo as zoo; assert zoo.CATALOG[0].summary;"
        "assert zoo.lookup('cifar/resnet20').size == 32;"
        "assert not {'torch', 'torchvision', 'numpy', 'PIL'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_network_builds_and_traces(name: str) -> None:
    entry = lookup(name)
    network = entry.build()
    traced = torch.fx.symbolic_trace(network)
    example = entry.example()
    with torch.no_grad():
        output = network(example)
        assert torch.equal(traced(example), output)
    shapes = {"imagenet": (1, 1000), "sequence": (1, 16, 12)}
    assert output.shape == shapes.get(name.partition("/")[0], (1, 10))
    assert output.isfinite().all()
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("name", ["cifar/resnet20", "tiny/residual", "digits/convnet"])
def test_build_is_reproducible_and_leaves_the_generator(name: str) -> None:
    before = torch.get_rng_state()
    first, second = lookup(name).build().state_dict(), lookup(name).build().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_seed_chooses_the_weights() -> None:
    entry = lookup("cifar/resnet20")
    assert not torch.equal(entry.build(seed=1).conv1.weight, entry.build(seed=2).conv1.weight)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tiny/")])
def test_tiny_batch_norms_show_a_broken_fold(name: str) -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    norms = [module for module in lookup(name).build().modules() if isinstance(module, kinds)]
    assert norms
    for norm in norms:
        assert (norm.weight < 0).sum() == 1
        assert (norm.weight == 0).sum() == 1
        assert norm.running_mean.abs().max() > 0.1
        assert (norm.running_var - 1).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "parameters"),  # He et al., table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M
    [("20", 269722), ("32", 464154), ("44", 658586), ("56", 853018), ("110", 1727962)],
)
def test_option_a_has_the_published_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = lookup(f"cifar/resnet{name}-a").build(seed=None)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_mobilenet_v1_has_the_published_size() -> None:
    with torch.device("meta"):
        full = lookup("imagenet/mobilenetv1-1.0").build(seed=None)
    assert sum(p.numel() for p in full.parameters()) == 4231976


def test_every_export_is_there() -> None:
    assert all(getattr(zoo, name) is not None for name in zoo.__all__)
    assert callable(zoo.resnet8)


def test_unknown_export() -> None:
    with pytest.raises(AttributeError, match="no attribute 'resnet21'"):
        zoo.resnet21  # noqa: B018


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cifar/resnet20'"):
        lookup("cifar/resnet-20")


@pytest.mark.parametrize(("depth", "option"), [(21, "A"), (2, "B"), (20, "C")])
def test_impossible_resnets(depth: int, option: str) -> None:
    from fxq.models_zoo.cifar_resnet import ResNetTrunk

    with pytest.raises(ValueError, match="must be"):
        ResNetTrunk(depth, option)


@pytest.mark.parametrize(("mean", "std"), [((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))])
def test_impossible_normalizations(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="std"):
        Normalization(mean, std)


def test_a_third_party_entry_builds() -> None:
    entry = ZooEntry("mine", "torch.nn:Linear", (1, 3), "mine", arguments=(3, 2))
    assert entry.build()(torch.zeros(1, 3)).shape == (1, 2)
